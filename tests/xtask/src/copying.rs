//! A GiB copied out of another process, into files, and back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::ensure;

use crate::bounds::{GIB, Ground, MADV_POPULATE_WRITE, WRITABLE};
use crate::command::ms;
use crate::raw::{self, Mode, Watch};
use crate::sample::warm;
use crate::victim::map;

const HUGE: usize = 2 << 20;
/// What is copied by one call: still in the cache when it is read again.
const PIECE: usize = 512 << 10;
/// asm-generic/mman-common.h
const MADV_COLLAPSE: i32 = 25;

pub(crate) fn cpus() -> usize {
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
pub(crate) struct Area {
    pub(crate) start: usize,
    whole: usize,
}

impl Area {
    pub(crate) fn new(advice: i32, present: bool) -> anyhow::Result<Self> {
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

    /// The same, to be filled.
    #[expect(clippy::mut_from_ref, reason = "threads have parts of their own")]
    fn bytes_mut(&self, at: usize, length: usize) -> &mut [u8] {
        assert!(at + length <= GIB);
        // SAFETY: mapped for as long as `self` lives; nobody else has this part meanwhile.
        unsafe { std::slice::from_raw_parts_mut((self.start + at) as *mut u8, length) }
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

/// A process that has an area of ours in memory of its own. Ended on drop.
struct Child {
    pid: i32,
    ends: [i32; 2],
}

impl Child {
    fn with(source: &Area) -> anyhow::Result<Self> {
        let mut ends = [0i32; 2];
        // SAFETY: pipe fills two ints; the child writes to its copy of an area of ours, and then waits for its end.
        let pid = unsafe {
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
        ensure!(pid > 0, "no process");
        Ok(Child { pid, ends })
    }

    fn read(&self, from: usize, to: &mut [u8]) -> anyhow::Result<()> {
        let into = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
        let from = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: to.len() };
        // SAFETY: `to` is ours, with its length.
        let got = unsafe { libc::process_vm_readv(self.pid, &raw const into, 1, &raw const from, 1, 0) };
        ensure!(got == to.len() as isize, "process_vm_readv: {got}");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not reaped; the descriptors are ours.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            libc::close(self.ends[0]);
            libc::close(self.ends[1]);
        }
    }
}

/// Another process's memory into ours, by one thread for each processor.
pub(crate) fn read_out(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    warm(3 * GIB);
    let source = Area::new(libc::MADV_NOHUGEPAGE, false)?;
    let stage = Area::new(libc::MADV_HUGEPAGE, true)?;
    let child = Child::with(&source)?;
    ground.times(|| {
        divided(|_, at, length| {
            let step = |at| child.read(source.start + at, stage.bytes_mut(at, PIECE));
            (at..at + length).step_by(PIECE).try_for_each(step)
        })
    })
}

/// Another process's memory into files, piece by piece through memory that stays in the cache, and the end of that process.
pub(crate) fn take_all(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let source = Area::new(libc::MADV_NOHUGEPAGE, false)?;
    let once = || {
        let child = Child::with(&source)?;
        let files = ground.files()?;
        warm(2 * GIB);
        let begin = Instant::now();
        divided(|i, at, length| {
            let mut piece = vec![0; PIECE];
            for from in (at..at + length).step_by(PIECE) {
                child.read(source.start + from, &mut piece)?;
                files[i].write_all_at(&piece, (from - at) as u64)?;
            }
            Ok(())
        })?;
        drop(child);
        Ok(ms(begin.elapsed()))
    };
    (0..ground.rounds).map(|_| once()).collect()
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

pub(crate) fn write_huge(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
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

pub(crate) fn write_files(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
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
pub(crate) enum Fill {
    Collapse,
    Populate,
    Copy,
}

/// Cached files into new memory.
pub(crate) fn fill(ground: &Ground<'_>, how: Fill) -> anyhow::Result<Vec<f64>> {
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
