//! Runs a command that is measured: wall time, peak memory, what it said.
//!
//! The peak is `ru_maxrss` of wait4(2). That counts the address space a process had before execve(2) as well
//! (`setmax_mm_hiwater_rss`, fs/exec.c), which is ours: it begins as vfork(2) of this process. So the peak of our own is
//! put back to what we have now (`5` to /proc/self/clear_refs, proc_pid_clear_refs(5)), which is a few MiB and less than either
//! tool needs. Processes of the tool that stay behind (a tracker, a server of pages) are told apart: they began as copies of the
//! command, most of whose pages are counted there already.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// After this a command is ended: it counts as failed.
const PATIENCE: Duration = Duration::from_secs(240);

/// What a command took.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Milliseconds.
    pub(crate) wall: f64,
    /// Most memory that it had at once, in MiB.
    pub(crate) peak: f64,
    /// Memory of processes that it has left behind, in MiB.
    pub(crate) behind: f64,
    /// What it has printed.
    pub(crate) said: String,
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Ran> {
    let mut said = unnamed()?;
    let mut complained = unnamed()?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(complained.try_clone()?);
    forget_peak();
    let begin = Instant::now();
    let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let (status, peak) = wait(&child)?;
    let wall = ms(begin.elapsed());
    if status != 0 {
        let text = contents(&mut complained)?;
        bail!("{command:?}: status {status:#x}: {}", text.trim());
    }
    let behind = left_behind(Path::new(command.get_program()));
    Ok(Ran { wall, peak, behind, said: contents(&mut said)? })
}

/// Waits for the end: the status, and the peak in MiB.
fn wait(child: &Child) -> anyhow::Result<(i32, f64)> {
    let pid = child.id() as i32;
    // SAFETY: takes numbers, gives a descriptor that nobody else has.
    let ended = unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32) };
    let mut poll = libc::pollfd { fd: ended.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd of ours.
    let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as i32) };
    if ready == 0 {
        // SAFETY: kill takes numbers; the child is not reaped yet.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage; the kernel fills both places.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::wait4(pid, &raw mut status, 0, &raw mut usage);
        usage
    };
    ensure!(ready != 0, "ended after {} s without result", PATIENCE.as_secs());
    Ok((status, usage.ru_maxrss as f64 / 1024.0))
}

/// Makes the peak of this process what it has now.
fn forget_peak() {
    // SAFETY: gives free memory back to the kernel.
    unsafe { libc::malloc_trim(0) };
    let _older_kernel = fs::write("/proc/self/clear_refs", "5");
}

/// Memory of the processes of a program that became ours when it ended, in MiB. This process is a subreaper.
fn left_behind(program: &Path) -> f64 {
    let Ok(program) = fs::canonicalize(program) else { return 0.0 };
    let of = |pid: i32| -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next();
        if field("PPid:")?.parse() != Ok(std::process::id())
            || fs::read_link(format!("/proc/{pid}/exe")).ok()? != program
        {
            return None;
        }
        Some(field("VmRSS:")?.parse::<f64>().ok()? / 1024.0)
    };
    pids().into_iter().filter_map(of).sum()
}

/// Every process there is.
pub(crate) fn pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

fn unnamed() -> anyhow::Result<File> {
    let mut options = fs::OpenOptions::new();
    Ok(options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(std::env::temp_dir())?)
}

fn contents(file: &mut File) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
