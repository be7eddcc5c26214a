//! packet(7)
//!
//! A socket is made without a protocol, lest packets come in before it is as it was, and gets the protocol when
//! it is bound.

use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::packet::PacketSocket;
use torpor_image::socket::SocketOption;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::{address, raw, socket};

/// linux/if_packet.h
const SOL_PACKET: i32 = 263;
const PACKET_ADD_MEMBERSHIP: i32 = 1;
const PACKET_FANOUT: i32 = 18;

pub(crate) fn open(what: &str, packet: &PacketSocket) -> Result<OwnedFd> {
    let kind = packet.kind | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned(what, "socket", unsafe { libc::socket(libc::AF_PACKET, kind, 0) });
    let fd = fd.map_err(raw::without_privilege)?;
    let (locks, options): (Vec<SocketOption>, Vec<_>) =
        packet.options.iter().cloned().partition(socket::is_filter_lock);
    socket::set(what, &fd, &options)?;
    if let Some(filter) = &packet.filter {
        socket::attach_filter(what, &fd, filter)?;
    }
    socket::set(what, &fd, &locks)?;
    for membership in &packet.memberships {
        let index = address::interface(what, &membership.interface)?;
        // struct packet_mreq
        let mut request = [&index.to_ne_bytes()[..], &membership.kind.to_ne_bytes()].concat();
        request.extend((membership.address.len() as u16).to_ne_bytes());
        request.extend_from_slice(&membership.address);
        request.resize(16, 0);
        for _ in 0..membership.count {
            if !socket::set_bytes(&fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request) {
                return Err(Error::last(what, "setsockopt(PACKET_ADD_MEMBERSHIP)"));
            }
        }
    }
    if packet.interface.is_some() || packet.protocol != 0 {
        bind(what, &fd, packet)?;
    }
    if let Some(fanout) = packet.fanout
        && !socket::set_int(&fd, SOL_PACKET, PACKET_FANOUT, fanout as i32)
    {
        return Err(Error::last(what, "setsockopt(PACKET_FANOUT)"));
    }
    Ok(fd)
}

fn bind(what: &str, fd: &OwnedFd, packet: &PacketSocket) -> Result<()> {
    // SAFETY: integers only, for which zero is a value.
    let mut place: libc::sockaddr_ll = unsafe { zeroed() };
    place.sll_family = libc::AF_PACKET as u16;
    place.sll_protocol = packet.protocol.to_be();
    if let Some(name) = &packet.interface {
        place.sll_ifindex = address::interface(what, name)? as i32;
    }
    let len = size_of_val(&place) as libc::socklen_t;
    // SAFETY: an address with its length.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const place).cast(), len) };
    Errno::result(bound).map(drop).map_err(Error::open(what, "bind"))
}
