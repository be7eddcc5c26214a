//! System V shared memory (shmget(2)).

use serde::{Deserialize, Serialize};

use crate::sysv::Permissions;

/// A segment. Its size is that of the inode it belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its id.
    pub id: i32,
    /// Key, owner and mode.
    pub permissions: Permissions,
    /// The key it was made with, which memory maps go on showing when `permissions` has none any more.
    pub name: i32,
    /// `SHM_DEST`: removed, and there only until nobody has it attached.
    pub removed: bool,
    /// `SHM_LOCKED`
    pub locked: bool,
    /// Pid of its creator.
    pub creator: i32,
    /// Pid of who attached or detached it last.
    pub last: i32,
}
