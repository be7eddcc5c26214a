//! The queues and sequence numbers of TCP sockets, read so that the sockets are as before.
//!
//! What was received is peeked at. What was sent and not received can be read in repair mode only (see
//! `torpor_kernel::tcp`), each socket being in it no longer than for that, and never without a guardian.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_kernel::tcp::{self, Queue};
use torpor_kernel::{Error, Result};

use crate::guardian::Undo;
use crate::socket;

/// What one more segment at the head of a send queue may hold: acknowledged parts of it are still there.
const SEGMENT: usize = 1 << 20;

/// More than enough for any window to grow to any queue.
const ROUNDS: u32 = 10_000;
/// asm-generic/socket.h
const SO_BUF_LOCK: i32 = 72;

/// How a socket is put back after [`in_repair`] and [`peek`].
pub(crate) fn undo(fd: &OwnedFd) -> Vec<Undo> {
    let fd_ = fd.as_fd();
    let mut all = vec![
        Undo::number(fd_, libc::IPPROTO_TCP, tcp::TCP_REPAIR, tcp::REPAIR_OFF),
        Undo::number(fd_, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse(fd)),
    ];
    if let Some(offset) = peek_offset(fd) {
        all.push(Undo::number(fd_, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset));
    }
    all
}

fn reuse(fd: &OwnedFd) -> i32 {
    socket::int_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap_or(0)
}

/// `SO_PEEK_OFF`, where it is in force.
pub(crate) fn peek_offset(fd: &OwnedFd) -> Option<i32> {
    socket::int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).filter(|offset| *offset >= 0)
}

/// Runs `look` on a socket in repair mode.
pub(crate) fn in_repair<T>(fd: &OwnedFd, look: impl FnOnce(&OwnedFd) -> Result<T>) -> Result<T> {
    let reuse = reuse(fd);
    tcp::set_repair(fd.as_fd(), 1)?;
    let result = look(fd);
    tcp::set_repair(fd.as_fd(), tcp::REPAIR_OFF).or_else(|_old_kernel| tcp::set_repair(fd.as_fd(), 0))?;
    set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    result
}

/// The number behind the last byte to be sent, of a socket in repair mode.
pub(crate) fn send_end(fd: &OwnedFd, fin: bool) -> Result<u32> {
    tcp::set_queue(fd.as_fd(), Queue::Send)?;
    let end = tcp::sequence(fd.as_fd());
    tcp::set_queue(fd.as_fd(), Queue::None)?;
    Ok(end?.wrapping_sub(u32::from(fin)))
}

/// The number behind the last byte received, of a socket in repair mode.
pub(crate) fn receive_end(fd: &OwnedFd) -> Result<u32> {
    tcp::set_queue(fd.as_fd(), Queue::Receive)?;
    let end = tcp::sequence(fd.as_fd());
    tcp::set_queue(fd.as_fd(), Queue::None)?;
    end
}

/// What a socket has sent, or is to send, and the peer has not acknowledged; the number behind its last byte.
#[derive(Debug, Default)]
pub(crate) struct Unacknowledged {
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: u32,
}

