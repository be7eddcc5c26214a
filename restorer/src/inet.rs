//! tcp(7): sockets that listen or are not connected. Those with a connection: `tcp`.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike};
use torpor_image::inet::InetSocket;
use torpor_image::socket::SocketOption;
use torpor_kernel::sock_diag;
use torpor_kernel::tcp::state;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;
use crate::{holder, socket, tcp};

/// The socket of a description. All TCP sockets are made at the first call, since the order matters (see `tcp`).
pub(crate) fn open(opener: &mut Opener<'_>, what: &str, inet: &InetSocket) -> Result<OwnedFd> {
    if opener.tcp.is_none() {
        let (made, silent) = tcp::open_all(opener)?;
        (opener.tcp, opener.silent) = (Some(made), silent);
    }
    let made = opener.tcp.as_mut().and_then(|made| made.remove(&inet.number));
    made.ok_or_else(|| Error::Open { what: what.to_owned(), call: "socket", errno: Errno::ENOTSOCK })
}

/// A socket that is not connected: bound and listening if it was. Its options are not set yet but for those that
/// cannot be set later; it may reuse its address until [`settle`].
pub(crate) fn make(what: &str, inet: &InetSocket) -> Result<OwnedFd> {
    let fd = new(what, inet)?;
    let connected = inet.connection.is_some();
    if !connected {
        socket::set(what, &fd, &rest(inet, false))?;
    }
    let conflict = |(call, errno)| conflict(what, inet.local, call, errno);
    match bind_and_listen(&fd, inet) {
        Err((_, Errno::EADDRINUSE))
            if inet.local.is_some_and(|l| remove_remains(|port| port == l.port(), false)) =>
        {
            // One that is bound already cannot be bound again.
            let fd = new(what, inet)?;
            if inet.connection.is_none() {
                socket::set(what, &fd, &rest(inet, false))?;
            }
            bind_and_listen(&fd, inet).map_err(conflict)?;
            Ok(fd)
        }
        other => other.map(|()| fd).map_err(conflict),
    }
}

fn bind_and_listen(fd: &OwnedFd, inet: &InetSocket) -> Result<(), (&'static str, Errno)> {
    if let Some(address) = inet.local {
        bind(fd, address, inet.scope).map_err(|errno| ("bind", errno))?;
    }
    if let Some(backlog) = inet.listening {
        // SAFETY: listen takes numbers only.
        Errno::result(unsafe { libc::listen(fd.as_raw_fd(), backlog as i32) }).map_err(|e| ("listen", e))?;
    }
    Ok(())
}

/// Removes what is left, on some ports, of connections that are over for both sides, and says whether there was any.
/// A program that did not set SO_REUSEADDR would find its ports taken for a minute by what it was itself.
/// `orphans`: also where only the peer's end of the stream is to come.
pub(crate) fn remove_remains(on_port: impl Fn(u16) -> bool, orphans: bool) -> bool {
    let mut any = false;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let all = sock_diag::inet_sockets(family, libc::IPPROTO_TCP).unwrap_or_default();
        let over = |s: &&sock_diag::InetSocket| {
            let left = s.state == state::TIME_WAIT || orphans && s.state == state::FIN_WAIT2;
            left && s.inode == 0 && on_port(s.local.port())
        };
        for socket in all.iter().filter(over) {
            any |= sock_diag::destroy(socket).is_ok();
        }
    }
    any
}

/// A new socket with those options that must be there before it gets an address.
pub(crate) fn new(what: &str, inet: &InetSocket) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned(what, "socket", unsafe { libc::socket(inet.family, kind, libc::IPPROTO_TCP) })?;
    let early: Vec<SocketOption> = inet.options.iter().filter(|o| is_early(o)).cloned().collect();
    socket::set(what, &fd, &early)?;
    // What is left of the dumped connections may linger in TIME_WAIT.
    socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    Ok(fd)
}

