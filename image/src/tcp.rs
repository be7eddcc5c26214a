//! tcp(7): what a connection has beyond its socket.

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::description::{Kind, Objects};
use crate::inet::InetSocket;

/// A connection, at any stage between connect(2) and close(2), from the side of one socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The peer's address, where the kernel still knew it.
    pub remote: Option<SocketAddr>,
    /// Interface of that address (`sin6_scope_id`).
    pub scope: u32,
    /// State of the socket at the dump (`TCP_*`, linux/tcp_states.h).
    pub state: u8,
    /// What is at the other end.
    pub peer: Peer,
    /// Bit 0: receiving is shut down, bit 1: sending is.
    pub shutdown: u8,
    /// What waits to be received. Where the peer is in the image, what was still on its way is part of it.
    pub received: Bytes,
    /// What was sent and not received, where the peer is not in the image.
    pub sent: Bytes,
    /// An error waits to be told.
    pub failed: bool,
}

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peer {
    /// A socket of the image.
    Inside {
        /// [`InetSocket::number`] of the peer.
        number: u32,
    },
    /// It waits in the accept queue of a listening socket of the image.
    Waiting {
        /// [`InetSocket::number`] of the listening socket.
        listener: u32,
    },
    /// Whoever had it closed it.
    Closed,
    /// It has not answered yet.
    Sought,
    /// There is none any more, and no connection either.
    Over,
    /// Outside of the image, and kept.
    Kept(Kept),
}

/// What is needed to go on with a connection whose peer is outside and has noticed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Sequence number behind everything to be sent, a FIN not counted.
    pub send_sequence: u32,
    /// Sequence number behind everything received.
    pub receive_sequence: u32,
    /// How many bytes at the end of [`Connection::sent`] never left.
    pub unsent: u32,
    /// snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup (`struct tcp_repair_window`).
    pub window: [u32; 5],
    /// Largest segment agreed on.
    pub segment: u32,
    /// Window scales agreed on: of the peer's windows and of our own.
    pub scale: Option<(u8, u8)>,
    /// Selective acknowledgements were agreed on.
    pub sack: bool,
    /// Timestamps were agreed on; their clock (`TCP_TIMESTAMP`).
    pub timestamp: Option<u32>,
}

/// Checks that connections inside of the image have both ends, and those that wait a listening socket.
pub(crate) fn check(objects: &Objects) -> Result<(), String> {
    let mut sockets: HashMap<u32, &InetSocket> = HashMap::new();
    for description in &objects.descriptions {
        if let Kind::Inet(inet) = &description.kind
            && sockets.insert(inet.number, inet).is_some()
        {
            return Err(format!("tcp socket {} is there twice", inet.number));
        }
    }
    for socket in sockets.values() {
        let Some(connection) = &socket.connection else { continue };
        let number = socket.number;
        if socket.listening.is_some() {
            return Err(format!("tcp socket {number} both listens and is connected"));
        }
        let addressed = socket.local.is_some() && connection.remote.is_some();
        let sound = match &connection.peer {
            Peer::Inside { number: peer } => {
                let back = sockets.get(peer).and_then(|p| p.connection.as_ref()).map(|c| &c.peer);
                addressed && matches!(back, Some(Peer::Inside { number: back }) if *back == number)
            }
            Peer::Waiting { listener } => {
                addressed && sockets.get(listener).is_some_and(|l| l.listening.is_some())
            }
            Peer::Kept(kept) => {
                let scales = kept.scale.is_none_or(|(send, receive)| send <= 14 && receive <= 14);
                addressed && scales && kept.unsent as usize <= connection.sent.len()
            }
            Peer::Closed => addressed,
            Peer::Sought => connection.remote.is_some(),
            Peer::Over => true,
        };
        if !sound {
            return Err(format!("the connection of tcp socket {number} has no other end"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DescriptionId;
    use crate::description::Description;

    fn objects(peers: &[(u32, Peer)]) -> Objects {
        let descriptions = peers.iter().enumerate().map(|(i, (number, peer))| Description {
            id: DescriptionId(i as u32),
            flags: 2,
            position: 0,
            owner: None,
            flock: None,
            ofd_locks: Vec::new(),
            lease: None,
            kind: Kind::Inet(InetSocket {
                number: *number,
                family: 2,
                local: Some(([127, 0, 0, 1], 1).into()),
                connection: Some(Connection {
                    remote: Some(([127, 0, 0, 1], 2).into()),
                    scope: 0,
                    state: 1,
                    peer: peer.clone(),
                    shutdown: 0,
                    received: Bytes::default(),
                    sent: Bytes::default(),
                    failed: false,
                }),
                ..InetSocket::default()
            }),
        });
        Objects { descriptions: descriptions.collect(), ..Objects::default() }
    }

    #[test]
    fn both_ends_must_know_one_another() {
        let inside = |number| Peer::Inside { number };
        assert_eq!(check(&objects(&[(7, inside(8)), (8, inside(7))])), Ok(()));
        assert_eq!(check(&objects(&[(7, inside(7))])), Ok(()));
        assert!(check(&objects(&[(7, inside(8))])).is_err());
        assert!(check(&objects(&[(7, inside(8)), (8, Peer::Closed)])).is_err());
        assert!(check(&objects(&[(7, inside(8)), (8, inside(7)), (7, Peer::Over)])).is_err());
        assert!(check(&objects(&[(7, Peer::Waiting { listener: 8 }), (8, inside(7))])).is_err());
    }
}
