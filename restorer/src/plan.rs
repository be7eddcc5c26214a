//! The plan: a pure function of an image and a host.
//!
//! No system call is made here, and nothing is read but the arguments, so that plans can be printed, and
//! tested without privilege. What the plan says:
//!
//! 1. what is opened or made outside of the tasks, each with a slot number by which scripts refer to it;
//! 2. how the root gets rid of the memory it begins with, and how everyone is born ([`crate::birth`]);
//! 3. for each task the phases its leader goes through, one script each, and a script for every other
//!    thread, which exists after the phase `threads`. All tasks are through with a phase before one begins the next.

mod place;

use std::collections::BTreeMap;

use torpor_image::description::Kind;
use torpor_image::extent::Record;
use torpor_image::task::Task;
use torpor_image::unix::State;
use torpor_image::vma::Vma;
use torpor_image::{Bytes, DescriptionId, Image, InodeId, PtyId};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};
use torpor_parasite::wire::{STACK, TRAPS};

use self::place::placed;
pub(crate) use self::place::{Layout, Place, layout};
use crate::birth::{self, Helpers, word};
use crate::crew::{Crew, Hand};
use crate::error::{Error, Result};
use crate::feed::Range;
use crate::host::Host;
use crate::lazy::{self, Deferred, Lazy};
use crate::lineage::{Lineage, Origin, Role, Stage};
use crate::vma::{Begin, Early};
use crate::{
    description, epoll, io_uring, late, lease, lock, memory, mqueue, print, signal, sysv_sem, sysv_shm, task,
    terminal, thread, timer, vma,
};

/// Bytes before the contexts, for the shared words.
pub(crate) const SHARED: u64 = 64;
const PAGE: u64 = 4096;

/// How to restore.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Take files that changed since the dump as they are.
    pub accept_changed: bool,
    /// The restored root will outlive the process that restores it: a parent death signal, which was about
    /// another parent, is not set again.
    pub detach: bool,
    /// Let the tree run before its memory is there.
    pub lazy: Option<Lazy>,
    /// Asked now and then whether to give up.
    pub cancel: Option<fn() -> bool>,
}

/// Number of something that is opened outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub(crate) u32);

/// Something to be opened or made outside of the tasks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Open {
    /// An open file description.
    Description(DescriptionId),
    /// A file to be mapped.
    Mapped { inode: InodeId, write: bool },
    /// The program file.
    Program { inode: InodeId },
    /// A data file of the image.
    Data { file: u32 },
    /// Contents of data files that a task cannot read itself.
    Feed { task: usize },
    /// The slave of a pseudo terminal, whether a task has it open or not.
    Slave { pty: PtyId },
    /// /dev/zero
    Zero,
    /// A directory.
    Directory { path: Bytes },
}

/// What the planning functions work on.
pub(crate) struct Planner<'a> {
    pub(crate) image: &'a Image,
    pub(crate) host: &'a Host,
    pub(crate) crew: Crew,
    opens: Vec<Open>,
    notes: Vec<String>,
    /// What tasks are fed, in the order of their scripts.
    pub(crate) feeds: BTreeMap<usize, Vec<Range>>,
    /// The task whose scripts are made at this moment.
    pub(crate) turn: usize,
}

impl Planner<'_> {
    /// The slot of something to be opened; the same thing has one slot.
    pub(crate) fn open(&mut self, what: Open) -> Slot {
        let known = self.opens.iter().position(|o| *o == what);
        let number = known.unwrap_or_else(|| {
            self.opens.push(what);
            self.opens.len() - 1
        });
        Slot(number as u32)
    }

    /// The descriptor of a slot, in scripts; it holds until the descriptor table is built.
    pub(crate) fn descriptor(&self, slot: Slot) -> Value {
        Value::Descriptor(slot.0)
    }

    /// Says what will differ from the dump. Scripts may be made twice, and what is said of them is said once.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// A part of a task's way back to life.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) script: Script,
}

