//! raw(7)

use std::os::fd::OwnedFd;

use torpor_image::description::Kind;
use torpor_image::raw::RawSocket;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::{address, ip};

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    family: i32,
    protocol: i32,
) -> Result<Option<Kind>> {
    let kind = (family, libc::SOCK_RAW, protocol);
    let Some(settings) = ip::settings(collector, found, fd, kind)? else { return Ok(None) };
    if !collector.live && ip::waiting(fd) > 0 {
        collector.lose(format!("{}: packets that were not read", found.title()));
    }
    // What getsockname(2) calls the port is the protocol.
    let bare = |mut address: std::net::SocketAddr| {
        address.set_port(0);
        address
    };
    Ok(Some(Kind::Raw(RawSocket {
        number: found.stat.st_ino as u32,
        family,
        protocol,
        local: address::local(fd).map(bare).filter(address::is_some),
        peer: address::peer(fd).map(bare),
        settings,
    })))
}
