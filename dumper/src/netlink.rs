//! netlink(7)
//!
//! What waits in such a socket are answers and notices that come once. A program reads them within a moment, so
//! the freeze is put off for it; what still waits then is refused: without it a program waits for ever, or
//! believes in devices and addresses that are gone.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::description::Kind;
use torpor_image::netlink::{NETLINK_OPTIONS, NetlinkSocket};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::opened::Opened;
use crate::{ip, socket};

/// linux/netlink.h
const SOL_NETLINK: i32 = 270;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    kind: i32,
    protocol: i32,
) -> Result<Option<Kind>> {
    let Ok(filter) = socket::filter(fd) else {
        socket::refuse_filter(collector, found);
        return Ok(None);
    };
    let number = found.stat.st_ino as u32;
    if !collector.live {
        let all = torpor_kernel::netlink::sockets()
            .map_err(Error::kernel(collector.pid, "listing netlink sockets"))?;
        let dumping = all.iter().any(|s| s.inode == number && s.dumping);
        if dumping || ip::waiting(fd) > 0 {
            let why = "messages of the kernel wait in it, or are on their way";
            collector.refuse(found.title(), why, "try again once the program has received them");
            return Ok(None);
        }
    }
    if ip::has_error(fd) && !collector.live {
        collector.lose(format!("{}: the news that messages were lost", found.title()));
    }
    let (own, peer) = (name(fd, libc::getsockname), name(fd, libc::getpeername));
    Ok(Some(Kind::Netlink(NetlinkSocket {
        number,
        kind,
        protocol,
        port: own.map(|(port, _)| port).filter(|p| *p != 0),
        groups: groups(fd),
        peer: peer.filter(|p| *p != (0, 0)),
        options: socket::options(fd, libc::AF_NETLINK, kind, protocol, NETLINK_OPTIONS),
        filter,
    })))
}

/// Port id and groups that a call fills in.
fn name(
    fd: &OwnedFd,
    call: unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32,
) -> Option<(u32, u32)> {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the call fills at most `len` bytes.
    let got = unsafe { call(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) };
    (got == 0).then_some((address.nl_pid, address.nl_groups))
}

/// The groups it has joined: bit N of the answer is group N + 1.
fn groups(fd: &OwnedFd) -> Vec<u32> {
    let bits = socket::option(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS).unwrap_or_default();
    let words = bits.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
    words
        .enumerate()
        .flat_map(|(n, word)| {
            (0..32).filter(move |bit| word >> bit & 1 != 0).map(move |bit| n as u32 * 32 + bit + 1)
        })
        .collect()
}

/// Whether a process has messages that it has not read yet, and that a dump would refuse.
pub(crate) fn unread(all: &[Opened]) -> bool {
    let own: HashSet<u32> = all.iter().flat_map(Opened::sockets).collect();
    if own.is_empty() {
        return false;
    }
    let waits = |s: &torpor_kernel::netlink::Socket| s.port != 0 && (s.waiting > 0 || s.dumping);
    let Ok(all) = torpor_kernel::netlink::sockets() else { return false };
    all.iter().any(|s| waits(s) && own.contains(&s.inode))
}
