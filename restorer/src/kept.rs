//! tcp(7), connections whose peer is outside and has noticed nothing.
//!
//! The socket is made in repair mode (net/ipv4/tcp.c), where bind and connect only write addresses down and what is
//! sent is only queued: with the sequence numbers, windows and options of the dumped one. It stays deaf (a filter that
//! drops everything) and in repair mode until nothing of the restore can fail any more: should it fail, the peer has
//! heard nothing, and the image can be restored again. [`Silent::speak`] lets it loose.
//!
//! On the machine of the dump its guardian still has the addresses, so that nobody answers the peer, which would end the
//! connection. Two sockets may have the same addresses if one of them is bound to a device and the other is not (net/ipv4/inet_hashtables.c,
//! `__inet_check_established`). So that of the guardian is bound to the device by which the peer's segments come: it still gets them until
//! ours is there, and there is no moment in which nobody has the addresses.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::net::if_::InterfaceFlags;
use torpor_image::inet::InetSocket;
use torpor_image::tcp::{Connection, Kept};
use torpor_kernel::ids::Tid;
use torpor_kernel::priority::RealTime;
use torpor_kernel::tcp::{self, Queue};
use torpor_kernel::{fds, process, sock_diag};

use crate::error::{Error, Result};
use crate::tcp::to_address;
use crate::{holder, inet, socket};

/// linux/tcp.h, net/tcp.h: `TCPOPT_*`
const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERM: u32 = 4;
const TCPOPT_TIMESTAMP: u32 = 8;
/// `BPF_RET | BPF_K` with 0, as `struct sock_filter`.
const DROP_ALL: [u8; 8] = [6, 0, 0, 0, 0, 0, 0, 0];
/// asm-generic/socket.h
const SO_BINDTOIFINDEX: i32 = 62;
/// The name of a guardian.
const GUARDIAN: &[u8] = b"tcp-guardian";
/// How long the addresses may take to become free, and how long for one who is told to let go of them.
const PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE_OF_ONE: Duration = Duration::from_millis(10);
/// As much goes into a queue at once.
const CHUNK: usize = 32 << 10;
/// Bit of [`Connection::shutdown`].
const SENDING: u8 = 2;

/// A kept connection that has not said anything yet.
#[derive(Debug)]
pub(crate) struct Silent<'i> {
    fd: OwnedFd,
    what: String,
    inet: &'i InetSocket,
    /// Who had the addresses, and still has them.
    before: Option<OwnedFd>,
}

