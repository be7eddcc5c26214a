//! Which pages of an address space are written: userfaultfd(2) in its asynchronous write-protection mode (since 6.7).
//!
//! A registered area's pages are write-protected by `PAGEMAP_SCAN` ([`crate::pagemap::PageScan::take_written`]); a write
//! takes the protection away in the kernel itself, so nobody waits for a handler, and the page shows as written from
//! then on (Documentation/admin-guide/mm/pagemap.rst). A userfaultfd is about the memory of the process that made it, whoever
//! holds it; with its last descriptor all areas are as they were before.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::{Result, abi, error::check};

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

    /// One that was begun before.
    pub fn resumed(fd: OwnedFd) -> Self {
        WriteWatch(fd)
    }

    /// Watches an area. Pages that are there count as written. `EBUSY`: another userfaultfd has it; `EINVAL`: memory of a
    /// kind that cannot be watched; `ESRCH`: the memory is gone.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        let mut area =
            abi::uffdio_register { start, len: end - start, mode: abi::UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: `area` is the structure of this ioctl.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_REGISTER as _, &raw mut area) };
        check(done.into(), "UFFDIO_REGISTER", format!("{start:x}-{end:x}"))?;
        Ok(())
    }
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
    use std::os::fd::FromRawFd;

    use super::*;
    use crate::Pid;
    use crate::pagemap::{PageScan, page_size};

    #[test]
    fn what_is_written_shows_once() {
        // SAFETY: takes a number, gives a descriptor of ours.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | abi::UFFD_USER_MODE_ONLY);
            if fd < 0 {
                eprintln!("skipped: no userfaultfd");
                return;
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        let Ok(watch) = WriteWatch::begin(fd) else {
            eprintln!("skipped: no asynchronous write protection");
            return;
        };
        let page = page_size();
        let length = 1024 * page;
        // SAFETY: a new mapping.
        let area = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), length as usize, protection, flags, -1, 0).cast::<u8>()
        };
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
