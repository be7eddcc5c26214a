//! tcp(7), connections.
//!
//! A connection with both ends in the image is made anew, by a real connect(2) between the two addresses it had:
//! its sequence numbers and timestamps are seen by nobody but the kernel. It needs no privilege, and every state
//! between open and closed comes about by itself when the queues have been sent and the directions shut down that
//! were. For the connect a listening socket stands at one of the two addresses for a moment (a *door*). Therefore
//! all sockets of the image are made in one go: connections first, while no socket of the image listens, since two
//! cannot listen at one address; then those that listen; then what waits in their queues. Until all have their
//! addresses each may share its own (SO_REUSEADDR); what the program had set is set at the end.
//!
//! The dumped connections may linger in TIME_WAIT. That keeps nobody from connecting between the same addresses
//! anew, as timestamps tell old segments from new ones (net/ipv4/tcp_ipv4.c, `tcp_twsk_unique`), but it keeps the
//! addresses from being bound where the program did not set SO_REUSEADDR: so it is removed first.

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;
use torpor_image::Image;
use torpor_image::description::Kind;
use torpor_image::inet::InetSocket;
use torpor_image::tcp::{Connection, Peer};
use torpor_kernel::tcp::{self, state};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::inet;
use crate::kept::{self, Silent};
use crate::open::Opener;
use crate::socket;

/// Bits of [`Connection::shutdown`].
const RECEIVING: u8 = 1;
const SENDING: u8 = 2;
/// Queues up to this length go through buffers of the kernel's choice.
const SMALL: usize = 16 << 10;
/// How long a connection within this machine may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A TCP socket of the image.
struct Wanted<'i> {
    inet: &'i InetSocket,
    what: String,
}

/// What has been made so far.
#[derive(Default)]
struct Made<'i> {
    sockets: HashMap<u32, OwnedFd>,
    doors: HashMap<(i32, SocketAddr, Vec<u8>), OwnedFd>,
    by_number: HashMap<u32, usize>,
    wanted: Vec<Wanted<'i>>,
    silent: Vec<Silent<'i>>,
    /// Room that receive buffers need for the longest queue.
    room: i32,
}

/// Makes every TCP socket of the image, by number.
pub(crate) fn open_all<'i>(opener: &Opener<'i>) -> Result<(HashMap<u32, OwnedFd>, Vec<Silent<'i>>)> {
    let mut made = Made::default();
    let image = opener.image;
    for description in &image.objects.descriptions {
        if let Kind::Inet(inet) = &description.kind {
            made.by_number.insert(inet.number, made.wanted.len());
            made.wanted.push(Wanted { inet, what: opener.name(description.id) });
        }
    }
    let longest = made.wanted.iter().filter_map(|w| Some(w.inet.connection.as_ref()?.received.len())).max();
    made.room =
        longest.filter(|l| *l > SMALL).map_or(0, |l| i32::try_from(l + (1 << 20)).unwrap_or(i32::MAX / 2));
    if made.wanted.iter().any(|w| w.inet.connection.is_some()) {
        let ports: HashSet<u16> = made.wanted.iter().filter_map(|w| Some(w.inet.local?.port())).collect();
        inet::remove_remains(|port| ports.contains(&port), true);
    }
    for i in 0..made.wanted.len() {
        made.connected(image, i)?;
    }
    made.doors.clear();
    for wanted in made.wanted.iter().filter(|w| w.inet.connection.is_none()) {
        made.sockets.insert(wanted.inet.number, inet::make(&wanted.what, wanted.inet)?);
    }
    for i in 0..made.wanted.len() {
        made.waiting(i)?;
    }
    // Those that are kept are settled when they may speak.
    let kept = |inet: &InetSocket| matches!(&inet.connection, Some(c) if matches!(c.peer, Peer::Kept(_)));
    for wanted in made.wanted.iter().filter(|w| !kept(w.inet)) {
        if let Some(fd) = made.sockets.get(&wanted.inet.number) {
            inet::settle(&wanted.what, fd, wanted.inet)?;
        }
    }
    Ok((made.sockets, made.silent))
}

