//! From a pid to an image: survey, freeze, collect, copy, write.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use torpor_image::Bytes;
use torpor_image::description::Objects;
use torpor_image::manifest::{Host, Manifest, Times};
use torpor_image::task::Task;
use torpor_image::write::{DataFile, ImageWriter};
use torpor_kernel::ids::Pid;
use torpor_kernel::memory::Memory;
use torpor_kernel::{fds, stat, status};

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::freeze::Frozen as Stopped;
use crate::gadget::{self, Gadgets};
use crate::memory::{Copied, Watch};
use crate::restart::Restarts;
use crate::stage::Stage;
use crate::survey::{self, Survey};
use crate::{description, inotify, memory, task, vma};

/// How often the freeze is put off for a program to read its events: 127 ms in all.
const MOMENTS: u32 = 7;

/// How often, and how long after the last time, a program that was just executed is looked at again: its libc,
/// from whose code it is entered, is mapped a moment after the program itself.
const STARTS: u32 = 25;
const START: std::time::Duration = std::time::Duration::from_millis(2);

/// Searches the code that a process has at this moment.
fn gadgets_now(pid: Pid) -> Result<Gadgets> {
    let maps = torpor_kernel::maps::maps(pid).map_err(Error::kernel(pid, "reading its memory map"))?;
    let memory = Memory::open(pid, false).map_err(|source| Error::Permission { pid, source })?;
    gadget::find(pid, &maps, &memory)
}

/// How to dump.
#[derive(Default)]
#[non_exhaustive]
pub struct Options<'a> {
    /// The process will run on after the dump: recorded in the manifest, since what it does outside itself
    /// from then on is not undone by a restore.
    pub runs_on: bool,
    /// Told of bytes copied, from several threads.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
    /// Asked now and then whether to give up, from several threads.
    pub cancel: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl Options<'_> {
    fn watch(&self) -> Watch<'_> {
        Watch { progress: self.progress, cancel: self.cancel }
    }
}

/// A running process that can be dumped.
#[derive(Debug)]
pub struct Target {
    pid: Pid,
    gadgets: Gadgets,
    survey: Survey,
    /// When it started, which tells it from another of the same pid.
    started: u64,
    /// Bytes of its anonymous memory, about as many as there are to be copied.
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

/// A process that stands still. Dropped, it goes on.
#[derive(Debug)]
pub struct Frozen {
    stopped: Stopped,
    gadgets: Gadgets,
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
    /// Looks at a process and everything it owns without stopping it; refuses what a dump would lose.
    pub fn find(pid: i32) -> Result<Self> {
        let pid = Pid(pid);
        let (survey, maps) = survey::survey(pid)?;
        if !survey.refusals.is_empty() {
            return Err(Error::Refused { pid, refusals: survey.refusals });
        }
        let memory = Memory::open(pid, false).map_err(|source| Error::Permission { pid, source })?;
        let mut gadgets = gadget::find(pid, &maps, &memory);
        for _ in 0..STARTS {
            if gadgets.is_ok() {
                break;
            }
            std::thread::sleep(START);
            gadgets = gadgets_now(pid);
        }
        let gadgets = gadgets?;
        let started = stat::of_process(pid).map_err(Error::kernel(pid, "reading its stat"))?.starttime;
        let anonymous = maps.iter().map(|m| (m.anonymous_kb + m.swap_kb) * 1024).sum();
        Ok(Target { pid, gadgets, survey, started, anonymous })
    }

    /// What was found.
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Stops every thread of the process; a moment later where it is about to take in what a dump would lose.
    pub fn freeze(&self) -> Result<Frozen> {
        let stage = Stage::for_bytes(self.anonymous);
        let pidfd = fds::pidfd_open(self.pid).map_err(Error::kernel(self.pid, "opening it"))?;
        let restarts = Restarts::look(self.pid);
        let mut stopped = Stopped::freeze(self.pid)?;
        for attempt in 0..MOMENTS {
            if !inotify::unread(self.pid, pidfd.as_fd()) {
                break;
            }
            stopped.resume();
            std::thread::sleep(std::time::Duration::from_millis(1 << attempt));
            stopped = Stopped::freeze(self.pid)?;
        }
        if stat::of_process(self.pid).is_ok_and(|s| s.starttime != self.started) {
            return Err(stopped.died("another process has its pid by now"));
        }
        let memory = Memory::open(self.pid, false).map_err(Error::kernel(self.pid, "opening its memory"))?;
        if gadget::confirm(self.gadgets, &memory) {
            return Ok(Frozen { stopped, gadgets: self.gadgets, restarts, stage });
        }
        // It has executed another program since, which may have mapped no libc yet.
        let mut gadgets = gadgets_now(self.pid);
        for _ in 0..STARTS {
            if gadgets.is_ok() {
                break;
            }
            stopped.resume();
            std::thread::sleep(START);
            stopped = Stopped::freeze(self.pid)?;
            gadgets = gadgets_now(self.pid);
        }
        Ok(Frozen { stopped, gadgets: gadgets?, restarts, stage })
    }
}

/// Everything of a process at one instant: it may go on, or be ended, whatever happens to this.
#[derive(Debug)]
struct Captured<'s> {
    pid: Pid,
    writer: ImageWriter,
    files: Vec<DataFile>,
    pages: Copied,
    stage: Option<&'s Stage>,
    task: Task,
    objects: Objects,
    losses: Vec<String>,
    vdso: Bytes,
    taken_at: u64,
    times: Times,
    runs_on: bool,
}

