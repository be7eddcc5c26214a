//! Why a dump did not happen.

use std::fmt;

use nix::errno::Errno;
use torpor_image as image;
use torpor_image::manifest::Freeze;
use torpor_kernel as kernel;
use torpor_kernel::ids::{Pid, Tid};

/// Something a dump would lose, or that stands in its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The object, as its user knows it: "fd 7 (anon_inode:[io_uring])".
    pub object: String,
    /// Why it cannot be dumped.
    pub why: String,
    /// What its user can do.
    pub remedy: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.object, self.why, self.remedy)
    }
}

/// A dump failed. Unless it says otherwise the process goes on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such process.
    #[error("there is no process {0}; `ps -e` lists those there are")]
    NoProcess(Pid),
    /// The process is of a kind that cannot be dumped at all.
    #[error("cannot dump {}: {why}", whom(*pid))]
    NotDumpable {
        /// The process.
        pid: Pid,
        /// What it is.
        why: String,
    },
    /// Somebody else traces the process.
    #[error("cannot dump {}: it is traced by pid {tracer} ({name}); stop that debugger first", whom(*pid))]
    Traced {
        /// The process.
        pid: Pid,
        /// Who traces it.
        tracer: i32,
        /// The tracer's name.
        name: String,
    },
    /// The kernel does not let us.
    #[error("cannot look into {}: {source}; {}", whom(*pid), allowed(*pid))]
    Permission {
        /// The process.
        pid: Pid,
        /// What the kernel said.
        source: kernel::Error,
    },
    /// The process has something a dump would lose.
    #[error("cannot dump {}, which goes on as before:{}", whom(*pid), list(refusals))]
    Refused {
        /// The process.
        pid: Pid,
        /// What it is.
        refusals: Vec<Refusal>,
    },
    /// The process ended while it was being dumped.
    #[error("pid {pid} ended while it was being dumped ({how}); nothing was written")]
    Died {
        /// The process.
        pid: Pid,
        /// How it ended.
        how: String,
    },
    /// A thread did not stop.
    #[error(
        "cannot dump {}: thread {tid} did not stop within {seconds} s (state {state}): it is inside the kernel and \
         cannot be interrupted, as on a hanging file system; the process goes on as before; try again when that \
         call has returned",
        whom(*pid)
    )]
    Timeout {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// How long we waited.
        seconds: u64,
        /// The thread's state in /proc.
        state: char,
    },
    /// The process could not be made to run the executor.
    #[error("cannot enter {}: {what}; the process goes on as before", whom(*pid))]
    Injection {
        /// The process.
        pid: Pid,
        /// What is missing.
        what: String,
    },
    /// A call made inside the process failed.
    #[error(
        "cannot read {purpose} of thread {tid} of {}: {errno}{}; the process goes on as before",
        whom(*pid),
        kernel::advice(Some(*errno))
    )]
    Script {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// What the call was for.
        purpose: String,
        /// Its error.
        errno: Errno,
    },
    /// The process changed under our hands in a way that should not be possible.
    #[error("cannot dump {}: {what}; the process goes on as before", whom(*pid))]
    Inconsistent {
        /// The process.
        pid: Pid,
        /// What does not fit.
        what: String,
    },
    /// The caller no longer wants it.
    #[error("the dump of {} was called off; the process goes on as before", whom(*pid))]
    Cancelled {
        /// The process.
        pid: Pid,
    },
    /// The memory cannot be taken in the way that was asked for or chosen; by copying it can.
    #[error("cannot dump {} by `--freeze {freeze}`: {why}; the process goes on as before", whom(*pid))]
    Declined {
        /// The process.
        pid: Pid,
        /// The way.
        freeze: Freeze,
        /// What stands in the way.
        why: String,
    },
    /// A kernel call failed.
    #[error(
        "cannot dump {}: {doing}: {source}{}; the process goes on as before",
        whom(*pid),
        kernel::advice(source.errno())
    )]
    Kernel {
        /// The process.
        pid: Pid,
        /// What was being done.
        doing: String,
        /// The call and its error.
        source: kernel::Error,
    },
    /// The image could not be written.
    #[error("{0}; the process goes on as before")]
    Image(#[from] image::Error),
}

/// "pid 42 (nginx)"; without the name when the process is gone.
fn whom(pid: Pid) -> String {
    match kernel::process::who_holds(pid.0) {
        Some(name) => format!("pid {pid} ({name})"),
        None => format!("pid {pid}"),
    }
}

/// Who may look into a process (ptrace(2), "Ptrace access mode checking").
fn allowed(pid: Pid) -> &'static str {
    // SAFETY: geteuid cannot fail.
    let own = unsafe { libc::geteuid() };
    match kernel::status::of_process(pid) {
        Ok(status) if status.uids[..3] == [own; 3] => {
            "it is this user's, but has made itself unreadable (PR_SET_DUMPABLE), has more privileges, or Yama or another \
             security module forbids it (/proc/sys/kernel/yama/ptrace_scope); run torpor as root, or with CAP_SYS_PTRACE"
        }
        _ => "run torpor as root, as the user of that process, or with CAP_SYS_PTRACE",
    }
}

fn list(refusals: &[Refusal]) -> String {
    refusals.iter().map(|r| format!("\n  {r}")).collect()
}

impl Error {
    /// A descriptor of a running process was closed before it could be reached.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self, Error::Kernel { source, .. } if source.errno() == Some(Errno::EBADF))
    }

    /// Wraps the failure of a look into `pid`, for which a privilege may be missing. The kernel refuses a process
    /// that has just ended by other errors (fs/proc/base.c, `proc_mem_open`: ESRCH).
    pub(crate) fn looking(pid: Pid, doing: impl Into<String>) -> impl FnOnce(kernel::Error) -> Self {
        let other = Self::kernel(pid, doing);
        move |source| match source.errno() {
            Some(Errno::EACCES | Errno::EPERM) => Error::Permission { pid, source },
            _ => other(source),
        }
    }

    /// Wraps the failure of a kernel call made for `pid`.
    pub(crate) fn kernel(pid: Pid, doing: impl Into<String>) -> impl FnOnce(kernel::Error) -> Self {
        let doing = doing.into();
        move |source| {
            // /proc/PID gives all sorts of errors for a process that ends just now.
            if source.is_gone() && torpor_kernel::process::is_ending(pid) {
                return Error::Died { pid, how: doing };
            }
            Error::Kernel { pid, doing, source }
        }
    }
}

/// The result of dump operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
