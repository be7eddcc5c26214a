//! What sockets of ip(7) and ipv6(7) without connections have in common: options, groups, filter.
//!
//! A socket tells of a multicast group only when asked for it by name (`MCAST_MSFILTER`, net/ipv4/igmp.c,
//! `ip_mc_gsfget`): each is asked for every group that any interface has.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{SockaddrIn, SockaddrIn6};
use torpor_image::ip::{INTERFACE_OPTIONS, IP_OPTIONS, InterfaceOption, IpSettings, Membership};
use torpor_kernel::igmp::{self, Group};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::{address, socket};

/// linux/in.h
const MCAST_MSFILTER: i32 = 48;
const MCAST_INCLUDE: u32 = 1;
/// Senders there is room for; the kernel says how many there are.
const SOURCES: usize = 64;

/// `struct group_filter` (linux/in.h)
#[repr(C)]
struct GroupFilter {
    interface: u32,
    group: libc::sockaddr_storage,
    mode: u32,
    count: u32,
    sources: [libc::sockaddr_storage; SOURCES],
}

/// The settings of a socket; `None` when something was refused.
pub(crate) fn settings(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    (family, kind, protocol): (i32, i32, i32),
) -> Result<Option<IpSettings>> {
    let Ok(filter) = socket::filter(fd) else {
        socket::refuse_filter(collector, found);
        return Ok(None);
    };
    let mut interfaces = Vec::new();
    for &(level, name) in INTERFACE_OPTIONS {
        let Some(value) = socket::int_option(fd, level, name).filter(|v| *v != 0) else { continue };
        // The unicast ones are in network order (net/ipv4/ip_sockglue.c).
        let index = if name == libc::IPV6_MULTICAST_IF { value as u32 } else { u32::from_be(value as u32) };
        let Some(interface) = address::interface(index) else {
            let why = format!("it is set to interface {index}, which does not exist");
            collector.refuse(found.title(), why, "close it before the dump");
            return Ok(None);
        };
        interfaces.push(InterfaceOption { level, name, interface });
    }
    Ok(Some(IpSettings {
        options: socket::options(fd, family, kind, protocol, IP_OPTIONS),
        interfaces,
        memberships: memberships(fd),
        filter,
    }))
}

fn memberships(fd: &OwnedFd) -> Vec<Membership> {
    let groups = igmp::groups().unwrap_or_default();
    groups.iter().filter_map(|group| membership(fd, group)).collect()
}

/// What a socket says of a group, if it has joined it.
fn membership(fd: &OwnedFd, group: &Group) -> Option<Membership> {
    // SAFETY: integers only, for which zero is a value.
    let mut filter: GroupFilter = unsafe { std::mem::zeroed() };
    filter.interface = group.interface;
    filter.count = SOURCES as u32;
    let level = match group.address {
        IpAddr::V4(ip) => {
            let raw = SockaddrIn::from(SocketAddrV4::new(ip, 0));
            // SAFETY: a sockaddr_storage has room for every address.
            unsafe { (&raw mut filter.group).cast::<libc::sockaddr_in>().write(*raw.as_ref()) };
            libc::IPPROTO_IP
        }
        IpAddr::V6(ip) => {
            let raw = SockaddrIn6::from(SocketAddrV6::new(ip, 0, 0, 0));
            // SAFETY: as above.
            unsafe { (&raw mut filter.group).cast::<libc::sockaddr_in6>().write(*raw.as_ref()) };
            libc::IPPROTO_IPV6
        }
    };
    let mut len = size_of::<GroupFilter>() as libc::socklen_t;
    // SAFETY: getsockopt reads and fills at most `len` bytes.
    let got = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, MCAST_MSFILTER, (&raw mut filter).cast(), &raw mut len)
    };
    if got != 0 {
        return None;
    }
    let sources = filter.sources.iter().take(filter.count as usize);
    let size = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    Some(Membership {
        group: group.address,
        interface: address::interface(group.interface)?,
        include: filter.mode == MCAST_INCLUDE,
        sources: sources.filter_map(|s| address::from_raw(s, size)).map(|a: SocketAddr| a.ip()).collect(),
    })
}

/// Bytes that wait to be received, in the kernel's own measure (`SO_MEMINFO`, net/core/sock.c).
pub(crate) fn waiting(fd: &OwnedFd) -> u32 {
    const SO_MEMINFO: i32 = 55;
    let info = socket::option(fd, libc::SOL_SOCKET, SO_MEMINFO).unwrap_or_default();
    info.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
}

/// Whether an error waits to be read (`IP_RECVERR`, or of a send that failed): it can be looked at only by
/// taking it away.
pub(crate) fn has_error(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLERR != 0 }
}
