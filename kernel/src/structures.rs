//! The kernel's structures, as they lie in its own memory ([`crate::bpf`]) and as it describes them itself
//! ([`crate::btf`]). One that is not as expected is an error.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::bpf::KernelMemory;
use crate::btf::Btf;
use crate::{Error, Result};

/// More members than any list has that is walked here.
const LONGEST: usize = 1 << 17;
/// The lowest bit of the end of a list (linux/list_nulls.h).
const ODD: u64 = 1;
/// What leads from a descriptor to its file.
const FILES: [&str; 4] = ["file", "fdtable", "files_struct", "task_struct"];

/// A way to look at structures.
#[derive(Debug)]
pub(crate) struct Structures {
    memory: KernelMemory,
    btf: &'static Btf,
    numbers: HashMap<&'static str, u32>,
}

/// A structure of the kernel.
pub(crate) struct Object<'s> {
    structures: &'s Structures,
    name: &'static str,
    pub(crate) address: u64,
    bytes: Vec<u8>,
}

impl Object<'_> {
    /// A member of at most eight bytes, if this kernel has it.
    pub(crate) fn optional(&self, path: &str) -> Option<u64> {
        let member = self.structures.btf.member(self.structures.numbers[self.name], path)?;
        let (first, last) = (member.offset as usize / 8, (member.offset + member.size).div_ceil(8) as usize);
        let mut bytes = [0; 8];
        bytes.get_mut(..last - first)?.copy_from_slice(self.bytes.get(first..last)?);
        let value = u64::from_ne_bytes(bytes) >> (member.offset % 8);
        Some(if member.size < 64 { value & ((1 << member.size) - 1) } else { value })
    }

    pub(crate) fn number(&self, path: &str) -> Result<u64> {
        self.optional(path).ok_or_else(|| missing(self.name, path))
    }

    pub(crate) fn small(&self, path: &str) -> Result<u32> {
        Ok(self.number(path)? as u32)
    }

    /// The address of a member.
    pub(crate) fn place(&self, path: &str) -> Result<u64> {
        Ok(self.address + self.structures.offset(self.name, path)?)
    }

    /// Whether a member that may be a list of either kind, or missing, has something in it.
    pub(crate) fn filled(&self, path: &str) -> bool {
        let Ok(place) = self.place(path) else { return false };
        if let Some(next) = self.optional(&format!("{path}.next")) {
            return next != 0 && next != place;
        }
        self.optional(&format!("{path}.first")).is_some_and(|first| first != 0)
    }
}

impl Structures {
    /// Loads what is needed. An error where the kernel does not let us, or does not describe itself.
    pub(crate) fn open(names: &[&'static str]) -> Result<Self> {
        let (memory, btf) = (KernelMemory::open()?, Btf::shared()?);
        let numbers = names
            .iter()
            .chain(&FILES)
            .map(|name| Ok((*name, btf.structure(name).ok_or_else(|| missing(name, "*"))?)))
            .collect::<Result<_>>()?;
        Ok(Structures { memory, btf, numbers })
    }

    pub(crate) fn offset(&self, name: &str, path: &str) -> Result<u64> {
        let member = self.btf.member(self.numbers[name], path).ok_or_else(|| missing(name, path))?;
        Ok(u64::from(member.offset / 8))
    }

    pub(crate) fn object(&self, name: &'static str, address: u64) -> Result<Object<'_>> {
        let size = self.btf.size(self.numbers[name]).ok_or_else(|| missing(name, "*"))?;
        let mut bytes = vec![0; size as usize];
        self.memory.read(address, &mut bytes)?;
        Ok(Object { structures: self, name, address, bytes })
    }

    /// Reads `bytes.len()` bytes.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory.read(address, bytes)
    }

    /// The `struct task_struct` of the thread that calls.
    pub(crate) fn current(&self) -> Result<u64> {
        self.memory.current()
    }

    pub(crate) fn pointer(&self, address: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    pub(crate) fn pointers(&self, address: u64, count: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0; (count as usize).min(LONGEST << 4) * 8];
        self.memory.read(address, &mut bytes)?;
        Ok(bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(*b.first_chunk().unwrap_or(&[0; 8]))).collect())
    }

    /// Members of a `list_head`, by the addresses of their own.
    pub(crate) fn list(&self, head: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        let mut next = self.pointer(head)?;
        while next != head && next != 0 && all.len() < LONGEST {
            all.push(next);
            next = self.pointer(next)?;
        }
        Ok(all)
    }

    /// Members of a list that ends with 0 or an odd address.
    pub(crate) fn chain(&self, head: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        let mut next = self.pointer(head)?;
        while next != 0 && next & ODD == 0 && all.len() < LONGEST {
            all.push(next);
            next = self.pointer(next)?;
        }
        Ok(all)
    }

    /// The `struct file` of a descriptor of ours.
    pub(crate) fn file(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let task = self.memory.current()?;
        let files = self.pointer(task + self.offset("task_struct", "files")?)?;
        let table = self.pointer(files + self.offset("files_struct", "fdt")?)?;
        let files = self.pointer(table + self.offset("fdtable", "fd")?)?;
        self.pointer(files + 8 * fd.as_raw_fd() as u64)
    }

    /// What a file is about: of an eventfd its `struct eventfd_ctx`.
    pub(crate) fn private_data(&self, file: u64) -> Result<u64> {
        self.pointer(file + self.offset("file", "private_data")?)
    }

    /// The place of a member that is an array: its address in a structure that lies at `address`, and its size in bits.
    pub(crate) fn array(&self, name: &str, path: &str, address: u64) -> Result<(u64, u32)> {
        let member = self.btf.member(self.numbers[name], path).ok_or_else(|| missing(name, path))?;
        Ok((address + u64::from(member.offset / 8), member.size))
    }

    /// The size of a structure, in bytes.
    pub(crate) fn size(&self, name: &'static str) -> Result<u64> {
        self.btf.size(self.numbers[name]).map(u64::from).ok_or_else(|| missing(name, "*"))
    }
}

fn missing(name: &str, path: &str) -> Error {
    Error::Parse { file: "/sys/kernel/btf/vmlinux".into(), what: format!("there is no {name}.{path}") }
}
