//! tcp(7), connections: who is at the other end, and what is on its way.
//!
//! The kernel goes on moving segments between sockets whose processes stand still. For a connection with both ends
//! in the dump that does no harm if everything that is not acknowledged is read from *all* senders before what was
//! received is read from *any* receiver: what the receiver lacks then is the end of what the sender had. Those bytes
//! are moved into the receiver's queue in the image, so that nothing has to be sent again after a restore. As a rule
//! there are none: the receiver is asked to acknowledge at once, and given room if it has none. Only if something is
//! still missing then, the sender's queue is read in repair mode, in which the program would see errors if we were
//! killed at that instant.
//!
//! What cannot be read is data in a connection that nobody has accepted (no descriptor leads to it), or whose sender
//! has closed it while the window was full. Programs change that themselves in a moment, so the freeze is put off for
//! it ([`busy`]); if it stays it is refused.

mod listed;
mod queues;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::inet::InetSocket;
use torpor_image::socket::TCP_OPTIONS;
use torpor_image::tcp::{Connection, Peer};
use torpor_kernel::ids::Pid;
use torpor_kernel::sock_diag::InetSocket as Listed;
use torpor_kernel::tcp::state;

use self::listed::{Snapshot, closing, is_ours, matches, plain, sockets_of, waiting_bytes, waits};
use self::queues::{Queues, queues};
use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::hold::Hold;
use crate::opened::Opened;
use crate::socket::Fresh;

const RECEIVING: u8 = 1;
const SENDING: u8 = 2;

/// What becomes of TCP connections whose other end is not in the dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TcpPolicy {
    /// The dump is refused.
    #[default]
    Refuse,
    /// They are restored as if the peer had reset them.
    Close,
    /// They go on, if they are restored before the peer loses patience.
    Keep,
}

/// The TCP sockets found so far.
#[derive(Debug, Default)]
pub(crate) struct Captures {
    pub(crate) policy: TcpPolicy,
    /// The processes go on after the dump.
    pub(crate) runs_on: bool,
    sockets: Vec<Socket>,
    fresh: HashMap<i32, Fresh>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Of which process.
    pub(crate) pid: Pid,
    pub(crate) fd: OwnedFd,
    pub(crate) title: String,
    pub(crate) number: u32,
    pub(crate) state: u8,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) remote: Option<SocketAddr>,
}

impl Captures {
    pub(crate) fn add(&mut self, socket: Socket) {
        self.sockets.push(socket);
    }

    /// The options of a new TCP socket.
    pub(crate) fn fresh(&mut self, family: i32) -> &Fresh {
        self.fresh
            .entry(family)
            .or_insert_with(|| Fresh::new(family, libc::SOCK_STREAM, libc::IPPROTO_TCP, TCP_OPTIONS))
    }
}

/// Whether processes have data waiting that only they can take in: in a connection that it has not accepted yet, or
/// behind a full window of its own from a sender that is gone. A dump that waits a moment may find it taken.
pub(crate) fn busy(processes: &[Opened]) -> bool {
    let own: HashSet<u32> = processes.iter().flat_map(Opened::sockets).collect();
    if own.is_empty() {
        return false;
    }
    let Ok(listed) = Snapshot::take() else { return false };
    listed.all.iter().filter(|s| own.contains(&s.inode)).any(|s| match s.state {
        state::LISTEN if s.rqueue > 0 => listed.waiting_for(s.local).any(|w| waiting_bytes(w) > 0),
        state::ESTABLISHED => listed.ends(s.remote, s.local).is_some_and(|p| p.inode == 0 && closing(p)),
        _ => false,
    })
}

