//! What the kernel lists of TCP (sock_diag(7)), and who is at the other end.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use torpor_kernel::fds;
use torpor_kernel::ids::Pid;
use torpor_kernel::sock_diag::{InetSocket as Listed, inet_sockets, inet_sockets_with_keys};
use torpor_kernel::tcp::state;

/// What the kernel lists of TCP, found by number, by both addresses, and by local port.
pub(super) struct Snapshot {
    pub(super) all: Vec<Listed>,
    pub(super) numbers: HashMap<u32, usize>,
    pub(super) ends: HashMap<(SocketAddr, SocketAddr), usize>,
    /// Sockets without a descriptor that wait to be accepted.
    pub(super) waiting: HashMap<u16, Vec<usize>>,
}

impl Snapshot {
    pub(super) fn take() -> torpor_kernel::Result<Self> {
        Self::of(inet_sockets)
    }

    /// The same, with the sockets known that have keys.
    pub(super) fn take_with_keys() -> torpor_kernel::Result<Self> {
        Self::of(inet_sockets_with_keys)
    }

    fn of(list: impl Fn(i32, i32) -> torpor_kernel::Result<Vec<Listed>>) -> torpor_kernel::Result<Self> {
        let mut all = list(libc::AF_INET, libc::IPPROTO_TCP)?;
        all.extend(list(libc::AF_INET6, libc::IPPROTO_TCP)?);
        let mut found = Snapshot {
            all: Vec::new(),
            numbers: HashMap::new(),
            ends: HashMap::new(),
            waiting: HashMap::new(),
        };
        for (i, socket) in all.iter().enumerate() {
            if socket.inode != 0 {
                found.numbers.insert(socket.inode, i);
            }
            if socket.state != state::LISTEN {
                found.ends.insert((plain(socket.local), plain(socket.remote)), i);
            }
            if waits(socket) {
                found.waiting.entry(socket.local.port()).or_default().push(i);
            }
        }
        found.all = all;
        Ok(found)
    }

    pub(super) fn number(&self, number: u32) -> Option<&Listed> {
        self.numbers.get(&number).map(|i| &self.all[*i])
    }

    pub(super) fn ends(&self, local: SocketAddr, remote: SocketAddr) -> Option<&Listed> {
        self.ends.get(&(plain(local), plain(remote))).map(|i| &self.all[*i])
    }

    /// What waits to be accepted from a listening socket.
    pub(super) fn waiting_for(&self, listener: SocketAddr) -> impl Iterator<Item = &Listed> {
        let on_port = self.waiting.get(&listener.port()).into_iter().flatten().map(|i| &self.all[*i]);
        on_port.filter(move |s| matches(listener.ip(), s.local.ip()))
    }
}

/// Whether a listed socket has been made by a handshake and not been accepted. (One that was accepted and closed
/// again has a state in which a FIN was sent.)
pub(super) fn waits(socket: &Listed) -> bool {
    socket.inode == 0 && matches!(socket.state, state::ESTABLISHED | state::CLOSE_WAIT)
}

/// Bytes in the receive queue of a listed socket, which counts a FIN as one.
pub(super) fn waiting_bytes(socket: &Listed) -> u32 {
    socket.rqueue.saturating_sub(u32::from(socket.state == state::CLOSE_WAIT))
}

/// An address without the difference between IPv4 and IPv4 mapped into IPv6.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether a socket that listens on `bound` takes connections to `to`.
pub(super) fn matches(bound: IpAddr, to: IpAddr) -> bool {
    bound.is_unspecified() || bound.to_canonical() == to.to_canonical()
}

/// Whether an address is this machine's own.
pub(super) fn is_ours(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

/// Whether a socket that its process has closed still has something to send.
pub(super) fn closing(orphan: &Listed) -> bool {
    matches!(orphan.state, state::FIN_WAIT1 | state::CLOSING | state::LAST_ACK) && orphan.wqueue > 1
}

/// The numbers of a process's sockets.
pub(super) fn sockets_of(pid: Pid) -> Vec<u32> {
    let number = |fd| {
        let link = fds::readlink(pid, fd).ok()?;
        std::str::from_utf8(link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?).ok()?.parse().ok()
    };
    fds::list(pid).unwrap_or_default().into_iter().filter_map(number).collect()
}
