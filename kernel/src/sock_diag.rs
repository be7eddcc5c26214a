//! Sockets as the kernel lists them: sock_diag(7) dumps of unix and inet sockets.
//!
//! /proc/net/unix has no peers and cuts names at newlines; /proc/net/tcp has neither interface nor cookie. sock_diag has
//! all of it. A dump covers the network namespace of the *thread that asks*. The modules (`unix_diag`,
//! `tcp_diag`, `udp_diag`, `inet_diag`) are loaded on demand; where they cannot be, the kernel answers `ENOENT`, which
//! here means "cannot be listed" and not "there are none".
//!
//! The socket crates on offer know fewer attributes than needed and bring their own netlink stack; two requests and
//! two answers are less code than the adapter would be.

use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::check;
use crate::{Error, Result, abi};

/// A unix socket.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct UnixSocket {
    /// Inode; what `socket:[N]` says.
    pub inode: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET`.
    pub kind: i32,
    /// As of TCP: 1 established, 7 closed (unconnected), 10 listening.
    pub state: u8,
    /// The name it is bound to, as given to bind(2): a path, perhaps relative, or an abstract name with its leading NUL.
    pub name: Option<Vec<u8>>,
    /// Device (internal encoding: major << 20 | minor) and inode of the socket file.
    pub vfs: Option<(u32, u32)>,
    /// Inode of the peer; 0 if that is gone or not yet accepted (its socket has no inode then).
    pub peer: Option<u32>,
    /// For a listening socket: inodes of the clients that wait to be accepted.
    pub pending: Vec<u32>,
    /// Bytes to be received; for a listening socket the connections waiting.
    pub rqueue: u32,
    /// Bytes sent and not yet received; for a listening socket its backlog.
    pub wqueue: u32,
    /// Bit 0: receiving is shut down; bit 1: sending.
    pub shutdown: u8,
    /// Number that no other socket ever has.
    pub cookie: u64,
}

/// An IPv4 or IPv6 socket.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct InetSocket {
    /// Inode; 0 for one that no descriptor stands for (time-wait, or not accepted).
    pub inode: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// `IPPROTO_TCP`, `IPPROTO_UDP`.
    pub protocol: i32,
    /// TCP state, 1 to 13.
    pub state: u8,
    /// Own address.
    pub local: SocketAddr,
    /// The peer's address; zeros if not connected.
    pub remote: SocketAddr,
    /// Interface it is bound to, 0 for none.
    pub interface: u32,
    /// Owner.
    pub uid: u32,
    /// Bytes to be received; for a listening socket the connections waiting.
    pub rqueue: u32,
    /// Bytes not yet acknowledged; for a listening socket its backlog.
    pub wqueue: u32,
    /// Bit 0: receiving is shut down; bit 1: sending.
    pub shutdown: u8,
    /// `IPV6_V6ONLY`; `None` for IPv4.
    pub v6_only: Option<bool>,
    /// Number that no other socket ever has.
    pub cookie: u64,
    /// It has keys for TCP-MD5 (told to CAP_NET_ADMIN only, and by [`inet_sockets_with_keys`]).
    pub md5: bool,
}

/// A packet socket.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct PacketSocket {
    /// Inode; what `socket:[N]` says.
    pub inode: u32,
    /// `SOCK_RAW`, `SOCK_DGRAM`, `SOCK_PACKET`.
    pub kind: i32,
    /// The protocol it receives, 0 for none.
    pub protocol: u16,
    /// Interface it is bound to, 0 for all.
    pub interface: u32,
    /// What it asks of interfaces.
    pub memberships: Vec<PacketMembership>,
    /// Whether it has a ring to receive by, and one to send by.
    pub rings: (bool, bool),
    /// `PACKET_FANOUT`: id, and type and flags above.
    pub fanout: Option<u32>,
    /// Memory of what waits to be received.
    pub waiting: u32,
}

/// `PACKET_ADD_MEMBERSHIP`
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct PacketMembership {
    /// The interface.
    pub interface: u32,
    /// How often it was asked for.
    pub count: u32,
    /// `PACKET_MR_*`
    pub kind: u16,
    /// The address.
    pub address: Vec<u8>,
}

/// All packet sockets of our network namespace.
pub fn packet_sockets() -> Result<Vec<PacketSocket>> {
    let request = abi::packet_diag_req {
        family: libc::AF_PACKET as u8,
        protocol: 0,
        pad: 0,
        ino: 0,
        show: abi::PACKET_SHOW,
        cookie: [0; 2],
    };
    dump("packet_diag", &request, parse_packet)
}

/// All unix sockets of our network namespace.
pub fn unix_sockets() -> Result<Vec<UnixSocket>> {
    let request = abi::unix_diag_req {
        family: libc::AF_UNIX as u8,
        protocol: 0,
        pad: 0,
        states: u32::MAX,
        ino: 0,
        show: abi::UDIAG_SHOW,
        cookie: [0; 2],
    };
    dump("unix_diag", &request, parse_unix)
}

/// All sockets of one family (`AF_INET`, `AF_INET6`) and protocol (`IPPROTO_TCP`, `IPPROTO_UDP`), in all states.
pub fn inet_sockets(family: i32, protocol: i32) -> Result<Vec<InetSocket>> {
    list_inet(family, protocol, 1 << (abi::INET_DIAG_SHUTDOWN - 1))
}

/// The same, and which of them have keys for TCP-MD5: that is told only together with all there is to tell of a
/// connection (net/ipv4/inet_diag.c, `inet_sk_diag_fill`), for which the kernel takes its time.
pub fn inet_sockets_with_keys(family: i32, protocol: i32) -> Result<Vec<InetSocket>> {
    list_inet(family, protocol, 1 << (abi::INET_DIAG_SHUTDOWN - 1) | 1 << (abi::INET_DIAG_INFO - 1))
}

fn list_inet(family: i32, protocol: i32, ext: u8) -> Result<Vec<InetSocket>> {
    let request = abi::inet_diag_req_v2 {
        family: family as u8,
        protocol: protocol as u8,
        ext,
        pad: 0,
        // All, and with that those bound but neither connected nor listening (since 6.8).
        states: u32::MAX,
        id: abi::inet_diag_sockid {
            sport: [0; 2],
            dport: [0; 2],
            src: [0; 16],
            dst: [0; 16],
            interface: 0,
            cookie: [0; 2],
        },
    };
    dump("inet_diag", &request, |payload| parse_inet(payload, protocol))
}

/// Ends a socket that was listed, as by a reset; what is left of a connection (time-wait) just goes. Wants
/// CAP_NET_ADMIN, and a kernel with `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy(socket: &InetSocket) -> Result<()> {
    let raw = |address: SocketAddr| match address.ip() {
        IpAddr::V4(v4) => std::array::from_fn(|i| v4.octets().get(i).copied().unwrap_or(0)),
        IpAddr::V6(v6) => v6.octets(),
    };
    let request = abi::inet_diag_req_v2 {
        family: socket.family as u8,
        protocol: socket.protocol as u8,
        ext: 0,
        pad: 0,
        states: u32::MAX,
        id: abi::inet_diag_sockid {
            sport: socket.local.port().to_be_bytes(),
            dport: socket.remote.port().to_be_bytes(),
            src: raw(socket.local),
            dst: raw(socket.remote),
            interface: socket.interface,
            cookie: [socket.cookie as u32, (socket.cookie >> 32) as u32],
        },
    };
    let flags = abi::NLM_F_REQUEST | abi::NLM_F_ACK;
    ask("inet_diag", abi::SOCK_DESTROY, flags, &request, |_nothing| Some(())).map(drop)
}

