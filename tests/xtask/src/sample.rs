//! One measurement: a fresh victim, dumps of it, a restore, all by one tool.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::command::{Ran, pids, run};
use crate::victim::Kind;

/// Who does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Torpor(PathBuf),
    Criu(PathBuf),
}

/// Times in milliseconds, memory in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) freezing: f64,
    pub(crate) frozen: f64,
    /// Frozen by a dump before that lets it run on, for each of [`MODES`]; CRIU has one for all.
    pub(crate) passing: [f64; MODES.len()],
    pub(crate) dump: f64,
    pub(crate) restore: f64,
    /// Most memory that the dump and the restore had at once.
    pub(crate) dump_memory: f64,
    pub(crate) restore_memory: f64,
}

/// What a dump took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dumped {
    pub(crate) freezing: f64,
    pub(crate) frozen: f64,
    pub(crate) wall: f64,
    pub(crate) peak: f64,
    pub(crate) behind: f64,
}

/// Ways to freeze (`--freeze`) that are measured with processes that run on.
pub(crate) const MODES: [&str; 2] = ["copy", "fork"];

impl Tool {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Tool::Torpor(_) => "torpor",
            Tool::Criu(_) => "criu",
        }
    }

    /// Measures dumps and a restore of a fresh victim; without `passing` only of a dump that ends it.
    pub(crate) fn sample(
        &self,
        kind: Kind,
        size: usize,
        passing: bool,
        dir: &Path,
    ) -> anyhow::Result<Sample> {
        let mut victim = start(kind, size, dir)?;
        let result = self.cycle(&mut victim, passing, dir);
        end(victim);
        result
    }

    fn cycle(&self, victim: &mut Child, passing: bool, dir: &Path) -> anyhow::Result<Sample> {
        let pid = victim.id() as i32;
        let mut before = [f64::NAN; MODES.len()];
        for (i, mode) in MODES.iter().enumerate().filter(|_| passing) {
            before[i] = match self {
                Tool::Criu(_) if i > 0 => before[0],
                _ => self.dump(pid, &empty(dir, "before")?, &["--leave-running", "--freeze", mode])?.frozen,
            };
        }
        let _none = fs::remove_dir_all(dir.join("before"));
        let image = empty(dir, "image")?;
        let dump = self.dump(pid, &image, &[])?;
        victim.wait()?;
        reap_session(pid);
        // What the victim had may have gone cold while its image was written; as much of it is needed again.
        warm(bytes_of(&image) * 2);
        let restore = match self {
            Tool::Torpor(path) => run(Command::new(path).args(["restore", "--detach"]).arg(&image))?,
            Tool::Criu(path) => {
                let args = ["restore", "-v0", "-o", "restore.log", "-d", "--tcp-established", "-D"];
                run(Command::new(path).args(args).arg(&image))?
            }
        };
        ensure!(
            Path::new(&format!("/proc/{pid}")).exists(),
            "nothing runs after the restore by {}",
            self.name()
        );
        Ok(Sample {
            freezing: dump.freezing,
            frozen: dump.frozen,
            passing: before,
            dump: dump.wall,
            restore: restore.wall,
            dump_memory: dump.peak,
            restore_memory: restore.peak,
        })
    }

    /// Dumps a process with these options of Torpor's, of which CRIU gets what it knows.
    pub(crate) fn dump(&self, pid: i32, image: &Path, options: &[&str]) -> anyhow::Result<Dumped> {
        let id = pid.to_string();
        match self {
            Tool::Torpor(path) => {
                let ran = run(Command::new(path).args(["dump", "--json"]).args(options).arg(id).arg(image))?;
                let summary: serde_json::Value =
                    serde_json::from_str(&ran.said).context("the summary of a dump")?;
                let time = |name: &str| summary["times"][name].as_f64().unwrap_or(f64::NAN) / 1e6;
                Ok(dumped(&ran, (time("freezing"), time("frozen"))))
            }
            Tool::Criu(path) => {
                let mut command = Command::new(path);
                command.args(["dump", "-v0", "-o", "dump.log", "--tcp-established"]);
                command.args(options.iter().filter(|option| **option == "--leave-running"));
                let ran = run(command.args(["-t", &id, "-D"]).arg(image))?;
                let times = statistics(&fs::read(image.join("stats-dump"))?).context("stats-dump")?;
                Ok(dumped(&ran, times))
            }
        }
    }
}

