//! What must hold inside an image before anyone acts on it.
//!
//! Images come over networks and may be hostile, and a restore runs with privileges: every id, range, and
//! name that later code follows without looking is checked here, once.

mod ipc;

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::Compression;
use crate::data::Stored;
use crate::description::Kind;
use crate::extent::{Extents, PAGE, Record, Where};
use crate::inode::Source;
use crate::io_uring::AREAS;
use crate::keys;
use crate::manifest::Manifest;
use crate::pty::Side;
use crate::read::Image;
use crate::socket::SocketOption;
use crate::task::Task;
use crate::vma::Mapping;
use crate::{DescriptionId, Error, InodeId, Pid, PipeId, PtyId, Result};

/// The largest pid Linux gives (include/linux/threads.h, `PID_MAX_LIMIT`).
const MAX_PID: i32 = 4 << 20;
/// More descriptors than any limit allows (fs/file.c, `sysctl_nr_open_max`).
const MAX_FD: i32 = i32::MAX - 64;

/// Bytes of the kernel's `struct termios` (asm-generic/termbits.h).
const TERMIOS: usize = 36;
/// More POSIX timers than any process has: each takes a pending signal of its limit.
const MAX_TIMER: i32 = 1 << 20;

/// Instructions of a socket filter (linux/filter.h, `BPF_MAXINSNS`).
const MAX_FILTER: usize = 4096;

/// The number in `pages-N.dat`, and how the file is stored: `pages-N.dat.zst`, `pages-N.dat.lz4.age`.
pub fn data_file(name: &str) -> Option<(u32, Stored)> {
    let (rest, encrypted) = name.strip_suffix(keys::SUFFIX).map_or((name, false), |rest| (rest, true));
    let compression = [Compression::Lz4, Compression::Zstd].into_iter().find(|c| rest.ends_with(c.suffix()));
    let rest = compression.map_or(rest, |c| &rest[..rest.len() - c.suffix().len()]);
    let number = rest.strip_prefix("pages-")?.strip_suffix(".dat")?;
    let stored = Stored { compression, encrypted };
    let number = number.parse().ok().filter(|n: &u32| crate::write::data_file_name(*n, stored) == name)?;
    Some((number, stored))
}

/// Whether a file of an image may have this name.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

/// Whether this is the name of a manifest.
pub(crate) fn is_manifest(name: &str) -> bool {
    name.strip_suffix(keys::SUFFIX).unwrap_or(name) == Manifest::FILE
}

/// Checks a manifest by itself.
pub fn manifest(manifest: &Manifest) -> Result<()> {
    let bad = |what: String| Err(Error::damaged(Manifest::FILE, what));
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for file in &manifest.files {
        if !is_plain(&file.name) || is_manifest(&file.name) {
            return bad(format!("`{}` is no name of an image file", file.name.escape_debug()));
        }
        if !names.insert(&file.name) {
            return bad(format!("`{}` is listed twice", file.name));
        }
        if data_file(&file.name).is_some_and(|(number, _)| !numbers.insert(number)) {
            return bad(format!("`{}` is there in two forms", file.name));
        }
    }
    for ancestor in &manifest.ancestors {
        if ancestor.id.is_empty() || ancestor.path.0.is_empty() || ancestor.path.0.contains(&0) {
            return bad("it builds on an image without a name".to_owned());
        }
    }
    for file in &manifest.borrowed {
        if file.ancestor as usize >= manifest.ancestors.len() || !numbers.insert(file.number) {
            return bad(format!("data file {} of another image is nobody's, or listed twice", file.number));
        }
    }
    let mut pids = BTreeSet::new();
    for pid in &manifest.tasks {
        if !(1..=MAX_PID).contains(&pid.0) || !pids.insert(pid) {
            return bad(format!("{pid} is no pid, or is listed twice"));
        }
    }
    for zombie in &manifest.zombies {
        let pid = zombie.pid;
        if !(1..=MAX_PID).contains(&pid.0) || !pids.insert(&zombie.pid) {
            return bad(format!("{pid} is no pid, or is listed twice"));
        }
        if !manifest.tasks.contains(&zombie.ppid) {
            return bad(format!("zombie {pid} has parent {}, which does not live", zombie.ppid));
        }
        if !(1..=MAX_PID).contains(&zombie.pgid.0) || !(1..=MAX_PID).contains(&zombie.sid.0) {
            return bad(format!("zombie {pid} has an impossible process group or session"));
        }
        if !(0..=64).contains(&zombie.exit_signal) {
            return bad(format!("zombie {pid} has an impossible exit signal"));
        }
    }
    if manifest.tasks.first() != Some(&manifest.root) {
        return bad("its first process is not its root".to_owned());
    }
    Ok(())
}

