//! udp(7), UDP-Lite, and ICMP sockets for echo requests ("ping").

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::ip::IpSettings;

/// A datagram socket of ip(7) or ipv6(7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// `IPPROTO_UDP`, `IPPROTO_UDPLITE`, `IPPROTO_ICMP` or `IPPROTO_ICMPV6`.
    pub protocol: i32,
    /// The address it has; of ping sockets the port is the identifier.
    pub local: Option<SocketAddr>,
    /// The address it is connected to.
    pub peer: Option<SocketAddr>,
    /// Bit 0: receiving is shut down; bit 1: sending.
    pub shutdown: u8,
    /// What waits to be received.
    pub queue: Vec<Datagram>,
    /// Options, groups, filter.
    pub settings: IpSettings,
}

/// A datagram that waits to be received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub source: SocketAddr,
    /// Where it was sent to, if the program had asked to be told (`IP_PKTINFO`).
    pub destination: Option<IpAddr>,
    /// Time to live or hop limit, if the program had asked to be told.
    pub ttl: Option<u8>,
    /// Type of service or traffic class, if the program had asked to be told.
    pub tos: Option<u8>,
    /// Its content.
    pub data: Bytes,
}

/// Most bytes that a datagram can have and be put back: over IPv6 what fits into a packet of the loopback
/// interface, which has 65536.
pub const MOST_DATA: usize = 65536 - 40 - 8;

impl UdpSocket {
    /// "127.0.0.1:53, connected to 127.0.0.1:54, 2 datagrams in it"
    pub fn summary(&self) -> String {
        let mut text = self.local.map_or_else(|| "not bound".to_owned(), |a| a.to_string());
        if let Some(peer) = self.peer {
            text.push_str(&format!(", connected to {peer}"));
        }
        if !self.queue.is_empty() {
            text.push_str(&format!(", {} datagrams in it", self.queue.len()));
        }
        text
    }

    /// Whether all of it is possible.
    pub fn is_possible(&self) -> bool {
        let family = |a: &SocketAddr| (self.family == 2) == a.is_ipv4();
        matches!((self.family, self.protocol), (2 | 10, 17 | 136) | (2, 1) | (10, 58))
            && self.local.iter().chain(&self.peer).all(family)
            && self.queue.iter().all(|d| d.data.len() <= MOST_DATA)
            && self.settings.is_possible()
    }

    /// "udp socket", "ping socket"
    pub fn noun(&self) -> &'static str {
        match self.protocol {
            17 => "udp socket",
            136 => "udp-lite socket",
            _ => "ping socket",
        }
    }
}
