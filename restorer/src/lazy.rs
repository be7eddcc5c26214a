//! Memory that comes when it is needed: the tree runs at once, and its memory is served through userfaultfd(2).
//!
//! What can wait are pages of private anonymous areas that have contents. What cannot is filled before the first
//! instruction as in any restore: changed pages of private mappings of files (userfaultfd serves anonymous memory and
//! shmem only), shared memory, pages shared copy-on-write with relatives (who would get copies of their own), locked
//! areas (their pages must be there), stacks that grow, and small areas, which are not worth a fault.
//!
//! An area is registered whole or not at all: the flag is the area's, and areas that differ in it are not one to
//! mremap(2). So are areas that touch one: what mprotect(2) has made two of may become one again. Each task makes its
//! descriptor itself, as it is bound to the memory of who makes it; it is taken from there, and gone from the task when
//! its own descriptors are in place.

mod guard;
mod pending;
mod serve;

use torpor_image::Image;
use torpor_image::extent::{Record, Where};
use torpor_image::task::Task;
use torpor_image::vma::{Lock, Mapping, Vma};
use torpor_parasite::call;
use torpor_parasite::script::{OpId, Script};

use nix::errno::Errno;
use torpor_kernel::uffd::Userfaultfd;

use crate::error::{Error, Result};
use crate::vma::Begin;

pub use serve::Serving;
pub(crate) use serve::Task as Served;

/// Areas with less than this are filled at once.
const WORTH: u64 = 64 << 10;
/// Above the stack pointer of each thread this much is filled at once.
const STACK: u64 = 16 << 10;

/// How memory is to come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lazy {
    /// What to fill first, in this order.
    pub first: Vec<Touched>,
    /// Notes which memory is needed first, and leaves the rest until the tree needs nothing for a while.
    pub record: bool,
}

/// Memory that a task needed: a range of addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// The task, by its pid.
    pub pid: i32,
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// What of a task's memory comes later.
#[derive(Clone, Debug)]
pub(crate) struct Deferred {
    /// The call, in the script of its memory, that makes its descriptor.
    pub(crate) made: OpId,
    /// The areas to be registered.
    pub(crate) areas: Vec<(u64, u64)>,
    /// What is to come.
    pub(crate) records: Vec<Record>,
}

/// What of these areas of a task can wait; nothing if nothing is worth it.
pub(crate) fn records(image: &Image, task: &Task, areas: &[&Vma], begin: Begin<'_>) -> Vec<Record> {
    let touched = touched(task);
    let mut all = Vec::new();
    for vma in areas.iter().filter(|v| may_wait(v) && begin.kept(v).is_none()) {
        let records = image.records(task.memory.pages);
        let first = records.partition_point(|r| r.address + r.length <= vma.start);
        let inside = records[first..].iter().take_while(|r| r.address < vma.end);
        let own = inside.filter(|r| r.place == Where::Data).map(|r| cut(r, vma.start, vma.end));
        let mut own: Vec<Record> = own.collect();
        if own.iter().map(|r| r.length).sum::<u64>() <= WORTH {
            continue;
        }
        for &(start, end) in touched.iter().filter(|(s, e)| *s < vma.end && *e > vma.start) {
            own = own.iter().flat_map(|r| without(r, start, end)).collect();
        }
        all.extend(own);
    }
    all
}

/// What is left of `record` when these records, in the order of addresses, wait.
pub(crate) fn rest(record: Record, waiting: &[Record]) -> Vec<Record> {
    let end = record.address + record.length;
    let mut all = Vec::new();
    let mut at = record.address;
    let first = waiting.partition_point(|w| w.address + w.length <= at);
    for later in waiting[first..].iter().take_while(|w| w.address < end) {
        if later.address > at {
            all.push(cut(&record, at, later.address));
        }
        at = at.max(later.address + later.length);
    }
    if at < end {
        all.push(cut(&record, at, end));
    }
    all
}

