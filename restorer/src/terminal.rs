//! Terminals from outside, whose place the one takes that this restore is run on, and controlling terminals.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use torpor_image::description::Kind;
use torpor_image::pty::Side;
use torpor_image::task::Task;
use torpor_image::terminal::Terminal;
use torpor_image::{Bytes, DescriptionId, Image, Pid, PtyId};
use torpor_kernel::tty;
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::error::Result;
use crate::open::Opener;
use crate::pipe::io;
use crate::plan::{Open, Planner};

/// A terminal that is lent to the tree.
#[derive(Debug)]
pub(crate) struct Lent {
    fd: OwnedFd,
    /// How it is to be set up.
    termios: Bytes,
    /// What the tree knows of its size.
    size: (u16, u16),
}

/// The standard stream of torpor that stands for a description: the one of the same number, or its
/// standard input. What was opened as /dev/tty is again, where there is one.
pub(crate) fn open(
    opener: &mut Opener<'_>,
    what: &str,
    id: DescriptionId,
    terminal: &Terminal,
) -> Result<OwnedFd> {
    if &*terminal.path == b"/dev/tty"
        && let Ok(fd) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/tty")
    {
        return Ok(fd.into());
    }
    let numbers = opener.image.tasks.iter().flat_map(|t| &t.descriptors);
    let number = numbers.filter(|d| d.description == id).map(|d| d.fd).find(|fd| *fd <= 2).unwrap_or(0);
    // SAFETY: standard streams stay open for the life of the process.
    let stream = unsafe { BorrowedFd::borrow_raw(number) };
    let fd = stream.try_clone_to_owned().map_err(|e| io(what, "dup", &e))?;
    // SAFETY: isatty takes a number.
    if !terminal.termios.is_empty() && unsafe { libc::isatty(fd.as_raw_fd()) } == 1 {
        let fd = fd.try_clone().map_err(|e| io(what, "dup", &e))?;
        opener.terminals.push(Lent { fd, termios: terminal.termios.clone(), size: terminal.size });
    }
    Ok(fd)
}

/// Sets terminals up as they were at the dump, and tells of another size: done last, when nothing can fail any more.
pub(crate) fn set_up(opener: &Opener<'_>) {
    // A process in the background would be stopped for this (SIGTTOU, termios(3)).
    let stop = SigSet::from(Signal::SIGTTOU);
    let before = stop.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    for lent in &opener.terminals {
        // SAFETY: TCSETS reads a kernel `struct termios`, whose length was checked when the image was read.
        unsafe { libc::ioctl(lent.fd.as_raw_fd(), libc::TCSETS, lent.termios.as_ptr()) };
    }
    if let Ok(before) = before {
        let _cannot_fail = before.thread_set_mask();
    }
    let differs = |lent: &Lent| {
        let now = tty::size(lent.fd.as_fd()).unwrap_or_default();
        lent.size != (0, 0) && now != [0; 4] && lent.size != (now[0], now[1])
    };
    if opener.terminals.iter().any(differs) {
        for task in watchers(opener.image) {
            // SAFETY: kill takes numbers. It is taken once the task is let go; it does nothing to one without a
            // handler.
            unsafe { libc::kill(task.0, libc::SIGWINCH) };
        }
    }
}

/// Who is told of the size of the terminal from outside: its foreground group, or the root, if it has it open
/// without being controlled by it.
fn watchers(image: &Image) -> Vec<Pid> {
    let in_front =
        |task: &&Task| task.terminal.is_some_and(|t| t.pty.is_none() && t.foreground == Some(task.pgid));
    let mut all: Vec<Pid> = image.tasks.iter().filter(in_front).map(|t| t.pid).collect();
    if all.is_empty() {
        all.extend(image.tasks.first().map(|t| t.pid));
    }
    all
}

/// The process group of the tree that was in the foreground of a terminal from outside.
pub(crate) fn in_front(image: &Image) -> Option<Pid> {
    let outside = image.tasks.iter().filter_map(|t| t.terminal).find(|t| t.pty.is_none())?;
    let group = outside.foreground?;
    image.tasks.iter().any(|t| t.pgid == group).then_some(group)
}

