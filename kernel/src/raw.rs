//! /proc/net/raw and raw6: raw sockets of our network namespace (net/ipv4/raw.c, `raw_sock_seq_show`).
//!
//! Connected without a port, as they are, they have no peer for getpeername(2), and `raw_diag` is not built into
//! every kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::text::{hex, lines, number, read, words};
use crate::{Error, Result};

/// A raw socket.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Socket {
    /// Its inode.
    pub inode: u32,
    /// The address it is connected to.
    pub peer: Option<IpAddr>,
}

/// Connected, as of TCP (net/tcp_states.h).
const ESTABLISHED: u64 = 1;

/// All of them.
pub fn sockets() -> Result<Vec<Socket>> {
    let mut all = parse(&read("/proc/net/raw")?)?;
    // Not there without IPv6.
    if let Ok(text) = read("/proc/net/raw6") {
        all.extend(parse(&text)?);
    }
    Ok(all)
}

/// `sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode ...`
fn parse(text: &[u8]) -> Result<Vec<Socket>> {
    lines(text)
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| socket(line).ok_or_else(|| Error::parse("/proc/net/raw", line)))
        .collect()
}

fn socket(line: &[u8]) -> Option<Socket> {
    let words: Vec<&[u8]> = words(line).collect();
    let at = |n: usize| words.get(n).copied();
    let peer = address(at(2)?.split(|b| *b == b':').next()?)?;
    let connected = hex(at(3)?)? == ESTABLISHED;
    Some(Socket { inode: number(at(9)?)?, peer: connected.then_some(peer) })
}

/// Words in network order, each printed as a number of this machine.
fn address(digits: &[u8]) -> Option<IpAddr> {
    let word = |d: &[u8]| hex(d).and_then(|w| u32::try_from(w).ok()).map(u32::to_ne_bytes);
    match digits.len() {
        8 => Some(Ipv4Addr::from(word(digits)?).into()),
        32 => {
            let words = digits.chunks(8).map(word).collect::<Option<Vec<_>>>()?.concat();
            Some(Ipv6Addr::from(*words.first_chunk::<16>()?).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let text = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n  \
            74: 0100007F:00FD 0900007F:0000 01 00000000:00000000 00:00000000 00000000     0        0 73039 2 00000000d2ad87e8 0\n  \
            75: 00000000:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 73040 2 00000000d2ad87e8 0\n";
        let all = parse(text).unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(all[0], Socket { inode: 73039, peer: Some("127.0.0.9".parse().unwrap()) });
        }
        assert_eq!(all[1], Socket { inode: 73040, peer: None });
        let one = 1u32.to_be().to_be_bytes().map(|b| format!("{b:02X}")).concat();
        let v6 = format!("{}{one}", "0".repeat(24));
        assert_eq!(v6.len(), 32);
        assert!(address(v6.as_bytes()).is_some_and(|a| a.is_ipv6()));
        assert!(parse(b"head\n 1: 0:0 0:0 7\n").is_err());
        assert!(address(b"0100007").is_none());
    }

    #[test]
    fn this_machine() {
        sockets().unwrap();
    }
}
