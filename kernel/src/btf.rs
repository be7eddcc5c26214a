//! /sys/kernel/btf/vmlinux: where the members of the kernel's structures lie (Documentation/bpf/btf.rst).
//!
//! A header, then types one after the other, each of a length that follows from its kind, then names. Types refer to
//! one another by number, counted from 1. Members without a name (anonymous structures and unions) are looked into.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use crate::{Error, Result};

const FILE: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Deeper nesting than any structure has.
const DEPTH: u32 = 16;

/// Kinds of types (linux/btf.h).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Where a member lies in its structure, in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// From the start of the structure.
    pub offset: u32,
    /// Its size.
    pub size: u32,
}

/// The types of the running kernel.
pub struct Btf {
    bytes: Bytes,
    /// Of each type, where it begins; type N is at index N - 1.
    types: Vec<u32>,
    /// The numbers of structures.
    structures: Vec<u32>,
    names: usize,
}

/// `struct btf_type`
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    info: u32,
    /// Its size, or the type it is about.
    rest: u32,
    /// Where what belongs to its kind begins.
    more: usize,
}

impl Type {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Bytes that follow it.
    fn length(self) -> usize {
        match self.kind() {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * self.count(),
            kind::ENUM | kind::FUNC_PROTO => 8 * self.count(),
            _ => 0,
        }
    }
}

/// What the file holds. Read it takes a system call for each page, so it is mapped where the kernel lets us (Linux 6.16,
/// kernel/bpf/sysfs_btf.c).
enum Bytes {
    Read(Vec<u8>),
    Mapped { at: *const u8, length: usize },
}

// SAFETY: nobody changes these bytes.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    fn open() -> std::io::Result<Self> {
        let file = File::open(FILE)?;
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
        // SAFETY: new memory, of a file that never changes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Ok(Bytes::Read(std::fs::read(FILE)?));
        }
        Ok(Bytes::Mapped { at: at.cast(), length })
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Read(bytes) => bytes,
            // SAFETY: mapped, and so long, until this is dropped.
            Bytes::Mapped { at, length } => unsafe { std::slice::from_raw_parts(*at, *length) },
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Bytes::Mapped { at, length } = self {
            // SAFETY: what was mapped, to which nobody has a reference any more.
            unsafe { libc::munmap(at.cast_mut().cast(), *length) };
        }
    }
}

impl Btf {
    /// Those of the running kernel, which take milliseconds to be read and stay.
    pub fn shared() -> Result<&'static Self> {
        static READ: OnceLock<Btf> = OnceLock::new();
        match READ.get() {
            Some(read) => Ok(read),
            None => {
                let read = Self::read()?;
                Ok(READ.get_or_init(|| read))
            }
        }
    }

    /// Reads those of the running kernel.
    pub fn read() -> Result<Self> {
        let bytes = Bytes::open().map_err(|e| Error::io("read", FILE, &e))?;
        Self::parse(bytes).ok_or_else(|| Error::parse(FILE, b"not the types of a kernel"))
    }

    fn parse(bytes: Bytes) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(&bytes, 4)? as usize;
        let (at, length) = (header + word(&bytes, 8)? as usize, word(&bytes, 12)? as usize);
        let names = header + word(&bytes, 16)? as usize;
        let mut btf = Btf { bytes, types: Vec::new(), structures: Vec::new(), names };
        let (mut next, end) = (at, at + length);
        while next < end {
            btf.types.push(u32::try_from(next).ok()?);
            let found = btf.at(next)?;
            if found.kind() == kind::STRUCT {
                btf.structures.push(btf.types.len() as u32);
            }
            next = found.more + found.length();
        }
        (next == end).then_some(btf)
    }

    fn at(&self, at: usize) -> Option<Type> {
        let word = |n| word(&self.bytes, at + n);
        Some(Type { name: word(0)?, info: word(4)?, rest: word(8)?, more: at + 12 })
    }

    fn get(&self, id: u32) -> Option<Type> {
        self.at(*self.types.get(id.checked_sub(1)? as usize)? as usize)
    }

    fn is_called(&self, name: u32, wanted: &str) -> bool {
        let at = self.names + name as usize;
        self.bytes.get(at..at + wanted.len()) == Some(wanted.as_bytes())
            && self.bytes.get(at + wanted.len()) == Some(&0)
    }

    /// The number of a structure, for [`Btf::member`].
    pub fn structure(&self, name: &str) -> Option<u32> {
        let is = |t: Type| self.is_called(t.name, name);
        self.structures.iter().copied().find(|id| self.get(*id).is_some_and(is))
    }

    /// Bytes of a structure.
    pub fn size(&self, structure: u32) -> Option<u32> {
        Some(self.get(structure)?.rest)
    }

    /// Where `path`, names with dots between them, lies in a structure.
    pub fn member(&self, structure: u32, path: &str) -> Option<Member> {
        let mut found = Member { offset: 0, size: 0 };
        let mut of = structure;
        for name in path.split('.') {
            let (member, its) = self.find(self.plain(of)?, name, DEPTH)?;
            found = Member { offset: found.offset + member.offset, size: member.size };
            of = its;
        }
        Some(found)
    }

    /// The type behind other names of it, and behind `const` and the like.
    fn plain(&self, mut id: u32) -> Option<Type> {
        for _ in 0..DEPTH {
            let found = self.get(id)?;
            match found.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = found.rest;
                }
                _ => return Some(found),
            }
        }
        None
    }

    /// A member and its type.
    fn find(&self, of: Type, name: &str, depth: u32) -> Option<(Member, u32)> {
        if depth == 0 || !matches!(of.kind(), kind::STRUCT | kind::UNION) {
            return None;
        }
        let packed = of.info >> 31 != 0;
        for i in 0..of.count() {
            let at = of.more + 12 * i;
            let (own, its, place) =
                (word(&self.bytes, at)?, word(&self.bytes, at + 4)?, word(&self.bytes, at + 8)?);
            let (offset, bits) = if packed { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            if self.is_called(own, name) {
                let size = if bits > 0 { bits } else { self.bits(its, DEPTH)? };
                return Some((Member { offset, size }, its));
            }
            if self.is_called(own, "")
                && let Some((inner, its)) = self.plain(its).and_then(|t| self.find(t, name, depth - 1))
            {
                return Some((Member { offset: offset + inner.offset, ..inner }, its));
            }
        }
        None
    }

    fn bits(&self, id: u32, depth: u32) -> Option<u32> {
        let found = self.plain(id)?;
        match found.kind() {
            kind::PTR => Some(usize::BITS),
            kind::ARRAY if depth > 0 => {
                let (of, count) = (word(&self.bytes, found.more)?, word(&self.bytes, found.more + 8)?);
                self.bits(of, depth - 1)?.checked_mul(count)
            }
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 => found.rest.checked_mul(8),
            _ => None,
        }
    }
}

