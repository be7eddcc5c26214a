//! The process that keeps the watches over a tree from one dump to the next.
//!
//! A userfaultfd must not be closed between two dumps, and must not lie in the tree's own descriptor tables. So a child
//! of ours holds them until the tree ends or the next dump asks for them, at an abstract Unix socket (unix(7)) whose
//! name is made of the process's pid and start; it gives them away once, to the same user or root, and ends. It makes
//! system calls only, as the guardian does, and stands in nobody's way when it is killed: then nothing is watched, and
//! the next dump copies everything.
//!
//! The kernel tells what was written to whoever asks, and forgets it then, whosesoever the watch is. So one dump only may
//! follow a process: the one that has the socket's name.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, send,
    setsockopt, socket, sockopt,
};
use torpor_kernel::ids::Pid;
use torpor_kernel::write_watch::WriteWatch;
use torpor_kernel::{fds, stat, status};

use super::soft::Soft;
use super::{By, Tracker, Tracking};
use crate::error::{Error, Result};

/// The question.
const TAKE: u8 = b't';
/// Those who may wait for an answer at a time.
const WAITING: i32 = 64;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// Last word of a message, where the descriptor is no userfaultfd.
const SOFT_DIRTY: &str = "soft-dirty";
/// Longest message.
const LONGEST: usize = 256;

/// The name of the socket about a process.
fn name(pid: Pid, started: u64) -> Vec<u8> {
    format!("torpor-track-{pid}-{started}").into_bytes()
}

/// The right to follow a process. Nobody else has it until this is dropped.
#[derive(Debug)]
pub(super) struct Claim(OwnedFd);

impl Claim {
    /// `EADDRINUSE`: somebody follows it.
    pub(super) fn of(pid: Pid, started: u64) -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new_abstract(&name(pid, started))?)?;
        listen(&socket, Backlog::new(WAITING)?)?;
        Ok(Claim(socket))
    }

    /// The same, when who has it may be about to end.
    pub(super) fn soon(pid: Pid, started: u64) -> Result<Self, Errno> {
        for _ in 0..100 {
            match Self::of(pid, started) {
                Err(Errno::EADDRINUSE) => std::thread::sleep(Duration::from_millis(10)),
                claim => return claim,
            }
        }
        Err(Errno::EADDRINUSE)
    }
}

/// Whether a dump of ours follows a process, or keeps a watch over it.
pub(crate) fn holds(pid: Pid) -> bool {
    // Who follows a process for long answers nobody.
    connected(pid).is_ok_and(|socket| socket.is_none_or(|socket| is_trusted(pid, &socket)))
}

/// Takes over all watches over a tree.
pub(super) fn take(pids: impl Iterator<Item = Pid>) -> Tracking {
    let mut tracking = Tracking::default();
    for pid in pids {
        if tracking.watches(pid) {
            continue;
        }
        let Some(socket) = ask(pid, TAKE) else { continue };
        let all: Vec<_> = std::iter::from_fn(|| receive(&socket)).collect();
        let base = all.last().map(|kept| kept.base.clone());
        for Given { pid, started, by, .. } in all {
            if let Ok(claim) = Claim::soon(pid, started) {
                tracking.trackers.insert(pid, Tracker { started, by, claim });
            }
        }
        // Two trees that were dumped apart have no base in common.
        let first = tracking.base.is_none();
        tracking.base = if first { base } else { tracking.base.filter(|b| Some(b) == base.as_ref()) };
    }
    tracking
}

/// Asks whoever keeps a watch over a process.
fn ask(pid: Pid, question: u8) -> Option<OwnedFd> {
    let socket = connected(pid).ok()?.filter(|socket| is_trusted(pid, socket))?;
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty())).ok()?;
    let patience =
        nix::sys::time::TimeVal::from(libc::timeval { tv_sec: PATIENCE.as_secs() as i64, tv_usec: 0 });
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience).ok()?;
    send(socket.as_raw_fd(), &[question], nix::sys::socket::MsgFlags::MSG_NOSIGNAL).ok()?;
    Some(socket)
}

/// A connection to whoever follows a process, which may be named by another thread of it; none if too many others wait for
/// him.
fn connected(pid: Pid) -> Result<Option<OwnedFd>, Errno> {
    let pid = Pid(status::of_process(pid).map_err(|_gone| Errno::ESRCH)?.tgid);
    let started = stat::of_process(pid).map_err(|_gone| Errno::ESRCH)?.starttime;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new_abstract(&name(pid, started))?) {
        Err(Errno::EAGAIN) => Ok(None),
        done => done.map(|()| Some(socket)),
    }
}

/// Nobody else's word is taken for what has changed in a process.
fn is_trusted(pid: Pid, socket: &OwnedFd) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    let owner = status::of_process(pid).map_or(own, |status| status.uids[1]);
    getsockopt(socket, sockopt::PeerCredentials).is_ok_and(|peer| [0, own, owner].contains(&peer.uid()))
}

/// One watch: of which process, and since which image.
struct Given {
    pid: Pid,
    started: u64,
    by: By,
    base: String,
}

fn receive(socket: &OwnedFd) -> Option<Given> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut buffer = [0u8; LONGEST];
    let mut control = nix::cmsg_space!(std::os::fd::RawFd);
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags).ok()?;
    let length = got.bytes;
    let mut fd = None;
    for message in got.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: descriptors that the kernel has just installed for us.
            fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    let text = std::str::from_utf8(&buffer[..length]).ok()?;
    let mut words = text.split(' ');
    let (pid, started) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let base = words.next()?.to_owned();
    let by = match words.next() {
        Some(SOFT_DIRTY) => By::SoftDirty(Soft::taken_up(fd?)),
        _ => By::WriteProtection(WriteWatch::resumed(fd?)),
    };
    Some(Given { pid: Pid(pid), started, by, base })
}

