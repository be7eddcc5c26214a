//! POSIX message queues: files of the mqueue file system (mq_overview(7)).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::error::check;
use crate::shared::Shared;
use crate::text::{list_numbers, number, words};
use crate::{Error, Pid, Result, child, fds};

/// include/uapi/linux/magic.h
const MQUEUE_MAGIC: i64 = 0x1980_0202;
/// Size that every queue has as a file (ipc/mqueue.c, `FILENT_SIZE`).
const FILENT_SIZE: i64 = 80;

/// What reading a queue as a file shows.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Status {
    /// Bytes in it.
    pub bytes: u64,
    /// Who asked to be notified of the next message (mq_notify(3)), and how (`SIGEV_*`).
    pub notify: Option<(i32, i32)>,
}

/// `mq_maxmsg`, `mq_msgsize`, `mq_curmsgs`
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[allow(missing_docs, reason = "they are those of struct mq_attr")]
pub struct Attributes {
    pub max_messages: u64,
    pub message_size: u64,
    pub messages: u64,
}

/// Whether a descriptor of a process is a message queue.
pub fn is_queue(pid: Pid, fd: i32, stat: &libc::stat) -> bool {
    if stat.st_size != FILENT_SIZE || stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return false;
    }
    let path = format!("/proc/{pid}/fd/{fd}");
    nix::sys::statfs::statfs(path.as_str()).is_ok_and(|fs| fs.filesystem_type().0 == MQUEUE_MAGIC)
}

/// Parses `QSIZE:129 NOTIFY:2 SIGNO:0 NOTIFY_PID:8260`.
pub fn parse_status(text: &[u8]) -> Result<Status> {
    let field = |name: &[u8]| -> Option<i64> {
        let mut all = words(text.trim_ascii_end());
        all.find_map(|word| number(word.strip_prefix(name)?.strip_prefix(b":")?))
    };
    let parsed = || {
        let bytes = u64::try_from(field(b"QSIZE")?).ok()?;
        let pid = i32::try_from(field(b"NOTIFY_PID")?).ok()?;
        let how = i32::try_from(field(b"NOTIFY")?).ok()?;
        Some(Status { bytes, notify: (pid != 0).then_some((pid, how)) })
    };
    parsed().ok_or_else(|| Error::parse("a message queue", text))
}

/// Reads the status through any descriptor of the queue that is open for reading.
pub fn status(fd: impl AsFd) -> Result<Status> {
    let mut text = [0u8; 256];
    let length = nix::sys::uio::pread(fd, &mut text, 0)
        .map_err(|errno| Error::syscall("pread", "a message queue", errno))?;
    parse_status(&text[..length])
}

/// Attributes of a queue.
pub fn attributes(fd: impl AsFd) -> Result<Attributes> {
    // SAFETY: an all-zero mq_attr is one to be filled.
    let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
    // SAFETY: mq_getsetattr fills the structure, and changes nothing without a new one.
    let got = unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::syscall(libc::SYS_mq_getsetattr, fd, std::ptr::null::<libc::mq_attr>(), &raw mut attr)
    };
    check(got, "mq_getsetattr", "a message queue")?;
    Ok(Attributes {
        max_messages: attr.mq_maxmsg as u64,
        message_size: attr.mq_msgsize as u64,
        messages: attr.mq_curmsgs as u64,
    })
}

/// The messages of a queue in their order: priority and text. `fd` is open for reading and writing, with
/// O_NONBLOCK.
///
/// There is no way to look at messages but to receive them. So a child takes them all out and puts them back, which
/// keeps their order; should we be killed in between, it goes on and finishes. Who uses the queue must stand still,
/// and nobody may wait for a notification.
pub fn peek(fd: impl AsFd) -> Result<Vec<(u32, Vec<u8>)>> {
    let attributes = attributes(&fd)?;
    let fd = fd.as_fd().as_raw_fd();
    let (count, size) = (attributes.messages as usize, attributes.message_size as usize);
    if count == 0 {
        return Ok(Vec::new());
    }
    // For each message its length, priority and text.
    let slot = (8 + size).next_multiple_of(8);
    let mut room = Shared::new(slot * count)?;
    let bytes = room.bytes_mut();
    // SAFETY: the child makes system calls on memory that was made before; nothing is allocated.
    let taken = unsafe {
        child::run(None, || {
            // Should we be killed now, its users go on while it is at work.
            let high = libc::sched_param { sched_priority: 2 };
            libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const high);
            let (mut taken, mut error) = (0usize, 0i64);
            let none = std::ptr::null::<libc::timespec>();
            for part in bytes.chunks_exact_mut(slot) {
                let (head, text) = part.split_at_mut(8);
                let mut priority = 0u32;
                let call = libc::SYS_mq_timedreceive;
                let got = libc::syscall(call, fd, text.as_mut_ptr(), size, &raw mut priority, none);
                if got < 0 {
                    if Errno::last() != Errno::EAGAIN {
                        error = -i64::from(Errno::last() as i32);
                    }
                    break;
                }
                head[..4].copy_from_slice(&(got as u32).to_ne_bytes());
                head[4..].copy_from_slice(&priority.to_ne_bytes());
                taken += 1;
            }
            for part in bytes.chunks_exact_mut(slot).take(taken) {
                let (length, priority) = (word(part, 0), word(part, 4));
                let call = libc::SYS_mq_timedsend;
                while libc::syscall(call, fd, part[8..].as_ptr(), length as usize, priority, none) < 0 {
                    // Somebody filled the room meanwhile, or memory is short: there will be some again.
                    if matches!(Errno::last(), Errno::EBADF | Errno::EMSGSIZE) {
                        error = -i64::from(Errno::last() as i32);
                        break;
                    }
                    libc::poll(std::ptr::null_mut(), 0, 1);
                }
            }
            if error < 0 { error } else { taken as i64 }
        })?
    };
    if taken < 0 {
        let errno = Errno::from_raw(-taken as i32);
        return Err(Error::syscall("mq_timedreceive", "a message queue", errno));
    }
    let messages = bytes.chunks_exact(slot).take(taken as usize);
    Ok(messages.map(|part| (word(part, 4), part[8..][..word(part, 0) as usize].to_vec())).collect())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0u8; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// Sends a message; never waits if `fd` has O_NONBLOCK.
