//! unix(7): state from sock_diag, queues by peeking.
//!
//! The end of a connection that was not accepted yet has no descriptor anywhere, so that nobody can read what
//! waits in it; it shows in sock_diag without an inode number. Such connections are kept when they are empty;
//! else the freeze is put off for a moment, and then they are refused.

mod flight;
mod outside;
mod peek;

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::poll::PollFlags;
use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::unix::{BoundFile, PeerCredentials, State, UnixSocket};
use torpor_kernel::ids::Pid;
use torpor_kernel::{fds, sock_diag};

use crate::collect::{Collector, stat_path};
use crate::description::Found;
use crate::error::Result;
use crate::opened::Opened;
use crate::socket;

pub(crate) use flight::{Sockets, flight, resolve, scan};
pub(crate) use outside::holder;
pub use outside::{ExternalUnix, Policy};

/// Socket states as sock_diag tells them (net/tcp_states.h).
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
/// linux/sockios.h: a descriptor for the file a socket is bound to.
const SIOCUNIXFILE: libc::Ioctl = 0x89E0;
/// asm-generic/socket.h
const SO_PEERGROUPS: i32 = 59;
const CLOSE_IT: &str = "close it before the dump";
const TRY_AGAIN: &str = "try again once the program has accepted it";

pub(crate) fn collect(collector: &mut Collector, found: &Found, fd: &OwnedFd) -> Result<Option<Kind>> {
    let number = found.stat.st_ino as u32;
    let Some(diag) = collector.unix_socket(number)? else {
        if collector.live {
            // Closed since.
            return Ok(None);
        }
        collector.refuse(found.title(), "the kernel lists no unix socket of this number", CLOSE_IT);
        return Ok(None);
    };
    if socket::filter_length(fd) > 0 {
        collector.refuse(found.title(), "a socket filter cannot be dumped yet", CLOSE_IT);
        return Ok(None);
    }
    let Some(mut state) = state(collector, found, fd, &diag)? else { return Ok(None) };
    let Some((mut queue, mut attached)) = collector.sockets.waiting(number) else { return Ok(None) };
    let error = flight::readiness(fd).contains(PollFlags::POLLERR);
    let mut lost = |what: &str| {
        if !collector.live {
            collector.lose(format!("{}: {what}", found.title()));
        }
    };
    if state.state == State::Outside && !queue.is_empty() {
        lost("what waited in it, since it is connected anew");
        (queue, attached) = Default::default();
    }
    if error && !(state.state == State::Orphaned && diag.kind != libc::SOCK_DGRAM) {
        lost("an error that its next call would have returned (SO_ERROR)");
    }
    if state.state == State::Idle && diag.kind != libc::SOCK_DGRAM && !queue.is_empty() {
        collector.refuse(found.title(), "data waits in it although it is not connected", CLOSE_IT);
        return Ok(None);
    }
    if let State::Listening { .. } = state.state {
        queue.clear();
    }
    // Those whose peer is taken to be gone cannot send either.
    let connection = diag.kind != libc::SOCK_DGRAM;
    let shutdown = if state.closed && connection { 3 } else { diag.shutdown };
    let file = match &diag.name {
        Some(name) if name.first() != Some(&0) => match bound_file(fd, &diag) {
            Some(file) => Some(file),
            None => {
                let what = format!("the file `{}` it is bound to cannot be found", UnixSocket::title(name));
                let remedy = "run torpor with CAP_NET_ADMIN, or close it before the dump";
                collector.refuse(found.title(), what, remedy);
                return Ok(None);
            }
        },
        _ => None,
    };
    Ok(Some(Kind::Unix(UnixSocket {
        number,
        kind: diag.kind,
        state: state.state,
        name: diag.name.map(Bytes),
        file,
        queue,
        shutdown,
        options: socket::options(fd, libc::AF_UNIX, diag.kind, 0, &[]),
        attached,
        peer_name: state.peer_name.take(),
        pending: state.pending,
        peer_credentials: peer_credentials(fd),
        reset: error && state.state == State::Orphaned && connection,
    })))
}

/// What a socket does, and with whom.
struct Relation {
    state: State,
    peer_name: Option<Bytes>,
    pending: Vec<u32>,
    /// Taken to be closed at its user's wish.
    closed: bool,
}

impl From<State> for Relation {
    fn from(state: State) -> Self {
        Relation { state, peer_name: None, pending: Vec::new(), closed: false }
    }
}

