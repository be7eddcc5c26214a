//! tcp(7): listening sockets and those not connected.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike};
use torpor_image::inet::InetSocket;
use torpor_image::socket::SocketOption;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::{holder, socket};

pub(crate) fn open(what: &str, inet: &InetSocket) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned(what, "socket", unsafe { libc::socket(inet.family, kind, libc::IPPROTO_TCP) })?;
    socket::set(what, &fd, &inet.options)?;
    if let Some(address) = inet.local {
        // Connections of the dumped process may linger in TIME_WAIT on this port.
        socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        bind(what, &fd, address)?;
        let reuse = |o: &SocketOption| o.level == libc::SOL_SOCKET && o.name == libc::SO_REUSEADDR;
        if !inet.options.iter().any(reuse) {
            socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0);
        }
    }
    if let Some(backlog) = inet.listening {
        // SAFETY: listen takes numbers only.
        if unsafe { libc::listen(fd.as_raw_fd(), backlog as i32) } != 0 {
            return Err(conflict(what, inet.local, "listen", Errno::last()));
        }
    }
    Ok(fd)
}

fn bind(what: &str, fd: &OwnedFd, address: SocketAddr) -> Result<()> {
    let bound = match address {
        SocketAddr::V4(v4) => {
            let raw = SockaddrIn::from(v4);
            // SAFETY: a socket address with its length.
            unsafe { libc::bind(fd.as_raw_fd(), raw.as_ptr(), raw.len()) }
        }
        SocketAddr::V6(v6) => {
            let raw = SockaddrIn6::from(v6);
            // SAFETY: a socket address with its length.
            unsafe { libc::bind(fd.as_raw_fd(), raw.as_ptr(), raw.len()) }
        }
    };
    if bound == 0 { Ok(()) } else { Err(conflict(what, Some(address), "bind", Errno::last())) }
}

fn conflict(what: &str, address: Option<SocketAddr>, call: &'static str, errno: Errno) -> Error {
    match (errno, address) {
        (Errno::EADDRINUSE, Some(address)) => Error::Conflict {
            what: what.to_owned(),
            why: format!("{call}: {errno}: {} holds {address}", holder::of_port(address)),
            remedy: "stop it, or wait until it is done".into(),
        },
        (Errno::EADDRNOTAVAIL, Some(address)) => Error::Conflict {
            what: what.to_owned(),
            why: format!("{call}: {errno}: this machine has no address {}", address.ip()),
            remedy: "add the address to an interface".into(),
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
