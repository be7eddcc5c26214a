//! What is on its way through a pseudo terminal: taking it out, and putting it back as it was.
//!
//! Terminals have no peek. What the slave wrote and nobody read from the master lies behind the master's line
//! discipline, which passes everything on as it is; it is put back by writing it to the slave once more, without
//! output processing. What was typed lies in the slave's line discipline (drivers/tty/n_tty.c):
//!
//! - Read by bytes, it is a plain queue.
//! - Read by lines, it has finished lines, which a read gives one at a time, and an unfinished one, which shows
//!   only when the settings are changed to reading by bytes. That change forgets where lines end, so they are
//!   read before. To put lines back, they are typed again under settings in which nothing is special but newline,
//!   end-of-file, and literal-next, which quotes these. A line that ended with end-of-file is typed so; one that
//!   ended with another delimiter (VEOL) likewise, which a reader cannot tell apart.
//!
//! What is typed reaches the line discipline by a kernel thread, under the settings there are by then. They may be
//! put back only when it is there. poll(2) waits for that thread if there is nothing to be read, and the number of
//! unread bytes tells of what can be read; an unfinished line behind finished ones is seen by neither, and typed
//! with TIOCSTI, which does not go through that thread, but wants CAP_SYS_ADMIN.
//!
//! Nothing here allocates, so that a process that was just forked off may call it.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::tty::{self, Termios};

/// More than fits into one direction: 4 KiB of the line discipline, and 16 KiB and a little before it.
pub const ROOM: usize = 64 << 10;
/// How long the kernel's thread may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The special characters while lines are typed: end-of-file and literal-next.
const EOF: u8 = 4;
const NEXT: u8 = 22;

/// Bytes in a fixed place.
#[repr(C)]
pub struct Room {
    length: usize,
    bytes: [u8; ROOM],
}

impl Room {
    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Adds bytes; an error when they do not fit.
    pub fn add(&mut self, bytes: &[u8]) -> nix::Result<()> {
        let end = self.length + bytes.len();
        self.bytes.get_mut(self.length..end).ok_or(Errno::ENOSPC)?.copy_from_slice(bytes);
        self.length = end;
        Ok(())
    }

    /// Reads once.
    fn read(&mut self, fd: BorrowedFd<'_>, most: usize) -> nix::Result<usize> {
        let free = self.bytes.get_mut(self.length..).unwrap_or_default();
        if free.is_empty() {
            return Err(Errno::ENOSPC);
        }
        // SAFETY: the place has room for as many bytes.
        let got = unsafe { libc::read(fd.as_raw_fd(), free.as_mut_ptr().cast(), most.min(free.len())) };
        let got = Errno::result(got)? as usize;
        self.length += got;
        Ok(got)
    }
}

/// How the output of a slave was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Stop {
    /// It was not.
    No = 0,
    /// By the stop character, as with Ctrl-S.
    Typed = 1,
    /// By tcflow(3).
    Flow = 2,
}

/// What is on its way through a pair. All zeros are a pair with nothing on its way.
#[repr(C)]
pub struct Queues {
    /// Written by the slave and not read from the master.
    pub output: Room,
    /// Finished lines: of each the length in two bytes, then its bytes.
    lines: Room,
    /// Typed, not finished; or everything typed that was not read, if it is read by bytes.
    pub unfinished: Room,
    /// Whether output was stopped: a [`Stop`].
    stop: i32,
}

impl Queues {
    /// Nothing.
    pub fn new() -> Box<Self> {
        let mut new = Box::<Self>::new_uninit();
        // SAFETY: it has room for one value, of which all zeros are a valid one.
        unsafe {
            new.as_mut_ptr().write_bytes(0, 1);
            new.assume_init()
        }
    }

    /// Adds a finished line, as a read gives it: with its newline, or without when it ended with end-of-file.
    pub fn add_line(&mut self, line: &[u8]) -> nix::Result<()> {
        let length = u16::try_from(line.len()).map_err(|_| Errno::ENOSPC)?;
        self.lines.add(&length.to_ne_bytes())?;
        self.lines.add(line)
    }

    /// The finished lines.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.lines.filled();
        std::iter::from_fn(move || {
            let (length, after) = rest.split_at_checked(2)?;
            let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
            let (line, after) = after.split_at_checked(length)?;
            rest = after;
            Some(line)
        })
    }

    /// How output was stopped.
    pub fn stop(&self) -> Stop {
        match self.stop {
            1 => Stop::Typed,
            2 => Stop::Flow,
            _ => Stop::No,
        }
    }

    /// Sets how output is stopped.
    pub fn set_stop(&mut self, stop: Stop) {
        self.stop = stop as i32;
    }

    fn nothing_typed(&self) -> bool {
        self.lines.length == 0 && self.unfinished.length == 0
    }
}

