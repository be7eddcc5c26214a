//! What the three kinds of System V IPC objects have in common (sysvipc(7)).

use serde::{Deserialize, Serialize};

/// Name, owner and mode of an object (`struct ipc64_perm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// The key it is found by; 0 for `IPC_PRIVATE`, and for a segment that was removed while attached.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Creator.
    pub cuid: u32,
    /// The creator's group.
    pub cgid: u32,
    /// The nine permission bits.
    pub mode: u32,
}

impl Permissions {
    /// "id 7 (key 0x51)", "id 7 (private)"
    pub fn title(&self, id: i32) -> String {
        match self.key {
            0 => format!("id {id} (private)"),
            key => format!("id {id} (key {key:#x})"),
        }
    }
}