impl<'i> Made<'i> {
    /// Makes connections that need no listening socket of the image.
    fn connected(&mut self, image: &Image, i: usize) -> Result<()> {
        let inet = self.wanted[i].inet;
        let Some(connection) = &inet.connection else { return Ok(()) };
        if self.sockets.contains_key(&inet.number) {
            return Ok(());
        }
        match &connection.peer {
            Peer::Inside { number } if *number == inet.number => self.with_itself(i, connection),
            Peer::Inside { number } => {
                let Some(peer) = self.by_number.get(number).copied() else {
                    return Err(self.lost(i));
                };
                // Who was accepted has the address of its listening socket.
                let accepted = listens_at(image, inet.local);
                let (client, server) = if accepted { (peer, i) } else { (i, peer) };
                self.inside(client, server)
            }
            Peer::Closed => self.closed(i, connection),
            Peer::Over => self.over(i, connection),
            Peer::Kept(kept) => {
                let what = self.wanted[i].what.clone();
                if image.manifest.ran_on {
                    return Err(Error::Unfit {
                        what,
                        why: "the dumped process went on with this connection".into(),
                        remedy: "dump with --tcp close".into(),
                    });
                }
                let (fd, silent) = kept::make(&what, inet, connection, kept)?;
                self.sockets.insert(inet.number, fd);
                self.silent.push(silent);
                Ok(())
            }
            Peer::Waiting { .. } | Peer::Sought => Ok(()),
        }
    }

    fn lost(&self, i: usize) -> Error {
        Error::Open { what: self.wanted[i].what.clone(), call: "connect", errno: Errno::ENOTCONN }
    }

    fn inside(&mut self, client: usize, server: usize) -> Result<()> {
        let (a, b) = (self.wanted[client].inet, self.wanted[server].inet);
        let what = self.wanted[client].what.clone();
        let (near, far) = self.link(&what, a, b)?;
        let ends = [(&near, a), (&far, b)];
        for ((to, inet), (from, _)) in ends.iter().zip(ends.iter().rev()) {
            if let Some(connection) = &inet.connection {
                deliver(&what, from, to, &connection.received)?;
            }
        }
        let shut = |inet: &InetSocket| inet.connection.as_ref().map_or(0, |c| c.shutdown);
        for ((fd, inet), (_, other)) in ends.iter().zip(ends.iter().rev()) {
            shut_down(fd, shut(inet), shut(other) & SENDING != 0);
        }
        self.sockets.insert(a.number, near);
        self.sockets.insert(b.number, far);
        Ok(())
    }

    /// A socket that is connected to itself: a connect to its own address (RFC 9293, 3.5: simultaneous open).
    fn with_itself(&mut self, i: usize, connection: &Connection) -> Result<()> {
        let Wanted { inet, what } = &self.wanted[i];
        let fd = inet::new(what, inet)?;
        self.make_room(&fd);
        self.bind(what, &fd, inet)?;
        if let Some(local) = inet.local {
            inet::connect(&fd, local, inet.scope).map_err(Error::open(what, "connect"))?;
        }
        deliver(what, &fd, &fd, &connection.received)?;
        shut_down(&fd, connection.shutdown, connection.shutdown & SENDING != 0);
        self.sockets.insert(inet.number, fd);
        Ok(())
    }

    /// A socket whose peer was closed: the peer is made for the connect and what it had sent, and closed.
    fn closed(&mut self, i: usize, connection: &Connection) -> Result<()> {
        let inet = self.wanted[i].inet;
        let what = self.wanted[i].what.clone();
        let (near, far) = self.link(&what, inet, &stranger(connection.remote, connection.scope))?;
        deliver(&what, &far, &near, &connection.received)?;
        drop(far);
        shut_down(&near, connection.shutdown, true);
        self.sockets.insert(inet.number, near);
        Ok(())
    }