/// Makes the socket; it is in repair mode afterwards.
pub(crate) fn make<'i>(
    what: &str,
    inet: &'i InetSocket,
    connection: &Connection,
    kept: &Kept,
) -> Result<(OwnedFd, Silent<'i>)> {
    let fail = |call: &'static str| Error::kernel(format!("{what}: {call}"));
    let fd = inet::new(what, inet)?;
    tcp::set_repair(fd.as_fd(), 1).map_err(|e| Error::Permission {
        what: what.to_owned(),
        call: "setsockopt(TCP_REPAIR)",
        errno: e.errno().unwrap_or(Errno::EPERM),
        remedy: "run torpor with CAP_NET_ADMIN",
    })?;
    socket::attach_filter(what, &fd, &DROP_ALL)?;
    let room = |queue: &[u8]| i32::try_from(queue.len() * 2 + (1 << 20)).unwrap_or(i32::MAX / 2);
    socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room(&connection.sent));
    socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room(&connection.received));
    let (Some(local), Some(remote)) = (inet.local, connection.remote) else {
        return Err(Error::Open { what: what.to_owned(), call: "connect", errno: Errno::EDESTADDRREQ });
    };
    inet::bind(&fd, local, inet.scope).map_err(|e| inet::conflict(what, Some(local), "bind", e))?;
    let begin = |end: u32, queue: &[u8]| end.wrapping_sub(queue.len() as u32);
    for (queue, sequence) in [
        (Queue::Send, begin(kept.send_sequence, &connection.sent)),
        (Queue::Receive, begin(kept.receive_sequence, &connection.received)),
    ] {
        tcp::set_queue(fd.as_fd(), queue).map_err(fail("its queues"))?;
        tcp::set_sequence(fd.as_fd(), sequence).map_err(fail("its sequence numbers"))?;
    }
    let before = step_aside(local, remote);
    // Where that is not possible there is an instant in which neither has the addresses. It must be short: a segment of
    // the peer would be answered. On a busy machine others would have their turn in it.
    let urgent = RealTime::raise();
    let mut relieved = before.is_none() && relieve(local, remote);
    let begin = Instant::now();
    let mut next = PATIENCE_OF_ONE;
    loop {
        match inet::connect(&fd, remote, connection.scope) {
            Ok(()) => break,
            Err(Errno::EADDRNOTAVAIL) if before.is_some() && !relieved => relieved = relieve(local, remote),
            Err(Errno::EADDRNOTAVAIL) if relieved && begin.elapsed() < PATIENCE => {
                std::thread::yield_now();
                // There may be another, of a dump that was killed.
                if begin.elapsed() > next {
                    relieved |= relieve(local, remote);
                    next = begin.elapsed() + PATIENCE_OF_ONE;
                }
            }
            Err(Errno::EADDRNOTAVAIL) => return Err(taken(what, local, remote)),
            Err(e) => return Err(inet::conflict(what, Some(local), "connect", e)),
        }
    }
    drop(urgent);
    let mut agreed = vec![(TCPOPT_MSS, kept.segment)];
    if let Some((send, receive)) = kept.scale {
        agreed.push((TCPOPT_WINDOW, u32::from(send) | u32::from(receive) << 16));
    }
    if kept.sack {
        agreed.push((TCPOPT_SACK_PERM, 0));
    }
    if let Some(clock) = kept.timestamp {
        agreed.push((TCPOPT_TIMESTAMP, 0));
        tcp::set_timestamp(fd.as_fd(), clock).map_err(fail("its timestamps"))?;
    }
    tcp::set_agreed(fd.as_fd(), &agreed).map_err(fail("its options"))?;
    measure_again(&fd);
    tcp::set_queue(fd.as_fd(), Queue::Receive).map_err(fail("its queues"))?;
    put(what, &fd, &connection.received)?;
    tcp::set_queue(fd.as_fd(), Queue::Send).map_err(fail("its queues"))?;
    let (sent, _) = connection.sent.split_at(connection.sent.len() - kept.unsent as usize);
    put(what, &fd, sent)?;
    tcp::set_queue(fd.as_fd(), Queue::None).map_err(fail("its queues"))?;
    tcp::set_window(fd.as_fd(), kept.window).map_err(fail("its windows"))?;
    let copy = fd.try_clone().map_err(|e| crate::pipe::io(what, "dup", &e))?;
    Ok((fd, Silent { fd: copy, what: what.to_owned(), inet, before }))
}

/// Somebody else has both addresses.
fn taken(what: &str, local: SocketAddr, remote: SocketAddr) -> Error {
    let socket = of(local, remote);
    let by = match &socket {
        Some(s) if s.inode != 0 => holder::of_socket(s.inode).unwrap_or_else(|| "another socket".into()),
        Some(s) => format!("a socket that was closed (state {})", s.state),
        None => "another socket, or this machine has not the address".into(),
    };
    Error::Conflict {
        what: what.to_owned(),
        why: format!("the connection from {local} to {remote} is held by {by}"),
        remedy: "end whoever has it".into(),
    }
}

fn of(local: SocketAddr, remote: SocketAddr) -> Option<sock_diag::InetSocket> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let all = sock_diag::inet_sockets(family, libc::IPPROTO_TCP).unwrap_or_default();
    all.into_iter().find(|s| s.local == local && s.remote == remote)
}

/// How large segments are was decided when the socket was connected, of what nothing was known then; setting IP options,
/// those that it has, makes the kernel decide anew (net/ipv4/ip_sockglue.c, `do_ip_setsockopt`).
fn measure_again(fd: &OwnedFd) {
    let mut options = [0u8; 40];
    let mut length = options.len() as libc::socklen_t;
    // SAFETY: getsockopt fills at most `length` bytes, of which setsockopt reads as many as there were.
    unsafe {
        let (fd, options) = (fd.as_raw_fd(), options.as_mut_ptr().cast());
        if libc::getsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, options, &raw mut length) != 0 {
            length = 0;
        }
        libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, options, length);
    }
}

