//! tcp(7): listening sockets and those not connected yet.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::SockaddrStorage;
use torpor_image::description::Kind;
use torpor_image::inet::InetSocket;
use torpor_image::socket::TCP_OPTIONS;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::socket;

/// net/tcp_states.h
const LISTEN: u8 = 10;
const CLOSE: u8 = 7;

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    family: i32,
) -> Result<Option<Kind>> {
    let number = found.stat.st_ino as u32;
    let diag = collector.inet_socket(number)?;
    if let Some(d) = &diag
        && d.state != LISTEN
        && d.state != CLOSE
    {
        let why = format!("a TCP connection from {} to {} cannot be dumped yet", d.local, d.remote);
        collector.refuse(found.title(), why, "close the connection before the dump");
        return Ok(None);
    }
    // Not listed: never connected, or a connection that was reset, or of another network namespace.
    if diag.is_none() && !is_new(fd) {
        let why = "what is left of a TCP connection cannot be dumped yet";
        collector.refuse(found.title(), why, "close it before the dump");
        return Ok(None);
    }
    let listening = diag.as_ref().filter(|d| d.state == LISTEN);
    if let Some(d) = listening
        && d.rqueue > 0
    {
        let why = format!("{} connections to {} wait to be accepted", d.rqueue, d.local);
        collector.refuse(found.title(), why, "try again once the program has accepted them");
        return Ok(None);
    }
    if socket::filter_length(fd) > 0 {
        collector.refuse(found.title(), "a socket filter cannot be dumped yet", "detach it before the dump");
        return Ok(None);
    }
    let local = nix::sys::socket::getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(address);
    Ok(Some(Kind::Inet(InetSocket {
        number,
        family,
        local: local.filter(|a| a.port() != 0 || !a.ip().is_unspecified()),
        listening: listening.map(|d| d.wqueue),
        options: socket::options(fd, family, libc::SOCK_STREAM, libc::IPPROTO_TCP, TCP_OPTIONS),
    })))
}

fn address(storage: SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}

/// Whether a socket has never sent nor received anything (struct tcp_info, linux/tcp.h: the state in the first
/// byte, segments out and in at 136 and 140).
fn is_new(fd: &OwnedFd) -> bool {
    let info = socket::option(fd, libc::IPPROTO_TCP, libc::TCP_INFO).unwrap_or_default();
    info.first() == Some(&CLOSE) && info.get(136..144).is_none_or(|segments| segments.iter().all(|b| *b == 0))
}
