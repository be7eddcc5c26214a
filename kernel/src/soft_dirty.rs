//! Soft-dirty bits: which pages of an address space were written since somebody has cleared the bits.
//!
//! `4` written to /proc/PID/clear_refs clears the bit of every page of the address space, and takes away write access, so
//! that the next write faults and sets it again; bit 55 of a pagemap entry shows it
//! (Documentation/admin-guide/mm/soft-dirty.rst). What the kernel does besides, by fs/proc/task_mmu.c and mm/mremap.c, and
//! seen on 6.1:
//! - Processors forget their old translations at the end of that walk only (`clear_refs_write`). So what is written while it
//!   lasts may not show, and what was written between reading the bits and clearing them does not: both are done while
//!   the process stands.
//! - An area that is new or has grown counts as written as a whole (`VM_SOFTDIRTY`, `sd` in smaps), and pagemap shows that
//!   in the bit of each of its pages, present or not. So does all that execve(2) has made.
//! - Where memory was given back (`MADV_DONTNEED`) a read maps the page of zeros, *not* soft-dirty.
//! - mremap(2) marks the pages that it moves one by one, but when it moves a page table as a whole (2 MiB, `move_normal_pmd`)
//!   it marks *nothing*: in the new place are other pages, with their bits clear, as if nothing had been written there.
//! - Pages that may be pinned for a device stay dirty (`pte_is_pinned`, since 5.11).
//!
//! Because of the third and fourth a clear bit alone proves nothing. With the page frame it does: the page at an address is what
//! it was when the bits were cleared if its bit is clear and it is in the same frame as then. Frames show with `CAP_SYS_ADMIN`
//! only; without it, and where a page was swapped or moved by the kernel meanwhile, a page counts as written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::pagemap::page_size;
use crate::{Error, Pid, Result};

/// Bytes of an entry of pagemap.
const ENTRY: u64 = 8;
/// Entries read at a time.
const ENTRIES: u64 = 16 * 1024;

/// An entry of pagemap (Documentation/admin-guide/mm/pagemap.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    fn bit(self, number: u32) -> bool {
        self.0 & (1 << number) != 0
    }

    /// Whether it was written since the bits were cleared, or its area is new.
    pub fn soft_dirty(self) -> bool {
        self.bit(55)
    }

    /// Whether it is in memory or swapped out, and not from a file.
    pub fn is_anonymous(self) -> bool {
        (self.bit(63) || self.bit(62)) && !self.bit(61)
    }

    /// The page frame of a page that is in memory; none if it is not, or without the privilege to see it.
    pub fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        (self.bit(63) && !self.bit(62) && frame != 0).then_some(frame)
    }
}

/// Pages side by side, in frames side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The frame of the first page.
    pub first: u64,
}

/// Adds a page to a list in order of addresses.
fn push(all: &mut Vec<Frames>, at: u64, page: u64, frame: u64) {
    match all.last_mut() {
        Some(last) if last.end == at && last.first + (at - last.start) / page == frame => last.end += page,
        _ => all.push(Frames { start: at, end: at + page, first: frame }),
    }
}

/// What pagemap tells of anonymous pages.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Bytes of all, in memory or swapped out.
    pub pages: u64,
    /// The frames of those in memory.
    pub frames: Vec<Frames>,
    /// The same of those with a clear bit, but for the page of zeros, which is in many places.
    pub clean: Vec<Frames>,
}

impl Look {
    /// Adds what was seen at higher addresses.
    pub fn append(&mut self, mut other: Look) {
        self.pages += other.pages;
        self.frames.append(&mut other.frames);
        self.clean.append(&mut other.clean);
    }
}

/// The bits of an address space.
#[derive(Debug)]
pub struct SoftDirty {
    pid: Pid,
    pagemap: File,
    zeros: Option<u64>,
}

