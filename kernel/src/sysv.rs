//! System V IPC: what /proc/sysvipc lists, and the calls on what is listed (sysvipc(7)).
//!
//! The lists show every object of the namespace to everybody, whatever its mode (ipc/shm.c, ipc/sem.c and ipc/msg.c,
//! `sysvipc_*_proc_show`); the calls want permission.

use nix::errno::Errno;

use crate::error::check;
use crate::text::{lines, number, octal, read, words};
use crate::{Error, Pid, Result};

/// include/uapi/linux/msg.h
const MSG_COPY: i32 = 0o40000;
/// Bits of the mode of a segment (include/uapi/linux/shm.h).
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;
/// How many objects a kind can have: the rest of an id is a sequence number (ipc/util.h, `IPCMNI_SHIFT`).
pub const INDEXES: i32 = 1 << 15;

/// `struct ipc64_perm`
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
#[allow(missing_docs, reason = "they are those of the structure")]
pub struct Permissions {
    pub key: i32,
    pub uid: u32,
    pub gid: u32,
    pub cuid: u32,
    pub cgid: u32,
    /// Nine bits.
    pub mode: u32,
}

/// A line of /proc/sysvipc/shm.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Segment {
    /// shmid
    pub id: i32,
    /// Owner and mode.
    pub permissions: Permissions,
    /// Marked to be removed.
    pub removed: bool,
    /// Locked into memory.
    pub locked: bool,
    /// Bytes.
    pub size: u64,
    /// Pid of the creator.
    pub creator: i32,
    /// Pid of who attached or detached it last.
    pub last: i32,
    /// Areas of memory that map it, of all processes.
    pub attached: u64,
    /// Seconds since 1970 of its creation or last change.
    pub changed: u64,
}

/// A line of /proc/sysvipc/sem.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Set {
    /// semid
    pub id: i32,
    /// Owner and mode.
    pub permissions: Permissions,
    /// How many semaphores.
    pub count: u32,
    /// Seconds since 1970 of the last semop.
    pub operated: u64,
    /// The same of its creation or last change.
    pub changed: u64,
}

/// A line of /proc/sysvipc/msg.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Queue {
    /// msqid
    pub id: i32,
    /// Owner and mode.
    pub permissions: Permissions,
    /// Bytes in it.
    pub bytes: u64,
    /// Messages in it.
    pub count: u64,
    /// Pid of the last sender.
    pub sender: i32,
    /// Pid of the last receiver.
    pub receiver: i32,
    /// Seconds since 1970 of the last send and the last receive, whichever was later.
    pub used: u64,
    /// The same of its creation or last change.
    pub changed: u64,
}

/// All segments.
pub fn segments() -> Result<Vec<Segment>> {
    parse_segments(&list("shm")?)
}

/// All semaphore sets.
pub fn sets() -> Result<Vec<Set>> {
    parse_sets(&list("sem")?)
}

/// All message queues.
pub fn queues() -> Result<Vec<Queue>> {
    parse_queues(&list("msg")?)
}

fn list(kind: &str) -> Result<Vec<u8>> {
    match read(&format!("/proc/sysvipc/{kind}")) {
        // A kernel without System V IPC has no such object.
        Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

/// The fields of each line but the heading.
fn rows<'a, T>(file: &'static str, text: &'a [u8], row: impl Fn(&[&'a [u8]]) -> Option<T>) -> Result<Vec<T>> {
    lines(text)
        .skip(1)
        .map(|line| {
            let fields: Vec<&[u8]> = words(line).collect();
            row(&fields).ok_or_else(|| Error::parse(file, line))
        })
        .collect()
}

fn field<T: std::str::FromStr>(fields: &[&[u8]], at: usize) -> Option<T> {
    number(fields.get(at)?)
}

