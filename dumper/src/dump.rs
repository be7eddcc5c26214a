//! From a pid to an image: survey, freeze, collect, copy, write.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use torpor_image::Encoding;
use torpor_image::manifest::{Freeze, Manifest};
use torpor_image::stream::Output;
use torpor_image::write::{DataFile, ImageWriter};
use torpor_kernel::ids::Pid;
use torpor_kernel::memory::Memory;
use torpor_kernel::stat;

use crate::areas::Areas;
use crate::capture::capture;
use crate::description::Order;
use crate::error::{Error, Result};
use crate::freeze::{Frozen as Stopped, FrozenTree};
use crate::gadget::{self, Gadgets, Known};
use crate::hold::Hold;
use crate::memory::{self, Watch};
use crate::opened::Opened;
use crate::restart::Restarts;
use crate::rules::Rules;
use crate::snapshot::Way;
use crate::stage::Stage;
use crate::survey::{self, Survey};
use crate::tcp::{self, TcpPolicy};
use crate::thread::Unasked;
use crate::track::Tracking;
use crate::unix::{self, ExternalUnix};
use crate::{areas, inotify, io_uring, netlink, pty, snapshot, workers};

/// How often the freeze is put off for programs to take in what a dump would lose: 127 ms in all.
const MOMENTS: u32 = 7;

/// How often, and how long after the last time, a program that was just executed is looked at again: its libc,
/// from whose code it is entered, is mapped a moment after the program itself.
const STARTS: u32 = 25;
const START: std::time::Duration = std::time::Duration::from_millis(2);

/// Searches the code that a process has at this moment.
fn gadgets_now(known: &mut Known, pid: Pid) -> Result<Gadgets> {
    let maps = torpor_kernel::maps::maps(pid).map_err(Error::kernel(pid, "reading its memory map"))?;
    let memory = Memory::open(pid, false).map_err(Error::looking(pid, "opening its memory"))?;
    known.find(pid, &maps, &memory)
}

/// How to dump.
#[derive(Default)]
#[non_exhaustive]
pub struct Options<'a> {
    /// The process will run on after the dump: recorded in the manifest, since what it does outside itself
    /// from then on is not undone by a restore.
    pub runs_on: bool,
    /// What becomes of files with a name.
    pub files: Rules,
    /// What becomes of TCP connections to the outside; as the target was found with.
    pub tcp: TcpPolicy,
    /// Told of bytes copied, from several threads.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
    /// Asked now and then whether to give up, from several threads.
    pub cancel: Option<&'a (dyn Fn() -> bool + Sync)>,
    /// What shall become of Unix sockets whose peers are not part of the dump; the first that fits.
    pub external_unix: &'a [ExternalUnix],
    /// The watches over the tree by which it was followed: what did not change is not copied.
    pub tracking: Option<&'a Tracking>,
}

impl Options<'_> {
    pub(crate) fn watch(&self) -> Watch<'_> {
        Watch { progress: self.progress, cancel: self.cancel }
    }
}

/// A running tree that can be dumped.
#[derive(Debug)]
pub struct Target {
    root: Pid,
    gadgets: HashMap<Pid, Gadgets>,
    known: Known,
    survey: Survey,
    /// When the root started, which tells it from another of the same pid.
    started: u64,
    /// Bytes of anonymous memory, about as many as there are to be copied.
    anonymous: u64,
    order: Order,
    /// Reading the memory maps takes long.
    slow_maps: bool,
}

/// Where an image goes: a directory, checked and prepared while the process still runs.
#[derive(Debug)]
pub struct Destination {
    pub(crate) writer: ImageWriter,
    pub(crate) files: Vec<DataFile>,
    /// Whether there is a place beside the image where contents can wait to be encoded.
    pub(crate) roomy: bool,
}

impl Destination {
    /// Prepares `dir`: made if missing, refused if it holds an image. With `fsync` everything is on stable
    /// storage before a dump counts as done.
    pub fn create(dir: &Path, fsync: bool) -> Result<Self> {
        Self::create_encoded(dir, fsync, Encoding::default())
    }

