//! What the kernel knows of a ring and tells nobody: how it was set up, its requests, what is registered with it.
//!
//! /proc/PID/fdinfo/FD shows the positions of the queues and requests that wait by polling (io_uring/fdinfo.c). A timeout,
//! a request that a worker or a device has, or that waits for a futex or a child shows nowhere, and counts prove
//! nothing: requests may give no completion, or several. So the kernel's own memory is read, its
//! structures as the kernel describes them; one that is not as expected is an error.
//!
//! A request is in flight when it was allocated and is not in the ring's list of free ones: since 6.16 a ring counts
//! those it has allocated (io_uring/io_uring.c, `__io_alloc_req_refill`), and it keeps them all until it is closed.
//!
//! All this holds still only while the tasks that use the ring stand. Of a running one what is read may not fit
//! together, but reading it is harmless.

use std::os::fd::BorrowedFd;

use crate::structures::{Object, Structures};
use crate::{Error, Result};

/// Bits of a file's pointer that are no address (io_uring/filetable.h, `FFS_MASK`).
const FILE_FLAGS: u64 = 3;
/// No busy polling of network devices (io_uring, `IO_URING_NAPI_TRACKING_INACTIVE`).
const NAPI_INACTIVE: u64 = 255;
/// The structures that are looked at.
const STRUCTURES: [&str; 14] = [
    "io_ev_fd",
    "io_kiocb",
    "io_mapped_ubuf",
    "io_ring_ctx",
    "io_rsrc_node",
    "io_tctx_node",
    "io_timeout",
    "io_uring_task",
    "io_wq",
    "io_wq_acct",
    "io_worker",
    "io_wq_work_node",
    "pid",
    "upid",
];

/// A way to look at rings.
#[derive(Debug)]
pub struct Look {
    kernel: Structures,
}

/// A ring. Files are told by the addresses of their `struct file`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// How it was set up.
    pub flags: u32,
    /// Entries of its queue of submissions.
    pub sq_entries: u32,
    /// Entries of its queue of completions.
    pub cq_entries: u32,
    /// The only thread that may use it, with `SINGLE_ISSUER`; 0 for one that has ended.
    pub submitter: Option<i32>,
    /// Requests that were submitted and are not over.
    pub in_flight: u32,
    /// Kinds of those of them that were found, but for those that poll.
    pub requests: Vec<u32>,
    /// Work is under way that is no request.
    pub unsettled: bool,
    /// The clock of its timeouts.
    pub clock: i32,
    /// How many workers it may have, if that was limited.
    pub workers: Option<[u32; 2]>,
    /// The `struct eventfd_ctx` that is told of completions, and whether of asynchronous ones only.
    pub eventfd: Option<(u64, bool)>,
    /// Registered files.
    pub files: Vec<Option<(u64, u64)>>,
    /// Of them, those that requests may choose from: the first, and one past the last.
    pub file_range: (u32, u32),
    /// Registered buffers.
    pub buffers: Vec<Option<Buffer>>,
    /// What else it has, by name.
    pub others: Vec<&'static str>,
    /// Threads that have used it.
    pub users: Vec<User>,
}

/// A registered buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Its address in the process.
    pub address: u64,
    /// Its length.
    pub length: u32,
    /// What the completion says that tells of its end; 0 for none.
    pub tag: u64,
    /// It is not memory of a process.
    pub of_kernel: bool,
}

/// A thread that has used a ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The thread; 0 for one that has ended.
    pub tid: i32,
    /// Rings that it can name by an index: index and `struct file`.
    pub registered: Vec<(u32, u64)>,
}

impl Look {
    /// Loads what is needed. An error where the kernel does not let us, or does not describe itself.
    pub fn open() -> Result<Self> {
        Ok(Look { kernel: Structures::open(&STRUCTURES)? })
    }

    /// The `struct file` of a descriptor of ours.
    pub fn file(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        self.kernel.file(fd)
    }

    /// What a file is about: of an eventfd its `struct eventfd_ctx`.
    pub fn private_data(&self, file: u64) -> Result<u64> {
        self.kernel.private_data(file)
    }

    /// The number of a thread, in the innermost namespace that it has one in; 0 when it has ended.
    fn tid(&self, task: u64) -> Result<i32> {
        let pid = self.kernel.pointer(task + self.kernel.offset("task_struct", "thread_pid")?)?;
        if pid == 0 {
            return Ok(0);
        }
        let level = self.kernel.object("pid", pid)?.number("level")?;
        let numbers = pid + self.kernel.offset("pid", "numbers")? + level * self.kernel.size("upid")?;
        Ok(self.kernel.object("upid", numbers)?.small("nr")?.cast_signed())
    }

