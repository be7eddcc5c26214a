//! /proc/PID/fdinfo/FD: what the kernel tells of an open file description beyond its path.
//!
//! Common lines come first (fs/proc/fd.c: pos, flags, mnt_id, ino, then locks), then those of the file's kind, from
//! its `show_fdinfo`. Nothing says which kind follows, so the keys decide. A key not known here is kept in
//! `unknown`: a dumper must be able to see that there is state which it does not understand.
//!
//! Bases differ by line and are the kernel's choice: fs/eventfd.c, fs/timerfd.c, fs/signalfd.c, fs/eventpoll.c,
//! fs/notify/fdinfo.c, fs/pidfs.c. Devices in epoll, inotify and fanotify lines (`sdev`) are in the kernel's internal
//! encoding: major << 20 | minor.

use crate::text::{device, hex, key_value, lines, number, octal, words};
use crate::{Error, Pid, Result};

/// One fdinfo file.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct FdInfo {
    /// File offset. Printed signed, and negative offsets exist (/dev/mem, /proc/PID/mem): kept as the same 64 bits.
    pub pos: u64,
    /// Status flags as of fcntl(2), and `O_CLOEXEC` of the descriptor.
    pub flags: u32,
    /// Mount the file was opened through, as in mountinfo; 0 when the kernel does not say (before 3.15).
    pub mnt_id: i32,
    /// Inode; 0 when the kernel does not say (before 5.14).
    pub ino: u64,
    /// Locks held through this file description (and, for `Posix`, by this process on this file).
    pub locks: Vec<Lock>,
    /// What the kind of file adds.
    pub detail: Detail,
    /// Keys and values not understood.
    pub unknown: Vec<(Vec<u8>, Vec<u8>)>,
}

impl FdInfo {
    /// Whether the descriptor is close-on-exec.
    pub fn cloexec(&self) -> bool {
        self.flags & libc::O_CLOEXEC.cast_unsigned() != 0
    }
}

/// What the kind of file adds.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub enum Detail {
    /// No known line.
    #[default]
    Plain,
    /// eventfd(2).
    Eventfd {
        /// The counter.
        count: u64,
        /// `EFD_SEMAPHORE`; `None` when the kernel does not say (before 6.5).
        semaphore: Option<bool>,
        /// Number unique among eventfds; `None` before 5.2.
        id: Option<i32>,
    },
    /// signalfd(2).
    Signalfd {
        /// Accepted signals, bit 0 for signal 1.
        mask: u64,
    },
    /// timerfd_create(2).
    Timerfd(Timerfd),
    /// epoll_create(2), with what it watches.
    Epoll(Vec<EpollTarget>),
    /// inotify_init(2), with its watches, newest first.
    Inotify(Vec<InotifyWatch>),
    /// fanotify_init(2).
    Fanotify {
        /// Flags of fanotify_init(2).
        flags: u32,
        /// File flags of the descriptors it hands out.
        event_flags: u32,
        /// Its marks.
        marks: Vec<FanotifyMark>,
    },
    /// pidfd_open(2).
    Pidfd {
        /// The process in the namespace of this /proc; -1 when it is gone, 0 when not visible.
        pid: i32,
        /// The same in each nested pid namespace, outermost first.
        nspid: Vec<i32>,
    },
    /// A socket with descriptors in flight (unix sockets, since 5.18).
    Socket {
        /// How many descriptors wait in its receive queue.
        scm_fds: u32,
    },
    /// io_uring_setup(2). Nothing is told while a call has the ring locked.
    IoUring(IoUring),
    /// The master side of a pseudo terminal.
    Tty {
        /// Number of the slave: /dev/pts/N.
        index: u32,
    },
}

/// State of an io_uring (io_uring/fdinfo.c).
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct IoUring {
    /// Entries of the submission queue, less one.
    pub sq_mask: u32,
    /// Entries of the completion queue, less one.
    pub cq_mask: u32,
    /// Requests that the kernel has taken, ever, modulo 2^32.
    pub submitted: u32,
    /// Completions that the kernel has written, ever, modulo 2^32. A request may have none or several.
    pub completed: u32,
    /// The thread that polls the submission queue, if there is one.
    pub poller: Option<i32>,
    /// How many files are registered.
    pub files: u32,
    /// How many buffers are registered.
    pub buffers: u32,
    /// Kinds of the requests that wait for something by polling.
    pub polls: Vec<u32>,
}

/// State of a timerfd.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Timerfd {
    /// Its clock.
    pub clockid: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// Flags of timerfd_settime(2): `TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`.
    pub settime_flags: u32,
    /// Time left until the next expiration, relative even for an absolute timer: seconds, nanoseconds.
    pub it_value: (i64, i64),
    /// The interval.
    pub it_interval: (i64, i64),
}

