//! Looking at datagrams that wait to be received, all of them, without taking any away.
//!
//! `SO_PEEK_OFF` makes peeking walk over the queue (socket(7); net/core/datagram.c, `__skb_try_recv_from_queue`).
//! It is a mark of the socket, which the program shares with us: one that peeks itself would notice. Should we
//! be killed in between, a process of our own, which shares our memory and outlives us, puts the mark back.
//! An empty datagram is shown to one such walk only: the kernel notes that it was, to get past it.

use std::mem::zeroed;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use crate::address;
use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::mark::Mark;

/// linux/udp.h: length of the parts that the kernel put together.
const UDP_GRO: i32 = 104;
/// No datagram of IP is larger.
const LARGEST: usize = 1 << 16;
/// More than any queue holds: each takes some hundred bytes of a buffer whose size is an int.
const MOST: usize = 1 << 22;

/// A datagram that waits.
pub(crate) struct Peeked {
    pub(crate) source: Option<SocketAddr>,
    pub(crate) destination: Option<IpAddr>,
    pub(crate) ttl: Option<u8>,
    pub(crate) tos: Option<u8>,
    /// Length of the parts that it was put together from.
    pub(crate) segment: Option<usize>,
    pub(crate) data: Vec<u8>,
}

/// All that waits in a socket, first come first.
pub(crate) fn datagrams(collector: &Collector, found: &Found, fd: &OwnedFd) -> Result<Vec<Peeked>> {
    let fail = |call, errno| {
        Error::kernel(collector.pid, format!("reading {}", found.title()))(torpor_kernel::Error::syscall(
            call, found.fd, errno,
        ))
    };
    let _mark = Mark::set(fd).map_err(|e| fail("setsockopt(SO_PEEK_OFF)", e))?;
    let mut all = Vec::new();
    let mut buffer = vec![0u8; LARGEST];
    while all.len() < MOST {
        match one(fd, &mut buffer) {
            Ok(Some(peeked)) => all.push(peeked),
            Ok(None) | Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(fail("recvmsg", errno)),
        }
    }
    Ok(all)
}

fn one(fd: &OwnedFd, buffer: &mut [u8]) -> Result<Option<Peeked>, Errno> {
    let mut control = [0u64; 128];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero structures of integers and null pointers.
    let (mut message, mut name): (libc::msghdr, libc::sockaddr_storage) = unsafe { (zeroed(), zeroed()) };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = size_of_val(&name) as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message names buffers of ours with their lengths.
    let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    let got = Errno::result(got)? as usize;
    // A socket that is shut down reads as nothing from nobody.
    if message.msg_namelen == 0 {
        return Ok(None);
    }
    let mut peeked = Peeked {
        source: address::from_raw(&name, message.msg_namelen),
        destination: None,
        ttl: None,
        tos: None,
        segment: None,
        data: buffer[..got].to_vec(),
    };
    // SAFETY: the kernel filled the control buffer; CMSG_* walk it within its length, and each kind has the
    // bytes that its type says.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            let length = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let int = || (length >= 4).then(|| data.cast::<i32>().read_unaligned());
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let ip = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                    peeked.destination = Some(ip.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    peeked.destination = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                    peeked.ttl = int().and_then(|v| v.try_into().ok());
                }
                // The one of IPv4 has one byte.
                (libc::IPPROTO_IP, libc::IP_TOS) => peeked.tos = Some(data.read()),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    peeked.tos = int().and_then(|v| v.try_into().ok());
                }
                (libc::SOL_UDP, UDP_GRO) => peeked.segment = int().and_then(|v| v.try_into().ok()),
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(Some(peeked))
}