    /// Looks at the ring behind a descriptor of ours.
    pub fn ring(&self, fd: BorrowedFd<'_>) -> Result<Ring> {
        let context = self.kernel.object("io_ring_ctx", self.private_data(self.file(fd)?)?)?;
        let allocated = context.small("nr_req_allocated")?;
        let free = self.kernel.chain(context.place("submit_state.free_list")?)?.len() as u32;
        let submitter = match context.number("submitter_task")? {
            0 => None,
            task => Some(self.tid(task)?),
        };
        let limited = context.number("iowq_limits_set")? != 0;
        let limits = context.number("iowq_limits")?;
        let users = self.users(&context)?;
        Ok(Ring {
            flags: context.small("flags")?,
            sq_entries: context.small("sq_entries")?,
            cq_entries: context.small("cq_entries")?,
            submitter,
            in_flight: allocated.saturating_sub(free),
            requests: self.requests(&context, &users)?,
            unsettled: allocated < free || self.unsettled(&context)?,
            clock: context.small("clockid")?.cast_signed(),
            workers: limited.then_some([limits as u32, (limits >> 32) as u32]),
            eventfd: match context.number("io_ev_fd")? {
                0 => None,
                at => {
                    let told = self.kernel.object("io_ev_fd", at)?;
                    Some((told.number("cq_ev_fd")?, told.number("eventfd_async")? != 0))
                }
            },
            files: self.files(&context)?,
            file_range: (context.small("file_alloc_start")?, context.small("file_alloc_end")?),
            buffers: self.buffers(&context)?,
            others: others(&context)?,
            users: users.into_iter().map(|(user, _)| user).collect(),
        })
    }

    /// Whether something is under way that is no request of the ring's.
    fn unsettled(&self, context: &Object<'_>) -> Result<bool> {
        let lists = ["work_llist", "retry_llist", "cq_overflow_list", "defer_list", "fallback_llist"];
        let told = match context.number("io_ev_fd")? {
            0 => false,
            // A signal that is on its way.
            at => self.kernel.object("io_ev_fd", at)?.optional("ops").unwrap_or(0) != 0,
        };
        Ok(told || lists.iter().any(|list| context.filled(list)) || context.number("check_cq")? != 0)
    }

    fn files(&self, context: &Object<'_>) -> Result<Vec<Option<(u64, u64)>>> {
        let table = (context.number("file_table.data.nodes")?, context.number("file_table.data.nr")?);
        let files = self.kernel.pointers(table.0, table.1)?.into_iter().map(|at| match at {
            0 => Ok(None),
            at => {
                let node = self.kernel.object("io_rsrc_node", at)?;
                Ok(Some((node.number("file_ptr")? & !FILE_FLAGS, node.number("tag")?)))
            }
        });
        files.collect()
    }

    fn buffers(&self, context: &Object<'_>) -> Result<Vec<Option<Buffer>>> {
        let table = (context.number("buf_table.nodes")?, context.number("buf_table.nr")?);
        let buffers = self.kernel.pointers(table.0, table.1)?.into_iter().map(|at| match at {
            0 => Ok(None),
            at => {
                let node = self.kernel.object("io_rsrc_node", at)?;
                let buffer = self.kernel.object("io_mapped_ubuf", node.number("buf")?)?;
                Ok(Some(Buffer {
                    address: buffer.number("ubuf")?,
                    length: buffer.small("len")?,
                    tag: node.number("tag")?,
                    of_kernel: buffer.optional("is_kbuf").unwrap_or(0) != 0,
                }))
            }
        });
        buffers.collect()
    }

    /// The threads that have used a ring, and their queues of work for workers.
    fn users(&self, context: &Object<'_>) -> Result<Vec<(User, u64)>> {
        let node = self.kernel.offset("io_tctx_node", "ctx_node")?;
        let mut users = Vec::new();
        for at in self.kernel.list(context.place("tctx_list")?)? {
            let task = self.kernel.object("io_tctx_node", at - node)?.number("task")?;
            let its = self.kernel.pointer(task + self.kernel.offset("task_struct", "io_uring")?)?;
            if its == 0 {
                continue;
            }
            let (rings, bits) = self.kernel.array("io_uring_task", "registered_rings", its)?;
            let rings = self.kernel.pointers(rings, u64::from(bits / 64))?;
            let registered = (0..).zip(rings).filter(|(_, file)| *file != 0).collect();
            let queue = self.kernel.object("io_uring_task", its)?.number("io_wq")?;
            users.push((User { tid: self.tid(task)?, registered }, queue));
        }
        Ok(users)
    }

