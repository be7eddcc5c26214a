//! unix(7): state from sock_diag, queues by peeking.

use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::Bytes;
use torpor_image::description::Kind;
use torpor_image::unix::{BoundFile, State, UnixSocket};
use torpor_kernel::sock_diag;

use crate::collect::{Collector, stat_path};
use crate::description::Found;
use crate::error::{Error, Result};
use crate::socket;

/// Socket states as sock_diag tells them (net/tcp_states.h).
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
/// linux/sockios.h: a descriptor for the file a socket is bound to.
const SIOCUNIXFILE: libc::Ioctl = 0x89E0;
const CLOSE_IT: &str = "close it before the dump";

pub(crate) fn collect(collector: &mut Collector, found: &Found, fd: &OwnedFd) -> Result<Option<Kind>> {
    let number = found.stat.st_ino as u32;
    let Some(diag) = collector.unix_socket(number)? else {
        collector.refuse(found.title(), "the kernel lists no unix socket of this number", CLOSE_IT);
        return Ok(None);
    };
    if socket::filter_length(fd) > 0 {
        collector.refuse(found.title(), "a socket filter cannot be dumped yet", CLOSE_IT);
        return Ok(None);
    }
    let Some(state) = state(collector, found, &diag)? else { return Ok(None) };
    let Some(queue) = queue(collector, found, fd, &diag)? else { return Ok(None) };
    if state == State::Idle && (!queue.is_empty() || diag.rqueue > 0) {
        let why = "messages of other sockets wait in it, whose senders could not be told afterwards";
        collector.refuse(found.title(), why, "try again once the program has received them");
        return Ok(None);
    }
    let file = match &diag.name {
        Some(name) if name.first() != Some(&0) => {
            let Some(file) = bound_file(fd) else {
                collector.refuse(
                    found.title(),
                    format!("the file `{}` it is bound to is gone", String::from_utf8_lossy(name)),
                    CLOSE_IT,
                );
                return Ok(None);
            };
            Some(file)
        }
        _ => None,
    };
    Ok(Some(Kind::Unix(UnixSocket {
        number,
        kind: diag.kind,
        state,
        name: diag.name.map(Bytes),
        file,
        queue,
        shutdown: diag.shutdown,
        options: socket::options(fd, libc::AF_UNIX, diag.kind, 0, &[]),
    })))
}

fn state(collector: &mut Collector, found: &Found, diag: &sock_diag::UnixSocket) -> Result<Option<State>> {
    match (diag.state, diag.peer) {
        (LISTEN, _) => {
            // Those of this process are told from the client's side.
            let outside = diag.pending.iter().copied().find(|client| !collector.owns_socket(*client));
            if outside.is_some() {
                collector.refuse(
                    found.title(),
                    "connections of other processes wait to be accepted",
                    "try again once the program has accepted them",
                );
                return Ok(None);
            }
            Ok(Some(State::Listening { backlog: diag.wqueue }))
        }
        // The kernel keeps the peer of a socket whose other end was closed, but without a number.
        (_, Some(0)) if diag.shutdown & 3 == 3 || diag.kind == libc::SOCK_DGRAM => Ok(Some(State::Orphaned)),
        (_, Some(0)) => match collector.unix_listener_of(diag.inode)? {
            Some(listener) if collector.owns_socket(listener.inode) && diag.wqueue == 0 => {
                Ok(Some(State::Waiting { listener: listener.inode }))
            }
            _ => {
                let why =
                    "it is connected to another process that has not accepted it, or data is on its way";
                collector.refuse(found.title(), why, "try again a moment later");
                Ok(None)
            }
        },
        (_, Some(peer)) => {
            let back = collector.unix_socket(peer)?.and_then(|p| p.peer);
            if collector.owns_socket(peer) && back == Some(diag.inode) {
                return Ok(Some(State::Connected { peer }));
            }
            let why = "its other end belongs to another process, or is not connected back";
            collector.refuse(found.title(), why, CLOSE_IT);
            Ok(None)
        }
        // A datagram socket is in this state once anyone has connected to it.
        (ESTABLISHED, None) if diag.kind != libc::SOCK_DGRAM => Ok(Some(State::Orphaned)),
        _ => Ok(Some(State::Idle)),
    }
}

