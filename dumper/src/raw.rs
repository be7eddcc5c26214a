//! raw(7)

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use torpor_image::description::Kind;
use torpor_image::raw::RawSocket;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
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
    let all = torpor_kernel::raw::sockets().map_err(Error::kernel(collector.pid, "listing raw sockets"))?;
    let number = found.stat.st_ino as u32;
    let peer = all.into_iter().find(|s| s.inode == number).and_then(|s| s.peer);
    // What getsockname(2) calls the port is the protocol.
    let bare = |mut address: SocketAddr| {
        address.set_port(0);
        address
    };
    Ok(Some(Kind::Raw(RawSocket {
        number,
        family,
        protocol,
        local: address::local(fd).map(bare).filter(address::is_some),
        peer: peer.map(|ip| SocketAddr::new(ip, 0)),
        settings,
    })))
}
