//! io_uring(7): rings at rest.

use serde::{Deserialize, Serialize};

use crate::task::Task;
use crate::vma::Mapping;
use crate::{Bytes, DescriptionId, Pid};

/// A ring without requests under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoUring {
    /// `IORING_SETUP_*`
    pub flags: u32,
    /// Entries of the queue of submissions.
    pub sq_entries: u32,
    /// Entries of the queue of completions.
    pub cq_entries: u32,
    /// Where in `ring` the kernel keeps what the program looks for there.
    pub offsets: Offsets,
    /// The queues of submissions and completions, as the program sees them.
    pub ring: Bytes,
    /// The requests, as the program sees them.
    pub requests: Bytes,
    /// The only thread that may use it (`IORING_SETUP_SINGLE_ISSUER`).
    pub submitter: Option<Pid>,
    /// The clock of its timeouts.
    pub clock: i32,
    /// How many workers it may have, bounded and unbounded, if that was limited; 0 stands for the default.
    pub workers: Option<(u32, u32)>,
    /// The eventfd that is told of completions.
    pub eventfd: Option<Told>,
    /// Registered files, empty places included.
    pub files: Vec<Option<File>>,
    /// Of them, those that requests may choose from: the first, and how many.
    pub file_range: (u32, u32),
    /// Registered buffers, empty places included.
    pub buffers: Vec<Option<Buffer>>,
    /// Threads that can name the ring by an index instead of a descriptor.
    pub registered: Vec<Registered>,
}

/// `struct io_sqring_offsets` and `struct io_cqring_offsets`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct Offsets {
    pub sq_head: u32,
    pub sq_tail: u32,
    pub sq_ring_mask: u32,
    pub sq_ring_entries: u32,
    pub sq_flags: u32,
    pub sq_dropped: u32,
    pub sq_array: u32,
    pub cq_head: u32,
    pub cq_tail: u32,
    pub cq_ring_mask: u32,
    pub cq_ring_entries: u32,
    pub cq_overflow: u32,
    pub cq_cqes: u32,
    pub cq_flags: u32,
}

impl Offsets {
    /// From the words of the two structures, in the kernel's order.
    pub fn new(submissions: [u32; 7], completions: [u32; 7]) -> Self {
        let [sq_head, sq_tail, sq_ring_mask, sq_ring_entries, sq_flags, sq_dropped, sq_array] = submissions;
        let [cq_head, cq_tail, cq_ring_mask, cq_ring_entries, cq_overflow, cq_cqes, cq_flags] = completions;
        Offsets {
            sq_head,
            sq_tail,
            sq_ring_mask,
            sq_ring_entries,
            sq_flags,
            sq_dropped,
            sq_array,
            cq_head,
            cq_tail,
            cq_ring_mask,
            cq_ring_entries,
            cq_overflow,
            cq_cqes,
            cq_flags,
        }
    }
}

/// An eventfd that is told of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Which.
    pub description: DescriptionId,
    /// Of asynchronous ones only.
    pub asynchronous: bool,
}

/// A registered file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Which.
    pub description: DescriptionId,
    /// `user_data` of the completion that tells of its end; 0 for none.
    pub tag: u64,
}

/// A registered buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Its address.
    pub address: u64,
    /// Its length.
    pub length: u32,
    /// `user_data` of the completion that tells of its end; 0 for none.
    pub tag: u64,
}

/// A ring that a thread can name by an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// The thread.
    pub tid: Pid,
    /// The index.
    pub index: u32,
}

/// Who puts a ring back to its positions, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Index of the task.
    pub task: usize,
    /// Its thread.
    pub tid: Pid,
    /// The ring in its descriptor table.
    pub fd: i32,
    /// Where in its memory the queues are, if they are there.
    pub queues: Option<u64>,
}

/// Where the queues of submissions and completions are mapped from, where completions alone, and where requests
/// (linux/io_uring.h, `IORING_OFF_*`).
pub const AREAS: [u64; 3] = [0, 0x0800_0000, 0x1000_0000];
/// `IORING_SETUP_R_DISABLED`
pub const DISABLED: u32 = 1 << 6;
/// `IORING_SETUP_SINGLE_ISSUER`
pub const SINGLE_ISSUER: u32 = 1 << 12;
/// The flags that a ring of an image can have: these two, `CQSIZE`, `CLAMP`, `ATTACH_WQ`, `SUBMIT_ALL`,
/// `COOP_TASKRUN`, `TASKRUN_FLAG`, `SQE128`, `CQE32`, `DEFER_TASKRUN`, `NO_SQARRAY` and `CQE_MIXED`.
pub const FLAGS: u32 =
    DISABLED | SINGLE_ISSUER | 0b11_1000 | 1 << 7 | 0b11 << 8 | 0b11 << 10 | 1 << 13 | 1 << 16 | 1 << 18;
