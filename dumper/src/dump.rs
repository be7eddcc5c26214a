//! From a pid to an image: survey, freeze, collect, copy, write.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use torpor_image::description::Objects;
use torpor_image::manifest::{Host, Manifest, Times};
use torpor_image::task::Task;
use torpor_image::write::{DataFile, ImageWriter};
use torpor_image::zombie::Zombie;
use torpor_image::{Bytes, Pid as ImagePid};
use torpor_kernel::ids::Pid;
use torpor_kernel::memory::Memory;
use torpor_kernel::{stat, status};

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::freeze::{Frozen as Stopped, FrozenTree};
use crate::gadget::{self, Gadgets, Known};
use crate::hold::Hold;
use crate::memory::{Copied, Space, Watch};
use crate::restart::Restarts;
use crate::rules::Rules;
use crate::scratch::{self, Files};
use crate::stage::Stage;
use crate::survey::{self, Survey};
use crate::tcp::{self, TcpPolicy};
use crate::unix::ExternalUnix;
use crate::{description, inode, inotify, memory, netlink, pty, sharing, sysv, task, unix, vma};

/// How often the freeze is put off for programs to take in what a dump would lose: 127 ms in all.
const MOMENTS: u32 = 7;

/// How often, and how long after the last time, a program that was just executed is looked at again: its libc,
/// from whose code it is entered, is mapped a moment after the program itself.
const STARTS: u32 = 25;
const START: std::time::Duration = std::time::Duration::from_millis(2);

/// Searches the code that a process has at this moment.
fn gadgets_now(known: &mut Known, pid: Pid) -> Result<Gadgets> {
    let maps = torpor_kernel::maps::maps(pid).map_err(Error::kernel(pid, "reading its memory map"))?;
    let memory = Memory::open(pid, false).map_err(|source| Error::Permission { pid, source })?;
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
}

impl Options<'_> {
    fn watch(&self) -> Watch<'_> {
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
}

/// Where an image goes: a directory, checked and prepared while the process still runs.
#[derive(Debug)]
pub struct Destination {
    writer: ImageWriter,
    files: Vec<DataFile>,
}

impl Destination {
    /// Prepares `dir`: made if missing, refused if it holds an image. With `fsync` everything is on stable
    /// storage before a dump counts as done.
    pub fn create(dir: &Path, fsync: bool) -> Result<Self> {
        let writer = ImageWriter::create(dir, fsync)?;
        let files = (0..memory::most_files()).map(|n| writer.data_file(n)).collect::<Result<Vec<_>, _>>()?;
        Ok(Destination { writer, files })
    }
}

/// A tree that stands still. Dropped, it goes on.
#[derive(Debug)]
pub struct Frozen {
    /// Dropped before the tree goes on.
    hold: Option<Hold>,
    stopped: FrozenTree,
    gadgets: HashMap<Pid, Gadgets>,
    restarts: Restarts,
    stage: Option<Stage>,
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
        let root = Pid(pid);
        let (survey, maps) = survey::survey(root, tcp, external_unix)?;
        if !survey.refusals.is_empty() {
            return Err(Error::Refused { pid: root, refusals: survey.refusals });
        }
        let mut known = Known::default();
        let mut gadgets = HashMap::new();
        let mut anonymous = 0;
        for (pid, maps) in &maps {
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
        Ok(Target { root, gadgets, known, survey, started, anonymous })
    }

