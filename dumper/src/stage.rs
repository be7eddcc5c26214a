//! The stage: memory of ours, ready before the freeze, into which processes are copied during it.
//!
//! Page-cache pages are made one by one at several times the cost of the copy (research/fast.md, 2.1), and
//! the zero test, checksums and the file system add to it; with a stage all of that comes after the thaw.
//! It takes as much memory as the processes have, so it is only made where that is there to be had: no process
//! shall be ended for want of memory, or swapped out, because of us.

use crate::workers;

/// Of processes that end with the dump, those larger than this are written to their files inside the freeze: that is
/// sooner done with than a copy and a write after it.
const LARGEST_OF_ENDED: u64 = 256 << 20;
/// The part of free memory that a stage may take.
const PART: u64 = 2;
/// What one thread makes ready at a time.
const PIECE: usize = 32 << 20;
/// asm-generic/mman-common.h
const MADV_POPULATE_WRITE: i32 = 23;
const HUGE: u64 = 2 << 20;

/// Memory that is present. Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Stage {
    start: *mut u8,
    length: usize,
    used: usize,
}

// SAFETY: the mapping belongs to this value alone; access goes through `&mut self` and `&self`.
unsafe impl Send for Stage {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Stage {}

impl Stage {
    /// A stage for `bytes` and a little more, or none where that is more than is due. `runs_on` tells whether the
    /// processes do after the dump.
    pub(crate) fn for_bytes(bytes: u64, runs_on: bool) -> Option<Self> {
        if bytes > LARGEST_OF_ENDED && !runs_on {
            return None;
        }
        let length = (bytes + bytes / 8 + (128 << 10)).next_multiple_of(HUGE);
        if length > available() / PART {
            return None;
        }
        let length = length as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever the kernel likes.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: the mapping was just made. Without these calls its pages would be made inside the freeze.
        unsafe {
            libc::madvise(start, length, libc::MADV_HUGEPAGE);
            // Shared with a child, each page would be copied when it is written (`guardian`).
            libc::madvise(start, length, libc::MADV_DONTFORK);
        }
        let mut stage = Stage { start: start.cast(), length, used: 0 };
        stage.populate();
        Some(stage)
    }

    /// Makes all of it present. Without that its pages would be made inside the freeze.
    fn populate(&mut self) {
        let pieces: Vec<&[u8]> = self.bytes().chunks(PIECE).collect();
        workers::each(&pieces, |piece| {
            // SAFETY: the piece lies in the mapping, which nobody uses yet. Where the call fails, pages are made as
            // they are written.
            unsafe { libc::madvise(piece.as_ptr().cast_mut().cast(), piece.len(), MADV_POPULATE_WRITE) }
        });
    }

    /// Takes `length` bytes; `None` when they are not there. Gives where they begin.
    pub(crate) fn take(&mut self, length: u64) -> Option<usize> {
        let at = self.used;
        let end = at.checked_add(usize::try_from(length).ok()?)?;
        (end <= self.length).then(|| {
            self.used = end;
            at
        })
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped and present for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }

    /// All bytes, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has access.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    /// Forgets what was taken.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: mapped by `for_bytes`.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// Memory the kernel could give without swapping (/proc/meminfo), within the limits of our control groups.
pub(crate) fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let free =
        line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024;
    free.min(torpor_kernel::cgroup::memory_left().unwrap_or(u64::MAX))
}
