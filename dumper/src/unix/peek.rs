//! Reading a receive queue without taking anything out of it.
//!
//! A plain MSG_PEEK shows the first message only (of a stream: up to where descriptors or other credentials
//! begin). What is behind shows under SO_PEEK_OFF (socket(7)), which belongs to the socket, and so to the
//! program: left behind, it would make every later MSG_PEEK of the program begin elsewhere. So it is set, used
//! and put back by a process of its own, which shares memory and descriptors with us but does not die with us:
//! should we be killed in between, it goes on to the end. It allocates nothing and calls nothing but the
//! kernel, since another thread of ours may have died with a lock held.
//!
//! An empty message that was once seen under SO_PEEK_OFF is skipped from then on (net/core/datagram.c,
//! `skb->peeked`), but a plain peek still shows one at the head: that is put back in its place. Further back
//! in the queue it shows in the first dump of it only; whoever reads the queue counts what waits
//! ([`torpor_kernel::sock_queue`]).
//!
//! Peeking at a socket with a pending error returns and clears that error (net/core/datagram.c,
//! `__skb_try_recv_datagram`; of streams at the end of the queue, net/unix/af_unix.c,
//! `unix_stream_read_generic`): the caller must not, and of a stream no more is read than it holds.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::unix::Sender;

use crate::socket;

/// `SCM_PIDFD` (linux/socket.h)
const SCM_PIDFD: i32 = 4;
/// Room for 253 descriptors, credentials, a pidfd, a label and a timestamp.
const CONTROL: usize = 2048;
/// Stack of the process that peeks.
const STACK: usize = 64 * 1024;
/// Empty reads in a row that count as the end of a queue.
const EMPTY: u32 = 64;

/// One message, or one piece of a stream.
#[derive(Debug, Default)]
pub(crate) struct Peeked {
    pub(crate) data: Vec<u8>,
    pub(crate) rights: Vec<OwnedFd>,
    pub(crate) credentials: Option<Sender>,
    /// Raw bytes of the sender's address.
    pub(crate) from: Vec<u8>,
    /// We could not take all descriptors.
    pub(crate) cut: bool,
    /// How many bytes of it come before the message that the descriptors belong to.
    before: usize,
}

/// What a queue is read by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue<'f> {
    pub(crate) fd: &'f OwnedFd,
    pub(crate) kind: i32,
    /// Bytes that wait, as sock_diag says.
    pub(crate) bytes: u32,
    /// Nothing more will come.
    pub(crate) ended: bool,
}

