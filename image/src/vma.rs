//! A virtual memory area.

use serde::{Deserialize, Serialize};

use crate::{Bytes, DescriptionId, InodeId};

/// One area of an address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// `PROT_*` bits.
    pub protection: u32,
    /// What the area maps.
    pub mapping: Mapping,
    /// `MAP_GROWSDOWN`
    pub grows_down: bool,
    /// `MAP_NORESERVE`
    pub no_reserve: bool,
    /// mlock(2)
    pub locked: Lock,
    /// `MADV_*` values in force.
    pub advice: Vec<i32>,
}

/// What an area maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mapping {
    /// Private anonymous memory, with its name if it has one (PR_SET_VMA_ANON_NAME).
    Anonymous {
        /// The name.
        name: Option<Bytes>,
    },
    /// A private mapping of a file; pages that differ from it are in the address space's extents.
    Private {
        /// The file.
        inode: InodeId,
        /// Offset of the area in it.
        offset: u64,
    },
    /// A shared mapping: of a file, a memfd or anonymous shared memory.
    Shared {
        /// What it maps.
        inode: InodeId,
        /// Offset of the area in it.
        offset: u64,
        /// Whether `PROT_WRITE` may be given to it: its descriptor was open for writing.
        may_write: bool,
    },
    /// Queues of an io_uring, shared with the kernel.
    Ring {
        /// The ring.
        ring: DescriptionId,
        /// Which of its queues: one of [`crate::io_uring::AREAS`].
        area: u64,
    },
    /// Memory of the kernel's own, by its name: `[vdso]`, `[vvar]`.
    Kernel {
        /// The name.
        name: Bytes,
    },
}

/// Whether an area is locked into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lock {
    /// It is not.
    #[default]
    No,
    /// mlock: present and staying.
    Yes,
    /// mlock2(MLOCK_ONFAULT): staying once present.
    OnFault,
}

impl Vma {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the area is empty, which no valid one is.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Whether contents of this area are in the address space's extents.
    pub fn private(&self) -> bool {
        matches!(self.mapping, Mapping::Anonymous { .. } | Mapping::Private { .. })
    }

    /// `rwxp` as in /proc/PID/maps.
    pub fn permissions(&self) -> String {
        let bit = |mask, c| if self.protection & mask != 0 { c } else { '-' };
        let shared = matches!(self.mapping, Mapping::Shared { .. } | Mapping::Ring { .. });
        [bit(1, 'r'), bit(2, 'w'), bit(4, 'x'), if shared { 's' } else { 'p' }].into_iter().collect()
    }
}
