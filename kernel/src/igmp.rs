//! /proc/net/igmp and igmp6: multicast groups by interface.
//!
//! Which socket has joined which group is listed nowhere. But a socket answers for a group that it is asked about
//! (`MCAST_MSFILTER`), and these lists name all groups there are (net/ipv4/igmp.c, net/ipv6/mcast.c).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::text::{hex, lines, number, read, words};
use crate::{Error, Result};

/// A group that an interface listens to.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct Group {
    /// The interface.
    pub interface: u32,
    /// The group.
    pub address: IpAddr,
}

/// Groups of all interfaces of our network namespace.
pub fn groups() -> Result<Vec<Group>> {
    let mut all = parse_v4(&read("/proc/net/igmp")?)?;
    // Not there without IPv6.
    if let Ok(text) = read("/proc/net/igmp6") {
        all.extend(parse_v6(&text)?);
    }
    Ok(all)
}

/// A line for each interface, indented ones for its groups: `\t\t\t\t010000E0     1 0:00000000\t\t0`. The address is
/// the word in network order, printed as a number of this machine.
fn parse_v4(text: &[u8]) -> Result<Vec<Group>> {
    let mut all = Vec::new();
    let mut interface = None;
    for line in lines(text).skip(1).filter(|line| !line.is_empty()) {
        let bad = || Error::parse("/proc/net/igmp", line);
        let first = words(line).next().ok_or_else(bad)?;
        if line.starts_with(b"\t") {
            let address = hex(first).and_then(|a| u32::try_from(a).ok()).ok_or_else(bad)?;
            all.push(Group {
                interface: interface.ok_or_else(bad)?,
                address: IpAddr::V4(Ipv4Addr::from(address.to_ne_bytes())),
            });
        } else {
            interface = Some(number(first).ok_or_else(bad)?);
        }
    }
    Ok(all)
}

/// `1    lo              ff020000000000000000000000000001     1 0000000C 0`
fn parse_v6(text: &[u8]) -> Result<Vec<Group>> {
    lines(text)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let mut words = words(line);
            let interface = words.next().and_then(number);
            let digits = words.nth(1).filter(|d| d.len() == 32);
            let address = digits.and_then(|d| {
                let half = |d: &[u8]| hex(d).map(u128::from);
                Some(half(&d[..16])? << 64 | half(&d[16..])?)
            });
            let (Some(interface), Some(address)) = (interface, address) else {
                return Err(Error::parse("/proc/net/igmp6", line));
            };
            Ok(Group { interface, address: IpAddr::V6(Ipv6Addr::from(address)) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let text = b"Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t1\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let all = parse_v4(text).unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(all[1], Group { interface: 2, address: "224.0.0.251".parse().unwrap() });
        }
        assert_eq!(all.iter().map(|g| g.interface).collect::<Vec<_>>(), [1, 2, 2]);
        let text = b"1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse_v6(text).unwrap(), [Group { interface: 1, address: "ff02::1".parse().unwrap() }]);
    }

    #[test]
    fn odd_lists_are_errors() {
        assert!(parse_v4(b"head\n\t\t\t\t010000E0     1\n").is_err());
        assert!(parse_v4(b"head\nx\tlo\n").is_err());
        assert!(parse_v6(b"1 lo ff02\n").is_err());
        assert!(parse_v6(b"1 lo\n").is_err());
        assert_eq!(parse_v4(b"").unwrap(), []);
    }

    #[test]
    fn this_machine() {
        match groups() {
            Ok(all) => assert!(all.iter().all(|g| g.interface > 0 && g.address.is_multicast())),
            Err(e) => eprintln!("skipped: {e}"),
        }
    }
}