/// Parses /proc/sysvipc/shm: key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime ...
pub fn parse_segments(text: &[u8]) -> Result<Vec<Segment>> {
    rows("/proc/sysvipc/shm", text, |f| {
        let mode = u32::try_from(octal(f.get(2)?)?).ok()?;
        Some(Segment {
            id: field(f, 1)?,
            permissions: Permissions {
                key: field(f, 0)?,
                uid: field(f, 7)?,
                gid: field(f, 8)?,
                cuid: field(f, 9)?,
                cgid: field(f, 10)?,
                mode: mode & 0o777,
            },
            removed: mode & SHM_DEST != 0,
            locked: mode & SHM_LOCKED != 0,
            size: field(f, 3)?,
            creator: field(f, 4)?,
            last: field(f, 5)?,
            attached: field(f, 6)?,
            changed: field(f, 13)?,
        })
    })
}

/// Parses /proc/sysvipc/sem: key semid perms nsems uid gid cuid cgid otime ctime
pub fn parse_sets(text: &[u8]) -> Result<Vec<Set>> {
    rows("/proc/sysvipc/sem", text, |f| {
        Some(Set {
            id: field(f, 1)?,
            permissions: Permissions {
                key: field(f, 0)?,
                uid: field(f, 4)?,
                gid: field(f, 5)?,
                cuid: field(f, 6)?,
                cgid: field(f, 7)?,
                mode: u32::try_from(octal(f.get(2)?)?).ok()? & 0o777,
            },
            count: field(f, 3)?,
            operated: field(f, 8)?,
            changed: field(f, 9)?,
        })
    })
}

/// Parses /proc/sysvipc/msg: key msqid perms cbytes qnum lspid lrpid uid gid cuid cgid stime rtime ctime
pub fn parse_queues(text: &[u8]) -> Result<Vec<Queue>> {
    rows("/proc/sysvipc/msg", text, |f| {
        let (sent, received): (u64, u64) = (field(f, 11)?, field(f, 12)?);
        Some(Queue {
            id: field(f, 1)?,
            permissions: Permissions {
                key: field(f, 0)?,
                uid: field(f, 7)?,
                gid: field(f, 8)?,
                cuid: field(f, 9)?,
                cgid: field(f, 10)?,
                mode: u32::try_from(octal(f.get(2)?)?).ok()? & 0o777,
            },
            bytes: field(f, 3)?,
            count: field(f, 4)?,
            sender: field(f, 5)?,
            receiver: field(f, 6)?,
            used: sent.max(received),
            changed: field(f, 13)?,
        })
    })
}

/// The values of a set of `count` semaphores.
pub fn values(id: i32, count: u32) -> Result<Vec<u16>> {
    let mut values = vec![0u16; count as usize];
    // SAFETY: GETALL fills as many words as the set has semaphores, which never changes for an id.
    let got = unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) };
    check(got.into(), "semctl(GETALL)", id).map(|_| values)
}

/// The value of one semaphore.
pub fn value(id: i32, semaphore: u32) -> Result<u16> {
    // SAFETY: GETVAL takes numbers only.
    let got = unsafe { libc::semctl(id, semaphore as i32, libc::GETVAL) };
    check(got.into(), "semctl(GETVAL)", id).map(|value| value as u16)
}

/// Sets all values of a set, which forgets all adjustments.
pub fn set_values(id: i32, values: &[u16]) -> Result<()> {
    // SAFETY: SETALL reads as many words as the set has semaphores; the caller got them from it.
    let got = unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) };
    check(got.into(), "semctl(SETALL)", id).map(drop)
}

/// Who operated last on a semaphore.
pub fn last_operator(id: i32, semaphore: u32) -> Result<i32> {
    // SAFETY: GETPID takes numbers only.
    let got = unsafe { libc::semctl(id, semaphore as i32, libc::GETPID) };
    check(got.into(), "semctl(GETPID)", id).map(|pid| pid as i32)
}

