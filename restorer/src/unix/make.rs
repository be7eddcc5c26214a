//! Making all sockets of an image, without what waits in them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use torpor_image::Bytes;
use torpor_image::unix::{PeerCredentials, State, UnixSocket};

use super::place::Place;
use super::{all as sockets, by_number, creator, name, settle, title};
use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;
use crate::pipe::io;

/// How often, and how long apart, somebody outside with a full backlog is tried again: for a second in all.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);
/// Room in a backlog that is only for a moment.
const AMPLE: i32 = 4096;

/// One end of a connection, as far as it matters for making it.
#[derive(Clone, Copy)]
struct End<'s> {
    name: Option<&'s Bytes>,
    /// Whose name it is, if the end is of the image.
    unix: Option<&'s UnixSocket>,
    /// Who is told by its SO_PEERCRED: whoever made the other end.
    credentials: Option<&'s PeerCredentials>,
}

impl<'s> End<'s> {
    fn of(unix: &'s UnixSocket) -> Self {
        End { name: unix.name.as_ref(), unix: Some(unix), credentials: unix.peer_credentials.as_ref() }
    }

    /// A peer that is gone.
    fn ghost(of: &'s UnixSocket) -> Self {
        End { name: of.peer_name.as_ref(), unix: None, credentials: None }
    }
}

pub(super) fn all(opener: &mut Opener<'_>) -> Result<()> {
    let all = sockets(opener.image);
    for unix in &all {
        let what = title(opener, unix);
        match unix.state {
            State::Listening { backlog } => listen(opener, &what, unix, backlog)?,
            State::Idle if unix.is_connection() => {
                let fd = new(&what, unix.kind)?;
                name::bind(opener, &what, &fd, unix, true)?;
                opener.unix.insert(unix.number, fd);
            }
            _ => {}
        }
    }
    let done = |opener: &Opener<'_>, unix: &UnixSocket| opener.unix.fd(unix.number).is_some();
    for unix in all.iter().filter(|s| s.is_connection()) {
        let what = title(opener, unix);
        match unix.state {
            State::Connected { peer } if !done(opener, unix) => {
                let other = peer_of(opener, &what, peer)?;
                let (fd, peer_fd) = connection(opener, &what, unix.kind, End::of(unix), End::of(other))?;
                opener.unix.insert(unix.number, fd);
                opener.unix.insert(peer, peer_fd);
            }
            State::Orphaned => {
                let (fd, ghost) = connection(opener, &what, unix.kind, End::of(unix), End::ghost(unix))?;
                opener.unix.insert(unix.number, fd);
                opener.unix.ghosts.insert(unix.number, ghost);
            }
            State::Outside => {
                let fd = new(&what, unix.kind)?;
                name::bind(opener, &what, &fd, unix, false)?;
                reconnect(&what, &fd, unix)?;
                opener.unix.insert(unix.number, fd);
            }
            _ => {}
        }
    }
    for unix in &all {
        if let State::Listening { .. } = unix.state {
            waiting(opener, unix, &all)?;
        }
    }
    datagrams(opener, &all)
}

/// A new socket.
pub(super) fn new(what: &str, kind: i32) -> Result<OwnedFd> {
    // SAFETY: socket takes numbers only.
    owned(what, "socket", unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0) })
}

fn peer_of<'i>(opener: &Opener<'i>, what: &str, peer: u32) -> Result<&'i UnixSocket> {
    by_number(opener.image, peer).ok_or_else(|| Error::Open {
        what: what.to_owned(),
        call: "connect",
        errno: Errno::ENOTCONN,
    })
}

fn listen(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket, backlog: u32) -> Result<()> {
    let fd = new(what, unix.kind)?;
    name::bind(opener, what, &fd, unix, true)?;
    listen_on(opener, what, &fd, backlog as i32, unix.peer_credentials.as_ref())?;
    opener.unix.insert(unix.number, fd);
    Ok(())
}

