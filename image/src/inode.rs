//! Files behind descriptions and mappings.

use serde::{Deserialize, Serialize};

use crate::extent::Extents;
use crate::rules::Rule;
use crate::sysv_shm::Segment;
use crate::{Bytes, InodeId, Pid};

/// A file: found again by its path, or with its contents in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    /// Its number in this image.
    pub id: InodeId,
    /// Where it comes from.
    pub source: Source,
    /// Device number at the dump.
    pub device: u64,
    /// Inode number at the dump.
    pub number: u64,
    /// `st_mode`: type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes at the dump.
    pub size: u64,
    /// Modification time at the dump, nanoseconds since 1970.
    pub modified: i64,
    /// For one that is found again by its path: what a restore does about it.
    #[serde(default)]
    pub rule: Rule,
    /// Its contents, if the rule wants them.
    #[serde(default)]
    pub saved: Extents,
}

/// Where an inode is found at the restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// By its path: a regular file, directory, device or FIFO that must be there.
    Path {
        /// The path.
        path: Bytes,
    },
    /// It had no name any more; made again without one.
    Deleted {
        /// The path it once had.
        path: Bytes,
        /// Its contents.
        content: Extents,
    },
    /// A memfd.
    Memfd {
        /// Name given to memfd_create.
        name: Bytes,
        /// `F_GET_SEALS`
        seals: u32,
        /// Its contents.
        content: Extents,
    },
    /// A file of /proc about a process of the image, which is there as soon as that process is.
    Process {
        /// The process.
        pid: Pid,
        /// What follows `/proc/PID/`; empty for the directory itself.
        rest: Bytes,
    },
    /// Anonymous shared memory (`MAP_SHARED | MAP_ANONYMOUS`), which no descriptor can name.
    SharedMemory {
        /// Its contents.
        content: Extents,
    },
    /// A System V shared memory segment, attached or not.
    SysV {
        /// What it is.
        segment: Segment,
        /// Its contents.
        content: Extents,
    },
}

impl Inode {
    /// Contents in the image, if it has any there.
    pub fn content(&self) -> Option<Extents> {
        match self.source {
            Source::Process { .. } => None,
            Source::Path { .. } => self.rule.has_content().then_some(self.saved),
            Source::Deleted { content, .. }
            | Source::Memfd { content, .. }
            | Source::SharedMemory { content }
            | Source::SysV { content, .. } => Some(content),
        }
    }

    /// Whether it is anonymous shared memory.
    pub fn is_shared_memory(&self) -> bool {
        matches!(self.source, Source::SharedMemory { .. })
    }

    /// The System V segment it is, if it is one.
    pub fn segment(&self) -> Option<&Segment> {
        if let Source::SysV { segment, .. } = &self.source { Some(segment) } else { None }
    }

    /// A name for people.
    pub fn name(&self) -> String {
        match &self.source {
            Source::Path { path } => path.to_string(),
            Source::Deleted { path, .. } => format!("{path} (deleted)"),
            Source::Memfd { name, .. } => format!("memfd:{name}"),
            Source::Process { pid, rest } => format!("/proc/{pid}/{rest}"),
            Source::SharedMemory { .. } => "shared memory".to_owned(),
            Source::SysV { segment, .. } => {
                format!("System V segment {}", segment.permissions.title(segment.id))
            }
        }
    }
}
