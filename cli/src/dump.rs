//! `torpor dump`: from a running process to an image.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory;
use clap::error::ErrorKind;
use serde::Serialize;
use torpor_dumper::{Destination, Error as DumpError, ExternalUnix, Freeze, Frozen, Options, Rule, Rules};
use torpor_dumper::{Target, TcpPolicy, Tracking, Way};
use torpor_image::manifest::{Manifest, Times};
use torpor_image::{Encoding, Identities, Image};

use crate::args::{self, Cli, DumpArgs, Tcp};
use crate::exit::{self, Exit, Failure};
use crate::held::Held;
use crate::progress::Progress;
use crate::{encoding, every, output, stream, verify};

/// What becomes of the process when its image is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Afterwards {
    Ended,
    Running,
    Stopped,
}

/// What a dump of the same process has left for the next one.
#[derive(Default)]
pub(crate) struct Watched {
    /// The image that the new one builds on.
    pub(crate) parent: Option<Image>,
    /// The watches over the process, if they are ours.
    pub(crate) tracking: Option<Tracking>,
    /// Whether data files of the parent become the new image's own.
    pub(crate) link: bool,
}

/// What becomes of what a dump cannot keep by itself.
#[derive(Clone, Default)]
pub(crate) struct Choices {
    pub(crate) rules: Rules,
    pub(crate) tcp: TcpPolicy,
    pub(crate) external_unix: Vec<ExternalUnix>,
    /// The image that the new one builds on.
    pub(crate) parent: Option<PathBuf>,
    /// Whether writes shall be followed after the dump.
    pub(crate) track: bool,
    pub(crate) encoding: Encoding,
    /// The keys of the parent.
    pub(crate) identities: Identities,
    pub(crate) freeze: Option<Freeze>,
}

/// What was dumped.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) pid: i32,
    pub(crate) name: String,
    /// The root and all below it.
    pub(crate) processes: usize,
    pub(crate) threads: u32,
    dir: String,
    /// Of all files of the image but the manifest.
    pub(crate) bytes: u64,
    files: usize,
    taken_at: u64,
    ran_on: bool,
    not_captured: Vec<String>,
    times: Times,
    freeze: Freeze,
    fallback: Option<String>,
}

