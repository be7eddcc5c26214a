//! System V shared memory: segments are made and filled outside; every task attaches its own by id.
//!
//! A segment that was marked removed is marked at once: attached here, it stays until the tasks have it, and a task
//! can attach it by its id nevertheless (shmat(2), Linux). So a restore that dies leaves none behind.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use torpor_image::extent::{Extents, Where};
use torpor_image::inode::{Inode, Source};
use torpor_image::sysv_shm::Segment;
use torpor_image::vma::{Mapping, Vma};
use torpor_image::{Image, InodeId};
use torpor_kernel::sysv::{self, Attached};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::pipe::io;
use crate::sysv::{Class, Found, create, find};
use crate::vma::{self, Begin};

const PAGE: u64 = 4096;

/// Makes the segment of an inode, or finds it.
pub(crate) fn make(opener: &mut Opener<'_>, inode: &Inode) -> Result<()> {
    let Source::SysV { segment, content } = &inode.source else { return Ok(()) };
    let what = inode.name();
    let mut permissions = segment.permissions;
    let all = sysv::segments().map_err(Error::kernel(what.as_str()))?;
    let found: Vec<Found> = all
        .iter()
        .map(|s| Found {
            id: s.id,
            key: s.permissions.key,
            creator: (s.permissions.cuid, s.permissions.cgid),
            fits: s.size == inode.size && s.attached == 0,
            pids: match s.attached {
                1.. if s.id == segment.id => sysv::attached_by(s.id).into_iter().map(|pid| pid.0).collect(),
                _ => vec![s.creator, s.last],
            },
            changed: s.changed,
        })
        .collect();
    if find(opener, &what, segment.id, &permissions, &found)? {
        // Attached later, torpor would be who did so last.
        let attached = attach(&what, inode)?;
        let (start, end) = attached.range();
        let map = format!("/proc/self/map_files/{start:x}-{end:x}");
        opener.sysv.stale_segments.push((inode.id, OpenOptions::new().read(true).write(true).open(map).ok()));
        drop(attached);
        if let Some(now) = all.iter().find(|s| s.id == segment.id) {
            settle(&what, segment, Some(now))?;
        }
        return Ok(());
    }
    if segment.removed && !found.iter().any(|f| f.key == segment.name) {
        // What memory maps show of it.
        permissions.key = segment.name;
    }
    let (size, key) = (inode.size as usize, permissions.key);
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (permissions.mode & 0o777) as i32;
    create(opener, &what, Class::Segment, (segment.id, segment.creator), &permissions, || {
        // SAFETY: shmget takes numbers only.
        unsafe { libc::shmget(key, size, flags) }
    })?;
    opener.sysv.segments.push(segment.id);
    let attached = attach(&what, inode)?;
    fill(opener, &what, &Target::Attached(&attached), inode.size, *content)?;
    if segment.removed {
        // SAFETY: removes by id what was made here.
        if unsafe { libc::shmctl(segment.id, libc::IPC_RMID, std::ptr::null_mut()) } != 0 {
            return Err(Error::last(&what, "shmctl(IPC_RMID)"));
        }
        opener.sysv.segments.pop();
        opener.sysv.attached.push(attached);
    }
    settle(&what, segment, None)
}

/// Gives a segment that was found its contents.
pub(crate) fn refill(opener: &Opener<'_>, id: InodeId, file: Option<File>) -> Result<()> {
    let inode = &opener.image.objects.inodes[id.0 as usize];
    let (what, content) = (inode.name(), inode.content().unwrap_or_default());
    let Some(file) = file else {
        let attached = attach(&what, inode)?;
        return fill(opener, &what, &Target::Attached(&attached), inode.size, content);
    };
    fill(opener, &what, &Target::File(&file), inode.size, content)
}

/// What is filled.
enum Target<'a> {
    Attached(&'a Attached),
    File(&'a File),
}

impl Target<'_> {
    fn write(&self, at: u64, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Target::Attached(attached) => {
                attached.write(at, bytes);
                Ok(())
            }
            Target::File(file) => file.write_all_at(bytes, at),
        }
    }

    /// Makes a hole, or writes zeros where none can be made.
    fn clear(&self, from: u64, end: u64) -> std::io::Result<()> {
        if from >= end {
            return Ok(());
        }
        let length = end - from;
        let holed = match self {
            // SAFETY: pages of the segment, which is attached here; MADV_REMOVE makes a hole of them.
            Target::Attached(attached) => unsafe {
                let start = attached.range().0 + from;
                libc::madvise(start as *mut _, length as usize, libc::MADV_REMOVE)
            },
            // SAFETY: takes numbers only.
            Target::File(file) => unsafe {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                libc::fallocate(file.as_raw_fd(), mode, from as i64, length as i64)
            },
        };
        let mut at = from;
        while holed != 0 && at < end {
            let length = (end - at).min(PAGE);
            self.write(at, &[0; PAGE as usize][..length as usize])?;
            at += length;
        }
        Ok(())
    }
}

fn attach(what: &str, inode: &Inode) -> Result<Attached> {
    let id = inode.segment().map_or(-1, |s| s.id);
    Attached::new(id, inode.size, true).map_err(Error::kernel(what))
}

