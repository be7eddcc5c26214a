//! `torpor restore`: from an image to a running process.

use std::path::Path;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpgid, getsid, setpgid, setsid};
use serde::Serialize;
use torpor_image::Image;
use torpor_image::inode::Inode;
use torpor_restorer::lazy::Lazy;
use torpor_restorer::{Host, Options, Plan, Prepared};

use crate::args::RestoreArgs;
use crate::attach::{Attached, Terminal};
use crate::exit::Exit;
use crate::held::Held;
use crate::lazy::{self, Side, Told};
use crate::pidfile::PidFile;
use crate::progress::Progress;
use crate::{encoding, output};

/// How often a restore is tried again, ten milliseconds apart, for a pid that is about to be free.
const FLEETING: u32 = 10;

#[derive(Serialize)]
struct Restored {
    pid: i32,
    /// Who serves its memory, where that is not the one that prints this.
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<u32>,
}

pub(crate) fn run(args: &RestoreArgs) -> anyhow::Result<Exit> {
    if args.lazy && !args.plan {
        torpor_restorer::lazy::possible()?;
        if args.detach {
            return match lazy::apart()? {
                Side::Parent(exit) => Ok(exit),
                Side::Child(told) => restore(args, Some(told)),
            };
        }
    }
    restore(args, None)
}

fn restore(args: &RestoreArgs, told: Option<Told>) -> anyhow::Result<Exit> {
    let encoding::Opened { image, spool, held } = encoding::open(&args.dir, &args.reading)?;
    if args.verify {
        image.verify(|_| ())?;
    }
    crate::raise_descriptor_limit();
    let plan = plan(&image, args.accept_changed, args.detach, lazy::wanted(args)?)?;
    for note in &plan.notes {
        output::note(note);
    }
    if args.plan {
        if args.json {
            output::json_pretty(&plan)?;
        } else {
            output::print(&output::safe(&plan.to_string()))?;
        }
        return Ok(Exit::Ok);
    }
    // Before anything is restored: a terminal among it gets the settings of the image.
    let terminal = Terminal::remember();
    let progress = Progress::new("restoring", content(&image));
    let add = |bytes| progress.add(bytes);
    // Ctrl-\ is left for what does not want to end.
    let held = held.unwrap_or_else(|| Held::begin(&[Signal::SIGQUIT]));
    let mut tries = 0;
    let prepared = loop {
        match torpor_restorer::prepare(&image, &plan, Some(&add)) {
            Err(torpor_restorer::Error::Fleeting { .. }) if tries < FLEETING => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            done => break done.map_err(anyhow::Error::from),
        }
    };
    progress.finish();
    let prepared = prepared.and_then(|prepared| {
        if Held::wants_end() {
            // All of it is gone again before the signal ends us.
            drop(prepared);
            return Err(torpor_restorer::Error::Cancelled { what: image.tasks[0].title() }.into());
        }
        Ok(prepared)
    });
    // It has all that it needs of the image, and may run for long, unless memory is still to come.
    let spool = spool.filter(|_| args.lazy);
    let (prepared, held) = held.end(prepared)?;
    for note in prepared.notes() {
        output::note(note);
    }
    let exit = if args.detach { detach(args, prepared, told)? } else { attach(args, prepared, &terminal)? };
    drop(spool);
    held.keep();
    Ok(exit)
}

/// Bytes of the files that are made again, which is what a restore reports as it goes on.
fn content(image: &Image) -> u64 {
    let contents = image.objects.inodes.iter().filter_map(Inode::content);
    contents.flat_map(|extents| image.records(extents)).map(|r| r.length).fold(0, u64::saturating_add)
}

/// The plan to restore `image` on this machine.
pub(crate) fn plan(
    image: &Image,
    accept_changed: bool,
    detach: bool,
    lazy: Option<Lazy>,
) -> anyhow::Result<Plan> {
    let mut options = Options::default();
    options.accept_changed = accept_changed;
    options.detach = detach;
    options.lazy = lazy;
    options.cancel = Some(Held::wants_end);
    Ok(torpor_restorer::plan(image, &Host::probe()?, &options)?)
}

/// Lets the process run and leaves it to itself.
fn detach(args: &RestoreArgs, prepared: Prepared<'_>, told: Option<Told>) -> anyhow::Result<Exit> {
    let pidfile = write_pidfile(args.pidfile.as_deref(), &prepared)?;
    announce(args, prepared.pid())?;
    if told.is_some() {
        output::note(&format!("pid {} serves its memory until all of it is there", std::process::id()));
    }
    let mut running = prepared.resume(args.stopped);
    pidfile.into_iter().for_each(PidFile::keep);
    leave_session_of(running.pid());
    match told {
        Some(told) => lazy::stay(told, running.serving(), args.record.as_deref()),
        None => Ok(Exit::Ok),
    }
}

/// Lets the process run, stands in for it until it ends, and ends like it.
fn attach(args: &RestoreArgs, prepared: Prepared<'_>, terminal: &Terminal) -> anyhow::Result<Exit> {
    let attached = Attached::begin()?;
    let pidfile = write_pidfile(args.pidfile.as_deref(), &prepared)?;
    if args.json {
        announce(args, prepared.pid())?;
    }
    let lent = attached.lend_terminal(prepared.pid(), prepared.foreground(), terminal);
    let mut running = prepared.resume(args.stopped);
    pidfile.into_iter().for_each(PidFile::keep);
    let exit = attached.wait(running.pid(), lent)?;
    // Others of the tree may still need theirs; and what ended it may be that it was lost.
    lazy::finish(running.serving(), args.record.as_deref())?;
    Ok(exit)
}

/// Prints the pid. Before the process runs: if that fails, so does the restore.
fn announce(args: &RestoreArgs, pid: i32) -> anyhow::Result<()> {
    let server = (args.lazy && args.detach).then(std::process::id);
    let printed =
        if args.json { output::json(&Restored { pid, server }) } else { output::print(&format!("{pid}\n")) };
    // A reader that has gone away does not want to know.
    printed.or_else(|e| if output::is_closed(&e) { Ok(()) } else { Err(e) })
}

fn write_pidfile(path: Option<&Path>, prepared: &Prepared<'_>) -> anyhow::Result<Option<PidFile>> {
    Ok(path.map(|path| PidFile::write(path, prepared.pid())).transpose()?)
}

/// Leaves the session of process `pid`, if that is ours.
///
/// When we end and its process group is orphaned by that, the kernel sends SIGHUP to a stopped member of it
/// (kernel/exit.c, `reparent_leader` and `kill_orphaned_pgrp`); not so if its parent is of another session. A
/// leader of a process group cannot leave, so that we join another group first: that of the process.
fn leave_session_of(pid: i32) {
    let pid = Pid::from_raw(pid);
    if getsid(Some(pid)).is_ok_and(|theirs| Ok(theirs) == getsid(None)) && setsid().is_err() {
        // The leader of the session can do neither; its end ends the session anyway.
        if let Ok(group) = getpgid(Some(pid))
            && setpgid(Pid::from_raw(0), group).is_ok()
        {
            let _best_effort = setsid();
        }
    }
}
