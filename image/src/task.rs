//! A process.

use serde::{Deserialize, Serialize};

use crate::lock::PosixLock;
use crate::memory::AddressSpace;
use crate::signal::ProcessSignals;
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
    /// The thread whose id is the process id.
    pub fn leader(&self) -> &Thread {
        &self.threads[0]
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
