//! File locks.

use serde::{Deserialize, Serialize};

use crate::{InodeId, Pid};

/// A lock on all of a file that belongs to an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Flock {
    /// flock(2)
    Whole {
        /// `LOCK_EX` or `LOCK_SH`.
        exclusive: bool,
    },
}

/// A lock on a part of a file that belongs to an open file description (fcntl(F_OFD_SETLK)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfdLock {
    /// `F_WRLCK` or `F_RDLCK`.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; `None` for the end of the file, wherever it may be.
    pub end: Option<u64>,
}

/// A lock that belongs to a process (fcntl(F_SETLK)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixLock {
    /// A descriptor number of the process on the file.
    pub fd: i32,
    /// The file.
    pub inode: Option<InodeId>,
    /// `F_WRLCK` or `F_RDLCK`.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; `None` for the end of the file, wherever it may be.
    pub end: Option<u64>,
}

/// A lease on a file (fcntl(F_SETLEASE)), which belongs to an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// `F_WRLCK` or `F_RDLCK`.
    pub exclusive: bool,
    /// The process that took it.
    pub holder: Pid,
}
