//! Interfaces of the kernel that libc has no function for, as the bounds and the picture of their costs need them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;

/// linux/userfaultfd.h
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
const UFFD_API: u64 = 0xaa;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
/// linux/fs.h
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;

/// What a userfaultfd is for (`UFFDIO_REGISTER_MODE_*`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    Missing = 1,
    WriteProtect = 2,
}

/// A userfaultfd(2) over one range.
#[derive(Debug)]
pub(crate) struct Watch(OwnedFd);

fn ioctl<T>(fd: &OwnedFd, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: each request is given the structure that belongs to it.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got) }
}

fn fd(got: libc::c_long) -> io::Result<OwnedFd> {
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made and that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
}

impl Watch {
    pub(crate) fn over(start: usize, length: usize, mode: Mode) -> anyhow::Result<Self> {
        // SAFETY: takes a number.
        let uffd =
            fd(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) }).context("userfaultfd")?;
        let features = if matches!(mode, Mode::WriteProtect) { WP_UNPOPULATED | WP_ASYNC } else { 0 };
        ioctl(&uffd, UFFDIO_API, &mut [UFFD_API, features, 0]).context("UFFDIO_API")?;
        ioctl(&uffd, UFFDIO_REGISTER, &mut [start as u64, length as u64, mode as u64, 0])
            .context("UFFDIO_REGISTER")?;
        Ok(Self(uffd))
    }

    /// Makes pages at `to` with what is at `from`.
    pub(crate) fn copy(&self, to: usize, from: *const u8, length: usize) -> anyhow::Result<()> {
        let mut copy = [to as u64, from as u64, length as u64, 0, 0];
        ioctl(&self.0, UFFDIO_COPY, &mut copy).context("UFFDIO_COPY")?;
        Ok(())
    }

    pub(crate) fn protect(&self, start: usize, length: usize) -> anyhow::Result<()> {
        ioctl(&self.0, UFFDIO_WRITEPROTECT, &mut [start as u64, length as u64, 1])
            .context("UFFDIO_WRITEPROTECT")?;
        Ok(())
    }
}

/// Counts the ranges of a process that were written to, and protects them again.
pub(crate) fn written(pagemap: &OwnedFd, start: usize, length: usize) -> anyhow::Result<usize> {
    let mut regions = vec![[0u64; 3]; 1 << 16];
    let (mut at, end, mut ranges) = (start as u64, (start + length) as u64, 0);
    while at < end {
        let mut scan = [
            96,
            WP_MATCHING | CHECK_WPASYNC,
            at,
            end,
            0,
            regions.as_mut_ptr() as u64,
            regions.len() as u64,
            0,
            0,
            PAGE_IS_WRITTEN,
            0,
            PAGE_IS_WRITTEN,
        ];
        ranges += ioctl(pagemap, PAGEMAP_SCAN, &mut scan).context("PAGEMAP_SCAN")? as usize;
        at = scan[4];
    }
    Ok(ranges)
}

/// A tmpfs of huge pages that is mounted nowhere.
pub(crate) fn huge_tmpfs() -> anyhow::Result<OwnedFd> {
    // SAFETY: strings that end with zeros, and numbers.
    unsafe {
        let context = fd(libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1)).context("fsopen")?;
        let set = |command: i32, key: *const libc::c_char, value: *const libc::c_char| {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0)
        };
        // FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE
        set(1, c"huge".as_ptr(), c"always".as_ptr());
        anyhow::ensure!(
            set(6, std::ptr::null(), std::ptr::null()) == 0,
            "fsconfig: {}",
            io::Error::last_os_error()
        );
        fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0)).context("fsmount")
    }
}

/// A file without a name in a directory.
pub(crate) fn unnamed(directory: &OwnedFd) -> anyhow::Result<OwnedFd> {
    // SAFETY: a string that ends with a zero, and numbers.
    let got = unsafe {
        libc::openat(
            directory.as_raw_fd(),
            c".".as_ptr(),
            libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC,
            0o600,
        )
    };
    fd(libc::c_long::from(got)).context("O_TMPFILE")
}

/// Takes a descriptor of another process.
pub(crate) fn take(pidfd: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers.
    fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Holds a process.
pub(crate) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers.
    fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// process_vm_readv(2) of one piece: how many bytes, or what is less than that.
pub(crate) fn read_memory(pid: i32, from: usize, into: &mut [u8]) -> isize {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(from), iov_len: into.len() };
    // SAFETY: one is exclusively borrowed; the other is checked by the kernel.
    unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) }
}
