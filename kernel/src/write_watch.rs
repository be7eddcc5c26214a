//! Which pages of an address space are written: userfaultfd(2) in its asynchronous write-protection mode (since 6.7).
//!
//! A registered area's pages are write-protected by `PAGEMAP_SCAN` ([`crate::pagemap::PageScan::take_written`]); a write
//! takes the protection away in the kernel itself, so nobody waits for a handler, and the page shows as written from
//! then on (Documentation/admin-guide/mm/pagemap.rst). A userfaultfd is about the memory of the process that made it, whoever
//! holds it; with its last descriptor all areas are as they were before.
//!
//! An area can lose its watch and keep the protection of its pages. What mremap(2) moves is not watched any more; where it
//! comes to lie beside an area that it once was one with, both are made one, and the watch of that one is dropped as well,
//! but not the marks in its page table (mm/mremap.c, `mremap_userfaultfd_prep` of what `copy_vma` has merged; seen on 6.18).
//! Before 6.14 what is moved keeps them, too. A write to such a page makes it writable and leaves the mark. Were the area
//! then watched again, such a page would be written to without a fault and show as not written for ever. So a watch
//! begins by taking all marks away.
//!
//! Where a page table is missing, `PAGEMAP_SCAN` says *not written* on kernels before 6.18.40 or so (fs/proc/task_mmu.c,
//! `pagemap_scan_pte_hole`), though pages that were there may have been given up, table and all ([`holes_show`]).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use crate::pagemap::PageScan;
use crate::{Pid, Result, abi, error::check};

/// A userfaultfd by which writes are watched.
#[derive(Debug)]
pub struct WriteWatch(OwnedFd);

impl WriteWatch {
    /// Of a userfaultfd that was just made, by the process whose memory it is about.
    pub fn begin(fd: OwnedFd) -> Result<Self> {
        let mut api = abi::uffdio_api {
            api: abi::UFFD_API,
            features: abi::UFFD_FEATURE_WP_ASYNC | abi::UFFD_FEATURE_WP_UNPOPULATED,
            ioctls: 0,
        };
        // SAFETY: `api` is the structure of this ioctl.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_API as _, &raw mut api) };
        check(done.into(), "UFFDIO_API", "userfaultfd")?;
        Ok(WriteWatch(fd))
    }

    /// Over the memory of this process, of a userfaultfd of its own.
    pub fn of_this_process() -> Result<Self> {
        let flags = libc::O_CLOEXEC | abi::UFFD_USER_MODE_ONLY;
        // SAFETY: takes a number.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = check(fd, "userfaultfd", "")?;
        // SAFETY: just made, and nobody else's.
        Self::begin(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// One that was begun before.
    pub fn resumed(fd: OwnedFd) -> Self {
        WriteWatch(fd)
    }

    /// Watches an area that is not. Pages that are there count as written. `EBUSY`: another userfaultfd has it; `EINVAL`:
    /// memory of a kind that cannot be watched; `ESRCH`: the memory is gone; `ENOENT`: it is another area by now.
    ///
    /// After an error what is still watched of it ([`crate::pagemap::PageScan::is_watched`]) may have marks of before, so that
    /// nothing is to be trusted that the watch says of it.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        let len = end - start;
        let fd = self.0.as_raw_fd();
        let named =
            |done: libc::c_int, call| check(done.into(), call, format!("{start:x}-{end:x}")).map(drop);
        let mut area = abi::uffdio_register { start, len, mode: abi::UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: `area` is the structure of this ioctl.
        let done = unsafe { libc::ioctl(fd, abi::UFFDIO_REGISTER as _, &raw mut area) };
        named(done, "UFFDIO_REGISTER")?;
        let mut marks = abi::uffdio_writeprotect { start, len, mode: 0 };
        // SAFETY: `marks` is the structure of this ioctl.
        let done = unsafe { libc::ioctl(fd, abi::UFFDIO_WRITEPROTECT as _, &raw mut marks) };
        named(done, "UFFDIO_WRITEPROTECT").inspect_err(|_| {
            let mut range = abi::uffdio_range { start, len };
            // SAFETY: `range` is the structure of this ioctl.
            let _best_effort = unsafe { libc::ioctl(fd, abi::UFFDIO_UNREGISTER as _, &raw mut range) };
        })
    }
}

/// Whether memory without page tables shows as written in [`crate::pagemap::PageScan::written`], by doing, once. Where it does
/// not, that tells nothing of pages that are not there.
pub fn holes_show() -> bool {
    static SHOW: OnceLock<bool> = OnceLock::new();
    *SHOW.get_or_init(|| probe().unwrap_or(false))
}

fn probe() -> Option<bool> {
    const TABLE: u64 = 2 << 20;
    let watch = WriteWatch::of_this_process().ok()?;
    let scan = PageScan::open(Pid::this()).ok()?;
    // Nothing ever was in it, and one table at least is missing.
    let length = 2 * TABLE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which nobody uses.
    let at = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), length as usize, protection, flags, -1, 0)
    };
    if at == libc::MAP_FAILED {
        return None;
    }
    let start = at.expose_provenance() as u64;
    let written = watch.register(start, start + length).and_then(|()| scan.written(start, start + length));
    // SAFETY: made above.
    unsafe { libc::munmap(at, length as usize) };
    let written = written.ok()??;
    Some(written.iter().map(crate::pagemap::Range::len).sum::<u64>() == length)
}

