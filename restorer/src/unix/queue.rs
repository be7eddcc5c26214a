//! Putting back what waited in queues, with what was attached to it.
//!
//! Everything is sent through the socket it came from, as far as that is in the image: the other end of a
//! connection; for datagrams the socket whose address the receiver is told, else a socket made for this with
//! the same address. A message with credentials is sent by us in the name of its sender, which the privileged
//! may (unix(7), SCM_CREDENTIALS) if there is a process of that pid: those of restored processes wait until
//! these are born, and for others one that has ended stands in.
//!
//! Datagram sockets are connected only afterwards: who is connected takes messages from its peer only.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, UnixAddr};
use torpor_image::unix::{Attached, Sender, State, UnixSocket};
use torpor_image::{Bytes, DescriptionId};

use super::place::Place;
use super::{all as sockets, creator, make, name, settle, title};
use crate::error::{Error, Result};
use crate::late::{self, Moment};
use crate::open::Opener;
use crate::socket;

/// Room for what waits in a queue while it is put back; the real size is set afterwards.
const AMPLE: i32 = 64 << 20;

/// Where descriptions are that were made.
pub(crate) type Slots<'s> = &'s (dyn Fn(DescriptionId) -> Option<BorrowedFd<'s>> + 's);

/// Fills the queues of all sockets but those that wait for processes or their threads. Every description exists.
pub(crate) fn deliver_all(opener: &mut Opener<'_>, slots: Slots<'_>) -> Result<()> {
    let all = sockets(opener.image);
    let tasks: Vec<i32> = opener.image.tasks.iter().map(|t| t.pid.0).collect();
    for unix in &all {
        if opener.unix.fd(unix.number).is_none() {
            continue;
        }
        let from_task = |a: &Attached| a.credentials.is_some_and(|c| tasks.contains(&c.pid));
        let credentials = unix.attached.iter().any(from_task).then_some(Moment::Birth);
        let rights = unix.attached.iter().flat_map(|a| &a.rights);
        let rights = rights.filter_map(|id| late::moment(opener.image, *id)).max();
        match credentials.max(rights) {
            Some(moment) => opener.unix.late.push((unix.number, moment)),
            None => fill(opener, slots, unix)?,
        }
    }
    if opener.unix.late.is_empty() { finish(opener, &all) } else { Ok(()) }
}

/// Fills queues that [`deliver_all`] left until this moment.
pub(crate) fn deliver_late(opener: &mut Opener<'_>, slots: Slots<'_>, now: Moment) -> Result<()> {
    let (due, rest): (Vec<_>, Vec<_>) =
        std::mem::take(&mut opener.unix.late).into_iter().partition(|(_, moment)| *moment == now);
    opener.unix.late = rest;
    if due.is_empty() {
        return Ok(());
    }
    let all = sockets(opener.image);
    for unix in all.iter().filter(|s| due.iter().any(|(number, _)| *number == s.number)) {
        fill(opener, slots, unix)?;
    }
    if opener.unix.late.is_empty() { finish(opener, &all) } else { Ok(()) }
}

/// Connects datagram sockets, closes what stood in for peers that are gone, and sets what comes last.
fn finish(opener: &mut Opener<'_>, all: &[&UnixSocket]) -> Result<()> {
    connect_datagrams(opener, all)?;
    for unix in all {
        let Some(fd) = opener.unix.fd(unix.number) else { continue };
        let what = title(opener, unix);
        if let (true, Some(_)) = (unix.reset, opener.unix.ghosts.get(&unix.number)) {
            // A peer that is closed with something unread leaves an error (net/unix/af_unix.c,
            // `unix_release_sock`).
            send(&what, fd, None, b"x", &[], None, 0)?;
        }
        drop(opener.unix.ghosts.remove(&unix.number));
        if let Some(fd) = opener.unix.fd(unix.number) {
            settle(&what, fd, unix)?;
        }
    }
    for path in std::mem::take(&mut opener.unix.unlink) {
        let _gone = std::fs::remove_file(path);
    }
    Ok(())
}

