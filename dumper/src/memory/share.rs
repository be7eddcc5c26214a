//! Memory in shares, for several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Run;
use crate::workers;

/// Memory worth another thread.
pub(super) const SHARE: u64 = 2 << 20;
/// Shares for each thread: none is as fast as another.
pub(super) const PIECES: u64 = 8;
/// Longest share of what is written at once, in bytes: the last one may be left to one thread.
pub(super) const LONGEST: u64 = 16 << 20;

/// How many writers `bytes` of memory are worth on this machine.
pub(super) fn writers(bytes: u64) -> u64 {
    bytes.div_ceil(SHARE).clamp(1, workers::cpus() as u64)
}

/// How many data files to prepare: those not needed are dropped.
pub(crate) fn most_files() -> u32 {
    writers(u64::MAX) as u32
}

/// Splits runs into shares of about `size` bytes.
pub(super) fn split(runs: &[Run], size: u64) -> Vec<Vec<Run>> {
    let mut shares = vec![Vec::new()];
    let mut room = size;
    for &run in runs {
        let mut rest = run;
        while rest.end - rest.start > room {
            let middle = rest.start + room;
            if room > 0 {
                shares.last_mut().expect("never empty").push(Run { end: middle, ..rest });
            }
            shares.push(Vec::new());
            rest.start = middle;
            room = size;
        }
        room -= rest.end - rest.start;
        shares.last_mut().expect("never empty").push(rest);
    }
    shares
}

/// Shares that are taken one after the other, by whoever is done with his.
pub(super) struct Shares {
    all: Vec<Vec<Run>>,
    next: AtomicUsize,
}

impl Shares {
    pub(super) fn new(all: Vec<Vec<Run>>) -> Self {
        Shares { all, next: AtomicUsize::new(0) }
    }

    pub(super) fn take(&self) -> Option<&[Run]> {
        Some(self.all.get(self.next.fetch_add(1, Ordering::Relaxed))?)
    }

    /// Nothing more is taken: one of them could not be copied.
    pub(super) fn end(&self) {
        self.next.store(self.all.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use torpor_image::extent::PAGE;

    use super::*;

    #[test]
    fn shares_cover_every_byte_once() {
        let run = |start, end| Run { space: 0, start: start * PAGE, end: end * PAGE };
        let runs = [run(0, 5), run(9, 10)];
        for size in 1..8 {
            let shares = split(&runs, size * PAGE);
            let total: u64 = shares.iter().flatten().map(|r| r.end - r.start).sum();
            assert_eq!(total, 6 * PAGE);
            assert!(shares.iter().all(|s| s.iter().map(|r| r.end - r.start).sum::<u64>() <= size * PAGE));
        }
    }
}
