//! The plan: a pure function of an image and a host.
//!
//! No system call is made here, and nothing is read but the arguments, so that plans can be printed, and
//! tested without privilege. What the plan says:
//!
//! 1. what is opened or made outside of the tasks, each with a slot number by which scripts refer to it;
//! 2. for each task the phases its leader goes through, one script each, and a script for every other
//!    thread, which exists after the phase `threads`.

use std::fmt;

use serde::Serialize;
use torpor_image::description::Kind;
use torpor_image::inode::Source;
use torpor_image::task::Task;
use torpor_image::unix::State;
use torpor_image::{Bytes, DescriptionId, Image, InodeId};
use torpor_parasite::script::{Script, Value};
use torpor_parasite::wire::{STACK, TRAPS};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::{description, epoll, lock, memory, signal, task, thread, timer, vma};

/// Shared words: a new task and its new threads wait for theirs before they do anything.
pub(crate) const GO_TASK: u32 = 0;
pub(crate) const GO_THREADS: u32 = 1;
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
    /// /dev/zero
    Zero,
    /// A directory.
    Directory { path: Bytes },
}

/// What the planning functions work on.
pub(crate) struct Planner<'a> {
    pub(crate) image: &'a Image,
    pub(crate) host: &'a Host,
    opens: Vec<Open>,
    notes: Vec<String>,
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

    /// Says what will differ from the dump.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

/// A part of a task's way back to life.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) script: Script,
}

/// How one process is restored.
#[derive(Clone, Debug)]
pub(crate) struct TaskPlan {
    /// Index in the image.
    pub(crate) index: usize,
    /// Where the executor and its arena lie, from the parking place of the kernel's areas on.
    pub(crate) park: u64,
    pub(crate) blob: u64,
    pub(crate) arena: u64,
    pub(crate) arena_length: u64,
    pub(crate) trap: i32,
    /// Scripts of the leader, one after the other.
    pub(crate) phases: Vec<Phase>,
    /// After which phase the other threads exist.
    pub(crate) threads_after: usize,
    /// Scripts of the other threads, in the image's order.
    pub(crate) threads: Vec<Script>,
    /// /proc/PID/oom_score_adj, where it must change.
    pub(crate) oom_score_adj: Option<i32>,
    /// /proc/PID/coredump_filter, where it must change.
    pub(crate) coredump_filter: Option<u32>,
    /// A system call instruction in the restored memory, for the last call of all.
    pub(crate) last_call: u64,
}

/// Everything a restore will do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What will differ from the dump, in words.
    pub notes: Vec<String>,
    pub(crate) opens: Vec<Open>,
    /// What each slot is, in words.
    names: Vec<String>,
    pub(crate) tasks: Vec<TaskPlan>,
    titles: Vec<String>,
    pub(crate) options: Options,
}

/// Plans the restore of an image on a host.
pub fn plan(image: &Image, host: &Host, options: &Options) -> Result<Plan> {
    if image.tasks.len() != 1 {
        return Err(Error::Unfit {
            what: "the image".into(),
            why: format!("it holds {} processes", image.tasks.len()),
            remedy: "use a torpor that restores trees".into(),
        });
    }
    let mut planner = Planner { image, host, opens: Vec::new(), notes: Vec::new() };
    for lost in &image.manifest.not_captured {
        planner.note(format!("not in the image: {lost}"));
    }
    let tasks = image
        .tasks
        .iter()
        .enumerate()
        .map(|(index, task)| plan_task(&mut planner, index, task, options))
        .collect::<Result<Vec<_>>>()?;
    let names = planner.opens.iter().map(|o| name(image, o)).collect();
    Ok(Plan {
        notes: planner.notes,
        opens: planner.opens,
        names,
        tasks,
        titles: image.tasks.iter().map(Task::title).collect(),
        options: options.clone(),
    })
}