/// Fills one queue.
fn fill(opener: &mut Opener<'_>, slots: Slots<'_>, unix: &UnixSocket) -> Result<()> {
    if unix.queue.is_empty() {
        return Ok(());
    }
    let what = title(opener, unix);
    for (index, data) in unix.queue.iter().enumerate() {
        let attached = unix.attached_to(index);
        let rights: Vec<RawFd> =
            attached
                .iter()
                .flat_map(|a| &a.rights)
                .map(|id| {
                    opener.late.get(*id).or_else(|| slots(*id)).map(|fd| fd.as_raw_fd()).ok_or_else(|| {
                        Error::Open { what: what.clone(), call: "sendmsg", errno: Errno::EBADF }
                    })
                })
                .collect::<Result<_>>()?;
        let (from, to) = sender(opener, &what, unix, attached.and_then(|a| a.from.as_ref()))?;
        let credentials = attached.and_then(|a| a.credentials).filter(|c| c.pid != 0);
        let flags = if attached.is_some_and(|a| a.urgent) { libc::MSG_OOB } else { 0 };
        let room = Room::make(&from);
        let to = to.as_ref().map(|(at, place)| (at, place));
        match credentials {
            None => send(&what, &from, to, data, &rights, None, flags)?,
            Some(sender) => {
                creator::with_pid(sender.pid, || send(&what, &from, to, data, &rights, Some(sender), flags))?
            }
        }
        drop(room);
    }
    Ok(())
}

/// The socket to send a message from, and the address where it must be sent to if that is not its peer.
fn sender(
    opener: &mut Opener<'_>,
    what: &str,
    unix: &UnixSocket,
    from: Option<&Bytes>,
) -> Result<(OwnedFd, Option<(UnixAddr, Place)>)> {
    let lost = || Error::Open { what: what.to_owned(), call: "sendmsg", errno: Errno::EDESTADDRREQ };
    let dup = |fd: &OwnedFd| fd.try_clone().map_err(|e| crate::pipe::io(what, "dup", &e));
    let peer = match unix.state {
        State::Connected { peer } | State::Towards { peer } => Some(peer),
        _ => None,
    };
    let tied = unix.is_connection() || opener.unix.connected.contains(&unix.number);
    if let (Some(ghost), true) = (opener.unix.ghosts.get(&unix.number), tied) {
        let ghost = dup(ghost)?;
        if !unix.is_connection()
            && let Some(from) = from
            && nix::sys::socket::getsockname::<UnixAddr>(ghost.as_raw_fd()).is_ok_and(|n| n.path().is_none())
        {
            make::bind_ghost(opener, what, &ghost, Some(from))?;
        }
        return Ok((ghost, None));
    }
    if tied {
        return Ok((dup(peer.and_then(|p| opener.unix.fd(p)).ok_or_else(lost)?)?, None));
    }
    let to = name::address(what, unix.name.as_ref().ok_or_else(lost)?)?;
    let place = opener.unix.place(unix.number);
    let named = |s: &&&UnixSocket| !s.is_connection() && s.name.is_some() && s.name.as_ref() == from;
    let known = sockets(opener.image);
    // Of several with this address, its peer is the likely one.
    let known =
        known.iter().find(|s| Some(s.number) == peer && named(s)).or_else(|| known.iter().find(named));
    let fd = match known.and_then(|s| opener.unix.fd(s.number)) {
        Some(fd) => dup(fd)?,
        None => {
            let fd = make::new(what, unix.kind)?;
            if let Some(from) = from {
                name::bind_hidden(opener, what, &fd, from, None, 0)?;
            }
            fd
        }
    };
    Ok((fd, Some((to, place))))
}

/// A large send buffer, for as long as this is there.
struct Room<'f> {
    fd: &'f OwnedFd,
    before: i32,
}

