//! io_uring(7): rings are made outside of the tasks, and brought to their positions inside.
//!
//! The kernel keeps positions of its own beside those it shares with the program, and a new ring's begin at zero. So as many
//! requests that do nothing are made as the ring has counted, about ten million a second, by the task that used it:
//! of a ring for one thread alone (`IORING_SETUP_SINGLE_ISSUER`) that is the thread that enables it, which is why it is
//! made disabled. The queues hold zeros until then, and a request of zeros is one that does nothing; the tail of the
//! submissions is set in advance, of which the kernel takes as many at a time as the queue has entries.
//!
//! The kernel looks at how far the program has taken completions only where the queue begins anew (io_uring/io_uring.c,
//! `io_cqe_cache_refill`). So the head follows the tail as far as it is to come, and rests there for the completions
//! that wait.
//!
//! Contents are written from outside, when all else stands.

mod place;

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::description::Kind;
use torpor_image::io_uring::{Buffer, DISABLED, Driver, IoUring, Offsets, SINGLE_ISSUER};
use torpor_image::task::Task;
use torpor_image::{DescriptionId, Image, Pid};
use torpor_kernel::io_uring::{self, CQ_EVENTFD_DISABLED, Queue, area, register, setup};
use torpor_parasite::call;
use torpor_parasite::script::{Data, Script, Value};

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::plan::Planner;
use crate::unix::Slots;

pub(crate) use place::map;

/// From how many requests on it is worth a word how long that takes.
const MANY: u32 = 20_000_000;

/// The memory of a ring that was made.
#[derive(Debug)]
pub(crate) struct Queues {
    ring: Queue,
    requests: Queue,
}

/// Rings that were made.
pub(crate) type Rings = HashMap<DescriptionId, Queues>;

fn all(image: &Image) -> impl Iterator<Item = (DescriptionId, &IoUring)> {
    image.objects.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::IoUring(ring) => Some((d.id, &**ring)),
        _ => None,
    })
}

