//! Reading memory of another process, each piece in the better way.

use std::fs::File;
use std::os::unix::fs::FileExt;

use torpor_image::extent::PAGE;
use torpor_kernel::ids::{Pid, RemoteAddr};
use torpor_kernel::memory::{self, Memory};

use super::{CHUNK, Run};
use crate::error::{Error, Result};

/// Runs shorter than this are read many at a time.
const SHORT: u64 = 64 << 10;
/// How many (uio.h, `UIO_MAXIOV` is 1,024).
const PIECES: usize = 512;

/// Groups runs that follow each other: short ones up to a chunk in all, long ones alone.
pub(super) fn batches(runs: &[Run]) -> impl Iterator<Item = &[Run]> {
    let (mut bytes, mut count) = (0, 0);
    runs.chunk_by(move |a, b| {
        let length = |r: &Run| r.end - r.start;
        if bytes == 0 {
            (bytes, count) = (length(a), 1);
        }
        let together = length(a) < SHORT
            && length(b) < SHORT
            && a.space == b.space
            && bytes + length(b) <= CHUNK
            && count < PIECES;
        (bytes, count) = if together { (bytes + length(b), count + 1) } else { (0, 0) };
        together
    })
}

/// Reads memory of a stopped process.
pub(super) struct Reader<'a> {
    pub(super) pid: Pid,
    memory: Memory,
    pagemap: File,
    /// Where all pages are known to be of this process alone.
    unshared: &'a [(u64, u64)],
}

/// Bits of an entry of /proc/PID/pagemap: present, and of this process alone
/// (Documentation/admin-guide/mm/pagemap.rst).
const OWN: u64 = 1 << 63 | 1 << 56;

impl<'a> Reader<'a> {
    pub(super) fn open(pid: Pid, unshared: &'a [(u64, u64)]) -> Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(|e| {
            Error::kernel(pid, "opening its pagemap")(torpor_kernel::Error::io("open", "pagemap", &e))
        })?;
        let memory = Memory::open(pid, false).map_err(Error::kernel(pid, "opening its memory"))?;
        Ok(Reader { pid, memory, pagemap, unshared })
    }

    /// Fills `bytes` from `address`, chunk by chunk in the better way for each.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let mut at = address;
        for chunk in bytes.chunks_mut(CHUNK as usize) {
            let read = self.own(at, chunk.len())
                && memory::process_vm_read(self.pid, RemoteAddr(at), chunk).is_ok_and(|n| n == chunk.len());
            if !read {
                self.memory
                    .read_exact_at(RemoteAddr(at), chunk)
                    .map_err(Error::kernel(self.pid, "reading its memory"))?;
            }
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// Whether every page of a range is of this process alone, and there. Only ranges of pages that are there are asked about.
    fn own(&self, address: u64, length: usize) -> bool {
        let next = self.unshared.partition_point(|(start, _)| *start <= address);
        if self.unshared[..next].last().is_some_and(|(_, end)| *end >= address + length as u64) {
            return true;
        }
        let mut entries = [0u8; (CHUNK / PAGE * 8) as usize];
        let entries = &mut entries[..length / PAGE as usize * 8];
        self.pagemap.read_exact_at(entries, address / PAGE * 8).is_ok()
            && entries.as_chunks::<8>().0.iter().all(|e| u64::from_ne_bytes(*e) & OWN == OWN)
    }

    /// Reads runs of the process into `room`, one behind the other. `scattered`: short ones together, though that makes a
    /// copy of pages that are shared copy-on-write.
    pub(super) fn read_runs(&self, runs: &[Run], mut room: &mut [u8], scattered: bool) -> Result<()> {
        for batch in batches(runs) {
            let bytes: u64 = batch.iter().map(|r| r.end - r.start).sum();
            let (mut part, rest) = room.split_at_mut(bytes as usize);
            room = rest;
            if scattered && batch.len() > 1 {
                let pieces: Vec<(RemoteAddr, usize)> =
                    batch.iter().map(|r| (RemoteAddr(r.start), (r.end - r.start) as usize)).collect();
                if memory::process_vm_read_pieces(self.pid, &pieces, part).is_ok_and(|n| n as u64 == bytes) {
                    continue;
                }
            }
            for run in batch {
                let (one, rest) = part.split_at_mut((run.end - run.start) as usize);
                self.read(run.start, one)?;
                part = rest;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_runs_are_read_together() {
        let run = |start: u64, pages: u64| Run { space: 0, start, end: start + pages * PAGE };
        let runs = [run(0, 1), run(8192, 2), run(1 << 20, 100), run(3 << 20, 1), run(4 << 20, 1)];
        let counts: Vec<usize> = batches(&runs).map(<[Run]>::len).collect();
        assert_eq!(counts, [2, 1, 2]);
        let many: Vec<Run> = (0..1300).map(|i| run(i * 8192, 1)).collect();
        assert!(batches(&many).all(|b| b.len() <= 256));
        assert_eq!(batches(&many).map(<[Run]>::len).sum::<usize>(), 1300);
    }
}