impl<'f> Room<'f> {
    fn make(fd: &'f OwnedFd) -> Self {
        let mut before = 0i32;
        let mut length = size_of::<i32>() as libc::socklen_t;
        // SAFETY: SO_SNDBUF fills an int.
        unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUF,
                (&raw mut before).cast(),
                &raw mut length,
            );
        }
        let room = Room { fd, before };
        room.set(AMPLE / 2);
        room
    }

    fn set(&self, value: i32) {
        let _as_far_as_allowed = socket::set_int(self.fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value)
            || socket::set_int(self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, value);
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.set(self.before / 2);
    }
}

/// Room for 253 descriptors (net/scm.h, `SCM_MAX_FD`) and credentials.
#[repr(C, align(8))]
struct Control([u8; 1280]);

/// Sends one message; of a stream all of it.
fn send(
    what: &str,
    fd: &OwnedFd,
    to: Option<(&UnixAddr, &Place)>,
    data: &[u8],
    rights: &[RawFd],
    credentials: Option<Sender>,
    flags: i32,
) -> Result<()> {
    let mut control = Control([0; 1280]);
    // SAFETY: an all-zero msghdr is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    let mut used = 0;
    // SAFETY: CMSG_* walk `control` within its length, which has room for both.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        let mut put = |kind: i32, bytes: &[u8]| {
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = libc::CMSG_LEN(bytes.len() as u32) as _;
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), libc::CMSG_DATA(header), bytes.len());
            used += libc::CMSG_SPACE(bytes.len() as u32) as usize;
            header = control.0.as_mut_ptr().add(used).cast();
        };
        if !rights.is_empty() {
            let bytes: Vec<u8> = rights.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
            put(libc::SCM_RIGHTS, &bytes);
        }
        if let Some(Sender { pid, uid, gid }) = credentials {
            // Those of which only the process was told are taken to be of its user.
            let id = |id: u32, own: u32| if id == u32::MAX { own } else { id };
            let (uid, gid) = (id(uid, libc::geteuid()), id(gid, libc::getegid()));
            put(libc::SCM_CREDENTIALS, &[pid.to_ne_bytes(), uid.to_ne_bytes(), gid.to_ne_bytes()].concat());
        }
    }
    message.msg_controllen = used as _;
    if used == 0 {
        message.msg_control = std::ptr::null_mut();
    }
    if let Some((at, _)) = to {
        message.msg_name = at.as_ptr().cast_mut().cast();
        message.msg_namelen = at.len();
    }
    let mut rest = data;
    loop {
        let mut part = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        let place = to.map_or(&Place::Here, |(_, place)| place);
        let raw = RawMessage(&raw const message);
        let sent = std::sync::atomic::AtomicUsize::new(0);
        let done = place.run(&|| {
            let message = raw.get();
            // SAFETY: the message names buffers that live until the call is done.
            let got = unsafe {
                libc::sendmsg(fd.as_raw_fd(), message, flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            };
            sent.store(Errno::result(got)?.unsigned_abs(), std::sync::atomic::Ordering::SeqCst);
            Ok(())
        });
        done.map_err(|errno| refused(what, errno))?;
        rest = &rest[sent.into_inner().min(rest.len())..];
        if rest.is_empty() {
            return Ok(());
        }
        // What was attached went with the first part.
        message.msg_control = std::ptr::null_mut();
        message.msg_controllen = 0;
    }
}

/// A message for another thread, which is waited for.
#[derive(Clone, Copy)]
struct RawMessage(*const libc::msghdr);

impl RawMessage {
    fn get(&self) -> *const libc::msghdr {
        self.0
    }
}

// SAFETY: the thread that made it waits while the other one reads it.
unsafe impl Send for RawMessage {}
// SAFETY: as above.
unsafe impl Sync for RawMessage {}

fn refused(what: &str, errno: Errno) -> Error {
    match errno {
        Errno::EPERM => Error::Permission {
            what: what.to_owned(),
            call: "sendmsg with the credentials of another process",
            errno,
            remedy: "run torpor as root",
        },
        Errno::EAGAIN => Error::Conflict {
            what: what.to_owned(),
            why: "more datagrams wait in it than a queue takes here".into(),
            remedy: "raise /proc/sys/net/unix/max_dgram_qlen".into(),
        },
        errno => Error::Open { what: what.to_owned(), call: "sendmsg", errno },
    }
}