fn state(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    diag: &sock_diag::UnixSocket,
) -> Result<Option<Relation>> {
    match (diag.state, diag.peer) {
        (LISTEN, _) => listening(collector, found, diag),
        (_, Some(0)) if diag.kind == libc::SOCK_DGRAM => Ok(Some(orphaned(fd))),
        (_, Some(0)) => match collector.unix_listener_of(diag.inode)? {
            Some(listener) if ours(collector, listener.inode) => {
                // A running program is about to accept it; the frozen one has had time for it.
                if diag.wqueue > 0 && !collector.live {
                    let why = "data waits in a connection that was not accepted, where nobody can read it";
                    collector.refuse(found.title(), why, TRY_AGAIN);
                    return Ok(None);
                }
                Ok(Some(State::Waiting { listener: listener.inode }.into()))
            }
            Some(listener) => outside(collector, found, fd, diag, &listener),
            // The kernel keeps the peer of a socket whose other end was closed, but without a number.
            None if diag.shutdown & 3 == 3 => Ok(Some(orphaned(fd))),
            None => {
                collector.refuse(found.title(), "its other end is nowhere to be found", "try again");
                Ok(None)
            }
        },
        (_, Some(peer)) => {
            let other = collector.unix_socket(peer)?;
            let back = other.as_ref().and_then(|p| p.peer) == Some(diag.inode);
            match other {
                Some(_) if ours(collector, peer) && back && peer != diag.inode => {
                    Ok(Some(State::Connected { peer }.into()))
                }
                Some(_) if ours(collector, peer) && diag.kind == libc::SOCK_DGRAM => {
                    Ok(Some(State::Towards { peer }.into()))
                }
                Some(other) => outside(collector, found, fd, diag, &other),
                None => Ok(Some(orphaned(fd))),
            }
        }
        // A datagram socket is in this state once anyone has connected to it.
        (ESTABLISHED, None) if diag.kind != libc::SOCK_DGRAM => Ok(Some(orphaned(fd))),
        _ => Ok(Some(State::Idle.into())),
    }
}

/// A socket that listens, and who waits to be accepted: clients of the image are told from their side.
fn listening(
    collector: &mut Collector,
    found: &Found,
    diag: &sock_diag::UnixSocket,
) -> Result<Option<Relation>> {
    let state = State::Listening { backlog: diag.wqueue };
    if collector.live {
        return Ok(Some(state.into()));
    }
    let name = diag.name.as_deref().unwrap_or_default();
    let mut pending = Vec::with_capacity(diag.pending.len());
    for client in diag.pending.iter().copied() {
        if client == 0 || collector.owns_socket(client) {
            pending.push(client);
            continue;
        }
        let who = outside::holder(client);
        if outside::policy(&collector.sockets.rules, &UnixSocket::title(name)).is_none() {
            let why = format!("a connection of {who} waits to be accepted");
            collector.refuse(found.title(), why, TRY_AGAIN);
            return Ok(None);
        }
        collector.lose(format!("{}: a connection of {who} that was not accepted", found.title()));
    }
    let closed = collector.unaccepted(name)?.into_iter().any(|s| s.peer == Some(0) && s.rqueue > 0);
    if closed && pending.contains(&0) {
        let why = "data waits in a connection that was not accepted, and whose client is gone";
        collector.refuse(found.title(), why, TRY_AGAIN);
        return Ok(None);
    }
    Ok(Some(Relation { pending, ..state.into() }))
}

fn orphaned(fd: &OwnedFd) -> Relation {
    Relation { peer_name: peer_name(fd), ..State::Orphaned.into() }
}

/// Whether a socket is part of the dump; of one that a running process has just made the tables tell.
fn ours(collector: &Collector, number: u32) -> bool {
    let link = format!("socket:[{number}]").into_bytes();
    let has = |pid: Pid| {
        let all = fds::list(pid).unwrap_or_default();
        all.into_iter().any(|fd| fds::readlink(pid, fd).is_ok_and(|l| l == link))
    };
    collector.owns_socket(number) || collector.live && collector.members.iter().any(|pid| has(Pid(*pid)))
}

/// A socket whose other end is not part of the dump.
fn outside(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    diag: &sock_diag::UnixSocket,
    other: &sock_diag::UnixSocket,
) -> Result<Option<Relation>> {
    let name = peer_name(fd);
    // An accepted end has a name, and its peer as a rule none.
    let told = name.as_deref().or(diag.name.as_deref()).map(UnixSocket::title).unwrap_or_default();
    let called = if told.is_empty() { String::new() } else { format!(" `{told}`") };
    match outside::policy(&collector.sockets.rules, &told) {
        None => {
            let who = outside::holder(other.inode);
            let remedy = match reachable(name.as_deref()) {
                Some(_) => {
                    "dump a tree with both ends, close it, or say `--external-unix reconnect` or `closed`"
                }
                // As of a pair.
                None => "dump a tree with both ends, close it, or say `--external-unix closed`",
            };
            let why = format!("its other end{called} belongs to {who}, which is not part of the dump");
            collector.refuse(found.title(), why, remedy);
            Ok(None)
        }
        Some(Policy::Closed) => {
            Ok(Some(Relation { peer_name: name, closed: true, ..State::Orphaned.into() }))
        }
        Some(Policy::Reconnect) => {
            let listens = match reachable(name.as_deref()) {
                Some(name) => diag.kind == libc::SOCK_DGRAM || collector.listens(name)?,
                None => false,
            };
            if !listens {
                collector.refuse(
                    found.title(),
                    match reachable(name.as_deref()) {
                        Some(_) => format!("nobody listens any more where its other end{called} is, so that it could be connected anew"),
                        None => format!("its other end{called} has no address that it could be connected to anew"),
                    },
                    "close it before the dump, or say `--external-unix closed` of it",
                );
                return Ok(None);
            }
            Ok(Some(Relation { peer_name: name, ..State::Outside.into() }))
        }
    }
}

