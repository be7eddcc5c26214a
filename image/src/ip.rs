//! What sockets of ip(7) and ipv6(7) without connections have in common.

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::socket::SocketOption;

/// Settings of a UDP, ping or raw socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpSettings {
    /// Options that differ from a new socket's.
    pub options: Vec<SocketOption>,
    /// Options whose value is an interface, which is told by name: numbers change with every boot.
    pub interfaces: Vec<InterfaceOption>,
    /// Multicast groups that it has joined.
    pub memberships: Vec<Membership>,
    /// Classic filter: instructions of eight bytes (`SO_GET_FILTER`).
    pub filter: Option<Bytes>,
}

/// An option whose value is an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceOption {
    /// `IPPROTO_IP` or `IPPROTO_IPV6`.
    pub level: i32,
    /// `IP_UNICAST_IF` and the like.
    pub name: i32,
    /// Name of the interface.
    pub interface: Bytes,
}

/// A multicast group that a socket has joined (`MCAST_JOIN_GROUP`, `MCAST_MSFILTER`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The group.
    pub group: std::net::IpAddr,
    /// Name of the interface.
    pub interface: Bytes,
    /// Whether only `sources` are let through; else all but them.
    pub include: bool,
    /// Senders.
    pub sources: Vec<std::net::IpAddr>,
}

/// Options of ip(7) and ipv6(7) that are kept, by level and name: those that setsockopt(2) takes as
/// getsockopt(2) gives them. Those behind `IPV6_V6ONLY` must not come before it.
pub const IP_OPTIONS: &[(i32, i32)] = &[
    (0, 1),    // IP_TOS
    (0, 2),    // IP_TTL
    (0, 4),    // IP_OPTIONS
    (0, 6),    // IP_RECVOPTS
    (0, 7),    // IP_RETOPTS
    (0, 8),    // IP_PKTINFO
    (0, 10),   // IP_MTU_DISCOVER
    (0, 11),   // IP_RECVERR
    (0, 12),   // IP_RECVTTL
    (0, 13),   // IP_RECVTOS
    (0, 15),   // IP_FREEBIND
    (0, 18),   // IP_PASSSEC
    (0, 19),   // IP_TRANSPARENT
    (0, 20),   // IP_RECVORIGDSTADDR
    (0, 21),   // IP_MINTTL
    (0, 23),   // IP_CHECKSUM
    (0, 24),   // IP_BIND_ADDRESS_NO_PORT
    (0, 25),   // IP_RECVFRAGSIZE
    (0, 26),   // IP_RECVERR_RFC4884
    (0, 32),   // IP_MULTICAST_IF
    (0, 33),   // IP_MULTICAST_TTL
    (0, 34),   // IP_MULTICAST_LOOP
    (0, 49),   // IP_MULTICAST_ALL
    (0, 51),   // IP_LOCAL_PORT_RANGE
    (41, 26),  // IPV6_V6ONLY
    (41, 16),  // IPV6_UNICAST_HOPS
    (41, 18),  // IPV6_MULTICAST_HOPS
    (41, 19),  // IPV6_MULTICAST_LOOP
    (41, 23),  // IPV6_MTU_DISCOVER
    (41, 25),  // IPV6_RECVERR
    (41, 29),  // IPV6_MULTICAST_ALL
    (41, 31),  // IPV6_RECVERR_RFC4884
    (41, 33),  // IPV6_FLOWINFO_SEND
    (41, 49),  // IPV6_RECVPKTINFO
    (41, 51),  // IPV6_RECVHOPLIMIT
    (41, 53),  // IPV6_RECVHOPOPTS
    (41, 56),  // IPV6_RECVRTHDR
    (41, 58),  // IPV6_RECVDSTOPTS
    (41, 60),  // IPV6_RECVPATHMTU
    (41, 62),  // IPV6_DONTFRAG
    (41, 66),  // IPV6_RECVTCLASS
    (41, 67),  // IPV6_TCLASS
    (41, 70),  // IPV6_AUTOFLOWLABEL
    (41, 72),  // IPV6_ADDR_PREFERENCES
    (41, 73),  // IPV6_MINHOPCOUNT
    (41, 74),  // IPV6_RECVORIGDSTADDR
    (41, 75),  // IPV6_TRANSPARENT
    (41, 77),  // IPV6_RECVFRAGSIZE
    (41, 78),  // IPV6_FREEBIND
    (17, 100), // UDP_ENCAP
    (17, 101), // UDP_NO_CHECK6_TX
    (17, 102), // UDP_NO_CHECK6_RX
    (17, 103), // UDP_SEGMENT
    (17, 104), // UDP_GRO
    (17, 1),   // UDP_CORK
    (136, 10), // UDPLITE_SEND_CSCOV
    (136, 11), // UDPLITE_RECV_CSCOV
    (0, 3),    // IP_HDRINCL
    (0, 22),   // IP_NODEFRAG
    (255, 1),  // ICMP_FILTER
    (58, 1),   // ICMPV6_FILTER
    (41, 7),   // IPV6_CHECKSUM
    (41, 36),  // IPV6_HDRINCL
];