/// Connects datagram sockets: each before its target gets a peer of its own, from when on it could not be
/// connected to by any other.
fn connect_datagrams(opener: &mut Opener<'_>, all: &[&UnixSocket]) -> Result<()> {
    let target = |s: &UnixSocket| match s.state {
        State::Connected { peer } | State::Towards { peer } => Some(peer),
        _ => None,
    };
    let mut left: Vec<&UnixSocket> = all
        .iter()
        .copied()
        .filter(|s| !s.is_connection() && !opener.unix.connected.contains(&s.number))
        .filter(|s| matches!(s.state, State::Outside | State::Orphaned) || target(s).is_some())
        .collect();
    for unix in order(&mut left, target) {
        let what = title(opener, unix);
        let Some(fd) = opener.unix.fd(unix.number).map(OwnedFd::try_clone) else { continue };
        let fd = fd.map_err(|e| crate::pipe::io(&what, "dup", &e))?;
        if unix.state == State::Outside {
            make::reconnect(&what, &fd, unix)?;
            continue;
        }
        let (at, place) = match target(unix) {
            Some(peer) => {
                let other = all.iter().find(|s| s.number == peer).and_then(|s| s.name.as_ref());
                let Some(other) = other else {
                    return Err(Error::Open { what, call: "connect", errno: Errno::ENOTCONN });
                };
                (name::address(&what, other)?, opener.unix.place(peer))
            }
            None => {
                let Some(gone) = &unix.peer_name else { continue };
                let ghost = make::new(&what, unix.kind)?;
                let place = match name::bind_hidden(opener, &what, &ghost, gone, None, 0) {
                    Ok(place) => place,
                    // The address was taken anew since: sending to it is no different.
                    Err(Error::Conflict { .. }) => continue,
                    Err(e) => return Err(e),
                };
                opener.unix.ghosts.insert(unix.number, ghost);
                (name::address(&what, gone)?, place)
            }
        };
        name::try_connect(&fd, &at, &place).map_err(Error::open(&what, "connect"))?;
    }
    Ok(())
}

/// Those first that nobody else is to be connected to any more.
fn order<'s>(
    left: &mut Vec<&'s UnixSocket>,
    target: impl Fn(&UnixSocket) -> Option<u32>,
) -> Vec<&'s UnixSocket> {
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let free = |s: &&UnixSocket| {
            !left
                .iter()
                .any(|o| o.number != s.number && target(o) == Some(s.number) && target(s) != Some(o.number))
        };
        // There is none in a ring, which cannot have come about; the kernel will say so.
        let next = left.iter().position(free).unwrap_or(0);
        ordered.push(left.remove(next));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dgram(number: u32, state: State) -> UnixSocket {
        UnixSocket { state, ..UnixSocket::new(number, libc::SOCK_DGRAM) }
    }

    #[test]
    fn a_target_is_connected_after_those_that_connect_to_it() {
        let towards = |peer| State::Towards { peer };
        let all = [
            dgram(1, towards(4)),
            dgram(2, towards(1)),
            dgram(3, towards(2)),
            dgram(5, State::Connected { peer: 6 }),
            dgram(6, State::Connected { peer: 5 }),
            dgram(7, towards(5)),
            dgram(8, towards(8)),
        ];
        let target = |s: &UnixSocket| match s.state {
            State::Connected { peer } | State::Towards { peer } => Some(peer),
            _ => None,
        };
        let ordered: Vec<u32> = order(&mut all.iter().collect(), target).iter().map(|s| s.number).collect();
        let at = |n| ordered.iter().position(|o| *o == n).unwrap();
        assert_eq!(ordered.len(), 7);
        assert!(at(3) < at(2) && at(2) < at(1));
        assert!(at(7) < at(5));
    }
}
