//! Signal actions, masks and pending signals.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// `struct kernel_sigaction`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    /// Address of the handler, or 0 for SIG_DFL, 1 for SIG_IGN.
    pub handler: u64,
    /// `SA_*`
    pub flags: u64,
    /// Code that calls rt_sigreturn.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

/// Signal state of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSignals {
    /// Actions of signals 1 to 64.
    pub actions: Vec<SignalAction>,
    /// Pending for the process, each a `siginfo_t`.
    pub pending: Vec<Bytes>,
}

/// Signal state of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadSignals {
    /// Blocked signals, bit N-1 for signal N.
    pub mask: u64,
    /// Pending for the thread, each a `siginfo_t`.
    pub pending: Vec<Bytes>,
    /// sigaltstack(2)
    pub altstack: AltStack,
}

/// `stack_t`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    /// First address.
    pub base: u64,
    /// `SS_*`
    pub flags: i32,
    /// Length in bytes.
    pub size: u64,
}
