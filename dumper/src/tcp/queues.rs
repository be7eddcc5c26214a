//! Reading the queues of all connections, in the order that loses nothing (see the head of `tcp`).

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;

use torpor_image::tcp::Peer;
use torpor_kernel::tcp::{self, state};

use super::{Found, Joined, Socket};
use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::guardian::Guardian;
use crate::hold::KeptState;
use crate::repair::{self, Unacknowledged};

/// What was read from the sockets, by index.
#[derive(Default)]
pub(super) struct Queues {
    pub(super) received: Vec<Vec<u8>>,
    pub(super) sent: Vec<Vec<u8>>,
    pub(super) kept: HashMap<usize, KeptState>,
}

/// The two passes: everything sent, then everything received.
pub(super) fn queues(collector: &mut Collector, joined: &Joined) -> Result<Queues> {
    let all = &joined.sockets;
    let pid = collector.pid;
    let fail = |i: usize| Error::kernel(pid, format!("reading the queues of {}", all[i].title));
    let is_open = |i: usize| match &joined.peers[i] {
        Found::Inside(_) => true,
        Found::Other(peer) => matches!(peer, Peer::Waiting { .. }),
        _ => false,
    };
    // Nothing is missing where everything is acknowledged, a FIN aside.
    let missing = |i: usize| -> torpor_kernel::Result<bool> {
        Ok(tcp::unacknowledged(all[i].fd.as_fd())? > u32::from(has_fin(&all[i])))
    };
    let mut incomplete = Vec::new();
    for i in (0..all.len()).filter(|i| is_open(*i)) {
        if !missing(i).map_err(fail(i))? {
            continue;
        }
        if let Found::Inside(peer) = &joined.peers[i] {
            // Not possible in every state; then nothing is lost by it.
            let _unchanged = tcp::acknowledge(all[*peer].fd.as_fd());
            if !missing(i).map_err(fail(i))? {
                continue;
            }
        }
        incomplete.push(i);
    }
    let starting =
        |e| Error::kernel(pid, "starting a guardian")(torpor_kernel::Error::syscall("clone", pid, e));
    let receiver = |i: usize| match joined.peers[i] {
        Found::Inside(peer) => Some(peer),
        _ => None,
    };
    let full: Vec<(usize, usize)> = incomplete.iter().filter_map(|i| Some((*i, receiver(*i)?))).collect();
    if !full.is_empty() {
        let undo: Vec<_> = full.iter().flat_map(|(_, to)| repair::undo_room(&all[*to].fd)).collect();
        let guardian = Guardian::start(&undo).map_err(starting)?;
        for (i, to) in &full {
            let left = tcp::unacknowledged(all[*i].fd.as_fd()).map_err(fail(*i))?;
            // Where it is not allowed, or not enough, there is repair mode.
            let arrived = repair::peek_offset(&all[*to].fd).is_none()
                && repair::make_room(&all[*to].fd, left, || Ok(!missing(*i)?)).unwrap_or(false);
            if arrived {
                incomplete.retain(|other| other != i);
            }
        }
        drop(guardian);
    }
    let touched: HashSet<usize> =
        incomplete.iter().flat_map(|i| [Some(*i), receiver(*i)]).flatten().collect();
    let peeking = (0..all.len()).filter(|i| repair::peek_offset(&all[*i].fd).is_some());
    let undo: Vec<_> =
        touched.iter().copied().chain(peeking).flat_map(|i| repair::undo(&all[i].fd)).collect();
    let guardian = if undo.is_empty() { None } else { Some(Guardian::start(&undo).map_err(starting)?) };

    let mut sent: HashMap<usize, Unacknowledged> = HashMap::new();
    for i in incomplete {
        collector.turn_to(all[i].pid);
        // Most lack an acknowledgement only: numbers are read in no time, queues are not.
        if let Some(to) = receiver(i)
            && let Ok(end) = repair::in_repair(&all[i].fd, |fd| repair::send_end(fd, has_fin(&all[i])))
            && let Ok(received) = repair::in_repair(&all[to].fd, repair::receive_end)
            && end.wrapping_sub(received).cast_signed() <= 0
        {
            continue;
        }
        match repair::in_repair(&all[i].fd, |fd| repair::unacknowledged(fd, has_fin(&all[i]))) {
            Ok(unacknowledged) => {
                sent.insert(i, unacknowledged);
            }
            Err(e) if e.errno() == Some(nix::errno::Errno::EPERM) => collector.refuse(
                &all[i].title,
                "what it has sent waits for room at the receiver, and only a privilege shows it",
                "run torpor with CAP_NET_ADMIN, or try again",
            ),
            Err(e) => return Err(fail(i)(e)),
        }
    }
    let senders: HashMap<usize, usize> = sent.keys().filter_map(|i| Some((receiver(*i)?, *i))).collect();
    let mut queues = Queues::default();
    for (i, socket) in all.iter().enumerate() {
        collector.turn_to(socket.pid);
        let fd = &socket.fd;
        let holds = match &joined.peers[i] {
            Found::Inside(_) | Found::Dropped => true,
            Found::Other(peer) => !matches!(peer, Peer::Sought),
            _ => false,
        };
        let mut received = Vec::new();
        if holds && repair::urgent(fd) {
            let why = "urgent data waits to be received";
            collector.refuse(&all[i].title, why, "try again once the program has received it");
        } else if let Some(from) = senders.get(&i).and_then(|from| sent.get(from)) {
            let (bytes, end) = repair::in_repair(fd, repair::received).map_err(fail(i))?;
            received = bytes;
            let lacks = from.end.wrapping_sub(end).cast_signed().max(0) as usize;
            let Some(at) = from.bytes.len().checked_sub(lacks) else {
                let what = format!("{} lacks more than its peer has sent", all[i].title);
                return Err(Error::Inconsistent { pid, what });
            };
            received.extend_from_slice(&from.bytes[at..]);
        } else if holds {
            received = repair::peek(fd).map_err(fail(i))?;
        }
        queues.received.push(received);
        let waiting = !matches!(joined.peers[i], Found::Inside(_));
        queues.sent.push(sent.get(&i).filter(|_| waiting).map(|s| s.bytes.clone()).unwrap_or_default());
    }
    drop(guardian);
    Ok(queues)
}

/// Whether a socket has a FIN in its send queue that is not known to be acknowledged.
pub(super) fn has_fin(socket: &Socket) -> bool {
    matches!(socket.state, state::FIN_WAIT1 | state::CLOSING | state::LAST_ACK)
}