    /// Kinds of requests that wait for something, but for those that poll.
    fn requests(&self, context: &Object<'_>, users: &[(User, u64)]) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        let timeout = self.kernel.offset("io_timeout", "list")?;
        for list in ["timeout_list", "ltimeout_list"] {
            let found = self.kernel.list(context.place(list)?)?;
            all.extend(found.into_iter().map(|at| at - timeout));
        }
        let node = self.kernel.offset("io_kiocb", "hash_node")?;
        for list in ["futex_list", "waitid_list", "cancelable_uring_cmd"] {
            let Ok(place) = context.place(list) else { continue };
            all.extend(self.kernel.chain(place)?.into_iter().map(|at| at - node));
        }
        let work = self.kernel.offset("io_kiocb", "work")?;
        for (_, queue) in users.iter().filter(|(_, queue)| *queue != 0) {
            for account in 0..2 {
                let found = self.worked_on(*queue, account)?;
                all.extend(found.into_iter().map(|at| at - work));
            }
        }
        all.sort_unstable();
        all.dedup();
        let mut kinds = Vec::new();
        for at in all {
            let request = self.kernel.object("io_kiocb", at)?;
            // A thread's workers serve all its rings.
            if request.number("ctx")? == context.address {
                kinds.push(request.small("opcode")?);
            }
        }
        Ok(kinds)
    }

    /// What workers do, and what waits for one.
    fn worked_on(&self, queue: u64, account: u64) -> Result<Vec<u64>> {
        let account =
            queue + self.kernel.offset("io_wq", "acct")? + account * self.kernel.size("io_wq_acct")?;
        let account = self.kernel.object("io_wq_acct", account)?;
        let mut all = self.kernel.chain(account.place("work_list")?)?;
        let worker = self.kernel.offset("io_worker", "all_list")?;
        for at in self.kernel.list(account.place("all_list")?)? {
            let now = self.kernel.object("io_worker", at - worker)?.number("cur_work")?;
            all.extend((now != 0).then_some(now));
        }
        Ok(all)
    }
}

/// What a ring has that is told by name only.
fn others(context: &Object<'_>) -> Result<Vec<&'static str>> {
    let is = |path: &str| Ok::<bool, Error>(context.number(path)? != 0);
    let maybe = |path: &str| context.optional(path).is_some_and(|value| value != 0);
    let all = [
        (is("restricted")? || is("restrictions.registered")?, "restrictions"),
        (is("personalities.xa_head")?, "personalities"),
        (is("io_bl_xa.xa_head")?, "provided buffers"),
        (maybe("param_region.pages") || maybe("cq_wait_arg"), "a memory region"),
        (maybe("zcrx_ctxs.xa_head") || maybe("ifq"), "a queue of a network device"),
        (
            context.optional("napi_track_mode").is_some_and(|mode| mode != NAPI_INACTIVE),
            "busy polling of network devices",
        ),
        (maybe("bpf_ops") || maybe("bpf_filters"), "programs of bpf(2)"),
    ];
    Ok(all.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io_uring::{make, setup};
    use std::os::fd::AsFd;

    #[test]
    fn a_new_ring() {
        let (look, (ring, _)) = match (Look::open(), make(8, 16, setup::SUBMIT_ALL | setup::SINGLE_ISSUER)) {
            (Ok(look), Ok(made)) => (look, made),
            (look, made) => {
                eprintln!("skipped: {:?} {:?}", look.err(), made.err());
                return;
            }
        };
        let found = look.ring(ring.as_fd()).unwrap();
        assert_eq!(found.flags & !setup::CQSIZE, setup::SUBMIT_ALL | setup::SINGLE_ISSUER);
        assert_eq!((found.sq_entries, found.cq_entries), (8, 16));
        assert_eq!(found.submitter, Some(crate::Tid::this().0));
        assert_eq!((found.in_flight, found.unsettled), (0, false));
        assert_eq!((found.others, found.requests), (Vec::new(), Vec::new()));
        assert_eq!(found.clock, libc::CLOCK_MONOTONIC);
        let eventfd = nix::sys::eventfd::EventFd::new().unwrap();
        let at = look.private_data(look.file(eventfd.as_fd()).unwrap()).unwrap();
        assert_ne!(at, 0);
    }
}