impl SoftDirty {
    /// Access as for attaching with ptrace.
    pub fn open(pid: Pid) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).map_err(|e| Error::io("open", &path, &e))?;
        Ok(SoftDirty { pid, pagemap, zeros: *ZEROS.get_or_init(zeros) })
    }

    /// One entry.
    pub fn entry(&self, address: u64) -> Result<Entry> {
        let mut entry = [0; ENTRY as usize];
        let at = address / page_size() * ENTRY;
        let read = self.pagemap.read_exact_at(&mut entry, at);
        read.map_err(|e| Error::io("pread", format!("/proc/{}/pagemap", self.pid), &e))?;
        Ok(Entry(u64::from_ne_bytes(entry)))
    }

    /// All anonymous pages between two addresses, multiples of the page size.
    pub fn look(&self, start: u64, end: u64) -> Result<Look> {
        let page = page_size();
        let mut buffer = vec![0u8; (ENTRIES.min((end - start) / page) * ENTRY) as usize];
        let mut found = Look::default();
        let mut at = start;
        while at < end {
            let part = &mut buffer[..(((end - at) / page).min(ENTRIES) * ENTRY) as usize];
            let read = self.pagemap.read_exact_at(part, at / page * ENTRY);
            read.map_err(|e| Error::io("pread", format!("/proc/{}/pagemap", self.pid), &e))?;
            for entry in part.as_chunks::<8>().0 {
                let entry = Entry(u64::from_ne_bytes(*entry));
                if entry.is_anonymous() {
                    found.pages += page;
                    if let Some(frame) = entry.frame() {
                        push(&mut found.frames, at, page, frame);
                        if !entry.soft_dirty() && self.zeros != Some(frame) {
                            push(&mut found.clean, at, page, frame);
                        }
                    }
                }
                at += page;
            }
        }
        Ok(found)
    }

    /// Clears all bits of the address space.
    pub fn clear(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.pid);
        std::fs::write(&path, "4").map_err(|e| Error::io("write", &path, &e))
    }
}

/// The frame of the page of zeros.
static ZEROS: OnceLock<Option<u64>> = OnceLock::new();

fn zeros() -> Option<u64> {
    let length = page_size() as usize;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping where nothing is, read once.
    let at = unsafe {
        let at = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, kind, -1, 0);
        if at == libc::MAP_FAILED {
            return None;
        }
        at.cast::<u8>().read_volatile();
        at
    };
    let pagemap = File::open("/proc/self/pagemap").ok();
    let bits = pagemap.map(|pagemap| SoftDirty { pid: Pid::this(), pagemap, zeros: None });
    let frame = bits.and_then(|bits| bits.entry(at.expose_provenance() as u64).ok()?.frame());
    // SAFETY: our own mapping.
    unsafe { libc::munmap(at, length) };
    frame
}

/// Where pages are in the same frames in both.
pub fn same(a: &[Frames], b: &[Frames]) -> Vec<(u64, u64)> {
    let page = page_size();
    let mut all: Vec<(u64, u64)> = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (start, end) = (x.start.max(y.start), x.end.min(y.end));
        if start < end && x.first + (start - x.start) / page == y.first + (start - y.start) / page {
            match all.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => all.push((start, end)),
            }
        }
        if x.end < y.end { i += 1 } else { j += 1 }
    }
    all
}

/// Whether there are such bits and frames to be seen, by doing: on a page of our own, at the price of our own bits.
/// `EOPNOTSUPP`: no such bits; `EPERM`: no frames.
pub fn available() -> Result<()> {
    let length = page_size() as usize;
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where nothing is.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(Error::last("mmap", "a page to try soft-dirty bits"));
    }
    let looks = || {
        let bits = SoftDirty::open(Pid::this())?;
        let address = at.expose_provenance() as u64;
        // SAFETY: inside the mapping, into which there are no references.
        let write = || unsafe { at.cast::<u8>().write_volatile(1) };
        write();
        bits.clear()?;
        let cleared = bits.entry(address)?;
        write();
        let written = bits.entry(address)?;
        Ok::<_, Error>((cleared, written))
    };
    let found = looks();
    // SAFETY: our own mapping.
    unsafe { libc::munmap(at, length) };
    let (cleared, written) = found?;
    let missing = |errno| Err(Error::syscall("pread", "bit 55 of /proc/self/pagemap", errno));
    match (cleared.soft_dirty(), written.soft_dirty(), written.frame()) {
        (false, true, Some(_)) => Ok(()),
        (false, true, None) => missing(Errno::EPERM),
        _ => missing(Errno::EOPNOTSUPP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_compared_page_by_page() {
        let page = page_size();
        let run = |from: u64, to: u64, first| Frames { start: from * page, end: to * page, first };
        let a = [run(0, 4, 10), run(8, 10, 30)];
        let b = [run(1, 3, 11), run(3, 4, 99), run(8, 9, 30), run(9, 10, 40)];
        assert_eq!(same(&a, &b), [(page, 3 * page), (8 * page, 9 * page)]);
        assert_eq!(same(&a, &[]), []);
        let mut all = Vec::new();
        for (at, frame) in [(0, 5), (1, 6), (2, 8), (4, 9)] {
            push(&mut all, at * page, page, frame);
        }
        assert_eq!(all, [run(0, 2, 5), run(2, 3, 8), run(4, 5, 9)]);
    }

    #[test]
    fn it_is_there_or_says_why_not() {
        match available() {
            Ok(()) => {}
            Err(e) => eprintln!("skipped: {e}"),
        }
    }
}
