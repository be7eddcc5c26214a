//! `torpor check`: what this machine allows, or what a dump of a process would find.

mod host;

pub(crate) use host::may_restore;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use torpor_dumper::{Survey, Target};

use crate::args::CheckArgs;
use crate::exit::Exit;
use crate::output::{self, Table};

pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<Exit> {
    match args.pid {
        Some(pid) => process(pid, args.json),
        None => host::run(args.json),
    }
}

/// [`Survey`] as JSON.
#[derive(Serialize)]
struct Report<'a> {
    pid: i32,
    name: &'a str,
    can_be_dumped: bool,
    threads: u32,
    resident: u64,
    areas: usize,
    descriptors: Vec<Descriptor<'a>>,
    losses: &'a [String],
    refusals: Vec<Refusal<'a>>,
}

#[derive(Serialize)]
struct Descriptor<'a> {
    fd: i32,
    kind: &'a str,
    name: &'a str,
}

#[derive(Serialize)]
struct Refusal<'a> {
    object: &'a str,
    why: &'a str,
    remedy: &'a str,
}

fn process(pid: i32, json: bool) -> anyhow::Result<Exit> {
    let survey = torpor_dumper::check(pid)?;
    let can_be_dumped = survey.refusals.is_empty();
    if can_be_dumped {
        // What is asked only of a process that is going to be dumped, above all permission.
        Target::find(pid)?;
    }
    if json {
        output::json_pretty(&report(&survey))?;
    } else {
        output::print(&text(&survey)?)?;
    }
    Ok(if can_be_dumped { Exit::Ok } else { Exit::Refused })
}

fn report(survey: &Survey) -> Report<'_> {
    Report {
        pid: survey.pid.0,
        name: &survey.name,
        can_be_dumped: survey.refusals.is_empty(),
        threads: survey.threads,
        resident: survey.resident,
        areas: survey.areas,
        descriptors: survey
            .descriptors
            .iter()
            .map(|(fd, kind, name)| Descriptor { fd: *fd, kind, name })
            .collect(),
        losses: &survey.losses,
        refusals: survey
            .refusals
            .iter()
            .map(|r| Refusal { object: &r.object, why: &r.why, remedy: &r.remedy })
            .collect(),
    }
}

fn text(survey: &Survey) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "pid {} ({})", survey.pid, output::name(&survey.name))?;
    writeln!(out, "\na dump would take")?;
    let mut table = Table::new(&["WHAT", "HOW MUCH", "WHICH"], &[1]);
    table.row([
        "memory".into(),
        output::bytes(survey.resident),
        output::count(survey.areas, "area", "areas"),
    ]);
    table.row(["threads".into(), survey.threads.to_string(), String::new()]);
    let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (fd, kind, name) in &survey.descriptors {
        kinds.entry(kind).or_default().push(format!("{fd} {name}"));
    }
    for (kind, which) in kinds {
        table.row([format!("{kind} descriptors"), which.len().to_string(), examples(&which)]);
    }
    write!(out, "{table}")?;
    if !survey.losses.is_empty() {
        writeln!(out, "\nand leave out, with a note in the manifest")?;
        for loss in &survey.losses {
            writeln!(out, "  {}", output::name(loss))?;
        }
    }
    if survey.refusals.is_empty() {
        writeln!(out, "\nit can be dumped: torpor dump {} DIR", survey.pid)?;
        return Ok(out);
    }
    writeln!(out, "\nit cannot be dumped, because of")?;
    for refusal in &survey.refusals {
        writeln!(out, "  {}", output::name(&refusal.object))?;
        writeln!(out, "      why:    {}", output::name(&refusal.why))?;
        writeln!(out, "      remedy: {}", output::name(&refusal.remedy))?;
    }
    Ok(out)
}

/// The first few, and how many there are besides.
fn examples(all: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut text = all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if all.len() > SHOWN {
        text.push_str(&format!(", and {} more", all.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use torpor_kernel::Pid;

    use super::*;

    fn survey() -> Survey {
        let descriptors = (0..6).map(|fd| (fd, "file", "/dev/null".to_owned())).collect();
        Survey {
            pid: Pid(42),
            name: "a\x1bb".into(),
            threads: 3,
            resident: 1 << 20,
            areas: 7,
            descriptors,
            refusals: Vec::new(),
            losses: vec!["queued inotify events".into()],
        }
    }

    #[test]
    fn what_can_be_dumped() {
        let text = text(&survey()).unwrap();
        assert!(text.starts_with("pid 42 (a\\u{1b}b)\n"), "{text}");
        assert!(text.contains("file descriptors         6  0 /dev/null, 1 /dev/null"), "{text}");
        assert!(text.contains("and 2 more"), "{text}");
        assert!(text.contains("\n  queued inotify events\n"), "{text}");
        assert!(text.ends_with("it can be dumped: torpor dump 42 DIR\n"), "{text}");
    }

    #[test]
    fn what_cannot() {
        let mut survey = survey();
        survey.refusals.push(torpor_dumper::Refusal {
            object: "fd 7 (anon_inode:[io_uring])".into(),
            why: "it cannot be dumped".into(),
            remedy: "close it".into(),
        });
        let text = text(&survey).unwrap();
        assert!(text.contains("fd 7 (anon_inode:[io_uring])\n      why:    it cannot be dumped\n"), "{text}");
        assert!(!report(&survey).can_be_dumped);
    }
}
