//! signalfd(2)

use std::os::fd::OwnedFd;

use torpor_image::signalfd::SignalFd;

use crate::description::owned;
use crate::error::Result;

pub(crate) fn open(what: &str, signalfd: &SignalFd) -> Result<OwnedFd> {
    // SAFETY: signalfd4 reads a mask of eight bytes; libc's wrapper would give it its own, longer type.
    let fd = unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const signalfd.mask, 8, libc::SFD_CLOEXEC) as i32
    };
    owned(what, "signalfd4", fd)
}
