//! The descriptor table: which numbers share an open file description, and what each is open on.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::stat::SFlag;
use torpor_image::description::{Description, Kind, Owner};
use torpor_image::lock::{Flock, OfdLock, PosixLock};
use torpor_image::task::Descriptor;
use torpor_image::{Bytes, DescriptionId};
use torpor_kernel::fdinfo::{Detail, FdInfo, LockKind};
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::Pid;

use crate::collect::{Collector, Known};
use crate::error::{Error, Result};
use crate::opened::Opened;
use crate::{
    anon, epoll, eventfd, inet, inode, inotify, io_uring, lease, mqueue, netlink, packet, pidfd, pipe, raw,
    signalfd, terminal, timerfd, udp, unix, workers,
};

/// fcntl commands libc has no names for (asm-generic/fcntl.h).
const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;
/// Bits of /proc/PID/fdinfo that belong to the descriptor or to the kernel, not to the status flags.
const O_CLOEXEC: u32 = 0o2_000_000;

/// One descriptor, as far as it is known before its kind is.
#[derive(Debug)]
pub(crate) struct Found {
    /// In whose descriptor table it is; torpor's own for what was found in flight.
    pub(crate) pid: Pid,
    pub(crate) fd: i32,
    pub(crate) link: Vec<u8>,
    pub(crate) stat: libc::stat,
    pub(crate) info: FdInfo,
    /// What is told through a descriptor of ours for the same description; of a running process only what is in flight is
    /// asked.
    pub(crate) told: Told,
}

/// What a descriptor of ours tells.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Who is told of what happens to it.
    pub(crate) owner: Option<Owner>,
    pub(crate) pipe: Option<pipe::Filling>,
}

impl Found {
    /// "fd 7 (pipe:[123])"
    pub(crate) fn title(&self) -> String {
        let link = String::from_utf8_lossy(&self.link);
        if self.pid == Pid::this() {
            format!("in flight ({link})")
        } else {
            format!("fd {} ({link})", self.fd)
        }
    }

    /// The file type bits.
    pub(crate) fn file_type(&self) -> SFlag {
        file_type(&self.stat)
    }

    /// A descriptor of ours for the same description.
    pub(crate) fn get(&self, collector: &mut Collector) -> Result<OwnedFd> {
        let failed = |e| Error::kernel(self.pid, format!("reaching {}", self.title()))(e);
        let fd = collector.getfd(self.pid, self.fd).map_err(failed)?;
        // A running process may have closed it, and opened another under its number.
        let same = |s: libc::stat| (s.st_dev, s.st_ino) == (self.stat.st_dev, self.stat.st_ino);
        if collector.live && !nix::sys::stat::fstat(&fd).is_ok_and(same) {
            return Err(failed(torpor_kernel::Error::syscall("fstat", self.fd, nix::errno::Errno::EBADF)));
        }
        Ok(fd)
    }
}

fn file_type(stat: &libc::stat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// What a process has open.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) locks: Vec<PosixLock>,
}

/// Every descriptor of these processes, which are `live` or stand. One that vanishes meanwhile, as happens to a running
/// process, is left out.
pub(crate) fn look(all: &[&Opened], live: bool) -> Result<Vec<Vec<Found>>> {
    let of = |opened: &&Opened, range: Range<usize>| {
        let (pid, shown) = (opened.pid, &opened.shown);
        let pidfd = match live {
            true => None,
            false => Some(fds::pidfd_open(pid).map_err(Error::kernel(pid, "reaching its descriptors"))?),
        };
        let mut all = Vec::with_capacity(range.len());
        for (fd, link) in &opened.fds[range] {
            let look = || {
                let info = shown.fdinfo(*fd)?;
                let (stat, told) = match &pidfd {
                    Some(pidfd) => ask(&fds::getfd(pidfd.as_fd(), *fd)?, &info)?,
                    None => (shown.stat(*fd)?, Told::default()),
                };
                Ok(Found { pid, fd: *fd, link: link.clone(), stat, info, told })
            };
            match look() {
                Ok(found) => all.push(found),
                Err(e) if torpor_kernel::Error::is_gone(&e) => {}
                Err(e) => return Err(Error::kernel(pid, format!("reading fd {fd}"))(e)),
            }
        }
        Ok(all)
    };
    workers::parts(all, |opened| opened.fds.len(), of)
}