/// Makes a ring.
pub(crate) fn open(
    opener: &mut Opener<'_>,
    what: &str,
    id: DescriptionId,
    ring: &IoUring,
) -> Result<OwnedFd> {
    let disabled = if ring.flags & SINGLE_ISSUER != 0 { DISABLED } else { 0 };
    let flags = ring.flags & !(setup::CLAMP | setup::ATTACH_WQ) | disabled;
    let (fd, params) =
        io_uring::make(ring.sq_entries, ring.cq_entries, flags).map_err(|e| match e.errno() {
            Some(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => Error::Permission {
                what: what.to_owned(),
                call: "io_uring_setup",
                errno,
                remedy: "allow io_uring (sysctl kernel.io_uring_disabled=0)",
            },
            _ => Error::kernel(what)(e),
        })?;
    let length = (params.ring_length(), params.requests_length());
    let (sq, cq) = params.offsets();
    if Offsets::new(sq, cq) != ring.offsets || length != (ring.ring.len(), ring.requests.len()) {
        return Err(Error::Unfit {
            what: what.to_owned(),
            why: "this kernel has the queues of such a ring in another order, and the program knows the old one"
                .into(),
            remedy: "restore it under the kernel of the dump".into(),
        });
    }
    let fail = || Error::kernel(what);
    let queue = Queue::map(fd.as_fd(), area::RING, length.0).map_err(fail())?;
    let requests = Queue::map(fd.as_fd(), area::REQUESTS, length.1).map_err(fail())?;
    queue.write(ring.offsets.sq_tail, &ring.count().to_ne_bytes());
    // Requests that do nothing are no news.
    queue.write(ring.offsets.cq_flags, &CQ_EVENTFD_DISABLED.to_ne_bytes());
    if ring.clock != libc::CLOCK_MONOTONIC {
        // struct io_uring_clock_register
        let mut clock = [ring.clock, 0, 0, 0];
        // SAFETY: the operation reads this structure.
        unsafe { io_uring::register(fd.as_fd(), register::CLOCK, clock.as_mut_ptr(), 0) }.map_err(fail())?;
    }
    if let Some((bounded, unbounded)) = ring.workers {
        let mut workers = [bounded, unbounded];
        // SAFETY: the operation reads and writes two words.
        unsafe { io_uring::register(fd.as_fd(), register::IOWQ_MAX_WORKERS, workers.as_mut_ptr(), 2) }
            .map_err(fail())?;
    }
    opener.rings.insert(id, Queues { ring: queue, requests });
    Ok(fd)
}

/// `struct io_uring_rsrc_register`
#[repr(C)]
struct Resources {
    nr: u32,
    flags: u32,
    resv2: u64,
    data: u64,
    tags: u64,
}

/// Registers files and eventfds, when all descriptions are there.
pub(crate) fn register_all(opener: &mut Opener<'_>, slots: Slots<'_>) -> Result<()> {
    for (id, ring) in all(opener.image) {
        let Some(fd) = slots(id) else { continue };
        let what = opener.name(id);
        let fail = || Error::kernel(what.as_str());
        // What is made late has something else in its place until then.
        let slot = |id| {
            let made = opener.late.get(id).or_else(|| slots(id));
            made.map(|fd| fd.as_raw_fd()).ok_or_else(|| Error::Unfit {
                what: what.clone(),
                why: "what is registered with it is in no descriptor table".into(),
                remedy: "this image cannot be restored".into(),
            })
        };
        if !ring.files.is_empty() {
            let files = ring.files.iter().map(|f| f.map_or(Ok(-1), |f| slot(f.description)));
            let files = files.collect::<Result<Vec<i32>>>()?;
            let tags: Vec<u64> = ring.files.iter().map(|f| f.map_or(0, |f| f.tag)).collect();
            let mut resources = Resources {
                nr: files.len() as u32,
                flags: 0,
                resv2: 0,
                data: files.as_ptr() as u64,
                tags: tags.as_ptr() as u64,
            };
            let length = size_of::<Resources>() as u32;
            // SAFETY: the operation reads the structure, and as many descriptors and tags as it says.
            unsafe { io_uring::register(fd, register::FILES2, &raw mut resources, length) }.map_err(fail())?;
            // struct io_uring_file_index_range
            let mut range = [ring.file_range.0, ring.file_range.1, 0, 0];
            // SAFETY: the operation reads this structure.
            unsafe { io_uring::register(fd, register::FILE_ALLOC_RANGE, range.as_mut_ptr(), 0) }
                .map_err(fail())?;
        }
        if let Some(told) = ring.eventfd {
            let operation = if told.asynchronous { register::EVENTFD_ASYNC } else { register::EVENTFD };
            let mut eventfd = slot(told.description)?;
            // SAFETY: the operation reads a descriptor.
            unsafe { io_uring::register(fd, operation, &raw mut eventfd, 1) }.map_err(fail())?;
        }
    }
    Ok(())
}

/// What a thread does about rings: all descriptors have their numbers, and memory is complete.
pub(crate) fn plan(script: &mut Script, planner: &mut Planner<'_>, index: usize, tid: Pid) -> Result<()> {
    let image = planner.image;
    for (id, ring) in all(image) {
        let driver = ring.driver(id, &image.tasks).filter(|d| (d.task, d.tid) == (index, tid));
        if let Some(driver) = driver {
            drive(script, planner, ring, &driver)?;
        }
        for registered in ring.registered.iter().filter(|r| r.tid == tid) {
            let Some(fd) = number(image, index, id) else { continue };
            // struct io_uring_rsrc_update
            let update = script.words(&[u64::from(registered.index), fd as u64]);
            let purpose = format!("index {} of fd {fd} (io_uring)", registered.index);
            call!(script, purpose, libc::SYS_io_uring_register, fd, register::RING_FDS, update, 1);
        }
    }
    Ok(())
}

/// The number of a description in a task's table.
fn number(image: &Image, index: usize, id: DescriptionId) -> Option<i32> {
    let task = &image.tasks[index];
    let of = |pid: Pid| image.tasks.iter().find(|t| t.pid == pid);
    let owner: &Task = task.shares.descriptors.and_then(of).unwrap_or(task);
    owner.descriptors.iter().find(|d| d.description == id).map(|d| d.fd)
}

/// Brings a ring to its positions, and registers its buffers.
fn drive(script: &mut Script, planner: &mut Planner<'_>, ring: &IoUring, driver: &Driver) -> Result<()> {
    let fd = driver.fd;
    let title = planner.image.tasks[driver.task].title();
    let what = format!("fd {fd} (io_uring)");
    if ring.flags & SINGLE_ISSUER != 0 && ring.flags & DISABLED == 0 {
        let purpose = format!("{what}: enabling it");
        call!(script, purpose, libc::SYS_io_uring_register, fd, register::ENABLE_RINGS, 0, 0);
    }
    let count = ring.count();
    if count >= MANY {
        planner.note(format!(
            "{title}: {what} has counted {count} requests; to count them again takes about {} seconds",
            count / 10_000_000
        ));
    }
    if count > 0 {
        let queues = driver.queues.ok_or_else(|| Error::Unfit {
            what: format!("{title}: {what}"),
            why: "no process that may use it has its queues mapped".into(),
            remedy: "this image cannot be restored".into(),
        })?;
        let head = Value::Number(queues + u64::from(ring.offsets.cq_head));
        let tail = Value::Number(queues + u64::from(ring.offsets.cq_tail));
        let purpose = format!("{what}: its positions");
        let entries = ring.sq_entries;
        let mut take = |requests: u32, times: u32, follow: bool| {
            if requests == 0 || times == 0 {
                return;
            }
            let args = [fd.into(), requests.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            let first =
                script.call_for(purpose.clone(), libc::SYS_io_uring_enter, &args, i64::from(requests));
            if follow {
                script.copy(purpose.clone(), head, tail, 4);
            }
            if times > 1 {
                script.again(purpose.clone(), first, u64::from(times) - 1);
            }
        };
        let (taken, waiting) = (ring.taken(), count - ring.taken());
        take(entries, taken / entries, true);
        take(taken % entries, 1, true);
        take(entries, waiting / entries, false);
        take(waiting % entries, 1, false);
    }
    if !ring.buffers.is_empty() {
        let resources = buffers(script, &ring.buffers);
        let length = size_of::<Resources>();
        let purpose = format!("{what}: its buffers");
        call!(script, purpose, libc::SYS_io_uring_register, fd, register::BUFFERS2, resources, length);
    }
    Ok(())
}

/// `struct io_uring_rsrc_register` of buffers.
fn buffers(script: &mut Script, buffers: &[Option<Buffer>]) -> Data {
    let of = |b: &Option<Buffer>| b.map_or([0, 0], |b| [b.address, u64::from(b.length)]);
    let areas: Vec<u64> = buffers.iter().flat_map(of).collect();
    let tags: Vec<u64> = buffers.iter().map(|b| b.map_or(0, |b| b.tag)).collect();
    let (areas, tags) = (script.words(&areas), script.words(&tags));
    let resources = script.words(&[buffers.len() as u64, 0, 0, 0]);
    script.point(resources.at(16), areas);
    script.point(resources.at(24), tags);
    resources
}

/// Puts in place what the queues held; the kernel's own words must be right by now.
pub(crate) fn settle(opener: &mut Opener<'_>) -> Result<()> {
    for (id, ring) in all(opener.image) {
        let Some(made) = opener.rings.get(&id) else { continue };
        let at = ring.offsets;
        for word in [at.sq_head, at.cq_tail, at.sq_ring_mask, at.cq_ring_mask] {
            if made.ring.word(word) != ring.word(word) {
                return Err(Error::Unfit {
                    what: opener.name(id),
                    why: format!(
                        "its positions came to be {} and {} instead of {} and {}",
                        made.ring.word(at.sq_head),
                        made.ring.word(at.cq_tail),
                        ring.word(at.sq_head),
                        ring.word(at.cq_tail)
                    ),
                    remedy: "please report it".into(),
                });
            }
        }
        made.requests.write(0, &ring.requests);
        // All but the flags, which the kernel alone writes, and alike where it is the kernel's otherwise.
        made.ring.write(0, &ring.ring[..at.sq_flags as usize]);
        made.ring.write(at.sq_flags + 4, &ring.ring[at.sq_flags as usize + 4..]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_told_by_areas_and_tags() {
        let mut script = Script::new();
        let all = [Some(Buffer { address: 0x1000, length: 7, tag: 9 }), None];
        let resources = buffers(&mut script, &all);
        assert_eq!(script.bytes(resources)[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        let areas = Data { offset: 0, len: 32 };
        assert_eq!(script.bytes(areas)[..16], [0x1000u64.to_ne_bytes(), 7u64.to_ne_bytes()].concat()[..]);
    }
}
