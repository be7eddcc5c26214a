//! io_uring(7): making rings, and registering things with them.

pub mod look;

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::check;
use crate::{Error, Result};

/// Flags of io_uring_setup(2) (linux/io_uring.h).
#[expect(missing_docs, reason = "the kernel's names, without their prefix")]
pub mod setup {
    pub const IOPOLL: u32 = 1 << 0;
    pub const SQPOLL: u32 = 1 << 1;
    pub const SQ_AFF: u32 = 1 << 2;
    pub const CQSIZE: u32 = 1 << 3;
    pub const CLAMP: u32 = 1 << 4;
    pub const ATTACH_WQ: u32 = 1 << 5;
    pub const R_DISABLED: u32 = 1 << 6;
    pub const SUBMIT_ALL: u32 = 1 << 7;
    pub const COOP_TASKRUN: u32 = 1 << 8;
    pub const TASKRUN_FLAG: u32 = 1 << 9;
    pub const SQE128: u32 = 1 << 10;
    pub const CQE32: u32 = 1 << 11;
    pub const SINGLE_ISSUER: u32 = 1 << 12;
    pub const DEFER_TASKRUN: u32 = 1 << 13;
    pub const NO_MMAP: u32 = 1 << 14;
    pub const REGISTERED_FD_ONLY: u32 = 1 << 15;
    pub const NO_SQARRAY: u32 = 1 << 16;
    pub const HYBRID_IOPOLL: u32 = 1 << 17;
    pub const CQE_MIXED: u32 = 1 << 18;

    /// Names of bits 0 to 18.
    pub const NAMES: [&str; 19] = [
        "IOPOLL",
        "SQPOLL",
        "SQ_AFF",
        "CQSIZE",
        "CLAMP",
        "ATTACH_WQ",
        "R_DISABLED",
        "SUBMIT_ALL",
        "COOP_TASKRUN",
        "TASKRUN_FLAG",
        "SQE128",
        "CQE32",
        "SINGLE_ISSUER",
        "DEFER_TASKRUN",
        "NO_MMAP",
        "REGISTERED_FD_ONLY",
        "NO_SQARRAY",
        "HYBRID_IOPOLL",
        "CQE_MIXED",
    ];
}

/// Operations of io_uring_register(2) (linux/io_uring.h).
#[expect(missing_docs, reason = "the kernel's names")]
pub mod register {
    pub const EVENTFD: u32 = 4;
    pub const EVENTFD_ASYNC: u32 = 7;
    pub const ENABLE_RINGS: u32 = 12;
    pub const FILES2: u32 = 13;
    pub const BUFFERS2: u32 = 15;
    pub const IOWQ_MAX_WORKERS: u32 = 19;
    pub const RING_FDS: u32 = 20;
    pub const FILE_ALLOC_RANGE: u32 = 25;
    pub const CLOCK: u32 = 29;
}

/// Where the queues of a ring begin in its mappings (io_uring_setup(2)).
pub mod area {
    /// Submissions; with `IORING_FEAT_SINGLE_MMAP` completions, too.
    pub const RING: u64 = 0;
    /// Completions: the same memory.
    pub const COMPLETIONS: u64 = 0x0800_0000;
    /// Requests.
    pub const REQUESTS: u64 = 0x1000_0000;
}

/// Bits of the flags of the submission queue.
pub const SQ_NEED_WAKEUP: u32 = 1;
/// A bit of the flags of the completion queue, set by the program: the eventfd is not told.
pub const CQ_EVENTFD_DISABLED: u32 = 1;
/// A request of the submission queue (without `SQE128`).
const SQE: usize = 64;
/// A completion (without `CQE32`).
const CQE: usize = 16;

/// `struct io_sqring_offsets`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct SqOffsets {
    pub head: u32,
    pub tail: u32,
    pub ring_mask: u32,
    pub ring_entries: u32,
    pub flags: u32,
    pub dropped: u32,
    pub array: u32,
    pub resv1: u32,
    pub user_addr: u64,
}

/// `struct io_cqring_offsets`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct CqOffsets {
    pub head: u32,
    pub tail: u32,
    pub ring_mask: u32,
    pub ring_entries: u32,
    pub overflow: u32,
    pub cqes: u32,
    pub flags: u32,
    pub resv1: u32,
    pub user_addr: u64,
}

/// `struct io_uring_params`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct Params {
    pub sq_entries: u32,
    pub cq_entries: u32,
    pub flags: u32,
    pub sq_thread_cpu: u32,
    pub sq_thread_idle: u32,
    pub features: u32,
    pub wq_fd: u32,
    pub resv: [u32; 3],
    pub sq_off: SqOffsets,
    pub cq_off: CqOffsets,
}

const _: () = assert!(size_of::<Params>() == 120);

impl Params {
    /// Where everything is in the queues of submissions and of completions, in the order of the two structures.
    pub fn offsets(&self) -> ([u32; 7], [u32; 7]) {
        let (sq, cq) = (&self.sq_off, &self.cq_off);
        (
            [sq.head, sq.tail, sq.ring_mask, sq.ring_entries, sq.flags, sq.dropped, sq.array],
            [cq.head, cq.tail, cq.ring_mask, cq.ring_entries, cq.overflow, cq.cqes, cq.flags],
        )
    }

    /// Bytes of the queues of submissions and completions.
    pub fn ring_length(&self) -> usize {
        let cqe = if self.flags & setup::CQE32 != 0 { 2 * CQE } else { CQE };
        let completions = self.cq_off.cqes as usize + self.cq_entries as usize * cqe;
        let submissions = self.sq_off.array as usize + self.sq_entries as usize * 4;
        if self.flags & setup::NO_SQARRAY != 0 { completions } else { completions.max(submissions) }
    }