/// How many bytes a queue takes.
pub fn capacity(id: i32) -> Result<u64> {
    // SAFETY: an all-zero msqid_ds is one to be filled.
    let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT fills the structure.
    let got = unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut status) };
    check(got.into(), "msgctl(IPC_STAT)", id).map(|_| status.msg_qbytes)
}

/// A message of a queue, which stays in it: type and text. `None` behind the last one. Needs a kernel with
/// CONFIG_CHECKPOINT_RESTORE, else ENOSYS (msgrcv(2), `MSG_COPY`).
pub fn peek(id: i32, index: usize, room: usize) -> Result<Option<(i64, Vec<u8>)>> {
    let mut buffer = vec![0u8; 8 + room];
    // SAFETY: msgrcv fills a word and at most `room` bytes behind it.
    let got = unsafe {
        let flags = MSG_COPY | libc::IPC_NOWAIT;
        libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, index as libc::c_long, flags)
    };
    match check(got as libc::c_long, "msgrcv(MSG_COPY)", id) {
        Ok(length) => {
            let kind = i64::from_ne_bytes(buffer[..8].try_into().expect("eight bytes"));
            buffer.drain(..8);
            buffer.truncate(length as usize);
            Ok(Some((kind, buffer)))
        }
        Err(e) if e.errno() == Some(Errno::ENOMSG) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A segment in our own memory. Detached on drop.
#[derive(Debug)]
pub struct Attached {
    start: *mut u8,
    size: usize,
}

// SAFETY: a place in memory that belongs to no thread in particular.
unsafe impl Send for Attached {}
// SAFETY: as above; all access goes through raw copies.
unsafe impl Sync for Attached {}

impl Attached {
    /// Attaches all of a segment of `size` bytes.
    pub fn new(id: i32, size: u64, write: bool) -> Result<Self> {
        // SAFETY: shmat chooses a free place.
        let start = unsafe { libc::shmat(id, std::ptr::null(), if write { 0 } else { libc::SHM_RDONLY }) };
        if start.addr() == usize::MAX {
            return Err(Error::last("shmat", id));
        }
        Ok(Attached { start: start.cast(), size: size as usize })
    }

    /// The range of addresses it has.
    pub fn range(&self) -> (u64, u64) {
        let start = self.start.addr() as u64;
        (start, start + (self.size as u64).next_multiple_of(4096))
    }

    /// Copies what it holds from `offset` on; `bytes` must end within its pages.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let (start, end) = self.range();
        assert!(offset.checked_add(bytes.len() as u64).is_some_and(|e| e <= end - start));
        // SAFETY: inside of the attached pages; others may write there, and then see for themselves.
        unsafe { self.start.add(offset as usize).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// The same the other way; it must have been attached for writing.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let (start, end) = self.range();
        assert!(offset.checked_add(bytes.len() as u64).is_some_and(|e| e <= end - start));
        // SAFETY: as above.
        unsafe { self.start.add(offset as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: our own attachment.
        unsafe { libc::shmdt(self.start.cast()) };
    }
}

/// Processes that have the segment attached, of those whose memory maps we may read.
pub fn attached_by(id: i32) -> Vec<Pid> {
    let pids = crate::text::list_numbers("/proc").unwrap_or_default();
    let has = |pid: &Pid| {
        crate::maps::maps(*pid).is_ok_and(|maps| {
            maps.iter().any(|m| matches!(m.kind(), crate::maps::Kind::SysV(_)) && m.inode == id as u64)
        })
    };
    pids.into_iter().map(Pid).filter(has).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHM: &[u8] = b"       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap
-559038737      32769  3600                  4096   123   456      2  1000   100     0     0 1700000000          0 1699999999                  4096                     0
";

    #[test]
    fn segments_of_any_key() {
        let all = parse_segments(SHM).unwrap();
        let permissions =
            Permissions { key: 0xdead_beefu32 as i32, uid: 1000, gid: 100, cuid: 0, cgid: 0, mode: 0o600 };
        let wanted = Segment {
            id: 32769,
            permissions,
            removed: true,
            locked: true,
            size: 4096,
            creator: 123,
            last: 456,
            attached: 2,
            changed: 1_699_999_999,
        };
        assert_eq!(all, [wanted]);
    }

    #[test]
    fn odd_lists() {
        for parse in [
            |t: &[u8]| parse_segments(t).map(|v| v.len()),
            |t: &[u8]| parse_sets(t).map(|v| v.len()),
            |t: &[u8]| parse_queues(t).map(|v| v.len()),
        ] {
            assert_eq!(parse(b"").unwrap(), 0);
            assert_eq!(parse(b"key id\n").unwrap(), 0);
            assert!(parse(b"key id\n1 2 600\n").is_err());
            assert!(parse(b"key id\n\xff \xff \xff\n").is_err());
            assert!(parse(b"key id\n1 99999999999 600 1 1 1 1 1 1 1 1 1 1 1\n").is_err());
            assert!(parse(b"key id\n1 1 999 1 1 1 1 1 1 1 1 1 1 1\n").is_err());
            assert!(parse(b"key id\n\n").is_err());
        }
        let sets = parse_sets(b"h\n 0 3 600 2 1 2 3 4 0 17\n").unwrap();
        assert_eq!((sets[0].count, sets[0].operated, sets[0].changed), (2, 0, 17));
        let queues = parse_queues(b"h\n 5 3 644 10 2 7 8 1 2 3 4 20 30 17\n").unwrap();
        assert_eq!((queues[0].sender, queues[0].receiver, queues[0].used), (7, 8, 30));
    }

    #[test]
    fn messages_stay_where_they_are() {
        // SAFETY: plain calls on a queue of our own, with a message of eight bytes and two of text.
        let id = unsafe { libc::msgget(libc::IPC_PRIVATE, 0o600) };
        if id < 0 {
            eprintln!("skipped: msgget: {}", Errno::last());
            return;
        }
        let message = [7u64, 0x6162];
        // SAFETY: as above.
        let sent = unsafe { libc::msgsnd(id, message.as_ptr().cast(), 2, libc::IPC_NOWAIT) };
        let (first, second, again) = (peek(id, 0, 64), peek(id, 1, 64), peek(id, 0, 64));
        let queue = queues().unwrap().into_iter().find(|q| q.id == id);
        let room = capacity(id);
        // SAFETY: as above.
        unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        assert_eq!(sent, 0);
        match first {
            Err(e) if e.errno() == Some(Errno::ENOSYS) => eprintln!("skipped: no MSG_COPY"),
            first => {
                assert_eq!(first.unwrap(), Some((7, b"ba".to_vec())));
                assert_eq!(again.unwrap(), Some((7, b"ba".to_vec())));
                assert_eq!(second.unwrap(), None);
            }
        }
        assert_eq!(queue.unwrap().count, 1);
        assert!(room.unwrap() > 0);
    }

    #[test]
    fn a_segment_is_seen_and_read() {
        // SAFETY: a segment of our own.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 5000, 0o600) };
        if id < 0 {
            eprintln!("skipped: shmget: {}", Errno::last());
            return;
        }
        let attached = Attached::new(id, 5000, true);
        // SAFETY: as above.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        let attached = attached.unwrap();
        attached.write(4998, b"end");
        let mut back = [0u8; 4];
        attached.read(4997, &mut back);
        assert_eq!(&back, b"\0end");
        let all = segments().unwrap();
        let segment = all.iter().find(|s| s.id == id).unwrap();
        assert!(segment.removed && segment.attached == 1 && segment.size == 5000);
        assert_eq!(segment.creator, Pid::this().0);
        assert!(attached_by(id).contains(&Pid::this()));
        drop(attached);
        assert!(!segments().unwrap().iter().any(|s| s.id == id));
    }
}
