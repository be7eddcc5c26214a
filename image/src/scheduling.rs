//! sched(7)

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// How a thread is scheduled: `struct sched_attr`, affinity and more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`
    pub policy: u32,
    /// `SCHED_FLAG_*`
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// SCHED_DEADLINE, in nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE, in nanoseconds.
    pub deadline: u64,
    /// SCHED_DEADLINE, in nanoseconds.
    pub period: u64,
    /// Lowest and highest utilization asked for.
    pub utilization: (u32, u32),
    /// The cpus it may run on, a bit mask.
    pub affinity: Bytes,
    /// ioprio_get(2)
    pub io_priority: i32,
    /// prctl(PR_GET_TIMERSLACK), in nanoseconds.
    pub timer_slack: u64,
}
