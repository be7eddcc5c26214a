//! The work of the freeze: everything of a stopped tree is read, and its memory copied.
//!
//! Reading /proc is shared out to several threads. Entering processes is this one's, the tracer's, alone; memory is
//! copied by others meanwhile. What follows from what was read is put together in one place, in the order of the tree.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use torpor_image::description::Objects;
use torpor_image::extent::Record;
use torpor_image::manifest::{Freeze, Host, Manifest, Times};
use torpor_image::task::{Shares, Task};
use torpor_image::vma::Vma;
use torpor_image::write::{DataFile, ImageWriter};
use torpor_image::zombie::Zombie;
use torpor_image::{Bytes, InodeId, Pid as ImagePid};
use torpor_kernel::ids::Pid;
use torpor_kernel::stat;
use torpor_parasite::script::Outcome;
use torpor_parasite::wire::STACK;

use crate::areas::{self, Areas};
use crate::collect::Collector;
use crate::description::{self, Found, Table};
use crate::dump::{Before, Destination, Dumped, Options};
use crate::error::{Error, Result};
use crate::freeze::{Frozen, FrozenTree};
use crate::gadget::Gadgets;
use crate::hold::Hold;
use crate::memory::{self, Ahead, Behind, Copied, Space, Watch};
use crate::opened::Opened;
use crate::scratch::{self, Files};
use crate::snapshot::{self, Birth, Snapshot};
use crate::stage::Stage;
use crate::task::{self, Outside, Prepared};
use crate::track::runs::Runs;
use crate::track::{self, Tracking};
use crate::{inject, io_uring, lease, sharing, survey, sysv, tcp, thread, vma, workers};

/// Everything of a tree at one instant: it may go on, or be ended, whatever happens to this.
#[derive(Debug)]
pub(crate) struct Captured<'s> {
    root: Pid,
    writer: ImageWriter,
    files: Vec<DataFile>,
    pages: Copied,
    /// The code that shows in each process by itself.
    behind: Vec<Behind>,
    stage: Option<&'s Stage>,
    tasks: Vec<Task>,
    zombies: Vec<Zombie>,
    objects: Objects,
    losses: Vec<String>,
    vdso: Bytes,
    taken_at: u64,
    times: Times,
    runs_on: bool,
    way: snapshot::Way,
    /// Copies that are still to be read, by process.
    snapshots: Vec<Option<Snapshot>>,
}

