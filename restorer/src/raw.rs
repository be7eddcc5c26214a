//! raw(7)

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use torpor_image::raw::RawSocket;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::{address, ip};

pub(crate) fn open(what: &str, raw: &RawSocket) -> Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned(what, "socket", unsafe { libc::socket(raw.family, kind, raw.protocol) });
    let fd = fd.map_err(without_privilege)?;
    ip::before(what, &fd, &raw.settings)?;
    if let Some(local) = raw.local {
        address::bind(what, &fd, local, raw.protocol)?;
    }
    if let Some(peer) = raw.peer {
        address::try_connect(&fd, peer)
            .map_err(|errno| address::conflict(what, Some(peer), raw.protocol, "connect", errno))?;
    }
    ip::after(what, &fd, &raw.settings)?;
    Ok(fd)
}

/// What making a raw or packet socket needs.
pub(crate) fn without_privilege(error: Error) -> Error {
    match error {
        Error::Open { what, call, errno: errno @ (Errno::EPERM | Errno::EACCES) } => {
            Error::Permission { what, call, errno, remedy: "run torpor with CAP_NET_RAW" }
        }
        error => error,
    }
}
