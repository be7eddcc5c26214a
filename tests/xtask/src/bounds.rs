//! What the mechanisms of the kernel take alone: nothing built on them can be faster on the same machine.
//!
//! Each is the shortest code that moves the same bytes, or asks the same questions, and does nothing else: no checksums, no
//! metadata, no checks. Where Torpor takes not much longer, a goal below that is not to be had this way. Setting up is not timed.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::command::ms;
use crate::copying::{Area, Fill, cpus, fill, read_out, take_all, write_files, write_huge};
use crate::raw::{self, Mode, Watch};
use crate::sample::{Tool, warm};
use crate::series::Series;
use crate::victim::{map, next};
use crate::{inquiry, room, small};

pub(crate) const GIB: usize = 1 << 30;
pub(crate) const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// asm-generic/mman-common.h
pub(crate) const MADV_POPULATE_WRITE: i32 = 23;

/// A mechanism, and what it took.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) what: &'static str,
    /// Case and column that it bounds.
    pub(crate) of: (&'static str, &'static str),
    /// What is aimed at, where that is not the goal of the case.
    pub(crate) goal: &'static str,
    pub(crate) samples: Series,
    pub(crate) failure: Option<String>,
}

impl Bound {
    pub(crate) fn json(&self) -> Value {
        json!({ "what": self.what, "case": self.of.0, "column": self.of.1, "ms": self.samples.sorted(),
            "failure": self.failure })
    }
}

/// Where a bound is measured, and with what.
pub(crate) struct Ground<'a> {
    pub(crate) rounds: usize,
    pub(crate) dir: &'a Path,
    pub(crate) torpor: &'a Path,
}