/// Captures a stopped tree: after this nothing of the image depends on it any more.
pub(crate) fn capture<'s>(
    stopped: &mut FrozenTree,
    hold: &mut Option<Hold>,
    (opened, entries, before): (&[Opened], &HashMap<Pid, Gadgets>, &Before),
    mut stage: Option<&'s mut Stage>,
    way: &snapshot::Way,
    to: Destination,
    options: &Options<'_>,
) -> Result<Captured<'s>> {
    let root = stopped.root().pid();
    let Destination { mut writer, mut files, roomy } = to;
    // What runs on does not wait for the encoder; nor for the reader of a stream, if there is room for its memory.
    if options.runs_on && (roomy || stage.is_some()) {
        files.iter_mut().for_each(DataFile::put_aside);
    }
    let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);

    let mut collector = Collector::new(stopped.root().living(), false);
    (collector.tcp.policy, collector.tcp.runs_on) = (options.tcp, options.runs_on);
    collector.sockets.rules = options.external_unix.to_vec();
    collector.rings = before.rings.rings();
    collector.members = stopped.processes.iter().map(|p| p.pid().0).collect();
    if let Some(tracking) = options.tracking {
        collector.watched = tracking.watched().flat_map(|p| [p, survey::living(p)]).collect();
    }
    collector.files = Files::new(options.files.clone(), root)?;
    collector.order.clone_from(&before.order);
    let many = if way.freeze == Freeze::Copy { &before.areas.many[..] } else { &[] };
    let mut tell = || tell(stopped, hold, &mut collector, opened, before);
    let (told, ahead) = match many.is_empty() {
        true => (tell(), Ahead::default()),
        false => workers::both(tell, || Ahead::look(many)),
    };
    let Told { shares, tables, outsides, vmas, programs, prepared } = told?;
    // What the survey saw may have changed before the freeze.
    if !collector.refusals.is_empty() {
        return Err(Error::Refused { pid: root, refusals: collector.refusals });
    }
    let gadgets = stopped
        .processes
        .iter()
        .map(|p| entries.get(&p.pid()).copied().ok_or_else(|| p.died("it is another one now")));
    let gadgets = gadgets.collect::<Result<Vec<_>>>()?;
    let watch = options.watch();
    if let Some(stage) = stage.as_deref_mut() {
        stage.clear();
    }
    let numbers: HashMap<i32, usize> =
        stopped.processes.iter().enumerate().map(|(i, p)| (p.pid().0, i)).collect();
    let births = births(way, root, &shares, &outsides)?;
    // What is not in the copies as it is in the processes.
    let apart: Vec<Vec<Vma>> = vmas
        .iter()
        .map(|all| all.iter().filter(|v| !births.is_empty() && !snapshot::copies(v)).cloned().collect())
        .collect();
    let pins: Vec<bool> = (0..tables.len())
        .map(|i| {
            let owner = shares[i].descriptors.and_then(|of| numbers.get(&of.0).copied()).unwrap_or(i);
            track::pins(&collector.objects, &tables[owner].descriptors)
        })
        .collect();
    let unshared: Vec<Runs> = outsides.iter().map(|o| areas::unshared(&o.maps)).collect();
    let behind = Behind::of_tree(&collector, &vmas, taken_at);
    let spaces: Vec<Space<'_>> = (0..vmas.len())
        .map(|i| Space {
            pid: stopped.processes[i].living(),
            // Memory that is another's is in the image once.
            vmas: match (shares[i].memory, births.is_empty()) {
                (Some(_), _) => &[],
                (None, true) => &vmas[i],
                (None, false) => &apart[i],
            },
            parent: numbers.get(&outsides[i].ppid()).copied().filter(|_| births.is_empty()),
            covered: options
                .tracking
                .and_then(|t| t.covered(stopped.processes[i].pid()))
                .filter(|_| !pins[i]),
            behind: &behind[i],
            soft: options.tracking.and_then(|t| t.soft(stopped.processes[i].pid())),
            unshared: &unshared[i],
            ahead: Some(&ahead),
        })
        .collect();
    let (outcomes, snapshots, (pages, memory)) = {
        let (stage, files) = (stage.as_deref_mut(), &mut files[..]);
        let ways: Vec<Way<'_>> = prepared.iter().zip(&outsides).zip(&gadgets).collect();
        enter_and_copy(stopped, &shares, (&ways, &births), move || {
            let begin = Instant::now();
            Ok((memory::copy(&spaces, stage, files, &watch)?, begin.elapsed()))
        })?
    };
    let mut tasks: Vec<Task> = Vec::with_capacity(tables.len());
    let vdso = prepared.iter().zip(&outsides).find_map(|(p, o)| p.vdso(o)).transpose()?.unwrap_or_default();
    let all = prepared.into_iter().zip(outsides).zip(outcomes).zip(vmas).zip(tables);
    for (i, ((((prepared, outside), outcomes), vmas), table)) in all.enumerate() {
        let process = &mut stopped.processes[i];
        collector.turn_to(process.living());
        let known = (prepared, outside);
        let what = (programs[i], vmas, table);
        let task = task::assemble(&mut collector, process, gadgets[i], known, &outcomes, what)?;
        tasks.push(Task { shares: shares[i], ..task });
    }
    let zombies = stopped.zombies.iter().map(|pid| zombie(*pid)).collect::<Result<_>>()?;
    collector.turn_to(root);
    io_uring::refuse_unreachable(&mut collector, &tasks);
    if !collector.refusals.is_empty() {
        return Err(Error::Refused { pid: root, refusals: collector.refusals });
    }

    let begin = Instant::now();
    let watch = options.watch();
    let contents = std::mem::take(&mut collector.contents);
    let inodes: Vec<_> =
        contents.iter().map(|(id, content)| (&collector.objects.inodes[id.0 as usize], content)).collect();
    let known = options.tracking.map(Tracking::known);
    let copied = memory::copy_inodes(root, &inodes, known, &mut files, &watch)?;
    for ((id, _), records) in contents.iter().zip(copied) {
        collector.set_extents(*id, writer.add_records(&records));
    }
    Ok(Captured {
        root,
        writer,
        files,
        pages,
        behind,
        stage: stage.map(|s| &*s),
        tasks,
        zombies,
        objects: collector.objects,
        losses: collector.losses,
        vdso,
        taken_at,
        times: Times {
            freezing: stopped.freezing.as_nanos() as u64,
            frozen: (stopped.since.elapsed() + options.tracking.map_or(Duration::ZERO, Tracking::stood))
                .as_nanos() as u64,
            memory: (memory + begin.elapsed()).as_nanos() as u64,
        },
        runs_on: options.runs_on,
        way: way.clone(),
        snapshots,
    })
}