/// Says of every TCP socket met what it is connected to and, on frozen processes, what is in its queues. Called
/// once, when all sockets of all processes are known.
pub(crate) fn finish(collector: &mut Collector) -> Result<Option<Hold>> {
    let sockets = std::mem::take(&mut collector.tcp.sockets);
    let interesting = |s: &Socket| s.state != state::CLOSE || is_over(&s.fd);
    if !sockets.iter().any(interesting) {
        return Ok(None);
    }
    let fail = |pid| Error::kernel(pid, "listing tcp sockets");
    // Keys are asked for once, before anything stands: that takes longer.
    let listed = if collector.live { Snapshot::take_with_keys() } else { Snapshot::take() };
    let listed = listed.map_err(fail(collector.pid))?;
    let mut joined = Joined::new(sockets);
    for i in 0..joined.sockets.len() {
        collector.turn_to(joined.sockets[i].pid);
        let peer = classify(collector, &joined, &listed, i)?;
        joined.peers.push(peer);
    }
    if collector.live {
        return Ok(None);
    }
    let outside: Vec<usize> = (0..joined.peers.len()).filter(|i| joined.peers[*i] == Found::Kept).collect();
    let held = Hold::begin(collector, outside.iter().map(|i| &joined.sockets[*i]))?;
    let mut queues = queues(collector, &joined)?;
    let hold = held.map(|(hold, kept)| {
        queues.kept = outside.into_iter().zip(kept).collect();
        hold
    });
    fill(collector, joined, &listed, queues);
    Ok(hold)
}

/// The sockets of the dump, with their connections.
struct Joined {
    sockets: Vec<Socket>,
    ends: HashMap<(SocketAddr, SocketAddr), usize>,
    listeners: HashMap<u16, Vec<usize>>,
    /// Of the sockets looked at so far.
    peers: Vec<Found>,
}

/// What a socket turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    /// Neither connected nor listening.
    Plain,
    Listening {
        backlog: u32,
        abandoned: Vec<SocketAddr>,
    },
    /// Index of the peer.
    Inside(usize),
    Other(Peer),
    /// The peer is outside, and the connection not kept.
    Dropped,
    /// The peer is outside, and the connection kept.
    Kept,
    Refused,
}

impl Joined {
    fn new(sockets: Vec<Socket>) -> Self {
        let mut ends = HashMap::new();
        let mut listeners: HashMap<u16, Vec<usize>> = HashMap::new();
        for (i, socket) in sockets.iter().enumerate() {
            if let (Some(local), Some(remote)) = (socket.local, socket.remote) {
                ends.insert((plain(local), plain(remote)), i);
            }
            if let (state::LISTEN, Some(local)) = (socket.state, socket.local) {
                listeners.entry(local.port()).or_default().push(i);
            }
        }
        Joined { sockets, ends, listeners, peers: Vec::new() }
    }

    fn end(&self, local: SocketAddr, remote: SocketAddr) -> Option<usize> {
        self.ends.get(&(plain(local), plain(remote))).copied()
    }

    /// The listening socket that takes connections to `address`: the one bound most closely.
    fn listener(&self, address: SocketAddr) -> Option<usize> {
        let on_port = self.listeners.get(&address.port()).into_iter().flatten().copied();
        let local = |i: &usize| self.sockets[*i].local;
        on_port
            .filter(|i| local(i).is_some_and(|l| matches(l.ip(), address.ip())))
            .max_by_key(|i| local(i).is_some_and(|l| !l.ip().is_unspecified()))
    }
}

fn classify(collector: &mut Collector, joined: &Joined, listed: &Snapshot, i: usize) -> Result<Found> {
    let socket = &joined.sockets[i];
    let entry = listed.number(socket.number);
    if entry.is_some_and(|e| e.md5) {
        let why = "a TCP connection with MD5 signatures cannot be dumped: the keys cannot be read";
        collector.refuse(&socket.title, why, "close it before the dump");
        return Ok(Found::Refused);
    }
    match socket.state {
        state::CLOSE if is_over(&socket.fd) => Ok(Found::Other(Peer::Over)),
        state::CLOSE => Ok(Found::Plain),
        state::LISTEN => Ok(listening(collector, joined, listed, socket)),
        state::SYN_SENT if entry.is_some() => Ok(Found::Other(Peer::Sought)),
        state::SYN_SENT | state::SYN_RECV => {
            collector.refuse(&socket.title, "it is being connected at this moment", "try again");
            Ok(Found::Refused)
        }
        _ => Ok(connected(collector, joined, listed, socket)),
    }
}

/// Whether a socket in state `TCP_CLOSE` was connected: then both directions count as shut down (net/ipv4/tcp.c,
/// `tcp_done`), which one that was never connected does not.
pub(crate) fn is_over(fd: &OwnedFd) -> bool {
    poll(fd) & libc::POLLRDHUP != 0
}