    /// The same; the files of the image are compressed and encrypted as told.
    pub fn create_encoded(dir: &Path, fsync: bool, encoding: Encoding) -> Result<Self> {
        Self::create_from(dir, fsync, encoding, 0)
    }

    /// The same; its data files have numbers from `first` on.
    pub fn create_from(dir: &Path, fsync: bool, encoding: Encoding, first: u32) -> Result<Self> {
        Self::with(ImageWriter::create(dir, fsync)?.encode(encoding), true, first)
    }

    /// The image goes to a stream, as a tar archive.
    pub fn to_stream(out: Box<dyn Output>, encoding: Encoding) -> Result<Self> {
        Self::with(ImageWriter::to_stream(out).encode(encoding), false, 0)
    }

    fn with(writer: ImageWriter, roomy: bool, first: u32) -> Result<Self> {
        let files = (first..first + memory::most_files())
            .map(|n| writer.data_file(n))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Destination { writer, files, roomy })
    }
}

/// A tree that stands still. Dropped, it goes on.
#[derive(Debug)]
pub struct Frozen {
    /// Dropped before the tree goes on.
    hold: Option<Hold>,
    stopped: FrozenTree,
    /// By process.
    opened: Vec<Opened>,
    gadgets: HashMap<Pid, Gadgets>,
    before: Before,
    stage: Option<Stage>,
    way: Way,
}

/// What was looked at right before the freeze, because it shows only then or takes a while.
#[derive(Debug)]
pub(crate) struct Before {
    pub(crate) restarts: Restarts,
    pub(crate) rings: io_uring::Watch,
    pub(crate) areas: Areas,
    pub(crate) unasked: Unasked,
    pub(crate) order: Order,
}

/// Whether something is on its way that a dump would lose, and that programs take in at once as a rule.
fn busy(all: &[Opened]) -> bool {
    all.iter().any(inotify::unread)
        || netlink::unread(all)
        || tcp::busy(all)
        || pty::unread(all)
        || unix::unaccepted(all)
}

/// A complete image.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// Its manifest.
    pub manifest: Manifest,
}

impl Target {
    /// Looks at a process, at all below it and at everything they own without stopping anything; refuses what a
    /// dump would lose.
    pub fn find(pid: i32) -> Result<Self> {
        Self::find_with(pid, TcpPolicy::Refuse, &[])
    }

    /// The same, with what shall become of TCP connections and Unix sockets whose peers are not part of the dump.
    pub fn find_with(pid: i32, tcp: TcpPolicy, external_unix: &[ExternalUnix]) -> Result<Self> {
        Self::find_tracked(pid, tcp, external_unix, None)
    }

    /// The same of a tree that is watched by `tracking`.
    pub fn find_tracked(
        pid: i32,
        tcp: TcpPolicy,
        external_unix: &[ExternalUnix],
        tracking: Option<&Tracking>,
    ) -> Result<Self> {
        let root = Pid(pid);
        workers::prepare();
        let watched =
            tracking.map(|t| t.watched().flat_map(|p| [p, survey::living(p)]).collect()).unwrap_or_default();
        let (survey, maps) = survey::survey(root, tcp, external_unix, &watched)?;
        if !survey.refusals.is_empty() {
            return Err(Error::Refused { pid: root, refusals: survey.refusals });
        }
        let mut known = Known::default();
        let mut gadgets = HashMap::new();
        let (mut anonymous, mut areas) = (0, 0);
        for (pid, maps) in &maps.all {
            areas += maps.len();
            anonymous += maps.iter().map(|m| (m.anonymous_kb + m.swap_kb) * 1024).sum::<u64>();
            match Self::enter(&mut known, *pid, maps) {
                Ok(found) => {
                    gadgets.insert(*pid, found);
                }
                Err(e) if *pid == root => return Err(e),
                // It may have ended, or be just executed: it is looked at again when it stands.
                Err(_later) => {}
            }
        }
        let started = stat::of_process(root).map_err(Error::kernel(root, "reading its stat"))?.starttime;
        Ok(Target {
            root,
            gadgets,
            known,
            survey,
            started,
            anonymous,
            order: maps.order,
            slow_maps: areas::worth_it(maps.took, areas, anonymous),
        })
    }

