//! The descriptors of another process: list them, look at them, get hold of them.
//!
//! Two ways lead to a file that another process has open. /proc/PID/fd/N opens it *again*: a new open file description
//! with its own offset and flags (and not for sockets). pidfd_getfd(2) gives the same description, as if it had been
//! sent over a socket; it wants ptrace access, and what is done through it the other process sees.

use std::cmp::Ordering;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode};

use crate::error::check;
use crate::fdinfo::FdInfo;
use crate::text::{list_numbers, readlink as read_link, readlink_at};
use crate::{Error, Pid, Result};

/// A table of descriptors, as /proc shows it. Where there are many, its directories are held open: each way from the root
/// costs as much as the look itself.
#[derive(Debug)]
pub struct Shown {
    pid: Pid,
    /// Of links, and of what else is told.
    directories: Option<(OwnedFd, OwnedFd)>,
}

/// From how many descriptors on it is worth two of our own.
const MANY: usize = 32;

impl Shown {
    /// Of a process with `count` descriptors.
    pub fn of(pid: Pid, count: usize) -> Self {
        let directory = |name: &str| {
            let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            nix::fcntl::open(format!("/proc/{pid}/{name}").as_str(), flags, Mode::empty()).ok()
        };
        let directories = || Some((directory("fd")?, directory("fdinfo")?));
        Shown { pid, directories: if count >= MANY { directories() } else { None } }
    }

    /// See [`readlink`].
    pub fn readlink(&self, fd: i32) -> Result<Vec<u8>> {
        let Some((links, _)) = &self.directories else { return readlink(self.pid, fd) };
        readlink_at(links.as_fd(), &name(fd))
            .map_err(|error| Error::io("readlink", format!("/proc/{}/fd/{fd}", self.pid), &error))
    }

    /// See [`stat`].
    pub fn stat(&self, fd: i32) -> Result<FileStat> {
        let Some((links, _)) = &self.directories else { return stat(self.pid, fd) };
        nix::sys::stat::fstatat(links, name(fd).as_c_str(), AtFlags::empty())
            .map_err(|errno| Error::syscall("fstatat", format!("/proc/{}/fd/{fd}", self.pid), errno))
    }

    /// See [`crate::fdinfo::fdinfo`].
    pub fn fdinfo(&self, fd: i32) -> Result<FdInfo> {
        let Some((_, infos)) = &self.directories else { return crate::fdinfo::fdinfo(self.pid, fd) };
        let path = || format!("/proc/{}/fdinfo/{fd}", self.pid);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = nix::fcntl::openat(infos, name(fd).as_c_str(), flags, Mode::empty())
            .map_err(|errno| Error::syscall("open", path(), errno))?;
        crate::text::with_record(file.into(), &path(), crate::fdinfo::parse)?
    }
}

fn name(fd: i32) -> CString {
    CString::new(fd.to_string()).unwrap_or_default()
}

/// The open descriptors, in order.
pub fn list(pid: Pid) -> Result<Vec<i32>> {
    list_numbers(&format!("/proc/{pid}/fd"))
}

/// What the link says: a path, perhaps with " (deleted)", or `pipe:[12]`, `anon_inode:[eventfd]` and so on.
pub fn readlink(pid: Pid, fd: i32) -> Result<Vec<u8>> {
    read_link(&format!("/proc/{pid}/fd/{fd}"))
}

/// fstat(2) of the open file, sockets and deleted files included.
pub fn stat(pid: Pid, fd: i32) -> Result<FileStat> {
    let path = format!("/proc/{pid}/fd/{fd}");
    nix::sys::stat::fstatat(nix::fcntl::AT_FDCWD, path.as_str(), AtFlags::empty())
        .map_err(|errno| Error::syscall("fstatat", path, errno))
}

/// Opens the file again. `ENXIO` for a socket; a fifo or device may block without `O_NONBLOCK`.
pub fn open(pid: Pid, fd: i32, flags: OFlag) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/fd/{fd}");
    nix::fcntl::open(path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| Error::syscall("open", path, errno))
}

