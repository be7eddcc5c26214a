//! The manifest: what an image is, written last.

use serde::{Deserialize, Serialize};

use crate::parent::{Ancestor, Borrowed};
use crate::zombie::Zombie;
use crate::{Bytes, Pid};

/// What an image is and what it consists of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the program that wrote it.
    pub torpor: String,
    /// When the capture was taken, in nanoseconds since 1970.
    pub taken_at: u64,
    /// The machine it was taken on.
    pub host: Host,
    /// The root of the tree.
    pub root: Pid,
    /// Every process that lives, the root first and every other after its parent.
    pub tasks: Vec<Pid>,
    /// Members that have ended and wait for their parents.
    #[serde(default)]
    pub zombies: Vec<Zombie>,
    /// Every other file of the image.
    pub files: Vec<ImageFile>,
    /// Whether the tree ran on after the capture: then what it did outside itself meanwhile is not undone.
    pub ran_on: bool,
    /// What the image does not hold although the tree had it, in words.
    #[serde(default)]
    pub not_captured: Vec<String>,
    /// How long the tree stood still and other times of the dump, in nanoseconds.
    #[serde(default)]
    pub times: Times,
    /// Tells this image from every other; empty in images of format 2.0.
    #[serde(default)]
    pub id: String,
    /// Images that some data files are those of.
    #[serde(default)]
    pub ancestors: Vec<Ancestor>,
    /// Those data files.
    #[serde(default)]
    pub borrowed: Vec<Borrowed>,
    /// In which way the memory was taken.
    #[serde(default)]
    pub freeze: Freeze,
    /// Why not in the way that was asked for, or that would have been chosen.
    #[serde(default)]
    pub fallback: Option<String>,
    /// By what writes were followed, if they were: `write-protection` or `soft-dirty`.
    #[serde(default)]
    pub followed: Option<String>,
}

/// A way to take the memory of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Freeze {
    /// It was copied while the tree stood still.
    #[default]
    Copy,
    /// Copy-on-write children were made while it stood still, and read afterwards.
    Fork,
    /// What had changed since a dump before was copied while it stood still.
    Track,
}

impl std::fmt::Display for Freeze {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Freeze::Copy => "copy",
            Freeze::Fork => "fork",
            Freeze::Track => "track",
        })
    }
}

/// The machine of a dump.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -n`
    pub name: String,
    /// `uname -r`
    pub kernel: String,
    /// Identity of the boot (/proc/sys/kernel/random/boot_id).
    pub boot: String,
    /// Vector state components the kernel had enabled (XCR0 on x86_64).
    pub xstate_features: u64,
    /// Bytes of the vdso: code of the kernel's that programs hold addresses of.
    pub vdso: Bytes,
}

/// A file of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Name inside the directory.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// CRC-32C of all of it.
    pub crc32c: u32,
}

/// How long parts of a dump took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// From the first attach until every thread stood.
    pub freezing: u64,
    /// From then until the tree ran again or was ended.
    pub frozen: u64,
    /// The part of `frozen` in which memory was copied.
    pub memory: u64,
}

impl Manifest {
    /// Name of the file.
    pub const FILE: &str = "manifest.tpr";
}