/// How one process is restored once it is born. Its leader has the context of its index.
#[derive(Clone, Debug)]
pub(crate) struct TaskPlan {
    /// Index in the image.
    pub(crate) index: usize,
    /// Context of the first of its other threads.
    pub(crate) first_thread: u32,
    /// Scripts of the leader, one after the other; the same phases for all tasks.
    pub(crate) phases: Vec<Phase>,
    /// After which phase the other threads exist.
    pub(crate) threads_after: usize,
    /// Scripts of the other threads, in the image's order.
    pub(crate) threads: Vec<Script>,
    /// What it does when those of its children stand that are to be stopped.
    pub(crate) stops: Script,
    /// Whether its memory is its own, from which the executor must be unmapped.
    pub(crate) owns_memory: bool,
    /// /proc/PID/oom_score_adj, where it must change.
    pub(crate) oom_score_adj: Option<i32>,
    /// /proc/PID/coredump_filter, where it must change.
    pub(crate) coredump_filter: Option<u32>,
    /// What of its memory comes when it runs already.
    pub(crate) deferred: Option<Deferred>,
    /// A system call instruction in the restored memory, for the last call of all.
    pub(crate) last_call: u64,
}

/// Everything a restore will do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What will differ from the dump, in words.
    pub notes: Vec<String>,
    pub(crate) opens: Vec<Open>,
    pub(crate) feeds: BTreeMap<usize, Vec<Range>>,
    /// What each slot is, in words.
    pub(crate) names: Vec<String>,
    pub(crate) place: Place,
    /// The signal that makes the trap, in all tasks.
    pub(crate) trap: i32,
    pub(crate) lineage: Lineage,
    /// What the root does before it is born like the others.
    pub(crate) begin: Vec<Phase>,
    /// From the first instruction on until all are there: of every node.
    pub(crate) births: Vec<Script>,
    /// Of those that only help others.
    pub(crate) helpers: Vec<Script>,
    /// The last of them read the memory of big processes.
    pub(crate) crew: Vec<Hand>,
    pub(crate) tasks: Vec<TaskPlan>,
    /// What each node is, in words.
    pub(crate) titles: Vec<String>,
    pub(crate) options: Options,
}

impl Plan {
    /// Context of the first of those that only help others: they come after all threads.
    pub(crate) fn first_helper(&self) -> usize {
        self.births.len() + self.tasks.iter().map(|t| t.threads.len()).sum::<usize>()
    }
}

/// Plans the restore of an image on a host.
pub fn plan(image: &Image, host: &Host, options: &Options) -> Result<Plan> {
    let (opens, feeds) = (Vec::new(), BTreeMap::new());
    let mut planner =
        Planner { image, host, crew: Crew::default(), opens, notes: Vec::new(), feeds, turn: 0 };
    notes(&mut planner);
    for task in &image.tasks {
        fits(&mut planner, task)?;
    }
    let trap = trap(image)?;
    let lineage = Lineage::of(image, |index| memory::inherits(image, index))?;
    let no_room = || Error::Unfit {
        what: image.tasks[0].title(),
        why: "the address spaces of the tree have no room for a few pages in common".into(),
        remedy: "this image cannot be restored here".into(),
    };

    let (place, scripts) = placed(&mut planner, &lineage, options)?.ok_or_else(no_room)?;

    description::in_flight(&mut planner);
    let names = planner.opens.iter().map(|o| print::name(image, o)).collect();
    let titles = lineage.nodes.iter().map(|node| match node.role {
        Role::Task(task) => image.tasks[task].title(),
        Role::Zombie(_) => format!("pid {} (a zombie)", node.pid),
        Role::Session | Role::Group => format!("pid {} (stands in for a leader)", node.pid),
    });
    let titles = titles.collect();
    Ok(Plan {
        notes: planner.notes,
        opens: planner.opens,
        feeds: planner.feeds,
        names,
        place,
        trap,
        begin: scripts.begin,
        births: scripts.births,
        helpers: scripts.helpers,
        crew: planner.crew.hands,
        tasks: scripts.tasks,
        lineage,
        titles,
        options: options.clone(),
    })
}

