//! What the kernel knows of a ring and tells nobody: how it was set up, its requests, what is registered with it.
//!
//! /proc/PID/fdinfo/FD shows the positions of the queues and requests that wait by polling (io_uring/fdinfo.c). A timeout,
//! a request that a worker or a device has, or that waits for a futex or a child shows nowhere, and counts prove
//! nothing: requests may give no completion, or several. So the kernel's own memory is read ([`crate::bpf`]), its
//! structures as the kernel describes them ([`crate::btf`]); one that is not as expected is an error.
//!
//! A request is in flight when it was allocated and is not in the ring's list of free ones: since 6.16 a ring counts
//! those it has allocated (io_uring/io_uring.c, `__io_alloc_req_refill`), and it keeps them all until it is closed.
//!
//! All this holds still only while the tasks that use the ring stand. Of a running one what is read may not fit
//! together, but reading it is harmless.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::bpf::KernelMemory;
use crate::btf::Btf;
use crate::{Error, Result};

/// More members than any list has that is walked here.
const LONGEST: usize = 1 << 17;
/// Bits of a file's pointer that are no address (io_uring/filetable.h, `FFS_MASK`).
const FILE_FLAGS: u64 = 3;
/// The lowest bit of the end of a list (linux/list_nulls.h).
const ODD: u64 = 1;
/// No busy polling of network devices (io_uring, `IO_URING_NAPI_TRACKING_INACTIVE`).
const NAPI_INACTIVE: u64 = 255;
/// The structures that are looked at.
const STRUCTURES: [&str; 18] = [
    "file",
    "fdtable",
    "files_struct",
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
    "task_struct",
    "upid",
];

/// A way to look at rings.
#[derive(Debug)]
pub struct Look {
    memory: KernelMemory,
    btf: Btf,
    structures: HashMap<&'static str, u32>,
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

/// A structure of the kernel.
struct Object<'l> {
    look: &'l Look,
    name: &'static str,
    address: u64,
    bytes: Vec<u8>,
}

impl Object<'_> {
    /// A member of at most eight bytes, if this kernel has it.
    fn optional(&self, path: &str) -> Option<u64> {
        let member = self.look.btf.member(self.look.structures[self.name], path)?;
        let (first, last) = (member.offset as usize / 8, (member.offset + member.size).div_ceil(8) as usize);
        let mut bytes = [0; 8];
        bytes.get_mut(..last - first)?.copy_from_slice(self.bytes.get(first..last)?);
        let value = u64::from_ne_bytes(bytes) >> (member.offset % 8);
        Some(if member.size < 64 { value & ((1 << member.size) - 1) } else { value })
    }

    fn number(&self, path: &str) -> Result<u64> {
        self.optional(path).ok_or_else(|| missing(self.name, path))
    }

    fn small(&self, path: &str) -> Result<u32> {
        Ok(self.number(path)? as u32)
    }

    /// The address of a member.
    fn place(&self, path: &str) -> Result<u64> {
        Ok(self.address + self.look.offset(self.name, path)?)
    }

    /// Whether a member that may be a list of either kind, or missing, has something in it.
    fn filled(&self, path: &str) -> bool {
        let Ok(place) = self.place(path) else { return false };
        if let Some(next) = self.optional(&format!("{path}.next")) {
            return next != 0 && next != place;
        }
        self.optional(&format!("{path}.first")).is_some_and(|first| first != 0)
    }
}

fn missing(name: &str, path: &str) -> Error {
    Error::Parse { file: "/sys/kernel/btf/vmlinux".into(), what: format!("there is no {name}.{path}") }
}

impl Look {
    /// Loads what is needed. An error where the kernel does not let us, or does not describe itself.
    pub fn open() -> Result<Self> {
        let (memory, btf) = (KernelMemory::open()?, Btf::read()?);
        let structures = STRUCTURES
            .iter()
            .map(|name| Ok((*name, btf.structure(name).ok_or_else(|| missing(name, "*"))?)))
            .collect::<Result<_>>()?;
        Ok(Look { memory, btf, structures })
    }

    fn offset(&self, name: &str, path: &str) -> Result<u64> {
        let member = self.btf.member(self.structures[name], path).ok_or_else(|| missing(name, path))?;
        Ok(u64::from(member.offset / 8))
    }

    fn object(&self, name: &'static str, address: u64) -> Result<Object<'_>> {
        let size = self.btf.size(self.structures[name]).ok_or_else(|| missing(name, "*"))?;
        let mut bytes = vec![0; size as usize];
        self.memory.read(address, &mut bytes)?;
        Ok(Object { look: self, name, address, bytes })
    }

    fn pointer(&self, address: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn pointers(&self, address: u64, count: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0; (count as usize).min(LONGEST << 4) * 8];
        self.memory.read(address, &mut bytes)?;
        Ok(bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(*b.first_chunk().unwrap_or(&[0; 8]))).collect())
    }

    /// Members of a `list_head`, by the addresses of their own.
    fn list(&self, head: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        let mut next = self.pointer(head)?;
        while next != head && next != 0 && all.len() < LONGEST {
            all.push(next);
            next = self.pointer(next)?;
        }
        Ok(all)
    }

    /// Members of a list that ends with 0 or an odd address.
    fn chain(&self, head: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        let mut next = self.pointer(head)?;
        while next != 0 && next & ODD == 0 && all.len() < LONGEST {
            all.push(next);
            next = self.pointer(next)?;
        }
        Ok(all)
    }