impl Queue<'_> {
    fn stream(&self) -> bool {
        self.kind == libc::SOCK_STREAM
    }

    /// The first message, if nothing has to be changed to see it.
    pub(crate) fn first(&self) -> nix::Result<Option<Peeked>> {
        if peek_offset(self.fd) >= 0 || self.stream() && self.bytes == 0 {
            return Ok(None);
        }
        let mut buffer = vec![0u8; self.bytes as usize + (1 << 16)];
        loop {
            let mut record = Record::new();
            let got = peek(self.fd.as_raw_fd(), buffer.as_mut_ptr(), buffer.len(), &mut record);
            if got < 0 {
                return match Errno::from_raw(-got as i32) {
                    Errno::EAGAIN | Errno::EINVAL | Errno::ENOTCONN => Ok(None),
                    errno => Err(errno),
                };
            }
            record.len = got as usize;
            let peeked = record.take(&buffer[..record.len.min(buffer.len())], self.stream());
            if record.len > buffer.len() {
                buffer.resize(record.len, 0);
                continue;
            }
            // The end of the queue reads as an empty message.
            let end = record.len == 0 && (self.stream() || self.ended && self.bytes == 0);
            return Ok((!end).then_some(peeked));
        }
    }

    /// Everything.
    pub(crate) fn all(&self) -> nix::Result<Vec<Peeked>> {
        let first = self.first()?;
        let offset = peek_offset(self.fd);
        if offset < 0 {
            let whole = |p: &Peeked| p.rights.is_empty() && !p.cut && p.data.len() >= self.bytes as usize;
            if first.is_none() || self.stream() && first.as_ref().is_some_and(whole) {
                return Ok(first.into_iter().collect());
            }
        }
        let mut all = self.walk(offset)?;
        if let Some(first) = first
            && !self.stream()
            && first.data.is_empty()
            && all.first().is_none_or(|p| !p.data.is_empty())
        {
            all.insert(0, first);
        }
        Ok(all)
    }

    fn walk(&self, before: i32) -> nix::Result<Vec<Peeked>> {
        let mut wanted = self.bytes as usize + (1 << 20);
        let mut most = 1024;
        loop {
            let mut buffer = Guarded::new(wanted)?;
            let room = buffer.bytes().len();
            let mut records = vec![Record::new(); most];
            let mut walk = Walk {
                fd: self.fd.as_raw_fd(),
                stream: self.stream(),
                ends: self.ended && self.kind == libc::SOCK_SEQPACKET,
                before,
                limit: self.bytes as usize,
                buffer: buffer.bytes().as_mut_ptr(),
                room,
                records: records.as_mut_ptr(),
                most,
                count: 0,
                used: 0,
                full: false,
                error: 0,
            };
            undying(&mut walk)?;
            let taken: Vec<Peeked> = records[..walk.count]
                .iter()
                .map(|r| {
                    let end = (r.at + r.len).min(room);
                    r.take(&buffer.bytes()[r.at.min(end)..end], walk.stream)
                })
                .collect();
            if walk.error != 0 {
                return Err(Errno::from_raw(walk.error));
            }
            if !walk.full {
                return Ok(if walk.stream { pieces(taken) } else { taken });
            }
            wanted = room * 8;
            most *= 8;
        }
    }
}

/// Splits pieces of a stream where the message begins that descriptors belong to.
fn pieces(taken: Vec<Peeked>) -> Vec<Peeked> {
    let mut all = Vec::with_capacity(taken.len());
    for mut piece in taken {
        if piece.before > 0 {
            let data = piece.data.drain(..piece.before).collect();
            all.push(Peeked { data, credentials: piece.credentials, ..Peeked::default() });
        }
        all.push(piece);
    }
    all
}

/// SO_PEEK_OFF
pub(crate) fn peek_offset(fd: &OwnedFd) -> i32 {
    socket::int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1)
}

/// Memory up to a page that nobody can access.
struct Guarded {
    start: std::ptr::NonNull<libc::c_void>,
    len: std::num::NonZeroUsize,
}

impl Guarded {
    const GUARD: usize = 1 << 16;

    fn new(room: usize) -> nix::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
        let len = room.next_multiple_of(Self::GUARD) + Self::GUARD;
        let len = std::num::NonZeroUsize::new(len).ok_or(Errno::ENOMEM)?;
        // SAFETY: new memory, of which nobody knows yet.
        unsafe {
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            let start = mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)?;
            let guarded = Guarded { start, len };
            mprotect(start.byte_add(len.get() - Self::GUARD), Self::GUARD, ProtFlags::PROT_NONE)?;
            Ok(guarded)
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: our memory up to the guard.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len.get() - Self::GUARD) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and borrowed by nobody any more.
        let _unmapped = unsafe { nix::sys::mman::munmap(self.start, self.len.get()) };
    }
}

/// What one recvmsg(2) gave.
#[derive(Clone)]
#[repr(C)]
struct Record {
    at: usize,
    len: usize,
    control: [u64; CONTROL / 8],
    control_len: usize,
    address: [u8; 112],
    address_len: usize,
    flags: i32,
    before: usize,
}

impl Record {
    const fn new() -> Self {
        Record {
            at: 0,
            len: 0,
            control: [0; CONTROL / 8],
            control_len: 0,
            address: [0; 112],
            address_len: 0,
            flags: 0,
            before: 0,
        }
    }

