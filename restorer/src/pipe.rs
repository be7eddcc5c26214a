//! pipe(7) and fifo(7)

use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use torpor_image::pipe::{Pipe, PipeEnd};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::inode;
use crate::open::Opener;

/// The ends of a pipe from which descriptions are made: an end of its own for every description, as
/// each has flags of its own, by opening it anew through /proc.
#[derive(Debug)]
pub(crate) struct Ends {
    any: OwnedFd,
    _other: Option<OwnedFd>,
}

pub(crate) fn open(opener: &mut Opener<'_>, what: &str, end: &PipeEnd, flags: u32) -> Result<OwnedFd> {
    if !opener.pipes.contains_key(&end.pipe) {
        let pipe = &opener.image.objects.pipes[end.pipe.0 as usize];
        let ends = make(opener, what, pipe)?;
        opener.pipes.insert(end.pipe, ends);
    }
    let ends = &opener.pipes[&end.pipe];
    reopen(what, &ends.any, flags)
}

fn make(opener: &mut Opener<'_>, what: &str, pipe: &Pipe) -> Result<Ends> {
    let (any, write, other) = match pipe.fifo {
        Some(fifo) => {
            // Both ways at once: opening one way would wait for the other (fifo(7)).
            let any = inode::open(opener, what, fifo, (libc::O_RDWR | libc::O_NONBLOCK) as u32)?;
            let write = any.try_clone().map_err(|e| io(what, "dup", &e))?;
            (any, write, None)
        }
        None => {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .map_err(Error::open(what, "pipe2"))?;
            let other = write.try_clone().map_err(|e| io(what, "dup", &e))?;
            (read, write, Some(other))
        }
    };
    // SAFETY: F_SETPIPE_SZ takes a number.
    if unsafe { libc::fcntl(any.as_raw_fd(), libc::F_SETPIPE_SZ, pipe.capacity) } < 0 {
        return Err(Error::last(what, "fcntl(F_SETPIPE_SZ)"));
    }
    let mut rest: &[u8] = &pipe.data;
    while !rest.is_empty() {
        let n = nix::unistd::write(&write, rest).map_err(Error::open(what, "write"))?;
        rest = &rest[n..];
    }
    Ok(Ends { any, _other: other })
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
