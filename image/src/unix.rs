//! unix(7)

use serde::{Deserialize, Serialize};

use crate::socket::SocketOption;
use crate::{Bytes, DescriptionId};

/// A Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// What it does.
    pub state: State,
    /// The address it was bound to; the first byte is zero for an abstract one.
    pub name: Option<Bytes>,
    /// Where the name's file is, for a relative or absolute path.
    pub file: Option<BoundFile>,
    /// Messages in its receive queue, each with its own bounds; of a stream, pieces that something is
    /// attached to.
    pub queue: Vec<Bytes>,
    /// Bit 1: receiving is shut down, bit 2: sending is.
    pub shutdown: u8,
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
    /// What is attached to messages of `queue`, in their order.
    #[serde(default)]
    pub attached: Vec<Attached>,
    /// The address its peer has or had, where the peer is not in the image.
    #[serde(default)]
    pub peer_name: Option<Bytes>,
    /// Of a listening socket: those that wait to be accepted, by number, in their order; 0 for one that
    /// has closed its end meanwhile.
    #[serde(default)]
    pub pending: Vec<u32>,
    /// Who is told by SO_PEERCRED.
    #[serde(default)]
    pub peer_credentials: Option<PeerCredentials>,
    /// An error that the next call returns: its peer was closed with data unread (ECONNRESET).
    #[serde(default)]
    pub reset: bool,
}

/// What a Unix socket does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Neither connected nor listening.
    Idle,
    /// listen(2)
    Listening {
        /// The backlog asked for.
        backlog: u32,
    },
    /// Connected to the socket with this number, also of the image, which is connected back.
    Connected {
        /// [`UnixSocket::number`] of the peer.
        peer: u32,
    },
    /// Connected to this listening socket of the image, which has not accepted yet.
    Waiting {
        /// [`UnixSocket::number`] of the listener.
        listener: u32,
    },
    /// Was connected; the peer is gone.
    Orphaned,
    /// A datagram socket that sends to the socket with this number, also of the image, which is not
    /// connected back.
    Towards {
        /// [`UnixSocket::number`] of the peer.
        peer: u32,
    },
    /// Connected to a socket that is not in the image, and to be connected anew to `peer_name`.
    Outside,
}

/// What is attached to one message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Which message of the queue.
    pub message: u32,
    /// SCM_RIGHTS: descriptors on their way.
    pub rights: Vec<DescriptionId>,
    /// SCM_CREDENTIALS
    pub credentials: Option<Sender>,
    /// The address it was sent from.
    pub from: Option<Bytes>,
    /// The one byte of it was sent with MSG_OOB.
    pub urgent: bool,
}

/// `struct ucred`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    /// Process id; 0 where the kernel knew of none.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// SO_PEERCRED and SO_PEERGROUPS
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerCredentials {
    /// The process that called connect(2), listen(2) or socketpair(2).
    pub pid: i32,
    /// Its effective user then.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

/// The file of a bound Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundFile {
    /// Absolute path.
    pub path: Bytes,
    /// `st_mode`
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The path does not lead to it any more.
    #[serde(default)]
    pub unlinked: bool,
    /// Inode number of the file at the dump, which a listener shares with those it has accepted; 0 where it
    /// is not known.
    #[serde(default)]
    pub inode: u64,
}

/// `sizeof(sun_path)`: no address is longer.
pub const MAX_NAME: usize = 108;

impl UnixSocket {
    /// One that does nothing.
    pub fn new(number: u32, kind: i32) -> Self {
        UnixSocket {
            number,
            kind,
            state: State::Idle,
            name: None,
            file: None,
            queue: Vec::new(),
            shutdown: 0,
            options: Vec::new(),
            attached: Vec::new(),
            peer_name: None,
            pending: Vec::new(),
            peer_credentials: None,
            reset: false,
        }
    }

    /// Whether data, and not only names, are exchanged with one peer.
    pub fn is_connection(&self) -> bool {
        self.kind != 2
    }