/// Types without padding, of which every bit pattern is valid.
///
/// # Safety
/// The type must be just that.
unsafe trait Plain: Copy {}
// SAFETY: `repr(C)`, integers only, no padding (sizes asserted in `abi`).
unsafe impl Plain for abi::nlmsghdr {}
// SAFETY: as above.
unsafe impl Plain for abi::unix_diag_req {}
// SAFETY: as above.
unsafe impl Plain for abi::unix_diag_msg {}
// SAFETY: as above.
unsafe impl Plain for abi::inet_diag_req_v2 {}
// SAFETY: as above.
unsafe impl Plain for abi::inet_diag_msg {}

// SAFETY: as above.
unsafe impl Plain for abi::packet_diag_req {}
// SAFETY: as above.
unsafe impl Plain for abi::packet_diag_msg {}
// SAFETY: as above.
unsafe impl Plain for abi::packet_diag_mclist {}

fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` has no padding, so all bytes are initialized.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// The structure at the head of some bytes, and the rest.
fn take<T: Plain>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>())?;
    // SAFETY: as many bytes as the type has, and any bits are valid.
    Some((unsafe { head.as_ptr().cast::<T>().read_unaligned() }, rest))
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

fn cookie(halves: [u32; 2]) -> u64 {
    u64::from(halves[0]) | u64::from(halves[1]) << 32
}

/// Attributes (`struct nlattr`: length with header, type), each padded to four bytes.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        // The upper bits say "nested" and "network order".
        Some((kind & 0x3fff, value))
    })
}

fn parse_unix(payload: &[u8]) -> Option<UnixSocket> {
    let (message, rest) = take::<abi::unix_diag_msg>(payload)?;
    let mut socket = UnixSocket {
        inode: message.ino,
        kind: i32::from(message.kind),
        state: message.state,
        cookie: cookie(message.cookie),
        ..UnixSocket::default()
    };
    for (kind, value) in attributes(rest) {
        match kind {
            abi::UNIX_DIAG_NAME => {
                // A path comes with the NUL that the kernel adds (net/unix/af_unix.c `unix_mkname_bsd`).
                let path = !value.starts_with(&[0]);
                let name = if path { value.strip_suffix(&[0]).unwrap_or(value) } else { value };
                socket.name = Some(name.to_vec());
            }
            abi::UNIX_DIAG_VFS => socket.vfs = Some((word(value.get(4..)?)?, word(value)?)),
            abi::UNIX_DIAG_PEER => socket.peer = Some(word(value)?),
            abi::UNIX_DIAG_ICONS => {
                socket.pending =
                    value.as_chunks::<4>().0.iter().map(|inode| u32::from_ne_bytes(*inode)).collect();
            }
            abi::UNIX_DIAG_RQLEN => (socket.rqueue, socket.wqueue) = (word(value)?, word(value.get(4..)?)?),
            abi::UNIX_DIAG_SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
    }
    Some(socket)
}

fn parse_packet(payload: &[u8]) -> Option<PacketSocket> {
    let (message, rest) = take::<abi::packet_diag_msg>(payload)?;
    let mut socket = PacketSocket {
        inode: message.ino,
        kind: i32::from(message.kind),
        protocol: message.num,
        ..PacketSocket::default()
    };
    for (kind, value) in attributes(rest) {
        match kind {
            abi::PACKET_DIAG_INFO => socket.interface = word(value)?,
            abi::PACKET_DIAG_MCLIST => {
                let mut rest = value;
                while !rest.is_empty() {
                    let (entry, more) = take::<abi::packet_diag_mclist>(rest)?;
                    rest = more;
                    socket.memberships.push(PacketMembership {
                        interface: entry.index,
                        count: entry.count,
                        kind: entry.kind,
                        address: entry.address.get(..usize::from(entry.length))?.to_vec(),
                    });
                }
            }
            abi::PACKET_DIAG_RX_RING => socket.rings.0 = true,
            abi::PACKET_DIAG_TX_RING => socket.rings.1 = true,
            abi::PACKET_DIAG_FANOUT => socket.fanout = Some(word(value)?),
            // SK_MEMINFO_RMEM_ALLOC comes first.
            abi::PACKET_DIAG_MEMINFO => socket.waiting = word(value)?,
            _ => {}
        }
    }
    Some(socket)
}

fn parse_inet(payload: &[u8], protocol: i32) -> Option<InetSocket> {
    let (message, rest) = take::<abi::inet_diag_msg>(payload)?;
    let family = i32::from(message.family);
    let address = |bytes: [u8; 16], port: [u8; 2]| {
        let [a, b, c, d, ..] = bytes;
        let ip = match family {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(bytes)),
            _ => return None,
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(port)))
    };
    let mut socket = InetSocket {
        inode: message.inode,
        family,
        protocol,
        state: message.state,
        local: address(message.id.src, message.id.sport)?,
        remote: address(message.id.dst, message.id.dport)?,
        interface: message.id.interface,
        uid: message.uid,
        rqueue: message.rqueue,
        wqueue: message.wqueue,
        shutdown: 0,
        v6_only: None,
        md5: false,
        cookie: cookie(message.id.cookie),
    };
    for (kind, value) in attributes(rest) {
        match kind {
            abi::INET_DIAG_SHUTDOWN => socket.shutdown = *value.first()?,
            abi::INET_DIAG_MD5SIG => socket.md5 = !value.is_empty(),
            abi::INET_DIAG_SKV6ONLY => socket.v6_only = Some(*value.first()? != 0),
            _ => {}
        }
    }
    Some(socket)
}

/// Asks for all objects; begins anew when they changed in a way that makes the answer inconsistent.
fn dump<R: Plain, T>(what: &'static str, request: &R, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>> {
    const TRIES: usize = 16;
    for _ in 0..TRIES {
        let flags = abi::NLM_F_REQUEST | abi::NLM_F_DUMP;
        if let Some(all) = ask(what, abi::SOCK_DIAG_BY_FAMILY, flags, request, &parse)? {
            return Ok(all);
        }
    }
    Err(Error::syscall("sock_diag", what, Errno::EAGAIN))
}

/// Sends a request and collects what comes back; `None` if that is inconsistent.
fn ask<R: Plain, T>(
    what: &'static str,
    kind: u16,
    flags: u16,
    request: &R,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Result<Option<Vec<T>>> {
    let socket = connect(what)?;
    let header = abi::nlmsghdr {
        len: (size_of::<abi::nlmsghdr>() + size_of::<R>()) as u32,
        kind,
        flags,
        seq: 1,
        pid: 0,
    };
    let message = [bytes_of(&header), bytes_of(request)].concat();
    // SAFETY: a buffer of ours with its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    check(sent as libc::c_long, "send", what)?;

    let mut all = Vec::new();
    let mut interrupted = false;
    // A part of a dump is at most as long as the largest buffer offered, 32 KiB at most (net/netlink/af_netlink.c).
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        // SAFETY: a buffer of ours with its length.
        let got = unsafe {
            libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC)
        };
        let got = match (got, Errno::last()) {
            (-1, Errno::EINTR) => continue,
            (-1, errno) => return Err(Error::syscall("recv", what, errno)),
            _ => usize::try_from(got).unwrap_or(0),
        };
        let mut rest = match buffer.get(..got) {
            Some(part) if !part.is_empty() => part,
            _ => return Err(Error::parse(what, b"truncated message")),
        };
        while let Some((header, _)) = take::<abi::nlmsghdr>(rest) {
            let payload = rest
                .get(size_of::<abi::nlmsghdr>()..header.len as usize)
                .ok_or_else(|| Error::parse(what, b"bad length of a message"))?;
            interrupted |= header.flags & abi::NLM_F_DUMP_INTR != 0;
            match header.kind {
                // Both carry an errno; in DONE it is one that came up midway, and 0 else.
                abi::NLMSG_ERROR | abi::NLMSG_DONE => {
                    let code = word(payload).map_or(0, u32::cast_signed);
                    if code < 0 {
                        return Err(Error::syscall("sock_diag", what, Errno::from_raw(code.wrapping_neg())));
                    }
                    if header.kind == abi::NLMSG_DONE || flags & abi::NLM_F_ACK != 0 {
                        return Ok((!interrupted).then_some(all));
                    }
                }
                abi::SOCK_DIAG_BY_FAMILY => {
                    all.push(parse(payload).ok_or_else(|| Error::parse(what, payload))?);
                }
                // NOOP, and whatever may come.
                _ => {}
            }
            rest = rest.get((header.len as usize).next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

fn connect(what: &'static str) -> Result<OwnedFd> {
    // SAFETY: takes three numbers.
    let fd = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, abi::NETLINK_SOCK_DIAG)
    };
    check(libc::c_long::from(fd), "socket", what)?;
    // SAFETY: just made, known to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};

    fn inode(fd: &impl AsRawFd) -> u32 {
        let stat = crate::fds::stat(crate::Pid::this(), fd.as_raw_fd()).unwrap();
        u32::try_from(stat.st_ino).unwrap()
    }

    #[test]
    fn unix() {
        let path = std::env::temp_dir().join(format!("torpor-kernel-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let abstract_name = format!("torpor-kernel-{}", std::process::id());
        let named = UnixListener::bind_addr(&UnixAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
        let (left, right) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut (&left), b"hello").unwrap();
        right.shutdown(std::net::Shutdown::Write).unwrap();
        std::fs::remove_file(&path).unwrap();

        let all = match unix_sockets() {
            Err(error) if error.errno() == Some(Errno::ENOENT) => {
                eprintln!("skipped: no unix_diag");
                return;
            }
            all => all.unwrap(),
        };
        let find = |inode: u32| all.iter().find(|socket| socket.inode == inode).unwrap();
        let socket = find(inode(&listener));
        assert_eq!((socket.kind, socket.state), (libc::SOCK_STREAM, 10));
        assert_eq!(socket.name.as_deref(), Some(path.as_os_str().as_encoded_bytes()));
        assert!(socket.vfs.is_some());
        assert_eq!(socket.pending, [inode(&client)]);
        let name = [&[0], abstract_name.as_bytes()].concat();
        assert_eq!(find(inode(&named)).name.as_deref(), Some(name.as_slice()));
        let socket = find(inode(&right));
        assert_eq!((socket.state, socket.peer, socket.rqueue), (1, Some(inode(&left)), 5));
        assert_eq!((socket.shutdown, find(inode(&left)).shutdown), (2, 1));
    }

    #[test]
    fn what_is_left_of_a_connection_can_be_removed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        drop(listener.accept().unwrap());
        drop(client);
        let left = || {
            let all = inet_sockets(libc::AF_INET, libc::IPPROTO_TCP).unwrap_or_default();
            all.into_iter().find(|s| s.local == address && s.state != 10)
        };
        let Some(socket) = left() else {
            eprintln!("skipped: no tcp_diag, or no time-wait");
            return;
        };
        match destroy(&socket) {
            Ok(()) => assert_eq!(left(), None),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }

    #[test]
    fn inet() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let all = match inet_sockets(libc::AF_INET, libc::IPPROTO_TCP) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => {
                eprintln!("skipped: no tcp_diag");
                return;
            }
            all => all.unwrap(),
        };
        let find = |inode: u32| all.iter().find(|socket| socket.inode == inode).unwrap();
        let socket = find(inode(&listener));
        assert_eq!((socket.state, socket.local, socket.rqueue), (10, address, 1));
        let socket = find(inode(&client));
        assert_eq!((socket.state, socket.local, socket.remote), (1, client.local_addr().unwrap(), address));
        assert_ne!(socket.cookie, 0);
    }

    #[test]
    fn packet() {
        // SAFETY: socket takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            eprintln!("skipped: no packet sockets");
            return;
        }
        // SAFETY: a descriptor just opened, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        match packet_sockets() {
            Err(error) if error.errno() == Some(Errno::ENOENT) => eprintln!("skipped: no packet_diag"),
            all => {
                let all = all.unwrap();
                let socket = all.iter().find(|s| s.inode == inode(&fd)).unwrap();
                assert_eq!((socket.kind, socket.protocol, socket.rings), (2, 0, (false, false)));
                assert_eq!((socket.fanout, socket.memberships.len()), (None, 0));
            }
        }
    }

    #[test]
    fn odd_messages() {
        assert_eq!(parse_unix(&[0; 15]), None);
        assert_eq!(parse_inet(&[9; 72], 6), None);
        assert_eq!(attributes(&[3, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 0, 0, 1]).count(), 0);
        assert_eq!(attributes(&[5, 0, 2, 0, 7]).collect::<Vec<_>>(), [(2, &[7][..])]);
        assert_eq!(parse_packet(&[0; 15]), None);
        // A membership whose address is longer than the place for it.
        let mut list = [0u8; 44];
        list[10] = 33;
        assert_eq!(parse_packet(&[&[0; 16][..], &[48, 0, 1, 0], &list].concat()), None);
        // A peer attribute of two bytes.
        assert_eq!(parse_unix(&[&[0; 16][..], &[6, 0, 2, 0, 1, 1]].concat()), None);
    }
}