type Measure = fn(&Ground<'_>) -> anyhow::Result<Vec<f64>>;

/// What, case and column it bounds, goal where it has one of its own, MiB of memory that it takes, and how it is measured.
type Mechanism = (&'static str, (&'static str, &'static str), &'static str, u64, Measure);

const BOUNDS: &[Mechanism] = &[
    ("fork, execve, exit and wait of an empty program", ("4 MiB", "restore"), "", 64, start_empty),
    ("the same of `torpor --version`", ("4 MiB", "dump"), "< 2 ms", 64, start_torpor),
    (
        "a process of 4 MiB stopped, its smaps, three times let go and stopped, its memory copied",
        ("4 MiB", "frozen"),
        "",
        64,
        small::frozen,
    ),
    (
        "`torpor --version`, the same, and five files with 4 MiB written",
        ("4 MiB", "dump"),
        "",
        64,
        small::dump,
    ),
    (
        "`torpor --version`, fork, 4 MiB made and read from a file, stopped and let go",
        ("4 MiB", "restore"),
        "",
        64,
        small::restore,
    ),
    (
        "PTRACE_SEIZE, INTERRUPT, wait, of 10 threads that spin",
        ("10 spinning threads", "freezing"),
        "",
        64,
        inquiry::spinning,
    ),
    (
        "PTRACE_SEIZE, INTERRUPT, wait, two register sets, DETACH, of 1,000 threads",
        ("1,000 sleeping threads", "freezing + frozen"),
        "",
        128,
        inquiry::threads,
    ),
    (
        "/proc/PID/maps of 10,000 areas, and their memory copied",
        ("10,000 areas", "frozen"),
        "",
        128,
        inquiry::areas,
    ),
    (
        "pidfd_getfd, fdinfo, fstat, close, 2,000 times",
        ("2,000 descriptors", "frozen"),
        "",
        64,
        inquiry::descriptors,
    ),
    (
        "50 processes forked, 4 MiB populated and read by each",
        ("50 processes of 4 MiB", "restore"),
        "",
        512,
        grove,
    ),
    ("fork, 1 GiB of small pages", ("1 GiB", "left running, fork"), "", 2048, |g| {
        fork(g, libc::MADV_NOHUGEPAGE)
    }),
    ("fork, 1 GiB of huge pages", ("1 GiB, huge pages", "left running, fork"), "", 2048, |g| {
        fork(g, libc::MADV_HUGEPAGE)
    }),
    (
        "PAGEMAP_SCAN with write protection of 1 GiB, 1 % of it written to",
        ("1 GiB, 40 MB/s written", crate::cases::LATER),
        "",
        2048,
        |g| scan(g, 100),
    ),
    ("the same, 12.5 % of it written to", ("1 GiB, 530 MB/s written", crate::cases::LATER), "", 2048, |g| {
        scan(g, 8)
    }),
    (
        "process_vm_readv of 1 GiB into huge pages that are there",
        ("1 GiB", "left running, copy"),
        "",
        4096,
        read_out,
    ),
    (
        "write of 1 GiB into files on tmpfs with huge pages",
        ("1 GiB", "left running, copy"),
        "",
        4096,
        write_huge,
    ),
    ("write of 1 GiB into files where images go", ("1 GiB", "dump"), "", 4096, write_files),
    (
        "1 GiB of another process read and written into such files, and its end",
        ("1 GiB", "dump"),
        "",
        4096,
        take_all,
    ),
    ("1 GiB of huge pages made (MADV_COLLAPSE) and read from files", ("1 GiB", "restore"), "", 4096, |g| {
        fill(g, Fill::Collapse)
    }),
    ("1 GiB of small pages made (MADV_POPULATE_WRITE) and read", ("1 GiB", "restore"), "", 4096, |g| {
        fill(g, Fill::Populate)
    }),
    ("1 GiB read and made by UFFDIO_COPY", ("1 GiB", "restore"), "", 4096, |g| fill(g, Fill::Copy)),
];

/// Measures all of them.
pub(crate) fn measure(rounds: usize, torpor: &Tool, dir: &Path) -> Vec<Bound> {
    let Tool::Torpor(torpor) = torpor else { return Vec::new() };
    let ground = Ground { rounds, dir, torpor };
    let one = |(what, of, goal, memory, measure): &Mechanism| {
        let result = room::need(memory << 20, (memory << 20) / 2, dir).and_then(|()| measure(&ground));
        let (samples, failure) = match result {
            Ok(samples) => (Series::of(samples), None),
            Err(e) => (Series::default(), Some(format!("{e:#}"))),
        };
        Bound { what, of: *of, goal, samples, failure }
    };
    BOUNDS.iter().map(one).collect()
}

impl Ground<'_> {
    /// Times something as often as samples are wanted.
    pub(crate) fn times(&self, mut what: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
        (0..self.rounds)
            .map(|_| {
                let begin = Instant::now();
                what()?;
                Ok(ms(begin.elapsed()))
            })
            .collect()
    }

    /// A file of 1 GiB for each processor's part, cached.
    pub(crate) fn files(&self) -> anyhow::Result<Vec<File>> {
        (0..cpus())
            .map(|i| {
                let mut options = File::options();
                let file = options.read(true).write(true).create(true).truncate(true);
                Ok(file.open(self.dir.join(format!("part-{i}")))?)
            })
            .collect()
    }
}

/// An ELF file of one segment that ends itself.
fn start_empty(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let (machine, code): (u16, &[u8]) = if cfg!(target_arch = "x86_64") {
        // mov eax, 60 (exit); xor edi, edi; syscall
        (62, &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05])
    } else {
        // mov x8, #93 (exit); mov x0, #0; svc #0
        (183, &[0xa8, 0x0b, 0x80, 0xd2, 0, 0, 0x80, 0xd2, 1, 0, 0, 0xd4])
    };
    let base = 0x40_0000u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Executable; entry after the headers; program headers from 64 on, one of 56 bytes; no sections.
    for half in [2, machine, 1, 0] {
        elf.extend(half.to_le_bytes());
    }
    for long in [base + 120, 64, 0] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend([0u8; 4]);
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    let length = 120 + code.len() as u64;
    for long in [0, base, base, length, length, 4096] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(code);
    let path = ground.dir.join("empty");
    let mut file = File::create(&path)?;
    file.write_all(&elf)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    drop(file);
    starts(ground, &mut Command::new(path))
}

fn start_torpor(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    starts(ground, &mut version(ground))
}

/// Torpor, to do nothing.
pub(crate) fn version(ground: &Ground<'_>) -> Command {
    let mut command = Command::new(ground.torpor);
    command.arg("--version").stdout(std::process::Stdio::null());
    command
}

/// Runs a command to its end.
pub(crate) fn succeeds(command: &mut Command) -> anyhow::Result<()> {
    ensure!(command.status()?.success(), "{command:?} has failed");
    Ok(())
}

