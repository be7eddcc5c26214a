//! pipe(7) and fifo(7)

use serde::{Deserialize, Serialize};

use crate::{Bytes, InodeId, PipeId};

/// A pipe or an opened FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// Its number in this image.
    pub id: PipeId,
    /// Inode number at the dump, as in `pipe:[N]`.
    pub number: u64,
    /// `F_GETPIPE_SZ`, in bytes.
    pub capacity: u32,
    /// Bytes in it.
    pub data: Bytes,
    /// Parts of `data` that were written as packets (`O_DIRECT`); the rest is a stream.
    #[serde(default)]
    pub packets: Vec<Packet>,
    /// The FIFO's file, for one that has a name.
    pub fifo: Option<InodeId>,
}

/// A packet in a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Where it begins.
    pub offset: u32,
    /// Its length, not 0.
    pub length: u32,
}

/// A description's end of a pipe; its flags say which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// The pipe.
    pub pipe: PipeId,
}