/// What is told of a tree from outside.
struct Told {
    shares: Vec<Shares>,
    tables: Vec<Table>,
    outsides: Vec<Outside>,
    /// The areas of each process, its program, and how it is entered.
    vmas: Vec<Vec<Vma>>,
    programs: Vec<InodeId>,
    prepared: Vec<Prepared>,
}

fn tell(
    stopped: &FrozenTree,
    hold: &mut Option<Hold>,
    collector: &mut Collector,
    opened: &[Opened],
    before: &Before,
) -> Result<Told> {
    let root = stopped.root().pid();
    let shares = sharing::collect(&stopped.processes)?;
    // Descriptors first: through them files can be opened that only a privilege opens by their mappings.
    let (found, outsides) = looks(stopped, opened, &shares, &before.areas)?;
    let threads = threads(stopped)?;
    let tables = description::collect(collector, found)?;
    *hold = tcp::finish(collector)?;
    let (mut vmas, mut programs) = (Vec::with_capacity(tables.len()), Vec::with_capacity(tables.len()));
    for ((process, outside), threads) in stopped.processes.iter().zip(&outsides).zip(&threads) {
        collector.turn_to(process.living());
        survey::refuse_process(collector, process.pid() == root, &threads[0].status)?;
        vmas.push(vma::collect(collector, &outside.maps)?);
        programs.push(task::exe(collector)?);
    }
    collector.turn_to(root);
    scratch::decide(collector, outsides.iter().map(|o| o.cwd.clone()))?;
    lease::confirm(collector, vmas.iter().flatten());
    sysv::collect(collector)?;
    let mut prepared = Vec::with_capacity(tables.len());
    for ((process, outside), threads) in stopped.processes.iter().zip(&outsides).zip(threads) {
        collector.turn_to(process.living());
        prepared.push(task::prepare(collector, process, outside, threads, &before.restarts)?);
    }
    Ok(Told { shares, tables, outsides, vmas, programs, prepared })
}

/// What /proc tells of every process: its descriptors, but for a table that is another's, and all else.
fn looks(
    stopped: &FrozenTree,
    opened: &[Opened],
    shares: &[Shares],
    areas: &Areas,
) -> Result<(Vec<Vec<Found>>, Vec<Outside>)> {
    let areas = areas.confirmed(opened.iter().map(|o| o.pid));
    let all: Vec<(Pid, Pid)> =
        stopped.processes.iter().zip(opened).map(|(process, opened)| (process.pid(), opened.pid)).collect();
    let look = |&(own, pid): &(Pid, Pid)| task::look(own, pid, areas.get(&pid).copied());
    let own = |(_, shares): &(_, &Shares)| shares.descriptors.is_none();
    let mut found =
        description::look(&opened.iter().zip(shares).filter(own).map(|(o, _)| o).collect::<Vec<_>>(), false)?
            .into_iter();
    let found =
        shares.iter().map(|s| s.descriptors.map_or_else(|| found.next(), |_| None).unwrap_or_default());
    Ok((found.collect(), workers::each(&all, look).into_iter().collect::<Result<_>>()?))
}

