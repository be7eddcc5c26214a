//! From a pid to an image: survey, freeze, collect, copy, write.

use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use torpor_image::manifest::{Host, Manifest, Times};
use torpor_image::write::ImageWriter;
use torpor_image::{Bytes, Pid as ImagePid};
use torpor_kernel::ids::Pid;
use torpor_kernel::memory::Memory;
use torpor_kernel::status;

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::freeze::Frozen as Stopped;
use crate::gadget::{self, Gadgets};
use crate::survey::{self, Survey};
use crate::{description, memory, task, vma};

/// How to dump.
#[derive(Default)]
#[non_exhaustive]
pub struct Options<'a> {
    /// The process will run on after the dump: recorded in the manifest, since what it does outside itself
    /// from then on is not undone by a restore.
    pub runs_on: bool,
    /// Put everything on stable storage before the dump counts as done.
    pub fsync: bool,
    /// Told of bytes copied, from several threads.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

/// A running process that can be dumped.
#[derive(Debug)]
pub struct Target {
    pid: Pid,
    gadgets: Gadgets,
    survey: Survey,
}

/// A process that stands still. Dropped, it goes on.
#[derive(Debug)]
pub struct Frozen {
    stopped: Stopped,
    gadgets: Gadgets,
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
        let gadgets = gadget::find(pid, &maps, &memory)?;
        Ok(Target { pid, gadgets, survey })
    }

    /// What was found.
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Stops every thread of the process.
    pub fn freeze(&self) -> Result<Frozen> {
        let stopped = Stopped::freeze(self.pid)?;
        let memory = Memory::open(self.pid, false).map_err(Error::kernel(self.pid, "opening its memory"))?;
        let gadgets = if gadget::confirm(self.gadgets, &memory) {
            self.gadgets
        } else {
            // It has executed another program since.
            let maps = torpor_kernel::maps::maps(self.pid)
                .map_err(Error::kernel(self.pid, "reading its memory map"))?;
            gadget::find(self.pid, &maps, &memory)?
        };
        Ok(Frozen { stopped, gadgets })
    }
}

impl Frozen {
    /// The process.
    pub fn pid(&self) -> i32 {
        self.stopped.pid().0
    }

    /// Writes an image of the process into `dir`. The process stands afterwards as before, also on error.
    pub fn dump(&mut self, dir: &Path, options: &Options<'_>) -> Result<Dumped> {
        let pid = self.stopped.pid();
        let mut writer = ImageWriter::create(dir, options.fsync)?;
        let resident = status::of_process(pid).map_or(0, |s| s.rss_kb * 1024);
        let mut files =
            (0..memory::files_for(resident)).map(|n| writer.data_file(n)).collect::<Result<Vec<_>, _>>()?;

        let mut collector = Collector::new(pid)?;
        let maps = vma::read(&collector)?;
        let vmas = vma::collect(&mut collector, &maps)?;
        task::exe(&mut collector)?;
        let table = description::collect(&mut collector)?;
        // What the survey saw may have changed before the freeze.
        if !collector.refusals.is_empty() {
            return Err(Error::Refused { pid, refusals: collector.refusals });
        }
        let collected = task::collect(&mut collector, &mut self.stopped, self.gadgets, &maps, vmas, table)?;
        let mut task = collected.task;

        let begin = Instant::now();
        let silent = |_| {};
        let progress = options.progress.unwrap_or(&silent);
        let copied = memory::copy(pid, &task.memory.vmas, &mut files, progress)?;
        task.memory.pages = writer.add_records(&copied.pages);
        for (id, content) in std::mem::take(&mut collector.contents) {
            let size = collector.objects.inodes[id.0 as usize].size;
            let extents = memory::copy_inode(pid, &content, size, &mut files[0], &mut writer, progress)?;
            collector.set_extents(id, extents);
        }
        let memory_time = begin.elapsed();
        for file in files {
            writer.add_data_file(file)?;
        }
        writer.add_task(&task)?;
        writer.add_objects(&collector.objects)?;
        let manifest = Manifest {
            torpor: env!("CARGO_PKG_VERSION").to_owned(),
            taken_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
            host: host(collected.vdso),
            root: ImagePid(pid.0),
            tasks: vec![ImagePid(pid.0)],
            files: Vec::new(),
            ran_on: options.runs_on,
            not_captured: collector.losses,
            times: Times {
                freezing: self.stopped.freezing.as_nanos() as u64,
                frozen: self.stopped.since.elapsed().as_nanos() as u64,
                memory: memory_time.as_nanos() as u64,
            },
        };
        Ok(Dumped { manifest: writer.finish(manifest)? })
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
        boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        xstate_features: arch::cpu::xstate_features(),
        vdso,
    }
}