fn listen_on(
    opener: &mut Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    backlog: i32,
    creator: Option<&PeerCredentials>,
) -> Result<()> {
    let raw = fd.as_raw_fd();
    // SAFETY: listen takes numbers only.
    let call = || unsafe { Errno::result(libc::listen(raw, backlog)).map(drop) };
    creator::call_for(opener, what, creator, &Place::Here, &call).map_err(Error::open(what, "listen"))
}

/// A connection: the two ends.
fn connection(
    opener: &mut Opener<'_>,
    what: &str,
    kind: i32,
    one: End<'_>,
    other: End<'_>,
) -> Result<(OwnedFd, OwnedFd)> {
    // An accepted end has the name of its listener; the other may have its own.
    let listener = |end: &End<'_>| end.name.and_then(|n| listener_named(opener, kind, n, end.unix));
    let accepted = match (listener(&one), listener(&other)) {
        (Some(_), _) => true,
        (None, Some(_)) => false,
        (None, None) if one.name.is_none() && other.name.is_none() => {
            return pair(opener, what, kind, one.credentials.or(other.credentials));
        }
        (None, None) => one.name.is_some(),
    };
    if accepted {
        let (client, server) = through(opener, what, kind, other, one)?;
        Ok((server, client))
    } else {
        through(opener, what, kind, one, other)
    }
}

/// A connection made by connecting to a listener, of the image or only for this: both ends.
fn through(
    opener: &mut Opener<'_>,
    what: &str,
    kind: i32,
    client: End<'_>,
    server: End<'_>,
) -> Result<(OwnedFd, OwnedFd)> {
    let Some(name) = server.name else { return pair(opener, what, kind, server.credentials) };
    let fd = new(what, kind)?;
    match client.unix {
        Some(unix) => name::bind(opener, what, &fd, unix, false)?,
        None => bind_ghost(opener, what, &fd, client.name)?,
    }
    let at = name::address(what, name)?;
    let known = listener_named(opener, kind, name, server.unix);
    let known = known.and_then(|n| Some((opener.unix.place(n), opener.unix.fd(n)?.try_clone())));
    let (place, listener) = match known {
        Some((place, listener)) => (place, listener.map_err(|e| io(what, "dup", &e))?),
        None => {
            let listener = new(what, kind)?;
            let (file, number) = server.unix.map_or((None, 0), |u| (u.file.as_ref(), u.number));
            let place = name::bind_hidden(opener, what, &listener, name, file, number)?;
            listen_on(opener, what, &listener, AMPLE, client.credentials)?;
            (place, listener)
        }
    };
    name::connect(opener, what, (&fd, &at, &place), server.credentials)
        .map_err(Error::open(what, "connect"))?;
    // SAFETY: accept4 may be given no address.
    let accepted = unsafe {
        libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    };
    Ok((fd, owned(what, "accept4", accepted)?))
}

/// The name that a peer which is gone once had. An abstract one may have been taken anew since, which
/// nobody but getpeername(2) could tell.
pub(super) fn bind_ghost(
    opener: &mut Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    name: Option<&Bytes>,
) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    match name::bind_hidden(opener, what, fd, name, None, 0) {
        Err(Error::Conflict { .. }) => Ok(()),
        bound => bound.map(drop),
    }
}

pub(super) fn pair(
    opener: &mut Opener<'_>,
    what: &str,
    kind: i32,
    creator: Option<&PeerCredentials>,
) -> Result<(OwnedFd, OwnedFd)> {
    let made = creator::Words::new().map_err(Error::open(what, "mmap"))?;
    let call = || {
        let mut fds = [-1i32; 2];
        // SAFETY: socketpair fills two ints.
        Errno::result(unsafe {
            libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
        })?;
        made.set(0, fds[0]);
        made.set(1, fds[1]);
        Ok(())
    };
    creator::call_for(opener, what, creator, &Place::Here, &call).map_err(Error::open(what, "socketpair"))?;
    Ok((owned(what, "socketpair", made.get(0))?, owned(what, "socketpair", made.get(1))?))
}