    /// Control messages: level, type and where their data lies in `control`.
    fn controls(&self) -> Controls<'_> {
        Controls { record: self, at: 0 }
    }

    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        // SAFETY: `Controls` gives ranges within `control` only.
        unsafe { std::slice::from_raw_parts(self.control.as_ptr().cast::<u8>().add(at), len) }
    }

    /// Takes over the descriptors that came along.
    fn take(&self, data: &[u8], stream: bool) -> Peeked {
        let mut peeked = Peeked {
            data: data.to_vec(),
            cut: self.flags & libc::MSG_CTRUNC != 0,
            before: self.before,
            ..Peeked::default()
        };
        let family = size_of::<libc::sa_family_t>();
        if !stream && self.address_len > family {
            peeked.from = self.address[family..self.address_len.min(self.address.len())].to_vec();
        }
        for (level, kind, at, len) in self.controls() {
            let words = self.bytes(at, len).as_chunks::<4>().0.iter().map(|w| i32::from_ne_bytes(*w));
            // SAFETY: descriptors that the kernel has just installed for us.
            let fds = || words.clone().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            match (level, kind) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => peeked.rights.extend(fds()),
                (libc::SOL_SOCKET, SCM_PIDFD) if len == 4 && words.clone().all(|fd| fd >= 0) => {
                    let of = fds().next().and_then(|fd| pid_of(&fd));
                    peeked.credentials =
                        peeked.credentials.or(of.map(|pid| Sender { pid, uid: u32::MAX, gid: u32::MAX }));
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    let all: Vec<i32> = words.collect();
                    if let [pid, uid, gid] = all[..] {
                        peeked.credentials = Some(Sender { pid, uid: uid as u32, gid: gid as u32 });
                    }
                }
                _ => {}
            }
        }
        peeked
    }

    fn has_rights(&self) -> bool {
        self.controls().any(|(level, kind, ..)| level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS)
    }

    /// Closes what came along.
    fn discard(&self) {
        for (level, kind, at, len) in self.controls() {
            if level == libc::SOL_SOCKET && (kind == libc::SCM_RIGHTS || kind == SCM_PIDFD) {
                let mut from = 0;
                while from + 4 <= len {
                    // SAFETY: within the range that `controls` gave; descriptors that were just installed.
                    unsafe {
                        let fd = self.control.as_ptr().cast::<u8>().add(at + from).cast::<i32>();
                        libc::syscall(libc::SYS_close, fd.read_unaligned());
                    }
                    from += 4;
                }
            }
        }
    }
}

struct Controls<'r> {
    record: &'r Record,
    at: usize,
}

impl Iterator for Controls<'_> {
    type Item = (i32, i32, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        const HEADER: usize = size_of::<libc::cmsghdr>();
        let end = if self.record.control_len < CONTROL { self.record.control_len } else { CONTROL };
        if self.at + HEADER > end {
            return None;
        }
        // SAFETY: a whole header lies within `control`.
        let header = unsafe {
            self.record.control.as_ptr().cast::<u8>().add(self.at).cast::<libc::cmsghdr>().read_unaligned()
        };
        let len = header.cmsg_len;
        if len < HEADER || len > end - self.at {
            return None;
        }
        let data = self.at + HEADER;
        self.at += (len + 7) & !7;
        Some((header.cmsg_level, header.cmsg_type, data, len - HEADER))
    }
}

/// Of which process a pidfd is.
fn pid_of(pidfd: &OwnedFd) -> Option<i32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    text.lines().find_map(|l| l.strip_prefix("Pid:"))?.trim().parse().ok()
}

/// recvmsg(2) that takes nothing out; the result, or minus the error.
fn peek(fd: i32, into: *mut u8, len: usize, record: &mut Record) -> i64 {
    let mut part = libc::iovec { iov_base: into.cast(), iov_len: len };
    // SAFETY: an all-zero msghdr is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = record.control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    message.msg_name = record.address.as_mut_ptr().cast();
    message.msg_namelen = record.address.len() as libc::socklen_t;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message names buffers that the caller vouches for, with their lengths; errno is a word of
    // this thread.
    unsafe {
        let got = libc::syscall(libc::SYS_recvmsg, fd, &raw mut message, flags);
        record.control_len = message.msg_controllen as usize;
        record.address_len = message.msg_namelen as usize;
        record.flags = message.msg_flags;
        if got < 0 { -i64::from(*libc::__errno_location()) } else { got }
    }
}

