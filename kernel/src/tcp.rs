//! tcp(7) beyond what libc names: queue lengths, `TCP_INFO`, and repair mode.
//!
//! Repair mode (`TCP_REPAIR`, net/ipv4/tcp.c) makes a socket's sequence numbers and send queue readable and, on a new
//! socket, settable; it wants CAP_NET_ADMIN. It is a property of the socket, so whoever shares the socket sees it:
//! plain reads and writes fail meanwhile. Switching it on sets the reuse flag of the socket to a value of its own, and
//! switching it off clears that flag.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{Error, Result};

/// include/net/tcp_states.h
pub mod state {
    #![allow(missing_docs, reason = "the kernel's names")]
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// linux/tcp.h
pub const TCP_QUICKACK: i32 = 12;
const TCP_MAXSEG: i32 = 2;
const TCP_INFO: i32 = 11;
/// linux/tcp.h
pub const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Value of `TCP_REPAIR`: off, without a probe to the peer (Linux 4.19).
pub const REPAIR_OFF: i32 = -1;
/// linux/sockios.h: bytes sent or to be sent that are not acknowledged, a FIN included.
const SIOCOUTQ: libc::c_ulong = 0x5411;
/// linux/sockios.h: those of them that were not sent yet.
const SIOCOUTQNSD: libc::c_ulong = 0x894b;
/// linux/sockios.h: bytes to be received, up to urgent data.
const SIOCINQ: libc::c_ulong = 0x541b;

/// A queue of a socket in repair mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// Neither.
    None = 0,
    /// What was received.
    Receive = 1,
    /// What is to be sent, or not acknowledged.
    Send = 2,
}

/// What `TCP_INFO` says first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// One of [`state`].
    pub state: u8,
    /// `TCPI_OPT_*`
    pub options: u8,
    /// Shift of the windows that the peer tells.
    pub send_scale: u8,
    /// Shift of the windows that we tell.
    pub receive_scale: u8,
}

impl Info {
    /// `TCPI_OPT_TIMESTAMPS`
    pub fn timestamps(&self) -> bool {
        self.options & 1 != 0
    }

    /// `TCPI_OPT_SACK`
    pub fn sack(&self) -> bool {
        self.options & 2 != 0
    }

    /// `TCPI_OPT_WSCALE`
    pub fn window_scaling(&self) -> bool {
        self.options & 4 != 0
    }
}

/// `TCP_INFO`: `tcpi_state` at 0, `tcpi_options` at 5, the scales at 6.
pub fn info(fd: BorrowedFd<'_>) -> Result<Info> {
    let mut raw = [0u8; 8];
    get(fd, TCP_INFO, &mut raw)?;
    Ok(Info { state: raw[0], options: raw[5], send_scale: raw[6] & 15, receive_scale: raw[6] >> 4 })
}

/// Bytes that the peer has not acknowledged; a FIN counts as one.
pub fn unacknowledged(fd: BorrowedFd<'_>) -> Result<u32> {
    ioctl(fd, SIOCOUTQ, "SIOCOUTQ")
}

/// Bytes that were not sent yet.
pub fn unsent(fd: BorrowedFd<'_>) -> Result<u32> {
    ioctl(fd, SIOCOUTQNSD, "SIOCOUTQNSD")
}

/// Bytes that wait to be received.
pub fn received(fd: BorrowedFd<'_>) -> Result<u32> {
    ioctl(fd, SIOCINQ, "SIOCINQ")
}

/// Makes a socket acknowledge now what it would have acknowledged in a moment, if nothing waits in it to be received,
/// and leaves it as it was otherwise (net/ipv4/tcp.c, `__tcp_sock_set_quickack`: an even value puts the interactive
/// mode back).
pub fn acknowledge(fd: BorrowedFd<'_>) -> Result<()> {
    let mut quick = [0u8; 4];
    get(fd, TCP_QUICKACK, &mut quick)?;
    let value: i32 = if i32::from_ne_bytes(quick) == 0 { 2 } else { 1 };
    set(fd, TCP_QUICKACK, &value.to_ne_bytes())
}

/// Switches repair mode.
pub fn set_repair(fd: BorrowedFd<'_>, value: i32) -> Result<()> {
    set(fd, TCP_REPAIR, &value.to_ne_bytes())
}

/// Chooses the queue that the next calls are about.
pub fn set_queue(fd: BorrowedFd<'_>, queue: Queue) -> Result<()> {
    set(fd, TCP_REPAIR_QUEUE, &(queue as i32).to_ne_bytes())
}