impl std::fmt::Debug for Btf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btf").field("types", &self.types.len()).finish_non_exhaustive()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct pair { int a; struct { int b : 3; int c : 5; }; const int d[2]; };`
    fn sample() -> Vec<u8> {
        let names = b"\0int\0pair\0a\0b\0c\0d\0";
        let int = [1u32, kind::INT << 24, 4, 32];
        let inner = [0, 1 << 31 | kind::STRUCT << 24 | 2, 4, 12, 1, 3 << 24, 14, 1, 5 << 24 | 3];
        let constant = [0, kind::CONST << 24, 1];
        let array = [0, kind::ARRAY << 24, 0, 3, 1, 2];
        let outer = [5, kind::STRUCT << 24 | 3, 16, 10, 1, 0, 0, 2, 32, 16, 4, 64];
        let types: Vec<u8> = [&int[..], &inner, &constant, &array, &outer]
            .concat()
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, names.len() as u32];
        let mut all = MAGIC.to_ne_bytes().to_vec();
        all.extend([1, 0]);
        all.extend(header.iter().flat_map(|w: &u32| w.to_ne_bytes()));
        all.extend(types);
        all.extend(names);
        all
    }

    #[test]
    fn members_are_found() {
        let btf = Btf::parse(Bytes::Read(sample())).unwrap();
        let pair = btf.structure("pair").unwrap();
        assert_eq!(btf.size(pair), Some(16));
        assert_eq!(btf.member(pair, "a"), Some(Member { offset: 0, size: 32 }));
        assert_eq!(btf.member(pair, "c"), Some(Member { offset: 35, size: 5 }));
        assert_eq!(btf.member(pair, "d"), Some(Member { offset: 64, size: 64 }));
        assert_eq!(btf.member(pair, "e"), None);
        assert_eq!(btf.member(pair, "a.x"), None);
        assert_eq!(btf.structure("int"), None);
    }

    #[test]
    fn odd_input_is_none() {
        let whole = sample();
        for end in 0..whole.len() {
            let cut = Btf::parse(Bytes::Read(whole[..end].to_vec()));
            assert!(cut.is_none_or(|b| b.structure("nothing").is_none()));
        }
        assert!(Btf::parse(Bytes::Read(b"\x9f\xebxxxxxxxxxxxxxxxxxxxxxxxxxxxx".to_vec())).is_none());
    }

    #[test]
    fn this_kernel() {
        let Ok(btf) = Btf::read() else {
            eprintln!("skipped: {FILE} cannot be read");
            return;
        };
        let file = btf.structure("file").unwrap();
        assert_eq!(btf.member(file, "private_data").unwrap().size, usize::BITS);
    }
}
