//! Planning how contents get into memory: by reads of the task itself from the data files.
//!
//! A page fault costs more than the copy (research/fast.md), so faults are avoided: where a huge page fits
//! whole, one touch and `MADV_COLLAPSE` make it at once, without changing the area's flags; runs of small pages are
//! populated in one call before they are read, half a MiB at a time, which is still in the cache then. Each call of `MADV_COLLAPSE` waits until every processor
//! has emptied its lists of new pages (mm/khugepaged.c, `lru_add_drain_all`), which takes long on a busy machine, so
//! it is made for many huge pages at once.

use torpor_image::Image;
use torpor_image::extent::{Record, Where};
use torpor_image::task::Task;
use torpor_image::vma::{Mapping, Vma};
use torpor_parasite::call;
use torpor_parasite::script::Script;

use crate::feed::Range;
use crate::plan::{Open, Planner};
use crate::vma::{Begin, Early};
use crate::{crew, lazy};

const HUGE: u64 = 2 << 20;
/// Memory that is made of huge pages by one call, while what was made by the one before is read.
const COLLAPSED: u64 = 64 << 20;
/// Processes with less that could be of huge pages are as well off without: for each call all processors are waited for.
const ENOUGH: u64 = 16 << 20;
/// Below this a population call costs more than the faults it saves.
const POPULATE: u64 = 64 << 10;
/// Small pages that are made by one call and then read: they are in the processor's cache by then.
const POPULATED: u64 = 512 << 10;
/// asm-generic/mman-common.h
const MADV_POPULATE_WRITE: i32 = 23;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

/// Plans the contents of private `areas` of a task, as far as it does not begin with them and they do not wait.
pub(crate) fn fill(
    script: &mut Script,
    planner: &mut Planner<'_>,
    task: &Task,
    areas: &[&Vma],
    begin: Begin<'_>,
    waiting: &[Record],
) {
    let image = planner.image;
    let mut work = Vec::new();
    let collapses = collapses(image, task);
    if let Begin::With(parent, _) = begin {
        for vma in areas.iter().filter(|v| v.private() && begin.kept(v).is_some()) {
            change(script, planner, task, vma, &changes(image, task, parent, vma));
        }
    }
    for record in image.records(task.memory.pages) {
        let (mut at, end) = (record.address, record.address + record.length);
        let first = areas.partition_point(|v| v.end <= at);
        for vma in &areas[first..] {
            at = at.max(vma.start);
            if at >= end {
                break;
            }
            let stop = end.min(vma.end);
            if begin.kept(vma).is_some() {
                at = stop;
                continue;
            }
            let offset = record.offset.wrapping_add(at - record.address);
            let part = Record { address: at, length: stop - at, offset, ..*record };
            let huge = collapses && takes_huge_pages(vma);
            match record.place {
                // Anonymous memory is zero; a private mapping of a file is not.
                Where::Zero if matches!(vma.mapping, Mapping::Private { .. }) => zero(script, planner, part),
                Where::Zero => {}
                Where::Data => {
                    work.extend(lazy::rest(part, waiting).iter().flat_map(|r| pieces(r, 0, huge)));
                }
                Where::Guard => {
                    let purpose = format!("guard pages at {at:x}");
                    call!(script, purpose, libc::SYS_madvise, at, part.length, MADV_GUARD_INSTALL);
                }
            }
            at = stop;
        }
    }
    crew::read(script, planner, task, work);
}

/// What must be done to a part of an area that a task keeps from its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Read what the image has for it.
    Fill(Record),
    /// Forget what the parent has there.
    Drop { start: u64, end: u64 },
    /// Make guard pages of it.
    Guard { start: u64, end: u64 },
    /// Make ordinary pages of guard pages.
    Unguard { start: u64, end: u64 },
}

impl Change {
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Change::Fill(_))
    }
}