/// The listening socket of this name from which `accepted` came.
fn listener_named(
    opener: &Opener<'_>,
    kind: i32,
    name: &Bytes,
    accepted: Option<&UnixSocket>,
) -> Option<u32> {
    let inode = |unix: &UnixSocket| unix.file.as_ref().map_or(0, |f| f.inode);
    let fits = |unix: &&&UnixSocket| {
        let here = matches!(unix.state, State::Listening { .. });
        let same = accepted.is_none_or(|a| inode(a) == inode(unix) || inode(a) == 0 || inode(unix) == 0);
        here && unix.kind == kind && unix.name.as_ref() == Some(name) && same
    };
    sockets(opener.image).iter().find(fits).map(|unix| unix.number)
}

/// Those that wait to be accepted, in their order.
fn waiting(opener: &mut Opener<'_>, listener: &UnixSocket, all: &[&UnixSocket]) -> Result<()> {
    let State::Listening { backlog } = listener.state else { return Ok(()) };
    let is = |unix: &UnixSocket| unix.state == State::Waiting { listener: listener.number };
    let mut order = listener.pending.clone();
    // Images of before have no order.
    order.extend(all.iter().filter(|s| is(s) && !listener.pending.contains(&s.number)).map(|s| s.number));
    let what = title(opener, listener);
    if !order.is_empty() {
        // What an accepted socket inherits is what its listener has now.
        let fd = opener.unix.fd(listener.number).ok_or_else(|| refused(&what))?;
        settle(&what, fd, &UnixSocket { shutdown: 0, ..listener.clone() })?;
    }
    for number in order {
        let client = all.iter().find(|s| s.number == number && is(s));
        let what = client.map_or_else(|| what.clone(), |client| title(opener, client));
        let fd = new(&what, listener.kind)?;
        if let Some(client) = client {
            name::bind(opener, &what, &fd, client, false)?;
        }
        let Some(name) = &listener.name else { return Err(refused(&what)) };
        let at = name::address(&what, name)?;
        let place = opener.unix.place(listener.number);
        // Nobody has seen yet who is told to the accepted end: the first process that has this one.
        let creator = client.and_then(|client| holder_of(opener, client.number));
        // A full backlog is an error and not a reason to wait.
        match without_waiting(&fd, || name::connect(opener, &what, (&fd, &at, &place), creator.as_ref())) {
            Ok(()) => {}
            Err(Errno::EAGAIN) => {
                return Err(Error::Conflict {
                    what,
                    why: format!("the backlog of {backlog} of its listener is full"),
                    remedy: "raise /proc/sys/net/core/somaxconn to what it was".into(),
                });
            }
            Err(errno) => return Err(Error::Open { what, call: "connect", errno }),
        }
        if client.is_some() {
            opener.unix.insert(number, fd);
        }
    }
    Ok(())
}

fn refused(what: &str) -> Error {
    Error::Open { what: what.to_owned(), call: "connect", errno: Errno::ECONNREFUSED }
}

/// The first process of the image with a descriptor for a socket.
fn holder_of(opener: &Opener<'_>, number: u32) -> Option<PeerCredentials> {
    use torpor_image::description::Kind;
    let is = |id: torpor_image::DescriptionId| matches!(&opener.image.objects.descriptions[id.0 as usize].kind, Kind::Unix(u) if u.number == number);
    let task = opener.image.tasks.iter().find(|t| t.descriptors.iter().any(|d| is(d.description)))?;
    let credentials = &task.threads.first()?.credentials;
    Some(PeerCredentials {
        pid: task.pid.0,
        uid: credentials.uids[1],
        gid: credentials.gids[1],
        groups: credentials.groups.clone(),
    })
}

/// Makes a call on a socket that is not to wait.
fn without_waiting(fd: &OwnedFd, call: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
    let nonblocking = |mut on: i32| {
        // SAFETY: FIONBIO reads an int.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) };
    };
    nonblocking(1);
    let called = call();
    nonblocking(0);
    called
}