    /// A socket whose connection is over: it is reset once it has what it had received.
    fn over(&mut self, i: usize, connection: &Connection) -> Result<()> {
        let inet = self.wanted[i].inet;
        let what = self.wanted[i].what.clone();
        // Its address may be one of another machine by now; it is not used any more.
        let here = inet.local.filter(|l| can_bind(inet, *l)).map(|l| SocketAddr::new(l.ip(), 0));
        let anywhere = match inet.family {
            libc::AF_INET6 => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
            _ => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        let mut far_side = stranger(here.or(Some(anywhere)), inet.scope);
        far_side.family = inet.family;
        let mut near_side = inet.clone();
        near_side.local = here.and(inet.local);
        let (near, far) = self.link(&what, &near_side, &far_side)?;
        deliver(&what, &far, &near, &connection.received)?;
        let deadline = Instant::now() + PATIENCE;
        while tcp::unacknowledged(far.as_fd()).is_ok_and(|left| left > 0) && Instant::now() < deadline {
            let _hurry = tcp::acknowledge(near.as_fd());
            std::thread::sleep(Duration::from_micros(50));
        }
        let linger = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
        socket::set_bytes(&far, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
        drop(far);
        while state_of(&near) != state::CLOSE && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(50));
        }
        if !connection.failed {
            // Reading the error takes it away.
            socket::int(&near, libc::SOL_SOCKET, libc::SO_ERROR);
        }
        self.sockets.insert(inet.number, near);
        Ok(())
    }

    /// Makes what needs a listening socket, of the image or elsewhere: what waits to be accepted, or for an answer.
    fn waiting(&mut self, i: usize) -> Result<()> {
        let Wanted { inet, what } = &self.wanted[i];
        for client in &inet.abandoned {
            let to = inet.local.map(|l| match l.ip().is_unspecified() {
                true => SocketAddr::new(client.ip(), l.port()),
                false => l,
            });
            let side = stranger(Some(*client), inet.scope);
            let what = format!("{what}: a connection from {client}");
            self.reach(&what, &side, to.map(plain), inet.scope, true)?;
        }
        let Some(connection) = &inet.connection else { return Ok(()) };
        let wait = match &connection.peer {
            Peer::Waiting { .. } => true,
            Peer::Sought => false,
            _ => return Ok(()),
        };
        let fd = self.reach(what, inet, connection.remote, connection.scope, wait)?;
        if wait {
            deliver(what, &fd, &fd, &connection.sent)?;
            shut_down(&fd, connection.shutdown, false);
        }
        let number = inet.number;
        self.sockets.insert(number, fd);
        Ok(())
    }