    fn enter(known: &mut Known, pid: Pid, maps: &[torpor_kernel::maps::Mapping]) -> Result<Gadgets> {
        let living = survey::living(pid);
        let memory = Memory::open(living, false).map_err(|source| Error::Permission { pid, source })?;
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
    /// would lose, or has not mapped its libc yet.
    pub fn freeze(&self) -> Result<Frozen> {
        let stage = Stage::for_bytes(self.anonymous);
        let restarts = Restarts::look(self.survey.processes.iter().map(|p| p.pid));
        let mut known = self.known.clone();
        let mut starts = 0;
        let mut moments = 0;
        loop {
            let mut stopped = FrozenTree::freeze(self.root)?;
            if stat::of_process(self.root).is_ok_and(|s| s.starttime != self.started) {
                return Err(stopped.root().died("another process has its pid by now"));
            }
            let unaccepted = |all: &FrozenTree| unix::unaccepted(all.processes.iter().map(Stopped::living));
            let unread = |p: &Stopped| inotify::unread(p.living()) || netlink::unread(p.living());
            let pids: Vec<Pid> = stopped.processes.iter().map(Stopped::living).collect();
            let busy = || tcp::busy(pids.iter().copied()) || pty::unread(&pids) || unaccepted(&stopped);
            if moments < MOMENTS && (stopped.processes.iter().any(unread) || busy()) {
                stopped.release();
                std::thread::sleep(std::time::Duration::from_millis(1 << moments));
                moments += 1;
                continue;
            }
            match self.gadgets_of(&stopped, &mut known) {
                Ok(gadgets) => return Ok(Frozen { hold: None, stopped, gadgets, restarts, stage }),
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

/// Everything of a tree at one instant: it may go on, or be ended, whatever happens to this.
#[derive(Debug)]
struct Captured<'s> {
    root: Pid,
    writer: ImageWriter,
    files: Vec<DataFile>,
    pages: Copied,
    stage: Option<&'s Stage>,
    tasks: Vec<Task>,
    zombies: Vec<Zombie>,
    objects: Objects,
    losses: Vec<String>,
    vdso: Bytes,
    taken_at: u64,
    times: Times,
    runs_on: bool,
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
            (&self.gadgets, &self.restarts),
            self.stage.as_mut(),
            to,
            options,
        )?
        .finish(options)
    }

    /// Writes an image of the tree, letting it go on as soon as it has been captured: a small one before its
    /// image is written.
    pub fn dump_and_resume(mut self, to: Destination, options: &Options<'_>) -> Result<Dumped> {
        let Frozen { hold, stopped, gadgets, restarts, stage } = &mut self;
        let captured = capture(stopped, hold, (gadgets, restarts), stage.as_mut(), to, options)?;
        stopped.release();
        captured.finish(options)
    }

    /// How long the tree has been standing still.
    pub fn standing(&self) -> std::time::Duration {
        self.stopped.since.elapsed()
    }

    /// Ends the tree and waits until it is gone.
    pub fn kill(self) -> Result<()> {
        let Frozen { hold, stopped, .. } = self;
        if let Some(hold) = &hold {
            hold.silence(stopped.root().pid())?;
        }
        stopped.kill()?;
        if let Some(hold) = hold {
            hold.over();
        }
        Ok(())
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

/// Captures a stopped tree: after this nothing of the image depends on it any more.
fn capture<'s>(
    stopped: &mut FrozenTree,
    hold: &mut Option<Hold>,
    known: (&HashMap<Pid, Gadgets>, &Restarts),
    mut stage: Option<&'s mut Stage>,
    to: Destination,
    options: &Options<'_>,
) -> Result<Captured<'s>> {
    let root = stopped.root().pid();
    let Destination { mut writer, mut files } = to;
    let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);

    let mut collector = Collector::new(stopped.root().living(), false);
    (collector.tcp.policy, collector.tcp.runs_on) = (options.tcp, options.runs_on);
    collector.sockets.rules = options.external_unix.to_vec();
    collector.members = stopped.processes.iter().map(|p| p.pid().0).collect();
    collector.files = Files::new(options.files.clone(), root)?;
    let shares = sharing::collect(&stopped.processes)?;
    // Descriptors first: through them files can be opened that only a privilege opens by their mappings.
    let mut all = Vec::with_capacity(stopped.processes.len());
    for (process, shares) in stopped.processes.iter().zip(&shares) {
        let own = shares.descriptors.is_none();
        all.push(if own { description::look(process.living())? } else { Vec::new() });
    }
    let tables = description::collect(&mut collector, all)?;
    *hold = tcp::finish(&mut collector)?;
    let mut spaces = Vec::with_capacity(tables.len());
    for process in &stopped.processes {
        let pid = process.living();
        collector.turn_to(pid);
        let status = status::of_process(pid).map_err(Error::kernel(pid, "reading its status"))?;
        survey::refuse_process(&mut collector, process.pid() == root, &status)?;
        let maps = vma::read(&collector)?;
        let vmas = vma::collect(&mut collector, &maps)?;
        task::exe(&mut collector)?;
        spaces.push((maps, vmas));
    }
    sysv::collect(&mut collector)?;
    // What the survey saw may have changed before the freeze.
    if !collector.refusals.is_empty() {
        return Err(Error::Refused { pid: root, refusals: collector.refusals });
    }
    let mut tasks: Vec<Task> = Vec::with_capacity(tables.len());
    let mut vdso = Bytes::default();
    for (i, (table, (maps, vmas))) in tables.into_iter().zip(spaces).enumerate() {
        let process = &mut stopped.processes[i];
        collector.turn_to(process.living());
        let gadgets = *known.0.get(&process.pid()).ok_or_else(|| process.died("it is another one now"))?;
        let collected = task::collect(&mut collector, process, (gadgets, known.1), &maps, vmas, table)?;
        tasks.push(Task { shares: shares[i], ..collected.task });
        if vdso.is_empty() {
            vdso = collected.vdso;
        }
    }
    let zombies = stopped.zombies.iter().map(|pid| zombie(*pid)).collect::<Result<_>>()?;
    collector.turn_to(root);
    scratch::decide(&mut collector, &tasks)?;
    inode::refuse_shared(&mut collector, &tasks);
    if !collector.refusals.is_empty() {
        return Err(Error::Refused { pid: root, refusals: collector.refusals });
    }

    let begin = Instant::now();
    let watch = options.watch();
    if let Some(stage) = stage.as_deref_mut() {
        stage.clear();
    }
    let parents = |task: &Task| tasks.iter().position(|t| t.pid == task.ppid);
    let spaces: Vec<Space<'_>> = tasks
        .iter()
        .zip(&stopped.processes)
        .map(|(task, process)| Space {
            pid: process.living(),
            // Memory that is another's is in the image once.
            vmas: if task.shares.memory.is_some() { &[] } else { &task.memory.vmas },
            parent: parents(task),
        })
        .collect();
    let pages = memory::copy(&spaces, stage.as_deref_mut(), &mut files, &watch)?;
    for (id, content) in std::mem::take(&mut collector.contents) {
        let size = collector.objects.inodes[id.0 as usize].size;
        let extents = memory::copy_inode(root, &content, size, &mut files[0], &mut writer, &watch)?;
        collector.set_extents(id, extents);
    }
    Ok(Captured {
        root,
        writer,
        files,
        pages,
        stage: stage.map(|s| &*s),
        tasks,
        zombies,
        objects: collector.objects,
        losses: collector.losses,
        vdso,
        taken_at,
        times: Times {
            freezing: stopped.freezing.as_nanos() as u64,
            frozen: stopped.since.elapsed().as_nanos() as u64,
            memory: begin.elapsed().as_nanos() as u64,
        },
        runs_on: options.runs_on,
    })
}

/// What is left of a process that has ended.
fn zombie(pid: Pid) -> Result<Zombie> {
    let stat = stat::of_process(pid).map_err(Error::kernel(pid, "reading its stat"))?;
    Ok(Zombie {
        pid: ImagePid(pid.0),
        ppid: ImagePid(stat.ppid),
        pgid: ImagePid(stat.pgrp),
        sid: ImagePid(stat.session),
        name: stat.comm.into(),
        status: stat.exit_code,
        exit_signal: stat.exit_signal,
    })
}

impl Captured<'_> {
    /// Writes what is left to be written and gives the image its name.
    fn finish(mut self, options: &Options<'_>) -> Result<Dumped> {
        let watch = options.watch();
        let records = self.pages.finish(self.root, self.stage, &mut self.files[0], &watch)?;
        for (task, records) in self.tasks.iter_mut().zip(&records) {
            task.memory.pages = self.writer.add_records(records);
        }
        for file in self.files {
            self.writer.add_data_file(file)?;
        }
        for task in &self.tasks {
            self.writer.add_task(task)?;
        }
        self.writer.add_objects(&self.objects)?;
        let manifest = Manifest {
            torpor: env!("CARGO_PKG_VERSION").to_owned(),
            taken_at: self.taken_at,
            host: host(self.vdso),
            root: ImagePid(self.root.0),
            tasks: self.tasks.iter().map(|t| t.pid).collect(),
            zombies: self.zombies,
            files: Vec::new(),
            ran_on: self.runs_on,
            not_captured: self.losses,
            times: self.times,
        };
        Ok(Dumped { manifest: self.writer.finish(manifest)? })
    }
}

/// Surveys a process without stopping it: what a dump would take, lose or refuse.
pub fn check(pid: i32) -> Result<Survey> {
    survey::survey(Pid(pid), TcpPolicy::Refuse, &[]).map(|(survey, _)| survey)
}

fn host(vdso: Bytes) -> Host {
    let uname = nix::sys::utsname::uname().ok();
    let text = |f: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        uname.as_ref().map_or_else(String::new, |u| f(u).to_string_lossy().into_owned())
    };
    Host {
        name: text(|u| u.nodename()),
        kernel: text(|u| u.release()),
        boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        xstate_features: arch::cpu::xstate_features(),
        vdso,
    }
}
