//! Planning the address space: where everything lies, and the calls that make it.

use torpor_image::task::Task;
use torpor_image::vma::{Lock, Mapping, Vma};
use torpor_image::{Image, InodeId};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;
use crate::plan::{Open, Planner};

const PR_SET_VMA: u64 = 0x53564d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;
const MREMAP_TO: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
const FIXED: i32 = libc::MAP_FIXED_NOREPLACE;

/// A place of `length` bytes that is free both in the restoring process and in the image.
pub(crate) fn free_range(host: &Host, task: &Task, length: u64) -> Option<u64> {
    let mut taken: Vec<(u64, u64)> = host.occupied.clone();
    taken.extend(task.memory.vmas.iter().map(|v| {
        // A stack grows down into what lies below it.
        let room = if v.grows_down { 1 << 30 } else { 0 };
        (v.start.saturating_sub(room), v.end)
    }));
    taken.push((0, 1 << 20));
    taken.push((arch::TASK_SIZE, u64::MAX));
    taken.sort_unstable();
    let mut end = 0;
    for (start, stop) in taken {
        // A page on either side keeps areas from merging and overruns from going unseen.
        if start >= end && start - end >= length + 2 * 4096 {
            return Some(start - length - 4096);
        }
        end = end.max(stop);
    }
    None
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

/// Moves the kernel's areas from where they are parked to where the image has them.
pub(crate) fn unpark(script: &mut Script, host: &Host, task: &Task, park: u64) {
    let mut from = park;
    for (name, start, stop) in &host.kernel_areas {
        let length = stop - start;
        let wanted = task
            .memory
            .vmas
            .iter()
            .find(|v| matches!(&v.mapping, Mapping::Kernel { name: n } if n == name))
            .map(|v| v.start);
        match wanted {
            Some(to) => {
                let purpose = format!("moving {name} to {to:x}");
                call!(script, purpose, libc::SYS_mremap, from, length, length, MREMAP_TO, to);
            }
            None => {
                call!(script, format!("unmapping {name}"), libc::SYS_munmap, from, length);
            }
        }
        from += length;
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

/// Plans every area but the kernel's own.
pub(crate) fn map(script: &mut Script, planner: &mut Planner<'_>, task: &Task, scratch: u64) {
    let mut shared: Vec<InodeId> = Vec::new();
    for vma in &task.memory.vmas {
        let title = title(vma, planner.image);
        let length = vma.len();
        match &vma.mapping {
            Mapping::Kernel { .. } => {}
            Mapping::Anonymous { .. } => {
                let flags = libc::MAP_PRIVATE
                    | libc::MAP_ANONYMOUS
                    | FIXED
                    | if vma.grows_down { libc::MAP_GROWSDOWN } else { 0 }
                    | if vma.no_reserve { libc::MAP_NORESERVE } else { 0 };
                let protection = made_with(vma, planner.image, task);
                mmap(script, title, vma.start, length, protection, flags, Value::Number(u64::MAX), 0);
            }
            Mapping::Private { inode, offset } => {
                let slot = planner.open(Open::Mapped { inode: *inode, write: false });
                let flags = libc::MAP_PRIVATE | FIXED | if vma.no_reserve { libc::MAP_NORESERVE } else { 0 };
                let protection = made_with(vma, planner.image, task);
                mmap(script, title, vma.start, length, protection, flags, planner.descriptor(slot), *offset);
            }
            Mapping::Shared { inode, offset, may_write } => {
                if planner.image.objects.inodes[inode.0 as usize].is_shared_memory() {
                    if !shared.contains(inode) {
                        shared.push(*inode);
                    }
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
    for inode in shared {
        shared_memory(script, planner, task, inode, scratch);
    }
}

/// Anonymous shared memory: mapped whole at a scratch address, filled, and every area made a second view of
/// it (`mremap` with an old size of 0, mremap(2)), which keeps it what it was in /proc/PID/maps.
fn shared_memory(script: &mut Script, planner: &mut Planner<'_>, task: &Task, id: InodeId, scratch: u64) {
    let inode = &planner.image.objects.inodes[id.0 as usize];
    let size = inode.size.next_multiple_of(4096);
    let read_write = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    let areas = task.memory.vmas.iter().filter_map(|v| match v.mapping {
        Mapping::Shared { inode, offset, .. } if inode == id => Some((v, offset)),
        _ => None,
    });
    let reserve = areas.clone().any(|(v, _)| v.no_reserve);
    let flags =
        libc::MAP_SHARED | libc::MAP_ANONYMOUS | FIXED | if reserve { libc::MAP_NORESERVE } else { 0 };
    mmap(script, format!("shared memory {id}"), scratch, size, read_write, flags, Value::Number(u64::MAX), 0);
    if let Some(content) = inode.content() {
        let records = planner.image.records(content);
        crate::memory::read(script, planner, records, scratch, false);
    }
    for (vma, offset) in areas {
        let title = title(vma, planner.image);
        let (from, to) = (scratch + offset, vma.start);
        script.call_for(
            title,
            libc::SYS_mremap,
            &[from.into(), Value::Number(0), vma.len().into(), MREMAP_TO.into(), to.into()],
            to as i64,
        );
    }
    call!(script, format!("shared memory {id}"), libc::SYS_munmap, scratch, size);
}

/// Sets what can only be set once the contents are there: protection, advice, names and locks.
pub(crate) fn finish(script: &mut Script, planner: &Planner<'_>, task: &Task) {
    for vma in &task.memory.vmas {
        let title = || title(vma, planner.image);
        let length = vma.len();
        let now = match &vma.mapping {
            Mapping::Kernel { .. } => continue,
            Mapping::Shared { inode, .. } => {
                if planner.image.objects.inodes[inode.0 as usize].is_shared_memory() {
                    (libc::PROT_READ | libc::PROT_WRITE) as u32
                } else {
                    vma.protection
                }
            }
            _ => made_with(vma, planner.image, task),
        };
        if now != vma.protection {
            call!(script, title(), libc::SYS_mprotect, vma.start, length, vma.protection);
        }
        for advice in &vma.advice {
            call!(script, title(), libc::SYS_madvise, vma.start, length, *advice);
        }
        if let Mapping::Anonymous { name: Some(name) } = &vma.mapping {
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
        Mapping::Private { inode, .. } | Mapping::Shared { inode, .. } => {
            image.objects.inodes[inode.0 as usize].name()
        }
    };
    format!("memory {:x}-{:x} ({what})", vma.start, vma.end)
}

/// The protection a private area is made with. One that contents go into must be writable, but not
/// executable at the same time. The others are made as they will be: a large area without access is not
/// accounted as memory in use, and must not become so.
fn made_with(vma: &Vma, image: &Image, task: &Task) -> u32 {
    let records = image.records(task.memory.pages);
    let first = records.partition_point(|r| r.address + r.length <= vma.start);
    if records.get(first).is_some_and(|r| r.address < vma.end) {
        (libc::PROT_READ | libc::PROT_WRITE) as u32
    } else {
        vma.protection
    }
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
