//! Virtual memory areas, from smaps; the files behind them from map_files where their paths do not lead to
//! them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use torpor_image::extent::Extents;
use torpor_image::inode::Source;
use torpor_image::vma::{Lock, Mapping as Maps, Vma};
use torpor_image::{Bytes, InodeId};
use torpor_kernel::ids::Pid;
use torpor_kernel::maps::{Kind, Mapping, VmFlags};

use crate::collect::{Collector, Content, stat_path};
use crate::error::{Error, Result};
use crate::track::keeper;

/// `MADV_*` by the word that smaps shows (fs/proc/task_mmu.c, `show_smap_vma_flags`).
const ADVICE: [(&str, i32); 8] = [
    ("rr", libc::MADV_RANDOM),
    ("sr", libc::MADV_SEQUENTIAL),
    ("dc", libc::MADV_DONTFORK),
    ("dd", libc::MADV_DONTDUMP),
    ("wf", libc::MADV_WIPEONFORK),
    ("mg", libc::MADV_MERGEABLE),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
];
/// Words that say nothing a restore must repeat: permissions, what follows from the mapping's kind, and
/// accounting.
const PLAIN: [&str; 16] =
    ["rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "ac", "nr", "lo", "lf", "sd", "de", "gu"];
/// Pages may be missing that somebody has yet to bring.
const MISSING: &str = "memory that is still being restored lazily, or served by a userfaultfd of its own,";
/// What other words mean for a dump.
const REFUSED: [(&str, &str); 10] = [
    ("ht", "memory of explicit huge pages"),
    ("mm", "memory of a device"),
    ("io", "memory of a device"),
    ("pf", "memory of a device"),
    ("um", MISSING),
    ("uw", "memory watched by a userfaultfd"),
    ("ui", "memory watched by a userfaultfd"),
    ("ss", "a shadow stack"),
    ("sl", "sealed memory (mseal)"),
    ("dp", "droppable memory"),
];

/// What the flags of an area say.
struct Told {
    /// Nothing that a dump might refuse.
    plain: bool,
    grows_down: bool,
    no_reserve: bool,
    locked: Lock,
    advice: Vec<i32>,
}

impl Told {
    fn by(flags: &VmFlags) -> Self {
        Told {
            plain: flags.words.iter().all(|word| is_plain(std::str::from_utf8(word).unwrap_or("??"))),
            grows_down: flags.has("gd"),
            no_reserve: flags.has("nr"),
            locked: match (flags.has("lo"), flags.has("lf")) {
                (false, _) => Lock::No,
                (true, false) => Lock::Yes,
                (true, true) => Lock::OnFault,
            },
            advice: ADVICE.iter().filter(|(word, _)| flags.has(word)).map(|(_, a)| *a).collect(),
        }
    }
}

fn is_plain(word: &str) -> bool {
    PLAIN.contains(&word) || ADVICE.iter().any(|(w, _)| *w == word)
}

/// Collects the areas of the address space.
pub(crate) fn collect(collector: &mut Collector, maps: &[Mapping]) -> Result<Vec<Vma>> {
    let mut vmas: Vec<Vma> = Vec::with_capacity(maps.len());
    // Thousands of areas have a few sets of flags.
    let mut sets: HashMap<&[[u8; 2]], Told> = HashMap::new();
    let mut ours = None;
    for mapping in maps {
        if mapping.kind() == Kind::Vsyscall {
            continue;
        }
        let refused = collector.refusals.len();
        let target = target(collector, mapping)?;
        let told = sets.entry(&mapping.flags.words).or_insert_with(|| Told::by(&mapping.flags));
        // What it maps says more than how.
        if collector.refusals.len() == refused {
            refuse_flags(collector, mapping, told.plain, &mut ours);
        }
        if collector.refusals.len() > refused {
            continue;
        }
        let Some(target) = target else { continue };
        let bit = |set, bit: i32| if set { bit as u32 } else { 0 };
        vmas.push(Vma {
            start: mapping.start,
            end: mapping.end,
            protection: bit(mapping.read, libc::PROT_READ)
                | bit(mapping.write, libc::PROT_WRITE)
                | bit(mapping.exec, libc::PROT_EXEC),
            mapping: target,
            grows_down: told.grows_down,
            no_reserve: told.no_reserve,
            locked: told.locked,
            advice: told.advice.clone(),
        });
    }
    Ok(vmas)
}

fn title(mapping: &Mapping) -> String {
    format!(
        "memory {:x}-{:x} ({})",
        mapping.start,
        mapping.end,
        if mapping.path.is_empty() { "anonymous".into() } else { String::from_utf8_lossy(&mapping.path) }
    )
}

fn refuse(collector: &mut Collector, mapping: &Mapping, what: &str, remedy: &str) {
    collector.refuse(title(mapping), format!("{what} cannot be dumped yet"), remedy);
}

/// `ours` is whether it is torpor that watches the writes of the process, once that was asked.
fn refuse_flags(collector: &mut Collector, mapping: &Mapping, plain: bool, ours: &mut Option<bool>) {
    // The kernel's own areas are marked as a device's.
    if matches!(mapping.kind(), Kind::Vdso | Kind::Vvar) {
        return;
    }
    const REMEDY: &str = "unmap it before the dump";
    const WAIT: &str = "wait until the restore that brings it has ended, or unmap it before the dump";
    for word in mapping.flags.words.iter().filter(|_| !plain) {
        let word = std::str::from_utf8(word).unwrap_or("??");
        // Memory of single pages of the kernel's, as that of rings is.
        let mixed = word == "mm" && crate::io_uring::is_mapped(mapping);
        // By a dump that has left a watch over what is written.
        let watched = word == "uw" && *ours.get_or_insert_with(|| is_watched(collector));
        if mixed || watched || is_plain(word) {
            continue;
        }
        let what = REFUSED.iter().find(|(w, _)| *w == word).map(|(_, what)| (*what).to_owned());
        let what = what.unwrap_or_else(|| format!("memory with the unknown flag `{word}`"));
        let remedy = match word {
            "um" => WAIT,
            "uw" => "end who watches it, which may be another torpor, or unmap it before the dump",
            _ => REMEDY,
        };
        collector.refuse(title(mapping), format!("{what} cannot be dumped yet"), remedy);
        return;
    }
    if mapping.pkey != 0 {
        collector.refuse(title(mapping), "memory with a protection key cannot be dumped yet", REMEDY);
    }
}

/// What an area maps; `None` when it was refused.
fn target(collector: &mut Collector, mapping: &Mapping) -> Result<Option<Maps>> {
    let refuse = |collector: &mut Collector, what: &str| {
        refuse(collector, mapping, what, "unmap it before the dump");
        Ok(None)
    };
    if mapping.path.starts_with(b"socket:[") {
        return refuse(collector, "memory shared with a socket, as a ring of packets,");
    }
    match mapping.kind() {
        Kind::Anonymous | Kind::Heap | Kind::Stack if !mapping.shared => {
            Ok(Some(Maps::Anonymous { name: None }))
        }
        Kind::NamedAnonymous(name) => Ok(Some(Maps::Anonymous { name: Some(name.into()) })),
        Kind::Vdso | Kind::Vvar => Ok(Some(Maps::Kernel { name: mapping.path.as_slice().into() })),
        Kind::SharedAnonymous | Kind::NamedSharedAnonymous(_) | Kind::Memfd(_) | Kind::File => {
            let Some(inode) = inode(collector, mapping)? else { return Ok(None) };
            crate::scratch::mapped(
                collector,
                inode,
                mapping.shared,
                mapping.write || mapping.flags.has("mw"),
            );
            let offset = mapping.offset;
            Ok(Some(if mapping.shared {
                Maps::Shared { inode, offset, may_write: mapping.flags.has("mw") || mapping.write }
            } else {
                Maps::Private { inode, offset }
            }))
        }
        Kind::SysV(_) => {
            let title = title(mapping);
            let inode = crate::sysv_shm::mapped(collector, mapping, &title)?;
            let may_write = mapping.flags.has("mw") || mapping.write;
            Ok(inode.map(|inode| Maps::Shared { inode, offset: mapping.offset, may_write }))
        }
        Kind::Aio => {
            const REMEDY: &str = "let the program give it up before the dump (io_destroy)";
            self::refuse(collector, mapping, "a ring of asynchronous I/O (io_setup)", REMEDY);
            Ok(None)
        }
        Kind::AnonHugepage => refuse(collector, "memory of explicit huge pages"),
        Kind::AnonInode(_) if crate::io_uring::is_mapped(mapping) => {
            Ok(crate::io_uring::mapped(collector, mapping, &title(mapping)))
        }
        Kind::AnonInode(class) => {
            let what = format!("a mapping of an anonymous inode, `{}`,", String::from_utf8_lossy(class));
            refuse(collector, &what)
        }
        _ => refuse(collector, "a mapping of this kind"),
    }
}

/// The inode of a mapped file.
fn inode(collector: &mut Collector, mapping: &Mapping) -> Result<Option<InodeId>> {
    let path = Bytes(mapping.path.clone());
    let device = libc::makedev(mapping.dev.0, mapping.dev.1);
    if mapping.kind() == Kind::File && !mapping.deleted {
        // Another area of it was met before.
        let known = collector.known_inode(device, mapping.inode);
        if known.is_some_and(|id| collector.leads_to(id, &path)) {
            return Ok(known);
        }
        // The usual case: the path leads to the file.
        if let Some(stat) = stat_path(&path)
            && stat.st_ino == mapping.inode
            && device == stat.st_dev
        {
            if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
                let why = "a mapping of a device cannot be dumped";
                collector.refuse(title(mapping), why, "unmap it before the dump");
                return Ok(None);
            }
            let known = collector.known_inode(stat.st_dev, stat.st_ino);
            let title = title(mapping);
            return Ok(known.or_else(|| crate::inode::by_path(collector, &title, &path, &stat)));
        }
    }
    if let Some(id) = collector.known_inode(device, mapping.inode) {
        note_mapped(collector, id, mapping);
        return Ok(Some(id));
    }
    let (file, stat) = match through_map_files(collector, mapping) {
        Ok(found) => found,
        Err(_) if matches!(mapping.kind(), Kind::SharedAnonymous | Kind::NamedSharedAnonymous(_)) => {
            return Ok(Some(without_map_files(collector, mapping, device)));
        }
        Err(e) => {
            let remedy = match e.kind() {
                std::io::ErrorKind::PermissionDenied => "run torpor with CAP_CHECKPOINT_RESTORE",
                _ => "unmap it before the dump",
            };
            collector.refuse(title(mapping), format!("the file behind it cannot be opened ({e})"), remedy);
            return Ok(None);
        }
    };
    if let Some(id) = collector.known_inode(stat.st_dev, stat.st_ino) {
        return Ok(Some(id));
    }
    let content = Extents::default();
    let source = match mapping.kind() {
        Kind::SharedAnonymous | Kind::NamedSharedAnonymous(_) => Source::SharedMemory { content },
        Kind::Memfd(name) => {
            // SAFETY: F_GET_SEALS takes and fills nothing.
            let seals = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::F_GET_SEALS) };
            Source::Memfd { name: name.into(), seals: seals.max(0) as u32, content }
        }
        _ if stat.st_nlink == 0 => {
            Source::Deleted { path: crate::description::without_deleted(&path), content }
        }
        _ => {
            let title = title(mapping);
            // As /proc/PID/fd shows it.
            let path = if mapping.deleted { [&path[..], b" (deleted)"].concat().into() } else { path };
            return Ok(crate::inode::by_path(collector, &title, &path, &stat));
        }
    };
    let id = collector.add_inode(&stat, source);
    collector.contents.push((id, Content::File(file)));
    Ok(Some(id))
}

