//! epoll(7), from fdinfo.
//!
//! A set holds open file descriptions under the numbers they were added by; the number may be closed or
//! mean another description since. `kcmp(KCMP_EPOLL_TFD)` tells which descriptor it really is.

use torpor_image::DescriptionId;
use torpor_image::description::Kind;
use torpor_image::epoll::{Epoll, EpollTarget};
use torpor_kernel::fdinfo::{self, Detail};
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;

use crate::collect::Collector;
use crate::description::Found;

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

/// The targets of the set behind `found`, among all `known` descriptors of the tree: process, number,
/// description.
pub(crate) fn targets(
    collector: &mut Collector,
    found: &Found,
    known: &[(Pid, i32, DescriptionId)],
) -> Epoll {
    let Detail::Epoll(entries) = &found.info.detail else { return Epoll { targets: Vec::new() } };
    let mut targets = Vec::with_capacity(entries.len());
    for (i, entry) in entries.iter().enumerate() {
        let offset = entries[..i].iter().filter(|e| e.fd == entry.fd).count() as u32;
        let slot = Slot { epoll: found.fd as u32, target: entry.fd as u32, offset };
        let is = |&&(pid, fd, _): &&(Pid, i32, DescriptionId)| is_target(pid, fd, found.pid, &slot);
        // The number it was added by, in the same process, is nearly always right.
        let same = known.iter().filter(|k| k.0 == found.pid && k.1 == entry.fd);
        let near = known.iter().filter(|k| k.0 == found.pid && k.1 != entry.fd);
        let far = known.iter().filter(|k| k.0 != found.pid);
        match same.chain(near).chain(far).find(is) {
            Some(&(_, _, description)) => {
                targets.push(EpollTarget {
                    fd: entry.fd,
                    description,
                    events: entry.events,
                    data: entry.data,
                });
            }
            // A refused target is named by its own refusal.
            None if collector.refusals.is_empty() && (!collector.live || lasts(collector, found, &slot)) => {
                collector.refuse(
                    found.title(),
                    format!(
                        "it watches what fd {} once was, which no process of the dump has open any more",
                        entry.fd
                    ),
                    "remove it from the set (EPOLL_CTL_DEL) before the dump",
                )
            }
            None => {}
        }
    }
    Epoll { targets }
}

/// Whether a set of a running process still has an entry that no descriptor leads to: it may have been made, or taken
/// away, since the descriptors were listed.
fn lasts(collector: &Collector, found: &Found, slot: &Slot) -> bool {
    std::thread::sleep(std::time::Duration::from_millis(5));
    let there = fdinfo::fdinfo(found.pid, found.fd).is_ok_and(|info| match info.detail {
        Detail::Epoll(all) => {
            all.iter().filter(|e| e.fd as u32 == slot.target).count() > slot.offset as usize
        }
        _ => false,
    });
    let leads = |pid: &i32| {
        fds::list(Pid(*pid))
            .unwrap_or_default()
            .into_iter()
            .any(|fd| is_target(Pid(*pid), fd, found.pid, slot))
    };
    there && !collector.members.iter().any(leads)
}

/// Whether a descriptor is what the slot of a set is about.
fn is_target(pid: Pid, fd: i32, owner: Pid, slot: &Slot) -> bool {
    let slot: *const Slot = slot;
    // SAFETY: KCMP_EPOLL_TFD reads a `struct kcmp_epoll_slot` at its last argument.
    unsafe { libc::syscall(libc::SYS_kcmp, pid.0, owner.0, KCMP_EPOLL_TFD, fd as u64, slot) == 0 }
}
