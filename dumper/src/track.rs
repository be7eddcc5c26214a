//! Following what a tree writes, so that a dump copies what has changed only, and most of that while the tree runs.
//!
//! Each process gets a userfaultfd of ours in asynchronous write-protection mode ([`torpor_kernel::write_watch`]), made inside
//! it and closed there at once: what remains is a flag of its areas. From then on `PAGEMAP_SCAN` tells which pages were
//! written, and forgets it in the same moment. So whoever takes that away must keep it: a base, the image of which all
//! later writes are known, is given up with the first look and set again by a complete dump. A dump that fails, or is
//! killed, takes the userfaultfds with it, and the next one counts everything as changed.
//!
//! What is known of a page is worth something only if it has been watched without a gap since its contents were
//! copied. Areas that are new, were moved, or cannot be watched show as not watched (`PM_SCAN_CHECK_WPASYNC`) or as
//! written. Which pages there are is asked for again when the tree stands.
//!
//! Kernels without all that may have soft-dirty bits, which do as well ([`soft`]).
//!
//! Writes into pages that were pinned before they were protected do not show: those of devices, and of io_uring into
//! registered buffers. So a process that has a ring, or a file open with O_DIRECT, is copied whole ([`pins`]).

pub(crate) mod keeper;
mod rounds;
pub(crate) mod runs;
pub(crate) mod soft;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use nix::errno::Errno;
use torpor_image::Image;
use torpor_image::description::{Kind, Objects};
use torpor_image::extent::{Record, Where};
use torpor_image::task::{Descriptor, Task};
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::memory::Memory;
use torpor_kernel::write_watch::{self, WriteWatch};
use torpor_kernel::{abi, soft_dirty, stat};
use torpor_parasite::script::{Script, Value};

use self::keeper::Claim;
use self::runs::Covered;
use self::soft::Soft;
use crate::dump::{Destination, Options, Target};
use crate::error::{Error, Refusal, Result};
use crate::freeze::{Frozen, FrozenTree};
use crate::gadget::Gadgets;
use crate::inject::{self, Entry, Visit};
use crate::memory::{self, Known, most_files};
use crate::restart::Restarts;
use crate::{sharing, thread};

/// The part of a data file that must be in use for it to be kept: a fourth.
const WORTH: u64 = 4;
/// Room for what is written between the last look and the freeze, besides as much again as that look found.
const MARGIN: u64 = 16 << 20;

/// The watches over the processes of a tree. Dropped, nothing is watched any more.
#[derive(Debug, Default)]
pub struct Tracking {
    trackers: HashMap<Pid, Tracker>,
    /// Identity of the image since which all writes are known.
    base: Option<String>,
    /// What is known of the pages of each process, in the terms of the image that is being written.
    covered: HashMap<Pid, Covered>,
    /// What the parent has of shared memory and of files, in the same terms.
    known: Known,
    /// Bytes that are likely to be copied when the tree stands.
    expected: u64,
    /// What is copied is kept in memory by now.
    kept: bool,
    /// How long the tree stood for the watches to be made.
    stood: Duration,
}

/// The watch over one process.
#[derive(Debug)]
struct Tracker {
    /// When the process started, which tells it from another of the same pid.
    started: u64,
    by: By,
    /// Nobody else follows it meanwhile.
    claim: Claim,
}

/// By what its writes are followed.
#[derive(Debug)]
enum By {
    WriteProtection(WriteWatch),
    SoftDirty(Soft),
}

/// When processes started, and the right to follow them.
type Claims = HashMap<Pid, (u64, Claim)>;

impl Tracking {
    /// The watches that an earlier dump has left over a tree; none, if none did.
    pub fn resume(target: &Target) -> Self {
        let pids = target.survey().processes.iter().map(|p| p.pid);
        keeper::take(pids)
    }

    /// Whether a process is watched by us.
    pub(crate) fn watches(&self, pid: Pid) -> bool {
        self.trackers.contains_key(&pid)
    }

