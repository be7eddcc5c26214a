//! Files: those that are found again by their path, and those whose contents go into the image.

use std::os::fd::AsRawFd;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use torpor_image::description::Kind;
use torpor_image::extent::Extents;
use torpor_image::inode::Source;
use torpor_image::{Bytes, InodeId};
use torpor_kernel::fds;

use crate::collect::{Collector, Content, stat_path};
use crate::description::{Found, without_deleted};
use crate::error::{Error, Result};

const MEMFD: &[u8] = b"/memfd:";

/// `/dev/{null,zero,full,random,urandom}`: devices without state (Documentation/admin-guide/devices.txt).
pub(crate) fn is_plain_device(device: u64) -> bool {
    libc::major(device) == 1 && matches!(libc::minor(device), 3 | 5 | 7 | 8 | 9)
}

/// The file of a descriptor.
pub(crate) fn of_descriptor(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
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
    Ok(by_path(collector, &found.title(), &path, &found.stat).map(Kind::File))
}

/// A file that must be found again by `path`; refused when the path leads elsewhere.
pub(crate) fn by_path(
    collector: &mut Collector,
    title: &str,
    path: &Bytes,
    stat: &libc::stat,
) -> Option<InodeId> {
    let leads_back =
        stat_path(path).is_some_and(|now| now.st_dev == stat.st_dev && now.st_ino == stat.st_ino);
    if !leads_back {
        let why = if path.ends_with(b" (deleted)") {
            "its name was removed while another name of the file exists"
        } else {
            "its path leads to another file by now, or to none that torpor can see"
        };
        collector.refuse(title, why, "close it before the dump");
        return None;
    }
    if per_process(path) {
        collector.refuse(
            title,
            "files of /proc about one process cannot be dumped yet",
            "close it before the dump",
        );
        return None;
    }
    Some(collector.add_inode(stat, Source::Path { path: path.clone() }))
}

/// `/proc/PID/...`: its path means another file, or none, after the restore.
fn per_process(path: &[u8]) -> bool {
    path.strip_prefix(b"/proc/").and_then(|rest| rest.first()).is_some_and(u8::is_ascii_digit)
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
