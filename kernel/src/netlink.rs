//! /proc/net/netlink: netlink sockets of our network namespace (net/netlink/af_netlink.c, `netlink_native_seq_show`).

use crate::text::{lines, number, read, words};
use crate::{Error, Result};

/// A netlink socket.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Socket {
    /// Its inode.
    pub inode: u32,
    /// `NETLINK_*`
    pub protocol: i32,
    /// The port id it is bound to.
    pub port: u32,
    /// Memory of what waits to be received.
    pub waiting: u32,
    /// A listing that it asked for is not through yet.
    pub dumping: bool,
}

/// All of them.
pub fn sockets() -> Result<Vec<Socket>> {
    parse(&read("/proc/net/netlink")?)
}

/// `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`
fn parse(text: &[u8]) -> Result<Vec<Socket>> {
    lines(text)
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| socket(line).ok_or_else(|| Error::parse("/proc/net/netlink", line)))
        .collect()
}

fn socket(line: &[u8]) -> Option<Socket> {
    let words: Vec<&[u8]> = words(line).collect();
    let at = |n: usize| words.get(n).copied();
    Some(Socket {
        inode: number(at(9)?)?,
        protocol: number(at(1)?)?,
        // Printed with %-10u, as a negative number by old kernels.
        port: number::<i64>(at(2)?)? as u32,
        waiting: number(at(4)?)?,
        dumping: number::<u32>(at(6)?)? != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let text =
            b"sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
            00000000786d5ccc 0   4242       00000011 768      0        1     2        0        4711    \n";
        let socket = Socket { inode: 4711, protocol: 0, port: 4242, waiting: 768, dumping: true };
        assert_eq!(parse(text).unwrap(), [socket]);
        assert!(parse(b"head\n0 0 0\n").is_err());
        assert!(parse(b"head\n0 0 x 0 0 0 0 0 0 0\n").is_err());
    }

    #[test]
    fn this_machine() {
        // The kernel has sockets of its own.
        assert!(sockets().unwrap().iter().any(|s| s.port == 0));
    }
}
