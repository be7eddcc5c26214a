//! inotify(7)

use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::inotify::{Inotify, Watch};

use crate::description::owned;
use crate::error::{Error, Result};

/// linux/inotify.h: `_IOW('I', 0, __s32)`
const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
/// What fdinfo shows beyond what inotify_add_watch takes.
const IN_ALL: u32 = 0xfff;
const IN_FLAGS: u32 = libc::IN_ONESHOT | libc::IN_EXCL_UNLINK | libc::IN_DONT_FOLLOW;

pub(crate) fn open(what: &str, inotify: &Inotify) -> Result<OwnedFd> {
    // SAFETY: inotify_init1 takes a number only.
    let fd = owned(what, "inotify_init1", unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    let mut next = 1;
    for watch in &inotify.watches {
        next = add(what, &fd, watch, next)?;
    }
    Ok(fd)
}

/// Adds a watch under its descriptor; `next` is the one the kernel would give.
fn add(what: &str, fd: &OwnedFd, watch: &Watch, next: i32) -> Result<i32> {
    let wanted = watch.descriptor;
    let path = std::ffi::CString::new(watch.path.0.clone()).map_err(|_nul| Error::Conflict {
        what: what.to_owned(),
        why: "a watched path has a zero byte in it".into(),
        remedy: "the image is damaged".into(),
    })?;
    let mask = watch.mask & (IN_ALL | IN_FLAGS);
    if wanted > next {
        // SAFETY: this request takes the number itself as its argument.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, libc::c_long::from(wanted)) };
        if set != 0 {
            return Err(Error::last(what, "ioctl(INOTIFY_IOC_SETNEXTWD)"));
        }
    }
    // SAFETY: the path ends with a zero.
    let got = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
    if got < 0 {
        let errno = nix::errno::Errno::last();
        return Err(Error::Conflict {
            what: what.to_owned(),
            why: format!("`{}` cannot be watched again ({errno})", watch.path),
            remedy: "put back what was at that path".into(),
        });
    }
    if got != wanted {
        return Err(Error::Conflict {
            what: what.to_owned(),
            why: format!("watch {wanted} on `{}` came out as {got}", watch.path),
            remedy: "two paths lead to one file by now; put back what was there".into(),
        });
    }
    Ok(wanted + 1)
}
