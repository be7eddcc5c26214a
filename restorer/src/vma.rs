//! Planning the address space: where everything lies, and the calls that make it.

use std::collections::{BTreeMap, BTreeSet};

use torpor_image::task::Task;
use torpor_image::vma::{Lock, Mapping, Vma};
use torpor_image::{Image, InodeId};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;
use crate::plan::{Open, Planner};

/// asm-generic/mman-common.h
const MADV_WIPEONFORK: i32 = 18;
const PR_SET_VMA: u64 = 0x53564d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;
const MREMAP_TO: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
const FIXED: i32 = libc::MAP_FIXED_NOREPLACE;

/// What an address space begins as.
#[derive(Clone, Copy)]
pub(crate) enum Begin<'a> {
    /// The executor and the parked areas of the kernel.
    Bare,
    /// What this task, its parent, has of its memory by then.
    With(&'a Task, &'a Early),
}

/// The areas, by their addresses, that a task has when it makes those of its children that begin with its memory.
pub(crate) type Early = BTreeSet<u64>;

impl Begin<'_> {
    /// The area of the parent that a task begins with and keeps. Areas that fork(2) does not pass on as they are
    /// (madvise(2), MADV_DONTFORK and MADV_WIPEONFORK) are made anew.
    pub(crate) fn kept(&self, vma: &Vma) -> Option<&Vma> {
        let Begin::With(parent, early) = self else { return None };
        let vmas = &parent.memory.vmas;
        let own = &vmas[vmas.binary_search_by_key(&vma.start, |v| v.start).ok()?];
        if !early.contains(&own.start) {
            return None;
        }
        let changed = own.advice.iter().any(|advice| [libc::MADV_DONTFORK, MADV_WIPEONFORK].contains(advice));
        let same = own.end == vma.end
            && own.grows_down == vma.grows_down
            && own.no_reserve == vma.no_reserve
            && own.mapping == vma.mapping
            && own.advice == vma.advice;
        (same && !changed).then_some(own)
    }
}

/// Places of these lengths that are free in the restoring process and in every task of the image.
pub(crate) fn free_ranges(host: &Host, image: &Image, lengths: &[u64]) -> Option<Vec<u64>> {
    let mut taken: Vec<(u64, u64)> = host.occupied.clone();
    taken.extend(image.tasks.iter().flat_map(|t| &t.memory.vmas).map(|v| {
        // A stack grows down into what lies below it.
        let room = if v.grows_down { 1 << 30 } else { 0 };
        (v.start.saturating_sub(room), v.end)
    }));
    taken.push((0, 1 << 20));
    taken.push((arch::TASK_SIZE, u64::MAX));
    taken.sort_unstable();
    lengths
        .iter()
        .map(|&length| {
            let mut end = 0;
            for (i, &(start, stop)) in taken.iter().enumerate() {
                // A page on either side keeps areas from merging and overruns from going unseen.
                if start >= end && start - end >= length + 2 * 4096 {
                    let at = start - length - 4096;
                    taken.insert(i, (at, at + length));
                    return Some(at);
                }
                end = end.max(stop);
            }
            None
        })
        .collect()
}

/// Removes the memory of the restoring process from the new task, but for the executor's and the kernel's
/// own areas, which are parked beside it.
pub(crate) fn clear(script: &mut Script, host: &Host, base: u64, end: u64, park: u64) {
    let mut to = park;
    for (name, start, stop) in &host.kernel_areas {
        let length = stop - start;
        call!(script, format!("parking {name}"), libc::SYS_mremap, *start, length, length, MREMAP_TO, to);
        to += length;
    }
    call!(script, "unmapping the memory below", libc::SYS_munmap, 0, base);
    call!(script, "unmapping the memory above", libc::SYS_munmap, end, arch::TASK_SIZE - end);
}

/// Length of all kernel areas together.
pub(crate) fn parking(host: &Host) -> u64 {
    host.kernel_areas.iter().map(|(_, start, stop)| stop - start).sum()
}

/// Puts the kernel's areas where the image has them, and unmaps what a task begins with and does not keep.
pub(crate) fn begin(script: &mut Script, host: &Host, task: &Task, begin: Begin<'_>, park: u64) {
    let place = |vmas: &[Vma], name: &[u8]| {
        let own = |v: &&Vma| matches!(&v.mapping, Mapping::Kernel { name: n } if &**n == name);
        vmas.iter().find(own).map(|v| v.start)
    };
    let mut parked = Vec::new();
    let mut at = park;
    for (name, start, stop) in &host.kernel_areas {
        parked.push((name, at, stop - start));
        at += stop - start;
    }
    if let Begin::With(parent, early) = begin {
        let now = |name| place(&parent.memory.vmas, name);
        if parked.iter().all(|(name, ..)| now(name) == place(&task.memory.vmas, name)) {
            parked.clear();
        }
        // Through the parking place: one may have to go where another is.
        for &(name, at, length) in &parked {
            if let Some(from) = now(name) {
                let purpose = format!("parking {name}");
                call!(script, purpose, libc::SYS_mremap, from, length, length, MREMAP_TO, at);
            }
        }
        parked.retain(|(name, ..)| now(name).is_some());
        for vma in &parent.memory.vmas {
            let own = task.memory.vmas.binary_search_by_key(&vma.start, |v| v.start).ok();
            let kept = own.is_some_and(|i| begin.kept(&task.memory.vmas[i]).is_some());
            if !kept && early.contains(&vma.start) && !matches!(vma.mapping, Mapping::Kernel { .. }) {
                call!(script, "unmapping what only its parent has", libc::SYS_munmap, vma.start, vma.len());
            }
        }
    }
    for (name, from, length) in parked {
        match place(&task.memory.vmas, name) {
            Some(to) => {
                let purpose = format!("moving {name} to {to:x}");
                call!(script, purpose, libc::SYS_mremap, from, length, length, MREMAP_TO, to);
            }
            None => {
                call!(script, format!("unmapping {name}"), libc::SYS_munmap, from, length);
            }
        }
    }
}