/// Asks a descriptor of ours for the same description: that is a shorter way than the one through /proc.
fn ask(fd: &OwnedFd, info: &FdInfo) -> torpor_kernel::Result<(libc::stat, Told)> {
    let stat = nix::sys::stat::fstat(fd)
        .map_err(|errno| torpor_kernel::Error::syscall("fstat", fd.as_raw_fd(), errno))?;
    // One that only stands for a path tells nothing else (open(2), O_PATH).
    if info.flags & libc::O_PATH as u32 != 0 {
        return Ok((stat, Told::default()));
    }
    let pipe = if file_type(&stat) == SFlag::S_IFIFO { pipe::filling(fd).ok() } else { None };
    Ok((stat, Told { owner: owner(fd), pipe }))
}

/// Whether an error says that a descriptor is there no more, or its process.
fn closed(error: &torpor_kernel::Error) -> bool {
    error.is_gone() || error.errno() == Some(nix::errno::Errno::EBADF)
}

/// A descriptor of torpor's own.
pub(crate) fn look_at(fd: &OwnedFd) -> torpor_kernel::Result<Found> {
    let (pid, number) = (Pid::this(), fd.as_raw_fd());
    let info = torpor_kernel::fdinfo::fdinfo(pid, number)?;
    let (stat, told) = ask(fd, &info)?;
    Ok(Found { pid, fd: number, link: fds::readlink(pid, number)?, stat, info, told })
}

/// Collects what is behind the descriptors of a whole tree, `all` of them by process. Gives the tables in the
/// same order.
pub(crate) fn collect(collector: &mut Collector, all: Vec<Vec<Found>>) -> Result<Vec<Table>> {
    let counts: Vec<usize> = all.iter().map(Vec::len).collect();
    let all: Vec<Found> = all.into_iter().flatten().collect();
    unix::scan(collector, &all)?;
    let flight = unix::flight(collector);
    let mut ends: HashMap<(u64, u64), Vec<&Found>> = HashMap::new();
    for found in all.iter().chain(&flight).filter(|f| f.file_type() == SFlag::S_IFIFO) {
        ends.entry((found.stat.st_dev, found.stat.st_ino)).or_default().push(found);
    }
    let owner = same_description(collector, &all)?;
    let mut ids: HashMap<usize, Option<DescriptionId>> = HashMap::new();
    let (mut sets, mut rings) = (Vec::new(), Vec::new());
    let mut tables = Vec::with_capacity(counts.len());
    let mut next = 0;
    for count in counts {
        let mut table = Table::default();
        for i in next..next + count {
            let (found, first) = (&all[i], owner[i]);
            let id = match ids.get(&first) {
                Some(id) => *id,
                None => {
                    collector.turn_to(all[first].pid);
                    let id = match describe(collector, &ends, &all[first]) {
                        // Closed while it was being looked at.
                        Err(Error::Kernel { source, .. }) if collector.live && closed(&source) => None,
                        id => id?,
                    };
                    let kind = id.map(|id| (id, &collector.objects.descriptions[id.0 as usize].kind));
                    match kind {
                        Some((id, Kind::Epoll(_))) => sets.push((id, first)),
                        Some((id, Kind::IoUring(_))) => rings.push((id, &all[first])),
                        _ => {}
                    }
                    ids.insert(first, id);
                    id
                }
            };
            if let Some(description) = id {
                let close_on_exec = found.info.cloexec();
                table.descriptors.push(Descriptor { fd: found.fd, description, close_on_exec });
            }
        }
        table.locks = posix_locks(collector, &all[next..next + count], &table);
        tables.push(table);
        next += count;
    }
    for (i, found) in all.iter().enumerate().filter(|(i, _)| owner[*i] == *i) {
        let inode = (found.stat.st_dev, found.stat.st_ino);
        let id = ids.get(&i).copied().flatten();
        collector.known.push(Known { pid: found.pid, fd: found.fd, inode, id });
    }
    unix::resolve(collector, &ends)?;
    let known: Vec<(Pid, i32, DescriptionId)> =
        all.iter().enumerate().filter_map(|(i, f)| Some((f.pid, f.fd, ids[&owner[i]]?))).collect();
    let whose: Vec<(&Found, DescriptionId)> =
        all.iter().enumerate().filter_map(|(i, f)| Some((f, ids[&owner[i]]?))).collect();
    io_uring::resolve(collector, &rings, &whose);
    for (id, i) in sets {
        collector.turn_to(all[i].pid);
        let targets = epoll::targets(collector, &all[i], &known);
        collector.objects.descriptions[id.0 as usize].kind = Kind::Epoll(targets);
    }
    Ok(tables)
}

