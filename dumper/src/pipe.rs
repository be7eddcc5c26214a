//! pipe(7) and fifo(7): contents through tee(2), which leaves them where they are.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use torpor_image::description::Kind;
use torpor_image::pipe::{Packet, Pipe, PipeEnd};
use torpor_image::{Bytes, InodeId};
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::{freeze, inode};

/// How large a pipe is, and how full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filling {
    capacity: i32,
    /// Bytes that wait in it.
    waiting: i32,
}

/// Asks one of its ends; else the call that has failed, and why.
pub(crate) fn filling(fd: &OwnedFd) -> std::result::Result<Filling, (&'static str, Errno)> {
    let capacity = fcntl(fd, FcntlArg::F_GETPIPE_SZ).map_err(|errno| ("fcntl(F_GETPIPE_SZ)", errno))?;
    let mut waiting = 0i32;
    // SAFETY: FIONREAD fills an int.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut waiting) } {
        0 => Ok(Filling { capacity, waiting }),
        _ => Err(("ioctl(FIONREAD)", Errno::last())),
    }
}

/// Collects the pipe behind `found`; `all` are the descriptors of the tree for it.
pub(crate) fn collect(collector: &mut Collector, all: &[&Found], found: &Found) -> Result<Option<Kind>> {
    let named = !found.link.starts_with(b"pipe:[");
    if found.info.flags & libc::O_PATH as u32 != 0 {
        return Ok(inode::by_path(collector, &found.title(), &found.link.as_slice().into(), &found.stat)
            .map(Kind::File));
    }
    let key = (found.stat.st_dev, found.stat.st_ino);
    let ends = || all.iter().copied();
    let mode = |f: &Found| f.info.flags & libc::O_ACCMODE as u32;
    let reader = ends().find(|f| mode(f) != libc::O_WRONLY as u32);
    let writer = ends().find(|f| mode(f) != libc::O_RDONLY as u32);
    if reader.is_none() || writer.is_none() {
        let other = if reader.is_none() { "read" } else { "written" };
        // What is on its way in queues shows in full only when the process stands.
        let silent = named && writer.is_none();
        if !collector.sockets.unseen() && has_other_end(&found.get(collector)?) {
            let holder = holder(collector, found);
            if !silent || holder.is_some() {
                let holder = holder.unwrap_or_else(|| "another process".to_owned());
                collector.refuse(
                    found.title(),
                    format!("it is {other} by {holder}, which is not part of the dump"),
                    "dump a tree with both ends, or start the program with its standard streams on files or a terminal",
                );
                return Ok(None);
            }
        }
    }
    if let Some(pipe) = collector.known_pipe(key) {
        return Ok(Some(Kind::Pipe(PipeEnd { pipe })));
    }
    let mut fifo: Option<InodeId> = None;
    if named {
        fifo = match collector.known_inode(key.0, key.1) {
            Some(id) => Some(id),
            None => inode::by_path(collector, &found.title(), &found.link.as_slice().into(), &found.stat),
        };
        if fifo.is_none() {
            return Ok(None);
        }
    }
    let filling = match found.told.pipe {
        Some(filling) => filling,
        None => filling(&found.get(collector)?).map_err(|(call, errno)| failed(found, call, errno))?,
    };
    let (data, packets) = match reader {
        // Every buffer of a pipe has bytes in it.
        Some(reader) if !collector.live && filling.waiting > 0 => {
            contents(collector, reader, filling.capacity)?
        }
        _ => (Bytes::default(), Vec::new()),
    };
    let number = found.stat.st_ino;
    let pipe =
        collector.pipe(key, |id| Pipe { id, number, capacity: filling.capacity as u32, data, packets, fifo });
    Ok(Some(Kind::Pipe(PipeEnd { pipe })))
}

/// Whether somebody else holds the end that this process does not: the kernel reports a hang-up (read
/// end) or an error (write end) when nobody does (pipe(7)).
fn has_other_end(fd: &OwnedFd) -> bool {
    let mut poll_fd = [PollFd::new(fd.as_fd(), PollFlags::empty())];
    let _ready = poll(&mut poll_fd, PollTimeout::ZERO);
    let alone = PollFlags::POLLHUP | PollFlags::POLLERR;
    !poll_fd[0].revents().is_some_and(|r| r.intersects(alone))
}

