//! tcp(7), connections to the outside that are kept (`--tcp keep`).
//!
//! The peer must notice nothing: no byte may be acknowledged after the socket was read, and no FIN or reset be sent
//! when its process ends. So each socket gets a filter that drops everything (socket(7), `SO_ATTACH_FILTER`; what is
//! dropped the peer sends again), and what it has not sent yet stays so: its window is closed, or timers (pacing, small
//! queues) would go on sending it while the image is made, and acknowledgements of what it never sent are ignored by the socket
//! that takes its place. It is read in repair mode, and is put into that mode once more before the process is
//! killed: a socket in repair mode is closed silently (net/ipv4/tcp.c, `tcp_disconnect`). Until then a guardian stands
//! ready to undo all of it; once the image is complete it is the guardian that ends the processes, so that this is done
//! even if we are killed. It stays for as long as a peer may have patience: while its sockets exist,
//! deaf, what the peer sends meets nobody; without them the kernel would answer with a reset. A restore on this
//! machine ends it; one on another takes over the address as well, and nothing is sent here any more.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use torpor_image::tcp::Kept;
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;
use torpor_kernel::tcp::{self, state};

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::guardian::{Guardian, Undo};
use crate::repair;
use crate::socket;
use crate::tcp::Socket;

/// What would make a deaf socket give up, and say so to its peer.
const IMPATIENT: [(i32, i32); 2] =
    [(libc::SOL_SOCKET, libc::SO_KEEPALIVE), (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT)];

/// Why a connection is not held, and what to do.
const PRIVILEGE: (&str, &str) =
    ("a connection can be kept with a privilege only", "run torpor with CAP_NET_ADMIN, or use --tcp close");

/// Kept connections, deaf until their processes are gone. Dropped, they hear again.
#[derive(Debug)]
pub(crate) struct Hold {
    /// Dropped first.
    guardian: Guardian,
    sockets: Vec<OwnedFd>,
}

/// What a kept connection was.
#[derive(Debug)]
pub(crate) struct KeptState {
    pub(crate) received: Vec<u8>,
    pub(crate) sent: Vec<u8>,
    pub(crate) kept: Kept,
}