/// The very same open file description, close-on-exec in our process.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    // SAFETY: takes three numbers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(check(got, "pidfd_getfd", format!("fd {fd}"))?, "pidfd_getfd")
}

/// Sends SIGKILL to a process by its pidfd (pidfd_send_signal(2)); whether that was possible. Calls nothing but the kernel.
pub fn end(pidfd: BorrowedFd<'_>) -> bool {
    // SAFETY: takes numbers, and no siginfo.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) == 0 }
}

/// A descriptor for a process, also by the number of another thread than its first (since 6.9).
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: takes two numbers.
    let mut got = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    if got < 0 && matches!(Errno::last(), Errno::ENOENT | Errno::EINVAL) {
        // PIDFD_THREAD, which is O_EXCL (linux/pidfd.h).
        // SAFETY: as above.
        got = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, libc::O_EXCL) };
    }
    owned(check(got, "pidfd_open", pid)?, "pidfd_open")
}

fn owned(fd: libc::c_long, call: &'static str) -> Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| Error::syscall(call, fd, Errno::EBADF))?;
    // SAFETY: the call just returned this new descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What kcmp(2) compares. include/uapi/linux/kcmp.h
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[repr(i32)]
pub enum KcmpType {
    /// The open file descriptions behind two descriptors.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Root, working directory and umask.
    Fs = 3,
    /// Signal actions.
    Sighand = 4,
    /// I/O contexts.
    Io = 5,
    /// System V semaphore undo lists.
    Sysvsem = 6,
}

/// Whether two tasks share an object; `Less` and `Greater` give an order that holds until the next boot, so that n objects
/// are sorted with n log n calls. `a` and `b` are descriptors for `File`, and 0 else.
pub fn kcmp(pid1: Pid, pid2: Pid, kind: KcmpType, a: u64, b: u64) -> Result<Ordering> {
    // SAFETY: takes numbers only, for all kinds above.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, pid1.0, pid2.0, kind as i32, a, b) };
    let object = || match kind {
        KcmpType::File => format!("{pid1} fd {a}, {pid2} fd {b}"),
        _ => format!("{pid1}, {pid2}, {kind:?}"),
    };
    if got == -1 {
        return Err(Error::last("kcmp", object()));
    }
    match got {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: not equal, but the kernel will not say in which order (kcmp(2)); no kernel does so today.
        other => Err(Error::Parse { file: format!("kcmp({})", object()), what: other.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn same_file_by_two_ways() {
        let path = std::env::temp_dir().join(format!("torpor-kernel-fds-{}", std::process::id()));
        let mut file = std::fs::File::create_new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (us, fd) = (Pid::this(), file.as_raw_fd());
        assert!(list(us).unwrap().contains(&fd));
        assert!(readlink(us, fd).unwrap().ends_with(b" (deleted)"));
        assert_eq!(stat(us, fd).unwrap().st_nlink, 0);
        file.write_all(b"hello").unwrap();

        let mut again = std::fs::File::from(open(us, fd, OFlag::O_RDONLY).unwrap());
        let mut text = String::new();
        again.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");

        let pidfd = pidfd_open(us).unwrap();
        let mut same = std::fs::File::from(getfd(pidfd.as_fd(), fd).unwrap());
        assert_eq!(same.stream_position().unwrap(), 5);
        let compare = |other: i32| kcmp(us, us, KcmpType::File, fd as u64, other as u64).unwrap();
        assert_eq!(compare(same.as_raw_fd()), Ordering::Equal);
        assert_ne!(compare(again.as_raw_fd()), Ordering::Equal);
        assert_eq!(kcmp(us, us, KcmpType::Vm, 0, 0).unwrap(), Ordering::Equal);
        assert_eq!(kcmp(us, us, KcmpType::File, 1 << 20, 0).unwrap_err().errno(), Some(Errno::EBADF));
        assert_eq!(readlink(us, 1 << 20).unwrap_err().errno(), Some(Errno::ENOENT));
    }
}
