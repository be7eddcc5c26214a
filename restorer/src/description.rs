//! Open file descriptions: planning which number each gets, and making them outside of the task.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use torpor_image::description::{Description, Kind};
use torpor_image::lock::Flock;
use torpor_image::task::Task;
use torpor_image::unix::{PeerCredentials, State};
use torpor_image::{DescriptionId, Image};
use torpor_parasite::call;
use torpor_parasite::script::{OpId, Script, Value};

use crate::error::{Error, Result};
use crate::late::{self, Moment};
use crate::open::Opener;
use crate::plan::{Open, Planner};
use crate::{
    eventfd, inet, inode, inotify, io_uring, lock, mqueue, netlink, packet, pidfd, pipe, pty, raw, signalfd,
    terminal, timerfd, udp, unix,
};

/// asm-generic/fcntl.h
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// Where the descriptions of a task are while its table is being built.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    /// The first number that the finished table does not use.
    pub(crate) spare: i32,
    aside: BTreeMap<DescriptionId, OpId>,
}

impl Numbers {
    /// A number for a description until the spare ones are closed.
    pub(crate) fn source(&self, id: DescriptionId) -> Value {
        self.aside.get(&id).map_or(Value::Number(u64::MAX), |op| Value::Result(*op))
    }
}

/// Builds the descriptor table: every description is first duplicated to a number above all that are
/// wanted, so that none is overwritten before it was copied, and from there to its own numbers.
pub(crate) fn plan(script: &mut Script, planner: &mut Planner<'_>, task: &Task) -> Numbers {
    let spare = task.descriptors.last().map_or(0, |d| d.fd + 1);
    let mut numbers = Numbers { spare, aside: BTreeMap::new() };
    let mut wanted: Vec<DescriptionId> = task.descriptors.iter().map(|d| d.description).collect();
    // A set may watch what no number is left for.
    for id in wanted.clone() {
        if let Kind::Epoll(epoll) = &planner.image.objects.descriptions[id.0 as usize].kind {
            wanted.extend(epoll.targets.iter().map(|t| t.description));
        }
    }
    wanted.sort_by_key(|id| (rank(&planner.image.objects.descriptions[id.0 as usize]), *id));
    wanted.dedup();
    for id in wanted {
        let slot = planner.open(Open::Description(id));
        let purpose = format!("{} {id}", planner.image.objects.descriptions[id.0 as usize].kind.noun());
        let slot = planner.descriptor(slot);
        let received = late::moment(planner.image, id) == Some(Moment::Birth);
        let source = if received { late::receive(script, &purpose, slot) } else { slot };
        let args = [source, libc::F_DUPFD_CLOEXEC.into(), spare.into()];
        numbers.aside.insert(id, script.call(purpose.clone(), libc::SYS_fcntl, &args));
        if received {
            script.call(purpose, libc::SYS_close, &[source]);
        }
    }
    for descriptor in &task.descriptors {
        let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
        let source = numbers.source(descriptor.description);
        script.call_for(
            format!("fd {}", descriptor.fd),
            libc::SYS_dup3,
            &[source, descriptor.fd.into(), flags.into()],
            i64::from(descriptor.fd),
        );
    }
    numbers
}

/// Whether a number has another description until the threads are there.
pub(crate) fn is_late(image: &Image, id: DescriptionId) -> bool {
    late::moment(image, id) == Some(Moment::Threads)
}

