//! System V shared memory.
//!
//! A segment is an inode of a tmpfs of the kernel's own; the areas that map it show its id as their inode number. Each
//! area counts as an attachment (ipc/shm.c, `shm_open`), also the parts of one that mprotect or munmap have split, and
//! so `nattch` is compared with the number of areas.
//!
//! Contents are read through map_files, as from any deleted file. What nobody has attached is attached here for a
//! moment: that changes who attached it last (`shm_lpid`), which is noted before.

use std::fs::File;
use std::os::fd::OwnedFd;

use torpor_image::InodeId;
use torpor_image::extent::Extents;
use torpor_image::inode::Source;
use torpor_image::sysv_shm::Segment;
use torpor_kernel::ids::Pid;
use torpor_kernel::maps::{Kind, Mapping};
use torpor_kernel::sysv;

use crate::collect::{Collector, Content};
use crate::error::{Error, Result};
use crate::freeze;
use crate::sysv::{outsider, permissions, refuse};

/// Device numbers that cannot be any inode's own: for segments nobody has attached.
const NOWHERE: u64 = u64::MAX;

/// The segment that an area maps; `None` when it was refused.
pub(crate) fn mapped(collector: &mut Collector, mapping: &Mapping, title: &str) -> Result<Option<InodeId>> {
    let id = mapping.inode as i32;
    *collector.sysv.attached.entry(id).or_default() += 1;
    let device = libc::makedev(mapping.dev.0, mapping.dev.1);
    if let Some(inode) = collector.known_inode(device, mapping.inode) {
        return Ok(Some(inode));
    }
    let Some(segment) = listed(collector)?.into_iter().find(|s| s.id == id) else {
        collector.refuse(title, "its System V segment is not of torpor's ipc namespace", "detach it");
        return Ok(None);
    };
    let name = if let Kind::SysV(key) = mapping.kind() { key as i32 } else { segment.permissions.key };
    let mut content = None;
    if !collector.live {
        content = Some(match crate::vma::through_map_files(collector, mapping) {
            Ok((file, _)) => Content::File(file),
            Err(_) => attach(collector, &segment)?,
        });
    }
    Ok(Some(add(collector, &segment, name, (device, mapping.inode), content)))
}

/// Segments that the processes of the dump share with others, or have created and left.
pub(crate) fn collect(collector: &mut Collector, members: &[Pid]) -> Result<()> {
    // Listed anew: every area was counted by now.
    collector.sysv.segments = None;
    for segment in listed(collector)? {
        let counted = collector.sysv.attached.get(&segment.id).copied().unwrap_or(0);
        let own = members.contains(&Pid(segment.creator));
        if counted == 0 && !own {
            if members.contains(&Pid(segment.last)) && segment.attached == 0 {
                let creator = segment.creator;
                collector.losses.push(format!(
                    "{}, which it detached: pid {creator}, which made it, is not part of the dump",
                    title(&segment)
                ));
            }
            continue;
        }
        if segment.attached > counted {
            let others = others(members, &segment);
            // On a running process, areas come and go while they are counted.
            if !collector.live || !others.is_empty() {
                let by = if others.is_empty() { "a process outside".to_owned() } else { others.join(", ") };
                refuse(
                    collector,
                    title(&segment),
                    format!("it is also attached by {by}, which is not part of the dump"),
                    "end that process, or let it detach the segment",
                );
            }
            continue;
        }
        if counted == 0 {
            let content = if collector.live { None } else { Some(attach(collector, &segment)?) };
            let key = (NOWHERE, segment.id as u64);
            add(collector, &segment, segment.permissions.key, key, content);
        }
    }
    Ok(())
}

fn listed(collector: &mut Collector) -> Result<Vec<sysv::Segment>> {
    if let Some(all) = &collector.sysv.segments {
        return Ok(all.clone());
    }
    let all = sysv::segments().map_err(Error::kernel(collector.pid, "listing System V segments"))?;
    collector.sysv.segments = Some(all.clone());
    Ok(all)
}

/// "System V segment 7 (key 0x51)"
fn title(segment: &sysv::Segment) -> String {
    format!("System V segment {}", permissions(&segment.permissions).title(segment.id))
}

fn others(members: &[Pid], segment: &sysv::Segment) -> Vec<String> {
    let mut all: Vec<String> = sysv::attached_by(segment.id)
        .into_iter()
        .filter(|pid| !members.contains(pid) && *pid != Pid::this())
        .map(|pid| format!("pid {pid} ({})", freeze::name_of(pid.0)))
        .collect();
    if all.is_empty() {
        all.extend(outsider(members, segment.last, u64::MAX - 1));
    }
    all
}

fn add(
    collector: &mut Collector,
    segment: &sysv::Segment,
    name: i32,
    (device, number): (u64, u64),
    content: Option<Content>,
) -> InodeId {
    // SAFETY: an all-zero stat is a valid one.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_dev = device;
    stat.st_ino = number;
    stat.st_mode = libc::S_IFREG | segment.permissions.mode;
    stat.st_uid = segment.permissions.uid;
    stat.st_gid = segment.permissions.gid;
    stat.st_size = segment.size as i64;
    let kept = Segment {
        id: segment.id,
        permissions: permissions(&segment.permissions),
        name,
        removed: segment.removed,
        locked: segment.locked,
        creator: segment.creator,
        last: segment.last,
    };
    let inode = collector.add_inode(&stat, Source::SysV { segment: kept, content: Extents::default() });
    if let Some(Content::File(file)) = &content
        && is_huge(file)
    {
        refuse(
            collector,
            title(segment),
            "a segment of explicit huge pages (SHM_HUGETLB) cannot be dumped yet".into(),
            "use a segment of ordinary pages",
        );
    }
    collector.contents.extend(content.map(|c| (inode, c)));
    inode
}

/// Attaches a segment to read it, by a descriptor if we may have one: that shows holes.
fn attach(collector: &Collector, segment: &sysv::Segment) -> Result<Content> {
    let doing = format!("reading {}", title(segment));
    let attached =
        sysv::Attached::new(segment.id, segment.size, false).map_err(Error::kernel(collector.pid, doing))?;
    let (start, end) = attached.range();
    Ok(match File::open(format!("/proc/self/map_files/{start:x}-{end:x}")) {
        Ok(file) => Content::File(file.into()),
        Err(_) => Content::Attached(attached),
    })
}

fn is_huge(file: &OwnedFd) -> bool {
    // SAFETY: an all-zero statfs is a valid one to be filled.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `fs` is a statfs of ours.
    let got = unsafe { libc::fstatfs(std::os::fd::AsRawFd::as_raw_fd(file), &raw mut fs) };
    got == 0 && fs.f_type == libc::HUGETLBFS_MAGIC
}
