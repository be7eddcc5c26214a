//! epoll(7), from fdinfo.
//!
//! A set holds open file descriptions under the numbers they were added by; the number may be closed or
//! mean another description since. `kcmp(KCMP_EPOLL_TFD)` tells which descriptor it really is.

use torpor_image::description::Kind;
use torpor_image::epoll::{Epoll, EpollTarget};
use torpor_kernel::fdinfo::Detail;

use crate::collect::Collector;
use crate::description::{Found, Table};
use crate::error::Result;

/// linux/kcmp.h
const KCMP_EPOLL_TFD: i32 = 7;

/// `struct kcmp_epoll_slot`
#[repr(C)]
struct Slot {
    epoll: u32,
    target: u32,
    offset: u32,
}

/// An epoll set whose targets are not known yet.
pub(crate) fn collect() -> Kind {
    Kind::Epoll(Epoll { targets: Vec::new() })
}

/// The targets of the set behind `found`.
pub(crate) fn targets(collector: &mut Collector, found: &Found, table: &Table) -> Result<Epoll> {
    let Detail::Epoll(entries) = &found.info.detail else { return Ok(Epoll { targets: Vec::new() }) };
    let mut targets = Vec::with_capacity(entries.len());
    for (i, entry) in entries.iter().enumerate() {
        let offset = entries[..i].iter().filter(|e| e.fd == entry.fd).count() as u32;
        let slot = Slot { epoll: found.fd as u32, target: entry.fd as u32, offset };
        let is = |fd: i32| {
            // SAFETY: KCMP_EPOLL_TFD reads a `struct kcmp_epoll_slot` at its last argument.
            let got = unsafe {
                libc::syscall(
                    libc::SYS_kcmp,
                    collector.pid.0,
                    collector.pid.0,
                    KCMP_EPOLL_TFD,
                    fd as u64,
                    &raw const slot,
                )
            };
            got == 0
        };
        // The number it was added by is nearly always right; try it first.
        let same = table.descriptors.iter().filter(|d| d.fd == entry.fd);
        let others = table.descriptors.iter().filter(|d| d.fd != entry.fd);
        match same.chain(others).find(|d| is(d.fd)) {
            Some(d) => targets.push(EpollTarget {
                fd: entry.fd,
                description: d.description,
                events: entry.events,
                data: entry.data,
            }),
            // A refused target is named by its own refusal.
            None if collector.refusals.is_empty() => collector.refuse(
                found.title(),
                format!("it watches what fd {} once was, which this process has closed", entry.fd),
                "remove it from the set (EPOLL_CTL_DEL) before the dump",
            ),
            None => {}
        }
    }
    Ok(Epoll { targets })
}