/// Checks every reference from one part of the image to another.
pub fn references(image: &Image) -> Result<()> {
    objects(image)?;
    for (expected, task) in image.manifest.tasks.iter().zip(&image.tasks) {
        if task.pid != *expected {
            return Err(Error::damaged(&Task::file(*expected), "it holds another process"));
        }
        self::task(image, task)?;
    }
    relations(image)
}

/// Every process but the root comes after its parent and after those it shares something with, and no thread
/// id is there twice.
fn relations(image: &Image) -> Result<()> {
    let mut before: BTreeMap<Pid, &Task> = BTreeMap::new();
    let mut ids: BTreeSet<Pid> = image.manifest.zombies.iter().map(|z| z.pid).collect();
    for task in &image.tasks {
        let bad = |what: String| Err(Error::damaged(&Task::file(task.pid), what));
        if !before.is_empty() && !before.contains_key(&task.ppid) {
            return bad(format!("its parent {} does not stand before it", task.ppid));
        }
        if !(1..=MAX_PID).contains(&task.pgid.0) && task.pgid.0 != 0
            || !(1..=MAX_PID).contains(&task.sid.0) && task.sid.0 != 0
        {
            return bad("its process group or session is impossible".to_owned());
        }
        if !(0..=64).contains(&task.exit_signal) || !(0..=64).contains(&task.stop_report) {
            return bad("its exit signal or stop signal is impossible".to_owned());
        }
        if let Some(id) = task
            .threads
            .iter()
            .map(|t| t.tid)
            .chain(task.leader_ended.map(|_| task.pid))
            .find(|t| !ids.insert(*t))
        {
            return bad(format!("thread id {id} is another's as well"));
        }
        let shares = task.shares;
        type Share = fn(&Task) -> Option<Pid>;
        let kinds: [(Option<Pid>, Share); 4] = [
            (shares.memory, |t| t.shares.memory),
            (shares.descriptors, |t| t.shares.descriptors),
            (shares.directories, |t| t.shares.directories),
            (shares.signal_actions, |t| t.shares.signal_actions),
        ];
        for (owner, of) in kinds {
            if let Some(owner) = owner
                && before.get(&owner).is_none_or(|o| of(o).is_some())
            {
                return bad(format!("it shares something with {owner}, which does not stand before it"));
            }
        }
        before.insert(task.pid, task);
    }
    Ok(())
}

