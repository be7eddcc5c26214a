//! `torpor dump`: from a running process to an image.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap::error::ErrorKind;
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;
use torpor_dumper::{Destination, ExternalUnix, Options, Rule, Rules, Target, TcpPolicy};
use torpor_image::manifest::Times;

use crate::args::{Cli, DumpArgs, Tcp};
use crate::exit::{Exit, Failure};
use crate::progress::Progress;
use crate::{output, verify};

/// What becomes of the process when its image is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Afterwards {
    Ended,
    Running,
    Stopped,
}

/// What becomes of what a dump cannot keep by itself.
#[derive(Default)]
pub(crate) struct Choices {
    pub(crate) rules: Rules,
    pub(crate) tcp: TcpPolicy,
    pub(crate) external_unix: Vec<ExternalUnix>,
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
}

pub(crate) fn run(args: &DumpArgs) -> anyhow::Result<Exit> {
    let afterwards = match (args.leave_running, args.leave_stopped) {
        (true, _) => Afterwards::Running,
        (_, true) => Afterwards::Stopped,
        _ => Afterwards::Ended,
    };
    if args.tcp == Tcp::Keep && afterwards != Afterwards::Ended {
        let why = "`--tcp keep` is for a process that ends with the dump: what goes on with its connections \
                   cannot be restored to them";
        Cli::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    let tcp = match args.tcp {
        Tcp::Refuse => TcpPolicy::Refuse,
        Tcp::Close => TcpPolicy::Close,
        Tcp::Keep => TcpPolicy::Keep,
    };
    let choices = Choices { rules: rules(args)?, tcp, external_unix: args.external_unix.clone() };
    let summary = dump(args.pid, &args.dir, afterwards, args.fsync, choices)?;
    if !args.quiet {
        for lost in &summary.not_captured {
            output::note(&format!("not in the image: {lost}"));
        }
        if args.json {
            output::json(&summary)?;
        } else {
            output::print(&line(&summary, afterwards))?;
        }
    }
    Ok(Exit::Ok)
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

/// Dumps `pid` into `dir`. When this fails the process goes on as before.
pub(crate) fn dump(
    pid: i32,
    dir: &Path,
    afterwards: Afterwards,
    fsync: bool,
    choices: Choices,
) -> anyhow::Result<Summary> {
    let target = Target::find_with(pid, choices.tcp, &choices.external_unix)?;
    let destination = Destination::create(dir, fsync)?;
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

    let held = Held::begin();
    let cancel = Held::wants_end;
    options.cancel = Some(&cancel);
    let mut frozen = target.freeze(options.runs_on)?;
    let manifest = if afterwards == Afterwards::Running {
        frozen.dump_and_resume(destination, &options)?.manifest
    } else {
        let manifest = frozen.dump(destination, &options)?.manifest;
        let done = if afterwards == Afterwards::Ended { frozen.kill() } else { frozen.keep_stopped() };
        done.with_context(|| {
            format!("the image in `{}` is complete, but the process goes on", dir.display())
        })?;
        manifest
    };
    drop(held);

    Ok(Summary {
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
    })
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
    format!("dumped pid {pid} ({name}){more} to {dir}: {bytes}, frozen for {frozen}, {now}\n")
}

/// Signals held back while a process stands: Ctrl-Z at the wrong moment would leave us stopped, and with us
/// the process that we hold; Ctrl-C would leave half an image behind. What asks us to end calls the dump off,
/// and takes effect once everything is cleared away.
struct Held {
    before: Option<SigSet>,
}

const ENDS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
const STOPS: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];

impl Held {
    fn begin() -> Self {
        let signals = SigSet::from_iter(STOPS.into_iter().chain(ENDS));
        // It cannot fail; if it did, the signals would only do what they always do.
        Held { before: signals.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).ok() }
    }

    /// Whether a signal that would end us waits.
    fn wants_end() -> bool {
        // SAFETY: an all-zero sigset_t is a valid one.
        let mut pending: nix::libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `pending` is a sigset_t of ours, first to be filled and then read.
        unsafe {
            nix::libc::sigpending(&raw mut pending) == 0
                && ENDS.iter().any(|s| nix::libc::sigismember(&raw const pending, *s as i32) == 1)
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _cannot_fail = before.thread_set_mask();
        }
    }
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
        };
        assert_eq!(
            line(&summary, Afterwards::Ended),
            "dumped pid 42 (a\\nb) to img: 4.0 KiB, frozen for 1.50 ms, ended\n"
        );
    }
}
