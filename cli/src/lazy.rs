//! A lazy restore, seen from the command line: who stays to serve memory, and the order it was needed in.
//!
//! With `--detach` the restore is the work of a child from the beginning, since the threads that serve memory must be
//! there before the first instruction and cannot move to another process. We wait until the tree runs and end with
//! the child's word; it stays, in a session of its own, deaf to signals, until all memory is there.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{ForkResult, fork, pipe2};
use torpor_restorer::lazy::{Lazy, Serving, Touched};

use crate::args::RestoreArgs;
use crate::exit::{Exit, Failure};
use crate::output;

/// First line of a working set.
const HEAD: &str = "torpor working set 1";

/// What is asked of memory, if it is to come later.
pub(crate) fn wanted(args: &RestoreArgs) -> anyhow::Result<Option<Lazy>> {
    if !args.lazy {
        return Ok(None);
    }
    let mut lazy = Lazy { record: args.record.is_some(), ..Lazy::default() };
    if let Some(path) = &args.working_set {
        let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e.to_string()))?;
        lazy.first = parse(&text).map_err(|why| unreadable(path, &why))?;
    }
    Ok(Some(lazy))
}

fn unreadable(path: &Path, why: &str) -> Failure {
    Failure::new(Exit::Usage, format!("cannot read the working set `{}`: {why}", path.display()))
}

fn parse(text: &str) -> Result<Vec<Touched>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(HEAD) {
        return Err(format!("its first line is not `{HEAD}`"));
    }
    let entry = |line: &str| {
        let mut words = line.split(' ');
        let pid = words.next()?.parse().ok()?;
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |word| u64::from_str_radix(word, 16).ok();
        Some(Touched { pid, start: hex(start)?, end: hex(end)? }).filter(|t| t.start < t.end)
    };
    let entries =
        (2..).zip(lines).map(|(n, line)| entry(line).ok_or(format!("line {n} is not `PID START-END`")));
    entries.collect()
}

fn print(touched: &[Touched]) -> String {
    let mut text = format!("{HEAD}\n");
    let mut seen = std::collections::HashSet::new();
    for t in touched.iter().filter(|t| seen.insert((t.pid, t.start))) {
        let _infallible = writeln!(text, "{} {:x}-{:x}", t.pid, t.start, t.end);
    }
    text
}

/// What became of the child that restores.
pub(crate) enum Side {
    /// We are the one that waits, and this is how it went.
    Parent(Exit),
    /// We are the child, and tell by this.
    Child(Told),
}

/// The way to tell who waits.
pub(crate) struct Told(OwnedFd);

/// Makes the child that restores and stays.
pub(crate) fn apart() -> anyhow::Result<Side> {
    let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("cannot make a process")? {
        ForkResult::Child => Ok(Side::Child(Told(write))),
        ForkResult::Parent { child } => {
            drop(write);
            let mut said = Vec::new();
            let _ended = std::fs::File::from(read).read_to_end(&mut said);
            if said.is_empty() {
                // It ended without a word; what it had to say of that it has said.
                let status = nix::sys::wait::waitpid(child, None);
                let code = match status {
                    Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => Exit::Program(code as u8),
                    _ => {
                        return Err(
                            Failure::new(Exit::Unexpected, "the process that restores was killed").into()
                        );
                    }
                };
                return Ok(Side::Parent(code));
            }
            Ok(Side::Parent(Exit::Ok))
        }
    }
}

/// The tree runs: lets the one that waits go, and serves the memory to the end.
pub(crate) fn stay(told: Told, serving: Option<Serving>, record: Option<&Path>) -> anyhow::Result<Exit> {
    // Children of the tree's root are not ours to collect, and the root itself collects the kernel.
    // SAFETY: no code of ours is run for it.
    let _never_fails = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    let _never_fails = SigSet::all().thread_block();
    release_output();
    let _gone = std::fs::File::from(told.0).write_all(b"1");
    finish(serving, record).inspect_err(|e| log(&format!("torpor: {e}")))
}

/// Waits until all memory is there, and writes down what was needed first: nothing, if nothing could wait.
pub(crate) fn finish(serving: Option<Serving>, record: Option<&Path>) -> anyhow::Result<Exit> {
    let touched = serving.map_or(Ok(Vec::new()), Serving::wait)?;
    if let Some(path) = record {
        let text = print(&touched);
        std::fs::write(path, text)
            .map_err(Failure::output(format!("cannot write the working set `{}`", path.display())))?;
    }
    Ok(Exit::Ok)
}

/// Who reads our output must not wait for us; errors go on to where a file takes them.
fn release_output() {
    let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") else { return };
    for fd in 0..3 {
        // SAFETY: an all-zero stat is a valid one.
        let mut found: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: a number and a structure of ours.
        let is_file =
            unsafe { libc::fstat(fd, &raw mut found) } == 0 && found.st_mode & libc::S_IFMT == libc::S_IFREG;
        if fd != 2 || !is_file {
            // SAFETY: numbers.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
}

/// Nobody may look at our output any more: the system's log has it, too.
fn log(text: &str) {
    if let Ok(text) = std::ffi::CString::new(output::safe(text)) {
        // SAFETY: strings that end with a zero; the text is no format.
        unsafe { libc::syslog(libc::LOG_DAEMON | libc::LOG_CRIT, c"%s".as_ptr(), text.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_comes_back() {
        let touched = |pid, start, end| Touched { pid, start, end };
        let all = [touched(7, 0x10000, 0x20000), touched(8, 0, 0x1000), touched(7, 0x10000, 0x20000)];
        assert_eq!(parse(&print(&all)).unwrap(), all[..2]);
        for wrong in ["", "x", "torpor working set 1\n7 1000", "torpor working set 1\n7 2000-1000"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
