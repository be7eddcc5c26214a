//! The error of this crate: which call on which object failed with which errno, or which file was not as expected.
//!
//! One enum for the whole crate: every wrapper here is one system call or one file, so there is nothing a
//! caller could tell apart by a finer type that `call`, `object` and `errno` do not say.

use nix::errno::Errno;

/// What a kernel interface answered instead of a result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call, or a file operation, failed.
    #[error("{call}({object}): {errno}")]
    Syscall {
        /// Name of the call (for ptrace, of the request).
        call: &'static str,
        /// What it was applied to: a path, a tid, a descriptor.
        object: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A kernel text or message does not look as it should.
    #[error("cannot parse {file}: {what}")]
    Parse {
        /// The file, or the kind of message.
        file: String,
        /// The part that was not understood.
        what: String,
    },
}

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The errno, when the kernel refused (and `None` when a text was not understood).
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Syscall { errno, .. } => Some(*errno),
            Error::Parse { .. } => None,
        }
    }

    /// True when the task or object has ceased to exist (`ESRCH` from calls, `ENOENT` from paths below /proc).
    pub fn is_gone(&self) -> bool {
        matches!(self.errno(), Some(Errno::ESRCH | Errno::ENOENT))
    }

    /// A failed call with a known errno.
    pub fn syscall(call: &'static str, object: impl ToString, errno: Errno) -> Error {
        Error::Syscall { call, object: object.to_string(), errno }
    }

    /// The call that just failed in this thread: takes the errno from `Errno::last()`.
    pub fn last(call: &'static str, object: impl ToString) -> Error {
        let errno = Errno::last();
        Error::Syscall { call, object: object.to_string(), errno }
    }

    /// A failed file operation of the standard library.
    pub fn io(call: &'static str, object: impl ToString, error: &std::io::Error) -> Error {
        // An error without errno comes only from std itself: a NUL in a path, a short read_exact.
        let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
        Error::Syscall { call, object: object.to_string(), errno }
    }

    /// A text that was not understood; `what` is the offending part, shown lossily and cut to a bearable length.
    pub fn parse(file: impl ToString, what: &[u8]) -> Error {
        const SHOWN: usize = 160;
        let cut = &what[..what.len().min(SHOWN)];
        Error::Parse { file: file.to_string(), what: format!("`{}`", cut.escape_ascii()) }
    }
}

/// What can be done about an errno that tells its cause by itself, whatever the call: to follow a message, or nothing.
pub fn advice(errno: Option<Errno>) -> &'static str {
    match errno {
        Some(Errno::EMFILE) => "; raise torpor's limit of open files (`ulimit -n`)",
        Some(Errno::ENFILE) => "; raise the machine's limit of open files (/proc/sys/fs/file-max)",
        Some(Errno::ENOMEM) => {
            "; free memory, or raise the limits on it (`ulimit -v`, memory.max of the cgroup)"
        }
        Some(Errno::ENOSPC | Errno::EDQUOT) => "; make room there",
        Some(Errno::EFBIG) => "; raise torpor's limit of file sizes (`ulimit -f`)",
        Some(Errno::EROFS) => "; mount that file system for writing",
        Some(Errno::EPERM | Errno::EACCES) => {
            "; run torpor as root, or with the privileges that `torpor check` names"
        }
        Some(Errno::ENOSYS) => {
            "; this kernel has no such call, or a seccomp filter around torpor forbids it: see `torpor check`"
        }
        _ => "",
    }
}

/// Turns the -1 of a raw system call into an error.
pub(crate) fn check(
    returned: libc::c_long,
    call: &'static str,
    object: impl ToString,
) -> Result<libc::c_long> {
    if returned == -1 { Err(Error::last(call, object)) } else { Ok(returned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_follows_a_message() {
        for errno in [Errno::EMFILE, Errno::EPERM, Errno::ENOSYS, Errno::ENOSPC] {
            assert!(advice(Some(errno)).starts_with("; "), "{errno}");
        }
        assert_eq!(advice(Some(Errno::EIO)), "");
        assert_eq!(advice(None), "");
    }

    #[test]
    fn says_call_object_and_errno() {
        let error = Error::syscall("pidfd_open", 42, Errno::ESRCH);
        assert!(error.to_string().starts_with("pidfd_open(42): ESRCH"));
        assert!(error.is_gone());
        assert_eq!(error.errno(), Some(Errno::ESRCH));
        let error = Error::parse("/proc/1/stat", b"x\xff\n");
        assert_eq!(error.to_string(), r"cannot parse /proc/1/stat: `x\xff\n`");
        assert!(!error.is_gone());
    }
}