/// Owner, mode and lock, where they are not right.
fn settle(what: &str, segment: &Segment, now: Option<&sysv::Segment>) -> Result<()> {
    let wanted = &segment.permissions;
    let is = now.map_or((wanted.cuid, wanted.cgid, wanted.mode), |s| {
        (s.permissions.uid, s.permissions.gid, s.permissions.mode)
    });
    // SAFETY: an all-zero shmid_ds is one to be filled; IPC_STAT fills it, IPC_SET reads it, and the lock takes
    // numbers only.
    unsafe {
        if is != (wanted.uid, wanted.gid, wanted.mode) {
            let mut status: libc::shmid_ds = std::mem::zeroed();
            status.shm_perm.uid = wanted.uid;
            status.shm_perm.gid = wanted.gid;
            status.shm_perm.mode = wanted.mode as _;
            if libc::shmctl(segment.id, libc::IPC_SET, &raw mut status) != 0 {
                return Err(Error::last(what, "shmctl(IPC_SET)"));
            }
        }
        if segment.locked != now.is_some_and(|s| s.locked) {
            let command = if segment.locked { libc::SHM_LOCK } else { libc::SHM_UNLOCK };
            if libc::shmctl(segment.id, command, std::ptr::null_mut()) != 0 {
                return Err(Error::last(what, "shmctl(SHM_LOCK)"));
            }
        }
    }
    Ok(())
}

/// Writes the contents of the image; what is not in it becomes zero, without touching what is zero already.
fn fill(opener: &Opener<'_>, what: &str, to: &Target<'_>, size: u64, content: Extents) -> Result<()> {
    let fail = |call| move |e: std::io::Error| io(what, call, &e);
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0;
    for record in opener.image.records(content).iter().filter(|r| r.place == Where::Data) {
        to.clear(at, record.address).map_err(fail("write"))?;
        let from = opener.image.data(record.file)?;
        // The last page is whole in the image and may be less in the segment.
        let length = record.length.min(size.saturating_sub(record.address));
        let mut done = 0;
        while done < length {
            let part = &mut buffer[..(length - done).min(1 << 20) as usize];
            from.read_exact_at(part, record.offset + done)?;
            to.write(record.address + done, part).map_err(fail("write"))?;
            done += part.len() as u64;
            if let Some(progress) = opener.progress {
                progress(part.len() as u64);
            }
        }
        at = record.address + record.length;
    }
    to.clear(at, size.next_multiple_of(PAGE)).map_err(fail("write"))
}

/// Plans how a task attaches its segments: those of `areas`.
pub(crate) fn plan(script: &mut Script, image: &Image, areas: &[&Vma], begin: Begin<'_>, scratch: u64) {
    // Others are inherited.
    let new: Vec<&Vma> = areas.iter().copied().filter(|v| begin.kept(v).is_none()).collect();
    let mut rest: &[&Vma] = &new;
    let mut parts: Vec<(InodeId, bool, Vec<&Vma>)> = Vec::new();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        let Mapping::Shared { inode: id, offset, may_write } = first.mapping else { continue };
        let inode = &image.objects.inodes[id.0 as usize];
        let Some(segment) = inode.segment() else { continue };
        // As many areas as follow one another in the segment as in memory.
        let (mut end, mut count) = (first.end, 0);
        for vma in after {
            let follows = matches!(vma.mapping, Mapping::Shared { inode, offset: o, may_write: w }
                if inode == id && w == may_write && o == offset + (vma.start - first.start));
            if !follows || vma.start != end {
                break;
            }
            end = vma.end;
            count += 1;
        }
        if offset == 0 && end - first.start == inode.size.next_multiple_of(PAGE) {
            attach_at(script, vma::title(first, image), segment.id, first.start, may_write);
            rest = &after[count..];
            continue;
        }
        match parts.iter_mut().find(|(i, w, _)| (*i, *w) == (id, may_write)) {
            Some((.., all)) => all.push(first),
            None => parts.push((id, may_write, vec![first])),
        }
    }
    // Where parts are missing by now, another area may lie: attached elsewhere, each part is made a second view
    // (`mremap` with an old size of 0, mremap(2)).
    for (id, may_write, areas) in parts {
        let inode = &image.objects.inodes[id.0 as usize];
        let Some(segment) = inode.segment() else { continue };
        attach_at(script, inode.name(), segment.id, scratch, may_write);
        for vma in areas {
            let Mapping::Shared { offset, .. } = vma.mapping else { continue };
            let (from, flags) = (scratch + offset, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
            let args = [from.into(), Value::Number(0), vma.len().into(), flags.into(), vma.start.into()];
            script.call_for(vma::title(vma, image), libc::SYS_mremap, &args, vma.start as i64);
        }
        call!(script, inode.name(), libc::SYS_munmap, scratch, inode.size.next_multiple_of(PAGE));
    }
}

fn attach_at(script: &mut Script, title: String, id: i32, start: u64, may_write: bool) {
    let flags = if may_write { 0 } else { libc::SHM_RDONLY };
    let args = [id.into(), start.into(), flags.into()];
    script.call_for(title, libc::SYS_shmat, &args, start as i64);
}

/// The protection that `shmat` gives.
pub(crate) fn made_with(may_write: bool) -> u32 {
    (libc::PROT_READ | if may_write { libc::PROT_WRITE } else { 0 }) as u32
}

/// Room that attaching parts of segments needs.
pub(crate) fn scratch(image: &Image) -> u64 {
    let sizes = image.objects.inodes.iter().filter(|i| i.segment().is_some()).map(|i| i.size);
    sizes.map(|size| size.next_multiple_of(PAGE)).max().unwrap_or(0)
}
