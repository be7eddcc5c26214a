//! What all sockets have.

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::ip::IP_OPTIONS;
use crate::netlink::NETLINK_OPTIONS;
use crate::packet::PACKET_OPTIONS;

/// One socket option, as getsockopt(2) gave it and setsockopt(2) takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SOL_*`
    pub level: i32,
    /// `SO_*` and the like.
    pub name: i32,
    /// Its value.
    pub value: Bytes,
}

/// Options of any socket that are kept: those which setsockopt(2) takes as getsockopt(2) gives them, and
/// which hold no addresses. An image with others is refused.
pub const SOCKET_OPTIONS: &[i32] = &[
    2,  // SO_REUSEADDR
    6,  // SO_BROADCAST
    7,  // SO_SNDBUF
    8,  // SO_RCVBUF
    9,  // SO_KEEPALIVE
    10, // SO_OOBINLINE
    11, // SO_NO_CHECK
    12, // SO_PRIORITY
    13, // SO_LINGER
    15, // SO_REUSEPORT
    16, // SO_PASSCRED
    18, // SO_RCVLOWAT
    20, // SO_RCVTIMEO
    21, // SO_SNDTIMEO
    25, // SO_BINDTODEVICE
    29, // SO_TIMESTAMP
    34, // SO_PASSSEC
    35, // SO_TIMESTAMPNS
    36, // SO_MARK
    46, // SO_BUSY_POLL
    72, // SO_BUF_LOCK
    5,  // SO_DONTROUTE
    37, // SO_TIMESTAMPING_OLD
    63, // SO_TIMESTAMP_NEW
    64, // SO_TIMESTAMPNS_NEW
    65, // SO_TIMESTAMPING_NEW
    40, // SO_RXQ_OVFL
    41, // SO_WIFI_STATUS
    42, // SO_PEEK_OFF
    43, // SO_NOFCS
    44, // SO_LOCK_FILTER
    45, // SO_SELECT_ERR_QUEUE
    47, // SO_MAX_PACING_RATE
    60, // SO_ZEROCOPY
    61, // SO_TXTIME
    69, // SO_PREFER_BUSY_POLL
    70, // SO_BUSY_POLL_BUDGET
    74, // SO_TXREHASH
    75, // SO_RCVMARK
    76, // SO_PASSPIDFD
    82, // SO_RCVPRIORITY
    83, // SO_PASSRIGHTS
    84, // SO_INQ
];
/// The same of TCP, by level and name.
pub const TCP_OPTIONS: &[(i32, i32)] = &[
    (6, 1),   // TCP_NODELAY
    (6, 2),   // TCP_MAXSEG
    (6, 3),   // TCP_CORK
    (6, 4),   // TCP_KEEPIDLE
    (6, 5),   // TCP_KEEPINTVL
    (6, 6),   // TCP_KEEPCNT
    (6, 7),   // TCP_SYNCNT
    (6, 8),   // TCP_LINGER2
    (6, 9),   // TCP_DEFER_ACCEPT
    (6, 10),  // TCP_WINDOW_CLAMP
    (6, 13),  // TCP_CONGESTION
    (6, 16),  // TCP_THIN_LINEAR_TIMEOUTS
    (6, 17),  // TCP_THIN_DUPACK
    (6, 18),  // TCP_USER_TIMEOUT
    (6, 23),  // TCP_FASTOPEN
    (6, 25),  // TCP_NOTSENT_LOWAT
    (6, 27),  // TCP_SAVE_SYN
    (6, 30),  // TCP_FASTOPEN_CONNECT
    (6, 34),  // TCP_FASTOPEN_NO_COOKIE
    (6, 36),  // TCP_INQ
    (6, 37),  // TCP_TX_DELAY
    (6, 44),  // TCP_RTO_MAX_MS
    (6, 45),  // TCP_RTO_MIN_US
    (6, 46),  // TCP_DELACK_MAX_US
    (0, 1),   // IP_TOS
    (0, 2),   // IP_TTL
    (0, 6),   // IP_RECVOPTS
    (0, 7),   // IP_RETOPTS
    (0, 8),   // IP_PKTINFO
    (0, 10),  // IP_MTU_DISCOVER
    (0, 11),  // IP_RECVERR
    (0, 12),  // IP_RECVTTL
    (0, 13),  // IP_RECVTOS
    (0, 15),  // IP_FREEBIND
    (0, 19),  // IP_TRANSPARENT
    (0, 21),  // IP_MINTTL
    (0, 24),  // IP_BIND_ADDRESS_NO_PORT
    (0, 51),  // IP_LOCAL_PORT_RANGE
    (41, 16), // IPV6_UNICAST_HOPS
    (41, 23), // IPV6_MTU_DISCOVER
    (41, 25), // IPV6_RECVERR
    (41, 26), // IPV6_V6ONLY
    (41, 49), // IPV6_RECVPKTINFO
    (41, 51), // IPV6_RECVHOPLIMIT
    (41, 66), // IPV6_RECVTCLASS
    (41, 67), // IPV6_TCLASS
    (41, 70), // IPV6_AUTOFLOWLABEL
    (41, 73), // IPV6_MINHOPCOUNT
    (41, 75), // IPV6_TRANSPARENT
    (41, 78), // IPV6_FREEBIND
];
/// `SOL_SOCKET`
pub const SOL_SOCKET: i32 = 1;

impl SocketOption {
    /// Whether the option is one of those that are kept.
    pub fn is_known(&self) -> bool {
        self.value.len() <= 64
            && (self.level == SOL_SOCKET && SOCKET_OPTIONS.contains(&self.name)
                || [TCP_OPTIONS, IP_OPTIONS, NETLINK_OPTIONS, PACKET_OPTIONS]
                    .iter()
                    .any(|list| list.contains(&(self.level, self.name))))
    }
}