fn plan_task(planner: &mut Planner<'_>, index: usize, task: &Task, options: &Options) -> Result<TaskPlan> {
    let host = planner.host;
    fits(planner, task)?;
    let shared_size = planner.image.objects.inodes.iter().filter(|i| i.is_shared_memory());
    let scratch_length = shared_size.map(|i| i.size.next_multiple_of(PAGE)).max().unwrap_or(0);
    let no_room = || Error::Unfit {
        what: task.title(),
        why: "its address space has no room for a few pages".into(),
        remedy: "this image cannot be restored here".into(),
    };

    let mut phases = Vec::new();
    let mut phase = |name, script| phases.push(Phase { name, script });
    // The first two phases need addresses that depend on the size of all others.
    phase("wait", Script::new());
    phase("clear", Script::new());

    // Where shared memory is put together must not be where the executor will be: the higher of the two
    // places is taken for it, below the one that is found for the executor.
    let scratch = vma::free_range(host, task, scratch_length).ok_or_else(no_room)?;
    let mut script = Script::new();
    vma::map(&mut script, planner, task, scratch);
    memory::fill(&mut script, planner, task);
    vma::finish(&mut script, planner, task);
    phase("memory", script);

    let mut script = Script::new();
    task::raise_descriptor_limit(&mut script, host);
    task::mm_fields(&mut script, planner, task);
    task::session(&mut script, task);
    task::directories(&mut script, planner, task);
    let numbers = description::plan(&mut script, planner, task);
    epoll::plan(&mut script, planner.image, task, &numbers);
    description::close_others(&mut script, task);
    description::owners(&mut script, planner, task);
    lock::plan(&mut script, task);
    phase("descriptors", script);

    // Actions before threads: setting one discards what is pending of a signal that is ignored by default
    // (sigaction(2)), the traps of other threads among it.
    let mut script = Script::new();
    signal::actions(&mut script, &task.signals);
    thread::spawn(&mut script, task, STACK);
    phase("threads", script);

    let mut script = Script::new();
    task::attributes(&mut script, planner, task);
    signal::pending(&mut script, task.pid.0, &task.signals);
    timer::plan(&mut script, &task.timers, host);
    thread::plan(&mut script, task, task.leader(), host);
    description::listen_again(&mut script, planner.image, task);
    phase("state", script);

    let mut script = Script::new();
    task::last(&mut script, planner, task, options.detach);
    phase("last", script);

    let threads: Vec<Script> = task.threads[1..]
        .iter()
        .map(|t| {
            let mut script = Script::new();
            script.wait("the signal to begin", GO_THREADS, 1);
            thread::plan(&mut script, task, t, host);
            script
        })
        .collect();

    // Should the restorer die before it traces the new task, the task must not wait for ever.
    let die = [Value::from(libc::PR_SET_PDEATHSIG), libc::SIGKILL.into()];
    phases[0].script.call("dying with the restorer", libc::SYS_prctl, &die);
    phases[0].script.wait("the signal to begin", GO_TASK, 1);
    // Their size does not depend on the addresses in them.
    phases[1].script = first_phase(host, task, 0, 0, 0);
    let arena_length = arena_length(&phases, &threads, task.threads.len());
    let blob_length = (torpor_blob::BLOB.len() as u64).next_multiple_of(PAGE);
    let parking = vma::parking(host).next_multiple_of(PAGE);
    let length = parking + blob_length + arena_length;
    let with_scratch = Host {
        occupied: [host.occupied.clone(), vec![(scratch, scratch + scratch_length)]].concat(),
        ..host.clone()
    };
    let park = vma::free_range(&with_scratch, task, length).ok_or_else(no_room)?;
    phases[1].script = first_phase(host, task, park, park, park + length);

    let pending = signal::all_pending(task);
    let trap = TRAPS.into_iter().find(|s| pending & (1 << (s - 1)) == 0).ok_or_else(|| Error::Unfit {
        what: task.title(),
        why: "every signal that could serve as a trap is pending in it".into(),
        remedy: "this image cannot be restored".into(),
    })?;
    Ok(TaskPlan {
        index,
        park,
        blob: park + parking,
        arena: park + parking + blob_length,
        arena_length,
        trap,
        phases,
        threads_after: 4,
        threads,
        oom_score_adj: (task.oom_score_adj != host.oom_score_adj).then_some(task.oom_score_adj),
        coredump_filter: task.memory.coredump_filter.filter(|f| Some(*f) != host.coredump_filter),
        last_call: last_call(planner.image, task)?,
    })
}

fn first_phase(host: &Host, task: &Task, park: u64, base: u64, end: u64) -> Script {
    let mut script = Script::new();
    vma::clear(&mut script, host, base, end, park);
    vma::unpark(&mut script, host, task, park);
    script
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
    if image.manifest.host.boot != host.boot {
        planner.note(format!(
            "{}: the machine is another one or was started anew: CLOCK_MONOTONIC has jumped",
            task.title()
        ));
    }
    if let Some(why) = vma::kernel_mismatch(image, host, task) {
        return unfit(
            format!("{why}; the image was taken under Linux {}", image.manifest.host.kernel),
            "restore it under that kernel",
        );
    }
    if task.sid != task.pid {
        planner.note(format!(
            "{}: its session {} is not in the image; it joins torpor's",
            task.title(),
            task.sid
        ));
        if task.pgid != task.pid {
            planner.note(format!(
                "{}: its process group {} is not in the image; it joins torpor's",
                task.title(),
                task.pgid
            ));
        }
    }
    let connected = |d: &torpor_image::description::Description| matches!(&d.kind, Kind::Unix(u) if !matches!(u.state, State::Idle | State::Listening { .. }));
    if image.objects.descriptions.iter().any(connected) {
        let what = "its connected unix sockets tell torpor's credentials as their peers' (SO_PEERCRED)";
        planner.note(format!("{}: {what}", task.title()));
    }
    if image.manifest.ran_on {
        planner.note(format!(
            "{}: it ran on after this image was taken; what it did since is not undone",
            task.title()
        ));
    }
    let overruns = task.timers.posix.iter().filter(|t| t.overrun > 0).count();
    if overruns > 0 {
        planner.note(format!("{}: the overrun counts of {overruns} POSIX timers are lost", task.title()));
    }
    Ok(())
}

