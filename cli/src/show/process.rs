//! A process of an image: who it was, its threads and its memory.

use std::fmt::Write as _;

use torpor_image::Image;
use torpor_image::extent::{Record, Where};
use torpor_image::signal::SignalAction;
use torpor_image::task::Task;
use torpor_image::timer::{Interval, Timers};
use torpor_image::vma::{Lock, Mapping, Vma};

use super::objects;
use crate::names;
use crate::output::{self, Table};

type Result = std::result::Result<(), std::fmt::Error>;

/// Everything of one process.
pub(super) fn write(out: &mut String, image: &Image, task: &Task) -> Result {
    let leader = task.leader();
    writeln!(out, "{}{}", output::name(&task.title()), if task.stopped { ", stopped" } else { "" })?;
    let mut line = |name: &str, value: String| writeln!(out, "  {name:<11}{}", output::name(&value));
    line("program", inode_name(image, task.memory.exe.0))?;
    line("parent", format!("{}, group {}, session {}", task.ppid, task.pgid, task.sid))?;
    let credentials = &leader.credentials;
    line("user", format!("{}, group {}", credentials.uids[1], credentials.gids[1]))?;
    line("directory", task.cwd.text().into_owned())?;
    if &*task.root != b"/" {
        line("root", task.root.text().into_owned())?;
    }

    writeln!(out, "\n{}", output::count(task.threads.len(), "thread", "threads"))?;
    out.push_str(&threads(image, task));
    signals(out, image, task)?;
    timers(out, &task.timers)?;

    let areas = output::count(task.memory.vmas.len(), "area", "areas");
    let size = task.memory.vmas.iter().map(Vma::len).fold(0, u64::saturating_add);
    writeln!(out, "\nmemory: {areas}, {}", output::bytes(size))?;
    out.push_str(&memory(image, task));
    objects::write(out, image, task)
}

fn inode_name(image: &Image, number: u32) -> String {
    image.objects.inodes.get(number as usize).map_or_else(|| format!("inode {number}"), |i| i.name())
}

fn threads(image: &Image, task: &Task) -> String {
    let mut table = Table::new(&["TID", "NAME", "AT", "IN", "BLOCKED SIGNALS", "PENDING"], &[0]);
    for thread in &task.threads {
        let registers = &thread.registers;
        let call = registers.interrupted_call().map_or_else(|| "-".into(), names::call);
        let pending: Vec<String> = thread.signals.pending.iter().map(|raw| names::siginfo(raw)).collect();
        table.row([
            thread.tid.to_string(),
            thread.name.text().into_owned(),
            place(image, task, registers.ip()),
            call,
            names::signals(thread.signals.mask),
            pending.join(" "),
        ]);
    }
    table.to_string()
}

/// `libc.so.6+0x1234`: the offset is that in the file, as `addr2line` wants it for most libraries.
fn place(image: &Image, task: &Task, address: u64) -> String {
    let vmas = &task.memory.vmas;
    let after = vmas.partition_point(|vma| vma.end <= address);
    let Some(vma) = vmas.get(after).filter(|vma| vma.start <= address) else {
        return format!("{address:#x}");
    };
    let inside = address - vma.start;
    let file = |inode: u32, offset: u64| {
        let name = inode_name(image, inode);
        let base = name.rsplit('/').next().unwrap_or(&name);
        format!("{base}+{:#x}", offset.saturating_add(inside))
    };
    match &vma.mapping {
        Mapping::Private { inode, offset } | Mapping::Shared { inode, offset, .. } => file(inode.0, *offset),
        Mapping::Kernel { name } => format!("{name}+{inside:#x}"),
        Mapping::Anonymous { .. } | Mapping::Ring { .. } => format!("{address:#x}"),
    }
}