/// What is kept of one process.
struct Kept {
    listener: OwnedFd,
    pidfd: OwnedFd,
    watch: OwnedFd,
    message: Vec<u8>,
}

/// Starts the process that keeps all watches.
pub(super) fn start(tracking: Tracking) -> Result<()> {
    let Tracking { trackers, base, .. } = tracking;
    let Some(base) = base else { return Ok(()) };
    let mut all = Vec::new();
    for (pid, tracker) in trackers {
        let Ok(pidfd) = fds::pidfd_open(pid) else { continue };
        let (watch, more) = match tracker.by {
            By::WriteProtection(watch) => (watch.into(), String::new()),
            By::SoftDirty(soft) => match soft.put_away() {
                Some(fd) => (fd, format!(" {SOFT_DIRTY}")),
                // Nothing is known of it: it counts as changed.
                None => continue,
            },
        };
        let message = format!("{pid} {} {base}{more}", tracker.started).into_bytes();
        all.push(Kept { listener: tracker.claim.0, pidfd, watch, message });
    }
    if all.is_empty() {
        return Ok(());
    }
    let mut polled: Vec<libc::pollfd> = Vec::with_capacity(2 * all.len());
    let poll = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    polled.extend(all.iter().map(|k| poll(k.listener.as_raw_fd())));
    polled.extend(all.iter().map(|k| poll(k.pidfd.as_raw_fd())));
    let mut keep: Vec<i32> = polled.iter().map(|p| p.fd).collect();
    keep.extend(all.iter().map(|k| k.watch.as_fd().as_raw_fd()));
    keep.sort_unstable();
    // SAFETY: takes nothing.
    let own = unsafe { libc::geteuid() };
    // SAFETY: without flags a fork(2) that tells nobody when the child ends. The child makes system calls on memory
    // that was made ready, and exits.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0);
        if pid == 0 {
            serve(&all, &mut polled, &keep, own);
        }
        if pid < 0 {
            let failed = torpor_kernel::Error::last("clone", "");
            return Err(Error::kernel(Pid::this(), "starting the process that keeps the watches")(failed));
        }
    }
    Ok(())
}

/// The life of the child.
///
/// # Safety
/// Must be called in a child made for it, whose descriptors nobody else uses.
unsafe fn serve(all: &[Kept], polled: &mut [libc::pollfd], keep: &[i32], own: u32) -> ! {
    // SAFETY: system calls on numbers, and on memory that this process has to itself.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut signals);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        libc::syscall(libc::SYS_setsid);
        libc::syscall(libc::SYS_chdir, c"/".as_ptr());
        libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, c"torpor-track".as_ptr(), 0, 0, 0);
        let mut from = 0u32;
        for fd in keep {
            let fd = fd.cast_unsigned();
            if fd > from {
                libc::syscall(libc::SYS_close_range, from, fd - 1, 0);
            }
            from = fd + 1;
        }
        libc::syscall(libc::SYS_close_range, from, u32::MAX, 0);
        let mut left = all.len();
        'given: while left > 0 {
            libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1);
            for i in 0..all.len() {
                if polled[all.len() + i].revents != 0 {
                    // It has ended.
                    polled[all.len() + i].fd = -1;
                    left -= 1;
                }
                // What was given away is nobody else's: another dump of later would believe in it.
                if polled[i].revents != 0 && answer(all, polled[i].fd, own) {
                    break 'given;
                }
            }
        }
        loop {
            libc::syscall(libc::SYS_exit_group, 0);
        }
    }
}

/// Answers one question; whether anything was given away by that.
///
/// # Safety
/// As for `serve`.
unsafe fn answer(all: &[Kept], listener: i32, own: u32) -> bool {
    // SAFETY: system calls on numbers, and on memory of this function.
    unsafe {
        let fd = libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC);
        if fd < 0 {
            return false;
        }
        let patience = libc::timeval { tv_sec: PATIENCE.as_secs() as i64, tv_usec: 0 };
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let length = size_of::<libc::timeval>() as libc::socklen_t;
            libc::setsockopt(fd, libc::SOL_SOCKET, option, (&raw const patience).cast(), length);
        }
        let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        let peer_at = (&raw mut peer).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, peer_at, &raw mut length);
        let mut question = 0u8;
        let asked = libc::recv(fd, (&raw mut question).cast(), 1, 0) == 1;
        let allowed = peer.uid == 0 || peer.uid == own;
        let mut gave = false;
        if asked && allowed && question == TAKE {
            // One that cannot be had any more by who asked is not lost by that.
            gave = all.iter().filter(|kept| pass(fd, kept)).count() > 0;
        }
        if gave {
            // Who has asked follows them as soon as it hears nothing more.
            for kept in all {
                libc::close(kept.listener.as_raw_fd());
            }
        }
        libc::close(fd);
        gave
    }
}

/// Whether it was sent.
///
/// # Safety
/// As for `serve`.
unsafe fn pass(to: i32, kept: &Kept) -> bool {
    const ROOM: usize = 64;
    let mut control = [0u64; ROOM / 8];
    let mut part =
        libc::iovec { iov_base: kept.message.as_ptr().cast_mut().cast(), iov_len: kept.message.len() };
    // SAFETY: an all-zero msghdr is a valid one; its buffers are those of this function and of `kept`, with their
    // lengths, and the control message fits.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as _;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(kept.watch.as_fd().as_raw_fd());
        libc::sendmsg(to, &raw const message, libc::MSG_NOSIGNAL) >= 0
    }
}