/// Every script of a restore.
struct Scripts {
    begin: Vec<Phase>,
    births: Vec<Script>,
    helpers: Vec<Script>,
    tasks: Vec<TaskPlan>,
}

impl Scripts {
    fn layout(&self) -> Layout {
        layout(&self.begin, &self.births, &self.helpers, &self.tasks)
    }
}

fn scripts(
    planner: &mut Planner<'_>,
    lineage: &Lineage,
    place: Place,
    scratch: &BTreeMap<InodeId, u64>,
    options: &Options,
) -> Result<Scripts> {
    let (image, host) = (planner.image, planner.host);
    let mut next = lineage.nodes.len() as u32;
    let mut take = |count: u32| {
        next += count;
        next - count
    };
    let first_threads: Vec<u32> = image
        .tasks
        .iter()
        .map(|t| take(t.threads.len() as u32 - u32::from(t.leader_ended.is_none())))
        .collect();
    let helpers = Helpers::of(lineage, take(0));
    let processors = host.affinity.iter().map(|b| b.count_ones() as usize).sum();
    planner.crew = Crew::of(image, processors, take(0) + helpers.0.len() as u32);

    let earlies = earlies(image, lineage);
    planner.turn = 0;
    let begin = begin(planner, place, scratch);
    let mut births = Vec::with_capacity(lineage.nodes.len());
    for (i, node) in lineage.nodes.iter().enumerate() {
        let Role::Task(index) = node.role else {
            births.push(birth::plan(image, host, lineage, i, &helpers, |_| {}, |_| {}));
            continue;
        };
        let task = &image.tasks[index];
        planner.turn = index;
        let terminal = terminal::controlling(planner, task);
        let session = |script: &mut Script| terminal::take(script, terminal);
        let begins = begins(image, lineage, &earlies, i);
        let early: Vec<&Vma> =
            task.memory.vmas.iter().filter(|v| earlies[index].contains(&v.start)).collect();
        let fill = |script: &mut Script| {
            vma::begin(script, planner.host, task, begins, place.park);
            fill(script, planner, task, &early, begins, &[], place, scratch);
        };
        births.push(birth::plan(image, host, lineage, i, &helpers, session, fill));
    }
    let mut tasks = Vec::with_capacity(image.tasks.len());
    for (i, first) in first_threads.into_iter().enumerate() {
        planner.turn = i;
        tasks.push(plan_task(planner, lineage, &earlies, i, first, place, scratch, options)?);
    }
    let mut helpers = helpers.scripts(lineage);
    helpers.append(&mut planner.crew.scripts);
    Ok(Scripts { begin, births, helpers, tasks })
}

/// What the root does before it is born like the others: it waits until it is traced, and gets rid of the memory
/// of the restoring process.
fn begin(planner: &mut Planner<'_>, place: Place, scratch: &BTreeMap<InodeId, u64>) -> Vec<Phase> {
    let mut wait = Script::new();
    birth::die_with_parent(&mut wait, Some(planner.host.pid));
    // Who started us may ignore it, and children would be gone before they are collected.
    let default = wait.words(&[0, 0, 0, 0]);
    call!(wait, "the action of SIGCHLD", libc::SYS_rt_sigaction, libc::SIGCHLD, default, 0, 8);
    wait.wait("the signal to begin", word::ROOT, 1);
    let mut clear = Script::new();
    let end = place.arena + place.arena_length;
    vma::clear(&mut clear, planner.host, place.park, end, place.park);
    for (id, at) in scratch {
        vma::shared_memory(&mut clear, planner, *id, *at);
    }
    vec![Phase { name: "wait", script: wait }, Phase { name: "clear", script: clear }]
}

