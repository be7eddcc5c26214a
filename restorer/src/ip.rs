//! Options, groups and filters of sockets of ip(7) and ipv6(7).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use torpor_image::ip::{IpSettings, Membership};
use torpor_image::socket::SocketOption;

use crate::error::{Error, Result};
use crate::{address, socket};

/// linux/in.h
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const MCAST_EXCLUDE: u32 = 0;
const MCAST_INCLUDE: u32 = 1;

/// What a socket has before it is bound.
pub(crate) fn before(what: &str, fd: &OwnedFd, settings: &IpSettings) -> Result<()> {
    // Before SO_BINDTODEVICE, after which the kernel takes none but that device's master.
    for option in &settings.interfaces {
        let index = address::interface(what, &option.interface)?;
        // The unicast ones are in network order (net/ipv4/ip_sockglue.c).
        let value = if option.name == libc::IPV6_MULTICAST_IF { index } else { index.to_be() };
        if !socket::set_int(fd, option.level, option.name, value as i32) {
            return Err(Error::last(what, "setsockopt(interface)"));
        }
    }
    let options: Vec<SocketOption> =
        settings.options.iter().filter(|o| !socket::is_filter_lock(o)).cloned().collect();
    socket::set(what, fd, &options)
}

/// What it has once it is bound.
pub(crate) fn after(what: &str, fd: &OwnedFd, settings: &IpSettings) -> Result<()> {
    for membership in &settings.memberships {
        join(what, fd, membership)?;
    }
    if let Some(filter) = &settings.filter {
        socket::attach_filter(what, fd, filter)?;
    }
    let locks: Vec<SocketOption> =
        settings.options.iter().filter(|o| socket::is_filter_lock(o)).cloned().collect();
    socket::set(what, fd, &locks)
}

/// Joins a group, then says whose messages to it are wanted.
fn join(what: &str, fd: &OwnedFd, membership: &Membership) -> Result<()> {
    let what = format!("{what}: group {} on `{}`", membership.group, membership.interface);
    let level = if membership.group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    let interface = address::interface(&what, &membership.interface)?;
    // struct group_req: the number of the interface, padded, and the group. struct group_filter begins so.
    let request = [&interface.to_ne_bytes()[..], &[0; 4], &storage(membership.group)].concat();
    if !socket::set_bytes(fd, level, MCAST_JOIN_GROUP, &request) {
        return Err(Error::last(&what, "setsockopt(MCAST_JOIN_GROUP)"));
    }
    if membership.include || !membership.sources.is_empty() {
        let mode = if membership.include { MCAST_INCLUDE } else { MCAST_EXCLUDE };
        let count = membership.sources.len() as u32;
        let mut filter = [request, mode.to_ne_bytes().to_vec(), count.to_ne_bytes().to_vec()].concat();
        filter.extend(membership.sources.iter().flat_map(|s| storage(*s)));
        if !socket::set_bytes(fd, level, MCAST_MSFILTER, &filter) {
            return Err(Error::last(&what, "setsockopt(MCAST_MSFILTER)"));
        }
    }
    Ok(())
}

/// `struct sockaddr_storage`
fn storage(ip: IpAddr) -> Vec<u8> {
    let address = SockaddrStorage::from(SocketAddr::new(ip, 0));
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let len = address.len() as usize;
    // SAFETY: an address has the bytes that its length says.
    bytes[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(address.as_ptr().cast(), len) });
    bytes
}

/// Sends a packet of our making, with header, to an address of this machine.
pub(crate) fn send_raw(fd: &OwnedFd, packet: &[u8], to: IpAddr) -> nix::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    // SAFETY: a buffer and an address with their lengths.
    let sent = unsafe {
        libc::sendto(fd.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, to.as_ptr(), to.len())
    };
    nix::errno::Errno::result(sent).map(drop)
}