/// The two ends of a pair. The slave's descriptor must not block, and nobody else may use the pair meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// The master.
    pub master: BorrowedFd<'a>,
    /// The slave.
    pub slave: BorrowedFd<'a>,
    /// The settings to be put back.
    pub termios: &'a Termios,
    /// Whether the master is in packet mode.
    pub packet: bool,
}

impl Ends<'_> {
    /// Whether [`Ends::take_out`] could find anything: unread bytes, an unfinished line, stopped output.
    pub fn may_hold_something(&self) -> bool {
        let events = tty::poll(self.slave, libc::POLLIN | libc::POLLOUT);
        let _carried_on = tty::poll(self.master, libc::POLLIN);
        self.termios.by_lines()
            || events & libc::POLLOUT == 0
            || tty::unread(self.slave) != Ok(0)
            || tty::unread(self.master) != Ok(0)
    }

    /// Takes everything out. Whatever comes of it, [`Ends::put_back`] must follow.
    pub fn take_out(&self, queues: &mut Queues) -> nix::Result<()> {
        if self.termios.by_lines() {
            loop {
                let begin = queues.lines.length;
                queues.lines.add(&[0; 2])?;
                match queues.lines.read(self.slave, usize::from(u16::MAX)) {
                    Ok(n) => queues.lines.bytes[begin..begin + 2].copy_from_slice(&(n as u16).to_ne_bytes()),
                    Err(errno) => {
                        queues.lines.length = begin;
                        if errno == Errno::EAGAIN {
                            break;
                        }
                        return Err(errno);
                    }
                }
            }
            let by_bytes = Termios { lflag: self.termios.lflag & !libc::ICANON, ..*self.termios };
            tty::set_termios(self.master, &by_bytes)?;
        }
        loop {
            let _carried_on = tty::poll(self.slave, libc::POLLIN);
            if tty::unread(self.slave)? == 0 || queues.unfinished.read(self.slave, ROOM)? == 0 {
                break;
            }
        }
        self.take_output(&mut queues.output)?;
        if tty::poll(self.slave, libc::POLLOUT) & libc::POLLOUT == 0 {
            tty::flow(self.slave, libc::TCOON)?;
            let started = tty::poll(self.slave, libc::POLLOUT) & libc::POLLOUT != 0;
            queues.set_stop(if started { Stop::Flow } else { Stop::Typed });
        }
        Ok(())
    }

    fn take_output(&self, output: &mut Room) -> nix::Result<()> {
        loop {
            let _carried_on = tty::poll(self.master, libc::POLLIN);
            if tty::unread(self.master)? == 0 {
                return Ok(());
            }
            let begin = output.length;
            let got = output.read(self.master, ROOM)?;
            if self.packet && got > 0 {
                // The first byte says that data follow (ioctl_tty(2), TIOCPKT).
                output.bytes.copy_within(begin + 1..begin + got, begin);
                output.length -= 1;
            } else if got == 0 {
                return Ok(());
            }
        }
    }

    /// Puts everything back, and the settings with it. Nothing else may be on its way.
    pub fn put_back(&self, queues: &Queues) -> nix::Result<()> {
        let put = self.put(queues);
        let settings = tty::set_termios(self.master, self.termios);
        let stopped = self.stop(queues.stop());
        if self.packet {
            // Forgets the status that all this has made. None was there before.
            tty::set_packet_mode(self.master, false)?;
            tty::set_packet_mode(self.master, true)?;
        }
        put.and(settings).and(stopped)
    }

    fn put(&self, queues: &Queues) -> nix::Result<()> {
        if queues.nothing_typed() && queues.output.length == 0 {
            return Ok(());
        }
        let mut quiet = quiet(self.termios);
        let unfinished = queues.unfinished.filled();
        // Output that is stopped could not be written; and what is read by bytes cannot be quoted.
        let flow = self.flow_characters();
        if queues.stop() == Stop::Typed || unfinished.iter().any(|b| flow.contains(b)) {
            quiet.iflag &= !libc::IXON;
        }
        tty::set_termios(self.master, &quiet)?;
        write(self.slave, queues.output.filled())?;
        let mut finished = 0;
        for line in queues.lines() {
            if line.is_empty() {
                self.until_unread(finished)?;
                self.type_at_once(&[EOF])?;
                continue;
            }
            let (line, end) = match line.split_last() {
                Some((b'\n', line)) => (line, b'\n'),
                _ => (line, EOF),
            };
            for byte in line {
                write(self.master, self.quoted(&[NEXT, *byte]))?;
            }
            write(self.master, &[end])?;
            finished += line.len() + usize::from(end == b'\n');
        }
        self.until_unread(finished)?;
        if self.termios.by_lines() {
            return unfinished.iter().try_for_each(|byte| self.type_at_once(self.quoted(&[NEXT, *byte])));
        }
        write(self.master, unfinished)?;
        self.until_unread(unfinished.len())
    }

    /// Stops output as it was stopped.
    fn stop(&self, stop: Stop) -> nix::Result<()> {
        match stop {
            Stop::Typed if tty::poll(self.slave, libc::POLLOUT) & libc::POLLOUT != 0 => {
                write(self.master, &[self.termios.cc[libc::VSTOP]])?;
                self.until(|| tty::poll(self.slave, libc::POLLOUT | libc::POLLIN) & libc::POLLOUT == 0)
            }
            Stop::Flow => tty::flow(self.slave, libc::TCOOFF),
            Stop::No | Stop::Typed => Ok(()),
        }
    }

    fn flow_characters(&self) -> [u8; 2] {
        [self.termios.cc[libc::VSTART], self.termios.cc[libc::VSTOP]]
    }

    /// A byte behind the one that quotes it, without that where it stands for itself.
    fn quoted<'b>(&self, pair: &'b [u8; 2]) -> &'b [u8] {
        let byte = pair[1];
        let special = [b'\n', EOF, NEXT].contains(&byte) || self.flow_characters().contains(&byte);
        if special { pair } else { &pair[1..] }
    }

    /// Types something that is there on return.
    fn type_at_once(&self, bytes: &[u8]) -> nix::Result<()> {
        if tty::poll(self.slave, libc::POLLIN) & libc::POLLIN == 0 {
            write(self.master, bytes)?;
            let _carried_on = tty::poll(self.slave, libc::POLLIN);
            return Ok(());
        }
        for byte in bytes {
            // SAFETY: TIOCSTI reads one byte.
            let put = unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSTI, std::ptr::from_ref(byte)) };
            if put != 0 {
                // Without the privilege the kernel's thread is given its time.
                write(self.master, &[*byte])?;
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Waits until that many bytes can be read, or as many as the line discipline holds.
    fn until_unread(&self, count: usize) -> nix::Result<()> {
        /// `N_TTY_BUF_SIZE`, of which one byte stays free.
        const MOST: usize = 4095;
        self.until(|| {
            let _carried_on = tty::poll(self.slave, libc::POLLIN);
            tty::unread(self.slave).is_ok_and(|n| n >= count.min(MOST))
        })
    }

    fn until(&self, ready: impl Fn() -> bool) -> nix::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !ready() {
            if Instant::now() > deadline {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }
}

/// Settings under which nothing that is typed or written is echoed, changed, or acted upon, but what quoting needs.
/// `IXON` stays where it may: without it stopped output goes on.
fn quiet(termios: &Termios) -> Termios {
    let mut quiet = *termios;
    quiet.iflag &= libc::IXON | libc::IXOFF | libc::IUTF8;
    quiet.oflag &= !libc::OPOST;
    quiet.lflag &= libc::ICANON | tty::EXTPROC | libc::TOSTOP;
    if termios.by_lines() {
        quiet.lflag |= libc::IEXTEN;
        for (i, character) in quiet.cc.iter_mut().enumerate() {
            if ![libc::VSTART, libc::VSTOP, libc::VMIN, libc::VTIME].contains(&i) {
                *character = libc::_POSIX_VDISABLE;
            }
        }
        quiet.cc[libc::VEOF] = EOF;
        quiet.cc[libc::VLNEXT] = NEXT;
    }
    quiet
}

/// Writes all of it, waiting for room.
///
/// How much fits depends on how it is written: the kernel takes buffers while those it has are no larger than 8 KiB,
/// of the size of what is written but at least 256 bytes, and fills them twice over (drivers/tty/tty_buffer.c). Most
/// fits in pieces of the smallest size with a large one at the end.
fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> nix::Result<()> {
    const SMALLEST: usize = 256;
    const LARGE: usize = 3584;
    let deadline = Instant::now() + PATIENCE;
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = if rest.len() > LARGE { SMALLEST } else { rest.len() };
        // SAFETY: the bytes are there.
        let put = unsafe { libc::write(fd.as_raw_fd(), rest.as_ptr().cast(), length) };
        match Errno::result(put) {
            Ok(n) => rest = rest.get(n as usize..).unwrap_or_default(),
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_micros(20));
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