/// What is told of every thread, by process.
fn threads(stopped: &FrozenTree) -> Result<Vec<Vec<thread::Outside>>> {
    let processes = &stopped.processes;
    let first = |p: &Frozen| (p.pid(), p.threads()[0].tid);
    let leaders = workers::each(&processes.iter().map(first).collect::<Vec<_>>(), |(pid, tid)| {
        thread::look(*pid, *tid)
    });
    let leaders = leaders.into_iter().collect::<Result<Vec<_>>>()?;
    let others = processes.iter().zip(&leaders).flat_map(|(p, leader)| {
        let told = p.told();
        let its = (leader, told.get(&p.threads()[0].tid));
        p.threads()[1..].iter().map(move |t| ((p.pid(), t.tid), told.get(&t.tid), its))
    });
    let others: Vec<_> = others.collect();
    let mut looks =
        workers::each(&others, |(of, told, its)| thread::look_beside(*of, *told, *its)).into_iter();
    let counts: Vec<usize> = processes.iter().map(|p| p.threads().len() - 1).collect();
    let all = leaders.into_iter().zip(counts);
    all.map(|(leader, more)| std::iter::once(Ok(leader)).chain(looks.by_ref().take(more)).collect()).collect()
}

/// How every process is made to copy itself; none where they are not.
fn births(way: &snapshot::Way, root: Pid, shares: &[Shares], outsides: &[Outside]) -> Result<Vec<Birth>> {
    if way.freeze != Freeze::Fork {
        return Ok(Vec::new());
    }
    if shares.iter().any(|s| s.memory.is_some()) {
        let why = "processes of it share their memory (CLONE_VM)".into();
        return Err(Error::Declined { pid: root, freeze: Freeze::Fork, why });
    }
    Ok(outsides.iter().map(|outside| Birth::of(&outside.maps, STACK)).collect())
}

/// How a process is entered: its scripts, its memory map, the code that is used for it.
type Way<'a> = ((&'a Prepared, &'a Outside), &'a Gadgets);

/// What the scripts of each process left, its copy if one was to be made, and what was copied meanwhile.
type Entered<T> = (Vec<Vec<Outcome>>, Vec<Option<Snapshot>>, T);

/// Enters all processes, each by its way, and copies memory meanwhile, where there are many to be entered. What several
/// processes share is entered by one after the other, and copied then; so is what has something written where it may be live.
///
/// Beside the visits a page may be copied only because nothing but the frames below a stack, written before, is changed
/// by them in what is copied: had a page been found to be shared by two processes and then been written in one, the
/// other would be given what was written.
fn enter_and_copy<T: Send>(
    stopped: &mut FrozenTree,
    shares: &[Shares],
    (ways, births): (&[Way<'_>], &[Birth]),
    copy: impl FnOnce() -> Result<T> + Send,
) -> Result<Entered<T>> {
    let mut visitors: HashMap<i32, usize> = HashMap::new();
    let pids: Vec<i32> = stopped.processes.iter().map(|p| p.pid().0).collect();
    let turns: Vec<usize> = pids
        .iter()
        .zip(shares)
        .map(|(pid, shares)| {
            let turn = visitors.entry(shares.memory.map_or(*pid, |of| of.0)).or_default();
            *turn += 1;
            *turn - 1
        })
        .collect();
    let last = turns.iter().copied().max().unwrap_or(0);
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); turns.len()];
    let mut note = |turn: usize, all: Vec<Vec<Outcome>>| {
        let of_turn = (0..turns.len()).filter(|i| turns[*i] == turn);
        of_turn.zip(all).for_each(|(i, outcome)| outcomes[i] = outcome);
    };
    let named: Vec<Pid> = stopped.processes.iter().map(Frozen::pid).collect();
    // Where there are copies to be made, all have the first turn.
    let allow = |outcomes: &[&[Outcome]]| {
        let mut all = ways.iter().zip(&named).zip(outcomes);
        let obstacle = all.find_map(|((((prepared, _), _), pid), outcome)| prepared.obstacle(*pid, outcome));
        match obstacle {
            Some(why) => Err(Error::Declined { pid: named[0], freeze: Freeze::Fork, why }),
            None => Ok(()),
        }
    };
    let mut snapshots = Vec::new();
    let mut unpack = |all: Vec<inject::Left>| -> Vec<Vec<Outcome>> {
        all.into_iter()
            .map(|left| {
                if !births.is_empty() {
                    snapshots.push(left.snapshot);
                }
                left.outcomes
            })
            .collect()
    };
    let ready = visits(stopped, ways, births, &turns, 0)?;
    if last == 0 && ready.takes_long() && !ready.borrows() {
        let (all, copied) = workers::both(|| ready.run_then(allow), copy);
        note(0, unpack(all?));
        return Ok((outcomes, snapshots, copied?));
    }
    note(0, unpack(ready.run_then(allow)?));
    for turn in 1..=last {
        let all = visits(stopped, ways, &[], &turns, turn)?.run()?;
        note(turn, all);
    }
    Ok((outcomes, snapshots, copy()?))
}

