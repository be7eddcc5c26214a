//! An address space.

use serde::{Deserialize, Serialize};

use crate::extent::Extents;
use crate::vma::Vma;
use crate::{Bytes, InodeId};

/// The memory of a process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressSpace {
    /// The areas, sorted by address.
    pub vmas: Vec<Vma>,
    /// Contents of private areas, by address.
    pub pages: Extents,
    /// The kernel's own notes of the program.
    pub fields: MmFields,
    /// The auxiliary vector the kernel keeps (/proc/PID/auxv).
    pub auxv: Bytes,
    /// The program file.
    pub exe: InodeId,
    /// prctl(PR_GET_DUMPABLE)
    pub dumpable: u32,
    /// prctl(PR_GET_THP_DISABLE)
    pub thp_disabled: u32,
    /// prctl(PR_GET_MDWE)
    #[serde(default)]
    pub mdwe: u32,
    /// prctl(PR_GET_MEMORY_MERGE)
    #[serde(default)]
    pub memory_merge: u32,
    /// /proc/PID/coredump_filter
    pub coredump_filter: Option<u32>,
    /// Registered membarrier commands (MEMBARRIER_CMD_GET_REGISTRATIONS).
    pub membarrier: u32,
}

/// The addresses of `struct prctl_mm_map` (linux/prctl.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}
