//! `torpor check`: what this machine allows, or what a dump of a process would find.

mod host;

pub(crate) use host::may_restore;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use torpor_dumper::{Descriptor, Process, Survey, Target};

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
    processes: Vec<ProcessReport<'a>>,
    zombies: Vec<ZombieReport<'a>>,
    ipc: &'a [String],
    losses: &'a [String],
    refusals: Vec<Refusal<'a>>,
}

#[derive(Serialize)]
struct ProcessReport<'a> {
    pid: i32,
    ppid: i32,
    name: &'a str,
    threads: u32,
    resident: u64,
    areas: usize,
    descriptors: Vec<DescriptorReport<'a>>,
}

#[derive(Serialize)]
struct ZombieReport<'a> {
    pid: i32,
    ppid: i32,
    name: &'a str,
}

#[derive(Serialize)]
struct DescriptorReport<'a> {
    fd: i32,
    kind: &'a str,
    name: &'a str,
    /// The same number for all that share an open file description.
    description: u32,
}

#[derive(Serialize)]
struct Refusal<'a> {
    object: &'a str,
    why: &'a str,
    remedy: &'a str,
}

fn process(pid: i32, json: bool) -> anyhow::Result<Exit> {
    crate::raise_descriptor_limit();
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
    fn descriptor(d: &Descriptor) -> DescriptorReport<'_> {
        DescriptorReport { fd: d.fd, kind: d.kind, name: &d.name, description: d.description }
    }
    Report {
        pid: survey.root().pid.0,
        name: &survey.root().name,
        can_be_dumped: survey.refusals.is_empty(),
        processes: survey
            .processes
            .iter()
            .map(|p| ProcessReport {
                pid: p.pid.0,
                ppid: p.ppid.0,
                name: &p.name,
                threads: p.threads,
                resident: p.resident,
                areas: p.areas,
                descriptors: p.descriptors.iter().map(descriptor).collect(),
            })
            .collect(),
        zombies: survey
            .zombies
            .iter()
            .map(|(pid, ppid, name)| ZombieReport { pid: pid.0, ppid: ppid.0, name })
            .collect(),
        ipc: &survey.ipc,
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
    let root = survey.root();
    writeln!(out, "pid {} ({})", root.pid, output::name(&root.name))?;
    writeln!(out, "\na dump would take")?;
    if survey.processes.len() > 1 || !survey.zombies.is_empty() {
        write!(out, "{}", tree(survey))?;
        let shared = shared(survey);
        if !shared.is_empty() {
            writeln!(out, "\nshared descriptors")?;
            write!(out, "{shared}")?;
        }
    } else {
        let mut table = Table::new(&["WHAT", "HOW MUCH", "WHICH"], &[1]);
        table.row([
            "memory".into(),
            output::bytes(root.resident),
            output::count(root.areas, "area", "areas"),
        ]);
        table.row(["threads".into(), root.threads.to_string(), String::new()]);
        for (kind, which) in kinds(root) {
            table.row([format!("{kind} descriptors"), which.len().to_string(), examples(&which)]);
        }
        write!(out, "{table}")?;
    }
    if !survey.ipc.is_empty() {
        writeln!(out, "\nSystem V IPC: {}", examples(&survey.ipc))?;
    }
    if !survey.losses.is_empty() {
        writeln!(out, "\nand leave out, with a note in the manifest")?;
        for loss in &survey.losses {
            writeln!(out, "  {}", output::name(loss))?;
        }
    }
    if survey.refusals.is_empty() {
        writeln!(out, "\nit can be dumped: torpor dump {} DIR", root.pid)?;
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

/// Descriptors of a process, by kind.
fn kinds(process: &Process) -> BTreeMap<&str, Vec<String>> {
    let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for d in &process.descriptors {
        kinds.entry(d.kind).or_default().push(format!("{} {}", d.fd, d.name));
    }
    kinds
}

/// The processes, each under its parent.
fn tree(survey: &Survey) -> Table {
    let mut table = Table::new(&["PROCESS", "MEMORY", "THREADS", "DESCRIPTORS"], &[1, 2]);
    let mut rows = vec![(0, survey.root())];
    while let Some((depth, process)) = rows.pop() {
        let counts: Vec<String> =
            kinds(process).into_iter().map(|(kind, which)| format!("{} {kind}", which.len())).collect();
        table.row([
            format!("{:depth$}{} {}", "", process.pid, output::name(&process.name)),
            output::bytes(process.resident),
            process.threads.to_string(),
            counts.join(", "),
        ]);
        for (pid, _, name) in survey.zombies.iter().filter(|z| z.1 == process.pid) {
            let text = format!("{:1$}{pid} {2} (has ended)", "", depth + 2, output::name(name));
            table.row([text, String::new(), String::new(), String::new()]);
        }
        // The last pushed is written first.
        let children = survey.processes.iter().filter(|p| p.ppid == process.pid && p.pid != process.pid);
        rows.extend(children.rev().map(|p| (depth + 2, p)));
    }
    table
}

/// Descriptions that several processes have.
fn shared(survey: &Survey) -> Table {
    let mut holders: BTreeMap<u32, Vec<(&Process, &Descriptor)>> = BTreeMap::new();
    for process in &survey.processes {
        for d in &process.descriptors {
            holders.entry(d.description).or_default().push((process, d));
        }
    }
    let mut table = Table::new(&["WHAT", "NAME", "WHO"], &[]);
    for all in holders.values() {
        let first = all[0];
        if all.iter().all(|(process, _)| process.pid == first.0.pid) {
            continue;
        }
        let who: Vec<String> = all.iter().map(|(p, d)| format!("{}:{}", p.pid, d.fd)).collect();
        table.row([first.1.kind.to_owned(), output::name(&first.1.name), examples(&who)]);
    }
    table
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

    fn process(pid: i32, ppid: i32) -> Process {
        let descriptor = |fd| Descriptor { fd, kind: "file", name: "/dev/null".to_owned(), description: 7 };
        Process {
            pid: Pid(pid),
            ppid: Pid(ppid),
            name: "a\x1bb".into(),
            threads: 3,
            resident: 1 << 20,
            areas: 7,
            descriptors: (0..6).map(descriptor).collect(),
        }
    }

    fn survey() -> Survey {
        Survey {
            processes: vec![process(42, 1)],
            zombies: Vec::new(),
            ipc: vec!["shared memory id 7 (private)".into()],
            refusals: Vec::new(),
            losses: vec!["queued inotify events".into()],
        }
    }

    #[test]
    fn a_tree_and_what_it_shares() {
        let mut survey = survey();
        survey.processes.push(process(43, 42));
        survey.zombies.push((Pid(44), Pid(43), "z".into()));
        let text = text(&survey).unwrap();
        assert!(text.contains("\n    43 a\\u{1b}b"), "{text}");
        assert!(text.contains("44 z (has ended)"), "{text}");
        assert!(text.contains("42:0, 42:1, 42:2, 42:3, and 8 more"), "{text}");
    }

    #[test]
    fn what_can_be_dumped() {
        let text = text(&survey()).unwrap();
        assert!(text.starts_with("pid 42 (a\\u{1b}b)\n"), "{text}");
        assert!(text.contains("file descriptors         6  0 /dev/null, 1 /dev/null"), "{text}");
        assert!(text.contains("and 2 more"), "{text}");
        assert!(text.contains("\nSystem V IPC: shared memory id 7 (private)\n"), "{text}");
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