/// What each task has of its memory when it makes those that begin with it.
fn earlies(image: &Image, lineage: &Lineage) -> Vec<Early> {
    let mut all: Vec<Early> = vec![Early::new(); image.tasks.len()];
    // Who made a task need not stand before it.
    let made_by = |i: usize| lineage.nodes[i].origin.map(|origin| origin.creator);
    let mut order: Vec<usize> = (0..image.tasks.len()).collect();
    order.sort_by_key(|&i| std::iter::successors(Some(i), |&at| made_by(at)).count());
    for i in order {
        let own = |(child, _): (usize, _)| match lineage.nodes[child].role {
            Role::Task(index) => Some(&image.tasks[index]).filter(|t| t.shares.memory.is_none()),
            _ => None,
        };
        let children: Vec<&Task> = lineage.made_by(i, Stage::Filled).filter_map(own).collect();
        if !children.is_empty() {
            let begins = begins(image, lineage, &all, i);
            all[i] = memory::early(image, &image.tasks[i], begins, &children);
        }
    }
    all
}

/// What the address space of a node begins as: what its creator's is at that time.
fn begins<'a>(image: &'a Image, lineage: &Lineage, earlies: &'a [Early], i: usize) -> Begin<'a> {
    match lineage.nodes[i].origin {
        Some(Origin { creator, stage: Stage::Filled, .. }) => {
            Begin::With(&image.tasks[creator], &earlies[creator])
        }
        Some(Origin { creator, .. }) => begins(image, lineage, earlies, creator),
        None => Begin::Bare,
    }
}

/// Makes these areas of a task complete, but for what waits.
#[expect(clippy::too_many_arguments, reason = "what one task is, and where everything lies")]
fn fill(
    script: &mut Script,
    planner: &mut Planner<'_>,
    task: &Task,
    areas: &[&Vma],
    begins: Begin<'_>,
    waiting: &[Record],
    place: Place,
    scratch: &BTreeMap<InodeId, u64>,
) {
    io_uring::map(script, planner, task, areas, begins, place, scratch);
    vma::map(script, planner, task, areas, begins, scratch);
    sysv_shm::plan(script, planner.image, areas, begins, place.segments);
    memory::fill(script, planner, task, areas, begins, waiting);
    vma::finish(script, planner, task, areas, begins);
}