pub fn send(fd: impl AsFd, priority: u32, text: &[u8]) -> Result<()> {
    let none = std::ptr::null::<libc::timespec>();
    // SAFETY: reads the text.
    let got = unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::syscall(libc::SYS_mq_timedsend, fd, text.as_ptr(), text.len(), priority, none)
    };
    check(got, "mq_timedsend", "a message queue").map(drop)
}

/// Takes every message out of a queue; `fd` has O_NONBLOCK.
pub fn drain(fd: impl AsFd) -> Result<()> {
    let mut text = vec![0u8; attributes(&fd)?.message_size as usize];
    let none = std::ptr::null::<libc::timespec>();
    loop {
        // SAFETY: fills at most `text`, and the priority is not asked for.
        let got = unsafe {
            let fd = fd.as_fd().as_raw_fd();
            let nobody = std::ptr::null_mut::<u32>();
            libc::syscall(libc::SYS_mq_timedreceive, fd, text.as_mut_ptr(), text.len(), nobody, none)
        };
        match check(got, "mq_timedreceive", "a message queue") {
            Ok(_) => {}
            Err(e) if e.errno() == Some(Errno::EAGAIN) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Processes that have the inode open, of those whose descriptors we may see.
pub fn open_in(device: u64, inode: u64) -> Vec<Pid> {
    let has = |pid: &Pid| {
        let all = fds::list(*pid).unwrap_or_default();
        all.into_iter().any(|fd| fds::stat(*pid, fd).is_ok_and(|s| s.st_dev == device && s.st_ino == inode))
    };
    list_numbers("/proc").unwrap_or_default().into_iter().map(Pid).filter(has).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};

    #[test]
    fn status_lines() {
        let text = b"QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260  \n";
        assert_eq!(parse_status(text).unwrap(), Status { bytes: 129, notify: Some((8260, 2)) });
        let text = b"QSIZE:0          NOTIFY:0     SIGNO:0     NOTIFY_PID:0     \n";
        assert_eq!(parse_status(text).unwrap(), Status { bytes: 0, notify: None });
        for odd in [&b""[..], b"QSIZE:", b"QSIZE:1 NOTIFY:1", b"QSIZE:-1 NOTIFY:0 NOTIFY_PID:0", b"\xff\n"] {
            assert!(parse_status(odd).is_err());
        }
    }

    #[test]
    fn peeking_keeps_the_order() {
        let name = std::ffi::CString::new(format!("/torpor-test-{}", std::process::id())).unwrap();
        // SAFETY: a queue of our own, by a name that ends with a zero; default attributes.
        let fd = unsafe {
            let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_NONBLOCK;
            let fd = libc::mq_open(name.as_ptr(), flags, 0o600, std::ptr::null::<libc::mq_attr>());
            if fd < 0 {
                eprintln!("skipped: mq_open: {}", Errno::last());
                return;
            }
            libc::mq_unlink(name.as_ptr());
            OwnedFd::from_raw_fd(fd)
        };
        let stat = nix::sys::stat::fstat(&fd).unwrap();
        assert!(is_queue(Pid::this(), fd.as_raw_fd(), &stat));
        assert_eq!(open_in(stat.st_dev, stat.st_ino), [Pid::this()]);
        assert_eq!(peek(&fd).unwrap(), []);
        for (priority, text) in [(1, "a"), (7, "b"), (1, "c"), (0, ""), (7, "d")] {
            send(&fd, priority, text.as_bytes()).unwrap();
        }
        let wanted: Vec<(u32, Vec<u8>)> =
            [(7, "b"), (7, "d"), (1, "a"), (1, "c"), (0, "")].map(|(p, t)| (p, t.into())).into();
        assert_eq!(peek(&fd).unwrap(), wanted);
        assert_eq!(peek(&fd).unwrap(), wanted);
        assert_eq!(status(&fd).unwrap(), Status { bytes: 4, notify: None });
        drain(&fd).unwrap();
        assert_eq!(attributes(&fd).unwrap().messages, 0);
    }
}