/// Opens what an area maps, whatever its path says; needs CAP_CHECKPOINT_RESTORE.
pub(crate) fn through_map_files(
    collector: &Collector,
    mapping: &Mapping,
) -> std::io::Result<(OwnedFd, libc::stat)> {
    let link = format!("/proc/{}/map_files/{:x}-{:x}", collector.pid, mapping.start, mapping.end);
    let file = OwnedFd::from(File::open(link)?);
    let stat = nix::sys::stat::fstat(&file)?;
    Ok((file, stat))
}

/// Anonymous shared memory that cannot be opened: as much of it as is mapped, read from there.
fn without_map_files(collector: &mut Collector, mapping: &Mapping, device: u64) -> InodeId {
    // SAFETY: an all-zero stat is a valid one.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_dev = device;
    stat.st_ino = mapping.inode;
    stat.st_mode = libc::S_IFREG | 0o777;
    let id = collector.add_inode(&stat, Source::SharedMemory { content: Extents::default() });
    collector.contents.push((id, Content::Mapped(collector.pid, Vec::new())));
    note_mapped(collector, id, mapping);
    id
}

/// Adds an area to those an inode's contents are read from.
fn note_mapped(collector: &mut Collector, id: InodeId, mapping: &Mapping) {
    let found = collector.contents.iter_mut().find(|(of, _)| *of == id);
    if let Some((_, Content::Mapped(pid, areas))) = found
        && *pid == collector.pid
    {
        areas.push((mapping.start, mapping.offset, mapping.end - mapping.start));
        let size = &mut collector.objects.inodes[id.0 as usize].size;
        *size = (*size).max(mapping.offset + (mapping.end - mapping.start));
    }
}

/// Whether it is torpor that watches the writes of the process.
fn is_watched(collector: &Collector) -> bool {
    collector.watched.contains(&collector.pid) || keeper::holds(collector.pid)
}

/// The memory map of a process with all that is told of its areas.
pub(crate) fn read(pid: Pid) -> Result<Vec<Mapping>> {
    torpor_kernel::maps::smaps(pid).map_err(Error::kernel(pid, "reading its memory map"))
}

/// Whether areas of a process are watched and nobody says that he does it: a dump has just been killed or has given the
/// watch away, and the kernel is about to take it from the areas.
pub(crate) fn watch_ends(pid: Pid, maps: &[Mapping]) -> bool {
    maps.iter().any(|m| m.flags.has("uw")) && !keeper::holds(pid)
}