impl Collector {
    /// The description behind a descriptor of torpor's own, which it got from a queue; `None` when it was
    /// refused. The descriptor must stay open: those that come later are compared with it. `ends` are those of
    /// pipes and FIFOs, by inode.
    pub(crate) fn describe_own(
        &mut self,
        ends: &HashMap<(u64, u64), Vec<&Found>>,
        fd: &OwnedFd,
    ) -> Result<Option<DescriptionId>> {
        let this = Pid::this();
        let raw = fd.as_raw_fd();
        let found = look_at(fd).map_err(Error::kernel(self.pid, "reading a descriptor in flight"))?;
        let inode = (found.stat.st_dev, found.stat.st_ino);
        for known in self.known.iter().filter(|k| k.inode == inode) {
            // A running process may have closed it since.
            let order = fds::kcmp(known.pid, this, KcmpType::File, known.fd as u64, raw as u64);
            if order.is_ok_and(|order| order == Ordering::Equal) {
                return Ok(known.id);
            }
        }
        // For a while torpor is the process being looked at.
        let theirs = std::mem::replace(&mut self.pid, this);
        let id = describe(self, ends, &found);
        self.pid = theirs;
        let id = id?;
        if let Detail::Epoll(targets) = &found.info.detail
            && !targets.is_empty()
        {
            let why = "an epoll set that no process has open";
            self.refuse(found.title(), why, "try again once it is received");
        }
        self.known.push(Known { pid: this, fd: raw, inode, id });
        Ok(id)
    }
}

/// For each descriptor the first one with the same description, of whichever process. Candidates have the same
/// inode, flags and position; among them kcmp decides, which gives an order, so that each is found by
/// bisection (kcmp(2)). The order of files that stay open does not change: what was found on the running tree is
/// confirmed by one comparison of each with the next.
fn same_description(collector: &mut Collector, all: &[Found]) -> Result<Vec<usize>> {
    let mut buckets: HashMap<(u64, u64, u32, u64), Vec<usize>> = HashMap::new();
    for (i, found) in all.iter().enumerate() {
        let key = (found.stat.st_dev, found.stat.st_ino, found.info.flags & !O_CLOEXEC, found.info.pos);
        buckets.entry(key).or_default().push(i);
    }
    let mut owner: Vec<usize> = (0..all.len()).collect();
    let mut order = Order::new();
    for bucket in buckets.values().filter(|b| b.len() > 1) {
        if confirmed(&collector.order, all, bucket, &mut owner) {
            continue;
        }
        // The first of each description, in the kernel's order.
        let mut sorted: Vec<usize> = Vec::new();
        for &i in bucket {
            let (mut low, mut high) = (0, sorted.len());
            owner[i] = i;
            while low < high {
                let middle = (low + high) / 2;
                match compare(&all[sorted[middle]], &all[i]) {
                    Ok(Ordering::Equal) => {
                        owner[i] = sorted[middle];
                        break;
                    }
                    Ok(Ordering::Less) => low = middle + 1,
                    Ok(Ordering::Greater) => high = middle,
                    // Closed since, or the process is gone, which happens to running ones only.
                    Err(_) if collector.live => break,
                    Err(e) => return Err(Error::kernel(all[i].pid, "comparing descriptors")(e)),
                }
            }
            if owner[i] == i {
                sorted.insert(low.min(sorted.len()), i);
            }
        }
        let ranks: HashMap<usize, u32> = sorted.into_iter().zip(0..).collect();
        order.extend(bucket.iter().map(|i| ((all[*i].pid, all[*i].fd), ranks[&owner[*i]])));
    }
    if collector.live {
        collector.order = order;
    }
    Ok(owner)
}

/// In which order the kernel has descriptions that look alike, by the descriptors for them.
pub(crate) type Order = HashMap<(Pid, i32), u32>;

fn compare(a: &Found, b: &Found) -> torpor_kernel::Result<Ordering> {
    fds::kcmp(a.pid, b.pid, KcmpType::File, a.fd as u64, b.fd as u64)
}

