//! eventfd(2)

use std::os::fd::OwnedFd;

use torpor_image::eventfd::EventFd;

use crate::description::owned;
use crate::error::{Error, Result};

pub(crate) fn open(what: &str, eventfd: &EventFd) -> Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | if eventfd.semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: eventfd takes numbers only.
    let fd = owned(what, "eventfd", unsafe { libc::eventfd(0, flags) })?;
    if eventfd.count > 0 {
        // The initial value of eventfd(2) has 32 bits, the counter 64.
        nix::unistd::write(&fd, &eventfd.count.to_ne_bytes()).map_err(Error::open(what, "write"))?;
    }
    Ok(fd)
}
