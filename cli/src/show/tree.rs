//! The processes of an image, each under its parent, and what they share.

use std::collections::BTreeMap;

use torpor_image::task::Task;
use torpor_image::{DescriptionId, Image, Pid};

use crate::names;
use crate::output::{self, Table};

pub(super) fn table(image: &Image) -> String {
    let mut table =
        Table::new(&["PROCESS", "GROUP", "SESSION", "THREADS", "STATE", "SHARED WITH OTHERS"], &[1, 2, 3]);
    let mut holders: BTreeMap<DescriptionId, Vec<Pid>> = BTreeMap::new();
    for task in &image.tasks {
        for d in &task.descriptors {
            let all = holders.entry(d.description).or_default();
            if all.last() != Some(&task.pid) {
                all.push(task.pid);
            }
        }
    }
    let Some(root) = image.tasks.first() else { return String::new() };
    let mut rows = vec![(0, root)];
    while let Some((depth, task)) = rows.pop() {
        let name = task.threads.first().map(|t| t.name.to_string()).unwrap_or_default();
        table.row([
            format!("{:depth$}{} {}", "", task.pid, output::name(&name)),
            task.pgid.to_string(),
            task.sid.to_string(),
            task.threads.len().to_string(),
            if task.stopped { "stopped".into() } else { String::new() },
            shared(task, &holders),
        ]);
        for zombie in image.manifest.zombies.iter().filter(|z| z.ppid == task.pid) {
            let how = match zombie.status & 0x7f {
                0 => format!("ended with {}", (zombie.status >> 8) & 0xff),
                signal => format!("ended by {}", names::signal(signal)),
            };
            table.row([
                format!("{:1$}{2} {3}", "", depth + 2, zombie.pid, output::name(&zombie.name.to_string())),
                zombie.pgid.to_string(),
                zombie.sid.to_string(),
                String::new(),
                how,
                String::new(),
            ]);
        }
        // The last pushed is written first.
        let children = image.tasks.iter().skip(1).filter(|t| t.ppid == task.pid);
        rows.extend(children.rev().map(|t| (depth + 2, t)));
    }
    table.to_string()
}

/// What a process has in common with others, in words.
fn shared(task: &Task, holders: &BTreeMap<DescriptionId, Vec<Pid>>) -> String {
    let shares = task.shares;
    let mut all = Vec::new();
    for (owner, what) in [
        (shares.memory, "memory"),
        (shares.descriptors, "descriptors"),
        (shares.directories, "directories"),
        (shares.signal_actions, "signal actions"),
    ] {
        if let Some(owner) = owner {
            all.push(format!("{what} shared with {owner}"));
        }
    }
    let mut fds: Vec<i32> = Vec::new();
    let mut others: Vec<Pid> = Vec::new();
    for d in &task.descriptors {
        let them = holders.get(&d.description).map_or(&[][..], Vec::as_slice);
        if them.len() > 1 {
            fds.push(d.fd);
            others.extend(them.iter().filter(|pid| **pid != task.pid));
        }
    }
    others.sort_unstable();
    others.dedup();
    if !fds.is_empty() {
        all.push(format!("fd {} shared with {}", list(&fds), list(&others)));
    }
    all.join("; ")
}

/// The first few, and how many there are besides.
fn list<T: std::fmt::Display>(all: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut text = all.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(" ");
    if all.len() > SHOWN {
        text.push_str(&format!(" and {} more", all.len() - SHOWN));
    }
    text
}
