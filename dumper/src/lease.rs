//! fcntl(2), `F_SETLEASE`: leases, from fdinfo.
//!
//! A lease is broken by whoever opens the file in a way that does not go with it (fs/locks.c, `__break_lease`): a
//! write lease by anybody. So a file under one must not be opened for a look, and its contents cannot go into the
//! image. To be had again it must be the only opening of the file, while a restore opens what is mapped by itself.

use torpor_image::description::Kind;
use torpor_image::inode::Source;
use torpor_image::lock::Lease;
use torpor_image::vma::{Mapping, Vma};
use torpor_image::{InodeId, Pid};
use torpor_kernel::fdinfo::LockKind;
use torpor_kernel::process;

use crate::collect::Collector;
use crate::description::Found;
use crate::scratch;

const REMEDY: &str = "give it up before the dump (F_UNLCK)";

/// The lease of a description; `None` where there is none, or it was refused.
pub(crate) fn collect(collector: &mut Collector, found: &Found, kind: &Kind) -> Option<Lease> {
    let is_lease = |kind| matches!(kind, LockKind::Lease | LockKind::Delegation);
    let lock = found.info.locks.iter().find(|l| is_lease(l.kind))?;
    let path = match kind {
        Kind::File(inode) => match &collector.objects.inodes[inode.0 as usize].source {
            Source::Path { path } => Some(path.clone()),
            _ => None,
        },
        _ => None,
    };
    let mut refuse = |why: &str| {
        collector.refuse(found.title(), why, REMEDY);
        None
    };
    let Some(path) = path.filter(|_| lock.kind == LockKind::Lease) else {
        return refuse("a lease on anything but a file with a name cannot be dumped");
    };
    if lock.breaking {
        return refuse("its lease is being broken: somebody waits for the file");
    }
    if lock.write && scratch::in_memory(&path) {
        return refuse("under a write lease its contents, which are in memory only, cannot be read");
    }
    if !collector.is_member(lock.pid) {
        let name = process::who_holds(lock.pid).unwrap_or_default();
        collector.refuse(
            found.title(),
            format!("its lease was taken by pid {} ({name}), which is not part of the dump", lock.pid),
            REMEDY,
        );
        return None;
    }
    Some(Lease { exclusive: lock.write, holder: Pid(lock.pid) })
}

/// Refuses leases that cannot be had again; `vmas` are the areas of all processes.
pub(crate) fn confirm<'v>(collector: &mut Collector, vmas: impl Iterator<Item = &'v Vma> + Clone) {
    for inode in exclusive(collector) {
        let name = collector.objects.inodes[inode.0 as usize].name();
        let maps = |mapping: &Mapping| match mapping {
            Mapping::Private { inode: of, .. } | Mapping::Shared { inode: of, .. } => *of == inode,
            _ => false,
        };
        if vmas.clone().any(|v| maps(&v.mapping)) {
            let why = "it is mapped, and a write lease is given for a file that is open once only";
            collector.refuse(format!("`{name}`"), why, REMEDY);
        }
    }
}

/// Files under a write lease.
pub(crate) fn exclusive(collector: &Collector) -> Vec<InodeId> {
    let all = collector.objects.descriptions.iter().filter(|d| d.lease.is_some_and(|l| l.exclusive));
    all.filter_map(|d| if let Kind::File(inode) = d.kind { Some(inode) } else { None }).collect()
}