/// The slave that is to be the controlling terminal of a session leader: see [`take`].
pub(crate) fn controlling(planner: &mut Planner<'_>, task: &Task) -> Option<Value> {
    let image = planner.image;
    let terminal = task.terminal?;
    let leads = task.sid == task.pid;
    match terminal.pty {
        Some(id) if leads => {
            let slot = planner.open(Open::Slave { pty: id });
            return Some(planner.descriptor(slot));
        }
        None if leads => planner.note(format!(
            "{}: its controlling terminal is not in the image; its session comes back without one",
            task.title()
        )),
        Some(id) if !image.tasks.iter().any(|t| t.pid == task.sid) => planner.note(format!(
            "{}: the leader of its session is not in the image; {} does not control it any more",
            task.title(),
            image.objects.ptys[id.0 as usize].path
        )),
        _ => {}
    }
    None
}

/// Gives a session leader its controlling terminal.
///
/// TIOCSCTTY is for a session leader without a terminal and sets that of its caller alone; others of the session
/// inherit it when they are forked (drivers/tty/tty_jobctl.c, `__proc_set_tty`; kernel/fork.c). So this must be
/// run right after setsid(2), and *before any other process of the session is made*. The leader's group is in the
/// foreground then; another one is put there by [`foreground`].
pub(crate) fn take(script: &mut Script, slave: Option<Value>) {
    if let Some(slave) = slave {
        call!(script, "its controlling terminal", libc::SYS_ioctl, slave, libc::TIOCSCTTY, 0);
    }
}

/// Takes the terminal of its session from a process that had given it up, when all are born: who is made by it
/// inherits it.
pub(crate) fn give_up(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    if task.sid == task.pid || task.terminal.is_some() {
        return;
    }
    let leader = planner.image.tasks.iter().find(|t| t.pid == task.sid);
    if let Some(id) = leader.and_then(|t| t.terminal).and_then(|t| t.pty) {
        let slot = planner.open(Open::Slave { pty: id });
        let args = [planner.descriptor(slot), libc::TIOCNOTTY.into(), 0.into()];
        // It has none if it was made by somebody who has none.
        script.try_call("giving up the terminal of its session", libc::SYS_ioctl, &args);
    }
}

/// Puts the process group into the foreground of the terminal of a session that was there: a late operation of the
/// session leader, when all groups exist and its descriptors are in place. It is not stopped for that, since
/// signals are blocked while scripts run (tcsetpgrp(3)).
pub(crate) fn foreground(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    let image = planner.image;
    let Some(terminal) = task.terminal.filter(|_| task.sid == task.pid) else { return };
    let (Some(id), Some(group)) = (terminal.pty, terminal.foreground) else { return };
    if group == task.pgid {
        return;
    }
    if !image.tasks.iter().any(|t| t.pgid == group && t.sid == task.sid) {
        planner.note(format!(
            "{}: process group {group}, in the foreground of {}, is gone; its own takes that place",
            task.title(),
            image.objects.ptys[id.0 as usize].path
        ));
        return;
    }
    let purpose = format!("process group {group} in the foreground");
    let number = script.data(&group.0.to_ne_bytes());
    if let Some(fd) = descriptor_of(image, task, id) {
        call!(script, purpose, libc::SYS_ioctl, fd, libc::TIOCSPGRP, number);
        return;
    }
    let path = script.c_string(b"/dev/tty");
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let opened = call!(script, purpose.clone(), libc::SYS_openat, libc::AT_FDCWD, path, flags, 0);
    call!(script, purpose.clone(), libc::SYS_ioctl, opened, libc::TIOCSPGRP, number);
    script.call(purpose, libc::SYS_close, &[Value::Result(opened)]);
}

/// A descriptor of a task that leads to a pair.
fn descriptor_of(image: &Image, task: &Task, id: PtyId) -> Option<i32> {
    let leads = |description: DescriptionId| match &image.objects.descriptions[description.0 as usize].kind {
        Kind::Pty(end) => end.pty == id && end.side != Side::HungUp,
        _ => false,
    };
    task.descriptors.iter().find(|d| leads(d.description)).map(|d| d.fd)
}
