//! Bounds of what is asked about a process that stands: threads, areas, descriptors.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::ensure;

use crate::bounds::Ground;
use crate::command::ms;
use crate::raw;
use crate::sample::{end, start};
use crate::victim::Kind;

/// elf.h: general registers, and all others of x86_64 or of floating point.
const SETS: [i32; 2] = [1, if cfg!(target_arch = "x86_64") { 0x202 } else { 2 }];

/// Measures on a victim as often as samples are wanted.
fn on(
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

/// All are seized, then all interrupted, then all waited for; two sets of registers of each are read, and all let go.
pub(crate) fn threads(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    on(Kind::Sleeping, 1000, ground, |pid| {
        let entries = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
        let tids: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let mut registers = [0u8; 16 << 10];
        let begin = Instant::now();
        // SAFETY: requests with numbers, and with a place for as many bytes as is said.
        unsafe {
            for tid in &tids {
                ensure!(libc::ptrace(libc::PTRACE_SEIZE, *tid, 0, 0) == 0, "PTRACE_SEIZE has failed");
            }
            for tid in &tids {
                libc::ptrace(libc::PTRACE_INTERRUPT, *tid, 0, 0);
            }
            for tid in &tids {
                libc::waitpid(*tid, std::ptr::null_mut(), libc::__WALL);
            }
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

/// The map is read in large pieces; nobody looks at it.
pub(crate) fn areas(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let mut text = vec![0; 256 << 10];
    on(Kind::Areas, 10_000, ground, |pid| {
        let begin = Instant::now();
        let mut maps = fs::File::open(format!("/proc/{pid}/maps"))?;
        while maps.read(&mut text)? > 0 {}
        Ok(ms(begin.elapsed()))
    })
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