/// What the process that peeks works on.
#[repr(C)]
struct Walk {
    fd: i32,
    stream: bool,
    ends: bool,
    before: i32,
    limit: usize,
    buffer: *mut u8,
    room: usize,
    records: *mut Record,
    most: usize,
    count: usize,
    used: usize,
    full: bool,
    error: i32,
}

impl Walk {
    fn set(&self, offset: i32) {
        // SAFETY: SO_PEEK_OFF reads an int.
        unsafe {
            libc::syscall(
                libc::SYS_setsockopt,
                self.fd,
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                &raw const offset,
                size_of::<i32>(),
            );
        }
    }

    fn run(&mut self) {
        let mut empty = 0;
        loop {
            if self.stream && self.used >= self.limit {
                return;
            }
            if self.count == self.most || self.used == self.room {
                self.full = true;
                return;
            }
            // SAFETY: `count` is below `most`, and `used` below `room`.
            let (record, into) = unsafe { (&mut *self.records.add(self.count), self.buffer.add(self.used)) };
            let got = peek(self.fd, into, self.room - self.used, record);
            if got < 0 {
                let end = matches!(-got as i32, libc::EAGAIN | libc::EINVAL | libc::ENOTCONN);
                self.error = if end { 0 } else { -got as i32 };
                return;
            }
            let got = got as usize;
            record.at = self.used;
            record.len = got;
            if got == 0 && self.stream {
                record.discard();
                return;
            }
            self.count += 1;
            if got > self.room - self.used {
                self.full = true;
                return;
            }
            empty = if got == 0 { empty + 1 } else { 0 };
            if self.ends && (got == 0 && self.used >= self.limit || empty == EMPTY) {
                self.count -= empty as usize;
                return;
            }
            if self.stream && got > 1 && record.has_rights() {
                let last = self.last_message(got);
                self.set((self.used + got) as i32);
                let Some(last) = last else {
                    self.full = true;
                    return;
                };
                // SAFETY: as above.
                unsafe { (*self.records.add(self.count - 1)).before = last };
            }
            self.used += got;
        }
    }

    /// Where among the `got` bytes that were just read the message begins that descriptors came with: the last
    /// of them. A peek goes on into the next message for its descriptors even when it has room for no more
    /// bytes (net/unix/af_unix.c, `unix_stream_read_generic`), so that those do not tell. But bytes of one
    /// message that do not all fit into accessible memory are an error, or, behind others, end the read.
    fn last_message(&mut self, got: usize) -> Option<usize> {
        if self.room - self.used < 2 * got {
            return None;
        }
        self.set(self.used as i32);
        let mut record = Record::new();
        // SAFETY: one byte less than was read, up to the inaccessible page behind the buffer.
        let into = unsafe { self.buffer.add(self.room - (got - 1)) };
        let before = peek(self.fd, into, got, &mut record);
        record.discard();
        Some(usize::try_from(before).unwrap_or(0))
    }
}

extern "C" fn walk(argument: *mut libc::c_void) -> i32 {
    // SAFETY: `undying` gives a Walk that nobody else touches meanwhile.
    let walk = unsafe { &mut *argument.cast::<Walk>() };
    torpor_kernel::priority::urgent();
    walk.set(0);
    walk.run();
    walk.set(walk.before);
    0
}