/// Contexts, stacks and scripts, one behind the other; see `run`.
fn arena_length(phases: &[Phase], threads: &[Script], contexts: usize) -> u64 {
    let layout = layout(phases, threads, contexts);
    layout.end.next_multiple_of(PAGE)
}

/// Where everything lies in the arena of a task: contexts, stacks, scripts.
pub(crate) struct Layout {
    pub(crate) stacks: u64,
    pub(crate) phases: Vec<torpor_parasite::script::Placed>,
    pub(crate) threads: Vec<torpor_parasite::script::Placed>,
    end: u64,
}

/// Lays out the arena of a task.
pub(crate) fn layout(phases: &[Phase], threads: &[Script], contexts: usize) -> Layout {
    let stacks = SHARED + (contexts * size_of::<torpor_parasite::wire::Context>()) as u64;
    let stacks = stacks.next_multiple_of(64);
    let mut end = stacks + contexts as u64 * STACK;
    let mut place = |script: &Script| {
        let placed = script.place(end);
        end = placed.end;
        placed
    };
    let phases = phases.iter().map(|p| place(&p.script)).collect();
    let threads = threads.iter().map(&mut place).collect();
    Layout { stacks, phases, threads, end }
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

fn name(image: &Image, open: &Open) -> String {
    match open {
        Open::Description(id) => {
            let description = &image.objects.descriptions[id.0 as usize];
            let detail = match &description.kind {
                Kind::File(inode) => image.objects.inodes[inode.0 as usize].name(),
                Kind::Pipe(end) => {
                    let pipe = &image.objects.pipes[end.pipe.0 as usize];
                    format!("of {} bytes, {} in it", pipe.capacity, pipe.data.len())
                }
                Kind::Unix(unix) => match &unix.name {
                    Some(name) => name.text().replace('\0', "@"),
                    None => format!("{} messages in it", unix.queue.len()),
                },
                Kind::Inet(inet) => inet.local.map_or_else(String::new, |l| l.to_string()),
                Kind::EventFd(e) => format!("{}{}", e.count, if e.semaphore { " (semaphore)" } else { "" }),
                Kind::Epoll(e) => format!("watching {}", e.targets.len()),
                Kind::Inotify(i) => format!("{} watches", i.watches.len()),
                _ => String::new(),
            };
            format!("{} {detail}", description.kind.noun()).trim_end().to_owned()
        }
        Open::Mapped { inode, write } => {
            let inode = &image.objects.inodes[inode.0 as usize];
            let made = if matches!(inode.source, Source::Path { .. }) { "" } else { ", from the image" };
            format!("{} to be mapped{}{made}", inode.name(), if *write { " for writing" } else { "" })
        }
        Open::Program { inode } => format!("program {}", image.objects.inodes[inode.0 as usize].name()),
        Open::Data { file } => format!("data file {file} of the image"),
        Open::Zero => "/dev/zero".to_owned(),
        Open::Directory { path } => format!("directory {path}"),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        writeln!(f, "outside of the process:")?;
        for (slot, name) in self.names.iter().enumerate() {
            writeln!(f, "  open {slot}: {name}")?;
        }
        for (task, title) in self.tasks.iter().zip(&self.titles) {
            writeln!(f, "{title}:")?;
            for (i, phase) in task.phases.iter().enumerate() {
                writeln!(f, "  phase {}: {} operations", phase.name, phase.script.steps().len())?;
                steps(f, &phase.script)?;
                if i == task.threads_after {
                    for (n, script) in task.threads.iter().enumerate() {
                        writeln!(f, "  thread {}: {} operations", n + 1, script.steps().len())?;
                        steps(f, script)?;
                    }
                }
            }
            writeln!(f, "  outside: unmapping the executor, registers and signal masks")?;
        }
        Ok(())
    }
}

/// Purposes, each once for a run of operations that serve it.
fn steps(f: &mut fmt::Formatter<'_>, script: &Script) -> fmt::Result {
    let mut last = "";
    for step in script.steps() {
        if step.purpose != last {
            writeln!(f, "    {}", step.purpose)?;
            last = &step.purpose;
        }
    }
    Ok(())
}

/// A plan as JSON: the same as its text, in parts.
impl Serialize for Plan {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Part<'a> {
            name: String,
            operations: Vec<&'a str>,
        }
        #[derive(Serialize)]
        struct Whole<'a> {
            notes: &'a [String],
            opens: &'a [String],
            parts: Vec<Part<'a>>,
        }
        let purposes = |s: &'_ Script| s.steps().iter().map(|s| s.purpose.to_string()).collect::<Vec<_>>();
        let mut owned = Vec::new();
        for task in &self.tasks {
            owned.extend(task.phases.iter().map(|p| (p.name.to_owned(), purposes(&p.script))));
            let threads = task.threads.iter().enumerate();
            owned.extend(threads.map(|(i, s)| (format!("thread {}", i + 1), purposes(s))));
        }
        let parts = owned
            .iter()
            .map(|(name, operations)| Part {
                name: name.clone(),
                operations: operations.iter().map(String::as_str).collect(),
            })
            .collect();
        Whole { notes: &self.notes, opens: &self.names, parts }.serialize(serializer)
    }
}