/// One entry of an epoll set.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct EpollTarget {
    /// Descriptor number at the time of `EPOLL_CTL_ADD`: it may be closed or stand for another file now.
    pub fd: i32,
    /// Watched events, including `EPOLLET`, `EPOLLONESHOT` and so on.
    pub events: u32,
    /// The user's data.
    pub data: u64,
    /// Offset of the watched file.
    pub pos: i64,
    /// Inode of the watched file.
    pub ino: u64,
    /// Device of the watched file.
    pub sdev: u32,
}

/// A file handle, as of name_to_handle_at(2).
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct FileHandle {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Their type.
    pub kind: i32,
}

/// One watch of an inotify instance.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct InotifyWatch {
    /// The watch descriptor.
    pub wd: i32,
    /// Watched inode.
    pub ino: u64,
    /// Its device.
    pub sdev: u32,
    /// Watched events.
    pub mask: u32,
    /// Ignored events; always 0 of late.
    pub ignored_mask: u32,
    /// How to open the inode; `None` when the file system has no handles or CONFIG_EXPORTFS is off.
    pub handle: Option<FileHandle>,
}

/// What a fanotify mark stands on.
#[derive(Clone, Eq, PartialEq, Debug)]
pub enum FanotifyObject {
    /// An inode.
    Inode {
        /// Its number.
        ino: u64,
        /// Its device.
        sdev: u32,
        /// How to open it.
        handle: Option<FileHandle>,
    },
    /// A mount.
    Mount {
        /// As in mountinfo.
        mnt_id: i32,
    },
    /// A whole file system.
    Filesystem {
        /// Its device.
        sdev: u32,
    },
}

/// One mark of a fanotify group.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct FanotifyMark {
    /// Where it stands.
    pub object: FanotifyObject,
    /// `FAN_MARK_*` flags.
    pub mflags: u32,
    /// Watched events.
    pub mask: u64,
    /// Ignored events.
    pub ignored_mask: u64,
}

/// Kinds of file locks.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum LockKind {
    /// fcntl(2) `F_SETLK`: owned by the process.
    Posix,
    /// flock(2): owned by the open file description.
    Flock,
    /// fcntl(2) `F_OFD_SETLK`: owned by the open file description.
    Ofd,
    /// fcntl(2) `F_SETLEASE`: owned by the open file description.
    Lease,
    /// A lease of a file server (`F_SETDELEG`).
    Delegation,
}

/// One lock.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Lock {
    /// Its kind.
    pub kind: LockKind,
    /// Exclusive (shared otherwise).
    pub write: bool,
    /// A lease that is being broken: its holder has been told to give it up.
    pub breaking: bool,
    /// The owner; for `Flock` and `Lease` who took it, which may be another process than the one looked at; -1 for `Ofd`.
    pub pid: i32,
    /// Device: major, minor.
    pub dev: (u32, u32),
    /// Inode.
    pub ino: u64,
    /// First byte.
    pub start: u64,
    /// Last byte; `None` is the end of the file, wherever it is.
    pub end: Option<u64>,
}

/// Reads the info of one descriptor.
pub fn fdinfo(pid: Pid, fd: i32) -> Result<FdInfo> {
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    parse_file(&path, &crate::text::read_record(&path)?)
}

/// Parses the text of an fdinfo file.
pub fn parse(text: &[u8]) -> Result<FdInfo> {
    parse_file("fdinfo", text)
}

fn parse_file(file: &str, text: &[u8]) -> Result<FdInfo> {
    let mut info = FdInfo {
        pos: 0,
        flags: 0,
        mnt_id: 0,
        ino: 0,
        locks: Vec::new(),
        detail: Detail::Plain,
        unknown: Vec::new(),
    };
    for line in lines(text) {
        if !line.is_empty() {
            add(&mut info, line).ok_or_else(|| Error::parse(file, line))?;
        }
    }
    // An epoll set or an inotify instance that watches nothing prints nothing and stays `Plain`: the link tells the kind.
    Ok(info)
}