/// What waits to be received. Peeking takes nothing away; `SO_PEEK_OFF`, which walks over datagrams, is put
/// back to what it was.
fn queue(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    diag: &sock_diag::UnixSocket,
) -> Result<Option<Vec<Bytes>>> {
    // Peeking moves a mark that a running program may use itself.
    if diag.state == LISTEN || diag.rqueue == 0 || collector.live {
        return Ok(Some(Vec::new()));
    }
    let before = socket::int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    let set = |value: i32| {
        // SAFETY: SO_PEEK_OFF reads an int.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                (&raw const value).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        }
    };
    let stream = diag.kind == libc::SOCK_STREAM;
    if !stream || before >= 0 {
        set(0);
    }
    let result = peek_all(collector, found, fd, diag, stream);
    if !stream || before >= 0 {
        set(before);
    }
    result
}

fn peek_all(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
    diag: &sock_diag::UnixSocket,
    stream: bool,
) -> Result<Option<Vec<Bytes>>> {
    let mut queue = Vec::new();
    // A message is at most as large as the sender's buffer; the kernel tells more than that it cut off.
    let mut buffer = vec![0u8; (diag.rqueue as usize).max(1 << 16) + 4096];
    loop {
        let mut control = [0u64; 64];
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: an all-zero msghdr is a valid one.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the message names buffers of ours with their lengths.
        let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
        if got < 0 {
            return match nix::errno::Errno::last() {
                nix::errno::Errno::EAGAIN | nix::errno::Errno::EINVAL | nix::errno::Errno::ENOTCONN => {
                    Ok(Some(queue))
                }
                e => Err(Error::kernel(collector.pid, format!("reading {}", found.title()))(
                    torpor_kernel::Error::syscall("recvmsg", found.fd, e),
                )),
            };
        }
        if close_passed(&message) {
            let remedy = "try again once the program has received them";
            collector.refuse(found.title(), "descriptors are on their way through it", remedy);
            return Ok(None);
        }
        if got as usize > buffer.len() {
            buffer.resize(got as usize, 0);
            continue;
        }
        // A stream at its end and a datagram socket whose peer is gone read as nothing, again and again.
        if got == 0 && (stream || diag.shutdown & 1 != 0 || diag.rqueue == 0) {
            return Ok(Some(queue));
        }
        queue.push(Bytes(buffer[..got as usize].to_vec()));
        // A peek ends where the sender's credentials change, if the receiver asked for them.
        if stream && (got as u32) < diag.rqueue {
            let why = "what waits in it comes from several senders";
            collector.refuse(found.title(), why, "try again once the program has received it");
            return Ok(None);
        }
        if stream {
            return Ok(Some(queue));
        }
    }
}

/// Closes descriptors that a peek has copied to us, and says whether there were any.
fn close_passed(message: &libc::msghdr) -> bool {
    let mut any = false;
    // SAFETY: the kernel filled the control buffer; CMSG_* walk it within its length.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                any = true;
                let len = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let fds = libc::CMSG_DATA(header).cast::<i32>();
                for i in 0..len / size_of::<i32>() {
                    libc::close(fds.add(i).read_unaligned());
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    any
}

fn bound_file(fd: &OwnedFd) -> Option<BoundFile> {
    // SAFETY: SIOCUNIXFILE takes no argument and returns a new descriptor (needs CAP_NET_ADMIN).
    let file = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) };
    let path = if file >= 0 {
        let link = nix::fcntl::readlink(format!("/proc/self/fd/{file}").as_str()).ok();
        // SAFETY: the descriptor was just opened for us.
        unsafe { libc::close(file) };
        Bytes(std::os::unix::ffi::OsStringExt::into_vec(link?))
    } else {
        // Without the privilege an absolute name is as good, as long as it leads to a socket.
        let address: nix::sys::socket::UnixAddr = nix::sys::socket::getsockname(fd.as_raw_fd()).ok()?;
        Bytes(address.path().filter(|p| p.is_absolute())?.as_os_str().as_encoded_bytes().to_vec())
    };
    let stat = stat_path(&path)?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFSOCK).then_some(BoundFile {
        path,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
    })
}