fn objects(image: &Image) -> Result<()> {
    let bad = |what: String| Err(Error::damaged("objects.tpr", what));
    let objects = &image.objects;
    for (i, inode) in objects.inodes.iter().enumerate() {
        if inode.id.0 as usize != i {
            return bad(format!("inode {i} is numbered {}", inode.id));
        }
        if inode.size > i64::MAX as u64 {
            return bad(format!("inode {i} is larger than any file"));
        }
        if let Source::Path { path } | Source::Deleted { path, .. } = &inode.source
            && (path.first() != Some(&b'/') || path.contains(&0))
        {
            return bad(format!("inode {i} has no absolute path: {path:?}"));
        }
        if let Source::Process { pid, rest } = &inode.source {
            let known = image.manifest.tasks.contains(pid);
            let plain = !rest.contains(&0) && rest.split(|b| *b == b'/').all(|part| part != b"..");
            if !known || !plain {
                return bad(format!("inode {i} is no file about a process of the image"));
            }
        }
        if let Some(content) = inode.content() {
            extents(image, "objects.tpr", content, |r| {
                r.address + r.length <= inode.size.next_multiple_of(PAGE)
            })?;
        }
    }
    for directory in &objects.directories {
        if directory.path.first() != Some(&b'/') || directory.path.contains(&0) {
            return bad(format!("directory {:?} has no absolute path", directory.path));
        }
    }
    ipc::check(image).or_else(bad)?;
    for (i, pipe) in objects.pipes.iter().enumerate() {
        if pipe.id.0 as usize != i || pipe.data.len() > pipe.capacity as usize {
            return bad(format!("pipe {i} is misnumbered or overfull"));
        }
        if let Some(fifo) = pipe.fifo {
            inode(image, "objects.tpr", fifo)?;
        }
        let mut end = 0;
        for packet in &pipe.packets {
            if packet.length == 0 || packet.offset < end || packet.length > (pipe.data.len() as u32) {
                return bad(format!("pipe {i} has an impossible packet"));
            }
            end = packet.offset.saturating_add(packet.length);
        }
        if end as usize > pipe.data.len() {
            return bad(format!("pipe {i} has a packet beyond its data"));
        }
    }
    let mut masters = BTreeSet::new();
    for (i, pty) in objects.ptys.iter().enumerate() {
        if pty.id.0 as usize != i || !pty.is_possible() {
            return bad(format!("pseudo terminal {i} is misnumbered or impossible"));
        }
    }
    for (i, description) in objects.descriptions.iter().enumerate() {
        if description.id.0 as usize != i {
            return bad(format!("description {i} is numbered {}", description.id));
        }
        if description.ofd_locks.iter().any(|l| l.end.is_some_and(|end| end < l.start || end == u64::MAX)) {
            return bad(format!("description {i} has a lock that ends before it begins"));
        }
        match &description.kind {
            Kind::File(id) => inode(image, "objects.tpr", *id)?,
            Kind::Pipe(end) => pipe(image, end.pipe)?,
            Kind::Pty(end) => {
                pty(image, "objects.tpr", end.pty)?;
                let closed = objects.ptys[end.pty.0 as usize].ptmx.is_empty();
                let twice = end.side == Side::Master && !masters.insert(end.pty);
                if twice || closed && end.side != Side::HungUp {
                    return bad(format!("description {i} is an impossible end of a pseudo terminal"));
                }
            }
            Kind::Epoll(epoll) => {
                for target in &epoll.targets {
                    self::description(image, "objects.tpr", target.description)?;
                }
            }
            Kind::Unix(unix) if !unix.options.iter().all(SocketOption::is_known) => {
                return bad(format!("description {i} has an impossible socket option"));
            }
            Kind::Unix(unix) if unix.damage(objects.descriptions.len()).is_some() => {
                let what = unix.damage(objects.descriptions.len()).unwrap_or_default();
                return bad(format!("description {i}, a unix socket, has {what}"));
            }
            Kind::Inet(inet) if !inet.options.iter().all(SocketOption::is_known) => {
                return bad(format!("description {i} has an impossible socket option"));
            }
            Kind::Inet(inet) if inet.filter.len() % 8 != 0 || inet.filter.len() > 8 * MAX_FILTER => {
                return bad(format!("description {i} has an impossible socket filter"));
            }
            Kind::Udp(udp) if !udp.is_possible() => {
                return bad(format!("description {i} is an impossible {}", udp.noun()));
            }
            Kind::Raw(raw) if !raw.is_possible() => {
                return bad(format!("description {i} is an impossible raw socket"));
            }
            Kind::Netlink(netlink) if !netlink.is_possible() => {
                return bad(format!("description {i} is an impossible netlink socket"));
            }
            Kind::Packet(packet) if !packet.is_possible() => {
                return bad(format!("description {i} is an impossible packet socket"));
            }
            Kind::PidFd(pidfd) if pidfd.pid.is_some_and(|pid| !is_process(image, pid)) => {
                return bad(format!("description {i} is a pidfd of a process that is not in the image"));
            }
            Kind::Mqueue(id) => known("objects.tpr", "message queue", id.0, objects.mqueues.len())?,
            Kind::IoUring(ring) => {
                if let Some(what) = ring.damage() {
                    return bad(format!("description {i}, an io_uring, has {what}"));
                }
                for id in ring.references() {
                    self::description(image, "objects.tpr", id)?;
                }
            }
            Kind::Terminal(terminal) if !matches!(terminal.termios.len(), 0 | TERMIOS) => {
                return bad(format!("description {i} has impossible terminal settings"));
            }
            Kind::Inotify(inotify)
                if inotify.watches.iter().any(|w| !(1..MAX_FD).contains(&w.descriptor)) =>
            {
                return bad(format!("description {i} has an impossible watch"));
            }
            _ => {}
        }
    }
    crate::tcp::check(objects).or_else(bad)
}