#[expect(clippy::too_many_arguments, reason = "what one task is, and where everything lies")]
fn plan_task(
    planner: &mut Planner<'_>,
    lineage: &Lineage,
    earlies: &[Early],
    index: usize,
    first_thread: u32,
    place: Place,
    scratch: &BTreeMap<InodeId, u64>,
    options: &Options,
) -> Result<TaskPlan> {
    let (image, host) = (planner.image, planner.host);
    let task = &image.tasks[index];
    let shares = task.shares;
    let mut phases = Vec::new();
    let mut phase = |name, script| phases.push(Phase { name, script });

    let mut script = Script::new();
    let mut deferred = None;
    if shares.memory.is_none() {
        let begins = begins(image, lineage, earlies, index);
        if lineage.made_by(index, Stage::Filled).next().is_none() {
            vma::begin(&mut script, host, task, begins, place.park);
        }
        let late = |v: &&Vma| !earlies[index].contains(&v.start);
        let late: Vec<&Vma> = task.memory.vmas.iter().filter(late).collect();
        let waiting = match options.lazy {
            Some(_) => lazy::records(image, task, &late, begins),
            None => Vec::new(),
        };
        planner.crew.task = Some(index);
        fill(&mut script, planner, task, &late, begins, &waiting, place, scratch);
        planner.crew.task = None;
        deferred = lazy::plan(&mut script, task, waiting);
        for (id, at) in scratch {
            let size = image.objects.inodes[id.0 as usize].size.next_multiple_of(PAGE);
            call!(script, format!("shared memory {id}"), libc::SYS_munmap, *at, size);
        }
    }
    phase("memory", script);

    // All that needs descriptors of ours, before one of those who share a table closes them.
    let mut script = Script::new();
    task::raise_descriptor_limit(&mut script, host);
    if shares.memory.is_none() {
        task::mm_fields(&mut script, planner, task);
    }
    if shares.directories.is_none() {
        task::directories(&mut script, planner, task);
    }
    terminal::give_up(&mut script, planner, task);
    phase("program", script);

    let mut script = Script::new();
    if shares.descriptors.is_none() {
        let numbers = description::plan(&mut script, planner, task);
        epoll::plan(&mut script, image, index, Some(&numbers))?;
        description::close_others(&mut script, task);
        description::owners(&mut script, planner, task, false);
        lock::plan(&mut script, image, task, false);
    }
    sysv_sem::plan(&mut script, image, task);
    phase("descriptors", script);

    // Actions before threads: setting one discards what is pending of a signal that is ignored by default
    // (sigaction(2)), the traps of other threads among it. Children that are to be zombies must have ended before.
    let mut script = Script::new();
    birth::collect_children(&mut script, lineage, index);
    sysv_sem::operators(&mut script, image, task);
    if shares.signal_actions.is_none() {
        signal::actions(&mut script, &task.signals);
    }
    thread::spawn(&mut script, task, first_thread, STACK);
    phase("threads", script);

    let mut script = Script::new();
    late::plan(&mut script, image, task);
    io_uring::plan(&mut script, planner, index, task.pid)?;
    epoll::plan(&mut script, image, index, None)?;
    description::owners(&mut script, planner, task, true);
    lock::plan(&mut script, image, task, true);
    mqueue::ask(&mut script, image, task);
    lease::plan(&mut script, image, task);
    task::attributes(&mut script, planner, task);
    signal::pending(&mut script, task.pid.0, &task.signals);
    timer::plan(&mut script, &task.timers, host);
    if task.leader_ended.is_none() {
        thread::plan(&mut script, task, task.leader(), host);
    }
    description::listen_again(&mut script, image, task);
    terminal::foreground(&mut script, planner, task);
    phase("state", script);

    let mut script = Script::new();
    task::last(&mut script, planner, task, options.detach && index == 0);
    phase("last", script);

    let threads: Vec<Script> = task
        .other_threads()
        .iter()
        .map(|t| {
            let mut script = Script::new();
            script.wait("the signal to begin", word::THREADS, 1);
            io_uring::plan(&mut script, planner, index, t.tid)?;
            thread::plan(&mut script, task, t, host);
            Ok(script)
        })
        .collect::<Result<_>>()?;
    Ok(TaskPlan {
        index,
        first_thread,
        phases,
        threads_after: 3,
        threads,
        stops: task::collect_stops(image, task),
        owns_memory: shares.memory.is_none(),
        oom_score_adj: (task.oom_score_adj != host.oom_score_adj).then_some(task.oom_score_adj),
        coredump_filter: task.memory.coredump_filter.filter(|f| Some(*f) != host.coredump_filter),
        deferred,
        last_call: last_call(planner.image, task)?,
    })
}

/// The signal that makes the trap: one that is not pending anywhere.
fn trap(image: &Image) -> Result<i32> {
    let pending = image.tasks.iter().fold(0, |all, task| all | signal::all_pending(task));
    let several = image.tasks.len() + image.manifest.zombies.len() > 1;
    let fits = |s: &i32| pending & (1 << (s - 1)) == 0 && !(several && *s == libc::SIGCHLD);
    TRAPS.into_iter().find(fits).ok_or_else(|| Error::Unfit {
        what: image.tasks[0].title(),
        why: "every signal that could serve as a trap is pending in it or below".into(),
        remedy: "this image cannot be restored".into(),
    })
}

