//! Terminals: the one this restore is run on takes the place of the one at the dump.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use torpor_image::DescriptionId;
use torpor_image::terminal::Terminal;

use crate::error::Result;
use crate::open::Opener;
use crate::pipe::io;

/// The standard stream of torpor that stands for a description: the one of the same number, or its
/// standard input.
pub(crate) fn open(
    opener: &mut Opener<'_>,
    what: &str,
    id: DescriptionId,
    terminal: &Terminal,
) -> Result<OwnedFd> {
    let numbers = opener.image.tasks.iter().flat_map(|t| &t.descriptors);
    let number = numbers.filter(|d| d.description == id).map(|d| d.fd).find(|fd| *fd <= 2).unwrap_or(0);
    // SAFETY: standard streams stay open for the life of the process.
    let stream = unsafe { BorrowedFd::borrow_raw(number) };
    let fd = stream.try_clone_to_owned().map_err(|e| io(what, "dup", &e))?;
    // SAFETY: isatty takes a number.
    if !terminal.termios.is_empty() && unsafe { libc::isatty(fd.as_raw_fd()) } == 1 {
        let kept = fd.try_clone().map_err(|e| io(what, "dup", &e))?;
        opener.terminals.push((kept, terminal.termios.clone()));
    }
    Ok(fd)
}

/// Sets a terminal up as it was at the dump: done last, when nothing can fail any more.
pub(crate) fn set_up(fd: &OwnedFd, termios: &[u8]) {
    // A process in the background would be stopped for this (SIGTTOU, termios(3)).
    let stop = SigSet::from(Signal::SIGTTOU);
    let before = stop.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    // SAFETY: TCSETS reads a kernel `struct termios`, whose length was checked when the image was read.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCSETS, termios.as_ptr()) };
    if let Ok(before) = before {
        let _cannot_fail = before.thread_set_mask();
    }
}
