//! raw(7): sockets of single protocols of ip(7) and ipv6(7).

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ip::IpSettings;

/// A raw socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// The protocol.
    pub protocol: i32,
    /// The address it is bound to; the port is 0.
    pub local: Option<SocketAddr>,
    /// The address it is connected to; the port is 0.
    pub peer: Option<SocketAddr>,
    /// Options, groups, filter.
    pub settings: IpSettings,
}

impl RawSocket {
    /// "protocol 1, 127.0.0.1"
    pub fn summary(&self) -> String {
        let addresses = self.local.iter().map(|a| format!(", {}", a.ip()));
        let addresses = addresses.chain(self.peer.iter().map(|a| format!(", connected to {}", a.ip())));
        format!("protocol {}{}", self.protocol, addresses.collect::<String>())
    }

    /// Whether all of it is possible.
    pub fn is_possible(&self) -> bool {
        let family = |a: &SocketAddr| (self.family == 2) == a.is_ipv4();
        matches!(self.family, 2 | 10)
            && (0..=0xffff).contains(&self.protocol)
            && self.local.iter().chain(&self.peer).all(family)
            && self.settings.is_possible()
    }
}
