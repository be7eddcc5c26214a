//! A process.

use serde::{Deserialize, Serialize};

use crate::lock::PosixLock;
use crate::memory::AddressSpace;
use crate::signal::ProcessSignals;
use crate::terminal::ControllingTerminal;
use crate::thread::Thread;
use crate::timer::Timers;
use crate::{Bytes, DescriptionId, Pid};

/// A process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Process id.
    pub pid: Pid,
    /// Its parent.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Whether it was stopped by a job-control signal.
    pub stopped: bool,
    /// Its threads, the leader first.
    pub threads: Vec<Thread>,
    /// Its memory.
    pub memory: AddressSpace,
    /// Its descriptors, by number.
    pub descriptors: Vec<Descriptor>,
    /// Its POSIX locks.
    pub locks: Vec<PosixLock>,
    /// Signal actions and shared pending signals.
    pub signals: ProcessSignals,
    /// Timers.
    pub timers: Timers,
    /// Resource limits `RLIMIT_0..=RLIMIT_15`, soft and hard.
    pub limits: Vec<(u64, u64)>,
    /// Working directory.
    pub cwd: Bytes,
    /// Root directory.
    pub root: Bytes,
    /// umask(2)
    pub umask: u32,
    /// personality(2)
    pub personality: u32,
    /// /proc/PID/oom_score_adj
    pub oom_score_adj: i32,
    /// prctl(PR_GET_CHILD_SUBREAPER)
    pub child_subreaper: bool,
    /// The signal its parent gets when it ends.
    #[serde(default = "sigchld")]
    pub exit_signal: i32,
    /// The stop signal its parent has not asked for yet; 0 for none.
    #[serde(default)]
    pub stop_report: i32,
    /// The status its first thread has ended with, where others go on.
    #[serde(default)]
    pub leader_ended: Option<i32>,
    /// What it has in common with another process.
    #[serde(default)]
    pub shares: Shares,
    /// Its controlling terminal.
    #[serde(default)]
    pub terminal: Option<ControllingTerminal>,
}

/// What a process shares with another one that stands before it in the image (clone(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// `CLONE_VM`: whose memory it is.
    pub memory: Option<Pid>,
    /// `CLONE_FILES`: whose descriptor table it is.
    pub descriptors: Option<Pid>,
    /// `CLONE_FS`: whose root, working directory and umask they are.
    pub directories: Option<Pid>,
    /// `CLONE_SIGHAND`: whose signal actions they are.
    pub signal_actions: Option<Pid>,
}

/// `SIGCHLD`, on all architectures of Linux that Torpor knows (signal(7)).
fn sigchld() -> i32 {
    17
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// What it refers to.
    pub description: DescriptionId,
    /// `FD_CLOEXEC`
    pub close_on_exec: bool,
}

impl Task {
    /// The thread whose id is the process id; where that has ended, another one.
    pub fn leader(&self) -> &Thread {
        &self.threads[0]
    }

    /// All threads but the one whose id is the process id.
    pub fn other_threads(&self) -> &[Thread] {
        &self.threads[usize::from(self.leader_ended.is_none())..]
    }

    /// `PID (name)` for messages.
    pub fn title(&self) -> String {
        format!("pid {} ({})", self.pid, self.threads.first().map(|t| t.name.to_string()).unwrap_or_default())
    }

    /// Name of the image file of process `pid`.
    pub fn file(pid: Pid) -> String {
        format!("task-{pid}.tpr")
    }
}