impl Frozen {
    /// The process.
    pub fn pid(&self) -> i32 {
        self.stopped.pid().0
    }

    /// Writes an image of the process. The process stands afterwards as before, also on error.
    pub fn dump(&mut self, to: Destination, options: &Options<'_>) -> Result<Dumped> {
        capture(&mut self.stopped, (self.gadgets, &self.restarts), self.stage.as_mut(), to, options)?
            .finish(options)
    }

    /// Writes an image of the process, letting it go on as soon as it has been captured: a small one before
    /// its image is written.
    pub fn dump_and_resume(mut self, to: Destination, options: &Options<'_>) -> Result<Dumped> {
        let Frozen { stopped, gadgets, restarts, stage } = &mut self;
        let captured = capture(stopped, (*gadgets, restarts), stage.as_mut(), to, options)?;
        stopped.release();
        captured.finish(options)
    }

    /// How long the process has been standing still.
    pub fn standing(&self) -> std::time::Duration {
        self.stopped.since.elapsed()
    }

    /// Ends the process and waits until it is gone.
    pub fn kill(self) -> Result<()> {
        self.stopped.kill()
    }

    /// Lets the process go on.
    pub fn resume(self) {
        self.stopped.resume();
    }

    /// Leaves the process stopped, as by SIGSTOP.
    pub fn keep_stopped(self) -> Result<()> {
        self.stopped.keep_stopped()
    }
}

/// Captures a stopped process: after this nothing of the image depends on it any more.
fn capture<'s>(
    stopped: &mut Stopped,
    known: (Gadgets, &Restarts),
    mut stage: Option<&'s mut Stage>,
    to: Destination,
    options: &Options<'_>,
) -> Result<Captured<'s>> {
    let pid = stopped.pid();
    let Destination { mut writer, mut files } = to;

    let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);

    let mut collector = Collector::new(pid, false)?;
    let status = status::of_process(pid).map_err(Error::kernel(pid, "reading its status"))?;
    survey::refuse_process(&mut collector, &status)?;
    // Descriptors first: through them files can be opened that only a privilege opens by their mappings.
    let table = description::collect(&mut collector)?;
    let maps = vma::read(&collector)?;
    let vmas = vma::collect(&mut collector, &maps)?;
    task::exe(&mut collector)?;
    // What the survey saw may have changed before the freeze.
    if !collector.refusals.is_empty() {
        return Err(Error::Refused { pid, refusals: collector.refusals });
    }
    let collected = task::collect(&mut collector, stopped, known, &maps, vmas, table)?;
    let task = collected.task;

    let begin = Instant::now();
    let watch = options.watch();
    if let Some(stage) = stage.as_deref_mut() {
        stage.clear();
    }
    let pages = memory::copy(pid, &task.memory.vmas, stage.as_deref_mut(), &mut files, &watch)?;
    for (id, content) in std::mem::take(&mut collector.contents) {
        let size = collector.objects.inodes[id.0 as usize].size;
        let extents = memory::copy_inode(pid, &content, size, &mut files[0], &mut writer, &watch)?;
        collector.set_extents(id, extents);
    }
    Ok(Captured {
        pid,
        writer,
        files,
        pages,
        stage: stage.map(|s| &*s),
        task,
        objects: collector.objects,
        losses: collector.losses,
        vdso: collected.vdso,
        taken_at,
        times: Times {
            freezing: stopped.freezing.as_nanos() as u64,
            frozen: stopped.since.elapsed().as_nanos() as u64,
            memory: begin.elapsed().as_nanos() as u64,
        },
        runs_on: options.runs_on,
    })
}

impl Captured<'_> {
    /// Writes what is left to be written and gives the image its name.
    fn finish(mut self, options: &Options<'_>) -> Result<Dumped> {
        let watch = options.watch();
        let records = match (self.pages, self.stage) {
            (Copied::Written(records), _) => records,
            (Copied::Staged { runs, guards }, Some(stage)) => {
                memory::write_staged(self.pid, &runs, guards, stage, &mut self.files[0], &watch)?
            }
            (Copied::Staged { .. }, None) => {
                return Err(Error::Inconsistent { pid: self.pid, what: "the stage is gone".into() });
            }
        };
        self.task.memory.pages = self.writer.add_records(&records);
        for file in self.files {
            self.writer.add_data_file(file)?;
        }
        self.writer.add_task(&self.task)?;
        self.writer.add_objects(&self.objects)?;
        let root = self.task.pid;
        let manifest = Manifest {
            torpor: env!("CARGO_PKG_VERSION").to_owned(),
            taken_at: self.taken_at,
            host: host(self.vdso),
            root,
            tasks: vec![root],
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
    survey::survey(Pid(pid)).map(|(survey, _)| survey)
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
