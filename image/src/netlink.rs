//! netlink(7)

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::socket::SocketOption;

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// `NETLINK_*`
    pub protocol: i32,
    /// The port id it is bound to.
    pub port: Option<u32>,
    /// Multicast groups, from 1.
    pub groups: Vec<u32>,
    /// Port id and groups (a bit mask) of whom it is connected to.
    pub peer: Option<(u32, u32)>,
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
    /// Classic filter, as of [`crate::ip::IpSettings`].
    pub filter: Option<Bytes>,
}

/// `SOL_NETLINK`
const SOL_NETLINK: i32 = 270;

/// Options of netlink(7) that are kept, by level and name.
pub const NETLINK_OPTIONS: &[(i32, i32)] = &[
    (SOL_NETLINK, 3),  // NETLINK_PKTINFO
    (SOL_NETLINK, 4),  // NETLINK_BROADCAST_ERROR
    (SOL_NETLINK, 5),  // NETLINK_NO_ENOBUFS
    (SOL_NETLINK, 8),  // NETLINK_LISTEN_ALL_NSID
    (SOL_NETLINK, 10), // NETLINK_CAP_ACK
    (SOL_NETLINK, 11), // NETLINK_EXT_ACK
    (SOL_NETLINK, 12), // NETLINK_GET_STRICT_CHK
];

/// More groups than any protocol has.
const MOST_GROUPS: u32 = 1 << 16;

impl NetlinkSocket {
    /// "protocol 0, port id 42, groups 1, 5"
    pub fn summary(&self) -> String {
        let port = self.port.map_or_else(|| "not bound".to_owned(), |port| format!("port id {port}"));
        let groups: Vec<String> = self.groups.iter().map(u32::to_string).collect();
        let groups =
            if groups.is_empty() { String::new() } else { format!(", groups {}", groups.join(", ")) };
        format!("protocol {}, {port}{groups}", self.protocol)
    }

    /// Whether all of it is possible.
    pub fn is_possible(&self) -> bool {
        (0..32).contains(&self.protocol)
            && matches!(self.kind, 2 | 3)
            && self.groups.iter().all(|g| (1..=MOST_GROUPS).contains(g))
            && self.options.iter().all(SocketOption::is_known)
            && self.filter.as_ref().is_none_or(crate::ip::is_filter)
    }
}
