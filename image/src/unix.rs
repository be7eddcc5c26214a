//! unix(7)

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::socket::SocketOption;

/// A Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// What it does.
    pub state: State,
    /// The address it was bound to; the first byte is zero for an abstract one.
    pub name: Option<Bytes>,
    /// Where the name's file is, for a relative or absolute path.
    pub file: Option<BoundFile>,
    /// Messages in its receive queue, each with its own bounds; a stream has at most one.
    pub queue: Vec<Bytes>,
    /// Bit 1: receiving is shut down, bit 2: sending is.
    pub shutdown: u8,
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
}

/// What a Unix socket does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Neither connected nor listening.
    Idle,
    /// listen(2)
    Listening {
        /// The backlog asked for.
        backlog: u32,
    },
    /// Connected to the socket with this number, also of the image.
    Connected {
        /// [`UnixSocket::number`] of the peer.
        peer: u32,
    },
    /// Connected to this listening socket of the image, which has not accepted yet.
    Waiting {
        /// [`UnixSocket::number`] of the listener.
        listener: u32,
    },
    /// Was connected; the peer is gone.
    Orphaned,
}

/// The file of a bound Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundFile {
    /// Absolute path.
    pub path: Bytes,
    /// `st_mode`
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}