/// Plans the descriptor by which what waits will be served.
pub(crate) fn plan(script: &mut Script, task: &Task, records: Vec<Record>) -> Option<Deferred> {
    if records.is_empty() {
        return None;
    }
    let made = call!(script, "a userfaultfd", libc::SYS_userfaultfd, Userfaultfd::FLAGS);
    let areas = task.memory.vmas.iter().filter(|v| may_wait(v));
    let areas: Vec<(u64, u64)> = areas.map(|v| (v.start, v.end)).collect();
    Some(Deferred { made, areas: registered(&areas, &records), records })
}

/// The areas that hold records, and those that touch them, one behind the other.
fn registered(areas: &[(u64, u64)], records: &[Record]) -> Vec<(u64, u64)> {
    let holds = |&(start, end): &(u64, u64)| {
        let first = records.partition_point(|r| r.address + r.length <= start);
        records.get(first).is_some_and(|r| r.address < end)
    };
    areas.chunk_by(|a, b| a.1 == b.0).filter(|all| all.iter().any(holds)).flatten().copied().collect()
}

/// Whether this machine lets us serve memory of others; why not, if not.
pub fn possible() -> Result<()> {
    let what = || "memory lazily".to_owned();
    let tried = Userfaultfd::new().and_then(|uffd| uffd.handshake());
    tried.map_err(|e| match e.errno() {
        Some(errno @ (Errno::EPERM | Errno::EACCES)) => Error::Permission {
            what: what(),
            call: "userfaultfd",
            errno,
            remedy: "run torpor with CAP_SYS_PTRACE, or without --lazy",
        },
        Some(Errno::ENOSYS | Errno::EINVAL) => Error::Unfit {
            what: what(),
            why: "this kernel's userfaultfd is missing or too old".into(),
            remedy: "restore without --lazy".into(),
        },
        _ => Error::Kernel { what: what(), source: e },
    })
}

/// Whether an area is one whose pages userfaultfd serves and need not be there at once.
fn may_wait(vma: &Vma) -> bool {
    matches!(vma.mapping, Mapping::Anonymous { .. }) && !vma.grows_down && vma.locked == Lock::No
}

/// What the threads need with their first instructions, or the kernel on behalf of them.
fn touched(task: &Task) -> Vec<(u64, u64)> {
    let page = |at: u64| at & !4095;
    let mut all = Vec::new();
    for thread in &task.threads {
        let sp = thread.registers.sp();
        all.push((page(sp).saturating_sub(4096), page(sp).saturating_add(STACK)));
        let rseq = thread.rseq.map_or(0, |r| r.address);
        for at in [rseq, thread.robust_list.0, thread.clear_child_tid] {
            if at != 0 {
                all.push((page(at), page(at).saturating_add(4096)));
            }
        }
    }
    all
}

fn cut(record: &Record, start: u64, end: u64) -> Record {
    let (from, to) = (record.address.max(start), (record.address + record.length).min(end));
    let offset = record.offset.wrapping_add(from - record.address);
    Record { address: from, length: to.saturating_sub(from), offset, ..*record }
}

fn without(record: &Record, start: u64, end: u64) -> Vec<Record> {
    let hole = Record { address: start, length: end - start, ..*record };
    rest(*record, &[hole])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_that_touch_are_registered_together() {
        let areas = [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x5000), (0x6000, 0x7000)];
        let records = [Record { address: 0x3000, length: 0x1000, place: Where::Data, file: 0, offset: 0 }];
        assert_eq!(registered(&areas, &records), areas[..3]);
        assert_eq!(registered(&areas, &[]), []);
    }

    #[test]
    fn what_waits_is_left_out() {
        let record =
            |address, length, offset| Record { address, length, place: Where::Data, file: 1, offset };
        let all = record(0x1000, 0x9000, 0x7000);
        let waiting = [record(0, 0x2000, 0), record(0x4000, 0x1000, 0), record(0x6000, 0x1000, 0)];
        let expected =
            [record(0x2000, 0x2000, 0x8000), record(0x5000, 0x1000, 0xb000), record(0x7000, 0x3000, 0xd000)];
        assert_eq!(rest(all, &waiting), expected);
        assert_eq!(rest(all, &[]), [all]);
        assert!(rest(all, &[record(0x1000, 0x9000, 0)]).is_empty());
        assert_eq!(without(&all, 0x1000, 0x3000), [record(0x3000, 0x7000, 0x9000)]);
    }
}
