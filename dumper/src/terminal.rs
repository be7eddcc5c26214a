//! Terminals: which are of the tree, and which are from outside.
//!
//! A pseudo terminal whose master is in the tree is kept with all that is in it (`pty`). Of any other, a
//! restore gives the process the terminal it is run on, so what is kept is how it was set up; that is done for what
//! a process has as its standard streams or its controlling terminal. A line that leads elsewhere is refused.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::description::Kind;
use torpor_image::pty::{PtyEnd, Side};
use torpor_image::terminal::{ControllingTerminal, Terminal};
use torpor_image::{Bytes, Pid as ImagePid};
use torpor_kernel::ids::Pid;
use torpor_kernel::stat::{self, Stat};
use torpor_kernel::tty;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::pty::{self, Whose};

/// Bytes of the kernel's `struct termios` (asm-generic/termbits.h): four words, a line, 19 characters.
const TERMIOS: usize = 36;

/// Virtual consoles and serial lines (4), /dev/tty, /dev/console and /dev/ptmx (5), other lines (166, 188,
/// 204, 229), pseudo terminals (Documentation/admin-guide/devices.txt).
pub(crate) fn is_terminal(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    matches!((major, minor), (4 | 166 | 188 | 204 | 229, _) | (5, 0..=2))
        || tty::SLAVE_MAJORS.contains(&major)
}

pub(crate) fn collect(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let named = (libc::major(found.stat.st_rdev), libc::minor(found.stat.st_rdev));
    if found.info.flags & libc::O_PATH as u32 != 0 {
        collector.refuse(
            found.title(),
            "a terminal opened with O_PATH cannot be dumped",
            "close it before the dump",
        );
        return Ok(None);
    }
    let fd = match found.get(collector) {
        // Closed meanwhile.
        Err(_) if collector.live => return Ok(None),
        fd => fd?,
    };
    if named == tty::PTMX {
        return pty::master(collector, found, &fd);
    }
    let real = match tty::device(&fd) {
        Ok(real) => real,
        Err(Errno::EIO) if tty::SLAVE_MAJORS.contains(&named.0) => return pty::hung_up(collector, found),
        Err(_) => {
            collector.refuse(found.title(), "its terminal has hung up", "close it before the dump");
            return Ok(None);
        }
    };
    if tty::SLAVE_MAJORS.contains(&real.0) {
        let device = (named == real).then_some(found.stat.st_dev);
        match pty::whose(collector, real.1, device)? {
            Whose::Refused => return Ok(None),
            Whose::Tree(pty) => {
                let path = found.link.as_slice().into();
                return Ok(Some(Kind::Pty(PtyEnd { pty, side: Side::Slave, path })));
            }
            Whose::Outside => {}
        }
    } else if found.fd > libc::STDERR_FILENO && controls(found.pid) != Some(real) {
        collector.refuse(
            found.title(),
            "a terminal or serial line that is neither a standard stream nor the controlling terminal cannot \
             be dumped",
            "close it before the dump",
        );
        return Ok(None);
    }
    Ok(Some(Kind::Terminal(outside(found, &fd))))
}

fn outside(found: &Found, fd: &OwnedFd) -> Terminal {
    let mut termios = vec![0u8; TERMIOS];
    // SAFETY: TCGETS fills a kernel `struct termios` of that size.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS, termios.as_mut_ptr()) };
    if got != 0 {
        termios.clear();
    }
    let [rows, columns, ..] = tty::size(fd).unwrap_or_default();
    Terminal { path: found.link.as_slice().into(), termios: Bytes(termios), size: (rows, columns) }
}

/// The device of the controlling terminal of a process.
fn controls(pid: Pid) -> Option<(u32, u32)> {
    stat::of_process(pid).ok()?.tty()
}

/// The controlling terminal of the process that is being looked at.
pub(crate) fn controlling(collector: &mut Collector, stat: &Stat) -> Result<Option<ControllingTerminal>> {
    let Some((major, number)) = stat.tty() else { return Ok(None) };
    let pty = match tty::SLAVE_MAJORS.contains(&major) {
        true => pty::whose(collector, number, None)?,
        false => Whose::Outside,
    };
    let pty = if let Whose::Tree(id) = pty { Some(id) } else { None };
    let foreground = (stat.tpgid > 0).then_some(ImagePid(stat.tpgid));
    Ok(Some(ControllingTerminal { pty, foreground }))
}