fn signals(out: &mut String, image: &Image, task: &Task) -> Result {
    let actions = || task.signals.actions.iter().zip(1..);
    let handled: Vec<(&SignalAction, i32)> = actions().filter(|(action, _)| action.handler > 1).collect();
    let ignored = actions().filter(|(a, _)| a.handler == 1).fold(0u64, |mask, (_, n)| mask | 1 << (n - 1));
    let pending: Vec<String> = task.signals.pending.iter().map(|raw| names::siginfo(raw)).collect();
    if handled.is_empty() && ignored == 0 && pending.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nsignals")?;
    let mut table = Table::new(&["SIGNAL", "HANDLER", "FLAGS", "BLOCKED MEANWHILE"], &[]);
    for (action, number) in handled {
        table.row([
            names::signal(number),
            place(image, task, action.handler),
            action_flags(action.flags),
            names::signals(action.mask),
        ]);
    }
    if !table.is_empty() {
        write!(out, "{table}")?;
    }
    if ignored != 0 {
        writeln!(out, "  ignored: {}", names::signals(ignored))?;
    }
    if !pending.is_empty() {
        writeln!(out, "  pending: {}", pending.join(" "))?;
    }
    Ok(())
}

fn action_flags(flags: u64) -> String {
    // SA_RESTORER is every libc's and says nothing.
    let known = [
        (libc::SA_SIGINFO, "siginfo"),
        (libc::SA_RESTART, "restart"),
        (libc::SA_ONSTACK, "onstack"),
        (libc::SA_NODEFER, "nodefer"),
        (libc::SA_RESETHAND, "resethand"),
        (libc::SA_NOCLDSTOP, "nocldstop"),
        (libc::SA_NOCLDWAIT, "nocldwait"),
    ];
    let words: Vec<&str> =
        known.iter().filter(|(bit, _)| flags as i32 & bit != 0).map(|(_, word)| *word).collect();
    words.join(" ")
}

fn timers(out: &mut String, timers: &Timers) -> Result {
    let mut table = Table::new(&["TIMER", "CLOCK", "LEFT", "PERIOD", "SIGNAL"], &[2, 3]);
    let which = [("ITIMER_REAL", 14), ("ITIMER_VIRTUAL", 26), ("ITIMER_PROF", 27)];
    for ((name, signal), setting) in which.into_iter().zip(&timers.interval) {
        if *setting != Interval::default() {
            let [left, period] =
                [setting.value, setting.period].map(|(s, us)| time(s, us.saturating_mul(1000)));
            table.row([name.into(), String::new(), left, period, names::signal(signal)]);
        }
    }
    for timer in &timers.posix {
        let [left, period] = [timer.setting.value, timer.setting.period].map(|(s, ns)| time(s, ns));
        let signal = match timer.notify {
            libc::SIGEV_NONE => "none".to_owned(),
            libc::SIGEV_THREAD_ID => format!("{} to thread {}", names::signal(timer.signal), timer.thread),
            _ => names::signal(timer.signal),
        };
        table.row([format!("timer {}", timer.id), names::clock(timer.clock), left, period, signal]);
    }
    if !table.is_empty() {
        write!(out, "\ntimers\n{table}")?;
    }
    Ok(())
}

/// Seconds and nanoseconds of a timer; zero means that there is none.
pub(super) fn time(seconds: i64, nanoseconds: i64) -> String {
    match (u64::try_from(seconds), u32::try_from(nanoseconds)) {
        (Ok(0), Ok(0)) => "-".to_owned(),
        (Ok(seconds), Ok(nanoseconds)) if nanoseconds < 1_000_000_000 => {
            output::duration(std::time::Duration::new(seconds, nanoseconds))
        }
        _ => format!("{seconds} s {nanoseconds} ns"),
    }
}

