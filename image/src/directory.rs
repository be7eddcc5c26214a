//! Directories that live only as long as the program.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// A directory that is made again when it is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// The path.
    pub path: Bytes,
    /// `st_mode`
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}