    /// Bytes of the requests.
    pub fn requests_length(&self) -> usize {
        let sqe = if self.flags & setup::SQE128 != 0 { 2 * SQE } else { SQE };
        self.sq_entries as usize * sqe
    }
}

/// Makes a ring of exactly this size.
pub fn make(sq_entries: u32, cq_entries: u32, flags: u32) -> Result<(OwnedFd, Params)> {
    let mut params = Params { cq_entries, flags: flags | setup::CQSIZE, ..Params::default() };
    // SAFETY: the kernel reads and writes `struct io_uring_params`.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, sq_entries, &raw mut params) };
    let fd = check(fd, "io_uring_setup", sq_entries)?;
    // SAFETY: the call just returned this new descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    if (params.sq_entries, params.cq_entries) != (sq_entries, cq_entries) {
        return Err(Error::syscall("io_uring_setup", sq_entries, nix::errno::Errno::EINVAL));
    }
    Ok((fd, params))
}

/// io_uring_register(2)
///
/// # Safety
/// `argument` is what this operation reads and writes.
pub unsafe fn register<T>(ring: BorrowedFd<'_>, operation: u32, argument: *mut T, count: u32) -> Result<i64> {
    // SAFETY: the caller's promise.
    let got =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), operation, argument, count) };
    check(got, "io_uring_register", operation)
}

/// Memory of a ring, mapped into this process.
#[derive(Debug)]
pub struct Queue {
    start: *mut u8,
    length: usize,
}

impl Queue {
    /// Maps `length` bytes of a ring, `area` of it.
    pub fn map(ring: BorrowedFd<'_>, area: u64, length: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                ring.as_raw_fd(),
                area as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Error::last("mmap", "io_uring"));
        }
        Ok(Queue { start: start.cast(), length })
    }

    /// A copy of all of it.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        // SAFETY: mapped for as long as we are. Whom it is shared with writes to it only while the tree runs; what is
        // read then counts for nothing.
        unsafe { std::ptr::copy_nonoverlapping(self.start, bytes.as_mut_ptr(), self.length) };
        bytes
    }

    /// The word at `at`; 0 where there is none.
    pub fn word(&self, at: u32) -> u32 {
        let at = at as usize;
        if !at.is_multiple_of(4) || at + 4 > self.length {
            return 0;
        }
        // SAFETY: inside of the mapping, and aligned.
        unsafe { self.start.add(at).cast::<u32>().read_volatile() }
    }

    /// Writes at `at`; what does not fit is left out.
    pub fn write(&self, at: u32, bytes: &[u8]) {
        let at = (at as usize).min(self.length);
        let length = bytes.len().min(self.length - at);
        // SAFETY: inside of the mapping; of rings being made nobody else has a say.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), length) };
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody refers to any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// Names of requests, by their numbers (linux/io_uring.h, `enum io_uring_op`).
const OPERATIONS: [&str; 63] = [
    "NOP",
    "READV",
    "WRITEV",
    "FSYNC",
    "READ_FIXED",
    "WRITE_FIXED",
    "POLL_ADD",
    "POLL_REMOVE",
    "SYNC_FILE_RANGE",
    "SENDMSG",
    "RECVMSG",
    "TIMEOUT",
    "TIMEOUT_REMOVE",
    "ACCEPT",
    "ASYNC_CANCEL",
    "LINK_TIMEOUT",
    "CONNECT",
    "FALLOCATE",
    "OPENAT",
    "CLOSE",
    "FILES_UPDATE",
    "STATX",
    "READ",
    "WRITE",
    "FADVISE",
    "MADVISE",
    "SEND",
    "RECV",
    "OPENAT2",
    "EPOLL_CTL",
    "SPLICE",
    "PROVIDE_BUFFERS",
    "REMOVE_BUFFERS",
    "TEE",
    "SHUTDOWN",
    "RENAMEAT",
    "UNLINKAT",
    "MKDIRAT",
    "SYMLINKAT",
    "LINKAT",
    "MSG_RING",
    "FSETXATTR",
    "SETXATTR",
    "FGETXATTR",
    "GETXATTR",
    "SOCKET",
    "URING_CMD",
    "SEND_ZC",
    "SENDMSG_ZC",
    "READ_MULTISHOT",
    "WAITID",
    "FUTEX_WAIT",
    "FUTEX_WAKE",
    "FUTEX_WAITV",
    "FIXED_FD_INSTALL",
    "FTRUNCATE",
    "BIND",
    "LISTEN",
    "RECV_ZC",
    "EPOLL_WAIT",
    "READV_FIXED",
    "WRITEV_FIXED",
    "PIPE",
];

/// The name of a request.
pub fn operation(number: u32) -> String {
    let name = OPERATIONS.get(number as usize).map(|name| (*name).to_owned());
    name.unwrap_or_else(|| format!("operation {number}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_ring_is_made_and_mapped() {
        let (ring, params) = match make(8, 32, setup::R_DISABLED) {
            Ok(made) => made,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        let queue = Queue::map(ring.as_fd(), area::RING, params.ring_length()).unwrap();
        assert_eq!((queue.word(params.sq_off.ring_mask), queue.word(params.cq_off.ring_entries)), (7, 32));
        queue.write(params.sq_off.array, &7u32.to_ne_bytes());
        assert_eq!(queue.bytes()[params.sq_off.array as usize], 7);
        assert_eq!(queue.word(u32::MAX - 3), 0);
        queue.write(u32::MAX, &[1]);
        assert_eq!(params.requests_length(), 512);
    }

    #[test]
    fn operations_have_names() {
        assert_eq!((operation(6), operation(50)), ("POLL_ADD".into(), "WAITID".into()));
        assert_eq!(operation(1000), "operation 1000");
    }
}
