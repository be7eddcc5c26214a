//! A child that makes a few system calls and is gone.
//!
//! Some state can only be set, or kept safe, by another process: the kernel notes the pid of who creates an IPC
//! object, and work that must be finished whatever happens to us belongs to somebody who is not hit by what hits us.
//! The child is made without an exit signal, so that the caller's SIGCHLD handling does not see it.

use nix::errno::Errno;

use crate::abi;
use crate::error::check;
use crate::shared::Shared;
use crate::{Error, Result};

/// Runs `act` in a child, in a session of its own and with all signals blocked, and gives what it returned. With
/// `pid` the child has that pid, which must be free (clone3(2), `set_tid`).
///
/// # Safety
/// The child is a copy of one thread of this process: `act` must restrict itself to what is async-signal-safe
/// (signal-safety(7)), and above all not allocate.
pub unsafe fn run(pid: Option<i32>, act: impl FnOnce() -> i64) -> Result<i64> {
    let mut answer = Shared::new(8)?;
    let wanted = [pid.unwrap_or(0)];
    let arguments = abi::clone_args {
        set_tid: if pid.is_some() { (&raw const wanted).expose_provenance() as u64 } else { 0 },
        set_tid_size: u64::from(pid.is_some()),
        ..abi::clone_args::default()
    };
    let all = u64::MAX;
    let mut before = 0u64;
    // SAFETY: rt_sigprocmask reads and fills masks of eight bytes. clone3 gets a `clone_args` without stack and
    // CLONE_VM, which makes it a fork. The child does what the caller vouches for, and ends.
    let child = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
        let got = libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<abi::clone_args>());
        if got == 0 {
            libc::setsid();
            let result = act();
            answer.bytes_mut()[..8].copy_from_slice(&result.to_ne_bytes());
            libc::_exit(0);
        }
        let errno = Errno::last();
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
        errno.set();
        check(got, "clone3", pid.map_or("a child".to_owned(), |p| p.to_string()))?
    };
    let mut status = 0;
    loop {
        // SAFETY: `status` is ours; the child is, too, and nobody else waits for it.
        let got = unsafe { libc::waitpid(child as i32, &raw mut status, libc::__WALL) };
        match Errno::last() {
            _ if got >= 0 => break,
            Errno::EINTR => {}
            errno => return Err(Error::syscall("waitpid", child, errno)),
        }
    }
    if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
        return Err(Error::syscall("waitpid", child, Errno::ECHILD));
    }
    Ok(i64::from_ne_bytes(answer.bytes_mut()[..8].try_into().expect("eight bytes")))
}

/// The result of a libc call as a child returns it: a value, or the negative errno.
pub fn result(returned: impl Into<i64>) -> i64 {
    match returned.into() {
        -1 => -i64::from(Errno::last() as i32),
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_answers() {
        // SAFETY: nothing is allocated.
        let (pid, error) = unsafe {
            (run(None, || i64::from(libc::getpid())).unwrap(), run(None, || result(libc::close(-1))).unwrap())
        };
        assert_ne!(pid, i64::from(std::process::id()));
        assert_eq!(error, -i64::from(libc::EBADF));
    }

    #[test]
    fn a_child_has_the_pid_it_is_given() {
        // SAFETY: nothing is allocated.
        let free = unsafe { run(None, || i64::from(libc::getpid())).unwrap() } as i32;
        // SAFETY: as above.
        match unsafe { run(Some(free), || i64::from(libc::getpid())) } {
            Ok(pid) => assert_eq!(pid, i64::from(free)),
            Err(e) => eprintln!("skipped: {e}"),
        }
    }
}
