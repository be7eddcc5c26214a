//! A thread.

use serde::{Deserialize, Serialize};

use crate::credentials::Credentials;
use crate::scheduling::Scheduling;
use crate::signal::ThreadSignals;
use crate::{Bytes, Pid};

/// A thread of a process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread id.
    pub tid: Pid,
    /// Name (prctl(PR_GET_NAME)).
    pub name: Bytes,
    /// General registers as they were at the freeze.
    pub registers: arch::Registers,
    /// FPU and vector state (`NT_X86_XSTATE`).
    pub xstate: Bytes,
    /// Signal state.
    pub signals: ThreadSignals,
    /// rseq(2)
    pub rseq: Option<Rseq>,
    /// get_robust_list(2): address and length.
    pub robust_list: (u64, u64),
    /// set_tid_address(2)
    pub clear_child_tid: u64,
    /// prctl(PR_GET_PDEATHSIG)
    pub parent_death_signal: i32,
    /// Scheduling.
    pub scheduling: Scheduling,
    /// Credentials.
    pub credentials: Credentials,
}

/// A registered rseq area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Its address.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
}
