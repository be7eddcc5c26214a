//! tcp(7) over ip(7) and ipv6(7)

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::socket::SocketOption;

/// A TCP socket that listens or has not been connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// The address it is bound to.
    pub local: Option<SocketAddr>,
    /// The backlog asked for, of a listening socket.
    pub listening: Option<u32>,
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
}
