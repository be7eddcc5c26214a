//! The image: a directory that holds everything of a frozen process tree.
//!
//! ```text
//! DIR/manifest.tpr     what this image is, and every other file with size and checksum; written last
//!     objects.tpr      open file descriptions, inodes, pipes: what several tasks may share
//!     task-PID.tpr     one per process
//!     pages.idx        fixed 32-byte records: which bytes of which space lie where
//!     pages-N.dat      raw page-aligned contents, no header
//! ```
//! Encoded, contents lie in `pages-N.dat.lz4` or `pages-N.dat.zst` and `chunks.idx` tells where; encrypted, the names of
//! all files end with `.age`.
//!
//! Every `.tpr` and `.idx` file begins with the fixed [`header`]; bodies are named MessagePack. This crate
//! calls no kernel interface but files. docs/image-format.md describes the format for other readers.

pub mod bytes;
pub mod check;
mod chunk;
mod codec;
pub mod credentials;
pub mod data;
mod data_file;
pub mod description;
pub mod directory;
pub mod encode;
pub mod epoll;
pub mod error;
pub mod eventfd;
pub mod extent;
pub mod header;
pub mod inet;
pub mod inode;
pub mod inotify;
pub mod io_uring;
pub mod ip;
pub mod keys;
pub mod lock;
pub mod manifest;
pub mod memory;
pub mod mqueue;
pub mod netlink;
pub mod packet;
pub mod parent;
pub mod pidfd;
pub mod pipe;
pub mod pty;
pub mod raw;
pub mod read;
pub mod rules;
pub mod scheduling;
pub mod signal;
pub mod signalfd;
pub mod socket;
pub mod spool;
pub mod squash;
mod stock;
pub mod stream;
pub mod sysv;
pub mod sysv_msg;
pub mod sysv_sem;
pub mod sysv_shm;
pub mod task;
pub mod tcp;
pub mod terminal;
pub mod thread;
pub mod timer;
pub mod timerfd;
pub mod udp;
pub mod unix;
pub mod vma;
pub mod write;
pub mod zombie;

pub use bytes::Bytes;
pub use codec::Compression;
pub use encode::Encoding;
pub use error::{Error, Result};
pub use keys::{Identities, Recipients};
pub use read::Image;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// A process id (or, for threads, a thread id) in the pid namespace of the dump.
    Pid(i32));
id!(/// An open file description of this image.
    DescriptionId(u32));
id!(/// An inode of this image.
    InodeId(u32));
id!(/// A pipe or FIFO of this image.
    PipeId(u32));
id!(/// A POSIX message queue of this image.
    MqueueId(u32));
id!(/// A pair of pseudo terminals of this image.
    PtyId(u32));