/// How a private area of a task differs from the same area of its parent. Parts that both have from the same
/// place of the image were shared copy-on-write, and stay so.
pub(crate) fn changes(image: &Image, task: &Task, parent: &Task, vma: &Vma) -> Vec<Change> {
    let (own, its) = (parts(image, task, vma), parts(image, parent, vma));
    let mut edges: Vec<u64> =
        own.iter().chain(&its).flat_map(|r| [r.address, r.address + r.length]).collect();
    edges.sort_unstable();
    edges.dedup();
    let find = |records: &[Record], at: u64| {
        let i = records.partition_point(|r| r.address + r.length <= at);
        records.get(i).filter(|r| r.address <= at).map(|r| Record {
            address: at,
            length: r.length - (at - r.address),
            offset: if r.place == Where::Data { r.offset + (at - r.address) } else { 0 },
            ..*r
        })
    };
    let mut all: Vec<Change> = Vec::new();
    for edge in edges.windows(2) {
        let (start, end) = (edge[0], edge[1]);
        let cut = |r: Record| Record { length: end - start, ..r };
        let (mine, theirs) = (find(&own, start).map(cut), find(&its, start).map(cut));
        if mine == theirs {
            continue;
        }
        let place = |r: Option<Record>| r.map(|r| r.place);
        if place(theirs) == Some(Where::Guard) && place(mine) != Some(Where::Guard) {
            all.push(Change::Unguard { start, end });
        }
        let file = matches!(vma.mapping, Mapping::Private { .. });
        match mine {
            Some(r) if r.place == Where::Guard => all.push(Change::Guard { start, end }),
            // Anonymous memory is zero where nobody has touched it.
            Some(r) if r.place == Where::Data || file => match all.last_mut() {
                Some(Change::Fill(last))
                    if r.place == Where::Data
                        && last.place == Where::Data
                        && last.address + last.length == r.address
                        && (last.file, last.offset + last.length) == (r.file, r.offset) =>
                {
                    last.length += r.length;
                }
                _ => all.push(Change::Fill(r)),
            },
            _ if matches!(place(theirs), Some(Where::Data | Where::Zero)) => {
                all.push(Change::Drop { start, end });
            }
            _ => {}
        }
    }
    all
}

/// Records of a task within an area.
fn parts(image: &Image, task: &Task, vma: &Vma) -> Vec<Record> {
    let records = image.records(task.memory.pages);
    let first = records.partition_point(|r| r.address + r.length <= vma.start);
    let inside = records[first..].iter().take_while(|r| r.address < vma.end);
    inside
        .map(|r| {
            let address = r.address.max(vma.start);
            let length = (r.address + r.length).min(vma.end) - address;
            let offset = if r.place == Where::Data { r.offset + (address - r.address) } else { 0 };
            Record { address, length, offset, ..*r }
        })
        .collect()
}

fn change(script: &mut Script, planner: &mut Planner<'_>, task: &Task, vma: &Vma, changes: &[Change]) {
    let huge = collapses(planner.image, task) && takes_huge_pages(vma);
    let advise = |script: &mut Script, start: u64, end: u64, advice: i32| {
        let purpose = format!("memory {start:x}-{end:x} that its parent has");
        call!(script, purpose, libc::SYS_madvise, start, end - start, advice);
    };
    for change in changes {
        match *change {
            Change::Fill(record) if record.place == Where::Zero => zero(script, planner, record),
            Change::Fill(record) => {
                // A page that is there would be copied to be overwritten.
                if record.length >= POPULATE {
                    advise(script, record.address, record.address + record.length, libc::MADV_DONTNEED);
                }
                read(script, planner, &[record], 0, huge);
            }
            Change::Drop { start, end } => advise(script, start, end, libc::MADV_DONTNEED),
            Change::Guard { start, end } => advise(script, start, end, MADV_GUARD_INSTALL),
            Change::Unguard { start, end } => advise(script, start, end, MADV_GUARD_REMOVE),
        }
    }
}

/// Whether a task has pages in common with its parent: it begins with the parent's memory then.
pub(crate) fn inherits(image: &Image, index: usize) -> bool {
    let task = &image.tasks[index];
    let Some(parent) = image.tasks[..index].iter().find(|t| t.pid == task.ppid) else { return false };
    if task.shares.memory.is_some() || parent.shares.memory.is_some() {
        return false;
    }
    !in_common(image, task, parent).is_empty()
}

/// The records of a task that begin with a page which another has at the same address from the same place of the image:
/// pages that were shared copy-on-write.
fn in_common<'a>(image: &'a Image, task: &Task, other: &Task) -> Vec<&'a Record> {
    let its = image.records(other.memory.pages);
    let both = |r: &&Record| {
        let i = its.partition_point(|p| p.address + p.length <= r.address);
        its[i..].iter().take_while(|p| p.address < r.address + r.length).any(|p| {
            let at = r.address.max(p.address);
            p.place == Where::Data
                && (p.file, p.offset + (at - p.address)) == (r.file, r.offset + (at - r.address))
        })
    };
    image.records(task.memory.pages).iter().filter(|r| r.place == Where::Data).filter(both).collect()
}

