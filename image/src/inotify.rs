//! inotify(7)

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// An inotify instance. Events that were queued and not read are lost, as the kernel shows them to nobody
/// but the reader; the manifest says so where there were any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// Its watches.
    pub watches: Vec<Watch>,
}

/// One watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Watch descriptor.
    pub descriptor: i32,
    /// `IN_*` bits.
    pub mask: u32,
    /// What is watched.
    pub path: Bytes,
}