/// Makes those ready whose turn it is.
fn visits<'a>(
    stopped: &'a mut FrozenTree,
    ways: &[Way<'a>],
    births: &'a [Birth],
    turns: &[usize],
    turn: usize,
) -> Result<inject::Ready<'a>> {
    let all = stopped.processes.iter_mut().zip(ways).zip(turns).enumerate().filter(|(_, (_, t))| **t == turn);
    let visits = all.map(|(i, ((process, ((prepared, outside), gadgets)), _))| {
        prepared.visit(process, **gadgets, &outside.maps, None, births.get(i))
    });
    inject::prepare(visits.collect())
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
    pub(crate) fn finish(mut self, options: &Options<'_>) -> Result<Dumped> {
        let watch = options.watch();
        memory::catch_up(&mut self.files)?;
        let covered: Vec<_> = self
            .tasks
            .iter()
            .map(|t| options.tracking.and_then(|tracking| tracking.covered(Pid(t.pid.0))))
            .collect();
        let behind = &self.behind[..];
        let mut records =
            self.pages.finish(self.root, self.stage, &mut self.files, &watch, &covered, behind)?;
        if !self.snapshots.is_empty() {
            let more =
                read_snapshots(self.root, &self.snapshots, (&self.tasks, behind), &mut self.files, &watch)?;
            // What they hold is given back while the rest is written; they are waited for at the end.
            self.snapshots.iter_mut().flatten().for_each(Snapshot::kill);
            for (records, more) in records.iter_mut().zip(more) {
                records.extend(more);
                records.sort_by_key(|r| r.address);
            }
        }
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
            freeze: self.way.freeze,
            fallback: self.way.fallback,
            followed: options.tracking.and_then(Tracking::means).map(str::to_owned),
            ..Manifest::default()
        };
        Ok(Dumped { manifest: self.writer.finish(manifest)? })
    }
}

/// Reads the copies of all processes into the files. Gives records by process.
///
/// Which pages a process had in common with its parent is seen in their copies as well: what either writes since goes to
/// a page of its own.
fn read_snapshots(
    root: Pid,
    snapshots: &[Option<Snapshot>],
    (tasks, behind): (&[Task], &[Behind]),
    files: &mut [DataFile],
    watch: &Watch<'_>,
) -> Result<Vec<Vec<Record>>> {
    let lost = || {
        let why =
            "a copy was ended before it had been read: for want of memory, it is the first to go".into();
        Error::Declined { pid: root, freeze: Freeze::Fork, why }
    };
    let vmas: Vec<Vec<Vma>> = tasks
        .iter()
        .map(|task| task.memory.vmas.iter().filter(|v| snapshot::copies(v)).cloned().collect())
        .collect();
    let all = snapshots.iter().zip(tasks).zip(&vmas).zip(behind);
    let spaces: Option<Vec<Space<'_>>> = all
        .map(|(((snapshot, task), vmas), behind)| {
            let parent = tasks.iter().position(|t| t.pid == task.ppid);
            Some(Space {
                pid: snapshot.as_ref()?.pid(),
                vmas,
                parent,
                covered: None,
                behind,
                soft: None,
                unshared: &[],
                ahead: None,
            })
        })
        .collect();
    let spaces = spaces.ok_or_else(lost)?;
    let none = vec![None; spaces.len()];
    let read = memory::copy(&spaces, None, files, watch)
        .and_then(|read| read.finish(root, None, files, watch, &none, behind));
    // Asked at the end: it covers all that was read before.
    match snapshots.iter().flatten().all(Snapshot::stands) {
        true => read,
        false if matches!(read, Err(Error::Cancelled { .. })) => read,
        false => Err(lost()),
    }
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
