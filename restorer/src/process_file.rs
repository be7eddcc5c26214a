//! Files of /proc about the processes of the image, opened when the threads are there ([`crate::late`]), since they may
//! be about one of them: with torpor's credentials and view of the file system.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use torpor_image::description::{Description, Kind};
use torpor_image::inode::Source;
use torpor_image::{DescriptionId, Image};

use crate::error::{Error, Result};

/// The path of a description's file, if it is one about a process of the image.
pub(crate) fn of(image: &Image, id: DescriptionId) -> Option<Vec<u8>> {
    let Kind::File(inode) = image.objects.descriptions[id.0 as usize].kind else { return None };
    match &image.objects.inodes[inode.0 as usize].source {
        Source::Process { pid, rest } => Some([format!("/proc/{pid}/").as_bytes(), rest].concat()),
        _ => None,
    }
}

/// Opens it.
pub(crate) fn open(what: &str, image: &Image, description: &Description) -> Result<OwnedFd> {
    let path =
        of(image, description.id).ok_or_else(|| Error::open(what, "open")(nix::errno::Errno::ESRCH))?;
    let no = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_NOFOLLOW;
    let flags = OFlag::from_bits_retain(description.flags as i32 & !no | libc::O_CLOEXEC);
    nix::fcntl::open(&*path, flags, nix::sys::stat::Mode::empty()).map_err(Error::open(what, "open"))
}
