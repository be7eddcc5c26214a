//! Terminals. A restore gives the process the terminal it is run on; what is kept is how it was set up.

use std::os::fd::AsRawFd;

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::terminal::Terminal;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;

/// Bytes of the kernel's `struct termios` (asm-generic/termbits.h): four words, a line, 19 characters.
const TERMIOS: usize = 36;

/// Consoles, /dev/tty and pseudo terminals (Documentation/admin-guide/devices.txt); a pseudo terminal
/// master is none, and a serial line leads somewhere else.
pub(crate) fn is_terminal(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    matches!((major, minor), (4, 0..=63) | (5, 0 | 1) | (136..=143, _))
}

pub(crate) fn collect(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let fd = found.get(collector)?;
    let mut termios = vec![0u8; TERMIOS];
    // SAFETY: TCGETS fills a kernel `struct termios` of that size.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS, termios.as_mut_ptr()) };
    if got != 0 {
        termios.clear();
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills a `struct winsize`.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    Ok(Some(Kind::Terminal(Terminal {
        path: found.link.as_slice().into(),
        termios: Bytes(termios),
        size: (size.ws_row, size.ws_col),
    })))
}
