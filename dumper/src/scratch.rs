//! Files with a name that live only as long as the program: which of them go into the image.
//!
//! A file on tmpfs is memory with a name, gone with the machine; and programs keep scratch files elsewhere that the
//! next cleaning of /tmp takes away (Open MPI maps some below its session directory, and removes them itself at its
//! end). Nothing says of a file whose it is. What can be known:
//!
//! - statfs(2) tells tmpfs and ramfs. Such a file is part of the memory of those who have it, and is saved if a member
//!   writes to it. Of one that all members only read (nscd maps its tables so) a spare copy is taken: to put it back
//!   would be to take back what others wrote.
//! - statx(2) tells when a file was born, /proc/PID/stat when the root of the tree started. What was born later, or
//!   what a member has open for writing or maps so, counts as the program's own. (Birth alone would not do: a restored
//!   tree is younger than its files.) Of that a spare copy is taken if it is small or mapped shared, up to a bound for
//!   all: it costs time while the program stands. The spare is for the case that the file is missing.
//! - Directories above them, as far as they were born later or belong to the file's owner, and directories that are
//!   held open or worked in and were born later, are noted, to be made again when they are missing.
//!
//! A rule that was given for a path goes before all of that. Deciding is for the time when all tasks were looked at:
//! a file may be mapped by one of them and written by another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use torpor_image::description::Kind;
use torpor_image::directory::Directory;
use torpor_image::inode::Source;
use torpor_image::rules::Rule;
use torpor_image::{Bytes, InodeId};
use torpor_kernel::ids::Pid;

use crate::collect::{Collector, Content, stat_path};
use crate::error::{Error, Result};
use crate::lease;
use crate::rules::Rules;

/// The largest scratch file of which a spare copy is taken though nobody maps it shared.
const SMALL: u64 = 1 << 20;
/// All spare copies together.
const SPARES: u64 = 256 << 20;
/// How much older than the root of the tree a file of its own may seem: a shell makes the log before it starts the
/// program, a restore makes files before it makes processes, and file times are those of the last clock tick.
const EARLIER: i64 = 10_000_000_000;

/// What is known of files until it is decided what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// The rules that were given.
    rules: Rules,
    /// What was born before this is older than the tree; nanoseconds since 1970.
    since: i64,
    uses: BTreeMap<InodeId, Use>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    written: bool,
    shared: bool,
}

/// Which directories above a file are noted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// Those that were born since the tree started.
    Born,
    /// Those and the ones of this user.
    Owner(u32),
    /// All of its file system.
    All,
}

impl Files {
    /// For a tree with this root.
    pub(crate) fn new(rules: Rules, root: Pid) -> Result<Self> {
        let stat = torpor_kernel::stat::of_process(root).map_err(Error::kernel(root, "reading its stat"))?;
        Ok(Files { rules, since: stat.started() - EARLIER, uses: BTreeMap::new() })
    }
}

/// Notes that a description with these flags is open on an inode.
pub(crate) fn opened(collector: &mut Collector, id: InodeId, flags: u32) {
    let writes = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 && flags & libc::O_PATH as u32 == 0;
    collector.files.uses.entry(id).or_default().written |= writes;
}

/// Notes that an inode is mapped.
pub(crate) fn mapped(collector: &mut Collector, id: InodeId, shared: bool, may_write: bool) {
    let used = collector.files.uses.entry(id).or_default();
    used.shared |= shared;
    used.written |= shared && may_write;
}

/// Whether a member has an inode open for writing, or maps it so.
pub(crate) fn is_written(collector: &Collector, id: InodeId) -> bool {
    collector.files.uses.get(&id).is_some_and(|used| used.written)
}

