//! io_uring(7): rings at rest, looked at in the kernel's memory ([`torpor_kernel::io_uring::look`]).
//!
//! A request under way is state of files, timers and devices that nobody can read back, so a ring that has one is
//! refused, after the freeze was put off for a while. Completions that the program has not taken, and requests that it
//! has written and not submitted, are memory that it shares with the kernel, and kept. A new ring counts requests and
//! completions alike, so one that has counted them differently (a request may have several completions, or none) is
//! refused, too.

mod resolve;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use torpor_image::description::Kind;
use torpor_image::io_uring::{AREAS, FLAGS, IoUring, Offsets};
use torpor_image::vma::Mapping as Maps;
use torpor_image::{DescriptionId, Pid as ImagePid};
use torpor_kernel::fdinfo::{self, Detail};
use torpor_kernel::ids::Pid;
use torpor_kernel::io_uring::look::{Look, Ring};
use torpor_kernel::io_uring::{self, Queue, area, setup};
use torpor_kernel::{fds, maps};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;
use crate::survey::Survey;

pub(crate) use resolve::{refuse_unreachable, resolve};

const WITHOUT: &str = "start the program without (UV_USE_IO_URING=0 for Node.js), or for all programs: sysctl kernel.io_uring_disabled=2";
const LATER: &str = "try again when its requests are over, or start the program without it (UV_USE_IO_URING=0 for \
                     Node.js; for all programs: sysctl kernel.io_uring_disabled=2)";
const ANEW: &str =
    "let the program make a new ring before the dump, or start it without (UV_USE_IO_URING=0 for Node.js)";
/// How often a ring that is found busy while its program runs is looked at again: 127 ms in all, as of the freeze.
const MOMENTS: u32 = 7;
/// How often a ring is looked at until no call has it locked.
const UNLOCKED: u32 = 100;

/// What is known of the rings of a tree.
#[derive(Debug, Default)]
pub(crate) struct Rings {
    look: Option<std::result::Result<Rc<Look>, String>>,
    /// Rings that were collected, or refused (`None`), by device and inode.
    known: HashMap<(u64, u64), Option<Known>>,
}

/// A ring whose descriptor was met.
#[derive(Debug)]
struct Known {
    /// Its description, as soon as that has a number.
    id: Option<DescriptionId>,
    found: Ring,
    title: String,
}

impl Rings {
    fn look(&mut self) -> std::result::Result<Rc<Look>, String> {
        let open = || Look::open().map(Rc::new).map_err(|e| e.to_string());
        self.look.get_or_insert_with(open).clone()
    }
}