/// The options that are set last, when every socket has its address: filters, and whether that may be reused.
pub(crate) fn settle(what: &str, fd: &OwnedFd, inet: &InetSocket) -> Result<()> {
    if inet.connection.is_some() {
        socket::set(what, fd, &rest(inet, true))?;
    }
    if !inet.filter.is_empty() {
        socket::attach_filter(what, fd, &inet.filter)?;
    }
    let last: Vec<SocketOption> = inet.options.iter().filter(|o| is_last(o)).cloned().collect();
    socket::set(what, fd, &last)?;
    let reuse = |o: &SocketOption| o.level == libc::SOL_SOCKET && o.name == libc::SO_REUSEADDR;
    if !inet.options.iter().any(reuse) {
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0);
    }
    Ok(())
}

/// What a bind or a route depends on: device, mark, foreign addresses, IPv6 only, ports shared with others.
fn is_early(option: &SocketOption) -> bool {
    match option.level {
        libc::SOL_SOCKET => {
            matches!(option.name, libc::SO_BINDTODEVICE | libc::SO_MARK | libc::SO_REUSEPORT)
        }
        libc::IPPROTO_IP => matches!(option.name, libc::IP_FREEBIND | libc::IP_TRANSPARENT),
        libc::IPPROTO_IPV6 => {
            matches!(option.name, libc::IPV6_V6ONLY | libc::IPV6_FREEBIND | libc::IPV6_TRANSPARENT)
        }
        _ => false,
    }
}

/// What keeps other things from being set.
fn is_last(option: &SocketOption) -> bool {
    option.level == libc::SOL_SOCKET
        && matches!(option.name, libc::SO_REUSEADDR | libc::SO_LOCK_FILTER | libc::SO_PEEK_OFF)
}

/// All other options. The buffers of a connected socket have sizes of the kernel's choice; to leave it at that
/// `SO_BUF_LOCK` is always told.
fn rest(inet: &InetSocket, connected: bool) -> Vec<SocketOption> {
    let mut rest: Vec<SocketOption> =
        inet.options.iter().filter(|o| !is_early(o) && !is_last(o)).cloned().collect();
    if connected {
        for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            let known = rest.iter().any(|o| o.level == libc::SOL_SOCKET && o.name == name);
            if !known && let Some(value) = of_new(inet.family, name) {
                let value = value.to_ne_bytes().to_vec().into();
                rest.push(SocketOption { level: libc::SOL_SOCKET, name, value });
            }
        }
    }
    if connected && !rest.iter().any(socket::is_lock) {
        rest.push(SocketOption {
            level: libc::SOL_SOCKET,
            name: socket::SO_BUF_LOCK,
            value: 0i32.to_ne_bytes().to_vec().into(),
        });
    }
    rest
}

/// An option as a new socket has it.
fn of_new(family: i32, name: i32) -> Option<i32> {
    // SAFETY: socket takes numbers only.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP) };
    Some(socket::int(&owned("", "socket", fd).ok()?, libc::SOL_SOCKET, name))
}

pub(crate) fn bind(fd: &OwnedFd, address: SocketAddr, scope: u32) -> Result<(), Errno> {
    with_address(address, scope, |raw, len| {
        // SAFETY: a socket address with its length.
        unsafe { libc::bind(fd.as_raw_fd(), raw, len) }
    })
}

pub(crate) fn connect(fd: &OwnedFd, address: SocketAddr, scope: u32) -> Result<(), Errno> {
    with_address(address, scope, |raw, len| {
        // SAFETY: a socket address with its length.
        unsafe { libc::connect(fd.as_raw_fd(), raw, len) }
    })
}

fn with_address(
    address: SocketAddr,
    scope: u32,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32,
) -> Result<(), Errno> {
    let result = match address {
        SocketAddr::V4(v4) => {
            let raw = SockaddrIn::from(v4);
            call(raw.as_ptr(), raw.len())
        }
        SocketAddr::V6(mut v6) => {
            v6.set_scope_id(scope);
            let raw = SockaddrIn6::from(v6);
            call(raw.as_ptr(), raw.len())
        }
    };
    Errno::result(result).map(drop)
}

pub(crate) fn conflict(what: &str, address: Option<SocketAddr>, call: &'static str, errno: Errno) -> Error {
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
