//! netlink(7)

use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::netlink::NetlinkSocket;
use torpor_image::socket::SocketOption;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::socket;

/// linux/netlink.h
const SOL_NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;

pub(crate) fn open(what: &str, netlink: &NetlinkSocket) -> Result<OwnedFd> {
    let kind = netlink.kind | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only.
    let fd = owned(what, "socket", unsafe { libc::socket(libc::AF_NETLINK, kind, netlink.protocol) })?;
    let (locks, options): (Vec<SocketOption>, Vec<_>) =
        netlink.options.iter().cloned().partition(socket::is_filter_lock);
    socket::set(what, &fd, &options)?;
    if let Some(filter) = &netlink.filter {
        socket::attach_filter(what, &fd, filter)?;
    }
    socket::set(what, &fd, &locks)?;
    if let Some(port) = netlink.port {
        call(&fd, libc::bind, port, 0).map_err(|errno| match errno {
            Errno::EADDRINUSE => Error::Conflict {
                what: what.to_owned(),
                why: format!("bind: {errno}: another socket has port id {port} (see /proc/net/netlink)"),
                remedy: "stop the program that holds it".into(),
            },
            errno => Error::Open { what: what.to_owned(), call: "bind", errno },
        })?;
    }
    for group in &netlink.groups {
        if !socket::set_int(&fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, *group as i32) {
            return Err(match Errno::last() {
                errno @ (Errno::EPERM | Errno::EACCES) => Error::Permission {
                    what: format!("{what}: group {group}"),
                    call: "setsockopt(NETLINK_ADD_MEMBERSHIP)",
                    errno,
                    remedy: "run torpor with CAP_NET_ADMIN",
                },
                // Generic netlink numbers its groups as its families come.
                Errno::EINVAL => Error::Unfit {
                    what: what.to_owned(),
                    why: format!("this kernel has no group {group} of netlink protocol {}", netlink.protocol),
                    remedy: "load the kernel modules that were there".into(),
                },
                errno => {
                    Error::Open { what: what.to_owned(), call: "setsockopt(NETLINK_ADD_MEMBERSHIP)", errno }
                }
            });
        }
    }
    if let Some((port, groups)) = netlink.peer {
        call(&fd, libc::connect, port, groups).map_err(Error::open(what, "connect"))?;
    }
    Ok(fd)
}

fn call(
    fd: &OwnedFd,
    call: unsafe extern "C" fn(i32, *const libc::sockaddr, libc::socklen_t) -> i32,
    port: u32,
    groups: u32,
) -> Result<(), Errno> {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_pid = port;
    address.nl_groups = groups;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address with its length.
    Errno::result(unsafe { call(fd.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}
