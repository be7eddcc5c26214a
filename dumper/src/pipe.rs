//! pipe(7) and fifo(7): contents through tee(2), which leaves them where they are.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use torpor_image::description::Kind;
use torpor_image::pipe::{Pipe, PipeEnd};
use torpor_image::{Bytes, InodeId};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};
use crate::inode;

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
    if !named && ends().any(|f| f.info.flags & libc::O_DIRECT as u32 != 0) {
        collector.refuse(
            found.title(),
            "a pipe of packets (O_DIRECT) cannot be dumped yet",
            "close it before the dump",
        );
        return Ok(None);
    }
    if reader.is_none() || writer.is_none() {
        let other = if reader.is_none() { "read" } else { "written" };
        if has_other_end(&found.get(collector)?) {
            collector.refuse(
                found.title(),
                format!("it is {other} by another process, which is not part of the dump"),
                "start the program with its standard streams on files or a terminal",
            );
            return Ok(None);
        }
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
    let any = found.get(collector)?;
    let capacity = fcntl(&any, FcntlArg::F_GETPIPE_SZ).map_err(|e| {
        Error::kernel(collector.pid, found.title())(torpor_kernel::Error::syscall(
            "fcntl(F_GETPIPE_SZ)",
            found.fd,
            e,
        ))
    })?;
    let data = match reader {
        Some(reader) if !collector.live => contents(collector, reader, capacity)?,
        _ => Bytes::default(),
    };
    let number = found.stat.st_ino;
    let pipe = collector.pipe(key, |id| Pipe { id, number, capacity: capacity as u32, data, fifo });
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

/// Copies what is in a pipe without taking it out.
fn contents(collector: &mut Collector, reader: &Found, capacity: i32) -> Result<Bytes> {
    let pid = reader.pid;
    let fail = |call: &'static str, errno| {
        Error::kernel(pid, format!("reading {}", reader.title()))(torpor_kernel::Error::syscall(
            call, reader.fd, errno,
        ))
    };
    let from = reader.get(collector)?;
    let (out, into) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| fail("pipe2", e))?;
    // As many slots as the original: its buffers may each be filled only in part.
    fcntl(&into, FcntlArg::F_SETPIPE_SZ(capacity)).map_err(|e| fail("fcntl(F_SETPIPE_SZ)", e))?;
    // SAFETY: tee takes two descriptors and no memory.
    let got =
        unsafe { libc::tee(from.as_raw_fd(), into.as_raw_fd(), i32::MAX as usize, libc::SPLICE_F_NONBLOCK) };
    if got < 0 {
        return match nix::errno::Errno::last() {
            nix::errno::Errno::EAGAIN => Ok(Bytes::default()),
            e => Err(fail("tee", e)),
        };
    }
    drop(into);
    let mut data = vec![0u8; got as usize];
    File::from(out)
        .read_exact(&mut data)
        .map_err(|e| fail("read", nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))?;
    Ok(data.into())
}