impl Hold {
    /// Makes sockets deaf and reads them, in their order.
    pub(crate) fn begin<'s>(
        collector: &mut Collector,
        sockets: impl Iterator<Item = &'s Socket>,
    ) -> Result<Option<(Self, Vec<KeptState>)>> {
        let pid = collector.pid;
        let sockets: Vec<&Socket> = sockets.collect();
        let mut undo = Vec::new();
        let mut processes = Vec::new();
        let mut copies = Vec::new();
        for socket in &sockets {
            collector.turn_to(socket.pid);
            let fd = &socket.fd;
            if socket::int_option(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER) == Some(1) {
                let why = "its filter is locked, and only through that a connection can be held";
                collector.refuse(&socket.title, why, "close the connection, or use --tcp close");
                return Ok(None);
            }
            if repair::urgent(fd) {
                let why = "urgent data waits to be received";
                collector.refuse(&socket.title, why, "try again once the program has received it");
                return Ok(None);
            }
            let filter = socket::filter(fd).ok().flatten().unwrap_or_default();
            undo.push(Undo::filter(fd.as_fd(), &filter));
            // Not only off: so the peer is asked for its window, which is closed meanwhile.
            undo.push(Undo::number(fd.as_fd(), libc::IPPROTO_TCP, tcp::TCP_REPAIR, 0));
            undo.extend(repair::undo(fd));
            for (level, name) in IMPATIENT {
                let value = socket::int_option(fd, level, name).unwrap_or(0);
                undo.push(Undo::number(fd.as_fd(), level, name, value));
            }
            let copy = fd.try_clone().map_err(|e| {
                Error::kernel(pid, format!("holding {}", socket.title))(torpor_kernel::Error::io(
                    "dup", pid, &e,
                ))
            })?;
            copies.push(copy);
        }
        if sockets.is_empty() {
            return Ok(None);
        }
        for member in &collector.members {
            let pidfd = fds::pidfd_open(Pid(*member)).map_err(Error::kernel(Pid(*member), "holding it"))?;
            processes.push(pidfd);
        }
        let start =
            |e| Error::kernel(pid, "starting a guardian")(torpor_kernel::Error::syscall("clone", pid, e));
        let hold = Hold { guardian: Guardian::start_for(&undo, &processes).map_err(start)?, sockets: copies };
        for (fd, socket) in hold.sockets.iter().zip(&sockets) {
            match make_deaf(fd) {
                Ok(()) => {}
                Err(e) if e.errno() == Some(nix::errno::Errno::EPERM) => {
                    collector.turn_to(socket.pid);
                    collector.refuse(&socket.title, PRIVILEGE.0, PRIVILEGE.1);
                    return Ok(None);
                }
                Err(e) => return Err(Error::kernel(pid, format!("holding {}", socket.title))(e)),
            }
        }
        settled();
        let mut states = Vec::new();
        for socket in &sockets {
            match repair::in_repair(&socket.fd, |fd| read(fd, socket.state)) {
                Ok(state) => states.push(state),
                Err(e) if e.errno() == Some(nix::errno::Errno::EPERM) => {
                    collector.turn_to(socket.pid);
                    collector.refuse(&socket.title, PRIVILEGE.0, PRIVILEGE.1);
                    return Ok(None);
                }
                Err(e) => return Err(Error::kernel(pid, format!("reading {}", socket.title))(e)),
            }
        }
        Ok(Some((hold, states)))
    }

    /// The image is complete: ends the processes, without their connections telling of it. `bind` makes the kernel end
    /// the processes with us.
    pub(crate) fn end(self, pid: Pid, bind: impl FnOnce()) -> Result<()> {
        let failed = || Error::kernel(pid, "ending it and its connections silently");
        // Silent before any process can end: whatever ends the guardian later closes them so.
        for fd in &self.sockets {
            for (level, name) in IMPATIENT {
                repair::set(fd, level, name, 0).map_err(failed())?;
            }
            tcp::set_repair(fd.as_fd(), 1).map_err(failed())?;
        }
        let ended = self.guardian.end(bind);
        ended.map_err(|errno| failed()(torpor_kernel::Error::syscall("pidfd_send_signal", pid, errno)))
    }
}

/// Everything of one connection, while it is deaf and in repair mode.
fn read(fd: &OwnedFd, state: u8) -> torpor_kernel::Result<KeptState> {
    let info = tcp::info(fd.as_fd())?;
    let fin = matches!(state, state::FIN_WAIT1 | state::FIN_WAIT2);
    let window = tcp::window(fd.as_fd())?;
    if tcp::unsent(fd.as_fd())? > 0 {
        let [seen, _, largest, own, told] = window;
        tcp::set_window(fd.as_fd(), [seen, 0, largest, own, told])?;
    }
    let segment = tcp::segment(fd.as_fd())?;
    let timestamp = if info.timestamps() { Some(tcp::timestamp(fd.as_fd())?) } else { None };
    let unsent = tcp::unsent(fd.as_fd())?;
    let (received, receive_sequence) = repair::received(fd)?;
    let sent = repair::unacknowledged(fd, fin)?;
    let kept = Kept {
        send_sequence: sent.end,
        receive_sequence,
        unsent: unsent.saturating_sub(u32::from(fin)).min(sent.bytes.len() as u32),
        window,
        segment,
        scale: info.window_scaling().then_some((info.send_scale, info.receive_scale)),
        sack: info.sack(),
        timestamp,
    };
    Ok(KeptState { received, sent: sent.bytes, kept })
}

/// Attaches `ret #0`.
fn make_deaf(fd: &OwnedFd) -> torpor_kernel::Result<()> {
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    // SAFETY: a program of one instruction of ours.
    let set = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(torpor_kernel::Error::last("setsockopt(SO_ATTACH_FILTER)", fd.as_raw_fd()))
    }
}

/// Waits until no cpu is still at a segment that came before the filters (membarrier(2): a global barrier waits for
/// all readers of the kernel's structures, as filters are).
fn settled() {
    const MEMBARRIER_CMD_GLOBAL: i32 = 1;
    // SAFETY: membarrier takes numbers only.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}
