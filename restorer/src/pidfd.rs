//! pidfd_open(2)
//!
//! One of a process of the image is opened when that is born ([`crate::late`]). One of a process
//! that has ended is as good as any other such: a child of ours that ends at once gives it.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use torpor_image::pidfd::PidFd;

use crate::description::owned;
use crate::error::{Error, Result};

/// A pidfd of a process that is there, or of one that has ended.
pub(crate) fn of(what: &str, pidfd: &PidFd, flags: u32) -> Result<OwnedFd> {
    let Some(pid) = pidfd.pid else { return of_nobody(what) };
    // PIDFD_NONBLOCK and PIDFD_THREAD are these (linux/pidfd.h).
    let flags = flags & (libc::O_NONBLOCK | libc::O_EXCL) as u32;
    // SAFETY: pidfd_open takes numbers only.
    owned(what, "pidfd_open", unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, flags) } as i32)
}

/// A pidfd of a process that has ended.
pub(crate) fn of_nobody(what: &str) -> Result<OwnedFd> {
    // SAFETY: the child does nothing but end; the pid is a child of ours that nobody else waits for.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(0);
        }
        if pid < 0 {
            return Err(Error::last(what, "fork"));
        }
        let fd = owned(what, "pidfd_open", libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32);
        while libc::waitpid(pid, std::ptr::null_mut(), 0) < 0 && Errno::last() == Errno::EINTR {}
        fd
    }
}
