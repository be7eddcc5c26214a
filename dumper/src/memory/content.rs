//! Contents of files that an image has in it: of memory files, deleted ones, and shared memory.

use std::os::fd::AsRawFd;

use torpor_image::extent::{Extents, PAGE};
use torpor_image::write::{DataFile, ImageWriter};
use torpor_kernel::ids::{Pid, RemoteAddr};
use torpor_kernel::memory::Memory;

use super::store::store;
use super::{CHUNK, Watch};
use crate::collect::Content;
use crate::error::{Error, Result};

/// Copies the contents of an inode: all of its data, holes left out.
pub(crate) fn copy_inode(
    pid: Pid,
    content: &Content,
    size: u64,
    file: &mut DataFile,
    writer: &mut ImageWriter,
    watch: &Watch<'_>,
) -> Result<Extents> {
    let mut records = Vec::new();
    match content {
        Content::File(fd) => {
            let fail = |call: &'static str| {
                move |errno| {
                    Error::kernel(pid, "reading a file it holds")(torpor_kernel::Error::syscall(
                        call, "", errno,
                    ))
                }
            };
            let mut buffer = vec![0u8; CHUNK as usize];
            let mut at = 0u64;
            while at < size {
                // SAFETY: lseek takes numbers only.
                let data = unsafe { libc::lseek(fd.as_raw_fd(), at as i64, libc::SEEK_DATA) };
                if data < 0 {
                    match nix::errno::Errno::last() {
                        // Nothing but a hole up to the end.
                        nix::errno::Errno::ENXIO => break,
                        // A file system without this notion: all of it is data.
                        nix::errno::Errno::EINVAL => {}
                        e => return Err(fail("lseek")(e)),
                    }
                }
                let start = if data < 0 { at } else { data as u64 & !(PAGE - 1) };
                // SAFETY: as above.
                let hole = unsafe { libc::lseek(fd.as_raw_fd(), start as i64, libc::SEEK_HOLE) };
                let end = if hole < 0 { size } else { (hole as u64).min(size) };
                at = start;
                while at < end {
                    let want = (end - at).min(CHUNK) as usize;
                    let got =
                        nix::sys::uio::pread(fd, &mut buffer[..want], at as i64).map_err(fail("pread"))?;
                    if got == 0 {
                        return Err(Error::Inconsistent { pid, what: "a file it holds shrinks".into() });
                    }
                    // Records are whole pages: a short read in the middle is taken up again at a page.
                    let whole = if at + (got as u64) < end { got & !(PAGE as usize - 1) } else { got };
                    if whole == 0 {
                        return Err(Error::Inconsistent {
                            pid,
                            what: "a file it holds gives single bytes".into(),
                        });
                    }
                    store(&mut records, at, &buffer[..whole], file)?;
                    watch.copied(pid, whole as u64)?;
                    at += whole as u64;
                }
                at = at.max(end);
            }
        }
        Content::Attached(attached) => {
            let mut buffer = vec![0u8; CHUNK as usize];
            let mut at = 0u64;
            while at < size {
                let bytes = &mut buffer[..(size - at).min(CHUNK) as usize];
                attached.read(at, bytes);
                store(&mut records, at, bytes, file)?;
                watch.copied(pid, bytes.len() as u64)?;
                at += bytes.len() as u64;
            }
        }
        Content::Mapped(pid, areas) => {
            let pid = *pid;
            let mut areas = areas.clone();
            areas.sort_by_key(|a| a.1);
            let memory = Memory::open(pid, false).map_err(Error::kernel(pid, "opening its memory"))?;
            let mut buffer = vec![0u8; CHUNK as usize];
            let mut done = 0u64;
            for (address, offset, length) in areas {
                let skip = done.saturating_sub(offset).min(length);
                let mut at = skip;
                while at < length {
                    let want = (length - at).min(CHUNK);
                    let bytes = &mut buffer[..want as usize];
                    memory
                        .read_exact_at(RemoteAddr(address + at), bytes)
                        .map_err(Error::kernel(pid, "reading its shared memory"))?;
                    store(&mut records, offset + at, bytes, file)?;
                    watch.copied(pid, want)?;
                    at += want;
                }
                done = done.max(offset + length);
            }
        }
    }
    Ok(writer.add_records(&records))
}