/// Connects anew to a peer that is not in the image. One whose backlog is full may be about to accept.
pub(super) fn reconnect(what: &str, fd: &OwnedFd, unix: &UnixSocket) -> Result<()> {
    let Some(name) = &unix.peer_name else { return Err(refused(what)) };
    let at = name::address(what, name)?;
    let mut tries = 0;
    let connected = loop {
        match without_waiting(fd, || name::try_connect(fd, &at, &Place::Here)) {
            Err(Errno::EAGAIN) if tries < TRIES => {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            done => break done,
        }
    };
    connected.map_err(|errno| {
        let at = UnixSocket::title(name);
        let failed = |why: String, remedy: &str| Error::Conflict {
            what: what.to_owned(),
            why: format!("it cannot be connected anew to `{at}`: {why}"),
            remedy: remedy.into(),
        };
        match errno {
            Errno::EAGAIN => failed(
                format!("{errno}: the backlog of who listens there is full"),
                "try again once that program accepts connections",
            ),
            Errno::EPROTOTYPE => failed(
                format!("{errno}: a socket of another type is there"),
                "start the program that listened there",
            ),
            Errno::EACCES | Errno::EPERM => Error::Permission {
                what: format!("{what}, connected anew to `{at}`"),
                call: "connect",
                errno,
                remedy: "run torpor as a user who may connect to it",
            },
            errno => failed(errno.to_string(), "start the program that listens there"),
        }
    })
}

/// Datagram sockets: pairs are connected now, all others when their queues are full, since a connected
/// socket takes messages from its peer only.
fn datagrams(opener: &mut Opener<'_>, all: &[&UnixSocket]) -> Result<()> {
    let all: Vec<&UnixSocket> = all.iter().copied().filter(|s| !s.is_connection()).collect();
    for unix in &all {
        if opener.unix.fd(unix.number).is_some() {
            continue;
        }
        let what = title(opener, unix);
        let peer = match unix.state {
            State::Connected { peer } | State::Towards { peer } => Some(peer_of(opener, &what, peer)?),
            _ => None,
        };
        // What has no name was never connected to: it is one end of a pair.
        let unnamed = |p: &&UnixSocket| {
            p.number != unix.number
                && (p.name.is_none()
                    || unix.name.is_none() && unix.state == State::Connected { peer: p.number })
        };
        match (unix.state, peer.filter(unnamed)) {
            (_, Some(peer)) => {
                let (fd, peer_fd) = pair(opener, &what, unix.kind, unix.peer_credentials.as_ref())?;
                name::bind(opener, &what, &fd, unix, true)?;
                name::bind(opener, &what, &peer_fd, peer, true)?;
                opener.unix.connected.insert(unix.number);
                if peer.state == (State::Connected { peer: unix.number }) {
                    opener.unix.connected.insert(peer.number);
                } else {
                    disconnect(&what, &peer_fd)?;
                }
                opener.unix.insert(unix.number, fd);
                opener.unix.insert(peer.number, peer_fd);
            }
            (State::Orphaned, _) if unix.peer_name.is_none() => {
                let (fd, ghost) = pair(opener, &what, unix.kind, unix.peer_credentials.as_ref())?;
                name::bind(opener, &what, &fd, unix, true)?;
                opener.unix.connected.insert(unix.number);
                opener.unix.insert(unix.number, fd);
                opener.unix.ghosts.insert(unix.number, ghost);
            }
            _ => {
                let fd = new(&what, unix.kind)?;
                name::bind(opener, &what, &fd, unix, true)?;
                opener.unix.insert(unix.number, fd);
            }
        }
    }
    Ok(())
}

fn disconnect(what: &str, fd: &OwnedFd) -> Result<()> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: an address of ours with its length.
    let done = unsafe {
        libc::connect(fd.as_raw_fd(), &raw const nobody, size_of::<libc::sockaddr>() as libc::socklen_t)
    };
    if done != 0 { Err(Error::last(what, "connect(AF_UNSPEC)")) } else { Ok(()) }
}