/// The areas that a task must have when it makes `children`, which begin with its memory: what it begins with itself,
/// what has no contents, and what holds pages that it has in common with one of them.
pub(crate) fn early(image: &Image, task: &Task, begin: Begin<'_>, children: &[&Task]) -> Early {
    let mut all: Early = task
        .memory
        .vmas
        .iter()
        .filter(|v| !v.private() || begin.kept(v).is_some() || parts(image, task, v).is_empty())
        .map(|v| v.start)
        .collect();
    for child in children {
        for record in in_common(image, child, task) {
            let first = task.memory.vmas.partition_point(|v| v.end <= record.address);
            let areas = task.memory.vmas[first..].iter();
            all.extend(areas.take_while(|v| v.start < record.address + record.length).map(|v| v.start));
        }
    }
    all
}

/// Whether a task has enough memory for huge pages to be made of it.
fn collapses(image: &Image, task: &Task) -> bool {
    let whole = image.records(task.memory.pages).iter().filter(|r| r.place == Where::Data);
    task.memory.thp_disabled == 0 && whole.map(|r| r.length / HUGE * HUGE).sum::<u64>() >= ENOUGH
}

fn takes_huge_pages(vma: &Vma) -> bool {
    matches!(vma.mapping, Mapping::Anonymous { .. })
        && !vma.grows_down
        && !vma.advice.contains(&libc::MADV_NOHUGEPAGE)
}

/// A part of a record that is read by one call, to where it is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) at: u64,
    pub(crate) stop: u64,
    pub(crate) file: u32,
    offset: u64,
    /// Whether it is whole huge pages, to be made as such.
    pub(crate) whole: bool,
}

impl Piece {
    fn purpose(&self) -> String {
        format!("contents of memory {:x}-{:x}", self.at, self.stop)
    }

    /// Plans its pages.
    pub(crate) fn make(&self, script: &mut Script) {
        let (purpose, length) = (self.purpose(), self.stop - self.at);
        if self.whole {
            let zero = script.data(&[0]);
            for page in (self.at..self.stop).step_by(HUGE as usize) {
                script.copy(purpose.clone(), page, zero, 1);
            }
            let args = [self.at.into(), length.into(), MADV_COLLAPSE.into()];
            script.try_call(purpose, libc::SYS_madvise, &args);
        } else if length >= POPULATE {
            let args = [self.at.into(), length.into(), MADV_POPULATE_WRITE.into()];
            script.try_call(purpose, libc::SYS_madvise, &args);
        }
    }

    /// Plans what is in them.
    pub(crate) fn read(&self, script: &mut Script, planner: &mut Planner<'_>) {
        let from = Range { file: self.file, offset: self.offset, length: self.stop - self.at };
        planner.contents(script, self.purpose(), self.at, from);
    }
}

/// In which pieces a record is read, to its address plus `shift`.
pub(crate) fn pieces(record: &Record, shift: u64, huge: bool) -> Vec<Piece> {
    let start = record.address + shift;
    let (mut at, end) = (start, start + record.length);
    let mut all = Vec::new();
    while at < end && record.place == Where::Data {
        let whole = huge && at.is_multiple_of(HUGE) && end - at >= HUGE;
        let stop = if whole {
            at + ((end - at) / HUGE * HUGE).min(COLLAPSED)
        } else if huge {
            // Up to where a whole huge page begins, if one fits.
            let next = at.next_multiple_of(HUGE).max(at + 1);
            if next + HUGE <= end { next } else { end }
        } else {
            end
        };
        // Counted from where it belongs: how many pieces there are must not depend on where the way there leads through.
        let next = ((at - shift + POPULATED) & !(POPULATED - 1)) + shift;
        let stop = if whole { stop } else { stop.min(next) };
        all.push(Piece { at, stop, file: record.file, offset: record.offset + (at - start), whole });
        at = stop;
    }
    all
}

/// Plans reads of `records` to their addresses plus `shift`.
pub(crate) fn read(
    script: &mut Script,
    planner: &mut Planner<'_>,
    records: &[Record],
    shift: u64,
    huge: bool,
) {
    for piece in records.iter().flat_map(|r| pieces(r, shift, huge)) {
        piece.make(script);
        piece.read(script, planner);
    }
}

fn zero(script: &mut Script, planner: &mut Planner<'_>, part: Record) {
    let slot = planner.open(Open::Zero);
    let fd = planner.descriptor(slot);
    let purpose = format!("zeros of memory {:x}-{:x}", part.address, part.address + part.length);
    let args = [fd, part.address.into(), part.length.into()];
    script.call_for(purpose, libc::SYS_read, &args, part.length as i64);
}