/// A process outside of the tree that has a pipe or FIFO open, as "pid 901 (cat)". A reader of a FIFO is told of a hang-up
/// only if there ever was a writer (fs/pipe.c, `pipe_poll`), so one that nobody has ever written to looks as if somebody
/// would. Processes that we may not look at are not seen.
fn holder(collector: &Collector, found: &Found) -> Option<String> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let same = |pid: Pid, fd: i32| {
        fds::readlink(pid, fd).is_ok_and(|link| link == found.link)
            && fds::stat(pid, fd)
                .is_ok_and(|s| (s.st_dev, s.st_ino) == (found.stat.st_dev, found.stat.st_ino))
    };
    pids.filter(|pid| !collector.is_member(*pid) && *pid != Pid::this().0)
        .map(Pid)
        .find(|pid| fds::list(*pid).is_ok_and(|all| all.into_iter().any(|fd| same(*pid, fd))))
        .map(|pid| format!("pid {pid} ({})", freeze::name_of(pid.0)))
}

fn failed(found: &Found, call: &'static str, errno: Errno) -> Error {
    let error = torpor_kernel::Error::syscall(call, found.fd, errno);
    Error::kernel(found.pid, format!("reading {}", found.title()))(error)
}

/// Copies what is in a pipe without taking it out, and tells packets from the stream.
///
/// A pipe is a ring of buffers; one that was written with `O_DIRECT` is a packet: a read takes no more than that one,
/// and all of it (fs/pipe.c, `PIPE_BUF_FLAG_PACKET`). The flag follows a buffer through tee(2) and splice(2), and is
/// seen only by its effect. So each buffer of the copy is moved by itself, through a pipe with room for one, to where
/// a byte of ours stands behind it: a read that asks for both gets that byte too, unless the buffer is a packet.
fn contents(collector: &mut Collector, reader: &Found, capacity: i32) -> Result<(Bytes, Vec<Packet>)> {
    let fail = |call: &'static str, errno| failed(reader, call, errno);
    let new = |size: i32| -> Result<(OwnedFd, OwnedFd)> {
        let ends = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| fail("pipe2", e))?;
        fcntl(&ends.1, FcntlArg::F_SETPIPE_SZ(size)).map_err(|e| fail("fcntl(F_SETPIPE_SZ)", e))?;
        Ok(ends)
    };
    let from = reader.get(collector)?;
    // As many slots as the original: its buffers may each be filled only in part.
    let (copy, into) = new(capacity)?;
    // SAFETY: tee takes two descriptors and no memory.
    let got =
        unsafe { libc::tee(from.as_raw_fd(), into.as_raw_fd(), i32::MAX as usize, libc::SPLICE_F_NONBLOCK) };
    if got < 0 {
        return match Errno::last() {
            Errno::EAGAIN => Ok((Bytes::default(), Vec::new())),
            e => Err(fail("tee", e)),
        };
    }
    let (one, into_one) = new(4096)?;
    let (two, into_two) = new(4 * 4096)?;
    let mut data = Vec::with_capacity(got as usize);
    let mut packets = Vec::new();
    while data.len() < got as usize {
        let length = move_buffers(&copy, &into_one).map_err(|e| fail("splice", e))?;
        move_buffers(&one, &into_two).map_err(|e| fail("splice", e))?;
        nix::unistd::write(&into_two, &[0]).map_err(|e| fail("write", e))?;
        let mut buffer = vec![0u8; length + 1];
        let read = nix::unistd::read(&two, &mut buffer).map_err(|e| fail("read", e))?;
        if read == length {
            packets.push(Packet { offset: data.len() as u32, length: length as u32 });
            nix::unistd::read(&two, &mut [0]).map_err(|e| fail("read", e))?;
        }
        data.extend_from_slice(&buffer[..length]);
    }
    Ok((data.into(), packets))
}

/// Moves as many buffers as there is room for, whole, and tells their bytes.
fn move_buffers(from: &OwnedFd, into: &OwnedFd) -> nix::Result<usize> {
    let none = std::ptr::null_mut();
    let (from, into, all) = (from.as_raw_fd(), into.as_raw_fd(), i32::MAX as usize);
    // SAFETY: splice takes two descriptors; pipes have no offsets to be told.
    let moved = unsafe { libc::splice(from, none, into, none, all, libc::SPLICE_F_NONBLOCK) };
    match Errno::result(moved)? {
        // It would go on for ever.
        0 => Err(Errno::EIO),
        moved => Ok(moved as usize),
    }
}