    /// The processes that are watched.
    pub(crate) fn watched(&self) -> impl Iterator<Item = Pid> {
        self.trackers.keys().copied()
    }

    /// Identity of the image since which all writes are known.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// What is known of the pages of a process.
    pub(crate) fn covered(&self, pid: Pid) -> Option<&Covered> {
        self.covered.get(&pid).filter(|_| self.watches(pid))
    }

    /// What the parent has of shared memory and of files.
    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    /// The bits by which a process is followed, if it is by those.
    pub(crate) fn soft(&self, pid: Pid) -> Option<&Soft> {
        match &self.trackers.get(&pid)?.by {
            By::SoftDirty(soft) => Some(soft),
            By::WriteProtection(_) => None,
        }
    }

    /// By what writes are followed, if they are.
    pub(crate) fn means(&self) -> Option<&'static str> {
        self.trackers.values().next().map(|t| match t.by {
            By::SoftDirty(_) => "soft-dirty",
            By::WriteProtection(_) => "write-protection",
        })
    }

    /// Bytes that are likely to be copied when the tree stands.
    pub(crate) fn expected(&self) -> u64 {
        2 * self.expected + MARGIN
    }

    /// How long the tree stood for the watches to be made.
    pub(crate) fn stood(&self) -> Duration {
        self.stood
    }

    /// Watches every process of the tree that is not watched yet, for which the tree stands for a moment. One that
    /// cannot be watched is copied whole.
    pub fn begin(&mut self, target: &Target) -> Result<()> {
        let known = |pid: Pid, tracker: &Tracker| {
            stat::of_process(pid).is_ok_and(|stat| stat.starttime == tracker.started)
        };
        self.trackers.retain(|pid, tracker| known(*pid, tracker));
        self.stood = Duration::ZERO;
        let mut claims = self.claim(target)?;
        // Without such a thing there is nothing to stop for.
        if WriteWatch::of_this_process().is_err() {
            if soft_dirty::available().is_ok() {
                self.begin_soft(claims);
            }
            return Ok(());
        }
        // Probed while nothing stands yet.
        write_watch::holes_show();
        if claims.is_empty() {
            return Ok(());
        }
        let restarts = Restarts::look(target.survey().processes.iter().map(|p| p.pid));
        let (mut stopped, gadgets) = target.stop()?;
        let made = self.enter(&mut stopped, &gadgets, &restarts, &mut claims);
        self.stood = stopped.since.elapsed();
        stopped.release();
        made
    }

    /// Claims every process that is not watched yet. One that somebody else follows is refused: what he is told would be
    /// forgotten for us, and the other way round.
    fn claim(&self, target: &Target) -> Result<Claims> {
        let mut claims = Claims::new();
        for process in target.survey().processes.iter().filter(|p| !self.watches(p.pid)) {
            let Ok(stat) = stat::of_process(process.pid) else { continue };
            match Claim::soon(process.pid, stat.starttime) {
                Ok(claim) => drop(claims.insert(process.pid, (stat.starttime, claim))),
                Err(Errno::EADDRINUSE) => {
                    let refusal = Refusal {
                        object: format!("what process {} writes", process.pid),
                        why: "it is followed already, by a dump that goes on (--every) or of another user"
                            .into(),
                        remedy: "end that, or dump without --track and --parent".into(),
                    };
                    return Err(Error::Refused { pid: target.survey().root().pid, refusals: vec![refusal] });
                }
                // It goes without.
                Err(_) => {}
            }
        }
        Ok(claims)
    }

    /// Follows every process by its soft-dirty bits: nothing is done before the tree stands.
    fn begin_soft(&mut self, claims: Claims) {
        for (pid, (started, claim)) in claims {
            self.trackers.insert(pid, Tracker { started, by: By::SoftDirty(Soft::default()), claim });
        }
    }

    /// Makes a userfaultfd in each process that has none of ours.
    fn enter(
        &mut self,
        stopped: &mut FrozenTree,
        gadgets: &HashMap<Pid, Gadgets>,
        restarts: &Restarts,
        claims: &mut Claims,
    ) -> Result<()> {
        let shares = sharing::collect(&stopped.processes)?;
        let own: Vec<bool> = stopped
            .processes
            .iter()
            .zip(&shares)
            .map(|(p, shares)| shares.memory.is_none() && !self.watches(p.pid()))
            .collect();
        let mut ways = Vec::new();
        for (process, _) in stopped.processes.iter().zip(&own).filter(|(_, own)| **own) {
            ways.push(Way::of(process, restarts)?);
        }
        let mut visits = Vec::new();
        let mut visited = Vec::new();
        let processes = stopped.processes.iter_mut().zip(&own).filter(|(_, own)| **own);
        for ((process, _), way) in processes.zip(&ways) {
            let Some(gadgets) = gadgets.get(&process.pid()) else { continue };
            let started = stat::of_process(process.pid());
            let started = started.map_err(Error::kernel(process.pid(), "reading its stat"))?.starttime;
            let claim = match claims.remove(&process.pid()) {
                Some((of, claim)) if of == started => claim,
                // It has just begun.
                _ => match Claim::of(process.pid(), started) {
                    Ok(claim) => claim,
                    Err(_) => continue,
                },
            };
            visited.push((process.pid(), started, claim));
            visits.push(way.visit(process, *gadgets));
        }
        for ((pid, started, claim), lent) in visited.into_iter().zip(inject::prepare(visits)?.borrow()) {
            match lent {
                Ok(Some(fd)) => {
                    if let Ok(watch) = WriteWatch::begin(fd) {
                        self.trackers.insert(pid, Tracker { started, by: By::WriteProtection(watch), claim });
                    }
                }
                // It may have no descriptors left, or the kernel no such thing: it goes without.
                Ok(None) | Err(Error::Script { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Copies what has changed since `parent`, which the new image builds on if that is the base, or else everything; and
    /// again what has changed meanwhile, until little is left for the freeze. The tree runs. With `link` the data files
    /// of the parent become the new image's own, but for those of which little is needed any more.
    pub fn follow(
        &mut self,
        to: &mut Destination,
        parent: Option<&Image>,
        link: bool,
        options: &Options<'_>,
    ) -> Result<()> {
        self.covered.clear();
        self.known = Known::default();
        self.kept = false;
        let base = self.base.take();
        if let Some(parent) = parent {
            let wasted = wasted(parent);
            let borrowing = match link {
                true => to.writer.link(parent),
                false => to.writer.build_on(parent, most_files())?,
            };
            let borrow = |r: &Record| match r.place {
                Where::Data if link && wasted.contains(&r.file) => None,
                Where::Data => Some(Record { file: borrowing.number(r.file)?, ..*r }),
                Where::Zero => Some(*r),
                Where::Guard => None,
            };
            let root = Pid(parent.manifest.root.0);
            self.known = Known::of(parent, borrow, root, &options.watch())?;
            if base.is_some_and(|base| base == parent.manifest.id) {
                // What had pinned pages then may have been given contents since that nobody has seen.
                let pinned = |task: &&Task| {
                    let of = task.shares.descriptors.unwrap_or(task.pid);
                    parent
                        .tasks
                        .iter()
                        .find(|t| t.pid == of)
                        .is_some_and(|t| pins(&parent.objects, &t.descriptors))
                };
                for task in parent.tasks.iter().filter(|task| !pinned(task)) {
                    let records = parent.records(task.memory.pages).iter();
                    let borrowed = records.filter_map(borrow);
                    self.covered.insert(Pid(task.pid.0), Covered::new(borrowed.collect()));
                }
            }
        }
        rounds::run(self, &mut to.files, &options.watch())
    }

    /// Copies what has changed since `follow`, again until little is left. Where memory is scarce (`staged` is not) nothing
    /// more is kept in it: what is copied when the tree stands is written at once then, behind all that was kept before.
    pub(crate) fn catch_up(
        &mut self,
        staged: bool,
        to: &mut Destination,
        options: &Options<'_>,
    ) -> Result<()> {
        if !staged {
            memory::catch_up(&mut to.files)?;
            self.kept = true;
        }
        // By soft-dirty bits all is copied when the tree stands.
        if self.trackers.values().all(|t| matches!(t.by, By::SoftDirty(_))) {
            return Ok(());
        }
        rounds::run(self, &mut to.files, &options.watch())
    }

    /// A complete image has everything that was written until now.
    pub fn based_on(&mut self, id: &str) {
        self.covered.clear();
        self.known = Known::default();
        self.base = Some(id.to_owned());
    }

    /// Leaves the watches to a process that goes on until the tree ends, or another dump takes them over.
    pub fn leave(self) -> Result<()> {
        keeper::start(self)
    }
}

/// Whether a process may have pages that are written to without a fault: what is read from its files goes there directly.
pub(crate) fn pins(objects: &Objects, descriptors: &[Descriptor]) -> bool {
    descriptors.iter().any(|d| {
        let description = &objects.descriptions[d.description.0 as usize];
        match description.kind {
            Kind::IoUring(_) => true,
            Kind::File(_) => description.flags & libc::O_DIRECT as u32 != 0,
            _ => false,
        }
    })
}

/// Data files of which an image names so little that they are not worth their place.
fn wasted(image: &Image) -> HashSet<u32> {
    let used = image.used_bytes();
    let little = |number: &u32| {
        let size = image.data_size(*number).unwrap_or(0);
        used.get(number).copied().unwrap_or(0) * WORTH < size
    };
    used.keys().copied().filter(little).collect()
}

/// What is needed to enter a process for its userfaultfd.
struct Way {
    memory: Memory,
    leader: [inject::Before; 1],
    maps: Vec<torpor_kernel::maps::Mapping>,
    taken: u64,
    own_tgid: i32,
    scripts: Vec<Script>,
    lends: Option<torpor_parasite::script::OpId>,
}

impl Way {
    fn of(process: &Frozen, restarts: &Restarts) -> Result<Self> {
        let (own_pid, pid) = (process.pid(), process.living());
        let memory = Memory::open(pid, true).map_err(Error::kernel(pid, "opening its memory"))?;
        let tid = process.threads().first().map_or(Tid(pid.0), |t| t.tid);
        let leader = thread::read(
            own_pid,
            tid,
            thread::look(own_pid, tid)?,
            (&memory, &mut thread::Sites::default()),
            restarts,
        )?;
        let mut taken = 0;
        for thread in process.threads() {
            let status = torpor_kernel::status::of_task(own_pid, thread.tid)
                .map_err(Error::kernel(pid, "reading its status"))?;
            taken |= status.caught | status.sig_pending | status.shared_pending;
        }
        let own_tid = leader.before.own_tid;
        let own_tgid = if process.leader_ended() { own_pid.0 } else { own_tid };
        let mut script = Script::new();
        let flags: [Value; 1] = [(libc::O_CLOEXEC | abi::UFFD_USER_MODE_ONLY).into()];
        let call = (libc::SYS_userfaultfd, &flags[..]);
        let lends = inject::lend(&mut script, "a userfaultfd", call, (own_tgid, own_tid), taken);
        Ok(Way {
            memory,
            leader: [leader.before],
            maps: torpor_kernel::maps::maps(pid).map_err(Error::kernel(pid, "reading its memory map"))?,
            taken,
            own_tgid,
            scripts: vec![script],
            lends,
        })
    }

    fn visit<'a>(&'a self, frozen: &'a mut Frozen, gadgets: Gadgets) -> Visit<'a> {
        let entry = Entry { maps: &self.maps, gadgets, taken_signals: self.taken, own_tgid: self.own_tgid };
        Visit {
            frozen,
            memory: &self.memory,
            threads: &self.leader,
            entry,
            scripts: &self.scripts,
            lends: self.lends,
            birth: None,
        }
    }
}
