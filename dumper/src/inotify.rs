//! inotify(7), from fdinfo.
//!
//! fdinfo names what is watched by a file handle. It is opened by that where the privilege is there
//! (open_by_handle_at wants CAP_DAC_READ_SEARCH), and its path read from /proc/self/fd.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::inode::Source;
use torpor_image::inotify::{Inotify, Watch};
use torpor_kernel::fdinfo::InotifyWatch;
use torpor_kernel::{fds, mountinfo, process};

use crate::collect::{Collector, stat_path};
use crate::description::Found;
use crate::error::{Error, Result};
use crate::opened::Opened;

/// Largest file handle (linux/exportfs.h, `MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;

/// `struct file_handle`
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    watches: &[InotifyWatch],
) -> Result<Option<Kind>> {
    let mounts =
        mountinfo::mountinfo(collector.pid).map_err(Error::kernel(collector.pid, "reading its mounts"))?;
    let mut kept = Vec::with_capacity(watches.len());
    for watch in watches {
        let path = mounts
            .iter()
            .filter(|m| m.dev == (watch.sdev >> 20, watch.sdev & 0xf_ffff))
            .find_map(|m| open_watched(watch, &m.mount_point))
            .or_else(|| near_by(collector, watch));
        let Some(path) = path else {
            collector.refuse(
                found.title(),
                format!(
                    "watch {} is on inode {} of {}, of which no path is found: it was removed while it is open, or may \
                     not be looked for",
                    watch.wd,
                    watch.ino,
                    file_system(&mounts, watch)
                ),
                "let the program remove the watch before the dump (inotify_rm_watch), or run torpor as root",
            );
            return Ok(None);
        };
        kept.push(Watch { descriptor: watch.wd, mask: watch.mask, path });
    }
    kept.sort_by_key(|w| w.descriptor);
    let queued = queued(&found.get(collector)?);
    if queued > 0 && !collector.live {
        collector.lose(format!("{}: {queued} bytes of events that were not read", found.title()));
    }
    Ok(Some(Kind::Inotify(Inotify { watches: kept })))
}

/// "the file system at `/home`"
fn file_system(mounts: &[mountinfo::Mount], watch: &InotifyWatch) -> String {
    let device = (watch.sdev >> 20, watch.sdev & 0xf_ffff);
    match mounts.iter().find(|m| m.dev == device) {
        Some(mount) => format!("the file system at `{}`", String::from_utf8_lossy(&mount.mount_point)),
        None => format!("device {}:{}", device.0, device.1),
    }
}

/// The path of a watched inode, through any mount of its file system.
fn open_watched(watch: &InotifyWatch, mount_point: &[u8]) -> Option<Bytes> {
    let handle = watch.handle.as_ref()?;
    let mut raw = Handle { bytes: handle.bytes.len() as u32, kind: handle.kind, handle: [0; MAX_HANDLE] };
    raw.handle.get_mut(..handle.bytes.len())?.copy_from_slice(&handle.bytes);
    let mount = std::fs::File::open(Bytes::from(mount_point).path()).ok()?;
    // SAFETY: `raw` is a struct file_handle with room for what its length says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut raw,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: a descriptor just opened, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let link = nix::fcntl::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str()).ok()?;
    let path = Bytes(std::os::unix::ffi::OsStringExt::into_vec(link));
    (stat_path(&path)?.st_ino == watch.ino).then_some(path)
}

/// The path of a watched inode among those that the process is known to use: without the privilege to open
/// handles. What a program watches is as a rule its working directory, or holds files that it has open.
fn near_by(collector: &Collector, watch: &InotifyWatch) -> Option<Bytes> {
    let device = libc::makedev(watch.sdev >> 20, watch.sdev & 0xf_ffff);
    let cwd = process::cwd(collector.pid).ok().map(Bytes);
    let open = collector.objects.inodes.iter().filter_map(|inode| match &inode.source {
        Source::Path { path } | Source::Deleted { path, .. } => Some(path.clone()),
        _ => None,
    });
    cwd.into_iter().chain(open).find_map(|path| {
        path.path().ancestors().find_map(|dir| {
            let dir = Bytes::from(dir.as_os_str().as_encoded_bytes());
            let stat = stat_path(&dir)?;
            (stat.st_ino == watch.ino && stat.st_dev == device).then_some(dir)
        })
    })
}

/// Bytes of events that were not read.
fn queued(fd: &OwnedFd) -> i32 {
    let mut queued = 0i32;
    // SAFETY: FIONREAD fills an int.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    queued
}

/// Whether a process has events that it has not read yet, and that a dump would lose.
pub(crate) fn unread(opened: &Opened) -> bool {
    let mut all = opened.fds.iter().filter(|(_, link)| link == b"anon_inode:inotify").peekable();
    if all.peek().is_none() {
        return false;
    }
    let Ok(pidfd) = fds::pidfd_open(opened.pid) else { return false };
    all.any(|(fd, _)| fds::getfd(pidfd.as_fd(), *fd).is_ok_and(|fd| queued(&fd) > 0))
}