/// Reads the send queue of a socket in repair mode. `fin`: its end is a FIN.
pub(crate) fn unacknowledged(fd: &OwnedFd, fin: bool) -> Result<Unacknowledged> {
    tcp::set_queue(fd.as_fd(), Queue::Send)?;
    let end = tcp::sequence(fd.as_fd())?.wrapping_sub(u32::from(fin));
    let count = tcp::unacknowledged(fd.as_fd())? as usize;
    let mut bytes = receive(fd, count + SEGMENT, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
    tcp::set_queue(fd.as_fd(), Queue::None)?;
    let count = count.saturating_sub(usize::from(fin)).min(bytes.len());
    bytes.drain(..bytes.len() - count);
    Ok(Unacknowledged { bytes, end })
}

/// Reads the receive queue of a socket in repair mode, and the number behind its last byte. (In that mode a peek
/// reads what the chosen queue has.)
pub(crate) fn received(fd: &OwnedFd) -> Result<(Vec<u8>, u32)> {
    tcp::set_queue(fd.as_fd(), Queue::Receive)?;
    let result = loop {
        let before = tcp::sequence(fd.as_fd())?;
        let bytes = peek(fd)?;
        // The kernel goes on taking in segments.
        if tcp::sequence(fd.as_fd())? == before {
            break (bytes, before);
        }
    };
    tcp::set_queue(fd.as_fd(), Queue::None)?;
    Ok(result)
}

/// What waits to be received.
pub(crate) fn peek(fd: &OwnedFd) -> Result<Vec<u8>> {
    // On a socket with an error recv(2) would tell it, and with that clear it, if there is nothing else.
    if tcp::received(fd.as_fd())? == 0 {
        return Ok(Vec::new());
    }
    let offset = peek_offset(fd);
    if offset.is_some() {
        set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    }
    let result = peek_all(fd);
    if let Some(offset) = offset {
        set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
    }
    result
}

fn peek_all(fd: &OwnedFd) -> Result<Vec<u8>> {
    let mut room = tcp::received(fd.as_fd())? as usize + 4096;
    loop {
        let bytes = receive(fd, room, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
        if bytes.len() < room {
            return Ok(bytes);
        }
        room *= 2;
    }
}

/// How a socket is put back after [`make_room`].
pub(crate) fn undo_room(fd: &OwnedFd) -> Vec<Undo> {
    let size = socket::int_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0) / 2;
    let lock = socket::int_option(fd, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
    [(libc::SO_RCVBUFFORCE, size), (libc::SO_RCVBUF, size), (SO_BUF_LOCK, lock)]
        .map(|(name, value)| Undo::number(fd.as_fd(), libc::SOL_SOCKET, name, value))
        .into()
}

/// Lets what waits for room at the receiver `to` move there, which is what the network may do at any time: its buffer
/// gets `more` bytes, and a peek of one byte makes it tell its window (net/ipv4/tcp.c, `tcp_cleanup_rbuf`). `done`
/// says whether all has arrived.
pub(crate) fn make_room(to: &OwnedFd, more: u32, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let before = socket::int_option(to, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0);
    // What it takes to hold a byte may be several.
    let size =
        before.saturating_add(i32::try_from(more).unwrap_or(i32::MAX / 4).saturating_mul(2)) / 2 + (1 << 20);
    if set(to, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, size).is_err() {
        set(to, libc::SOL_SOCKET, libc::SO_RCVBUF, size)?;
    }
    // Each time the window may grow by what it was.
    for _ in 0..ROUNDS {
        let had = tcp::received(to.as_fd())?;
        receive(to, 1, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
        if done()? {
            return Ok(true);
        }
        if tcp::received(to.as_fd())? == had {
            break;
        }
    }
    done()
}

/// Whether a byte of urgent data waits, or is announced.
pub(crate) fn urgent(fd: &OwnedFd) -> bool {
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    match receive(fd, 1, flags) {
        Ok(bytes) => !bytes.is_empty(),
        Err(e) => e.errno() == Some(Errno::EAGAIN),
    }
}

fn receive(fd: &OwnedFd, room: usize, flags: i32) -> Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::with_capacity(room);
    // SAFETY: recv fills at most `room` bytes of a buffer that has so many.
    let got = unsafe { libc::recv(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), room, flags) };
    match (usize::try_from(got), Errno::last()) {
        (Ok(got), _) => {
            // SAFETY: the kernel has filled so many of them.
            unsafe { bytes.set_len(got.min(room)) };
            Ok(bytes)
        }
        (Err(_), Errno::EAGAIN) if flags & libc::MSG_OOB == 0 => Ok(Vec::new()),
        (Err(_), errno) => Err(Error::syscall("recv", fd.as_raw_fd(), errno)),
    }
}

pub(crate) fn set(fd: &OwnedFd, level: i32, name: i32, value: i32) -> Result<()> {
    // SAFETY: setsockopt reads an int.
    let got = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if got == 0 { Ok(()) } else { Err(Error::last("setsockopt", format!("fd {fd:?}, option {name}"))) }
}