/// The guardian that a dump on this machine has left behind to keep the peer from being answered, with its descriptor
/// of the connection.
fn guardian(local: SocketAddr, remote: SocketAddr) -> Option<(OwnedFd, i32)> {
    let socket = of(local, remote).filter(|s| s.inode != 0)?;
    let (pid, fd) = holder::descriptor_of_socket(socket.inode)?;
    let pidfd = fds::pidfd_open(pid).ok()?;
    process::comm(pid, Tid(pid.0)).is_ok_and(|name| name == GUARDIAN).then_some((pidfd, fd))
}

/// Lets that guardian have the addresses beside us; who it is.
fn step_aside(local: SocketAddr, remote: SocketAddr) -> Option<OwnedFd> {
    let (pidfd, fd) = guardian(local, remote)?;
    let its = fds::getfd(pidfd.as_fd(), fd).ok()?;
    let device = i32::try_from(device(local, remote)?).ok()?;
    let bound = || socket::int(&its, libc::SOL_SOCKET, SO_BINDTOIFINDEX);
    let aside = bound() == device || socket::set_int(&its, libc::SOL_SOCKET, SO_BINDTOIFINDEX, device);
    (aside && bound() == device).then_some(pidfd)
}

/// By which device segments from `remote` to `local` come: the one with the address, or, within the machine, the loopback.
fn device(local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    let all: Vec<_> = nix::ifaddrs::getifaddrs().ok()?.collect();
    let has = |a: &nix::ifaddrs::InterfaceAddress, ip: IpAddr| {
        a.address.as_ref().and_then(to_address).is_some_and(|own| own.ip() == ip.to_canonical())
    };
    let inside = remote.ip().is_loopback() || all.iter().any(|a| has(a, remote.ip()));
    let is = |a: &&nix::ifaddrs::InterfaceAddress| {
        if inside { a.flags.contains(InterfaceFlags::IFF_LOOPBACK) } else { has(a, local.ip()) }
    };
    nix::net::if_::if_nametoindex(all.iter().find(is)?.interface_name.as_str()).ok()
}

/// Ends the guardian, and with it, silently, all its sockets. Says whether there was one.
fn relieve(local: SocketAddr, remote: SocketAddr) -> bool {
    guardian(local, remote).is_some_and(|(pidfd, _)| fds::end(pidfd.as_fd()))
}

/// Writes into the chosen queue, or sends.
fn put(what: &str, fd: &OwnedFd, bytes: &[u8]) -> Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(CHUNK)];
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: send reads `part`.
        let sent = unsafe { libc::send(fd.as_raw_fd(), part.as_ptr().cast(), part.len(), flags) };
        match usize::try_from(sent) {
            Ok(sent) => rest = &rest[sent..],
            Err(_) => return Err(Error::last(what, "send")),
        }
    }
    Ok(())
}

impl Silent<'_> {
    /// Lets the connection go on. Nothing of this is expected to fail; a peer that lost patience will say so itself.
    pub(crate) fn speak(self) {
        let Silent { fd, what, inet, before } = self;
        if let Some(guardian) = before {
            fds::end(guardian.as_fd());
        }
        let Some(connection) = &inet.connection else { return };
        if inet.filter.is_empty() {
            socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0);
        } else {
            let _set_again_below = socket::attach_filter(&what, &fd, &inet.filter);
        }
        // Switched off in this way it asks the peer where it is.
        let _cannot_fail = tcp::set_repair(fd.as_fd(), 0);
        if let torpor_image::tcp::Peer::Kept(kept) = &connection.peer {
            let at = connection.sent.len() - kept.unsent as usize;
            let _told_by_the_socket = put(&what, &fd, &connection.sent[at..]);
        }
        if connection.shutdown & SENDING != 0 {
            // SAFETY: shutdown takes numbers only.
            unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) };
        }
        let _set_before = inet::settle(&what, &fd, inet);
    }
}