/// Whether descriptors that look alike have the order that was found before. `owner` is filled in then.
fn confirmed(order: &Order, all: &[Found], bucket: &[usize], owner: &mut [usize]) -> bool {
    let rank = |i: &usize| order.get(&(all[*i].pid, all[*i].fd)).map(|rank| (*rank, *i));
    let Some(mut ranks) = bucket.iter().map(rank).collect::<Option<Vec<(u32, usize)>>>() else {
        return false;
    };
    ranks.sort_unstable();
    let same = |pair: &[(u32, usize)]| {
        compare(&all[pair[0].1], &all[pair[1].1]).is_ok_and(|found| found == pair[0].0.cmp(&pair[1].0))
    };
    if !ranks.windows(2).all(same) {
        return false;
    }
    let mut first = ranks[0];
    for (rank, i) in ranks {
        if rank != first.0 {
            first = (rank, i);
        }
        owner[i] = first.1;
    }
    true
}

/// Makes the description behind `found`; `None` when it was refused.
fn describe(
    collector: &mut Collector,
    ends: &HashMap<(u64, u64), Vec<&Found>>,
    found: &Found,
) -> Result<Option<DescriptionId>> {
    let kind = match kind(collector, ends, found) {
        Err(e) if collector.live && e.is_closed() => return Ok(None),
        kind => kind?,
    };
    let Some(kind) = kind else { return Ok(None) };
    let id = DescriptionId(collector.objects.descriptions.len() as u32);
    let (flock, ofd_locks) = locks(found);
    let lease = lease::collect(collector, found, &kind);
    collector.objects.descriptions.push(Description {
        id,
        flags: found.info.flags & !O_CLOEXEC,
        position: found.info.pos,
        owner: found.told.owner,
        flock,
        ofd_locks,
        lease,
        kind,
    });
    Ok(Some(id))
}

fn kind(
    collector: &mut Collector,
    ends: &HashMap<(u64, u64), Vec<&Found>>,
    found: &Found,
) -> Result<Option<Kind>> {
    let unsupported = |collector: &mut Collector, what: &str| {
        collector.refuse(found.title(), format!("{what} cannot be dumped"), "close it before the dump");
        Ok(None)
    };
    if let Some(class) = found.link.strip_prefix(b"anon_inode:") {
        return match &found.info.detail {
            Detail::Eventfd { count, semaphore, .. } => {
                eventfd::collect(collector, found, *count, *semaphore)
            }
            Detail::Timerfd(timer) => timerfd::collect(collector, found, timer).map(Some),
            Detail::Signalfd { mask } => Ok(Some(signalfd::collect(*mask))),
            Detail::Epoll(_) => Ok(Some(epoll::collect())),
            Detail::Inotify(watches) => inotify::collect(collector, found, watches),
            Detail::Pidfd { pid, .. } => Ok(pidfd::collect(collector, found, *pid)),
            // Nothing is told of one while a call has it locked.
            _ if class == b"[io_uring]" => io_uring::collect(collector, found),
            _ if class == b"inotify" => inotify::collect(collector, found, &[]),
            _ if class == b"[eventpoll]" => Ok(Some(epoll::collect())),
            _ => {
                anon::refuse(collector, found, class);
                Ok(None)
            }
        };
    }
    if anon::refuse_pseudo(collector, found) {
        return Ok(None);
    }
    match found.file_type() {
        SFlag::S_IFSOCK if found.link.starts_with(b"socket:[") => socket(collector, found),
        SFlag::S_IFIFO => {
            let ends = ends.get(&(found.stat.st_dev, found.stat.st_ino)).map_or(&[][..], Vec::as_slice);
            pipe::collect(collector, ends, found)
        }
        SFlag::S_IFCHR if terminal::is_terminal(found.stat.st_rdev) => terminal::collect(collector, found),
        SFlag::S_IFREG if mqueue::is_queue(found) => mqueue::collect(collector, found),
        SFlag::S_IFREG | SFlag::S_IFDIR => inode::of_descriptor(collector, found),
        SFlag::S_IFCHR if inode::is_plain_device(found.stat.st_rdev) => {
            inode::of_descriptor(collector, found)
        }
        SFlag::S_IFCHR => unsupported(collector, "a character device other than null, zero, full and random"),
        SFlag::S_IFBLK => unsupported(collector, "a block device"),
        SFlag::S_IFLNK => unsupported(collector, "a symbolic link itself (O_PATH, O_NOFOLLOW)"),
        SFlag::S_IFSOCK => unsupported(collector, "the file of a socket (O_PATH)"),
        _ => unsupported(collector, "a descriptor of this kind"),
    }
}