pub(crate) fn run(args: &DumpArgs) -> anyhow::Result<Exit> {
    let track = args.track || args.every.is_some();
    let afterwards = match (args.leave_running || track, args.leave_stopped) {
        (true, _) => Afterwards::Running,
        (_, true) => Afterwards::Stopped,
        _ => Afterwards::Ended,
    };
    if args.tcp == Tcp::Keep && afterwards != Afterwards::Ended {
        let why = "`--tcp keep` is for a process that ends with the dump: what goes on with its connections \
                   cannot be restored to them";
        Cli::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    if (args.parent.is_some() || args.every.is_some()) && args.dir == Path::new("-") {
        let why = "an image on standard output cannot build on another: name a directory, or leave out --parent and --every";
        Cli::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    let tcp = match args.tcp {
        Tcp::Refuse => TcpPolicy::Refuse,
        Tcp::Close => TcpPolicy::Close,
        Tcp::Keep => TcpPolicy::Keep,
    };
    let freeze = args.freeze.map(|freeze| match freeze {
        args::Freeze::Copy => Freeze::Copy,
        args::Freeze::Fork => Freeze::Fork,
        args::Freeze::Track => Freeze::Track,
    });
    if (track || args.parent.is_some()) && freeze.is_some_and(|freeze| freeze != Freeze::Track) {
        let why = "with `--track`, `--parent` or `--every` memory is taken by `--freeze track`";
        Cli::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    let choices = Choices {
        rules: rules(args)?,
        tcp,
        external_unix: args.external_unix.clone(),
        parent: args.parent.clone(),
        track,
        encoding: encoding::of(&args.encoding)?,
        identities: Identities::read(&args.encoding.identity)?,
        freeze,
    };
    if let Some(every) = args.every {
        return every::run(args, &choices, every);
    }
    let (summary, held) = dump(args.pid, &args.dir, afterwards, args.fsync, choices)?;
    if !args.quiet {
        tell(&summary, args, afterwards);
    }
    held.keep();
    Ok(Exit::Ok)
}

/// Says what was dumped.
pub(crate) fn tell(summary: &Summary, args: &DumpArgs, afterwards: Afterwards) {
    for lost in &summary.not_captured {
        output::note(&format!("not in the image: {lost}"));
    }
    if let Some(why) = &summary.fallback {
        output::note(&format!("memory was copied while the process stood still: {why}"));
    }
    let printed = match (args.dir == Path::new("-"), args.json) {
        // Standard output is the image's.
        (true, true) => serde_json::to_string(&summary)
            .map(|json| output::aside(&format!("{json}\n")))
            .map_err(anyhow::Error::from),
        (true, false) => {
            output::aside(&line(summary, afterwards));
            Ok(())
        }
        (false, true) => output::json(&summary),
        (false, false) => output::print(&line(summary, afterwards)),
    };
    // What is done cannot be taken back: a failure would say that the process goes on and there is no image.
    if let Err(e) = printed
        && !output::is_closed(&e)
    {
        output::note(&format!("the dump is complete, but {}", exit::message(&e)));
    }
}

/// The rules for files: those of the file first, so that the others go before them.
fn rules(args: &DumpArgs) -> anyhow::Result<Rules> {
    let usage = |what: String| Failure::new(Exit::Usage, what);
    let mut rules = Rules::default();
    if let Some(path) = &args.files {
        let text = std::fs::read_to_string(path)
            .map_err(|e| usage(format!("cannot read the rules in `{}`: {e}", path.display())))?;
        rules
            .parse(&text)
            .map_err(|e| usage(format!("cannot take the rules in `{}`: {e}", path.display())))?;
    }
    let flags = [("save", Rule::Save, &args.save_files), ("truncate", Rule::Truncate, &args.truncate_files)];
    for (name, rule, globs) in flags {
        for glob in globs {
            rules.add(rule, glob).map_err(|e| usage(format!("cannot take --{name}-files: {e}")))?;
        }
    }
    Ok(rules)
}

/// Dumps `pid` into `dir`. When this fails the process goes on as before. Signals are held back until it has been told.
pub(crate) fn dump(
    pid: i32,
    dir: &Path,
    afterwards: Afterwards,
    fsync: bool,
    choices: Choices,
) -> anyhow::Result<(Summary, Held)> {
    let parent =
        choices.parent.as_deref().map(|dir| Image::open_with(dir, &choices.identities)).transpose()?;
    let watched = Watched { parent, ..Watched::default() };
    let (summary, held, tracking) = followed(pid, dir, afterwards, fsync, choices, watched)?;
    // The image is complete, and stays so.
    if let Some(Err(e)) = tracking.map(Tracking::leave) {
        output::note(&format!("what is written from now on is not followed: {}", exit::message(&e.into())));
    }
    Ok((summary, held))
}

/// The same after another one; gives the watches over the process, if it is to be followed on.
pub(crate) fn followed(
    pid: i32,
    dir: &Path,
    afterwards: Afterwards,
    fsync: bool,
    choices: Choices,
    watched: Watched,
) -> anyhow::Result<(Summary, Held, Option<Tracking>)> {
    crate::raise_descriptor_limit();
    let Watched { parent, tracking: watches, link } = watched;
    let target = Target::find_tracked(pid, choices.tcp, &choices.external_unix, watches.as_ref())?;
    // What is made in the directory from here on is removed again.
    let held = Held::begin(&[]);
    let is_stream = dir == Path::new("-");
    let destination = || -> anyhow::Result<Destination> {
        let encoding = choices.encoding.clone();
        Ok(match is_stream {
            true => Destination::to_stream(stream::take_output()?, encoding)?,
            false => {
                let number = parent.as_ref().filter(|_| link).map_or(0, Image::next_data_file);
                Destination::create_from(dir, fsync, encoding, number)?
            }
        })
    };
    let mut first = destination()?;
    let survey = target.survey();
    let progress = Progress::new("dumping", survey.resident());
    let add = |bytes| progress.add(bytes);
    let mut options = Options::default();
    // A process left stopped may be let go at any time.
    options.runs_on = afterwards != Afterwards::Ended;
    options.tcp = choices.tcp;
    options.progress = Some(&add);
    options.files = choices.rules;
    options.external_unix = &choices.external_unix;

    let cancel = Held::wants_end;
    options.cancel = Some(&cancel);
    let mut tracking = None;
    let tracked = choices.track || parent.is_some() || choices.freeze == Some(Freeze::Track);
    let way = if tracked { Way::default() } else { target.choose(choices.freeze, options.runs_on)? };
    if tracked {
        let mut watches = watches.unwrap_or_else(|| Tracking::resume(&target));
        follow(&mut watches, &target, &mut first, parent.as_ref(), link, &options)?;
        tracking = Some(watches);
    }
    let frozen = match &mut tracking {
        Some(watches) => target.freeze_tracked(watches, &mut first, &options),
        None => target.freeze_by(options.runs_on, way),
    };
    options.tracking = tracking.as_ref();
    let written = frozen.map_err(anyhow::Error::from);
    let written = written.and_then(|frozen| write(frozen, first, afterwards, &options, dir));
    let written = written.or_else(|e| match e.downcast_ref() {
        // A stream cannot be begun again.
        Some(DumpError::Declined { why, .. }) if !is_stream => {
            let destination = destination()?;
            let frozen = target.freeze_by(options.runs_on, Way::copy_because(why.clone()))?;
            write(frozen, destination, afterwards, &options, dir)
        }
        _ => Err(e),
    });
    let (manifest, held) = held.end(written)?;
    let tracking = tracking.filter(|_| choices.track).map(|mut watches| {
        watches.based_on(&manifest.id);
        watches
    });

    let summary = Summary {
        pid,
        name: survey.root().name.clone(),
        processes: survey.processes.len(),
        threads: survey.threads(),
        dir: dir.display().to_string(),
        bytes: verify::size(&manifest),
        files: manifest.files.len() + 1,
        taken_at: manifest.taken_at,
        ran_on: manifest.ran_on,
        not_captured: manifest.not_captured,
        times: manifest.times,
        freeze: manifest.freeze,
        fallback: manifest.fallback,
    };
    Ok((summary, held, tracking))
}

/// Copies what has changed while the tree still runs.
fn follow(
    watches: &mut Tracking,
    target: &Target,
    destination: &mut Destination,
    parent: Option<&Image>,
    link: bool,
    options: &Options<'_>,
) -> anyhow::Result<()> {
    if let Some(parent) = parent
        && watches.base() != Some(parent.manifest.id.as_str())
    {
        output::note(&format!(
            "everything counts as changed: what was written since the dump in `{}` was not followed (--track)",
            parent.dir.display()
        ));
    }
    watches.begin(target)?;
    watches.follow(destination, parent, link, options)?;
    Ok(())
}

/// Writes the image, and does what is to be done with the process afterwards.
fn write(
    mut frozen: Frozen,
    destination: Destination,
    afterwards: Afterwards,
    options: &Options<'_>,
    dir: &Path,
) -> anyhow::Result<Manifest> {
    if afterwards == Afterwards::Running {
        return Ok(frozen.dump_and_resume(destination, options)?.manifest);
    }
    let manifest = frozen.dump(destination, options)?.manifest;
    let done = if afterwards == Afterwards::Ended { frozen.kill() } else { frozen.keep_stopped() };
    done.with_context(|| format!("the image in `{}` is complete, but the process goes on", dir.display()))?;
    Ok(manifest)
}

fn line(summary: &Summary, afterwards: Afterwards) -> String {
    let now = match afterwards {
        Afterwards::Ended => "ended",
        Afterwards::Running => "runs on",
        Afterwards::Stopped => "stopped",
    };
    let Summary { pid, dir, .. } = summary;
    let (name, bytes) = (output::name(&summary.name), output::bytes(summary.bytes));
    let frozen = output::nanoseconds(summary.times.frozen);
    let more = match summary.processes {
        0 | 1 => String::new(),
        n => format!(" and {} below it", output::count(n - 1, "process", "processes")),
    };
    let by = if summary.freeze == Freeze::Copy { String::new() } else { format!(" by {}", summary.freeze) };
    format!("dumped pid {pid} ({name}){more} to {dir}: {bytes}, frozen for {frozen}{by}, {now}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_one_line() {
        let summary = Summary {
            pid: 42,
            name: "a\nb".into(),
            processes: 1,
            threads: 1,
            dir: "img".into(),
            bytes: 4096,
            files: 5,
            taken_at: 0,
            ran_on: false,
            not_captured: Vec::new(),
            times: Times { frozen: 1_500_000, ..Times::default() },
            freeze: Freeze::Copy,
            fallback: None,
        };
        assert_eq!(
            line(&summary, Afterwards::Ended),
            "dumped pid 42 (a\\nb) to img: 4.0 KiB, frozen for 1.50 ms, ended\n"
        );
    }
}
