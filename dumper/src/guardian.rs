//! A child that puts sockets back should we be killed.
//!
//! A descriptor from pidfd_getfd(2) is the target's own socket: what is changed there for a look (repair mode, a
//! filter, the peek offset) stays changed when we are killed in the middle. So before anything is changed a child is
//! made that holds the sockets too, knows what to set to what, and waits on a pipe: at its end it sets everything and
//! exits. That is also how we ask it to, so the way taken after our death is the one taken every time.
//!
//! The child is a copy of us (no shared memory that could be freed under it) that makes system calls only. It is in
//! a session of its own with all signals blocked and under another name, so that what is aimed at us misses it, and
//! ends without SIGCHLD (clone(2), exit signal 0). The kernel closes our descriptors before it lets go of what we
//! trace (kernel/exit.c, `do_exit`), so the child is awake before the target is; what it has to undo is kept short.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;

/// How long sockets are kept for: about as long as a peer goes on asking (tcp(7), `tcp_retries2`).
const PATIENCE: libc::timespec = libc::timespec { tv_sec: 15 * 60, tv_nsec: 0 };

/// One option to be put back.
#[derive(Debug)]
pub(crate) struct Undo {
    fd: i32,
    level: i32,
    name: i32,
    value: Vec<u8>,
}

impl Undo {
    /// setsockopt(2) with a number.
    pub(crate) fn number(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Self {
        Undo { fd: fd.as_raw_fd(), level, name, value: value.to_ne_bytes().into() }
    }

    /// The filter program as it was; none if it is empty.
    pub(crate) fn filter(fd: BorrowedFd<'_>, program: &[u8]) -> Self {
        let name = if program.is_empty() { libc::SO_DETACH_FILTER } else { libc::SO_ATTACH_FILTER };
        let value = if program.is_empty() { vec![0; 4] } else { program.to_vec() };
        Undo { fd: fd.as_raw_fd(), level: libc::SOL_SOCKET, name, value }
    }
}

/// The child. Dropped, it has put everything back.
#[derive(Debug)]
pub(crate) struct Guardian {
    pid: i32,
    pipe: Option<OwnedFd>,
}

impl Guardian {
    /// Starts it; from now on everything of `undo` happens when we end.
    pub(crate) fn start(undo: &[Undo]) -> Result<Self, Errno> {
        let programs: Vec<libc::sock_fprog> = undo
            .iter()
            .map(|u| libc::sock_fprog {
                len: (u.value.len() / 8) as u16,
                filter: u.value.as_ptr().cast_mut().cast(),
            })
            .collect();
        let calls: Vec<Call> = undo
            .iter()
            .zip(&programs)
            .map(|(u, program)| {
                let attach = u.level == libc::SOL_SOCKET && u.name == libc::SO_ATTACH_FILTER;
                let (value, length) = if attach {
                    (std::ptr::from_ref(program).cast(), size_of::<libc::sock_fprog>())
                } else {
                    (u.value.as_ptr().cast::<libc::c_void>(), u.value.len())
                };
                Call { fd: u.fd, level: u.level, name: u.name, value, length }
            })
            .collect();
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let mut keep: Vec<i32> = undo.iter().map(|u| u.fd).chain([read.as_raw_fd()]).collect();
        keep.sort_unstable();
        keep.dedup();
        // SAFETY: an all-zero sigset_t is a valid one.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: two sets of ours.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        }
        // SAFETY: without flags a fork(2) that tells nobody when the child ends. The child makes system calls on
        // memory that was made ready, and exits.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: this is the child.
            unsafe { wait_and_undo(read.as_raw_fd(), &keep, &calls) }
        }
        let errno = Errno::last();
        // SAFETY: the set that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
        if pid < 0 { Err(errno) } else { Ok(Guardian { pid: pid as i32, pipe: Some(write) }) }
    }

    /// Nothing is to be put back any more: whoever had the sockets is gone. The child keeps them, as they are, until
    /// somebody takes over their addresses or [`PATIENCE`] is over.
    pub(crate) fn stay(mut self) {
        if let Some(pipe) = self.pipe.take() {
            // If it is gone already there is nobody left to tell.
            let _gone = nix::unistd::write(&pipe, &[1]);
        }
        std::mem::forget(self);
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.pipe = None;
        loop {
            // SAFETY: waitpid takes numbers and no place for a status; the child is ours and not reaped.
            let got = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) };
            if got >= 0 || Errno::last() != Errno::EINTR {
                return;
            }
        }
    }
}

struct Call {
    fd: i32,
    level: i32,
    name: i32,
    value: *const libc::c_void,
    length: usize,
}

/// # Safety
/// Must be called in a child made for it, whose descriptors nobody else uses.
unsafe fn wait_and_undo(pipe: i32, keep: &[i32], calls: &[Call]) -> ! {
    // SAFETY: system calls on numbers, and on memory that this process has to itself.
    unsafe {
        libc::syscall(libc::SYS_setsid);
        libc::syscall(libc::SYS_chdir, c"/".as_ptr());
        libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, c"tcp-guardian".as_ptr(), 0, 0, 0);
        let mut from = 0u32;
        for fd in keep {
            let fd = fd.cast_unsigned();
            if fd > from {
                libc::syscall(libc::SYS_close_range, from, fd - 1, 0);
            }
            from = fd + 1;
        }
        libc::syscall(libc::SYS_close_range, from, u32::MAX, 0);
        let mut word = 0u8;
        let done = loop {
            let got = libc::syscall(libc::SYS_read, pipe, &raw mut word, 1);
            if got >= 0 || *libc::__errno_location() != libc::EINTR {
                break got == 1;
            }
        };
        if done {
            let patience = PATIENCE;
            libc::syscall(libc::SYS_ppoll, 0, 0, &raw const patience, 0, 0);
        } else {
            for call in calls {
                libc::syscall(libc::SYS_setsockopt, call.fd, call.level, call.name, call.value, call.length);
            }
        }
        loop {
            libc::syscall(libc::SYS_exit_group, 0);
        }
    }
}