/// The sequence number behind the chosen queue.
pub fn sequence(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = [0u8; 4];
    get(fd, TCP_QUEUE_SEQ, &mut value)?;
    Ok(u32::from_ne_bytes(value))
}

/// Sets the sequence number of the chosen queue of a socket that is not connected yet.
pub fn set_sequence(fd: BorrowedFd<'_>, value: u32) -> Result<()> {
    set(fd, TCP_QUEUE_SEQ, &value.to_ne_bytes())
}

/// `struct tcp_repair_window`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
pub fn window(fd: BorrowedFd<'_>) -> Result<[u32; 5]> {
    let mut raw = [0u8; 20];
    get(fd, TCP_REPAIR_WINDOW, &mut raw)?;
    let mut words = raw.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w));
    Ok(std::array::from_fn(|_| words.next().unwrap_or(0)))
}

/// Sets what [`window`] gave.
pub fn set_window(fd: BorrowedFd<'_>, window: [u32; 5]) -> Result<()> {
    let raw: Vec<u8> = window.iter().flat_map(|w| w.to_ne_bytes()).collect();
    set(fd, TCP_REPAIR_WINDOW, &raw)
}

/// The largest segment agreed on, of a socket in repair mode.
pub fn segment(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = [0u8; 4];
    get(fd, TCP_MAXSEG, &mut value)?;
    Ok(u32::from_ne_bytes(value))
}

/// The clock of its timestamps; the lowest bit says whether it counts microseconds.
pub fn timestamp(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = [0u8; 4];
    get(fd, TCP_TIMESTAMP, &mut value)?;
    Ok(u32::from_ne_bytes(value))
}

/// Sets what [`timestamp`] gave.
pub fn set_timestamp(fd: BorrowedFd<'_>, value: u32) -> Result<()> {
    set(fd, TCP_TIMESTAMP, &value.to_ne_bytes())
}

/// What was agreed on at the handshake: pairs of `TCPOPT_*` and value (`struct tcp_repair_opt`).
pub fn set_agreed(fd: BorrowedFd<'_>, options: &[(u32, u32)]) -> Result<()> {
    let raw: Vec<u8> =
        options.iter().flat_map(|(code, value)| [*code, *value]).flat_map(u32::to_ne_bytes).collect();
    set(fd, TCP_REPAIR_OPTIONS, &raw)
}

fn ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong, name: &'static str) -> Result<u32> {
    let mut value = 0i32;
    // SAFETY: these requests fill an int.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if got != 0 {
        return Err(Error::last(name, fd.as_raw_fd()));
    }
    Ok(value.max(0).cast_unsigned())
}

fn get(fd: BorrowedFd<'_>, name: i32, value: &mut [u8]) -> Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: getsockopt fills at most `len` bytes of `value`.
    let got = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if got == 0 { Ok(()) } else { Err(Error::last("getsockopt", format!("fd {fd:?}, TCP option {name}"))) }
}

fn set(fd: BorrowedFd<'_>, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: setsockopt reads `value.len()` bytes.
    let got = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if got == 0 { Ok(()) } else { Err(Error::last("setsockopt", format!("fd {fd:?}, TCP option {name}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn queues_of_a_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        client.write_all(b"hello").unwrap();
        assert_eq!(info(client.as_fd()).unwrap().state, state::ESTABLISHED);
        assert_eq!(received(server.as_fd()).unwrap(), 5);
        acknowledge(server.as_fd()).unwrap();
        assert_eq!(unacknowledged(client.as_fd()).unwrap(), 0);
        assert_eq!(unsent(client.as_fd()).unwrap(), 0);
        match set_repair(client.as_fd(), 1) {
            Err(e) if e.errno() == Some(nix::errno::Errno::EPERM) => eprintln!("skipped: no CAP_NET_ADMIN"),
            other => {
                other.unwrap();
                set_repair(server.as_fd(), 1).unwrap();
                set_queue(client.as_fd(), Queue::Send).unwrap();
                set_queue(server.as_fd(), Queue::Receive).unwrap();
                assert_eq!(sequence(client.as_fd()).unwrap(), sequence(server.as_fd()).unwrap());
                set_repair(client.as_fd(), REPAIR_OFF).unwrap();
                set_repair(server.as_fd(), REPAIR_OFF).unwrap();
            }
        }
    }
}
