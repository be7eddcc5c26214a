//! udp(7), UDP-Lite and ping sockets.
//!
//! What waited to be received is put back before a socket has its address: it is bound to a port that the kernel
//! chooses, gets the datagrams from a raw socket, which can give them any sender, and is unbound again
//! (`connect` to nobody; net/ipv4/udp.c, `__udp_disconnect`: a port that was not asked for is given up, the
//! queue stays). So none goes astray in a group of SO_REUSEPORT, none is turned away by a filter, a device or
//! a peer, and what others send meanwhile comes behind.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_image::udp::{Datagram, UdpSocket};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::{address, ip, socket};

/// Room for what waits in a queue while it is put back; the real size is set afterwards.
const AMPLE: i32 = 256 << 20;
/// linux/socket.h
const SO_BUF_LOCK: i32 = 72;
/// How long a datagram may take to itself.
const PATIENCE: Duration = Duration::from_secs(2);
/// What a datagram shows of itself only if it was asked for when it arrived.
const ASKED_BEFORE: [(i32, i32); 2] =
    [(libc::IPPROTO_IP, libc::IP_PKTINFO), (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)];

pub(crate) fn open(what: &str, udp: &UdpSocket) -> Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd =
        owned(what, "socket", unsafe { libc::socket(udp.family, kind, udp.protocol) }).map_err(
            |e| match e {
                Error::Open { what, call, errno: errno @ Errno::EACCES } => Error::Permission {
                    what,
                    call,
                    errno,
                    remedy: "let its group make ping sockets (sysctl net.ipv4.ping_group_range)",
                },
                e => e,
            },
        )?;
    if !udp.queue.is_empty() {
        refill(what, &fd, udp)?;
    }
    ip::before(what, &fd, &udp.settings)?;
    place(what, &fd, udp)?;
    ip::after(what, &fd, &udp.settings)?;
    let how = match udp.shutdown & 3 {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return Ok(fd),
    };
    // SAFETY: shutdown takes numbers only. Of a socket that is not connected it says so, and does it.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
    Ok(fd)
}

/// Binds and connects. Nobody can see whether a connected socket was bound to its address or got it by
/// connecting: it is made the second way where that leads to the same, so that it may connect elsewhere.
fn place(what: &str, fd: &OwnedFd, udp: &UdpSocket) -> Result<()> {
    let scoped = |address| address::scoped(what, address, &udp.settings.options);
    let (local, peer) = (udp.local.map(scoped).transpose()?, udp.peer.map(scoped).transpose()?);
    if let Some(local) = local {
        let any = SocketAddr::new(unspecified(udp.family), local.port());
        let alike = peer.is_some_and(|peer| address_towards(udp, peer) == Some(local.ip()));
        if !alike || address::try_bind(fd, any).is_err() {
            address::bind(what, fd, local, udp.protocol)?;
        }
    }
    let Some(peer) = peer else { return Ok(()) };
    address::try_connect(fd, peer)
        .map_err(|errno| address::conflict(what, Some(peer), udp.protocol, "connect", errno))
}

/// The address that a new socket gets when it is connected to `peer`.
fn address_towards(udp: &UdpSocket, peer: SocketAddr) -> Option<IpAddr> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned("", "socket", unsafe { libc::socket(udp.family, kind, libc::IPPROTO_UDP) }).ok()?;
    address::try_connect(&fd, peer).ok()?;
    address::local(&fd).map(|a| a.ip())
}

fn unspecified(family: i32) -> IpAddr {
    if family == libc::AF_INET { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Puts back what waited to be received.
fn refill(what: &str, fd: &OwnedFd, udp: &UdpSocket) -> Result<()> {
    let size = socket::int(fd, libc::SOL_SOCKET, libc::SO_RCVBUF);
    if !socket::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, AMPLE) {
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, AMPLE);
    }
    for (level, name) in ASKED_BEFORE {
        if udp.settings.options.iter().any(|o| (o.level, o.name) == (level, name)) {
            socket::set_int(fd, level, name, 1);
        }
    }
    address::bind(what, fd, SocketAddr::new(unspecified(udp.family), 0), udp.protocol)?;
    let port = address::local(fd).map_or(0, |a| a.port());
    let mut raw = [None, None];
    for datagram in &udp.queue {
        let source = unmapped(datagram.source);
        let to = destination(udp, datagram, source);
        let sender = match &mut raw[usize::from(to.is_ipv6())] {
            Some(sender) => sender,
            none => none.insert(raw_socket(what, to)?),
        };
        let packet = packet(udp.protocol, datagram, source, SocketAddr::new(to, port));
        let before = waiting(fd);
        ip::send_raw(sender, &packet, to).map_err(Error::open(what, "sendto"))?;
        let begin = Instant::now();
        while waiting(fd) == before {
            if begin.elapsed() > PATIENCE {
                return Err(Error::Unfit {
                    what: what.to_owned(),
                    why: format!("a datagram from {source} that waited in it cannot be delivered again"),
                    remedy: "let the firewall pass what comes over the loopback interface".into(),
                });
            }
            std::thread::yield_now();
        }
    }
    // SAFETY: integers only, for which zero is a value.
    let mut nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    nobody.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    // SAFETY: an address with its length.
    let left =
        unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, size_of_val(&nobody) as libc::socklen_t) };
    if left != 0 {
        return Err(Error::last(what, "connect(AF_UNSPEC)"));
    }
    // What is set afterwards counts from here.
    if !socket::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, size / 2) {
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, size / 2);
    }
    socket::set_int(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 0);
    Ok(())
}