fn task(image: &Image, task: &Task) -> Result<()> {
    let file = Task::file(task.pid);
    let bad = |what: String| Err(Error::damaged(&file, what));
    if task.threads.first().is_none_or(|t| (t.tid != task.pid) != task.leader_ended.is_some()) {
        return bad("its first thread is not its leader".to_owned());
    }
    let mut tids = BTreeSet::new();
    for thread in &task.threads {
        if !(1..=MAX_PID).contains(&thread.tid.0) || !tids.insert(thread.tid) {
            return bad(format!("{} is no thread id, or is there twice", thread.tid));
        }
        if thread.xstate.len() > 1 << 16 || thread.xstate.len() % 8 != 0 {
            return bad(format!("thread {} has an impossible vector state", thread.tid));
        }
    }
    if task.signals.actions.len() != 64 || task.limits.len() != 16 || task.timers.interval.len() != 3 {
        return bad("it has too many or too few signal actions, limits or timers".to_owned());
    }
    let pending = task.signals.pending.iter().chain(task.threads.iter().flat_map(|t| &t.signals.pending));
    if pending.into_iter().any(|info| info.len() != 128) {
        return bad("a pending signal is cut off".to_owned());
    }
    if task.timers.posix.iter().any(|t| !(0..MAX_TIMER).contains(&t.id)) {
        return bad("a POSIX timer has an impossible id".to_owned());
    }
    if task.locks.iter().any(|l| l.end.is_some_and(|end| end < l.start || end == u64::MAX)) {
        return bad("a lock ends before it begins".to_owned());
    }
    let mut last = -1;
    for descriptor in &task.descriptors {
        if descriptor.fd <= last || descriptor.fd > MAX_FD {
            return bad(format!("descriptor {} is out of order", descriptor.fd));
        }
        last = descriptor.fd;
        description(image, &file, descriptor.description)?;
    }
    if let Some(id) = task.terminal.and_then(|t| t.pty) {
        pty(image, &file, id)?;
    }
    for path in [&task.cwd, &task.root] {
        if path.first() != Some(&b'/') || path.contains(&0) {
            return bad(format!("{path:?} is no absolute path"));
        }
    }
    let memory = &task.memory;
    inode(image, &file, memory.exe)?;
    let mut end = 0;
    for vma in &memory.vmas {
        let aligned = vma.start % PAGE == 0 && vma.end % PAGE == 0;
        if !aligned || vma.is_empty() || vma.start < end || vma.end > arch::TASK_SIZE {
            return bad(format!("area {:x}-{:x} overlaps another or is impossible", vma.start, vma.end));
        }
        end = vma.end;
        match &vma.mapping {
            Mapping::Private { inode: id, offset } | Mapping::Shared { inode: id, offset, .. } => {
                inode(image, &file, *id)?;
                if offset % PAGE != 0 || offset.checked_add(vma.len()).is_none_or(|e| e > i64::MAX as u64) {
                    return bad(format!("area {:x} maps an impossible part of its file", vma.start));
                }
                let object = &image.objects.inodes[id.0 as usize];
                let beyond = offset + vma.len() > object.size.next_multiple_of(PAGE);
                if (object.is_shared_memory() || object.segment().is_some()) && (beyond || vma.private()) {
                    return bad(format!("area {:x} maps more than its shared memory has", vma.start));
                }
            }
            Mapping::Ring { ring, area } => {
                description(image, &file, *ring)?;
                let Kind::IoUring(of) = &image.objects.descriptions[ring.0 as usize].kind else {
                    return bad(format!("area {:x} maps a ring that is none", vma.start));
                };
                if !AREAS.contains(area) || vma.len() > of.area(*area) {
                    return bad(format!("area {:x} maps an impossible part of its ring", vma.start));
                }
            }
            Mapping::Anonymous { .. } | Mapping::Kernel { .. } => {}
        }
    }
    extents(image, &file, memory.pages, |record| {
        let after = memory.vmas.partition_point(|v| v.end <= record.address);
        let mut at = record.address;
        // A record may run over several areas that lie side by side.
        for vma in &memory.vmas[after..] {
            if at >= record.address + record.length {
                break;
            }
            if vma.start > at || !vma.private() && record.place != Where::Guard {
                return false;
            }
            at = vma.end;
        }
        at >= record.address + record.length
    })
}

