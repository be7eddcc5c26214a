//! What the running kernel grants us: each interface tried once, for real.
//!
//! Versions lie (distributions backport, containers filter), so nothing is concluded from uname(2). A probe makes the
//! call in a way that changes nothing: with arguments that are refused only after permission and presence were checked,
//! on objects of its own, or in a child that does nothing but wait to be killed.
//!
//! The child is made by a bare clone without exit signal, so that the caller's SIGCHLD handling does not see it. The
//! callers' threads are no problem: the child makes system calls only.

mod attempts;

use nix::errno::Errno;

use crate::Result;

/// One interface.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Its name.
    pub name: &'static str,
    /// What it is for, and what its lack costs.
    pub why: &'static str,
    /// Whether it is there.
    pub state: State,
}

/// What a probe found.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum State {
    /// It works, for us.
    Present,
    /// It does not.
    Missing {
        /// What the kernel said; `EPERM` and `EACCES` mean that privilege is all that lacks.
        errno: Errno,
    },
}

impl State {
    /// Whether it works.
    pub fn is_present(self) -> bool {
        self == State::Present
    }
}

/// Name, purpose, attempt.
type Attempt = (&'static str, &'static str, fn() -> Result<()>);

const ATTEMPTS: &[Attempt] = &[
    (
        "pidfd_open",
        "hold a process without a race on its pid; without it nothing works",
        attempts::pidfd_open,
    ),
    (
        "pidfd_getfd",
        "take a descriptor out of a process; without it sockets and pipes are not captured",
        attempts::pidfd_getfd,
    ),
    (
        "clone3 set_tid",
        "restore with the original pids; without it a new pid namespace is needed",
        attempts::clone3_set_tid,
    ),
    (
        "user namespace",
        "restore without privilege; without it host pids must be free and permitted",
        attempts::user_namespace,
    ),
    (
        "PAGEMAP_SCAN",
        "find the pages in use quickly; without it the pagemap file is read, slow on sparse memory",
        attempts::scan,
    ),
    (
        "PAGEMAP_SCAN guard",
        "see guard pages; without it a guarded page cannot be told from a swapped one",
        attempts::scan_guard,
    ),
    (
        "MADV_GUARD_INSTALL",
        "restore guard pages; without it a process that has some is refused",
        attempts::guard_install,
    ),
    (
        "MADV_COLLAPSE",
        "fill huge pages at restore; without it restoring memory takes eight times as long",
        attempts::collapse,
    ),
    ("userfaultfd", "follow writes and restore lazily; without it neither is offered", attempts::userfaultfd),
    (
        "userfaultfd user-mode",
        "the same without privilege, but for faults of user mode only",
        attempts::userfaultfd_user_mode,
    ),
    (
        "userfaultfd WP_ASYNC",
        "follow writes without a handler; without it every dump copies all memory",
        attempts::wp_async,
    ),
    (
        "soft-dirty",
        "follow writes where the kernel has no WP_ASYNC; with it it is not used",
        crate::soft_dirty::available,
    ),
    ("ptrace", "stop a process and read its registers; without it nothing works", attempts::ptrace_child),
    (
        "PTRACE_GET_RSEQ_CONFIGURATION",
        "rseq registration; without it one asks libc's symbol, or refuses",
        attempts::ptrace_rseq,
    ),
    (
        "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG",
        "without it a user of dispatch (wine) is not recognized",
        attempts::ptrace_sud,
    ),
    (
        "PTRACE_SECCOMP_GET_FILTER",
        "read seccomp filters; without it a process that has some is refused",
        attempts::ptrace_seccomp,
    ),
    (
        "kcmp",
        "tell shared from equal descriptors; without it sharing is guessed from fdinfo, or refused",
        attempts::kcmp,
    ),
    (
        "PR_SET_MM_MAP",
        "restore code, data, argument and brk addresses at once, without CAP_SYS_RESOURCE",
        attempts::set_mm_map,
    ),
    (
        "PR_SET_VMA_ANON_NAME",
        "names of anonymous mappings; without it they are lost (they are cosmetic)",
        attempts::anon_name,
    ),
    (
        "map_files",
        "open a mapped file that was deleted; without it its pages are copied",
        attempts::map_files,
    ),
    ("task children", "list children; without it all of /proc is searched", attempts::children),
    (
        "/proc/PID/timers",
        "list POSIX timers; without it a process that has some is not recognized",
        attempts::timers,
    ),
    (
        "PR_TIMER_CREATE_RESTORE_IDS",
        "timer ids; without it ids are reached by making and deleting timers",
        attempts::timer_ids,
    ),
    (
        "TFD_IOC_SET_TICKS",
        "expirations of a timerfd not yet read; without it they are lost",
        attempts::timerfd_ticks,
    ),
    (
        "INOTIFY_IOC_SETNEXTWD",
        "watch descriptors; without it they are reached by adding and removing watches",
        attempts::inotify_wd,
    ),
    ("memfd_create", "shared memory and the executor's arena; without it nothing works", attempts::memfd),
    ("unix_diag", "peers of unix sockets; without it connected ones are refused", attempts::unix_diag),
    ("tcp_diag", "list TCP sockets; without it one asks each socket", attempts::tcp_diag),
    (
        "TCP_REPAIR",
        "queues and sequence numbers of TCP connections; without it they are closed or refused",
        attempts::tcp_repair,
    ),
    (
        "bpf_probe_read_kernel",
        "what only the kernel knows of io_uring; without it, or without BTF, a process that has one is refused",
        attempts::kernel_memory,
    ),
    (
        "membarrier registrations",
        "which membarrier commands are in use; without it they are taken from use of rseq",
        attempts::membarrier,
    ),
    ("CAP_CHECKPOINT_RESTORE", "host pids, map_files", || attempts::capability(40)),
    ("CAP_SYS_PTRACE", "processes of other users, and set-uid ones", || attempts::capability(19)),
    ("CAP_NET_ADMIN", "TCP repair, forced buffer sizes, network namespaces", || attempts::capability(12)),
    ("CAP_SYS_ADMIN", "namespaces, mounts, seccomp filters", || attempts::capability(21)),
    (
        "CAP_SYS_RESOURCE",
        "raise hard limits, lower oom_score_adj; without it such values are refused",
        || attempts::capability(24),
    ),
];