/// Takes one line in; `None` if it does not read as its key promises.
fn add(info: &mut FdInfo, line: &[u8]) -> Option<()> {
    if line.starts_with(b"inotify wd:") {
        let watch = inotify_watch(line)?;
        match &mut info.detail {
            Detail::Inotify(watches) => watches.push(watch),
            detail => *detail = Detail::Inotify(vec![watch]),
        }
        return Some(());
    }
    if line.starts_with(b"fanotify ") {
        return fanotify_line(info, line);
    }
    // `  op=6, task_works=0`, below `PollList:`
    if let Some(rest) = line.strip_prefix(b"  op=") {
        io_uring(info)?.polls.push(number(rest.split(|b| *b == b',').next()?)?);
        return Some(());
    }
    let Some((key, value)) = key_value(line) else {
        info.unknown.push((line.to_vec(), Vec::new()));
        return Some(());
    };
    match key {
        b"pos" => info.pos = number::<i64>(value)?.cast_unsigned(),
        b"flags" => info.flags = u32::try_from(octal(value)?).ok()?,
        b"mnt_id" => info.mnt_id = number(value)?,
        b"ino" => info.ino = number(value)?,
        b"lock" => info.locks.push(lock(value)?),
        b"eventfd-count" => *eventfd(info)?.0 = hex(value)?,
        b"eventfd-id" => *eventfd(info)?.1 = Some(number(value)?),
        b"eventfd-semaphore" => *eventfd(info)?.2 = Some(number::<u32>(value)? != 0),
        b"sigmask" => info.detail = Detail::Signalfd { mask: hex(value)? },
        b"clockid" => timerfd(info)?.clockid = number(value)?,
        b"ticks" => timerfd(info)?.ticks = number(value)?,
        b"settime flags" => timerfd(info)?.settime_flags = u32::try_from(octal(value)?).ok()?,
        b"it_value" => timerfd(info)?.it_value = seconds(value)?,
        b"it_interval" => timerfd(info)?.it_interval = seconds(value)?,
        b"tfd" => {
            let target = epoll_target(line)?;
            match &mut info.detail {
                Detail::Epoll(targets) => targets.push(target),
                detail => *detail = Detail::Epoll(vec![target]),
            }
        }
        b"Pid" => info.detail = Detail::Pidfd { pid: number(value)?, nspid: Vec::new() },
        b"NSpid" => match &mut info.detail {
            Detail::Pidfd { nspid, .. } => *nspid = words(value).map(number).collect::<Option<_>>()?,
            _ => info.unknown.push((key.to_vec(), value.to_vec())),
        },
        b"scm_fds" => info.detail = Detail::Socket { scm_fds: number(value)? },
        b"SqMask" => io_uring(info)?.sq_mask = hex32(value)?,
        b"CqMask" => io_uring(info)?.cq_mask = hex32(value)?,
        b"CachedSqHead" => io_uring(info)?.submitted = number(value)?,
        b"CachedCqTail" => io_uring(info)?.completed = number(value)?,
        b"SqThread" => io_uring(info)?.poller = Some(number(value)?).filter(|tid| *tid > 0),
        b"UserFiles" => io_uring(info)?.files = number(value)?,
        b"UserBufs" => io_uring(info)?.buffers = number(value)?,
        b"tty-index" => info.detail = Detail::Tty { index: number(value)? },
        _ => info.unknown.push((key.to_vec(), value.to_vec())),
    }
    Some(())
}

fn eventfd(info: &mut FdInfo) -> Option<(&mut u64, &mut Option<i32>, &mut Option<bool>)> {
    if !matches!(info.detail, Detail::Eventfd { .. }) {
        info.detail = Detail::Eventfd { count: 0, semaphore: None, id: None };
    }
    match &mut info.detail {
        Detail::Eventfd { count, semaphore, id } => Some((count, id, semaphore)),
        _ => None,
    }
}

fn io_uring(info: &mut FdInfo) -> Option<&mut IoUring> {
    if !matches!(info.detail, Detail::IoUring(_)) {
        info.detail = Detail::IoUring(IoUring::default());
    }
    match &mut info.detail {
        Detail::IoUring(ring) => Some(ring),
        _ => None,
    }
}

fn timerfd(info: &mut FdInfo) -> Option<&mut Timerfd> {
    if !matches!(info.detail, Detail::Timerfd(_)) {
        info.detail = Detail::Timerfd(Timerfd::default());
    }
    match &mut info.detail {
        Detail::Timerfd(timer) => Some(timer),
        _ => None,
    }
}

/// `(8, 998844086)`
fn seconds(value: &[u8]) -> Option<(i64, i64)> {
    let inner = value.strip_prefix(b"(")?.strip_suffix(b")")?;
    let comma = inner.iter().position(|byte| *byte == b',')?;
    Some((number(&inner[..comma])?, number(&inner[comma + 1..])?))
}

/// The word after `key`: `value(b"ino:3c4a7 sdev:fe", b"ino:")`, with blanks after the colon allowed.
fn value<'a>(line: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let mut at = 0;
    loop {
        let found = at + line.get(at..)?.windows(key.len()).position(|window| window == key)?;
        // `ino:` must not be found inside another key.
        if found == 0 || line[found - 1] == b' ' {
            let rest = line[found + key.len()..].trim_ascii_start();
            return Some(rest.split(|byte| *byte == b' ').next().unwrap_or(rest));
        }
        at = found + 1;
    }
}

fn hex32(word: &[u8]) -> Option<u32> {
    u32::try_from(hex(word)?).ok()
}