/// Options whose value is an interface, by level and name.
pub const INTERFACE_OPTIONS: &[(i32, i32)] = &[
    (0, 50),  // IP_UNICAST_IF
    (41, 17), // IPV6_MULTICAST_IF
    (41, 76), // IPV6_UNICAST_IF
];

/// Longest name of an interface, with its zero (linux/if.h, `IFNAMSIZ`).
const INTERFACE_NAME: usize = 16;
/// More instructions than any classic filter has (linux/bpf_common.h, `BPF_MAXINSNS`).
const MOST_INSTRUCTIONS: usize = 4096;
/// More senders than the kernel lets a socket name (net.ipv4.igmp_max_msf is 10 by default).
const MOST_SOURCES: usize = 1 << 12;

/// Whether these bytes can be the name of an interface.
pub fn is_interface(name: &Bytes) -> bool {
    !name.is_empty() && name.len() < INTERFACE_NAME && !name.contains(&0)
}

/// Whether these bytes can be a classic filter.
pub fn is_filter(filter: &Bytes) -> bool {
    !filter.is_empty() && filter.len().is_multiple_of(8) && filter.len() / 8 <= MOST_INSTRUCTIONS
}

impl IpSettings {
    /// Whether all of it is possible.
    pub fn is_possible(&self) -> bool {
        let known = |o: &InterfaceOption| INTERFACE_OPTIONS.contains(&(o.level, o.name));
        let group = |m: &Membership| {
            m.group.is_multicast()
                && is_interface(&m.interface)
                && m.sources.len() <= MOST_SOURCES
                && m.sources.iter().all(|s| s.is_ipv4() == m.group.is_ipv4())
        };
        self.options.iter().all(SocketOption::is_known)
            && self.interfaces.iter().all(|o| known(o) && is_interface(&o.interface))
            && self.memberships.iter().all(group)
            && self.filter.as_ref().is_none_or(is_filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(group: &str, source: &str) -> Membership {
        Membership {
            group: group.parse().unwrap(),
            interface: Bytes::from(&b"lo"[..]),
            include: true,
            sources: vec![source.parse().unwrap()],
        }
    }

    #[test]
    fn what_no_socket_has_is_impossible() {
        let good = IpSettings {
            options: vec![SocketOption { level: 0, name: 1, value: vec![16, 0, 0, 0].into() }],
            interfaces: vec![InterfaceOption { level: 0, name: 50, interface: b"lo"[..].into() }],
            memberships: vec![membership("239.1.2.3", "192.0.2.7")],
            filter: Some(vec![6, 0, 0, 0, 255, 255, 0, 0].into()),
        };
        assert!(good.is_possible());
        let with = |change: &dyn Fn(&mut IpSettings)| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.is_possible()
        };
        assert!(!with(&|s| s.options[0].name = 17));
        assert!(!with(&|s| s.options[0].value = vec![0; 65].into()));
        assert!(!with(&|s| s.interfaces[0].name = 1));
        assert!(!with(&|s| s.interfaces[0].interface = b"a-name-too-long-"[..].into()));
        assert!(!with(&|s| s.interfaces[0].interface = b"l\0"[..].into()));
        assert!(!with(&|s| s.memberships[0] = membership("192.0.2.1", "192.0.2.7")));
        assert!(!with(&|s| s.memberships[0] = membership("239.1.2.3", "::1")));
        assert!(!with(&|s| s.filter = Some(vec![0; 12].into())));
        assert!(!with(&|s| s.filter = Some(vec![0; 8 * 4097].into())));
        assert!(!with(&|s| s.filter = Some(Bytes::default())));
    }
}
