//! Planning how contents get into memory: by reads of the task itself from the data files.
//!
//! A page fault costs more than the copy (research/fast.md), so faults are avoided: where a huge page fits
//! whole, one touch and `MADV_COLLAPSE` make it at once, without changing the area's flags; longer runs of
//! small pages are populated in one call before they are read.

use torpor_image::extent::{Record, Where};
use torpor_image::task::Task;
use torpor_image::vma::{Mapping, Vma};
use torpor_parasite::call;
use torpor_parasite::script::Script;

use crate::plan::{Open, Planner};

const HUGE: u64 = 2 << 20;
/// Below this a population call costs more than the faults it saves.
const POPULATE: u64 = 64 << 10;
/// A read transfers at most a little under 2 GiB (read(2)).
const LONGEST: u64 = 1 << 30;
/// asm-generic/mman-common.h
const MADV_POPULATE_WRITE: i32 = 23;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;

/// Plans the contents of a task's private areas.
pub(crate) fn fill(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    let image = planner.image;
    for record in image.records(task.memory.pages) {
        let (mut at, end) = (record.address, record.address + record.length);
        let first = task.memory.vmas.partition_point(|v| v.end <= at);
        for vma in &task.memory.vmas[first..] {
            if at >= end {
                break;
            }
            let stop = end.min(vma.end);
            let offset = record.offset.wrapping_add(at - record.address);
            let part = Record { address: at, length: stop - at, offset, ..*record };
            let huge = task.memory.thp_disabled == 0 && takes_huge_pages(vma);
            match record.place {
                // Anonymous memory is zero; a private mapping of a file is not.
                Where::Zero if matches!(vma.mapping, Mapping::Private { .. }) => zero(script, planner, part),
                Where::Zero => {}
                Where::Data => read(script, planner, &[part], 0, huge),
                Where::Guard => {
                    let purpose = format!("guard pages at {at:x}");
                    call!(script, purpose, libc::SYS_madvise, at, part.length, MADV_GUARD_INSTALL);
                }
            }
            at = stop;
        }
    }
}

fn takes_huge_pages(vma: &Vma) -> bool {
    matches!(vma.mapping, Mapping::Anonymous { .. })
        && !vma.grows_down
        && !vma.advice.contains(&libc::MADV_NOHUGEPAGE)
}

/// Plans reads of `records` to their addresses plus `shift`.
pub(crate) fn read(
    script: &mut Script,
    planner: &mut Planner<'_>,
    records: &[Record],
    shift: u64,
    huge: bool,
) {
    for record in records.iter().filter(|r| r.place == Where::Data) {
        let slot = planner.open(Open::Data { file: record.file });
        let fd = planner.descriptor(slot);
        let (mut at, end) = (record.address + shift, record.address + shift + record.length);
        let mut populated = at;
        while at < end {
            let whole = huge && at.is_multiple_of(HUGE) && end - at >= HUGE;
            let stop = if whole {
                at + HUGE
            } else if huge {
                // Up to where a whole huge page begins, if one fits.
                let next = at.next_multiple_of(HUGE).max(at + 1);
                if next + HUGE <= end { next } else { end }
            } else {
                end
            };
            let stop = stop.min(at + LONGEST);
            let length = stop - at;
            let purpose = format!("contents of memory {at:x}-{stop:x}");
            if whole {
                let zero = script.data(&[0]);
                script.copy(purpose.clone(), at, zero, 1);
                script.try_call(
                    purpose.clone(),
                    libc::SYS_madvise,
                    &[at.into(), HUGE.into(), MADV_COLLAPSE.into()],
                );
            } else if length >= POPULATE && at >= populated {
                script.try_call(
                    purpose.clone(),
                    libc::SYS_madvise,
                    &[at.into(), length.into(), MADV_POPULATE_WRITE.into()],
                );
                populated = stop;
            }
            let offset = record.offset + (at - shift - record.address);
            script.call_for(
                purpose,
                libc::SYS_pread64,
                &[fd, at.into(), length.into(), offset.into()],
                length as i64,
            );
            at = stop;
        }
    }
}

fn zero(script: &mut Script, planner: &mut Planner<'_>, part: Record) {
    let slot = planner.open(Open::Zero);
    let fd = planner.descriptor(slot);
    let purpose = format!("zeros of memory {:x}-{:x}", part.address, part.address + part.length);
    let args = [fd, part.address.into(), part.length.into()];
    script.call_for(purpose, libc::SYS_read, &args, part.length as i64);
}