    /// What is attached to message `index`.
    pub fn attached_to(&self, index: usize) -> Option<&Attached> {
        self.attached.iter().find(|a| a.message as usize == index)
    }

    /// Its name for messages: an abstract one with `@` for its zero.
    pub fn title(name: &[u8]) -> String {
        String::from_utf8_lossy(name).replace('\0', "@")
    }

    /// What is impossible about it, seen by itself. `descriptions` is how many there are.
    pub fn damage(&self, descriptions: usize) -> Option<&'static str> {
        let long = |name: &Option<Bytes>| name.as_ref().is_some_and(|n| n.is_empty() || n.len() > MAX_NAME);
        let zero = |name: &Option<Bytes>| name.as_ref().is_some_and(|n| n[0] != 0 && n.contains(&0));
        let bad_name = |name: &Option<Bytes>| long(name) || zero(name);
        let mut next = 0;
        for attached in &self.attached {
            let Some(data) = self.queue.get(attached.message as usize) else {
                return Some("something attached to a message that is not there");
            };
            if attached.message < next {
                return Some("attached things out of order");
            }
            next = attached.message + 1;
            if attached.rights.iter().any(|id| id.0 as usize >= descriptions) {
                return Some("a description on its way that does not exist");
            }
            if attached.rights.len() > 253 || bad_name(&attached.from) || attached.urgent && data.len() != 1 {
                return Some("something impossible attached to a message");
            }
            if attached.credentials.is_some_and(|c| !(0..=4 << 20).contains(&c.pid)) {
                return Some("a message from an impossible process");
            }
        }
        if !matches!(self.kind, 1 | 2 | 5) {
            return Some("an impossible type");
        }
        if bad_name(&self.name) || bad_name(&self.peer_name) {
            return Some("an impossible address");
        }
        let stream_only =
            matches!(self.state, State::Listening { .. } | State::Waiting { .. }) && self.kind == 2;
        if stream_only || matches!(self.state, State::Towards { .. }) && self.kind != 2 {
            return Some("a state that sockets of its type do not have");
        }
        let path = |file: &BoundFile| file.path.first() == Some(&b'/') && !file.path.contains(&0);
        if self.file.as_ref().is_some_and(|file| !path(file)) {
            return Some("no absolute path");
        }
        if self.pending.len() > 1 << 16 {
            return Some("an impossible backlog");
        }
        let peer = self.peer_credentials.as_ref();
        peer.is_some_and(|p| !(0..=4 << 20).contains(&p.pid) || p.groups.len() > 1 << 16)
            .then_some("an impossible peer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> UnixSocket {
        let queue = vec![b"x".as_slice().into(), b"yz".as_slice().into()];
        UnixSocket { queue, ..UnixSocket::new(1, 1) }
    }

    #[test]
    fn what_an_image_must_not_say() {
        assert_eq!(socket().damage(0), None);
        let attached = |a: Attached| UnixSocket { attached: vec![a], ..socket() }.damage(1);
        assert_eq!(attached(Attached { rights: vec![DescriptionId(0)], ..Attached::default() }), None);
        assert!(attached(Attached { rights: vec![DescriptionId(1)], ..Attached::default() }).is_some());
        assert!(attached(Attached { message: 2, ..Attached::default() }).is_some());
        assert!(attached(Attached { message: 1, urgent: true, ..Attached::default() }).is_some());
        assert!(attached(Attached { from: Some(vec![b'a'; 109].into()), ..Attached::default() }).is_some());
        assert!(
            attached(Attached { from: Some(b"a\0b".as_slice().into()), ..Attached::default() }).is_some()
        );
        assert_eq!(
            attached(Attached { from: Some(b"\0a\0b".as_slice().into()), ..Attached::default() }),
            None
        );
        assert!(UnixSocket { kind: 3, ..socket() }.damage(0).is_some());
        assert!(UnixSocket { state: State::Towards { peer: 1 }, ..socket() }.damage(0).is_some());
        assert!(
            UnixSocket { state: State::Waiting { listener: 1 }, kind: 2, ..socket() }.damage(0).is_some()
        );
    }
}