fn socket(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let fd = match found.get(collector) {
        Ok(fd) => fd,
        // Closed since, by a running process.
        Err(Error::Kernel { source, .. })
            if collector.live && source.errno() == Some(nix::errno::Errno::EBADF) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let option = |name| crate::socket::int_option(&fd, libc::SOL_SOCKET, name);
    let (domain, kind, protocol) =
        (option(libc::SO_DOMAIN), option(libc::SO_TYPE), option(libc::SO_PROTOCOL));
    match (domain, kind, protocol) {
        (Some(libc::AF_UNIX), ..) => unix::collect(collector, found, &fd),
        (
            Some(family @ (libc::AF_INET | libc::AF_INET6)),
            Some(libc::SOCK_STREAM),
            Some(libc::IPPROTO_TCP),
        ) => inet::collect(collector, found, &fd, family),
        (Some(family @ (libc::AF_INET | libc::AF_INET6)), Some(libc::SOCK_DGRAM), Some(protocol)) => {
            udp::collect(collector, found, &fd, family, protocol)
        }
        (Some(family @ (libc::AF_INET | libc::AF_INET6)), Some(libc::SOCK_RAW), Some(protocol)) => {
            raw::collect(collector, found, &fd, family, protocol)
        }
        (Some(libc::AF_NETLINK), Some(kind), Some(protocol)) => {
            netlink::collect(collector, found, &fd, kind, protocol)
        }
        (Some(libc::AF_PACKET), Some(kind @ (libc::SOCK_RAW | libc::SOCK_DGRAM)), _) => {
            packet::collect(collector, found, &fd, kind)
        }
        (domain, kind, protocol) => {
            let what = crate::socket::name(domain, kind, protocol);
            collector.refuse(
                found.title(),
                format!("{what} cannot be dumped yet"),
                "close it before the dump",
            );
            Ok(None)
        }
    }
}

/// Locks of the description itself.
fn locks(found: &Found) -> (Option<Flock>, Vec<OfdLock>) {
    let (mut held, mut parts) = (None, Vec::new());
    for lock in &found.info.locks {
        match lock.kind {
            LockKind::Flock => held = Some(Flock::Whole { exclusive: lock.write }),
            // Leases are looked at by themselves.
            LockKind::Posix | LockKind::Lease | LockKind::Delegation => {}
            LockKind::Ofd => {
                parts.push(OfdLock { exclusive: lock.write, start: lock.start, end: lock.end });
            }
        }
    }
    (held, parts)
}

/// POSIX locks show in the fdinfo of every descriptor of the process on that file.
fn posix_locks(collector: &Collector, all: &[Found], table: &Table) -> Vec<PosixLock> {
    let mut locks: Vec<PosixLock> = Vec::new();
    for found in all {
        if found.info.locks.iter().all(|l| l.kind != LockKind::Posix) {
            continue;
        }
        let Some(descriptor) = table.descriptors.iter().find(|d| d.fd == found.fd) else { continue };
        let kind = &collector.objects.descriptions[descriptor.description.0 as usize].kind;
        let inode = if let Kind::File(id) = kind { Some(*id) } else { None };
        // A lock must be taken through a descriptor that is open for what it locks.
        let mode = found.info.flags & libc::O_ACCMODE as u32;
        for lock in found.info.locks.iter().filter(|l| l.kind == LockKind::Posix) {
            let usable = mode == libc::O_RDWR as u32
                || mode == if lock.write { libc::O_WRONLY as u32 } else { libc::O_RDONLY as u32 };
            let known = locks.iter().any(|l| {
                l.inode == inode && l.start == lock.start && l.end == lock.end && l.exclusive == lock.write
            });
            if usable && !known {
                locks.push(PosixLock {
                    fd: found.fd,
                    inode,
                    exclusive: lock.write,
                    start: lock.start,
                    end: lock.end,
                });
            }
        }
    }
    locks
}

fn owner(fd: &OwnedFd) -> Option<Owner> {
    let mut owner = [0i32; 2];
    // SAFETY: F_GETOWN_EX fills a `struct f_owner_ex`, two ints; F_GETSIG takes nothing.
    let (got, signal) = unsafe {
        (libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()), libc::fcntl(fd.as_raw_fd(), F_GETSIG))
    };
    let set = got == 0 && (owner[1] != 0 || signal > 0);
    set.then_some(Owner { kind: owner[0], id: owner[1], signal: signal.max(0) })
}

/// A path from a link of /proc, without the mark of a deleted file.
pub(crate) fn without_deleted(link: &[u8]) -> Bytes {
    link.strip_suffix(b" (deleted)").unwrap_or(link).into()
}