fn extents(image: &Image, file: &str, range: Extents, fits: impl Fn(&Record) -> bool) -> Result<()> {
    let bad = |what: &str| Err(Error::damaged(file, what.to_owned()));
    let total = image.all_records().len() as u64;
    if range.first.checked_add(range.count).is_none_or(|end| end > total) {
        return bad("it refers to page records that do not exist");
    }
    let mut end = 0;
    for record in image.records(range) {
        let whole = record.address % PAGE == 0 && record.length % PAGE == 0 && record.offset % PAGE == 0;
        let Some(next) = record.address.checked_add(record.length) else {
            return bad("a page record runs past the end of all addresses");
        };
        if !whole || record.length == 0 || record.address < end || !fits(record) {
            return bad("a page record is out of order or lies outside of its memory");
        }
        end = next;
        if record.place == Where::Data {
            let fits = |size| record.offset.checked_add(record.length).is_some_and(|e| e <= size);
            if !image.data_size(record.file).is_some_and(fits) {
                return bad("a page record refers to data that does not exist");
            }
        }
    }
    Ok(())
}

fn inode(image: &Image, file: &str, id: InodeId) -> Result<()> {
    known(file, "inode", id.0, image.objects.inodes.len())
}

/// Whether a pid is one of the image's processes, living or not.
fn is_process(image: &Image, pid: Pid) -> bool {
    let manifest = &image.manifest;
    manifest.tasks.contains(&pid) || manifest.zombies.iter().any(|z| z.pid == pid)
}

fn pipe(image: &Image, id: PipeId) -> Result<()> {
    known("objects.tpr", "pipe", id.0, image.objects.pipes.len())
}

fn pty(image: &Image, file: &str, id: PtyId) -> Result<()> {
    known(file, "pseudo terminal", id.0, image.objects.ptys.len())
}

fn description(image: &Image, file: &str, id: DescriptionId) -> Result<()> {
    known(file, "description", id.0, image.objects.descriptions.len())
}

fn known(file: &str, what: &str, id: u32, count: usize) -> Result<()> {
    if id as usize >= count {
        return Err(Error::damaged(file, format!("it refers to {what} {id}, which does not exist")));
    }
    Ok(())
}