    fn enter(known: &mut Known, pid: Pid, maps: &[torpor_kernel::maps::Mapping]) -> Result<Gadgets> {
        let living = survey::living(pid);
        let memory = Memory::open(living, false).map_err(|source| match source.is_gone() {
            true => Error::NoProcess(pid),
            false => Error::Permission { pid, source },
        })?;
        let mut gadgets = known.find(living, maps, &memory);
        for _ in 0..STARTS {
            if gadgets.is_ok() {
                break;
            }
            std::thread::sleep(START);
            gadgets = gadgets_now(known, living);
        }
        gadgets
    }

    /// What was found.
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Stops every thread of every process of the tree; a moment later where one is about to take in what a dump
    /// would lose, or has not mapped its libc yet. `runs_on` tells whether it shall do so after the dump; it is as well
    /// to stand for a shorter time then, at the price of more memory for us.
    pub fn freeze(&self, runs_on: bool) -> Result<Frozen> {
        self.freeze_by(runs_on, Way::default())
    }

    /// In which way its memory had best be taken, or can be of the one that is wished for. `runs_on` tells whether it
    /// shall do so after the dump.
    pub fn choose(&self, wish: Option<Freeze>, runs_on: bool) -> Result<Way> {
        snapshot::choose(self.root, &self.survey, self.anonymous, wish, runs_on)
    }

    /// Stops it as [`Target::freeze`] does, to have its memory taken in a way that was chosen. A dump by
    /// [`Freeze::Fork`] may still find that it cannot be ([`Error::Declined`]).
    pub fn freeze_by(&self, runs_on: bool, way: Way) -> Result<Frozen> {
        let stage = match way.freeze {
            Freeze::Fork => None,
            _ => Stage::for_bytes(self.anonymous, runs_on),
        };
        self.freeze_with(stage, way, || Ok(()))
    }

    /// The same for a tree that was followed: little of it is left to be copied.
    pub fn freeze_tracked(
        &self,
        tracking: &mut Tracking,
        to: &mut Destination,
        options: &Options<'_>,
    ) -> Result<Frozen> {
        let stage = Stage::for_bytes(tracking.expected().min(self.anonymous), true);
        let way = Way { freeze: Freeze::Track, ..Way::default() };
        let staged = stage.is_some();
        self.freeze_with(stage, way, || tracking.catch_up(staged, to, options))
    }

    /// Stops the tree for a moment, and tells by which code its processes can be entered.
    pub(crate) fn stop(&self) -> Result<(FrozenTree, HashMap<Pid, Gadgets>)> {
        let mut known = self.known.clone();
        for _ in 0..STARTS {
            let mut stopped = FrozenTree::freeze(self.root, &Unasked::default())?;
            if let Ok(gadgets) = self.gadgets_of(&stopped, &mut known) {
                return Ok((stopped, gadgets));
            }
            stopped.release();
            std::thread::sleep(START);
        }
        let stopped = FrozenTree::freeze(self.root, &Unasked::default())?;
        let gadgets = self.gadgets_of(&stopped, &mut known)?;
        Ok((stopped, gadgets))
    }