/// Largest queues (io_uring/io_uring.h, `IORING_MAX_ENTRIES` and `IORING_MAX_CQ_ENTRIES`).
const MAX_ENTRIES: u32 = 32768;
/// Most registered files and buffers (io_uring/rsrc.c).
const MAX_FILES: usize = 1 << 20;
const MAX_BUFFERS: usize = 1 << 14;
/// Rings that a thread can name by an index (linux/io_uring_types.h, `IO_RINGFD_REG_MAX`).
const MAX_REGISTERED: u32 = 16;
const MAX_BUFFER: u32 = 1 << 30;
/// Bytes of a request and of a completion with `SQE128` and `CQE32`.
const MAX_REQUEST: usize = 128;
const MAX_COMPLETION: usize = 32;
const PAGE: usize = 4096;

impl IoUring {
    /// A word of the queues.
    pub fn word(&self, at: u32) -> u32 {
        let word = self.ring.get(at as usize..).and_then(|bytes| bytes.first_chunk());
        word.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    /// How many requests the kernel has taken, and completions it has given, so far.
    pub fn count(&self) -> u32 {
        self.word(self.offsets.cq_tail)
    }

    /// How many completions the program has taken.
    pub fn taken(&self) -> u32 {
        self.word(self.offsets.cq_head)
    }

    /// "of 8 entries, 12 requests so far, 3 completions in it"
    pub fn summary(&self) -> String {
        let (count, waiting) = (self.count(), self.count().wrapping_sub(self.taken()));
        format!("of {} entries, {count} requests so far, {waiting} completions in it", self.sq_entries)
    }

    /// Bytes that a mapping of `area` may have.
    pub fn area(&self, area: u64) -> u64 {
        let bytes = if area == AREAS[2] { self.requests.len() } else { self.ring.len() };
        bytes.next_multiple_of(PAGE) as u64
    }

    /// Who puts it back to its positions: the one thread that may use it, else a process that has it mapped, else any
    /// that has it open.
    pub fn driver(&self, id: DescriptionId, tasks: &[Task]) -> Option<Driver> {
        let owner = |of: Option<Pid>, task: usize| {
            of.and_then(|p| tasks.iter().position(|t| t.pid == p)).unwrap_or(task)
        };
        let mut all = tasks.iter().enumerate().filter_map(|(i, task)| {
            let table = &tasks[owner(task.shares.descriptors, i)].descriptors;
            let fd = table.iter().find(|d| d.description == id)?.fd;
            let tid = match self.submitter {
                Some(tid) => task.threads.iter().find(|t| t.tid == tid)?.tid,
                None => task.threads.first()?.tid,
            };
            let vmas = &tasks[owner(task.shares.memory, i)].memory.vmas;
            let queues = vmas.iter().find(|v| {
                let area =
                    matches!(v.mapping, Mapping::Ring { ring, area } if ring == id && area != AREAS[2]);
                area && v.protection & 3 == 3
            });
            Some(Driver { task: i, tid, fd, queues: queues.map(|v| v.start) })
        });
        let first = all.next()?;
        if first.queues.is_some() { Some(first) } else { all.find(|d| d.queues.is_some()).or(Some(first)) }
    }

    /// What is impossible about it, references aside.
    pub(crate) fn damage(&self) -> Option<&'static str> {
        let size = |entries: u32, most: u32| entries.is_power_of_two() && entries <= most;
        if !size(self.sq_entries, MAX_ENTRIES) || !size(self.cq_entries, 2 * MAX_ENTRIES) {
            return Some("queues of an impossible size");
        }
        if self.flags & !FLAGS != 0 || self.cq_entries < self.sq_entries {
            return Some("impossible flags");
        }
        let Offsets {
            sq_head,
            sq_tail,
            sq_ring_mask,
            sq_ring_entries,
            sq_flags,
            sq_dropped,
            sq_array,
            cq_head,
            cq_tail,
            cq_ring_mask,
            cq_ring_entries,
            cq_overflow,
            cq_cqes,
            cq_flags,
        } = self.offsets;
        let words = [
            sq_head,
            sq_tail,
            sq_ring_mask,
            sq_ring_entries,
            sq_flags,
            sq_dropped,
            cq_head,
            cq_tail,
            cq_ring_mask,
            cq_ring_entries,
            cq_overflow,
            cq_flags,
        ];
        let most = 2 * PAGE + MAX_COMPLETION * self.cq_entries as usize + 4 * self.sq_entries as usize;
        let inside = words.iter().all(|at| at % 4 == 0 && (*at as usize) < PAGE.min(self.ring.len() & !3));
        let inside = inside && [sq_array, cq_cqes].iter().all(|at| (*at as usize) < self.ring.len());
        if !inside || self.ring.len() > most || self.requests.len() > MAX_REQUEST * self.sq_entries as usize {
            return Some("queues of an impossible length");
        }
        let taken = self.taken();
        if taken > self.count()
            || self.count() - taken > self.cq_entries
            || self.word(sq_head) != self.count()
        {
            return Some("impossible positions");
        }
        if self.files.len() > MAX_FILES || self.buffers.len() > MAX_BUFFERS {
            return Some("too many files or buffers");
        }
        let (first, count) = (self.file_range.0 as usize, self.file_range.1 as usize);
        if first + count > self.files.len() {
            return Some("an impossible range of files");
        }
        let long = |b: &Buffer| b.length > MAX_BUFFER || b.address.checked_add(u64::from(b.length)).is_none();
        if self.buffers.iter().flatten().any(long) {
            return Some("an impossible buffer");
        }
        (self.registered.iter().any(|r| r.index >= MAX_REGISTERED)).then_some("an impossible index")
    }

