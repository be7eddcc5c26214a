//! pidfd_open(2)

use serde::{Deserialize, Serialize};

use crate::Pid;

/// A pidfd. Its status flags, `PIDFD_NONBLOCK` and `PIDFD_THREAD`, are those of the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFd {
    /// Whom it stands for; `None` is one that has ended.
    pub pid: Option<Pid>,
}