    /// Connects to an address where somebody listens, or may listen.
    fn reach(
        &self,
        what: &str,
        side: &InetSocket,
        to: Option<SocketAddr>,
        scope: u32,
        wait: bool,
    ) -> Result<OwnedFd> {
        let fd = inet::new(what, side)?;
        self.bind(what, &fd, side)?;
        set_nonblocking(&fd);
        let Some(to) = to else {
            return Err(Error::Open { what: what.to_owned(), call: "connect", errno: Errno::ENOTCONN });
        };
        match inet::connect(&fd, to, scope) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(inet::conflict(what, side.local, "connect", errno)),
        }
        if wait && !ready(&fd, libc::POLLOUT) {
            let errno = Errno::ETIMEDOUT;
            return Err(Error::Open { what: what.to_owned(), call: "connect", errno });
        }
        Ok(fd)
    }

    /// A connection between two addresses of this machine.
    fn link(&mut self, what: &str, client: &InetSocket, server: &InetSocket) -> Result<(OwnedFd, OwnedFd)> {
        match self.through_door(what, client, server) {
            // Somebody listens there already. It may still be connected from.
            Err(Error::Conflict { .. }) if client.local.is_some_and(|l| l.port() != 0) => {
                self.through_door(what, server, client).map(|(a, b)| (b, a))
            }
            other => other,
        }
    }

    fn through_door(
        &mut self,
        what: &str,
        client: &InetSocket,
        server: &InetSocket,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let Some(at) = server.local else {
            return Err(Error::Open { what: what.to_owned(), call: "bind", errno: Errno::EDESTADDRREQ });
        };
        let v6_only = server
            .options
            .iter()
            .find(|o| o.level == libc::IPPROTO_IPV6 && o.name == libc::IPV6_V6ONLY)
            .map_or_else(Vec::new, |o| o.value.0.clone());
        let key = (server.family, at, v6_only);
        if !self.doors.contains_key(&key) {
            let door = self.door(what, server, at)?;
            self.doors.insert(key.clone(), door);
        }
        let door = &self.doors[&key];
        let address = address_of(door).ok_or_else(|| Error::last(what, "getsockname"))?;

        let near = inet::new(what, client)?;
        self.make_room(&near);
        self.bind(what, &near, client)?;
        // With a connect that has to be asked again, a program that was stopped inside of one gets its answer.
        set_nonblocking(&near);
        let to = if client.family == libc::AF_INET { plain(address) } else { mapped(address) };
        match inet::connect(&near, to, server.scope) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(inet::conflict(what, client.local, "connect", errno)),
        }
        let own = address_of(&near).map(plain);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if Instant::now() > deadline || !ready(door, libc::POLLIN) {
                let errno = Errno::ETIMEDOUT;
                return Err(Error::Open { what: what.to_owned(), call: "accept4", errno });
            }
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            // SAFETY: accept4 may be given no address.
            let accepted =
                unsafe { libc::accept4(door.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
            let far = owned(what, "accept4", accepted)?;
            let peer = nix::sys::socket::getpeername::<SockaddrStorage>(far.as_raw_fd()).ok();
            // Others may knock at this address, too.
            if peer.and_then(|p| to_address(&p)).map(plain) == own {
                return Ok((near, far));
            }
        }
    }

    fn door(&self, what: &str, server: &InetSocket, at: SocketAddr) -> Result<OwnedFd> {
        let door = inet::new(what, server)?;
        self.make_room(&door);
        set_nonblocking(&door);
        inet::bind(&door, at, server.scope).map_err(|e| inet::conflict(what, Some(at), "bind", e))?;
        // SAFETY: listen takes numbers only.
        if unsafe { libc::listen(door.as_raw_fd(), 64) } != 0 {
            return Err(inet::conflict(what, Some(at), "listen", Errno::last()));
        }
        Ok(door)
    }

    /// Binds one end of a connection. Others on the port do not matter, as long as none has the same peer; but
    /// bind(2) sees that only in repair mode.
    fn bind(&self, what: &str, fd: &OwnedFd, inet: &InetSocket) -> Result<()> {
        let Some(address) = inet.local else { return Ok(()) };
        let mut result = inet::bind(fd, address, inet.scope);
        if result == Err(Errno::EADDRINUSE) && tcp::set_repair(fd.as_fd(), 1).is_ok() {
            result = inet::bind(fd, address, inet.scope);
            tcp::set_repair(fd.as_fd(), tcp::REPAIR_OFF).map_err(Error::kernel(what))?;
            socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        }
        result.map_err(|e| inet::conflict(what, Some(address), "bind", e))
    }

    /// Lets a socket receive the longest queue of the image at once; the size it had is set at the end. The window
    /// that a connection may ever have is decided on when it is made.
    fn make_room(&self, fd: &OwnedFd) {
        if self.room > 0 {
            enlarge(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, self.room);
        }
    }
}

