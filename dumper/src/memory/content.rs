//! Contents of files that an image has in it: of memory files, deleted ones, and shared memory.
//!
//! They are read when the tree stands, by several threads, as private memory is; what the parent of the image has at the
//! same place is not written again ([`super::known`]).

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use torpor_image::extent::{PAGE, Record};
use torpor_image::inode::Inode;
use torpor_image::write::DataFile;
use torpor_kernel::ids::{Pid, RemoteAddr};
use torpor_kernel::memory::Memory;

use super::known::{Known, Pages};
use super::store::{push, store};
use super::{CHUNK, Run, Watch, split, writers};
use crate::collect::Content;
use crate::error::{Error, Result};
use crate::track::runs;
use crate::workers;

/// An inode whose contents are copied.
struct Source<'a> {
    content: &'a Content,
    size: u64,
    /// What the parent has of it.
    known: Option<Pages<'a>>,
}

/// Copies the contents of inodes: all of their data, holes left out. Gives the records of each.
pub(crate) fn copy_inodes(
    pid: Pid,
    all: &[(&Inode, &Content)],
    known: Option<&Known>,
    files: &mut [DataFile],
    watch: &Watch<'_>,
) -> Result<Vec<Vec<Record>>> {
    let mut sources = Vec::with_capacity(all.len());
    let mut runs = Vec::new();
    for (number, (inode, content)) in all.iter().enumerate() {
        let source =
            Source { content, size: inode.size, known: known.and_then(|known| known.of_inode(inode)) };
        let whole = |(start, end): (u64, u64)| Run { space: number, start, end: end.next_multiple_of(PAGE) };
        runs.extend(source.data(pid)?.into_iter().map(whole));
        sources.push(source);
    }
    if runs.is_empty() {
        return Ok(vec![Vec::new(); sources.len()]);
    }
    let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
    let writers = writers(bytes).min(files.len() as u64).max(1);
    let shares = split(&runs, bytes.div_ceil(writers).next_multiple_of(PAGE));
    let mut all = vec![Vec::new(); sources.len()];
    let copy = |(share, file): (&Vec<Run>, &mut DataFile)| copy_share(pid, &sources, share, file, watch);
    for copied in workers::all(shares.iter().zip(files), copy) {
        copied?.into_iter().for_each(|(source, records)| all[source].extend(records));
    }
    Ok(all)
}

fn copy_share(
    pid: Pid,
    sources: &[Source<'_>],
    share: &[Run],
    file: &mut DataFile,
    watch: &Watch<'_>,
) -> Result<Vec<(usize, Vec<Record>)>> {
    let mut all: Vec<(usize, Vec<Record>)> = Vec::new();
    let mut buffer = vec![0u8; CHUNK as usize];
    for run in share {
        let source = &sources[run.space];
        let mut records = Vec::new();
        let mut at = run.start;
        while at < run.end {
            let bytes = &mut buffer[..(run.end - at).min(CHUNK) as usize];
            // Behind the end of a file its last page is zero.
            let inside = source.size.saturating_sub(at).min(bytes.len() as u64);
            let (own, behind) = bytes.split_at_mut(inside as usize);
            source.read(pid, at, own)?;
            behind.fill(0);
            source.store(&mut records, at, bytes, file)?;
            watch.copied(pid, bytes.len() as u64)?;
            at += bytes.len() as u64;
        }
        all.push((run.space, records));
    }
    Ok(all)
}

impl Source<'_> {
    /// Where there is data, from whole pages on.
    fn data(&self, pid: Pid) -> Result<runs::Runs> {
        let mut all = runs::Runs::new();
        match self.content {
            Content::File(fd) => {
                let mut at = 0;
                while at < self.size {
                    // SAFETY: lseek takes numbers only.
                    let data =
                        Errno::result(unsafe { libc::lseek(fd.as_raw_fd(), at as i64, libc::SEEK_DATA) });
                    let start = match data {
                        Ok(data) => data as u64 & !(PAGE - 1),
                        // Nothing but a hole up to the end.
                        Err(Errno::ENXIO) => break,
                        // A file system without this notion: all of it is data.
                        Err(Errno::EINVAL) => at,
                        Err(errno) => return Err(reading(pid, "lseek", errno)),
                    };
                    // SAFETY: as above.
                    let hole = unsafe { libc::lseek(fd.as_raw_fd(), start.max(at) as i64, libc::SEEK_HOLE) };
                    let end = if hole < 0 { self.size } else { (hole as u64).min(self.size) };
                    if start < end {
                        all.push((start, end));
                    }
                    at = end.max(at + 1);
                }
            }
            Content::Attached(_) => all.push((0, self.size)),
            Content::Mapped(_, areas) => {
                all.extend(areas.iter().map(|(_, offset, length)| (*offset, offset + length)));
            }
        }
        Ok(runs::tidy(all))
    }

    /// Fills `bytes` with what lies at `at`.
    fn read(&self, pid: Pid, mut at: u64, mut bytes: &mut [u8]) -> Result<()> {
        let end = at + bytes.len() as u64;
        match self.content {
            Content::File(fd) => {
                while at < end {
                    let got = match nix::sys::uio::pread(fd, bytes, at as i64) {
                        Ok(0) => {
                            return Err(Error::Inconsistent { pid, what: "a file it holds shrinks".into() });
                        }
                        Ok(got) => got,
                        Err(Errno::EINTR) => 0,
                        Err(errno) => return Err(reading(pid, "pread", errno)),
                    };
                    bytes = &mut bytes[got..];
                    at += got as u64;
                }
            }
            Content::Attached(attached) => attached.read(at, bytes),
            Content::Mapped(pid, areas) => {
                let pid = *pid;
                let memory = Memory::open(pid, false).map_err(Error::kernel(pid, "opening its memory"))?;
                while at < end {
                    let has =
                        |(_, offset, length): &&(u64, u64, u64)| (*offset..offset + length).contains(&at);
                    let Some((address, offset, length)) = areas.iter().find(has) else {
                        return Err(Error::Inconsistent { pid, what: "shared memory is unmapped".into() });
                    };
                    let part = (end - at).min(offset + length - at) as usize;
                    let (own, rest) = bytes.split_at_mut(part);
                    memory
                        .read_exact_at(RemoteAddr(address + (at - offset)), own)
                        .map_err(Error::kernel(pid, "reading its shared memory"))?;
                    bytes = rest;
                    at += part as u64;
                }
            }
        }
        Ok(())
    }

    /// Stores whole pages, but for those that the parent has.
    fn store(&self, records: &mut Vec<Record>, at: u64, bytes: &[u8], file: &mut DataFile) -> Result<()> {
        let Some(known) = &self.known else { return store(records, at, bytes, file) };
        // Up to here all is done.
        let mut done = 0;
        for (i, page) in bytes.chunks_exact(PAGE as usize).enumerate() {
            let from = i * PAGE as usize;
            if let Some(record) = known.find(at + from as u64, page) {
                if done < from {
                    store(records, at + done as u64, &bytes[done..from], file)?;
                }
                push(records, record);
                done = from + PAGE as usize;
            }
        }
        if done < bytes.len() {
            store(records, at + done as u64, &bytes[done..], file)?;
        }
        Ok(())
    }
}

fn reading(pid: Pid, call: &'static str, errno: Errno) -> Error {
    Error::kernel(pid, "reading a file it holds")(torpor_kernel::Error::syscall(call, "", errno))
}
