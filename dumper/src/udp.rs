//! udp(7), UDP-Lite and ping sockets.
//!
//! What waits to be received is peeked at, with all that the program has asked to be told of a datagram; see
//! `peek`. A socket whose data is held back (`UDP_CORK`, `MSG_MORE`) shows nothing of it but that memory is in
//! use for sending (net/ipv4/ip_output.c, `__ip_append_data`), as does one whose packets are on their way.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::udp::{Datagram, MOST_DATA, UdpSocket};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::peek::{self, Peeked};
use crate::{address, ip};

/// How often, and how long, packets on their way are waited for: 63 ms in all.
const MOMENTS: u32 = 6;

pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    family: i32,
    protocol: i32,
) -> Result<Option<Kind>> {
    if sending(fd, collector.live) {
        collector.refuse(
            found.title(),
            "data was written to it with MSG_MORE or UDP_CORK, or is still being sent; it cannot be read back",
            "try again once the program has sent it",
        );
        return Ok(None);
    }
    let kind = (family, libc::SOCK_DGRAM, protocol);
    let Some(settings) = ip::settings(collector, found, fd, kind)? else { return Ok(None) };
    let number = found.stat.st_ino as u32;
    let is_ping = matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6);
    let mut queue = Vec::new();
    // Peeking moves a mark that a running program may use itself.
    if !collector.live && ip::waiting(fd) > 0 {
        if is_ping {
            collector.lose(format!("{}: replies that were not read", found.title()));
        } else if ip::has_error(fd) {
            // To receive is to be told of the error first, and then it is gone.
            collector
                .losses
                .push(format!("{}: datagrams that were not read, behind an error", found.title()));
        } else {
            let peeked = peek::datagrams(collector, found, fd)?;
            let count = peeked.len();
            queue = peeked.into_iter().filter_map(datagram).collect();
            if queue.len() < count {
                let lost = count - queue.len();
                collector.lose(format!(
                    "{}: {lost} datagrams that were not read, from link-local addresses or of more than {MOST_DATA} bytes",
                    found.title()
                ));
            }
        }
    }
    if !collector.live && ip::has_error(fd) {
        collector.lose(format!("{}: errors that were not read", found.title()));
    }
    Ok(Some(Kind::Udp(UdpSocket {
        number,
        family,
        protocol,
        local: address::local(fd).filter(address::is_some),
        peer: address::peer(fd),
        shutdown: shutdown(fd),
        queue: queue.into_iter().flatten().collect(),
        settings,
    })))
}

/// Whether memory of the socket is in use for sending, and stays so: of a running program, which may send all
/// the time, the same amount of it.
fn sending(fd: &OwnedFd, live: bool) -> bool {
    let mut first = None;
    for moment in 0..MOMENTS {
        let mut bytes = 0i32;
        // SAFETY: TIOCOUTQ, which is SIOCOUTQ, fills an int.
        let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if asked != 0 || bytes == 0 || live && *first.get_or_insert(bytes) != bytes {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1 << moment));
    }
    true
}

/// Which directions are shut down: poll(2) tells, without a list of all sockets (net/ipv4/udp.c, `udp_poll`).
fn shutdown(fd: &OwnedFd) -> u8 {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    match poll.revents & (libc::POLLRDHUP | libc::POLLHUP) {
        0 => 0,
        both if both & libc::POLLHUP != 0 => 3,
        _ => 1,
    }
}

/// One datagram, or several that the kernel had put together; `None` for one that cannot be put back.
fn datagram(peeked: Peeked) -> Option<Vec<Datagram>> {
    let Peeked { source: Some(source), destination, ttl, tos, segment, data } = peeked else { return None };
    // It would come back with the loopback interface as its scope.
    let is_local = matches!(source, std::net::SocketAddr::V6(v6) if v6.ip().is_unicast_link_local());
    let one = |data: &[u8]| Datagram { source, destination, ttl, tos, data: Bytes::from(data) };
    let all = match segment {
        Some(size) if size > 0 && !data.is_empty() => data.chunks(size).map(one).collect(),
        _ => vec![one(&data)],
    };
    let fits = all.iter().all(|d: &Datagram| d.data.len() <= MOST_DATA);
    (fits && !is_local).then_some(all)
}