/// A socket that is no part of the image.
fn stranger(address: Option<SocketAddr>, scope: u32) -> InetSocket {
    let address = address.map(plain);
    let family = if address.is_some_and(|a| a.is_ipv6()) { libc::AF_INET6 } else { libc::AF_INET };
    InetSocket { family, local: address, scope, ..InetSocket::default() }
}

fn listens_at(image: &Image, address: Option<SocketAddr>) -> bool {
    let Some(address) = address.map(plain) else { return false };
    image.objects.descriptions.iter().any(|d| match &d.kind {
        Kind::Inet(inet) if inet.listening.is_some() => inet.local.is_some_and(|l| {
            l.port() == address.port() && (l.ip().is_unspecified() || plain(l).ip() == address.ip())
        }),
        _ => false,
    })
}

fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An address as an IPv6 socket wants it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        v6 => v6,
    }
}

fn can_bind(inet: &InetSocket, address: SocketAddr) -> bool {
    let any = SocketAddr::new(address.ip(), 0);
    inet::new("", inet).is_ok_and(|fd| inet::bind(&fd, any, inet.scope).is_ok())
}

pub(crate) fn to_address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddr::from((v6.ip(), v6.port())))
}

fn address_of(fd: &OwnedFd) -> Option<SocketAddr> {
    to_address(&nix::sys::socket::getsockname(fd.as_raw_fd()).ok()?)
}

fn state_of(fd: &OwnedFd) -> u8 {
    tcp::info(fd.as_fd()).map_or(state::CLOSE, |info| info.state)
}

fn set_nonblocking(fd: &OwnedFd) {
    // SAFETY: fcntl takes numbers only. The flags of the description are set afterwards.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) };
}

fn ready(fd: &OwnedFd, events: i16) -> bool {
    let mut one = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd of ours.
    unsafe { libc::poll(&raw mut one, 1, PATIENCE.as_millis() as i32) };
    one.revents & events != 0 && one.revents & libc::POLLERR == 0
}

fn enlarge(fd: &OwnedFd, forced: i32, name: i32, size: i32) {
    if !socket::set_int(fd, libc::SOL_SOCKET, forced, size) {
        socket::set_int(fd, libc::SOL_SOCKET, name, size);
    }
}

/// Sends what is to be in the queue of `to`. Where that has no room for it at once, the rest waits at the sender.
fn deliver(what: &str, from: &OwnedFd, to: &OwnedFd, bytes: &[u8]) -> Result<()> {
    if bytes.len() > SMALL {
        let size = i32::try_from(bytes.len() + (1 << 20)).unwrap_or(i32::MAX / 2);
        enlarge(from, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, size);
    }
    let deadline = Instant::now() + PATIENCE;
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: send reads `rest`.
        let sent = unsafe { libc::send(from.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
        match usize::try_from(sent) {
            Ok(sent) => rest = &rest[sent..],
            Err(_) if Errno::last() == Errno::EAGAIN && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_micros(50));
            }
            Err(_) if Errno::last() == Errno::EAGAIN => {
                return Err(Error::Permission {
                    what: what.to_owned(),
                    call: "send",
                    errno: Errno::EAGAIN,
                    remedy: "more waits in its queues than buffers may hold: run torpor with CAP_NET_ADMIN",
                });
            }
            Err(_) => return Err(Error::last(what, "send")),
        }
    }
    if !bytes.is_empty() {
        // Acknowledged at once, the sender's buffer is free at once.
        let _only_sooner = tcp::acknowledge(to.as_fd());
    }
    Ok(())
}

/// Shuts down what was. A receiver whose peer has ended the stream need not be told.
fn shut_down(fd: &OwnedFd, shutdown: u8, ended: bool) {
    // SAFETY: shutdown takes numbers only. It fails where the connection is over, which is shut down anyway.
    unsafe {
        if shutdown & SENDING != 0 {
            libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR);
        }
        if shutdown & RECEIVING != 0 && !ended {
            libc::shutdown(fd.as_raw_fd(), libc::SHUT_RD);
        }
    }
}