/// What will differ from the dump, of the tree as a whole.
fn notes(planner: &mut Planner<'_>) {
    let image = planner.image;
    for lost in &image.manifest.not_captured {
        planner.note(format!("not in the image: {lost}"));
    }
    let Some(root) = image.tasks.first() else { return };
    let title = root.title();
    if image.manifest.host.boot != planner.host.boot {
        planner.note(format!(
            "{title}: the machine is another one or was started anew: CLOCK_MONOTONIC has jumped"
        ));
    }
    if root.sid != root.pid {
        planner.note(format!("{title}: its session {} is not in the image; it joins torpor's", root.sid));
        if root.pgid != root.pid {
            planner.note(format!(
                "{title}: its process group {} is not in the image; it joins torpor's",
                root.pgid
            ));
        }
    }
    let connected = |d: &torpor_image::description::Description| matches!(&d.kind, Kind::Unix(u) if u.peer_credentials.is_none() && u.is_connection() && !matches!(u.state, State::Idle | State::Listening { .. }));
    if image.objects.descriptions.iter().any(connected) {
        let what = "its connected unix sockets tell torpor's credentials as their peers' (SO_PEERCRED)";
        planner.note(format!("{title}: {what}"));
    }
    if image.manifest.ran_on {
        planner
            .note(format!("{title}: it ran on after this image was taken; what it did since is not undone"));
    }
}

/// Whether machine and privilege can take the task at all.
fn fits(planner: &mut Planner<'_>, task: &Task) -> Result<()> {
    let (image, host) = (planner.image, planner.host);
    let unfit =
        |why: String, remedy: &str| Err(Error::Unfit { what: task.title(), why, remedy: remedy.to_owned() });
    let used = task.threads.iter().fold(0, |all, t| all | arch::xstate_components(&t.xstate));
    let missing = used & !host.xstate_features;
    if missing != 0 {
        let names: Vec<_> = arch::cpu::component_names(missing).collect();
        return unfit(
            format!("its threads have {} state, which this processor does not have", names.join(", ")),
            "restore it on a machine with these features",
        );
    }
    if let Some(thread) = task.threads.iter().find(|t| t.xstate.len() != host.xstate_size) {
        return unfit(
            format!(
                "its threads have {} bytes of vector state, those of this processor {}",
                thread.xstate.len(),
                host.xstate_size
            ),
            "restore it on a machine of the same kind",
        );
    }
    if let Some(why) = vma::kernel_mismatch(image, host, task) {
        return unfit(
            format!("{why}; the image was taken under Linux {}", image.manifest.host.kernel),
            "restore it under that very build of the kernel (`uname -rv` tells that of this machine)",
        );
    }
    let overruns = task.timers.posix.iter().filter(|t| t.overrun > 0).count();
    if overruns > 0 {
        planner.note(format!("{}: the overrun counts of {overruns} POSIX timers are lost", task.title()));
    }
    Ok(())
}

/// A system call instruction in the vdso the task will have, else in a file it maps with code: its address
/// cannot be known without reading, so the vdso must do.
fn last_call(image: &Image, task: &Task) -> Result<u64> {
    use torpor_image::vma::Mapping;
    let vdso = task
        .memory
        .vmas
        .iter()
        .find(|v| matches!(&v.mapping, Mapping::Kernel { name } if &**name == b"[vdso]"));
    let at = vdso.and_then(|v| {
        let code = &image.manifest.host.vdso;
        let call = arch::SYSCALL_INSTRUCTION;
        let step = call.len().max(1);
        let position = if cfg!(target_arch = "x86_64") {
            code.windows(call.len()).position(|w| w == call)
        } else {
            code.chunks_exact(step).position(|w| w == call).map(|i| i * step)
        };
        Some(v.start + position? as u64)
    });
    at.ok_or_else(|| Error::Unfit {
        what: task.title(),
        why: "it has no vdso, through which its memory is put in order last".into(),
        remedy: "boot without vdso=0".into(),
    })
}