impl From<WriteWatch> for OwnedFd {
    fn from(watch: WriteWatch) -> Self {
        watch.0
    }
}

impl AsFd for WriteWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagemap::page_size;

    /// A watch over this process.
    fn watch() -> Option<WriteWatch> {
        WriteWatch::of_this_process().inspect_err(|e| eprintln!("skipped: {e}")).ok()
    }

    /// A new mapping of so many pages.
    fn area(pages: u64) -> *mut u8 {
        let length = (pages * page_size()) as usize;
        // SAFETY: a new mapping.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            libc::madvise(at, length, libc::MADV_NOHUGEPAGE);
            at.cast()
        }
    }

    #[test]
    fn marks_of_before_are_not_believed() {
        const PAGES: u64 = 64;
        let Some(watch) = watch() else { return };
        let (page, scan) = (page_size(), PageScan::open(Pid::this()).unwrap());
        let (whole, elsewhere) = (area(2 * PAGES), area(PAGES).cast::<libc::c_void>());
        let size = PAGES * page;
        // SAFETY: inside the mapping.
        let write = |number: u64| unsafe { whole.byte_add((number * page) as usize).write_volatile(7) };
        let from = whole.expose_provenance() as u64;
        let taken = |start: u64, pages: u64| scan.take_written(start, start + pages * page).unwrap();
        (0..2 * PAGES).for_each(write);
        watch.register(from, from + 2 * size).unwrap();
        assert_eq!(taken(from, 2 * PAGES).unwrap().len(), 1);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // Half of it goes away, is watched there, and comes back to the other half. Its place is kept for it.
        let away = flags | libc::MREMAP_DONTUNMAP;
        // SAFETY: moves a mapping of ours to where another one is.
        let moved = unsafe {
            libc::mremap(whole.cast::<libc::c_void>(), size as usize, size as usize, away, elsewhere)
        };
        assert_ne!(moved, libc::MAP_FAILED);
        let there = elsewhere.expose_provenance() as u64;
        watch.register(there, there + size).unwrap();
        assert_eq!(taken(there, PAGES).unwrap().len(), 1);
        // SAFETY: as above.
        let moved = unsafe {
            libc::mremap(elsewhere, size as usize, size as usize, flags, whole.cast::<libc::c_void>())
        };
        assert_ne!(moved, libc::MAP_FAILED);
        (PAGES..2 * PAGES).for_each(write);
        if taken(from, 2 * PAGES).is_none() {
            watch.register(from, from + 2 * size).unwrap();
        }
        let all: u64 = taken(from, 2 * PAGES).unwrap().iter().map(|r| r.len()).sum();
        assert_eq!(all, 2 * size, "all was moved, or written");
        write(PAGES + 7);
        let seen = taken(from, 2 * PAGES).unwrap();
        assert_eq!(seen.iter().map(|r| (r.start - from) / page).collect::<Vec<_>>(), [PAGES + 7]);
        // SAFETY: our own mapping.
        unsafe { libc::munmap(whole.cast(), 2 * size as usize) };
    }

    #[test]
    fn what_is_written_shows_once() {
        let Some(watch) = watch() else { return };
        let page = page_size();
        let length = 1024 * page;
        let area = area(1024);
        let start = area.expose_provenance() as u64;
        // SAFETY: inside the mapping.
        let write = |number: u64| unsafe { area.byte_add((number * page) as usize).write_volatile(7) };
        let scan = PageScan::open(Pid::this()).unwrap();
        let taken = || {
            let all = scan.take_written(start, start + length).unwrap()?;
            Some(all.iter().map(|r| ((r.start - start) / page, (r.end - start) / page)).collect::<Vec<_>>())
        };
        write(3);
        assert_eq!(taken(), None);
        assert!(!scan.is_watched(start, start + length).unwrap());
        watch.register(start, start + page).unwrap();
        assert!(scan.is_watched(start, start + length).unwrap());
        assert_eq!(taken(), None);
        watch.register(start, start + length).unwrap();
        assert_eq!(taken().unwrap(), [(3, 4)]);
        assert_eq!(taken().unwrap(), []);
        write(3);
        write(900);
        let seen = scan.written(start, start + length).unwrap().unwrap();
        assert!([3, 900].iter().all(|n| seen.iter().any(|r| (r.start..r.end).contains(&(start + n * page)))));
        assert_eq!(taken().unwrap(), [(3, 4), (900, 901)]);
        // Nothing shows where nothing is.
        let there = scan.scan(start, start + length, crate::pagemap::Want::Anonymous).unwrap();
        assert_eq!(there.iter().map(|r| r.len() / page).sum::<u64>(), 2);
        assert_eq!(taken().unwrap(), []);
        drop(watch);
        assert_eq!(taken(), None);
        // SAFETY: our own mapping.
        unsafe { libc::munmap(area.cast(), length as usize) };
    }
}
