//! Addresses of IPv4 and IPv6 sockets: bind(2) and connect(2), with errors that name who is in the way.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use torpor_image::socket::SocketOption;

use crate::error::{Error, Result};
use crate::holder;

/// Binds a socket of `protocol`.
pub(crate) fn bind(what: &str, fd: &OwnedFd, address: SocketAddr, protocol: i32) -> Result<()> {
    try_bind(fd, address).map_err(|errno| conflict(what, Some(address), protocol, "bind", errno))
}

/// Binds a socket.
pub(crate) fn try_bind(fd: &OwnedFd, address: SocketAddr) -> Result<(), Errno> {
    let raw = SockaddrStorage::from(address);
    // SAFETY: a socket address with its length.
    Errno::result(unsafe { libc::bind(fd.as_raw_fd(), raw.as_ptr(), raw.len()) }).map(drop)
}

/// Connects a socket.
pub(crate) fn try_connect(fd: &OwnedFd, address: SocketAddr) -> Result<(), Errno> {
    let raw = SockaddrStorage::from(address);
    // SAFETY: a socket address with its length.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), raw.as_ptr(), raw.len()) }).map(drop)
}

/// The address a socket has.
pub(crate) fn local(fd: &OwnedFd) -> Option<SocketAddr> {
    let storage: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd()).ok()?;
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}

/// A link-local address with the number that its interface has here: that of the device the socket is bound to.
pub(crate) fn scoped(what: &str, address: SocketAddr, options: &[SocketOption]) -> Result<SocketAddr> {
    let device = |o: &&SocketOption| o.level == libc::SOL_SOCKET && o.name == libc::SO_BINDTODEVICE;
    match (address, options.iter().find(device)) {
        (SocketAddr::V6(mut v6), Some(device)) if v6.scope_id() != 0 => {
            let name = device.value.split(|b| *b == 0).next().unwrap_or_default();
            v6.set_scope_id(interface(what, &name.into())?);
            Ok(v6.into())
        }
        _ => Ok(address),
    }
}

/// What an address that cannot be had means.
pub(crate) fn conflict(
    what: &str,
    address: Option<SocketAddr>,
    protocol: i32,
    call: &'static str,
    errno: Errno,
) -> Error {
    match (errno, address) {
        (Errno::EADDRINUSE, Some(address)) => Error::Conflict {
            what: what.to_owned(),
            why: format!("{call}: {errno}: {} holds {address}", holder::of_address(address, protocol)),
            remedy: "stop it, or wait until it is done".into(),
        },
        (Errno::EADDRNOTAVAIL, Some(address)) => Error::Conflict {
            what: what.to_owned(),
            why: format!("{call}: {errno}: this machine has no address {}", address.ip()),
            remedy: "add the address to an interface".into(),
        },
        (Errno::ENETUNREACH | Errno::EHOSTUNREACH, Some(address)) => Error::Conflict {
            what: what.to_owned(),
            why: format!("{call}: {errno}: no way leads to {}", address.ip()),
            remedy: "set up the network as it was".into(),
        },
        (Errno::EACCES, _) => Error::Permission {
            what: what.to_owned(),
            call,
            errno,
            remedy: "run torpor with CAP_NET_BIND_SERVICE",
        },
        _ => Error::Open { what: what.to_owned(), call, errno },
    }
}

/// The number of an interface.
pub(crate) fn interface(what: &str, name: &torpor_image::Bytes) -> Result<u32> {
    let c_name = std::ffi::CString::new(name.0.clone()).unwrap_or_default();
    // SAFETY: the name ends with a zero.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(Error::Conflict {
            what: what.to_owned(),
            why: format!("this machine has no interface `{name}`"),
            remedy: "add it, or rename another".into(),
        }),
        index => Ok(index),
    }
}
