//! packet(7)
//!
//! Interfaces are told by name: their numbers change with every boot. What waits to be received is lost, as
//! packets may be.

use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::packet::{PACKET_OPTIONS, PacketMembership, PacketSocket};
use torpor_kernel::sock_diag;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::{address, socket};

/// linux/if_packet.h
const SOL_PACKET: i32 = 263;
const PACKET_FANOUT: i32 = 18;
/// Fanout by a program, which cannot be read back: `PACKET_FANOUT_CBPF` and `PACKET_FANOUT_EBPF`.
const PROGRAMS: [u32; 2] = [6, 7];
const CLOSE_IT: &str = "close it before the dump";

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    kind: i32,
) -> Result<Option<Kind>> {
    let refuse = |collector: &mut Collector, why: &str| {
        collector.refuse(found.title(), why, CLOSE_IT);
        Ok(None)
    };
    let Ok(filter) = socket::filter(fd) else {
        socket::refuse_filter(collector, found);
        return Ok(None);
    };
    let number = found.stat.st_ino as u32;
    let all = sock_diag::packet_sockets().map_err(Error::kernel(collector.pid, "listing packet sockets"))?;
    let Some(diag) = all.into_iter().find(|s| s.inode == number) else {
        return refuse(collector, "the kernel lists no packet socket of this number");
    };
    if diag.rings.0 || diag.rings.1 {
        return refuse(
            collector,
            "a packet socket with a ring (PACKET_RX_RING, PACKET_TX_RING) cannot be dumped yet",
        );
    }
    let fanout =
        diag.fanout.and_then(|_| socket::int_option(fd, SOL_PACKET, PACKET_FANOUT)).map(|v| v as u32);
    if fanout.is_some_and(|f| PROGRAMS.contains(&(f >> 16 & 0xff))) {
        return refuse(
            collector,
            "the program that spreads its packets (PACKET_FANOUT_DATA) cannot be read back",
        );
    }
    if !collector.live && diag.waiting > 0 {
        collector.lose(format!("{}: packets that were not read", found.title()));
    }
    let interface = match diag.interface {
        0 => None,
        index => match address::interface(index) {
            Some(name) => Some(name),
            None => return refuse(collector, "the interface it is bound to is gone"),
        },
    };
    // Requests to an interface go with it.
    let membership = |m: sock_diag::PacketMembership| {
        let address = Bytes(m.address.into_iter().take(8).collect());
        let interface = address::interface(m.interface)?;
        Some(PacketMembership { interface, kind: m.kind, address, count: m.count })
    };
    Ok(Some(Kind::Packet(PacketSocket {
        number,
        kind,
        protocol: protocol(fd).unwrap_or(diag.protocol),
        interface,
        memberships: diag.memberships.into_iter().filter_map(membership).collect(),
        fanout,
        options: socket::options(fd, libc::AF_PACKET, kind, 0, PACKET_OPTIONS),
        filter,
    })))
}

/// The protocol of `struct sockaddr_ll`.
fn protocol(fd: &OwnedFd) -> Option<u16> {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: getsockname fills at most `len` bytes.
    let got = unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) };
    (got == 0).then(|| u16::from_be(address.sll_protocol))
}