fn poll(fd: &OwnedFd) -> i16 {
    let mut one = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP | libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd of ours.
    unsafe { libc::poll(&raw mut one, 1, 0) };
    one.revents
}

fn listening(collector: &mut Collector, joined: &Joined, listed: &Snapshot, socket: &Socket) -> Found {
    let Some(local) = socket.local else { return Found::Plain };
    let backlog = listed.number(socket.number).map_or(0, |e| e.wqueue);
    let mut abandoned = Vec::new();
    let mine =
        |s: &&Listed| joined.listener(s.local).is_some_and(|l| joined.sockets[l].number == socket.number);
    for waiting in listed.waiting_for(local).filter(mine) {
        let client = listed.ends(waiting.remote, waiting.local);
        let inside = joined.end(waiting.remote, waiting.local).is_some();
        let bytes = waiting_bytes(waiting);
        let gone = client.is_none_or(|c| c.inode == 0) && is_ours(waiting.remote.ip());
        if !inside && !gone {
            // On a running process it may have a descriptor since the list was made.
            match collector.tcp.policy {
                TcpPolicy::Refuse if collector.live && accepted(collector, waiting) => {}
                TcpPolicy::Refuse => {
                    let why = format!(
                        "a connection from {}, which is outside of the dump, waits to be accepted",
                        waiting.remote
                    );
                    let remedy = "try again once the program has accepted it, or drop it with --tcp close";
                    collector.refuse(&socket.title, why, remedy);
                    return Found::Refused;
                }
                TcpPolicy::Close | TcpPolicy::Keep => collector.lose(format!(
                    "{}: the connection from {} to {}, not accepted yet",
                    socket.title, waiting.remote, waiting.local
                )),
            }
        } else if bytes > 0 && !collector.live {
            let why = format!(
                "{bytes} bytes from {} wait in a connection that was not accepted, where nobody can read them",
                waiting.remote
            );
            collector.refuse(&socket.title, why, "try again once the program has accepted it");
            return Found::Refused;
        } else if !inside {
            abandoned.push(waiting.remote);
        }
    }
    Found::Listening { backlog, abandoned }
}

fn connected(collector: &mut Collector, joined: &Joined, listed: &Snapshot, socket: &Socket) -> Found {
    let (Some(local), Some(remote)) = (socket.local, socket.remote) else {
        // It ended between two looks.
        return Found::Other(Peer::Over);
    };
    if let Some(peer) = joined.end(remote, local) {
        return Found::Inside(peer);
    }
    let ended = matches!(socket.state, state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING);
    match listed.ends(remote, local) {
        Some(peer) if peer.state == state::SYN_RECV || waits(peer) => {
            if let Some(listener) = joined.listener(remote) {
                return Found::Other(Peer::Waiting { listener: joined.sockets[listener].number });
            }
        }
        Some(peer) if peer.inode == 0 && closing(peer) => {
            if collector.live {
                return Found::Other(Peer::Closed);
            }
            let why = format!(
                "{} bytes are on their way to it from {remote}, which was closed: nobody can read them",
                peer.wqueue - 1
            );
            collector.refuse(&socket.title, why, "try again once the program has received what waits");
            return Found::Refused;
        }
        Some(peer) if peer.inode == 0 => return Found::Other(Peer::Closed),
        None if ended && is_ours(remote.ip()) => return Found::Other(Peer::Closed),
        _ => {}
    }
    let peer = listed.ends(remote, local).map(|peer| peer.inode).filter(|inode| *inode != 0);
    outside(collector, socket, local, remote, peer)
}