    /// Descriptions that it refers to.
    pub(crate) fn references(&self) -> impl Iterator<Item = DescriptionId> {
        let files = self.files.iter().flatten().map(|f| f.description);
        files.chain(self.eventfd.map(|e| e.description))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> IoUring {
        let mut ring = vec![0u8; 64 + 16 * 16 + 8 * 4];
        let offsets = Offsets {
            sq_head: 0,
            sq_tail: 4,
            cq_head: 8,
            cq_tail: 12,
            sq_ring_mask: 16,
            cq_ring_mask: 20,
            sq_ring_entries: 24,
            cq_ring_entries: 28,
            sq_dropped: 32,
            sq_flags: 36,
            cq_flags: 40,
            cq_overflow: 44,
            cq_cqes: 64,
            sq_array: 64 + 256,
        };
        for (at, word) in [(0, 21u32), (4, 22), (8, 19), (12, 21), (16, 7), (20, 15), (24, 8), (28, 16)] {
            ring[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        IoUring {
            flags: 1 << 3,
            sq_entries: 8,
            cq_entries: 16,
            offsets,
            ring: ring.into(),
            requests: vec![0; 512].into(),
            submitter: None,
            clock: 1,
            workers: None,
            eventfd: None,
            files: Vec::new(),
            file_range: (0, 0),
            buffers: Vec::new(),
            registered: Vec::new(),
        }
    }

    #[test]
    fn positions() {
        let ring = sample();
        assert_eq!((ring.count(), ring.taken(), ring.damage()), (21, 19, None));
        assert_eq!(ring.summary(), "of 8 entries, 21 requests so far, 2 completions in it");
        assert_eq!((ring.area(AREAS[0]), ring.word(u32::MAX)), (4096, 0));
    }

    #[test]
    fn damage_is_found() {
        let odd: [fn(&mut IoUring); 9] = [
            |r| r.sq_entries = 9,
            |r| r.flags |= 2,
            |r| r.offsets.cq_tail = 4096,
            |r| r.offsets.sq_head = 2,
            |r| r.requests = vec![0; 1 << 20].into(),
            |r| r.ring.0[8] = 30,
            |r| r.ring.0[0] = 1,
            |r| r.file_range = (1, u32::MAX),
            |r| r.buffers = vec![Some(Buffer { address: u64::MAX, length: 2, tag: 0 })],
        ];
        for (i, change) in odd.iter().enumerate() {
            let mut ring = sample();
            change(&mut ring);
            assert!(ring.damage().is_some(), "case {i}");
        }
    }
}