fn dumped(ran: &Ran, (freezing, frozen): (f64, f64)) -> Dumped {
    Dumped { freezing, frozen, wall: ran.wall, peak: ran.peak, behind: ran.behind }
}

/// An empty directory of that name.
pub(crate) fn empty(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    let _none = fs::remove_dir_all(&path);
    fs::create_dir(&path)?;
    Ok(path)
}

/// Touches and frees more memory than the sample needs: memory that has lain idle on a virtual machine is
/// first given back by the host, at a multiple of the cost of everything that is measured here.
pub(crate) fn warm(bytes: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a mapping of our own, made and removed.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if start != libc::MAP_FAILED {
            libc::munmap(start, bytes);
        }
    }
}

/// Starts a victim and waits until everything is there.
pub(crate) fn start(kind: Kind, size: usize, dir: &Path) -> anyhow::Result<Child> {
    begin(kind, size, dir, &[])
}

/// The same, of a victim that does nothing any more.
pub(crate) fn start_still(kind: Kind, size: usize, dir: &Path) -> anyhow::Result<Child> {
    begin(kind, size, dir, &["--still"])
}

fn begin(kind: Kind, size: usize, dir: &Path, options: &[&str]) -> anyhow::Result<Child> {
    let ready = dir.join("ready");
    let _none = fs::remove_file(&ready);
    let kind = clap::ValueEnum::to_possible_value(&kind).map(|v| v.get_name().to_owned());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["victim", &kind.unwrap_or_default(), &size.to_string()]).args(options).arg(&ready);
    let child = alone(&mut command).spawn().context("starting a victim")?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !ready.exists() {
        if Instant::now() > deadline {
            end(child);
            anyhow::bail!("the victim is not ready after two minutes");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    Ok(child)
}

/// A command in a session of its own, that has nothing of ours.
pub(crate) fn alone(command: &mut Command) -> &mut Command {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec, only calls that are safe there.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            // Threads that spin at a priority that this program was given would stop the machine.
            let usual = libc::sched_param { sched_priority: 0 };
            libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const usual);
            libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        })
    }
}

/// Bytes of the files of a directory.
fn bytes_of(dir: &Path) -> usize {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|m| m.len() as usize).sum()
}

/// Ends a victim and all that it has started.
pub(crate) fn end(victim: Child) {
    let pid = victim.id() as i32;
    for member in session(pid).into_iter().chain([pid]) {
        // SAFETY: kill takes numbers only; the session is one this run started.
        unsafe { libc::kill(member, libc::SIGKILL) };
    }
    reap(pid);
    reap_session(pid);
}

/// Every process of a session.
pub(crate) fn session(sid: i32) -> Vec<i32> {
    // SAFETY: getsid takes a number.
    pids().into_iter().filter(|pid| unsafe { libc::getsid(*pid) } == sid).collect()
}

/// Waits for all of a dead session's members: this process is a subreaper.
pub(crate) fn reap_session(sid: i32) {
    for pid in session(sid) {
        reap(pid);
    }
}

/// Waits for a process that became our child when its parent went: this process is a subreaper.
fn reap(pid: i32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{pid}")).exists() && Instant::now() < deadline {
        // SAFETY: waitpid may be given no status.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Freezing and frozen time of CRIU's statistics: two magic words, a length, and a protobuf message whose
/// field 1 holds fields 1 (freezing) and 2 (frozen), in microseconds.
fn statistics(file: &[u8]) -> Option<(f64, f64)> {
    let mut rest = file.get(12..)?;
    let _tag = varint(&mut rest)?;
    let length = varint(&mut rest)? as usize;
    let mut body = rest.get(..length)?;
    let (mut freezing, mut frozen) = (None, None);
    while !body.is_empty() {
        let tag = varint(&mut body)?;
        let value = varint(&mut body)? as f64 / 1e3;
        match tag >> 3 {
            1 => freezing = Some(value),
            2 => frozen = Some(value),
            _ => {}
        }
    }
    Some((freezing?, frozen?))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