/// What must be true of the kernel's areas for the image to fit; `None` when it does.
pub(crate) fn kernel_mismatch(image: &Image, host: &Host, task: &Task) -> Option<String> {
    let wanted: Vec<(&[u8], u64, u64)> = task
        .memory
        .vmas
        .iter()
        .filter_map(|v| match &v.mapping {
            Mapping::Kernel { name } => Some((&**name, v.start, v.len())),
            _ => None,
        })
        .collect();
    for (name, _, length) in &wanted {
        let here = host.kernel_areas.iter().find(|(n, ..)| &**n == *name);
        let text = String::from_utf8_lossy(name);
        match here {
            None => return Some(format!("this kernel has no {text}")),
            Some((_, start, end)) if end - start != *length => {
                return Some(format!("{text} has {length} bytes in the image and {} here", end - start));
            }
            Some(_) => {}
        }
    }
    let vdso = wanted.iter().any(|(name, ..)| *name == b"[vdso]");
    (vdso && image.manifest.host.vdso != host.vdso)
        .then(|| "the vdso of this kernel is another one".to_owned())
}

/// Plans `areas` of a task but for the kernel's own. `scratch` tells where anonymous shared memory is mapped whole.
pub(crate) fn map(
    script: &mut Script,
    planner: &mut Planner<'_>,
    task: &Task,
    areas: &[&Vma],
    begin: Begin<'_>,
    scratch: &BTreeMap<InodeId, u64>,
) {
    for &vma in areas {
        let title = title(vma, planner.image);
        let length = vma.len();
        if let Some(own) = begin.kept(vma) {
            let needed = made_with(vma, planner.image, task, begin);
            if needed != own.protection {
                call!(script, title, libc::SYS_mprotect, vma.start, length, needed);
            }
            continue;
        }
        match &vma.mapping {
            // Those of rings are there already.
            Mapping::Kernel { .. } | Mapping::Ring { .. } => {}
            Mapping::Anonymous { .. } => {
                let flags = libc::MAP_PRIVATE
                    | libc::MAP_ANONYMOUS
                    | FIXED
                    | if vma.grows_down { libc::MAP_GROWSDOWN } else { 0 }
                    | if vma.no_reserve { libc::MAP_NORESERVE } else { 0 };
                let protection = made_with(vma, planner.image, task, begin);
                mmap(script, title, vma.start, length, protection, flags, Value::Number(u64::MAX), 0);
            }
            Mapping::Private { inode, offset } => {
                let slot = planner.open(Open::Mapped { inode: *inode, write: false });
                let flags = libc::MAP_PRIVATE | FIXED | if vma.no_reserve { libc::MAP_NORESERVE } else { 0 };
                let protection = made_with(vma, planner.image, task, begin);
                mmap(script, title, vma.start, length, protection, flags, planner.descriptor(slot), *offset);
            }
            // Attached below.
            Mapping::Shared { inode, .. }
                if planner.image.objects.inodes[inode.0 as usize].segment().is_some() => {}
            Mapping::Shared { inode, offset, may_write } => {
                if let Some(whole) = scratch.get(inode) {
                    // A second view of it (an old size of 0, mremap(2)) keeps it what it was in /proc/PID/maps.
                    let (from, to) = (whole + offset, vma.start);
                    let args = [from.into(), Value::Number(0), length.into(), MREMAP_TO.into(), to.into()];
                    script.call_for(title, libc::SYS_mremap, &args, to as i64);
                    continue;
                }
                let slot = planner.open(Open::Mapped { inode: *inode, write: *may_write });
                let flags = libc::MAP_SHARED | FIXED | if vma.no_reserve { libc::MAP_NORESERVE } else { 0 };
                mmap(
                    script,
                    title,
                    vma.start,
                    length,
                    vma.protection,
                    flags,
                    planner.descriptor(slot),
                    *offset,
                );
            }
        }
    }
}

