//! pipe(7) and fifo(7)

use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use torpor_image::pipe::{Pipe, PipeEnd};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::inode;
use crate::open::Opener;

/// `O_LARGEFILE` as the kernel has it (include/uapi/asm-generic/fcntl.h and arch/arm64): open(2) always sets it on
/// machines of 64 bits, pipe(2) never does, and no call changes it.
const O_LARGEFILE: u32 = if cfg!(target_arch = "aarch64") { 0o400000 } else { 0o100000 };

/// The ends of a pipe from which descriptions are made: an end of its own for every description, as
/// each has flags of its own. The first of each side is what pipe(2) gives; others are opened anew through /proc.
#[derive(Debug)]
pub(crate) struct Ends {
    any: OwnedFd,
    first_read: Option<OwnedFd>,
    first_write: Option<OwnedFd>,
}

pub(crate) fn open(opener: &mut Opener<'_>, what: &str, end: &PipeEnd, flags: u32) -> Result<OwnedFd> {
    if !opener.pipes.contains_key(&end.pipe) {
        let pipe = &opener.image.objects.pipes[end.pipe.0 as usize];
        let ends = make(opener, what, pipe)?;
        opener.pipes.insert(end.pipe, ends);
    }
    let ends = opener.pipes.get_mut(&end.pipe).expect("it was made above");
    if flags & O_LARGEFILE == 0 {
        let first = match flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => ends.first_read.take(),
            libc::O_WRONLY => ends.first_write.take(),
            _ => None,
        };
        if let Some(first) = first {
            return Ok(first);
        }
    }
    // Of a pipe this is no flag of open(2); it is set afterwards.
    reopen(what, &ends.any, flags & !(libc::O_DIRECT as u32))
}

fn make(opener: &mut Opener<'_>, what: &str, pipe: &Pipe) -> Result<Ends> {
    let (any, write, first_read) = match pipe.fifo {
        Some(fifo) => {
            // Both ways at once: opening one way would wait for the other (fifo(7)).
            let any = inode::open(opener, what, fifo, (libc::O_RDWR | libc::O_NONBLOCK) as u32)?;
            let write = any.try_clone().map_err(|e| io(what, "dup", &e))?;
            (any, write, None)
        }
        None => {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .map_err(Error::open(what, "pipe2"))?;
            (read.try_clone().map_err(|e| io(what, "dup", &e))?, write, Some(read))
        }
    };
    // SAFETY: F_SETPIPE_SZ takes a number.
    if unsafe { libc::fcntl(any.as_raw_fd(), libc::F_SETPIPE_SZ, pipe.capacity) } < 0 {
        return Err(Error::last(what, "fcntl(F_SETPIPE_SZ)"));
    }
    let mut at = 0;
    for packet in &pipe.packets {
        let (first, last) = (packet.offset as usize, (packet.offset + packet.length) as usize);
        stream(what, &write, &pipe.data[at..first])?;
        self::packet(what, &write, &pipe.data[first..last])?;
        at = last;
    }
    stream(what, &write, &pipe.data[at..])?;
    let first_write = first_read.is_some().then_some(write);
    Ok(Ends { any, first_read, first_write })
}

fn stream(what: &str, into: &OwnedFd, mut data: &[u8]) -> Result<()> {
    while !data.is_empty() {
        let n = nix::unistd::write(into, data).map_err(Error::open(what, "write"))?;
        data = &data[n..];
    }
    Ok(())
}

/// Writes a packet by way of a pipe of its own: behind a stream whose page has room, the kernel would make it a part
/// of that (fs/pipe.c, `pipe_write`).
fn packet(what: &str, into: &OwnedFd, data: &[u8]) -> Result<()> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_DIRECT)
        .map_err(Error::open(what, "pipe2"))?;
    stream(what, &write, data)?;
    let none = std::ptr::null_mut();
    let (from, into) = (read.as_raw_fd(), into.as_raw_fd());
    // SAFETY: splice takes two descriptors; pipes have no offsets to be told.
    let moved = unsafe { libc::splice(from, none, into, none, data.len(), libc::SPLICE_F_NONBLOCK) };
    if moved != data.len() as isize { Err(Error::last(what, "splice")) } else { Ok(()) }
}

/// Opens what `fd` is open on once more, with `flags` of its own.
pub(crate) fn reopen(what: &str, fd: &OwnedFd, flags: u32) -> Result<OwnedFd> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .expect("a path of digits and slashes has no zero in it");
    // A file that was made without a name shows that, with its flag for directories.
    let flags = if flags as i32 & libc::O_TMPFILE == libc::O_TMPFILE {
        flags as i32 & !libc::O_TMPFILE
    } else {
        flags as i32
    };
    // The link leads to what is open without being followed as a name.
    let flags = (flags & !(libc::O_NOFOLLOW | libc::O_ASYNC)) | libc::O_CLOEXEC | libc::O_NOCTTY;
    // Without O_NONBLOCK a one-way open of a pipe could wait; the flag is set right afterwards.
    // SAFETY: the path ends with a zero.
    owned(what, "open", unsafe { libc::open(path.as_ptr(), flags | libc::O_NONBLOCK) })
}

pub(crate) fn io(what: &str, call: &'static str, error: &std::io::Error) -> Error {
    let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Error::Open { what: what.to_owned(), call, errno }
}