fn memory(image: &Image, task: &Task) -> String {
    let mut table = Table::new(&["ADDRESS", "", "SIZE", "IN IMAGE", "WHAT"], &[0, 2, 3]);
    let own = image.records(task.memory.pages);
    for vma in &task.memory.vmas {
        let (content, what) = match &vma.mapping {
            Mapping::Anonymous { name } => {
                let field = special(task, vma);
                let name = name.as_ref().map(|n| format!("[anon:{n}]"));
                (stored(own, vma.start, vma.end), name.or(field.map(str::to_owned)).unwrap_or_default())
            }
            Mapping::Private { inode, offset } => {
                (stored(own, vma.start, vma.end), at(inode_name(image, inode.0), *offset))
            }
            Mapping::Shared { inode, offset, .. } => {
                let content = image.objects.inodes.get(inode.0 as usize).and_then(|i| i.content());
                let end = offset.saturating_add(vma.len());
                let bytes = content.map_or(0, |extents| stored(image.records(extents), *offset, end));
                (bytes, at(inode_name(image, inode.0), *offset))
            }
            Mapping::Kernel { name } => (0, name.text().into_owned()),
            Mapping::Ring { ring, area } => (0, at(format!("io_uring, description {ring}"), *area)),
        };
        let content = if content == 0 { "-".into() } else { output::bytes(content) };
        let what = [what, extras(vma)].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(", ");
        table.row([format!("{:x}", vma.start), vma.permissions(), output::bytes(vma.len()), content, what]);
    }
    table.to_string()
}

fn at(name: String, offset: u64) -> String {
    if offset == 0 { name } else { format!("{name} +{offset:#x}") }
}

/// `[heap]` and `[stack]`, which the kernel's notes tell.
fn special(task: &Task, vma: &Vma) -> Option<&'static str> {
    let fields = &task.memory.fields;
    if vma.start <= fields.start_stack && fields.start_stack < vma.end {
        Some("[stack]")
    } else if vma.start < fields.brk && vma.end > fields.start_brk {
        Some("[heap]")
    } else {
        None
    }
}

fn extras(vma: &Vma) -> String {
    let mut words = Vec::new();
    if vma.grows_down {
        words.push("grows down".to_owned());
    }
    if vma.no_reserve {
        words.push("no reserve".to_owned());
    }
    match vma.locked {
        Lock::No => {}
        Lock::Yes => words.push("locked".to_owned()),
        Lock::OnFault => words.push("locked on fault".to_owned()),
    }
    words.extend(vma.advice.iter().map(|advice| match *advice {
        libc::MADV_DONTFORK => "not forked".to_owned(),
        libc::MADV_WIPEONFORK => "wiped on fork".to_owned(),
        libc::MADV_DONTDUMP => "not in core dumps".to_owned(),
        libc::MADV_HUGEPAGE => "huge pages".to_owned(),
        libc::MADV_NOHUGEPAGE => "no huge pages".to_owned(),
        libc::MADV_MERGEABLE => "mergeable".to_owned(),
        libc::MADV_RANDOM => "random access".to_owned(),
        libc::MADV_SEQUENTIAL => "sequential access".to_owned(),
        other => format!("advice {other}"),
    }));
    words.join(", ")
}

/// Bytes with content in the image between `start` and `end`; `records` are sorted by address.
pub(super) fn stored(records: &[Record], start: u64, end: u64) -> u64 {
    let first = records.partition_point(|r| r.address.saturating_add(r.length) <= start);
    records[first..]
        .iter()
        .take_while(|r| r.address < end)
        .filter(|r| r.place == Where::Data)
        .map(|r| r.address.saturating_add(r.length).min(end) - r.address.max(start))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_inside_is_counted() {
        let record = |address, length, place| Record { address, length, place, file: 0, offset: 0 };
        let records = [
            record(0x1000, 0x2000, Where::Data),
            record(0x3000, 0x1000, Where::Zero),
            record(0x5000, 0x4000, Where::Data),
        ];
        assert_eq!(stored(&records, 0, u64::MAX), 0x6000);
        assert_eq!(stored(&records, 0x2000, 0x6000), 0x2000);
        assert_eq!(stored(&records, 0x3000, 0x5000), 0);
        assert_eq!(stored(&[], 0, 1), 0);
    }

    #[test]
    fn times_of_timers() {
        assert_eq!(time(0, 0), "-");
        assert_eq!(time(1, 500_000_000), "1.50 s");
        assert_eq!(time(-1, 0), "-1 s 0 ns");
        assert_eq!(time(0, 2_000_000_000), "0 s 2000000000 ns");
    }

    #[test]
    fn flags_of_handlers() {
        assert_eq!(action_flags(libc::SA_RESTART as u64 | 0x0400_0000), "restart");
    }
}
