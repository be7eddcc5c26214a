//! Files: those that are found again by their path, and those whose contents go into the image.

use std::os::fd::AsRawFd;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use torpor_image::description::Kind;
use torpor_image::extent::Extents;
use torpor_image::inode::Source;
use torpor_image::{Bytes, InodeId};
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;

use crate::collect::{Collector, Content, stat_path};
use crate::description::{Found, without_deleted};
use crate::error::{Error, Result};
use crate::scratch;

const MEMFD: &[u8] = b"/memfd:";

/// `/dev/{null,zero,full,random,urandom}`: devices without state (Documentation/admin-guide/devices.txt).
pub(crate) fn is_plain_device(device: u64) -> bool {
    libc::major(device) == 1 && matches!(libc::minor(device), 3 | 5 | 7 | 8 | 9)
}

/// The file of a descriptor.
pub(crate) fn of_descriptor(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let kind = inode(collector, found)?;
    if let Some(Kind::File(id)) = kind {
        scratch::opened(collector, id, found.info.flags);
    }
    Ok(kind)
}

fn inode(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    if let Some(id) = collector.known_inode(found.stat.st_dev, found.stat.st_ino) {
        return Ok(Some(Kind::File(id)));
    }
    let path = Bytes::from(found.link.as_slice());
    if let Some(name) = path.strip_prefix(MEMFD) {
        return memfd(collector, found, &without_deleted(name)).map(|id| id.map(Kind::File));
    }
    if found.file_type() == SFlag::S_IFREG && found.stat.st_nlink == 0 {
        let content = fds::open(collector.pid, found.fd, OFlag::O_RDONLY | OFlag::O_CLOEXEC)
            .map_err(Error::kernel(collector.pid, format!("opening {}", found.title())))?;
        let source = Source::Deleted { path: without_deleted(&path), content: Extents::default() };
        let id = collector.add_inode(&found.stat, source);
        collector.contents.push((id, Content::File(content)));
        return Ok(Some(Kind::File(id)));
    }
    if collector.live && moves(found) {
        return Ok(None);
    }
    Ok(by_path(collector, &found.title(), &path, &found.stat).map(Kind::File))
}

/// Whether the name of a file is being changed by a running program, or its descriptor is closed by now: where it leads to
/// is told by the frozen one.
fn moves(found: &Found) -> bool {
    let mut link = found.link.clone();
    for _ in 0..3 {
        if stat_path(&link[..].into()).is_some_and(|now| same(&now, &found.stat)) {
            return false;
        }
        match fds::readlink(found.pid, found.fd) {
            Ok(now) if now == link => return false,
            Ok(now) => link = now,
            Err(_) => return true,
        }
    }
    true
}

/// A file that must be found again by `path`; refused when the path leads elsewhere.
pub(crate) fn by_path(
    collector: &mut Collector,
    title: &str,
    path: &Bytes,
    stat: &libc::stat,
) -> Option<InodeId> {
    let leads_back = |path: &Bytes| stat_path(path).is_some_and(|now| same(&now, stat));
    let found = if leads_back(path) { Some(path.clone()) } else { other_name(path, stat) };
    let Some(path) = &found else {
        let (why, remedy) = if path.first() != Some(&b'/') && path.ends_with(b"]") {
            // fs/nsfs.c: "net:[4026531840]"
            ("it stands for a namespace, and namespaces cannot be dumped yet", "close it before the dump")
        } else if stat.st_mode & libc::S_IFMT == libc::S_IFDIR && path.ends_with(b" (deleted)") {
            ("it is a directory that was removed", "close it before the dump")
        } else if path.ends_with(b" (deleted)") {
            (
                "its name was removed, and another name that it has is not in the same directory",
                "close or unmap it before the dump, or give it a name where the old one was (`ln`)",
            )
        } else {
            (
                "its path leads to another file by now, as under a mount or in one that is attached nowhere, or to none \
                 that torpor can see",
                "close or unmap it before the dump, or undo that mount",
            )
        };
        collector.refuse(title, why, remedy);
        return None;
    };
    if let Some((pid, rest)) = per_process(path) {
        if !collector.is_member(pid.0) {
            let why = format!(
                "files of /proc about a process that is not part of the dump (pid {pid}, {}) cannot be dumped",
                crate::freeze::name_of(pid.0)
            );
            collector.refuse(title, why, "close it before the dump");
            return None;
        }
        let source = Source::Process { pid: torpor_image::Pid(pid.0), rest: rest.into() };
        return Some(collector.add_inode(stat, source));
    }
    Some(collector.add_inode(stat, Source::Path { path: path.clone() }))
}

fn same(a: &libc::stat, b: &libc::stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// Another name of a file whose own was removed or taken: the kernel shows the name by which it was opened
/// (fs/d_path.c), and no others. They are looked for where that one was; all else would be a search of the disk.
fn other_name(path: &[u8], stat: &libc::stat) -> Option<Bytes> {
    if stat.st_nlink == 0 || stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return None;
    }
    let path = without_deleted(path);
    std::fs::read_dir(path.path().parent()?).ok()?.flatten().find_map(|entry| {
        use std::os::unix::fs::DirEntryExt;
        let name = Bytes::from(entry.path().as_os_str().as_encoded_bytes());
        let is_it = entry.ino() == stat.st_ino
            && nix::sys::stat::lstat(name.path()).is_ok_and(|now| same(&now, stat));
        is_it.then_some(name)
    })
}

/// `/proc/PID/...`: the process, and what follows it. Its path means another file until that process is there again.
fn per_process(path: &[u8]) -> Option<(Pid, &[u8])> {
    let path = path.strip_prefix(b"/proc/")?;
    let (pid, rest) = path.split_at(path.iter().position(|b| *b == b'/').unwrap_or(path.len()));
    let pid = std::str::from_utf8(pid).ok()?.parse().ok()?;
    Some((Pid(pid), rest.strip_prefix(b"/").unwrap_or(rest)))
}

fn memfd(collector: &mut Collector, found: &Found, name: &Bytes) -> Result<Option<InodeId>> {
    let fd = found.get(collector)?;
    // SAFETY: F_GET_SEALS takes and fills nothing.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        collector.refuse(found.title(), "its seals cannot be read", "close it before the dump");
        return Ok(None);
    }
    // SAFETY: an all-zero statfs is a valid one to be filled.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `fs` is a statfs of ours.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut fs) } == 0 && fs.f_type == libc::HUGETLBFS_MAGIC {
        collector.refuse(
            found.title(),
            "a memfd of huge pages cannot be dumped yet",
            "close it before the dump",
        );
        return Ok(None);
    }
    let content = fds::open(collector.pid, found.fd, OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .map_err(Error::kernel(collector.pid, format!("opening {}", found.title())))?;
    let source = Source::Memfd { name: name.clone(), seals: seals as u32, content: Extents::default() };
    let id = collector.add_inode(&found.stat, source);
    collector.contents.push((id, Content::File(content)));
    Ok(Some(id))
}