/// Decides of every file with a name that was met, and adds what is to be copied to the collector's contents.
/// `working_directories` are those that the processes work in.
pub(crate) fn decide(
    collector: &mut Collector,
    working_directories: impl Iterator<Item = Bytes>,
) -> Result<()> {
    let mut spares = Vec::new();
    let mut above: Vec<(Bytes, Reach)> = working_directories.map(|cwd| (cwd, Reach::Born)).collect();
    for index in 0..collector.objects.inodes.len() {
        let inode = &collector.objects.inodes[index];
        if let Source::Deleted { path, .. } = &inode.source {
            // It is made where it was, before it loses its name again.
            above.push((parent(path), Reach::Owner(inode.uid)));
        }
        let Source::Path { path } = &inode.source else { continue };
        let (id, path, size, owner) = (inode.id, path.clone(), inode.size, inode.uid);
        let given = collector.files.rules.of(&path);
        let uses = collector.files.uses.get(&id).copied().unwrap_or_default();
        let own = || uses.written || born(&path).is_some_and(|born| born >= collector.files.since);
        match inode.mode & libc::S_IFMT {
            libc::S_IFDIR => above.push((path, Reach::Born)),
            libc::S_IFIFO if given != Some(Rule::Keep) => {
                // It has no more than its name: what is in it is the pipe's.
                collector.objects.inodes[index].rule = Rule::Spare;
                above.push((parent(&path), Reach::Owner(owner)));
            }
            libc::S_IFREG => match given {
                Some(Rule::Save) => {
                    save(collector, id, &path, true)?;
                    above.push((parent(&path), Reach::All));
                }
                Some(rule) => collector.objects.inodes[index].rule = rule,
                None => {
                    let volatile = in_memory(&path);
                    if volatile && uses.written {
                        save(collector, id, &path, false)?;
                        above.push((parent(&path), Reach::All));
                    } else if volatile || (uses.shared || size <= SMALL) && own() {
                        // Of a sparse file that is less than its size.
                        let stored =
                            stat_path(&path).map_or(size, |s| (s.st_blocks as u64).saturating_mul(512));
                        let reach = if volatile { Reach::All } else { Reach::Owner(owner) };
                        spares.push((stored.min(size), id, path, reach));
                    }
                }
            },
            _ => {}
        }
    }
    // Small ones first: they are the most likely to be missed.
    spares.sort_by_key(|(size, id, ..)| (*size, *id));
    let mut total = 0;
    for (size, id, path, reach) in spares {
        total += size;
        if total > SPARES {
            collector.losses.push(format!(
                "the contents of `{path}`, with which spare copies of files are more than {} MiB: it must be \
                 there at the restore (`--save-files` takes it along)",
                SPARES >> 20
            ));
        } else if spare(collector, id, &path) {
            above.push((parent(&path), reach));
        }
    }
    for description in &collector.objects.descriptions {
        if let Kind::Unix(socket) = &description.kind
            && let Some(file) = &socket.file
        {
            above.push((parent(&file.path), Reach::Owner(file.uid)));
        }
    }
    directories(collector, above);
    Ok(())
}

/// Takes the contents of a file along, whatever becomes of the file.
fn save(collector: &mut Collector, id: InodeId, path: &Bytes, given: bool) -> Result<()> {
    match open(collector, id, path) {
        Ok(()) => collector.objects.inodes[id.0 as usize].rule = Rule::Save,
        Err(e) if given => {
            let why = format!("it is to be saved and cannot be read ({e})");
            collector.refuse(format!("`{path}`"), why, "run torpor as a user who may read it");
        }
        Err(e) => collector.losses.push(format!(
            "the contents of `{path}`, which cannot be read ({e}): it must be there at the restore"
        )),
    }
    Ok(())
}

/// Takes a spare copy of a file if that can be had.
fn spare(collector: &mut Collector, id: InodeId, path: &Bytes) -> bool {
    let read = open(collector, id, path).is_ok();
    if read {
        collector.objects.inodes[id.0 as usize].rule = Rule::Spare;
    }
    read
}

