//! packet(7)

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::ip::{is_filter, is_interface};
use crate::socket::SocketOption;

/// A packet socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSocket {
    /// Inode number at the dump, as in `socket:[N]`.
    pub number: u32,
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// The protocol it receives (`ETH_P_*`), 0 for none.
    pub protocol: u16,
    /// Name of the interface it is bound to.
    pub interface: Option<Bytes>,
    /// What it asks of interfaces (`PACKET_ADD_MEMBERSHIP`).
    pub memberships: Vec<PacketMembership>,
    /// Value of `PACKET_FANOUT`.
    pub fanout: Option<u32>,
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
    /// Classic filter, as of [`crate::ip::IpSettings`].
    pub filter: Option<Bytes>,
}

/// One request to an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketMembership {
    /// Name of the interface.
    pub interface: Bytes,
    /// `PACKET_MR_*`
    pub kind: u16,
    /// The address, for kinds that have one.
    pub address: Bytes,
    /// How often it was asked for.
    pub count: u32,
}

/// `SOL_PACKET`
const SOL_PACKET: i32 = 263;

/// Options of packet(7) that are kept, by level and name. `PACKET_STATISTICS` is not among them: to read it is
/// to reset it.
pub const PACKET_OPTIONS: &[(i32, i32)] = &[
    (SOL_PACKET, 7),  // PACKET_COPY_THRESH
    (SOL_PACKET, 8),  // PACKET_AUXDATA
    (SOL_PACKET, 9),  // PACKET_ORIGDEV
    (SOL_PACKET, 10), // PACKET_VERSION
    (SOL_PACKET, 12), // PACKET_RESERVE
    (SOL_PACKET, 14), // PACKET_LOSS
    (SOL_PACKET, 15), // PACKET_VNET_HDR
    (SOL_PACKET, 24), // PACKET_VNET_HDR_SZ
    (SOL_PACKET, 17), // PACKET_TIMESTAMP
    (SOL_PACKET, 19), // PACKET_TX_HAS_OFF
    (SOL_PACKET, 20), // PACKET_QDISC_BYPASS
    (SOL_PACKET, 23), // PACKET_IGNORE_OUTGOING
];

/// The address of `struct packet_mreq` (linux/if_packet.h).
const ADDRESS: usize = 8;
/// More requests of one kind than a program makes.
const MOST_COUNT: u32 = 1 << 10;

impl PacketSocket {
    /// "protocol 0x800 on eth0"
    pub fn summary(&self) -> String {
        let on = self.interface.as_ref().map_or_else(|| "all interfaces".into(), |name| name.text());
        format!("protocol {:#x} on {on}", self.protocol)
    }

    /// Whether all of it is possible.
    pub fn is_possible(&self) -> bool {
        let membership = |m: &PacketMembership| {
            is_interface(&m.interface) && m.address.len() <= ADDRESS && (1..=MOST_COUNT).contains(&m.count)
        };
        matches!(self.kind, 2 | 3)
            && self.interface.as_ref().is_none_or(is_interface)
            && self.memberships.iter().all(membership)
            && self.options.iter().all(SocketOption::is_known)
            && self.filter.as_ref().is_none_or(is_filter)
    }
}