/// linux/socket.h (`SO_MEMINFO`): memory of what waits to be received.
fn waiting(fd: &OwnedFd) -> i32 {
    const SO_MEMINFO: i32 = 55;
    let mut info = [0i32; 16];
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: getsockopt fills at most `len` bytes.
    unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    info[0]
}

fn raw_socket(what: &str, to: IpAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only. The protocol says that packets have their headers.
    let fd = unsafe { libc::socket(family, kind, libc::IPPROTO_RAW) };
    owned(what, "socket", fd).map_err(|e| match e {
        Error::Open { what, call, errno: errno @ (Errno::EPERM | Errno::EACCES) } => Error::Permission {
            what: format!("{what}: what waited to be received"),
            call,
            errno,
            remedy: "run torpor with CAP_NET_RAW",
        },
        e => e,
    })
}

/// An IPv4 address as such, where an IPv6 socket calls it `::ffff:a.b.c.d`.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Where a datagram is sent to: the address that the program may be told, if it is one of this machine.
fn destination(udp: &UdpSocket, datagram: &Datagram, source: SocketAddr) -> IpAddr {
    let local = udp.local.map(|a| a.ip()).filter(|ip| !ip.is_unspecified());
    let wanted = datagram.destination.or(local).map(|ip| ip.to_canonical());
    let fits = |ip: &IpAddr| {
        let own = std::net::UdpSocket::bind(SocketAddr::new(*ip, 0)).is_ok();
        ip.is_ipv4() == source.is_ipv4() && !ip.is_multicast() && !ip.is_unspecified() && own
    };
    let loopback: IpAddr =
        if source.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    wanted.filter(fits).unwrap_or(loopback)
}

/// The packet that brings a datagram.
fn packet(protocol: i32, datagram: &Datagram, source: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let length = 8 + datagram.data.len();
    // The length of UDP-Lite says how much the checksum covers; 0 is all.
    let field = if protocol == libc::IPPROTO_UDPLITE { 0 } else { length as u16 };
    let mut body = [source.port(), to.port(), field, 0].map(u16::to_be_bytes).concat();
    body.extend_from_slice(&datagram.data);
    let (ttl, tos) = (datagram.ttl.unwrap_or(64), datagram.tos.unwrap_or(0));
    let addresses = match (source.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => [v6(from), v6(to)].concat(),
    };
    let pseudo = [&addresses[..], &(length as u32).to_be_bytes(), &(protocol as u32).to_be_bytes()].concat();
    let sum = match checksum(&[&pseudo, &body]) {
        // Zero says that there is none.
        0 => 0xffff,
        sum => sum,
    };
    body[6..8].copy_from_slice(&sum.to_be_bytes());
    let header = if to.is_ipv4() {
        // Length, identification and checksum are filled in by the kernel (raw(7)).
        [&[0x45, tos, 0, 0, 0, 0, 0, 0, ttl, protocol as u8, 0, 0], &addresses[..]].concat()
    } else {
        let [high, low] = (length as u16).to_be_bytes();
        [&[0x60 | tos >> 4, tos << 4, 0, 0, high, low, protocol as u8, ttl], &addresses[..]].concat()
    };
    [header, body].concat()
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The checksum of IP over parts, of which all but the last have even lengths (RFC 1071).
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u64 = words.map(|w| u64::from(w[0]) << 8 | w.get(1).map_or(0, |b| u64::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_checks_itself() {
        // The sum over a packet that carries its checksum is zero.
        let datagram = |source: &str| Datagram {
            source: source.parse().unwrap(),
            destination: None,
            ttl: Some(3),
            tos: Some(0x1c),
            data: torpor_image::Bytes::from(&b"odd"[..]),
        };
        let v4 = datagram("192.0.2.7:53");
        let packet4 = packet(17, &v4, v4.source, "127.0.0.1:4000".parse().unwrap());
        assert_eq!(packet4.len(), 31);
        assert_eq!((packet4[1], packet4[8]), (0x1c, 3));
        let pseudo = [&packet4[12..20], &[0, 0, 0, 11, 0, 0, 0, 17]].concat();
        assert_eq!(checksum(&[&pseudo, &packet4[20..]]), 0);
        let v6 = datagram("[2001:db8::1]:53");
        let packet6 = packet(17, &v6, v6.source, "[::1]:4000".parse().unwrap());
        assert_eq!((packet6[0], packet6[1], packet6[7]), (0x61, 0xc0, 3));
        let pseudo = [&packet6[8..40], &[0, 0, 0, 11, 0, 0, 0, 17]].concat();
        assert_eq!(checksum(&[&pseudo, &packet6[40..]]), 0);
    }
}
