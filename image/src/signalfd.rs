//! signalfd(2)

use serde::{Deserialize, Serialize};

/// A signalfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalFd {
    /// The signals it takes, bit N-1 for signal N.
    pub mask: u64,
}
