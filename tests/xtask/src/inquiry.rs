//! Bounds of what is asked about a process that stands: threads, areas, descriptors.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::bounds::Ground;
use crate::command::ms;
use crate::raw;
use crate::sample::{end, start};
use crate::victim::Kind;

/// elf.h: general registers, and all others of x86_64 or of floating point.
const SETS: [i32; 2] = [1, if cfg!(target_arch = "x86_64") { 0x202 } else { 2 }];

/// Measures on a victim as often as samples are wanted.
pub(crate) fn on(
    kind: Kind,
    size: usize,
    ground: &Ground<'_>,
    mut measure: impl FnMut(i32) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<f64>> {
    let victim = start(kind, size, ground.dir)?;
    let pid = victim.id() as i32;
    let samples = (0..ground.rounds).map(|_| measure(pid)).collect();
    end(victim);
    samples
}

fn tids(pid: i32) -> anyhow::Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    Ok(entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// All are seized, then all interrupted, then all waited for.
fn stop(tids: &[i32]) -> anyhow::Result<()> {
    // SAFETY: requests with numbers.
    unsafe {
        for tid in tids {
            ensure!(libc::ptrace(libc::PTRACE_SEIZE, *tid, 0, 0) == 0, "PTRACE_SEIZE has failed");
        }
        for tid in tids {
            libc::ptrace(libc::PTRACE_INTERRUPT, *tid, 0, 0);
        }
        for tid in tids {
            libc::waitpid(*tid, std::ptr::null_mut(), libc::__WALL);
        }
    }
    Ok(())
}

/// Threads that spin are stopped; letting them go is not timed.
pub(crate) fn spinning(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    on(Kind::Spinning, 10, ground, |pid| {
        let tids = tids(pid)?;
        let begin = Instant::now();
        stop(&tids)?;
        let took = ms(begin.elapsed());
        for tid in &tids {
            // SAFETY: a request with numbers.
            unsafe { libc::ptrace(libc::PTRACE_DETACH, *tid, 0, 0) };
        }
        Ok(took)
    })
}

/// All are stopped; two sets of registers of each are read, and all let go.
pub(crate) fn threads(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    on(Kind::Sleeping, 1000, ground, |pid| {
        let tids = tids(pid)?;
        let mut registers = [0u8; 16 << 10];
        let begin = Instant::now();
        stop(&tids)?;
        // SAFETY: requests with numbers, and with a place for as many bytes as is said.
        unsafe {
            for tid in &tids {
                for set in SETS {
                    let mut vector =
                        libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: registers.len() };
                    libc::ptrace(libc::PTRACE_GETREGSET, *tid, set, &raw mut vector);
                }
            }
            for tid in &tids {
                libc::ptrace(libc::PTRACE_DETACH, *tid, 0, 0);
            }
        }
        Ok(ms(begin.elapsed()))
    })
}

/// The map is read in large pieces; nobody looks at it. What the areas hold is copied in pieces of a MiB, by as many
/// threads as there are processors.
pub(crate) fn areas(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    const COUNT: usize = 10_000;
    const PIECE: usize = 1 << 20;
    let mut text = vec![0; 256 << 10];
    let mut room = vec![1u8; COUNT * 4096];
    on(Kind::Areas, COUNT, ground, |pid| {
        let first = first_of(pid, COUNT)?;
        let begin = Instant::now();
        let mut maps = fs::File::open(format!("/proc/{pid}/maps"))?;
        while maps.read(&mut text)? > 0 {}
        let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let share = (room.len() / cpus).next_multiple_of(PIECE);
        std::thread::scope(|scope| {
            let copy = |(i, part): (usize, &mut [u8])| {
                for (j, piece) in part.chunks_mut(PIECE).enumerate() {
                    let from = first + i * share + j * PIECE;
                    let got = raw::read_memory(pid, from, piece);
                    ensure!(got == piece.len() as isize, "process_vm_readv: {got}");
                }
                Ok(())
            };
            let parts = room.chunks_mut(share).enumerate();
            let threads: Vec<_> = parts.map(|part| scope.spawn(move || copy(part))).collect();
            let failed = || anyhow::anyhow!("a thread has panicked");
            threads.into_iter().try_for_each(|t| t.join().map_err(|_| failed())?)
        })?;
        Ok(ms(begin.elapsed()))
    })
}

/// Where the first of as many areas begins, each of a page and behind the one before.
fn first_of(pid: i32, count: usize) -> anyhow::Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let starts: Vec<usize> =
        maps.lines().filter_map(|line| usize::from_str_radix(line.split_once('-')?.0, 16).ok()).collect();
    // The last of them may be one with what lies behind.
    let row = |w: &&[usize]| w[w.len() - 1] - w[0] == (w.len() - 1) * 4096;
    let found = starts.windows(count - 1).find(row);
    found.map(|row| row[0]).context("the areas do not lie in a row")
}

/// Each descriptor is taken, its position and flags are read, and what it is.
pub(crate) fn descriptors(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    on(Kind::Descriptors, 2000, ground, |pid| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        let numbers: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let mut text = [0; 1024];
        let begin = Instant::now();
        let pidfd = raw::pidfd(pid)?;
        for number in numbers {
            let taken = raw::take(&pidfd, number)?;
            let _length = fs::File::open(format!("/proc/{pid}/fdinfo/{number}"))?.read(&mut text)?;
            // SAFETY: all zeros is a valid stat, which the kernel fills.
            unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                libc::fstat(taken.as_raw_fd(), &raw mut stat);
            }
        }
        Ok(ms(begin.elapsed()))
    })
}
