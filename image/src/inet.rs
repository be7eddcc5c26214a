//! tcp(7) over ip(7) and ipv6(7)

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::socket::SocketOption;
use crate::tcp::Connection;

/// A TCP socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Interface of the address it is bound to (`sin6_scope_id`).
    #[serde(default)]
    pub scope: u32,
    /// The program attached by `SO_ATTACH_FILTER` (an array of `struct sock_filter`).
    #[serde(default)]
    pub filter: Bytes,
    /// Of a socket that is or was connected, or is about to be.
    #[serde(default)]
    pub connection: Option<Connection>,
    /// Of a listening socket: who has connected, and gone again, before being accepted.
    #[serde(default)]
    pub abandoned: Vec<SocketAddr>,
}
