//! A plan in words, for people and for snapshots of tests.

use std::fmt;

use serde::Serialize;
use torpor_image::Image;
use torpor_image::description::Kind;
use torpor_image::inode::Source;
use torpor_parasite::script::Script;

use crate::plan::{Open, Plan};

/// What a slot is, in words.
pub(crate) fn name(image: &Image, open: &Open) -> String {
    match open {
        Open::Description(id) => {
            let description = &image.objects.descriptions[id.0 as usize];
            let detail = match &description.kind {
                Kind::File(inode) => image.objects.inodes[inode.0 as usize].name(),
                Kind::Pipe(end) => {
                    let pipe = &image.objects.pipes[end.pipe.0 as usize];
                    format!("of {} bytes, {} in it", pipe.capacity, pipe.data.len())
                }
                Kind::Unix(unix) => match &unix.name {
                    Some(name) => name.text().replace('\0', "@"),
                    None => format!("{} messages in it", unix.queue.len()),
                },
                Kind::Inet(inet) => inet.local.map_or_else(String::new, |l| l.to_string()),
                Kind::Udp(udp) => udp.summary(),
                Kind::Raw(raw) => raw.summary(),
                Kind::Netlink(netlink) => netlink.summary(),
                Kind::Packet(packet) => packet.summary(),
                Kind::EventFd(e) => format!("{}{}", e.count, if e.semaphore { " (semaphore)" } else { "" }),
                Kind::Epoll(e) => format!("watching {}", e.targets.len()),
                Kind::Mqueue(id) => {
                    let queue = &image.objects.mqueues[id.0 as usize];
                    format!("{} with {} messages", queue.name, queue.messages.len())
                }
                Kind::IoUring(ring) => ring.summary(),
                Kind::Inotify(i) => format!("{} watches", i.watches.len()),
                Kind::Pty(end) => image.objects.ptys[end.pty.0 as usize].path.to_string(),
                _ => String::new(),
            };
            format!("{} {detail}", description.kind.noun()).trim_end().to_owned()
        }
        Open::Mapped { inode, write } => {
            let inode = &image.objects.inodes[inode.0 as usize];
            let made = if matches!(inode.source, Source::Path { .. }) { "" } else { ", from the image" };
            format!("{} to be mapped{}{made}", inode.name(), if *write { " for writing" } else { "" })
        }
        Open::Program { inode } => format!("program {}", image.objects.inodes[inode.0 as usize].name()),
        Open::Data { file } => format!("data file {file} of the image"),
        Open::Feed { task } => format!("contents of data files that {} is given", image.tasks[*task].title()),
        Open::Slave { pty } => {
            format!("{} as a controlling terminal", image.objects.ptys[pty.0 as usize].path)
        }
        Open::Zero => "/dev/zero".to_owned(),
        Open::Directory { path } => format!("directory {path}"),
    }
}

impl Plan {
    /// Every script with the words that go before it, in the order in which they run.
    fn parts(&self) -> Vec<(String, &Script)> {
        let mut all: Vec<(String, &Script)> = Vec::new();
        all.extend(self.begin.iter().map(|p| (format!("{}: phase {}", self.titles[0], p.name), &p.script)));
        for (title, script) in self.titles.iter().zip(&self.births) {
            all.push((format!("{title}: phase birth"), script));
        }
        for (i, script) in self.helpers.iter().enumerate() {
            all.push((format!("helper {}: phase birth", i + 1), script));
        }
        for (task, title) in self.tasks.iter().zip(&self.titles) {
            for (i, phase) in task.phases.iter().enumerate() {
                all.push((format!("{title}: phase {}", phase.name), &phase.script));
                if i == task.threads_after {
                    let threads = task.threads.iter().enumerate();
                    all.extend(threads.map(|(n, s)| (format!("{title}: thread {}", n + 1), s)));
                }
            }
        }
        all.retain(|(_, script)| !script.is_empty());
        all
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        writeln!(f, "outside of the processes:")?;
        for (slot, name) in self.names.iter().enumerate() {
            writeln!(f, "  open {slot}: {name}")?;
        }
        for (title, script) in self.parts() {
            writeln!(f, "{title}: {} operations", script.steps().len())?;
            steps(f, script)?;
        }
        writeln!(f, "outside: unmapping the executor, registers and signal masks")
    }
}

/// Purposes, each once for a run of operations that serve it.
fn steps(f: &mut fmt::Formatter<'_>, script: &Script) -> fmt::Result {
    let mut last = "";
    for step in script.steps() {
        if step.purpose != last {
            writeln!(f, "    {}", step.purpose)?;
            last = &step.purpose;
        }
    }
    Ok(())
}

/// A plan as JSON: the same as its text, in parts.
impl Serialize for Plan {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Part<'a> {
            name: String,
            operations: Vec<&'a str>,
        }
        #[derive(Serialize)]
        struct Whole<'a> {
            notes: &'a [String],
            opens: &'a [String],
            parts: Vec<Part<'a>>,
        }
        let parts = self.parts();
        let parts = parts
            .iter()
            .map(|(name, script)| Part {
                name: name.clone(),
                operations: script.steps().iter().map(|s| s.purpose.as_ref()).collect(),
            })
            .collect();
        Whole { notes: &self.notes, opens: &self.names, parts }.serialize(serializer)
    }
}