    /// The `struct file` of a descriptor of ours.
    pub fn file(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let task = self.memory.current()?;
        let files = self.pointer(task + self.offset("task_struct", "files")?)?;
        let table = self.pointer(files + self.offset("files_struct", "fdt")?)?;
        let files = self.pointer(table + self.offset("fdtable", "fd")?)?;
        self.pointer(files + 8 * fd.as_raw_fd() as u64)
    }

    /// What a file is about: of an eventfd its `struct eventfd_ctx`.
    pub fn private_data(&self, file: u64) -> Result<u64> {
        self.pointer(file + self.offset("file", "private_data")?)
    }

    /// The number of a thread, in the innermost namespace that it has one in; 0 when it has ended.
    fn tid(&self, task: u64) -> Result<i32> {
        let pid = self.pointer(task + self.offset("task_struct", "thread_pid")?)?;
        if pid == 0 {
            return Ok(0);
        }
        let level = self.object("pid", pid)?.number("level")?;
        let size = self.btf.size(self.structures["upid"]).ok_or_else(|| missing("upid", "*"))?;
        let numbers = pid + self.offset("pid", "numbers")? + level * u64::from(size);
        Ok(self.object("upid", numbers)?.small("nr")?.cast_signed())
    }

    /// Looks at the ring behind a descriptor of ours.
    pub fn ring(&self, fd: BorrowedFd<'_>) -> Result<Ring> {
        let context = self.object("io_ring_ctx", self.private_data(self.file(fd)?)?)?;
        let allocated = context.small("nr_req_allocated")?;
        let free = self.chain(context.place("submit_state.free_list")?)?.len() as u32;
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
                    let told = self.object("io_ev_fd", at)?;
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
            at => self.object("io_ev_fd", at)?.optional("ops").unwrap_or(0) != 0,
        };
        Ok(told || lists.iter().any(|list| context.filled(list)) || context.number("check_cq")? != 0)
    }

    fn files(&self, context: &Object<'_>) -> Result<Vec<Option<(u64, u64)>>> {
        let table = (context.number("file_table.data.nodes")?, context.number("file_table.data.nr")?);
        let files = self.pointers(table.0, table.1)?.into_iter().map(|at| match at {
            0 => Ok(None),
            at => {
                let node = self.object("io_rsrc_node", at)?;
                Ok(Some((node.number("file_ptr")? & !FILE_FLAGS, node.number("tag")?)))
            }
        });
        files.collect()
    }

    fn buffers(&self, context: &Object<'_>) -> Result<Vec<Option<Buffer>>> {
        let table = (context.number("buf_table.nodes")?, context.number("buf_table.nr")?);
        let buffers = self.pointers(table.0, table.1)?.into_iter().map(|at| match at {
            0 => Ok(None),
            at => {
                let node = self.object("io_rsrc_node", at)?;
                let buffer = self.object("io_mapped_ubuf", node.number("buf")?)?;
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
        let node = self.offset("io_tctx_node", "ctx_node")?;
        let mut users = Vec::new();
        for at in self.list(context.place("tctx_list")?)? {
            let task = self.object("io_tctx_node", at - node)?.number("task")?;
            let its = self.pointer(task + self.offset("task_struct", "io_uring")?)?;
            if its == 0 {
                continue;
            }
            let rings = self
                .btf
                .member(self.structures["io_uring_task"], "registered_rings")
                .ok_or_else(|| missing("io_uring_task", "registered_rings"))?;
            let rings = self.pointers(its + u64::from(rings.offset / 8), u64::from(rings.size / 64))?;
            let registered = (0..).zip(rings).filter(|(_, file)| *file != 0).collect();
            let queue = self.object("io_uring_task", its)?.number("io_wq")?;
            users.push((User { tid: self.tid(task)?, registered }, queue));
        }
        Ok(users)
    }

    /// Kinds of requests that wait for something, but for those that poll.
    fn requests(&self, context: &Object<'_>, users: &[(User, u64)]) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        let timeout = self.offset("io_timeout", "list")?;
        for list in ["timeout_list", "ltimeout_list"] {
            let found = self.list(context.place(list)?)?;
            all.extend(found.into_iter().map(|at| at - timeout));
        }
        let node = self.offset("io_kiocb", "hash_node")?;
        for list in ["futex_list", "waitid_list", "cancelable_uring_cmd"] {
            let Ok(place) = context.place(list) else { continue };
            all.extend(self.chain(place)?.into_iter().map(|at| at - node));
        }
        let work = self.offset("io_kiocb", "work")?;
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
            let request = self.object("io_kiocb", at)?;
            // A thread's workers serve all its rings.
            if request.number("ctx")? == context.address {
                kinds.push(request.small("opcode")?);
            }
        }
        Ok(kinds)
    }

    /// What workers do, and what waits for one.
    fn worked_on(&self, queue: u64, account: u64) -> Result<Vec<u64>> {
        let size = self.btf.size(self.structures["io_wq_acct"]).ok_or_else(|| missing("io_wq_acct", "*"))?;
        let account = queue + self.offset("io_wq", "acct")? + account * u64::from(size);
        let account = self.object("io_wq_acct", account)?;
        let mut all = self.chain(account.place("work_list")?)?;
        let worker = self.offset("io_worker", "all_list")?;
        for at in self.list(account.place("all_list")?)? {
            let now = self.object("io_worker", at - worker)?.number("cur_work")?;
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
