//! Queues of rings in memory: they can be mapped only where the kernel chooses.
//!
//! `mmap` and `mremap` of a ring refuse every address (io_uring/memmap.c, `io_uring_get_unmapped_area`). So all gaps that
//! are large enough are filled but for the one that is wanted, which is the kernel's only choice then. What fills them
//! is without access, and takes no memory.

use std::collections::BTreeMap;

use torpor_image::InodeId;
use torpor_image::task::Task;
use torpor_image::vma::{Mapping, Vma};
use torpor_parasite::script::{Script, Value};

use crate::plan::{Open, Place, Planner};
use crate::vma::{Begin, title};

/// The lowest address that anybody may map (vm.mmap_min_addr).
const LOWEST: u64 = 1 << 16;
const PAGE: u64 = 4096;
const FILLING: i32 =
    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;

/// Maps the queues among `areas` of a task, before any other area that it does not begin with.
pub(crate) fn map(
    script: &mut Script,
    planner: &mut Planner<'_>,
    task: &Task,
    areas: &[&Vma],
    begin: Begin<'_>,
    place: Place,
    scratch: &BTreeMap<InodeId, u64>,
) {
    let is_ring = |v: &&Vma| matches!(v.mapping, Mapping::Ring { .. }) && begin.kept(v).is_none();
    let rings: Vec<&Vma> = areas.iter().copied().filter(is_ring).collect();
    if rings.is_empty() {
        return;
    }
    let there = |v: &&Vma| matches!(v.mapping, Mapping::Kernel { .. }) || begin.kept(v).is_some();
    let mut taken: Vec<(u64, u64)> =
        task.memory.vmas.iter().filter(there).map(|v| (v.start, v.end)).collect();
    taken.push((place.blob, place.arena + place.arena_length));
    taken.extend(
        scratch.iter().map(|(id, at)| {
            (*at, at + planner.image.objects.inodes[id.0 as usize].size.next_multiple_of(PAGE))
        }),
    );
    for vma in rings {
        let Mapping::Ring { ring, area } = vma.mapping else { continue };
        let title = title(vma, planner.image);
        let slot = planner.open(Open::Description(ring));
        taken.push((vma.start, vma.end));
        let most = taken.len() + 1;
        let mut gaps = gaps(&mut taken, vma.len());
        // The length of a script does not depend on addresses; an empty gap is no call that does anything.
        gaps.resize(most, (0, 0));
        for (start, end) in &gaps {
            let purpose = format!("{title}: leaving no other place");
            let args = [*start, end - start, 0, FILLING as u64, u64::MAX, 0].map(Value::Number);
            match end - start {
                0 => script.try_call(purpose, libc::SYS_mmap, &args),
                _ => script.call_for(purpose, libc::SYS_mmap, &args, *start as i64),
            };
        }
        let args = [
            Value::Number(0),
            vma.len().into(),
            vma.protection.into(),
            libc::MAP_SHARED.into(),
            planner.descriptor(slot),
            area.into(),
        ];
        script.call_for(title.clone(), libc::SYS_mmap, &args, vma.start as i64);
        for (start, end) in &gaps {
            let purpose = format!("{title}: leaving places to others");
            script.try_call(purpose, libc::SYS_munmap, &[(*start).into(), (end - start).into()]);
        }
    }
}

/// What is free between areas, if it has at least `length` bytes.
fn gaps(taken: &mut [(u64, u64)], length: u64) -> Vec<(u64, u64)> {
    taken.sort_unstable();
    let mut gaps = Vec::new();
    let mut at = LOWEST;
    for &(start, end) in taken.iter().chain([&(arch::TASK_SIZE, arch::TASK_SIZE)]) {
        if start >= at + length {
            gaps.push((at, start));
        }
        at = at.max(end);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_areas() {
        let mut taken = [(0x50000, 0x60000), (0x20000, 0x30000), (0x31000, 0x40000)];
        let top = arch::TASK_SIZE;
        assert_eq!(
            gaps(&mut taken, 0x1000),
            [(0x10000, 0x20000), (0x30000, 0x31000), (0x40000, 0x50000), (0x60000, top)]
        );
        assert_eq!(gaps(&mut taken, 0x2000), [(0x10000, 0x20000), (0x40000, 0x50000), (0x60000, top)]);
    }
}