/// What stands in the way of a ring.
enum Obstacle {
    /// It passes, as a rule.
    Busy(String, &'static str),
    /// It stays.
    Unfit(String, &'static str),
}

/// A ring behind `found`; what is registered with it is found out by [`resolve`].
pub(crate) fn collect(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    if found.pid == Pid::this() {
        collector.refuse(found.title(), "an io_uring on its way to a process", LATER);
        return Ok(None);
    }
    let fd = found.get(collector)?;
    let mut moments = if collector.live { MOMENTS } else { 0 };
    let outcome = loop {
        match look_at(collector, found, &fd) {
            // A running program is seldom caught between two requests.
            Err(Obstacle::Busy(..)) if moments > 0 => {
                std::thread::sleep(Duration::from_millis(1 << (MOMENTS - moments)));
                moments -= 1;
            }
            other => break other,
        }
    };
    let key = (found.stat.st_dev, found.stat.st_ino);
    match outcome {
        Ok((ring, known)) => {
            collector.rings.known.insert(key, Some(known));
            Ok(Some(Kind::IoUring(Box::new(ring))))
        }
        Err(obstacle) => {
            let (Obstacle::Busy(why, remedy) | Obstacle::Unfit(why, remedy)) = obstacle;
            collector.refuse(found.title(), format!("an io_uring: {why}"), remedy);
            collector.rings.known.insert(key, None);
            Ok(None)
        }
    }
}

fn look_at(
    collector: &mut Collector,
    found: &Found,
    fd: &OwnedFd,
) -> std::result::Result<(IoUring, Known), Obstacle> {
    const PRIVILEGE: &str = "run torpor with CAP_BPF and CAP_PERFMON, without lockdown for confidentiality, on Linux \
                             6.16 or newer with CONFIG_DEBUG_INFO_BTF; or start the program without it";
    let unknown = |e: String| {
        Obstacle::Unfit(format!("how it was set up, and its requests, only the kernel knows: {e}"), PRIVILEGE)
    };
    let look = collector.rings.look().map_err(unknown)?;
    let ring = look.ring(fd.as_fd()).map_err(|e| unknown(e.to_string()))?;
    unfit(&ring).map_err(|why| Obstacle::Unfit(why, WITHOUT))?;
    let polls = polls(found).map_err(|e| unknown(e.to_string()))?;
    if let Some(why) = busy_with(&ring, &polls) {
        return Err(Obstacle::Busy(why, LATER));
    }
    let image = read(&ring, fd.as_fd())?;
    Ok((image, Known { id: None, found: ring, title: found.title() }))
}

/// Kinds of requests that poll. They are told only while no call has the ring locked.
fn polls(found: &Found) -> torpor_kernel::Result<Vec<u32>> {
    for _ in 0..UNLOCKED {
        let info = fdinfo::fdinfo(found.pid, found.fd)?;
        if let Detail::IoUring(ring) = info.detail {
            return Ok(ring.polls);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(Vec::new())
}

/// What a ring has or is that cannot be made again.
fn unfit(ring: &Ring) -> std::result::Result<(), String> {
    let odd = ring.flags & !FLAGS;
    if odd != 0 {
        let names = setup::NAMES.iter().enumerate().filter(|(bit, _)| odd & 1 << bit != 0);
        let mut names: Vec<String> = names.map(|(_, name)| format!("IORING_SETUP_{name}")).collect();
        names.extend((odd >> setup::NAMES.len() != 0).then(|| format!("flags {odd:#x}")));
        return Err(format!("it was set up with {}", names.join(" and ")));
    }
    if !ring.others.is_empty() {
        return Err(format!("it has {}", ring.others.join(" and ")));
    }
    if ring.submitter == Some(0) {
        return Err("the only thread that may use it has ended".into());
    }
    if ring.buffers.iter().flatten().any(|b| b.of_kernel) {
        return Err("it has buffers of a device".into());
    }
    Ok(())
}

/// Why a ring is not at rest; `polls` are the kinds of its requests that poll.
fn busy_with(ring: &Ring, polls: &[u32]) -> Option<String> {
    let mut names: Vec<String> =
        polls.iter().chain(&ring.requests).map(|number| io_uring::operation(*number)).collect();
    let count = ring.in_flight.max(names.len() as u32);
    if count > 0 {
        names.truncate(8);
        let more = count as usize - names.len().min(count as usize);
        if more > 0 {
            names.push(if names.is_empty() { "of unknown kind".into() } else { format!("{more} more") });
        }
        let plural = if count == 1 { "request is" } else { "requests are" };
        return Some(format!("{count} {plural} in flight ({})", names.join(", ")));
    }
    ring.unsettled.then(|| "completions or other work of it wait for the program".into())
}

/// The queues of a ring at rest, and where everything is in them: a new ring of the same size and flags tells.
fn read(ring: &Ring, fd: BorrowedFd<'_>) -> std::result::Result<IoUring, Obstacle> {
    let failed =
        |e: torpor_kernel::Error| Obstacle::Unfit(format!("its queues cannot be read: {e}"), WITHOUT);
    let flags = ring.flags & !(setup::CLAMP | setup::ATTACH_WQ);
    let (_model, params) =
        io_uring::make(ring.sq_entries, ring.cq_entries, flags | setup::R_DISABLED).map_err(failed)?;
    let queues = Queue::map(fd, area::RING, params.ring_length()).map_err(failed)?;
    let requests = Queue::map(fd, area::REQUESTS, params.requests_length()).map_err(failed)?;
    let offsets = {
        let (sq, cq) = params.offsets();
        Offsets::new(sq, cq)
    };
    let image = IoUring {
        flags: ring.flags,
        sq_entries: ring.sq_entries,
        cq_entries: ring.cq_entries,
        offsets,
        ring: queues.bytes().into(),
        requests: requests.bytes().into(),
        submitter: ring.submitter.map(ImagePid),
        clock: ring.clock,
        workers: ring.workers.map(|[bounded, unbounded]| (bounded, unbounded)),
        eventfd: None,
        files: Vec::new(),
        file_range: (ring.file_range.0, ring.file_range.1.saturating_sub(ring.file_range.0)),
        buffers: Vec::new(),
        registered: Vec::new(),
    };
    let size = (image.word(offsets.sq_ring_entries), image.word(offsets.cq_ring_entries));
    if size != (ring.sq_entries, ring.cq_entries) {
        return Err(Obstacle::Unfit("its queues are not where those of a new ring are".into(), WITHOUT));
    }
    if image.word(offsets.sq_flags) != 0 {
        return Err(Obstacle::Busy("completions or other work of it wait for the program".into(), LATER));
    }
    let (submitted, completed, taken) = (image.word(offsets.sq_head), image.count(), image.taken());
    if submitted != completed {
        // Caught between the two, of a running program; else it stays so.
        let why = format!(
            "it has taken {submitted} requests and given {completed} completions, and a new ring counts both alike"
        );
        return Err(Obstacle::Busy(why, ANEW));
    }
    if taken > completed || completed - taken > ring.cq_entries {
        let why = "the count of its completions is about to begin anew, or was changed by the program";
        return Err(Obstacle::Busy(why.into(), ANEW));
    }
    Ok(image)
}

/// Whether a mapping is of the queues of a ring.
pub(crate) fn is_mapped(mapping: &maps::Mapping) -> bool {
    mapping.kind() == maps::Kind::AnonInode(b"[io_uring]")
}

/// The ring that an area maps; `None` when it was refused.
pub(crate) fn mapped(collector: &mut Collector, mapping: &maps::Mapping, title: &str) -> Option<Maps> {
    let key = (libc::makedev(mapping.dev.0, mapping.dev.1), mapping.inode);
    const REMEDY: &str = "unmap it before the dump";
    let id = match collector.rings.known.get(&key) {
        // Refused already, or made after the look at the descriptors.
        Some(None) => return None,
        Some(Some(known)) => known.id,
        None => None,
    };
    let Some(ring) = id else {
        if !collector.live {
            collector.refuse(title, "queues of an io_uring that no process has open", REMEDY);
        }
        return None;
    };
    let fits = match &collector.objects.descriptions[ring.0 as usize].kind {
        Kind::IoUring(of) => {
            AREAS.contains(&mapping.offset) && mapping.end - mapping.start <= of.area(mapping.offset)
        }
        _ => false,
    };
    if !fits || !mapping.shared {
        collector.refuse(title, "a part of the queues of an io_uring cannot be dumped", REMEDY);
        return None;
    }
    Some(Maps::Ring { ring, area: mapping.offset })
}

/// The rings that were found in a running tree, to be looked at when it stands.
#[derive(Debug)]
pub(crate) struct Watch {
    look: Option<Rc<Look>>,
    rings: Vec<(Pid, i32)>,
}

impl Watch {
    /// Of those of a survey.
    pub(crate) fn of(survey: &Survey) -> Self {
        let mut rings = Vec::new();
        for process in &survey.processes {
            let own = process.descriptors.iter().filter(|d| d.kind == "io_uring");
            rings.extend(own.map(|d| (process.pid, d.fd)));
        }
        Watch { look: if rings.is_empty() { None } else { Look::open().ok().map(Rc::new) }, rings }
    }

    /// For the collection when the tree stands: what takes a while is done already.
    pub(crate) fn rings(&self) -> Rings {
        Rings { look: self.look.clone().map(Ok), known: HashMap::new() }
    }

    /// Whether one of them is not at rest, which it may be in a moment.
    pub(crate) fn busy(&self) -> bool {
        let Some(look) = &self.look else { return false };
        self.rings.iter().any(|(pid, fd)| {
            let Ok(ring) = fds::pidfd_open(*pid).and_then(|pidfd| fds::getfd(pidfd.as_fd(), *fd)) else {
                return false;
            };
            look.ring(ring.as_fd()).is_ok_and(|found| {
                busy_with(&found, &[]).is_some()
                    || matches!(read(&found, ring.as_fd()), Err(Obstacle::Busy(..)))
            })
        })
    }
}