/// A connection whose other end is not in the dump; `peer` is that, if it is of this machine.
fn outside(
    collector: &mut Collector,
    socket: &Socket,
    local: SocketAddr,
    remote: SocketAddr,
    peer: Option<u32>,
) -> Found {
    match collector.tcp.policy {
        TcpPolicy::Refuse => {
            // A running process opens and closes connections while it is looked at.
            if collector.live && passing(collector, socket, local, remote) {
                return Found::Refused;
            }
            let whom = peer.map_or_else(String::new, |inode| format!(" of {}", crate::unix::holder(inode)));
            let why = format!("its TCP connection from {local} leads to {remote}{whom}, outside of the dump");
            let remedy = "dump a tree with both ends, close it, or say what is to become of it: --tcp close, --tcp keep";
            collector.refuse(&socket.title, why, remedy);
            Found::Refused
        }
        TcpPolicy::Close => {
            let text = format!("{}: the TCP connection from {local} to {remote}", socket.title);
            collector.lose(text);
            Found::Dropped
        }
        TcpPolicy::Keep => {
            if collector.tcp.runs_on {
                let why = format!(
                    "its TCP connection to {remote} cannot be kept while the process goes on with it"
                );
                collector.refuse(&socket.title, why, "end the process with the dump, or use --tcp close");
                return Found::Refused;
            }
            let open = matches!(socket.state, state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2);
            if !open {
                let why =
                    format!("{remote} has ended its side of the connection, which cannot be done again");
                collector.refuse(&socket.title, why, "close the connection, or use --tcp close");
                return Found::Refused;
            }
            Found::Kept
        }
    }
}

/// Whether a connection is gone by now, or its other end belongs to the dump after all.
fn passing(collector: &Collector, socket: &Socket, local: SocketAddr, remote: SocketAddr) -> bool {
    let Ok(now) = Snapshot::take() else { return false };
    let still = now.number(socket.number).is_some_and(|s| plain(s.local) == plain(local));
    !still || now.ends(remote, local).is_some_and(|peer| owns(collector, peer.inode))
}

/// Whether what waited to be accepted does so no longer, or comes from the dump itself.
fn accepted(collector: &Collector, waiting: &Listed) -> bool {
    let Ok(now) = Snapshot::take() else { return false };
    !now.ends(waiting.local, waiting.remote).is_some_and(waits)
        || now.ends(waiting.remote, waiting.local).is_none_or(|client| owns(collector, client.inode))
}

/// Whether a process of the dump has a descriptor for socket `number`.
fn owns(collector: &Collector, number: u32) -> bool {
    // The collector knows those that were there when it looked.
    number != 0
        && (collector.owns_socket(number)
            || collector.members.iter().any(|pid| sockets_of(Pid(*pid)).contains(&number)))
}

/// Writes what was found into the objects of the image.
fn fill(collector: &mut Collector, joined: Joined, listed: &Snapshot, mut queues: Queues) {
    let mut places: HashMap<u32, &mut InetSocket> = HashMap::new();
    for description in &mut collector.objects.descriptions {
        if let Kind::Inet(inet) = &mut description.kind {
            places.insert(inet.number, inet);
        }
    }
    for (i, socket) in joined.sockets.iter().enumerate() {
        let Some(place) = places.get_mut(&socket.number) else { continue };
        let peer = match joined.peers[i].clone() {
            Found::Plain | Found::Refused => continue,
            Found::Listening { backlog, abandoned } => {
                (place.listening, place.abandoned) = (Some(backlog), abandoned);
                continue;
            }
            Found::Inside(peer) => Peer::Inside { number: joined.sockets[peer].number },
            Found::Other(peer) => peer,
            Found::Dropped => Peer::Over,
            Found::Kept => match queues.kept.remove(&i) {
                Some(state) => {
                    (queues.received[i], queues.sent[i]) = (state.received, state.sent);
                    Peer::Kept(state.kept)
                }
                None => continue,
            },
        };
        let remote = socket.remote.or_else(|| listed.number(socket.number).map(|e| e.remote));
        let events = poll(&socket.fd);
        let sends = !matches!(socket.state, state::ESTABLISHED | state::CLOSE_WAIT | state::SYN_SENT);
        place.connection = Some(Connection {
            remote: remote.filter(|_| peer != Peer::Over),
            scope: crate::inet::remote(&socket.fd).map_or(0, |(_, scope)| scope),
            state: socket.state,
            shutdown: if events & libc::POLLRDHUP != 0 { RECEIVING } else { 0 }
                | if sends { SENDING } else { 0 },
            received: Bytes(std::mem::take(&mut queues.received[i])),
            sent: Bytes(std::mem::take(&mut queues.sent[i])),
            failed: joined.peers[i] == Found::Dropped || peer == Peer::Over && events & libc::POLLERR != 0,
            peer,
        });
    }
}
