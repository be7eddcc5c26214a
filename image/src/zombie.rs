//! A process that has ended and whose parent has not asked for its status yet.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Pid};

/// A zombie: all that is left of it is what its parent will be told (wait(2)), and the ids it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zombie {
    /// Process id.
    pub pid: Pid,
    /// Its parent, a process of the image.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Its name.
    pub name: Bytes,
    /// Status in the form of waitpid(2).
    pub status: i32,
    /// The signal its parent got for its end.
    pub exit_signal: i32,
}
