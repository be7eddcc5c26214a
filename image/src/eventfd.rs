//! eventfd(2)

use serde::{Deserialize, Serialize};

/// An eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
    pub count: u64,
    /// `EFD_SEMAPHORE`
    pub semaphore: bool,
}