/// Ten times as many starts as samples are wanted.
fn starts(ground: &Ground<'_>, command: &mut Command) -> anyhow::Result<Vec<f64>> {
    Ground { rounds: ground.rounds * 10, ..*ground }.times(|| succeeds(command))
}

/// Runs `work` in a child and gives what it returns.
pub(crate) fn in_child(work: impl FnOnce() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let mut ends = [0i32; 2];
    // SAFETY: pipe2 fills two ints; the child uses its copy of our memory, and this process has one thread.
    unsafe {
        ensure!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == 0, "no pipe");
        let child = libc::fork();
        if child == 0 {
            let result = work().unwrap_or(f64::NAN).to_le_bytes();
            libc::write(ends[1], result.as_ptr().cast(), result.len());
            libc::_exit(0);
        }
        libc::close(ends[1]);
        let mut result = [0u8; 8];
        libc::read(ends[0], result.as_mut_ptr().cast(), result.len());
        libc::close(ends[0]);
        libc::waitpid(child, std::ptr::null_mut(), 0);
        let result = f64::from_le_bytes(result);
        ensure!(result > 0.0, "the process that was to measure it has failed");
        Ok(result)
    }
}

/// Processes are forked one after the other, and fill their memory beside each other.
fn grove(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    const SIZE: usize = 4 << 20;
    let contents = ground.files()?.remove(0);
    contents.write_all_at(&vec![7; SIZE], 0)?;
    let once = || {
        warm(GIB / 2);
        in_child(|| {
            let begin = Instant::now();
            let mut ends = [0i32; 2];
            // SAFETY: pipe fills two ints; this process has one thread; all memory is made and used by one child only.
            unsafe {
                libc::pipe(ends.as_mut_ptr());
                for _ in 0..50 {
                    if libc::fork() == 0 {
                        let Ok(area) = map(SIZE, WRITABLE) else { libc::_exit(1) };
                        libc::madvise(area, SIZE, MADV_POPULATE_WRITE);
                        libc::pread(contents.as_raw_fd(), area, SIZE, 0);
                        libc::write(ends[1], c"x".as_ptr().cast(), 1);
                        libc::_exit(0);
                    }
                }
                libc::close(ends[1]);
                let mut byte = 0u8;
                for _ in 0..50 {
                    ensure!(libc::read(ends[0], (&raw mut byte).cast(), 1) == 1, "a process has failed");
                }
                let took = ms(begin.elapsed());
                while libc::wait(std::ptr::null_mut()) > 0 {}
                Ok(took)
            }
        })
    };
    (0..ground.rounds).map(|_| once()).collect()
}

/// A process with 1 GiB forks.
fn fork(ground: &Ground<'_>, advice: i32) -> anyhow::Result<Vec<f64>> {
    warm(2 * GIB);
    let once = || {
        in_child(|| {
            let _area = Area::new(advice, true)?;
            let begin = Instant::now();
            // SAFETY: the child ends itself at once.
            unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::_exit(0);
                }
                let took = ms(begin.elapsed());
                libc::waitpid(child, std::ptr::null_mut(), 0);
                Ok(took)
            }
        })
    };
    (0..ground.rounds).map(|_| once()).collect()
}

/// One of `part` pages is written to, at random, before each sample.
fn scan(ground: &Ground<'_>, part: usize) -> anyhow::Result<Vec<f64>> {
    warm(2 * GIB);
    let area = Area::new(libc::MADV_NOHUGEPAGE, true)?;
    let watch = Watch::over(area.start, GIB, Mode::WriteProtect)?;
    watch.protect(area.start, GIB)?;
    let pagemap: OwnedFd = File::open("/proc/self/pagemap")?.into();
    let mut x = 88_172_645_463_325_252;
    let mut once = || {
        for _ in 0..GIB / 4096 / part {
            x = next(x);
            let page = x as usize % (GIB / 4096);
            // SAFETY: within the mapping, which nobody else looks at.
            unsafe { ((area.start + page * 4096) as *mut u64).write_volatile(x) };
        }
        let begin = Instant::now();
        ensure!(raw::written(&pagemap, area.start, GIB)? > 0, "nothing was written to");
        Ok(ms(begin.elapsed()))
    };
    (0..ground.rounds).map(|_| once()).collect()
}
