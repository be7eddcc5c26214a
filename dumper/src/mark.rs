//! The mark of `SO_PEEK_OFF`, set for a while and put back whatever happens.
//!
//! It belongs to the socket, which the program shares with us. A process of our own waits at the end of a pipe
//! and puts the mark back should we be killed: at most a moment after the program runs on.

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;

/// A mark that is set. Dropped, it is what it was before.
pub(crate) struct Mark<'f> {
    fd: &'f OwnedFd,
    before: i32,
    guard: Option<(i32, OwnedFd)>,
}

impl<'f> Mark<'f> {
    /// Sets the mark to the begin of the queue.
    pub(crate) fn set(fd: &'f OwnedFd) -> Result<Self, Errno> {
        let before = crate::socket::int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
        let mark = Mark { fd, before, guard: Some(guard(fd, before)?) };
        set(fd.as_raw_fd(), 0)?;
        Ok(mark)
    }
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        let _was_settable_before = set(self.fd.as_raw_fd(), self.before);
        if let Some((pid, end)) = self.guard.take() {
            drop(end);
            // SAFETY: no status is asked for; the pid is a child of ours that nobody else waits for.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        }
    }
}

fn set(fd: i32, value: i32) -> Result<(), Errno> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: SO_PEEK_OFF reads an int.
    let set =
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const value).cast(), len) };
    Errno::result(set).map(drop)
}

/// A process that sets the mark to `before` when the other end of its pipe is closed, by us or by our end.
fn guard(fd: &OwnedFd, before: i32) -> Result<(i32, OwnedFd), Errno> {
    let (read, write) =
        std::io::pipe().map_err(|e: Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EMFILE)))?;
    let (read, write, socket) = (read.into_raw_fd(), write.into_raw_fd(), fd.as_raw_fd());
    // SAFETY: the child makes async-signal-safe calls only and never returns.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            // Signals to our group are not for it.
            libc::setsid();
            libc::close(write);
            let mut byte = 0u8;
            while libc::read(read, (&raw mut byte).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR
            {
            }
            let _nobody_to_tell = set(socket, before);
            libc::_exit(0);
        }
        libc::close(read);
        let write = OwnedFd::from_raw_fd(write);
        Errno::result(pid).map(|pid| (pid, write))
    }
}