/// Tries everything. Takes some milliseconds.
pub fn all() -> Vec<Probe> {
    let probe = |(name, why, attempt): &Attempt| Probe { name, why, state: state(attempt()) };
    ATTEMPTS.iter().map(probe).collect()
}

/// Tries one interface, by its name in `all`; `None` if there is none of that name.
pub fn one(name: &str) -> Option<State> {
    let found = ATTEMPTS.iter().find(|attempt| attempt.0 == name);
    found.map(|(_, _, attempt)| state(attempt()))
}

fn state(result: Result<()>) -> State {
    match result {
        Ok(()) => State::Present,
        // A text that does not parse is as good as none.
        Err(error) => State::Missing { errno: error.errno().unwrap_or(Errno::EPROTO) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pid, fds};

    #[test]
    fn everything_is_tried_and_nothing_stays() {
        let before = fds::list(Pid::this()).unwrap();
        let probes = all();
        assert_eq!(probes.len(), ATTEMPTS.len());
        for probe in &probes {
            println!("{:40} {:?}", probe.name, probe.state);
        }
        assert!(probes.iter().any(|probe| probe.name == "memfd_create" && probe.state.is_present()));
        // Other tests run at the same time and open files of their own: only what is plainly ours is looked for.
        let after = fds::list(Pid::this()).unwrap();
        for fd in after.iter().filter(|fd| !before.contains(fd)) {
            let link = fds::readlink(Pid::this(), *fd).unwrap_or_default();
            for ours in ["userfaultfd", "timerfd", "inotify", "torpor-probe"] {
                assert!(!String::from_utf8_lossy(&link).contains(ours));
            }
        }
        assert_eq!(one("no such thing"), None);
    }
}