/// Opens a file to be copied; it is still the one that was met.
fn open(collector: &mut Collector, id: InodeId, path: &Bytes) -> std::io::Result<()> {
    if lease::exclusive(collector).contains(&id) {
        // Its holder would be told to give it up.
        return Err(nix::errno::Errno::EWOULDBLOCK.into());
    }
    let open = |flags| std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path.path());
    // To read without a trace is for the owner only.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file: File = open(flags | libc::O_NOATIME).or_else(|_| open(flags))?;
    let stat = nix::sys::stat::fstat(&file)?;
    let inode = &mut collector.objects.inodes[id.0 as usize];
    if (stat.st_dev, stat.st_ino) != (inode.device, inode.number) {
        return Err(std::io::Error::other("another file has its name by now"));
    }
    inode.size = stat.st_size as u64;
    inode.modified = stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec;
    collector.contents.push((id, Content::File(file.into())));
    Ok(())
}

/// Notes directories and those above them, each as far as it reaches.
fn directories(collector: &mut Collector, wanted: Vec<(Bytes, Reach)>) {
    let mut found: BTreeMap<Bytes, Directory> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (path, reach) in wanted {
        let mut next = Some(path.path());
        while let Some(dir) = next {
            let name = Bytes::from(dir.as_os_str().as_encoded_bytes());
            // What is above one that was met is done as well.
            if !seen.insert((name.clone(), reach)) {
                break;
            }
            let Some(directory) = lasting(&collector.files, dir, &name, reach) else { break };
            found.insert(name, directory);
            next = dir.parent();
        }
    }
    collector.objects.directories = found.into_values().collect();
}

/// The directory at `path`, if it is one that is made again.
fn lasting(files: &Files, path: &Path, name: &Bytes, reach: Reach) -> Option<Directory> {
    let stat = nix::sys::stat::lstat(path).ok().filter(|s| s.st_mode & libc::S_IFMT == libc::S_IFDIR)?;
    // The root of a file system is there as soon as that is mounted.
    let above = nix::sys::stat::lstat(path.parent()?).ok()?;
    if above.st_dev != stat.st_dev || files.rules.of(name) == Some(Rule::Keep) {
        return None;
    }
    let wanted = match reach {
        Reach::All => true,
        // A directory where everybody may put things is nobody's.
        Reach::Owner(uid) if uid == stat.st_uid && stat.st_mode & libc::S_ISVTX == 0 => true,
        _ => in_memory(name) || born(name).is_some_and(|born| born >= files.since),
    };
    wanted.then(|| Directory { path: name.clone(), mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid })
}

fn parent(path: &Bytes) -> Bytes {
    path.path().parent().map_or(&b"/"[..], |p| p.as_os_str().as_encoded_bytes()).into()
}

/// Whether a file system has no more than memory to keep its files in (tmpfs(5), Documentation/filesystems/ramfs).
pub(crate) fn in_memory(path: &Bytes) -> bool {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    let Ok(name) = std::ffi::CString::new(path.0.as_slice()) else { return false };
    // SAFETY: an all-zero statfs is a valid one to be filled.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero, and `fs` is a statfs of ours.
    let got = unsafe { libc::statfs(name.as_ptr(), &raw mut fs) };
    got == 0 && [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.f_type)
}

/// When a file was born, in nanoseconds since 1970; where the file system does not tell, when it was last changed,
/// which is no earlier (statx(2)).
fn born(path: &Bytes) -> Option<i64> {
    let name = std::ffi::CString::new(path.0.as_slice()).ok()?;
    // SAFETY: an all-zero statx is a valid one to be filled.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_SYMLINK_NOFOLLOW, libc::STATX_BTIME | libc::STATX_CTIME);
    // SAFETY: the path ends with a zero, and `statx` is one of ours.
    let got = unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), flags, mask, &raw mut statx) };
    let time = if statx.stx_mask & libc::STATX_BTIME != 0 { statx.stx_btime } else { statx.stx_ctime };
    (got == 0).then(|| time.tv_sec.saturating_mul(1_000_000_000) + i64::from(time.tv_nsec))
}
