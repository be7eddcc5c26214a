//! The mark of `SO_PEEK_OFF`, set for a while and put back whatever happens.
//!
//! It belongs to the socket, which the program shares with us: should we be killed, a guardian puts it back before the
//! program runs on.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::guardian::{Guardian, Undo};
use crate::{repair, socket};

/// A mark that is set. Dropped, it is what it was before.
pub(crate) struct Mark {
    _puts_back: Guardian,
}

impl Mark {
    /// Sets the mark to the begin of the queue.
    pub(crate) fn set(fd: &OwnedFd) -> Result<Self, Errno> {
        let before = socket::int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
        let undo = Undo::number(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, before);
        let mark = Mark { _puts_back: Guardian::start(&[undo])? };
        let set = repair::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0);
        set.map_err(|e| e.errno().unwrap_or(Errno::EINVAL))?;
        Ok(mark)
    }
}