    /// `last` is done when all else is ready.
    fn freeze_with(
        &self,
        stage: Option<Stage>,
        way: Way,
        last: impl FnOnce() -> Result<()>,
    ) -> Result<Frozen> {
        let pids = || self.survey.processes.iter().map(|p| p.pid);
        let before = Before {
            areas: if self.slow_maps { Areas::read(pids()) } else { Areas::default() },
            unasked: Unasked::prepare(&self.survey),
            order: self.order.clone(),
            rings: io_uring::Watch::of(&self.survey),
            restarts: Restarts::look(pids()),
        };
        let mut known = self.known.clone();
        let mut starts = 0;
        let mut moments = 0;
        last()?;
        loop {
            let mut stopped = FrozenTree::freeze(self.root, &before.unasked)?;
            if stat::of_process(self.root).is_ok_and(|s| s.starttime != self.started) {
                return Err(stopped.root().died("another process has its pid by now"));
            }
            let pids: Vec<Pid> = stopped.processes.iter().map(Stopped::living).collect();
            let opened = Opened::read_all(&pids)?;
            if moments < MOMENTS && (busy(&opened) || before.rings.busy()) {
                stopped.release();
                std::thread::sleep(std::time::Duration::from_millis(1 << moments));
                moments += 1;
                continue;
            }
            match self.gadgets_of(&stopped, &mut known) {
                Ok(gadgets) => {
                    return Ok(Frozen { hold: None, stopped, opened, gadgets, before, stage, way });
                }
                Err(e) if starts == STARTS => return Err(e),
                // One has executed another program since, which may have mapped no libc yet.
                Err(_) => {
                    stopped.release();
                    std::thread::sleep(START);
                    starts += 1;
                }
            }
        }
    }

    /// By which code each process can be entered.
    fn gadgets_of(&self, stopped: &FrozenTree, known: &mut Known) -> Result<HashMap<Pid, Gadgets>> {
        let of = |known: &mut Known, process: &Stopped| {
            let pid = process.living();
            let memory = Memory::open(pid, false).map_err(Error::kernel(pid, "opening its memory"))?;
            match self.gadgets.get(&process.pid()) {
                Some(gadgets) if gadget::confirm(*gadgets, &memory) => Ok(*gadgets),
                _ => gadgets_now(known, pid),
            }
        };
        stopped.processes.iter().map(|p| Ok((p.pid(), of(known, p)?))).collect()
    }
}

impl Frozen {
    /// The root of the tree.
    pub fn pid(&self) -> i32 {
        self.stopped.root().pid().0
    }

    /// Writes an image of the tree. It stands afterwards as before, also on error.
    pub fn dump(&mut self, to: Destination, options: &Options<'_>) -> Result<Dumped> {
        capture(
            &mut self.stopped,
            &mut self.hold,
            (&self.opened, &self.gadgets, &self.before),
            self.stage.as_mut(),
            &self.way,
            to,
            options,
        )?
        .finish(options)
    }

    /// Writes an image of the tree, letting it go on as soon as it has been captured: a small one before its
    /// image is written.
    pub fn dump_and_resume(mut self, to: Destination, options: &Options<'_>) -> Result<Dumped> {
        let Frozen { hold, stopped, opened, gadgets, before, stage, way } = &mut self;
        let known = (&opened[..], &*gadgets, &*before);
        let captured = capture(stopped, hold, known, stage.as_mut(), way, to, options)?;
        stopped.release();
        captured.finish(options)
    }

    /// How long the tree has been standing still.
    pub fn standing(&self) -> std::time::Duration {
        self.stopped.since.elapsed()
    }

    /// Ends the tree and waits until it is gone.
    pub fn kill(self) -> Result<()> {
        let Frozen { hold, stopped, stage, .. } = self;
        if let Some(hold) = hold
            && let Err(e) = hold.end(stopped.root().pid(), || stopped.bind(true))
        {
            stopped.bind(false);
            return Err(e);
        }
        stopped.kill(|| drop(stage))
    }

    /// Lets the tree go on.
    pub fn resume(self) {
        let Frozen { hold, mut stopped, .. } = self;
        drop(hold);
        stopped.release();
    }

    /// Leaves every process of the tree stopped, as by SIGSTOP.
    pub fn keep_stopped(self) -> Result<()> {
        let Frozen { hold, stopped, .. } = self;
        drop(hold);
        stopped.keep_stopped()
    }
}

/// Surveys a process without stopping it: what a dump would take, lose or refuse.
pub fn check(pid: i32) -> Result<Survey> {
    survey::survey(Pid(pid), TcpPolicy::Refuse, &[], &HashSet::new()).map(|(survey, _)| survey)
}
