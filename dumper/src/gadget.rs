//! Finding the two instruction sequences of the target's own code that the way in and the way back run on:
//! one that makes a system call and returns, and one that calls rt_sigreturn. Nothing of the target's code
//! is ever changed, so there is nothing to put back if we die.

use std::collections::HashMap;

use torpor_kernel::ids::{Pid, RemoteAddr};
use torpor_kernel::maps::Mapping;
use torpor_kernel::memory::Memory;

use crate::error::{Error, Result};

/// Where the sequences lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gadgets {
    /// `syscall; ret`
    pub(crate) syscall: u64,
    /// A call of rt_sigreturn.
    pub(crate) sigreturn: u64,
}

/// Bytes read at a time.
const CHUNK: usize = 256 << 10;
/// Longest sequence.
const OVERLAP: usize = 16;

/// Where the sequences lie in files that were searched before: device, inode and offsets. Most processes of a
/// tree have one libc.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known(HashMap<((u32, u32), u64), (u64, u64)>);

impl Known {
    /// Searches the executable mappings of a process, which may be running.
    pub(crate) fn find(&mut self, pid: Pid, maps: &[Mapping], memory: &Memory) -> Result<Gadgets> {
        for mapping in maps.iter().filter(|m| m.exec && m.inode != 0) {
            let Some(&(syscall, sigreturn)) = self.0.get(&(mapping.dev, mapping.inode)) else { continue };
            let inside = |offset: u64| {
                let at = mapping.start + offset.checked_sub(mapping.offset)?;
                (at < mapping.end).then_some(at)
            };
            if let (Some(syscall), Some(sigreturn)) = (inside(syscall), inside(sigreturn)) {
                let gadgets = Gadgets { syscall, sigreturn };
                if confirm(gadgets, memory) {
                    return Ok(gadgets);
                }
            }
        }
        let gadgets = find(pid, maps, memory)?;
        let home = |at: u64| maps.iter().find(|m| m.contains(at) && m.inode != 0);
        if let (Some(one), Some(two)) = (home(gadgets.syscall), home(gadgets.sigreturn))
            && (one.dev, one.inode) == (two.dev, two.inode)
        {
            let offsets =
                (gadgets.syscall - one.start + one.offset, gadgets.sigreturn - two.start + two.offset);
            self.0.insert((one.dev, one.inode), offsets);
        }
        Ok(gadgets)
    }
}

fn find(pid: Pid, maps: &[Mapping], memory: &Memory) -> Result<Gadgets> {
    let (mut syscall, mut sigreturn) = (None, None);
    // A small library is a quick search, and any libc will do; the large ones come last.
    let mut code: Vec<&Mapping> =
        maps.iter().filter(|m| m.exec && m.read && m.path != b"[vsyscall]").collect();
    code.sort_by_key(|m| (!is_libc(&m.path), m.end - m.start));
    let mut buffer = vec![0u8; CHUNK + OVERLAP];
    for mapping in code {
        let mut at = mapping.start;
        while at < mapping.end {
            let len = buffer.len().min((mapping.end - at) as usize);
            // A page of a truncated file cannot be read; the rest of the mapping may.
            if memory.read_exact_at(RemoteAddr(at), &mut buffer[..len]).is_ok() {
                let hit = |patterns| position(&buffer[..len], patterns).map(|p| at + p as u64);
                syscall = syscall.or_else(|| hit(arch::SYSCALL_PATTERNS));
                sigreturn = sigreturn.or_else(|| hit(arch::SIGRETURN_PATTERNS));
            }
            if let (Some(syscall), Some(sigreturn)) = (syscall, sigreturn) {
                return Ok(Gadgets { syscall, sigreturn });
            }
            at += CHUNK as u64;
        }
    }
    let what = match (syscall, sigreturn) {
        (None, _) => {
            "no code of it makes a system call and returns, as that of a libc does: only such programs can be dumped"
        }
        _ => {
            "no code of it returns from a signal handler, as that of a libc does: only such programs can be dumped"
        }
    };
    Err(Error::Injection { pid, what: what.into() })
}

/// Whether the sequences are still where they were found.
pub(crate) fn confirm(gadgets: Gadgets, memory: &Memory) -> bool {
    let matches = |at: u64, patterns: &[&[u8]]| {
        patterns.iter().any(|pattern| {
            let mut found = vec![0u8; pattern.len()];
            memory.read_exact_at(RemoteAddr(at), &mut found).is_ok() && found == *pattern
        })
    };
    matches(gadgets.syscall, arch::SYSCALL_PATTERNS) && matches(gadgets.sigreturn, arch::SIGRETURN_PATTERNS)
}

fn is_libc(path: &[u8]) -> bool {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
    name.starts_with(b"libc.") || name.starts_with(b"libc-") || name.starts_with(b"ld-musl")
}

fn position(haystack: &[u8], patterns: &[&[u8]]) -> Option<usize> {
    patterns.iter().filter_map(|pattern| memchr::memmem::find(haystack, pattern)).min()
}
