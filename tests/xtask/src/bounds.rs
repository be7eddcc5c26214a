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
use crate::raw::{self, Mode, Watch};
use crate::sample::{Tool, warm};
use crate::series::Series;
use crate::victim::{map, next};
use crate::{inquiry, room, small};

const GIB: usize = 1 << 30;
const HUGE: usize = 2 << 20;
/// What is copied by one call: still in the cache when it is read again.
const PIECE: usize = 512 << 10;
const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// asm-generic/mman-common.h
pub(crate) const MADV_POPULATE_WRITE: i32 = 23;
const MADV_COLLAPSE: i32 = 25;

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
    fn files(&self) -> anyhow::Result<Vec<File>> {
        (0..cpus())
            .map(|i| {
                let mut options = File::options();
                let file = options.read(true).write(true).create(true).truncate(true);
                Ok(file.open(self.dir.join(format!("part-{i}")))?)
            })
            .collect()
    }
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

/// Divides 1 GiB among a thread for each processor: its number, where its part begins, and how long it is.
fn divided(work: impl Fn(usize, usize, usize) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    let part = (GIB / cpus()).next_multiple_of(HUGE);
    let work = &work;
    std::thread::scope(|scope| {
        let begin = |i: usize| scope.spawn(move || work(i, i * part, part.min(GIB - i * part)));
        let threads: Vec<_> = (0..cpus()).map(begin).collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))?)
    })
}

/// Memory of 1 GiB that begins at a huge page. Unmapped on drop.
struct Area {
    start: usize,
    whole: usize,
}

impl Area {
    fn new(advice: i32, present: bool) -> anyhow::Result<Self> {
        let whole = map(GIB + HUGE, WRITABLE)? as usize;
        let start = whole.next_multiple_of(HUGE);
        // SAFETY: the mapping was just made, and 1 GiB fits into it from there.
        unsafe {
            libc::madvise(start as *mut libc::c_void, GIB, advice);
            if present {
                libc::madvise(start as *mut libc::c_void, GIB, MADV_POPULATE_WRITE);
            }
        }
        Ok(Self { start, whole })
    }

    /// As many of its bytes.
    fn bytes(&self, at: usize, length: usize) -> &[u8] {
        assert!(at + length <= GIB);
        // SAFETY: mapped for as long as `self` lives; whoever writes there does so before it is read.
        unsafe { std::slice::from_raw_parts((self.start + at) as *const u8, length) }
    }

    fn advise(&self, at: usize, length: usize, advice: i32) -> anyhow::Result<()> {
        // SAFETY: within the mapping, which is ours.
        let got = unsafe { libc::madvise((self.start + at) as *mut libc::c_void, length, advice) };
        ensure!(got == 0, "madvise {advice}: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.whole as *mut libc::c_void, GIB + HUGE) };
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

/// Another process's memory into ours, by one thread for each processor.
fn read_out(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    warm(3 * GIB);
    let source = Area::new(libc::MADV_NOHUGEPAGE, false)?;
    let stage = Area::new(libc::MADV_HUGEPAGE, true)?;
    let mut ends = [0i32; 2];
    // SAFETY: pipe fills two ints; the child writes to its copy of an area of ours, and then waits for its end.
    let child = unsafe {
        ensure!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == 0, "no pipe");
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            std::ptr::write_bytes(source.start as *mut u8, 7, GIB);
            libc::write(ends[1], c"x".as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        libc::read(ends[0], [0u8].as_mut_ptr().cast(), 1);
        child
    };
    let result = ground.times(|| {
        divided(|_, at, length| {
            for at in (at..at + length).step_by(PIECE) {
                let into = libc::iovec { iov_base: (stage.start + at) as *mut libc::c_void, iov_len: PIECE };
                let from = libc::iovec { iov_base: (source.start + at) as *mut libc::c_void, iov_len: PIECE };
                // SAFETY: both lie in areas of 1 GiB, of which pieces are parts.
                let got = unsafe { libc::process_vm_readv(child, &raw const into, 1, &raw const from, 1, 0) };
                ensure!(got == PIECE as isize, "process_vm_readv: {got}");
            }
            Ok(())
        })
    });
    // SAFETY: the child is ours and not reaped; the descriptors are ours.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
        libc::close(ends[0]);
        libc::close(ends[1]);
    }
    result
}

/// Memory that is there into files, one for each processor.
fn write_out(area: &Area, files: &[File]) -> anyhow::Result<()> {
    divided(|i, at, length| {
        for piece in (at..at + length).step_by(HUGE) {
            files[i].write_all_at(area.bytes(piece, HUGE.min(at + length - piece)), (piece - at) as u64)?;
        }
        Ok(())
    })
}

fn write_huge(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let area = Area::new(libc::MADV_NOHUGEPAGE, true)?;
    let once = || {
        warm(2 * GIB);
        let directory = raw::huge_tmpfs()?;
        let files: anyhow::Result<Vec<File>> =
            (0..cpus()).map(|_| Ok(raw::unnamed(&directory)?.into())).collect();
        let files = files?;
        let begin = Instant::now();
        write_out(&area, &files)?;
        Ok(ms(begin.elapsed()))
    };
    (0..ground.rounds).map(|_| once()).collect()
}

fn write_files(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let area = Area::new(libc::MADV_NOHUGEPAGE, true)?;
    let once = || {
        let files = ground.files()?;
        warm(2 * GIB);
        let begin = Instant::now();
        write_out(&area, &files)?;
        Ok(ms(begin.elapsed()))
    };
    (0..ground.rounds).map(|_| once()).collect()
}

/// How pages are made before, or as, contents are put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    Collapse,
    Populate,
    Copy,
}

/// Cached files into new memory.
fn fill(ground: &Ground<'_>, how: Fill) -> anyhow::Result<Vec<f64>> {
    let files = ground.files()?;
    write_out(&Area::new(libc::MADV_HUGEPAGE, true)?, &files)?;
    let once = || {
        warm(2 * GIB);
        let area = Area::new(libc::MADV_NORMAL, false)?;
        let begin = Instant::now();
        let watch = match how {
            Fill::Copy => Some(Watch::over(area.start, GIB, Mode::Missing)?),
            _ => None,
        };
        divided(|i, at, length| {
            let piece = if how == Fill::Collapse { HUGE } else { PIECE };
            let mut buffer = vec![0; if how == Fill::Copy { piece } else { 0 }];
            for from in (at..at + length).step_by(piece) {
                let to = (area.start + from) as *mut u8;
                match how {
                    Fill::Collapse => {
                        // SAFETY: in the mapping, of which this thread has the part.
                        unsafe { to.write_volatile(1) };
                        area.advise(from, piece, MADV_COLLAPSE)?;
                    }
                    Fill::Populate => area.advise(from, piece, MADV_POPULATE_WRITE)?,
                    Fill::Copy => {}
                }
                let offset = (from - at) as u64;
                if let Some(watch) = &watch {
                    files[i].read_exact_at(&mut buffer, offset)?;
                    watch.copy(to as usize, buffer.as_ptr(), piece)?;
                } else {
                    // SAFETY: in the mapping, of which this thread has the part.
                    let into = unsafe { std::slice::from_raw_parts_mut(to, piece) };
                    files[i].read_exact_at(into, offset)?;
                }
            }
            Ok(())
        })?;
        Ok(ms(begin.elapsed()))
    };
    (0..ground.rounds).map(|_| once()).collect()
}