/// Anonymous shared memory, which no descriptor can name: made by the root before it makes others, so that all
/// have it at the same place to begin with.
pub(crate) fn shared_memory(script: &mut Script, planner: &mut Planner<'_>, id: InodeId, at: u64) {
    let inode = &planner.image.objects.inodes[id.0 as usize];
    let size = inode.size.next_multiple_of(4096);
    let read_write = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    let mut areas = planner.image.tasks.iter().flat_map(|t| &t.memory.vmas);
    let reserve =
        areas.any(|v| v.no_reserve && matches!(v.mapping, Mapping::Shared { inode, .. } if inode == id));
    let flags =
        libc::MAP_SHARED | libc::MAP_ANONYMOUS | FIXED | if reserve { libc::MAP_NORESERVE } else { 0 };
    mmap(script, format!("shared memory {id}"), at, size, read_write, flags, Value::Number(u64::MAX), 0);
    if let Some(content) = inode.content() {
        let records = planner.image.records(content);
        crate::memory::read(script, planner, records, at, false);
    }
}

/// Sets what can only be set once the contents are there: protection, advice, names and locks.
pub(crate) fn finish(
    script: &mut Script,
    planner: &Planner<'_>,
    task: &Task,
    areas: &[&Vma],
    begin: Begin<'_>,
) {
    for &vma in areas {
        let title = || title(vma, planner.image);
        let length = vma.len();
        let now = match &vma.mapping {
            Mapping::Kernel { .. } => continue,
            Mapping::Shared { inode, may_write, .. } => {
                let object = &planner.image.objects.inodes[inode.0 as usize];
                if begin.kept(vma).is_some() {
                    vma.protection
                } else if object.segment().is_some() {
                    crate::sysv_shm::made_with(*may_write)
                } else if object.is_shared_memory() {
                    (libc::PROT_READ | libc::PROT_WRITE) as u32
                } else {
                    vma.protection
                }
            }
            _ => made_with(vma, planner.image, task, begin),
        };
        if now != vma.protection {
            call!(script, title(), libc::SYS_mprotect, vma.start, length, vma.protection);
        }
        // Advice and names are inherited.
        let kept = begin.kept(vma).is_some();
        for advice in vma.advice.iter().filter(|_| !kept) {
            call!(script, title(), libc::SYS_madvise, vma.start, length, *advice);
        }
        if let Mapping::Anonymous { name: Some(name) } = &vma.mapping
            && !kept
        {
            let name = script.c_string(name);
            // Names are cosmetic and not in every kernel.
            script.try_call(
                title(),
                libc::SYS_prctl,
                &[
                    PR_SET_VMA.into(),
                    PR_SET_VMA_ANON_NAME.into(),
                    vma.start.into(),
                    length.into(),
                    name.into(),
                ],
            );
        }
        let flags = match vma.locked {
            Lock::No => continue,
            Lock::Yes => 0,
            Lock::OnFault => libc::MLOCK_ONFAULT,
        };
        let args = [vma.start.into(), length.into(), flags.into()];
        if vma.protection == 0 {
            // mlockall locks these too: the lock is set before their pages, which nobody may touch, fail to
            // be made present (mm/mlock.c).
            script.try_call(title(), libc::SYS_mlock2, &args);
        } else {
            script.call(title(), libc::SYS_mlock2, &args);
        }
    }
}

/// "memory 7f..-7f.. (/lib/libc.so.6)"
pub(crate) fn title(vma: &Vma, image: &Image) -> String {
    let what = match &vma.mapping {
        Mapping::Anonymous { .. } => "anonymous".to_owned(),
        Mapping::Kernel { name } => name.to_string(),
        Mapping::Ring { .. } => "io_uring".to_owned(),
        Mapping::Private { inode, .. } | Mapping::Shared { inode, .. } => {
            image.objects.inodes[inode.0 as usize].name()
        }
    };
    format!("memory {:x}-{:x} ({what})", vma.start, vma.end)
}

/// The protection an area is made with. A private one that contents go into must be writable, but not
/// executable at the same time. The others are made as they will be: a large area without access is not
/// accounted as memory in use, and must not become so. One that is kept stays as its parent has it unless contents go into
/// it.
fn made_with(vma: &Vma, image: &Image, task: &Task, begin: Begin<'_>) -> u32 {
    let read_write = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    if !vma.private() {
        return vma.protection;
    }
    if let (Some(own), Begin::With(parent, _)) = (begin.kept(vma), begin) {
        let writes = crate::memory::changes(image, task, parent, vma).iter().any(|c| c.writes());
        return if writes { read_write } else { own.protection };
    }
    let records = image.records(task.memory.pages);
    let first = records.partition_point(|r| r.address + r.length <= vma.start);
    if records.get(first).is_some_and(|r| r.address < vma.end) { read_write } else { vma.protection }
}

#[expect(clippy::too_many_arguments, reason = "they are those of mmap")]
fn mmap(
    script: &mut Script,
    title: String,
    start: u64,
    length: u64,
    protection: u32,
    flags: i32,
    fd: Value,
    offset: u64,
) {
    script.call_for(
        title,
        libc::SYS_mmap,
        &[start.into(), length.into(), protection.into(), flags.into(), fd, offset.into()],
        start as i64,
    );
}
