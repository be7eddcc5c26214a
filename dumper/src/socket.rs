//! What all sockets have: options, read one by one and compared with those of a new socket.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::Bytes;
use torpor_image::socket::{SOCKET_OPTIONS, SocketOption};

use crate::collect::Collector;
use crate::description::Found;

/// An int option.
pub(crate) fn int_option(fd: &OwnedFd, level: i32, name: i32) -> Option<i32> {
    option(fd, level, name).and_then(|v| Some(i32::from_ne_bytes(*v.first_chunk()?)))
}

/// The value of an option; `None` where the socket has no such.
pub(crate) fn option(fd: &OwnedFd, level: i32, name: i32) -> Option<Vec<u8>> {
    let mut value = vec![0u8; 256];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: getsockopt fills at most `len` bytes.
    let got =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    (got == 0).then(|| {
        value.truncate(len as usize);
        value
    })
}

/// The options of `fd` that differ from those of a new socket of its kind; `more` are its family's own.
pub(crate) fn options(
    fd: &OwnedFd,
    family: i32,
    kind: i32,
    protocol: i32,
    more: &[(i32, i32)],
) -> Vec<SocketOption> {
    options_like(&Fresh::new(family, kind, protocol, more), fd, more)
}

/// The options of a new socket.
#[derive(Debug)]
pub(crate) struct Fresh(HashMap<(i32, i32), Vec<u8>>);

impl Fresh {
    pub(crate) fn new(family: i32, kind: i32, protocol: i32, more: &[(i32, i32)]) -> Self {
        // SAFETY: socket takes numbers only.
        let fresh = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
        if fresh < 0 {
            return Fresh(HashMap::new());
        }
        // SAFETY: a descriptor just opened, owned by nobody else.
        let fresh = unsafe { OwnedFd::from_raw_fd(fresh) };
        Fresh(
            all(more)
                .filter_map(|(level, name)| Some(((level, name), option(&fresh, level, name)?)))
                .collect(),
        )
    }
}

fn all(more: &[(i32, i32)]) -> impl Iterator<Item = (i32, i32)> {
    SOCKET_OPTIONS.iter().map(|name| (libc::SOL_SOCKET, *name)).chain(more.iter().copied())
}

/// The options of `fd` that differ from those of `fresh`.
pub(crate) fn options_like(fresh: &Fresh, fd: &OwnedFd, more: &[(i32, i32)]) -> Vec<SocketOption> {
    all(more)
        .filter_map(|(level, name)| {
            let value = option(fd, level, name)?;
            let default = fresh.0.get(&(level, name));
            (default != Some(&value) && value.len() <= 64).then(|| SocketOption {
                level,
                name,
                value: value.into(),
            })
        })
        .collect()
}

/// How many instructions a filter attached to the socket has (SO_GET_FILTER, which is SO_ATTACH_FILTER).
pub(crate) fn filter_length(fd: &OwnedFd) -> u32 {
    let mut len: libc::socklen_t = 0;
    // SAFETY: with a length of zero only the length is filled in (net/core/filter.c, sk_get_filter).
    let got = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    match got {
        0 => len,
        // There is one, but of the extended kind, which cannot be read.
        _ if Errno::last() == Errno::EACCES => 1,
        _ => 0,
    }
}

/// The classic filter attached to a socket, instructions of eight bytes; `Err` for one of the extended kind,
/// which cannot be read.
pub(crate) fn filter(fd: &OwnedFd) -> Result<Option<Bytes>, Errno> {
    let mut len: libc::socklen_t = 0;
    let get = |place: *mut u8, len: &mut libc::socklen_t| {
        // SAFETY: the length counts instructions of eight bytes; with zero nothing but itself is filled in
        // (net/core/filter.c, `sk_get_filter`).
        let got = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                place.cast(),
                &raw mut *len,
            )
        };
        Errno::result(got)
    };
    match get(std::ptr::null_mut(), &mut len) {
        Err(Errno::EACCES) => return Err(Errno::EACCES),
        // Sockets without such an option have no filter.
        Err(_) => return Ok(None),
        Ok(_) if len == 0 => return Ok(None),
        Ok(_) => {}
    }
    let mut filter = vec![0u8; len as usize * 8];
    get(filter.as_mut_ptr(), &mut len)?;
    Ok(Some(Bytes(filter)))
}

/// Refuses a filter that cannot be read.
pub(crate) fn refuse_filter(collector: &mut Collector, found: &Found) {
    let why = "an eBPF filter is attached to it, which cannot be read back";
    collector.refuse(found.title(), why, "detach it before the dump (SO_DETACH_FILTER)");
}

/// Address families that are not dumped (linux/socket.h).
const FAMILIES: [(i32, &str); 15] = [
    (libc::AF_KEY, "an AF_KEY (IPsec)"),
    (libc::AF_RDS, "an RDS"),
    (24, "a PPP (AF_PPPOX)"),
    (libc::AF_LLC, "an LLC"),
    (27, "an InfiniBand (AF_IB)"),
    (libc::AF_CAN, "a CAN"),
    (libc::AF_TIPC, "a TIPC"),
    (libc::AF_BLUETOOTH, "a Bluetooth"),
    (libc::AF_RXRPC, "an RxRPC"),
    (libc::AF_ALG, "an AF_ALG (kernel crypto)"),
    (libc::AF_NFC, "an NFC"),
    (41, "a KCM"),
    (42, "a Qualcomm IPC router (AF_QIPCRTR)"),
    (43, "an SMC"),
    (libc::AF_XDP, "an AF_XDP (eXpress data path)"),
];

/// "a UDP socket"
pub(crate) fn name(domain: Option<i32>, kind: Option<i32>, protocol: Option<i32>) -> String {
    match (domain, kind, protocol) {
        (Some(libc::AF_INET | libc::AF_INET6), Some(libc::SOCK_DGRAM), _) => "a UDP socket".into(),
        (Some(libc::AF_INET | libc::AF_INET6), Some(libc::SOCK_RAW), _) => "a raw socket".into(),
        (Some(libc::AF_INET | libc::AF_INET6), _, Some(protocol)) => match protocol {
            132 => "an SCTP socket".into(),
            33 => "a DCCP socket".into(),
            256 => "an SMC socket".into(),
            262 => "an MPTCP socket".into(),
            other => format!("an internet socket of protocol {other}"),
        },
        (Some(libc::AF_NETLINK), ..) => "a netlink socket".into(),
        (Some(libc::AF_PACKET), ..) => "a packet socket".into(),
        (Some(libc::AF_VSOCK), ..) => "a vsock socket".into(),
        (Some(family), ..) => match FAMILIES.iter().find(|(number, _)| *number == family) {
            Some((_, name)) => format!("{name} socket"),
            None => format!("a socket of address family {family}"),
        },
        _ => "a socket of unknown kind".into(),
    }
}
