//! One measurement: a fresh victim, a dump, a restore, all by one tool.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::victim::Kind;

/// Who does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Torpor(PathBuf),
    Criu(PathBuf),
}

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) freezing: f64,
    pub(crate) frozen: f64,
    /// Frozen by a dump before that lets it run on, for each of [`MODES`]; CRIU has one for all.
    pub(crate) passing: [f64; MODES.len()],
    pub(crate) dump: f64,
    pub(crate) restore: f64,
    /// Most memory that the dump and the restore had at once, in KiB.
    pub(crate) dump_memory: f64,
    pub(crate) restore_memory: f64,
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

    /// Measures one dump and one restore of a fresh victim.
    pub(crate) fn sample(&self, kind: Kind, size: usize, dir: &Path) -> anyhow::Result<Sample> {
        let image = dir.join("image");
        let _none = fs::remove_dir_all(&image);
        fs::create_dir(&image)?;
        let mut victim = start(kind, size, dir)?;
        let pid = victim.id() as i32;
        let result = self.cycle(&mut victim, pid, &image);
        end(victim);
        result
    }

    /// How long a fresh victim stands still for a dump after which it runs on.
    pub(crate) fn passing(&self, mode: &str, kind: Kind, size: usize, dir: &Path) -> anyhow::Result<f64> {
        let image = dir.join("image");
        let _none = fs::remove_dir_all(&image);
        fs::create_dir(&image)?;
        let victim = start(kind, size, dir)?;
        let frozen = self.dump(&victim.id().to_string(), &image, Some(mode)).map(|sample| sample.frozen);
        end(victim);
        frozen
    }

    fn cycle(&self, victim: &mut Child, pid: i32, image: &Path) -> anyhow::Result<Sample> {
        let id = pid.to_string();
        let before = image.with_file_name("before");
        let mut passing = [f64::NAN; MODES.len()];
        for (mode, passing) in MODES.iter().zip(&mut passing) {
            let _none = fs::remove_dir_all(&before);
            fs::create_dir(&before)?;
            *passing = self.dump(&id, &before, Some(mode))?.frozen;
            fs::remove_dir_all(&before)?;
        }
        let mut sample = Sample { passing, ..self.dump(&id, image, None)? };
        victim.wait()?;
        reap_session(pid);
        let begin = Instant::now();
        sample.restore_memory = match self {
            Tool::Torpor(path) => run(Command::new(path).args(["restore", "--detach"]).arg(image))?,
            Tool::Criu(path) => {
                let args = ["restore", "-v0", "-o", "restore.log", "-d", "--tcp-established", "-D"];
                run(Command::new(path).args(args).arg(image))?
            }
        };
        sample.restore = ms(begin.elapsed());
        if !Path::new(&format!("/proc/{pid}")).exists() {
            bail!("nothing runs after the restore by {}", self.name());
        }
        Ok(sample)
    }
}

impl Tool {
    /// Dumps process `id`, and lets it run on, frozen in a way of [`MODES`], or ends it.
    fn dump(&self, id: &str, image: &Path, runs_on: Option<&str>) -> anyhow::Result<Sample> {
        let mut sample = Sample::default();
        let begin = Instant::now();
        match self {
            Tool::Torpor(path) => {
                let mut command = Command::new(path);
                command.args(["dump", "--quiet"]);
                if let Some(mode) = runs_on {
                    command.args(["--leave-running", "--freeze", mode]);
                }
                sample.dump_memory = run(command.arg(id).arg(image))?;
                sample.dump = ms(begin.elapsed());
                let shown = Command::new(path).args(["show", "--json"]).arg(image).output()?;
                let json: serde_json::Value = serde_json::from_slice(&shown.stdout)?;
                let time = |name: &str| json["manifest"]["times"][name].as_f64().unwrap_or(f64::NAN) / 1e6;
                (sample.freezing, sample.frozen) = (time("freezing"), time("frozen"));
            }
            Tool::Criu(path) => {
                let mut command = Command::new(path);
                command.args(["dump", "-v0", "-o", "dump.log", "--tcp-established"]);
                command.args(runs_on.map(|_| "--leave-running")).args(["-t", id, "-D"]);
                sample.dump_memory = run(command.arg(image))?;
                sample.dump = ms(begin.elapsed());
                let times = stats(&fs::read(image.join("stats-dump"))?).context("stats-dump")?;
                (sample.freezing, sample.frozen) = times;
            }
        }
        Ok(sample)
    }
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

pub(crate) fn start(kind: Kind, size: usize, dir: &Path) -> anyhow::Result<Child> {
    let ready = dir.join("ready");
    let _none = fs::remove_file(&ready);
    let kind = clap::ValueEnum::to_possible_value(&kind).map(|v| v.get_name().to_owned());
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["victim", &kind.unwrap_or_default(), &size.to_string()])
        .arg(&ready)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec, only calls that are safe there.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        });
    }
    let child = command.spawn().context("starting a victim")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ready.exists() {
        anyhow::ensure!(Instant::now() < deadline, "the victim is not ready after a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    Ok(child)
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

/// Runs a command to its end. Gives the most memory it had at once, in KiB.
fn run(command: &mut Command) -> anyhow::Result<f64> {
    use std::os::unix::process::CommandExt;
    let mut said = tempfile()?;
    // SAFETY: it does nothing. With it the command is begun by fork(2); by vfork(2) it would count our own memory as its.
    unsafe { command.pre_exec(|| Ok(())) };
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?).spawn()?;
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage; the kernel fills both places.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut usage);
        usage
    };
    if status != 0 {
        use std::io::{Read, Seek};
        let mut text = String::new();
        said.rewind()?;
        said.read_to_string(&mut text)?;
        bail!("{command:?}: status {status:#x}: {text}");
    }
    Ok(usage.ru_maxrss as f64)
}

fn tempfile() -> anyhow::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::OpenOptions::new();
    Ok(options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(std::env::temp_dir())?)
}

/// Every process of a session.
fn session(sid: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    // SAFETY: getsid takes a number.
    pids.filter(|pid| unsafe { libc::getsid(*pid) } == sid).collect()
}

/// Waits for all of a dead session's members: this process is a subreaper.
fn reap_session(sid: i32) {
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
fn stats(file: &[u8]) -> Option<(f64, f64)> {
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

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