/// Who gets SIGIO; the numbers are in place, and the owner, if it is this task, exists. `late`: of those
/// descriptions that are in place when the threads are there, else of the others.
pub(crate) fn owners(script: &mut Script, planner: &mut Planner<'_>, task: &Task, late: bool) {
    let image = planner.image;
    let mut done = Vec::new();
    for descriptor in &task.descriptors {
        if late != is_late(image, descriptor.description) {
            continue;
        }
        let description = &image.objects.descriptions[descriptor.description.0 as usize];
        let Some(owner) = description.owner else { continue };
        if done.contains(&descriptor.description) {
            continue;
        }
        done.push(descriptor.description);
        // Another process of that id would get signals that are none of its business.
        let own = owner.id == task.pid.0
            || task.threads.iter().any(|t| t.tid.0 == owner.id)
            || owner.id == task.pgid.0 && task.pgid == task.pid;
        if !own {
            planner.note(format!(
                "{}: the signals of fd {} go to nobody: id {} is not in the image",
                task.title(),
                descriptor.fd,
                owner.id
            ));
            continue;
        }
        let purpose = format!("the owner of fd {}", descriptor.fd);
        let data = script.data(&[owner.kind.to_ne_bytes(), owner.id.to_ne_bytes()].concat());
        call!(script, purpose.clone(), libc::SYS_fcntl, descriptor.fd, F_SETOWN_EX, data);
        if owner.signal != 0 {
            call!(script, purpose.clone(), libc::SYS_fcntl, descriptor.fd, F_SETSIG, owner.signal);
        }
        if description.flags & libc::O_ASYNC as u32 != 0 {
            call!(script, purpose, libc::SYS_fcntl, descriptor.fd, libc::F_SETFL, description.flags);
        }
    }
}

/// Makes the listening Unix sockets that the task made listen tell its credentials to those who connect:
/// listen(2) takes those of its caller, also when it is called again (net/unix/af_unix.c, `unix_listen`). The
/// task has its own by now.
pub(crate) fn listen_again(script: &mut Script, image: &Image, task: &Task) {
    let own = &task.leader().credentials;
    let as_now = |p: &PeerCredentials| {
        p.pid == task.pid.0 && p.uid == own.uids[1] && p.gid == own.gids[1] && p.groups == own.groups
    };
    for descriptor in &task.descriptors {
        let description = &image.objects.descriptions[descriptor.description.0 as usize];
        if let Kind::Unix(unix) = &description.kind
            && let State::Listening { backlog } = unix.state
            && unix.peer_credentials.as_ref().is_none_or(as_now)
        {
            let purpose = format!("the credentials of fd {}", descriptor.fd);
            call!(script, purpose, libc::SYS_listen, descriptor.fd, backlog);
        }
    }
}

/// Closes every number that is not of the finished table.
pub(crate) fn close_others(script: &mut Script, task: &Task) {
    let mut from = 0i64;
    for next in task.descriptors.iter().map(|d| i64::from(d.fd)).chain([i64::from(u32::MAX) + 1]) {
        if next > from {
            call!(script, "closing what is not its own", libc::SYS_close_range, from, next - 1, 0);
        }
        from = next + 1;
    }
}

/// In which order descriptions are made: watches last, lest they see torpor's own doings.
fn rank(description: &Description) -> u8 {
    match &description.kind {
        Kind::Inotify(_) => 5,
        _ => 0,
    }
}

/// What no task has open, but is on its way to one in the queue of a socket, must be made, too.
pub(crate) fn in_flight(planner: &mut Planner<'_>) {
    let image = planner.image;
    let mut wanted: Vec<DescriptionId> = Vec::new();
    for description in &image.objects.descriptions {
        if let Kind::Unix(unix) = &description.kind {
            wanted.extend(unix.attached.iter().flat_map(|a| a.rights.iter().copied()));
        }
    }
    wanted.sort_by_key(|id| (rank(&image.objects.descriptions[id.0 as usize]), *id));
    for id in wanted {
        planner.open(Open::Description(id));
    }
}