/// `tfd:        6 events:       1f data:                6  pos:0 ino:40e sdev:10`
fn epoll_target(line: &[u8]) -> Option<EpollTarget> {
    Some(EpollTarget {
        fd: number(value(line, b"tfd:")?)?,
        events: hex32(value(line, b"events:")?)?,
        data: hex(value(line, b"data:")?)?,
        // pos, ino and sdev are printed since 4.13.
        pos: value(line, b"pos:").map_or(Some(0), number)?,
        ino: value(line, b"ino:").map_or(Some(0), hex)?,
        sdev: value(line, b"sdev:").map_or(Some(0), hex32)?,
    })
}

/// `inotify wd:2 ino:13 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:1300000000000000`
fn inotify_watch(line: &[u8]) -> Option<InotifyWatch> {
    Some(InotifyWatch {
        // Printed with %x, though it is an int.
        wd: hex32(value(line, b"wd:")?)?.cast_signed(),
        ino: hex(value(line, b"ino:")?)?,
        sdev: hex32(value(line, b"sdev:")?)?,
        mask: hex32(value(line, b"mask:")?)?,
        ignored_mask: hex32(value(line, b"ignored_mask:")?)?,
        handle: handle(line)?,
    })
}

/// The handle at the end of a line; the outer `None` is for one that does not read well.
fn handle(line: &[u8]) -> Option<Option<FileHandle>> {
    let Some(digits) = value(line, b"f_handle:") else { return Some(None) };
    let bytes = digits.chunks(2).map(|pair| hex(pair).and_then(|byte| u8::try_from(byte).ok()));
    let bytes: Vec<u8> = bytes.collect::<Option<_>>()?;
    let length = hex(value(line, b"fhandle-bytes:")?)?;
    let kind = hex32(value(line, b"fhandle-type:")?)?.cast_signed();
    if digits.len() % 2 != 0 || bytes.len() as u64 != length {
        return None;
    }
    Some(Some(FileHandle { bytes, kind }))
}

/// `fanotify flags:0 event-flags:8000`, or a mark.
fn fanotify_line(info: &mut FdInfo, line: &[u8]) -> Option<()> {
    if !matches!(info.detail, Detail::Fanotify { .. }) {
        info.detail = Detail::Fanotify { flags: 0, event_flags: 0, marks: Vec::new() };
    }
    let Detail::Fanotify { flags, event_flags, marks } = &mut info.detail else { return None };
    if let Some(word) = value(line, b"flags:") {
        *flags = hex32(word)?;
        *event_flags = hex32(value(line, b"event-flags:")?)?;
        return Some(());
    }
    let object = match (value(line, b"mnt_id:"), value(line, b"ino:"), value(line, b"sdev:")) {
        (Some(mount), ..) => FanotifyObject::Mount { mnt_id: hex32(mount)?.cast_signed() },
        (_, Some(ino), Some(sdev)) => {
            FanotifyObject::Inode { ino: hex(ino)?, sdev: hex32(sdev)?, handle: handle(line)? }
        }
        (_, _, Some(sdev)) => FanotifyObject::Filesystem { sdev: hex32(sdev)? },
        _ => {
            info.unknown.push((line.to_vec(), Vec::new()));
            return Some(());
        }
    };
    marks.push(FanotifyMark {
        object,
        mflags: hex32(value(line, b"mflags:")?)?,
        mask: hex(value(line, b"mask:")?)?,
        ignored_mask: hex(value(line, b"ignored_mask:")?)?,
    });
    Some(())
}

/// `1: FLOCK  ADVISORY  WRITE 1234 08:02:131 0 EOF` (fs/locks.c, `lock_get_status`)
fn lock(line: &[u8]) -> Option<Lock> {
    let mut words = words(line).skip(1);
    let kind = match words.next()? {
        b"POSIX" | b"ACCESS" => LockKind::Posix,
        b"FLOCK" => LockKind::Flock,
        b"OFDLCK" => LockKind::Ofd,
        b"LEASE" => LockKind::Lease,
        b"DELEG" => LockKind::Delegation,
        _ => return None,
    };
    let breaking = words.next()? == b"BREAKING";
    // A lease to be broken down to nothing reads UNLCK; it was a write lease or a read lease, and is neither now.
    let write = match words.next()? {
        b"WRITE" => true,
        b"READ" | b"UNLCK" => false,
        _ => return None,
    };
    let pid = number(words.next()?)?;
    let place = words.next()?;
    let colon = place.iter().rposition(|byte| *byte == b':')?;
    let (dev, ino) = (device(&place[..colon], 16)?, number(&place[colon + 1..])?);
    let start = number(words.next()?)?;
    let end = match words.next()? {
        b"EOF" => None,
        end => Some(number(end)?),
    };
    Some(Lock { kind, write, breaking, pid, dev, ino, start, end })
}

#[cfg(test)]
mod tests;
