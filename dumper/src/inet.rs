//! tcp(7), one socket: addresses, options, filter. Connections are put together in `tcp` once all sockets are known.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::SockaddrStorage;
use torpor_image::description::Kind;
use torpor_image::inet::InetSocket;
use torpor_image::socket::TCP_OPTIONS;
use torpor_kernel::tcp::{self, state};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::{socket, tcp as connections};

/// linux/tcp.h
const TCP_ULP: i32 = 31;
const TCP_AO_INFO: i32 = 40;
/// Options that mean something else, or cannot be set, once a socket is connected (net/ipv4/tcp.c): the largest
/// segment, the window clamp, and all of fast open are then what was agreed on.
const BEFORE_CONNECT: [i32; 5] = [2, 10, 23, 30, 34];

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    family: i32,
) -> Result<Option<Kind>> {
    let fail = |collector: &Collector| Error::kernel(collector.pid, format!("looking at {}", found.title()));
    let number = found.stat.st_ino as u32;
    let state = tcp::info(fd.as_fd()).map_err(fail(collector))?.state;
    if let Some(protocol) = upper(fd) {
        let why = format!("a TCP connection under {protocol} cannot be dumped: the keys cannot be read");
        collector.refuse(found.title(), why, "close it before the dump");
        return Ok(None);
    }
    let Ok(filter) = socket::filter(fd) else {
        socket::refuse_filter(collector, found);
        return Ok(None);
    };
    let mut options = socket::options_like(collector.tcp.fresh(family), fd, TCP_OPTIONS);
    if state != state::LISTEN && (state != state::CLOSE || connections::is_over(fd)) {
        options.retain(|o| o.level != libc::IPPROTO_TCP || !BEFORE_CONNECT.contains(&o.name));
    }
    let local = local(fd);
    let copy = fd.try_clone().map_err(|e| fail(collector)(torpor_kernel::Error::io("dup", found.fd, &e)))?;
    collector.tcp.add(connections::Socket {
        pid: found.pid,
        fd: copy,
        title: found.title(),
        number,
        state,
        local: local.map(|l| l.0),
        remote: remote(fd).map(|r| r.0),
    });
    Ok(Some(Kind::Inet(InetSocket {
        number,
        family,
        local: local.map(|l| l.0),
        scope: local.map_or(0, |l| l.1),
        options,
        filter: filter.unwrap_or_default(),
        ..InetSocket::default()
    })))
}

/// What a socket's own protocol is wrapped in, as "TLS".
fn upper(fd: &OwnedFd) -> Option<String> {
    if let Some(name) = socket::option(fd, libc::IPPROTO_TCP, TCP_ULP).filter(|name| !name.is_empty()) {
        return Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned());
    }
    socket::option(fd, libc::IPPROTO_TCP, TCP_AO_INFO).map(|_| "TCP-AO".to_owned())
}

/// The address a socket is bound to, and the interface that belongs to it.
fn local(fd: &OwnedFd) -> Option<(SocketAddr, u32)> {
    let storage = nix::sys::socket::getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
    address(&storage).filter(|(a, _)| a.port() != 0 || !a.ip().is_unspecified())
}

/// The peer's address, while there is one.
pub(crate) fn remote(fd: &OwnedFd) -> Option<(SocketAddr, u32)> {
    address(&nix::sys::socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok()?)
}

fn address(storage: &SockaddrStorage) -> Option<(SocketAddr, u32)> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some((SocketAddr::V4((*v4).into()), 0));
    }
    // Compared and written without the interface, which is told apart.
    let v6 = storage.as_sockaddr_in6()?;
    Some((SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()), v6.scope_id()))
}