/// Makes a description.
pub(crate) fn open(opener: &mut Opener<'_>, id: DescriptionId) -> Result<OwnedFd> {
    let description = &opener.image.objects.descriptions[id.0 as usize];
    let what = opener.name(id);
    if late::moment(opener.image, id).is_some() {
        return late::place(opener, &what, id);
    }
    let fd = match &description.kind {
        Kind::File(inode) => inode::open(opener, &what, *inode, description.flags)?,
        Kind::Pipe(end) => pipe::open(opener, &what, end, description.flags)?,
        Kind::EventFd(eventfd) => eventfd::open(&what, eventfd)?,
        Kind::TimerFd(timer) => timerfd::open(&what, timer, opener.image.manifest.taken_at)?,
        Kind::SignalFd(signalfd) => signalfd::open(&what, signalfd)?,
        Kind::Epoll(_) => {
            // SAFETY: epoll_create1 takes a number only.
            owned(&what, "epoll_create1", unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?
        }
        Kind::Inotify(inotify) => inotify::open(&what, inotify)?,
        Kind::Unix(socket) => unix::open(opener, &what, socket)?,
        Kind::Mqueue(queue) => mqueue::open(opener, &what, *queue, description.flags)?,
        Kind::Inet(socket) => inet::open(opener, &what, socket)?,
        Kind::Terminal(terminal) => terminal::open(opener, &what, id, terminal)?,
        Kind::Udp(socket) => udp::open(&what, socket)?,
        Kind::Raw(socket) => raw::open(&what, socket)?,
        Kind::Netlink(socket) => netlink::open(&what, socket)?,
        Kind::Packet(socket) => packet::open(&what, socket)?,
        Kind::PidFd(pidfd) => pidfd::of(&what, pidfd, description.flags)?,
        Kind::Pty(end) => pty::open(opener, &what, id, end)?,
        Kind::IoUring(ring) => io_uring::open(opener, &what, id, ring)?,
    };
    if !matches!(description.kind, Kind::Terminal(_)) && description.flags & libc::O_PATH as u32 == 0 {
        settle(&what, &fd, description)?;
    }
    Ok(fd)
}

/// Status flags, position and lock.
pub(crate) fn settle(what: &str, fd: &OwnedFd, description: &Description) -> Result<()> {
    // What F_SETFL can change; the rest was given to open(2).
    let flags =
        description.flags as i32 & (libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME);
    let access = description.flags as i32 & libc::O_ACCMODE;
    // SAFETY: these take numbers only.
    unsafe {
        let now = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if now & (libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME) != flags
            && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | access) != 0
        {
            return Err(Error::last(what, "fcntl(F_SETFL)"));
        }
        if matches!(description.kind, Kind::File(_))
            && description.position != 0
            && libc::lseek(fd.as_raw_fd(), description.position as i64, libc::SEEK_SET) < 0
        {
            return Err(Error::last(what, "lseek"));
        }
    }
    if let Some(Flock::Whole { exclusive }) = description.flock {
        let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
        // SAFETY: flock takes numbers only.
        if unsafe { libc::flock(fd.as_raw_fd(), kind | libc::LOCK_NB) } != 0 {
            return Err(match nix::errno::Errno::last() {
                nix::errno::Errno::EWOULDBLOCK => Error::Conflict {
                    what: what.to_owned(),
                    why: "its lock is held by another process".into(),
                    remedy: "stop that process (`lslocks` names it)".into(),
                },
                errno => Error::Open { what: what.to_owned(), call: "flock", errno },
            });
        }
    }
    for part in &description.ofd_locks {
        let flock = lock::flock(part.exclusive, part.start, part.end);
        // SAFETY: F_OFD_SETLK reads a struct flock.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, flock.as_ptr()) } != 0 {
            return Err(match nix::errno::Errno::last() {
                nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES => Error::Conflict {
                    what: what.to_owned(),
                    why: format!("its lock from byte {} on is held by another process", part.start),
                    remedy: "stop that process (`lslocks` names it)".into(),
                },
                errno => Error::Open { what: what.to_owned(), call: "fcntl(F_OFD_SETLK)", errno },
            });
        }
    }
    Ok(())
}

/// Takes the descriptor a call returned.
pub(crate) fn owned(what: &str, call: &'static str, fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::last(what, call));
    }
    // SAFETY: a descriptor that a call just returned belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