/// The name of a peer, if it leads there from anywhere.
fn reachable(name: Option<&[u8]>) -> Option<&[u8]> {
    name.filter(|n| matches!(n.first(), Some(b'/' | 0)))
}

/// Whether processes have connections that they have not accepted yet, and that a dump would lose.
pub(crate) fn unaccepted(all: &[Opened]) -> bool {
    let owned: HashSet<u32> = all.iter().flat_map(Opened::sockets).collect();
    if owned.is_empty() {
        return false;
    }
    let all = sock_diag::unix_sockets().unwrap_or_default();
    let unsent = |client: u32| {
        client == 0 || !owned.contains(&client) || all.iter().any(|s| s.inode == client && s.wqueue > 0)
    };
    all.iter().any(|s| owned.contains(&s.inode) && s.pending.iter().any(|client| unsent(*client)))
}

/// getpeername(2), as far as there is one.
fn peer_name(fd: &OwnedFd) -> Option<Bytes> {
    // SAFETY: an all-zero sockaddr_un is a valid one.
    let mut raw: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: an address of ours with its length.
    let got = unsafe { libc::getpeername(fd.as_raw_fd(), (&raw mut raw).cast(), &raw mut len) };
    let length = (len as usize).min(size_of_val(&raw)).checked_sub(size_of::<libc::sa_family_t>())?;
    let bytes: Vec<u8> = raw.sun_path[..length.min(raw.sun_path.len())].iter().map(|c| *c as u8).collect();
    (got == 0 && !bytes.is_empty()).then(|| address(&bytes))
}

/// An address as the image has it: a path without the zero that the kernel adds.
fn address(raw: &[u8]) -> Bytes {
    if raw.first() == Some(&0) {
        raw.into()
    } else {
        raw.split(|b| *b == 0).next().unwrap_or_default().into()
    }
}

/// SO_PEERCRED and SO_PEERGROUPS.
fn peer_credentials(fd: &OwnedFd) -> Option<PeerCredentials> {
    let value = socket::option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    let words = value.as_chunks::<4>().0;
    let [pid, uid, gid] = words else { return None };
    let pid = i32::from_ne_bytes(*pid);
    let mut groups = vec![0u32; 64];
    let mut len = (groups.len() * 4) as libc::socklen_t;
    loop {
        // SAFETY: SO_PEERGROUPS fills at most `len` bytes, and tells how many it wants.
        let got = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let wanted = len as usize / 4;
        if got == 0 {
            groups.truncate(wanted);
            break;
        }
        if wanted <= groups.len() {
            groups.clear();
            break;
        }
        groups.resize(wanted, 0);
    }
    (pid > 0).then(|| PeerCredentials {
        pid,
        uid: u32::from_ne_bytes(*uid),
        gid: u32::from_ne_bytes(*gid),
        groups,
    })
}

fn bound_file(fd: &OwnedFd, diag: &sock_diag::UnixSocket) -> Option<BoundFile> {
    // SAFETY: SIOCUNIXFILE takes no argument and returns a new descriptor (needs CAP_NET_ADMIN).
    let file = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) };
    let (path, own) = if file >= 0 {
        // SAFETY: the descriptor was just opened for us.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        let link = nix::fcntl::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).ok()?;
        let link = std::os::unix::ffi::OsStringExt::into_vec(link);
        let own = nix::sys::stat::fstat(file.as_fd()).ok();
        (crate::description::without_deleted(&link), own)
    } else {
        // Without the privilege an absolute name is as good, as long as it leads to the socket.
        let address: nix::sys::socket::UnixAddr = nix::sys::socket::getsockname(fd.as_raw_fd()).ok()?;
        let path = address.path().filter(|p| p.is_absolute())?;
        (Bytes(path.as_os_str().as_encoded_bytes().to_vec()), None)
    };
    if path.first() != Some(&b'/') {
        return None;
    }
    let inode = own.map(|s| s.st_ino).or(diag.vfs.map(|(_, inode)| u64::from(inode)));
    let now = stat_path(&path).filter(|s| {
        s.st_mode & libc::S_IFMT == libc::S_IFSOCK
            && inode.is_none_or(|i| i as u32 == s.st_ino as u32)
            && own.is_none_or(|own| own.st_dev == s.st_dev)
    });
    let stat = now.or(own)?;
    Some(BoundFile {
        path,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        unlinked: now.is_none(),
        inode: inode.unwrap_or_default(),
    })
}