/// Runs the walk in a process that outlives us, and waits for it.
fn undying(work: &mut Walk) -> nix::Result<()> {
    let mut stack = vec![0u128; STACK / 16];
    let mut before = nix::sys::signal::SigSet::empty();
    // What is meant for us (an interrupt from the terminal) must not end it halfway.
    nix::sys::signal::pthread_sigmask(
        nix::sys::signal::SigmaskHow::SIG_SETMASK,
        Some(&nix::sys::signal::SigSet::all()),
        Some(&mut before),
    )?;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    // SAFETY: the new process runs `walk` on a stack of its own while this thread waits, and touches what
    // `work` names; neither goes away before it has ended, unless all of us does but the memory it shares.
    let made = unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast();
        libc::clone(walk, top, flags, (&raw mut *work).cast())
    };
    let made = Errno::result(made);
    let mask = before.thread_set_mask();
    let pid = made?;
    loop {
        // SAFETY: no status is asked for. It ends without a signal, so that __WALL is needed.
        let got = unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
        if got == pid || Errno::last() != Errno::EINTR {
            break;
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, send, sendmsg, socketpair,
    };

    use super::*;

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn pass(from: &OwnedFd, data: &[u8], fds: &[i32]) {
        let part = [std::io::IoSlice::new(data)];
        let control = [ControlMessage::ScmRights(fds)];
        sendmsg::<UnixAddr>(from.as_raw_fd(), &part, &control, MsgFlags::empty(), None).unwrap();
    }

    fn set_offset(fd: &OwnedFd, offset: i32) {
        // SAFETY: SO_PEEK_OFF reads an int.
        let set = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                (&raw const offset).cast(),
                4,
            )
        };
        assert_eq!(set, 0);
    }

    fn queue(fd: &OwnedFd, kind: i32, bytes: u32) -> Vec<Peeked> {
        Queue { fd, kind, bytes, ended: false }.all().unwrap()
    }

    #[test]
    fn a_stream_is_cut_where_descriptors_begin() {
        let (a, b) = pair(SockType::Stream);
        let send = |data: &[u8]| send(a.as_raw_fd(), data, MsgFlags::empty()).unwrap();
        send(b"abc");
        pass(&a, b"defgh", &[0, 1]);
        pass(&a, b"i", &[2]);
        send(b"jk");
        for offset in [-1, 3] {
            set_offset(&b, offset);
            let seen: Vec<_> =
                queue(&b, libc::SOCK_STREAM, 11).into_iter().map(|p| (p.data, p.rights.len())).collect();
            let wanted =
                [(b"abc".to_vec(), 0), (b"defgh".to_vec(), 2), (b"i".to_vec(), 1), (b"jk".to_vec(), 0)];
            assert_eq!(seen, wanted);
            assert_eq!(peek_offset(&b), offset);
        }
        let mut all = [0u8; 20];
        set_offset(&b, -1);
        assert_eq!(nix::unistd::read(b.as_fd(), &mut all).unwrap(), 8);
    }

    #[test]
    fn messages_keep_their_bounds_and_what_is_attached() {
        for (kind, number) in
            [(SockType::Datagram, libc::SOCK_DGRAM), (SockType::SeqPacket, libc::SOCK_SEQPACKET)]
        {
            let (a, b) = pair(kind);
            let send = |data: &[u8]| send(a.as_raw_fd(), data, MsgFlags::empty()).unwrap();
            assert!(queue(&b, number, 0).is_empty());
            send(b"");
            send(b"two");
            pass(&a, b"", &[0]);
            send(&[7; 100_000]);
            let seen: Vec<_> =
                queue(&b, number, 3).into_iter().map(|p| (p.data.len(), p.rights.len())).collect();
            assert_eq!(seen, [(0, 0), (3, 0), (0, 1), (100_000, 0)]);
            // The empty one at the head is still there.
            assert_eq!(queue(&b, number, 3)[0].data.len(), 0);
            assert_eq!(peek_offset(&b), -1);
        }
    }

    #[test]
    fn many_messages() {
        let (a, b) = pair(SockType::Datagram);
        let mut size = 8 << 20;
        while nix::sys::socket::setsockopt(&a, nix::sys::socket::sockopt::SndBuf, &size).is_err() {
            size /= 2;
        }
        let mut sent = 0u32;
        while send(a.as_raw_fd(), &sent.to_ne_bytes(), MsgFlags::MSG_DONTWAIT).is_ok() {
            sent += 1;
        }
        let seen = queue(&b, libc::SOCK_DGRAM, 4);
        assert_eq!(seen.len() as u32, sent);
        assert!(seen.iter().zip(0u32..).all(|(p, n)| p.data == n.to_ne_bytes()));
    }
}
