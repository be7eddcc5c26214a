//! Running a plan: building the tasks, stopped, until nothing can fail any more; then letting them go.

mod born;
mod complete;
mod deferred;
mod failed;

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_image::Image;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::ptrace::{self, Stop};
use torpor_parasite::script::{OpId, Placed, Script, Surroundings};
use torpor_parasite::wire::{Context, Heal, STACK, command, heal, kind, state};

use crate::arena::Arena;
use crate::birth::word;
use crate::error::{Error, Result};
use crate::feed::Feeds;
use crate::host::Host;
use crate::late::{self, Moment};
use crate::lazy::Serving;
use crate::open::Opener;
use crate::plan::{Layout, Open, Plan, SHARED, TaskPlan, layout, plan};
use crate::{directory, inode, io_uring, mqueue, rules, sysv, terminal, unix};

/// How often a plan is made anew when its place in our memory was taken meanwhile.
const ATTEMPTS: u32 = 8;
/// How long those may take to end that are not traced, when a restore fails.
const LAST_ONES: Duration = Duration::from_secs(2);
/// How long all processes may take to be born.
const PATIENCE: Duration = Duration::from_secs(30);

/// A tree that stands complete but for its first instruction. Dropped, it is gone again.
pub struct Prepared<'i> {
    building: Building<'i>,
}

/// A tree that runs.
#[derive(Debug)]
pub struct Running {
    pid: i32,
    serving: Option<Serving>,
}

impl Running {
    /// The root's pid: a child of this process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What serves its memory, if not all of that is there yet.
    pub fn serving(&mut self) -> Option<Serving> {
        self.serving.take()
    }
}

/// A tree being built; killed on drop. Bound to the thread that traces it.
struct Building<'i> {
    image: &'i Image,
    opener: Opener<'i>,
    /// Of each task the threads that are traced, the leader first.
    traced: Vec<Vec<Tid>>,
    /// Whether the root was made.
    born: bool,
    /// While tasks receive contents.
    feeds: Option<Feeds>,
    done: bool,
    /// Serves memory that comes later.
    serving: Option<Serving>,
    _bound_to_thread: PhantomData<*const ()>,
}

/// Builds everything of a plan. `progress` is told of bytes written into files that are made again.
pub fn prepare<'i>(
    image: &'i Image,
    plan_: &Plan,
    progress: Option<&'i (dyn Fn(u64) + Sync)>,
) -> Result<Prepared<'i>> {
    let title = image.tasks[0].title();
    let mut building = Building {
        image,
        opener: Opener::new(image, &plan_.options, progress),
        traced: vec![Vec::new(); image.tasks.len()],
        born: false,
        feeds: None,
        done: false,
        serving: None,
        _bound_to_thread: PhantomData,
    };
    directory::make(&mut building.opener)?;
    sysv::make(&mut building.opener)?;
    let fds = plan_.opens.iter().map(|open| building.opener.open(open)).collect::<Result<Vec<_>>>()?;
    let slot = |id| plan_.opens.iter().position(|o| *o == Open::Description(id));
    let slots = |id| slot(id).map(|slot| fds[slot].as_fd());
    unix::deliver_all(&mut building.opener, &slots)?;
    match Arena::map(plan_.place, &title)? {
        Some(arena) => building.build(plan_, arena, &fds, &slots)?,
        None => {
            // Another restore of this process, or its own memory, has the place by now.
            let mut attempts = ATTEMPTS;
            loop {
                let host = Host::probe()?;
                let again = plan(image, &host, &plan_.options)?;
                if let Some(arena) = Arena::map(again.place, &title)? {
                    building.build(&again, arena, &fds, &slots)?;
                    break;
                }
                attempts -= 1;
                if attempts == 0 {
                    return Err(Error::Open { what: title, call: "mmap", errno: Errno::EEXIST });
                }
            }
        }
    }
    Ok(Prepared { building })
}

impl Prepared<'_> {
    /// The root's pid.
    pub fn pid(&self) -> i32 {
        self.building.image.tasks[0].pid.0
    }

    /// The process group of the tree that was in the foreground of the terminal it was run on.
    pub fn foreground(&self) -> Option<i32> {
        terminal::in_front(self.building.image).map(|group| group.0)
    }

    /// What differs from the dump besides the notes of the plan, in words: what showed only when it was made.
    pub fn notes(&self) -> &[String] {
        &self.building.opener.notes
    }

    /// Lets the tree run, or leaves it stopped as by SIGSTOP.
    pub fn resume(mut self, stopped: bool) -> Running {
        let pid = self.pid();
        self.building.release(stopped);
        Running { pid, serving: self.building.serving.take() }
    }

    /// Takes down everything that was made.
    pub fn abort(self) {
        drop(self);
    }
}

/// A context of the arena that a traced thread runs in.
#[derive(Clone, Copy)]
struct Seat<'p> {
    tid: Tid,
    context: usize,
    task: usize,
    script: &'p Script,
    placed: Placed,
}

impl Building<'_> {
    fn build(
        &mut self,
        plan: &Plan,
        mut arena: Arena,
        fds: &[OwnedFd],
        slots: unix::Slots<'_>,
    ) -> Result<()> {
        let layout = layout(&plan.begin, &plan.births, &plan.helpers, &plan.tasks);
        self.fill(plan, &layout, &mut arena, fds);
        let built = self.build_in(plan, &layout, &mut arena, slots);
        if built.is_err() {
            self.take_down(plan, &layout, &mut arena);
        }
        // What could not be decoded is why a task failed.
        self.fed().and(built)
    }

    /// Ends all that was made. Those that are not traced yet wait for shared words: they find them set, go on to
    /// the end of their scripts, notice that nobody traces them, and exit.
    fn take_down(&mut self, plan: &Plan, layout: &Layout, arena: &mut Arena) {
        self.feeds.iter().for_each(Feeds::stop);
        self.kill_traced();
        for word in [word::ROOT, word::THREADS, word::BORN, word::TURNS, word::JOINED, word::TRACED] {
            arena.release(word);
        }
        let deadline = Instant::now() + LAST_ONES;
        let alive = |pid: &i32| {
            torpor_kernel::status::of_process(Pid(*pid)).is_ok_and(|s| !matches!(s.state, 'Z' | 'X'))
        };
        // One that lives may make another.
        while made(plan, layout, arena).iter().any(alive) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn build_in(
        &mut self,
        plan: &Plan,
        layout: &Layout,
        arena: &mut Arena,
        slots: unix::Slots<'_>,
    ) -> Result<()> {
        self.give_birth(plan, layout, arena)?;
        late::make(&mut self.opener, Moment::Birth)?;
        unix::deliver_late(&mut self.opener, slots, Moment::Birth)?;
        let count = plan.tasks.first().map_or(0, |t| t.phases.len());
        for phase in 0..count {
            self.opener.wanted()?;
            for task in 0..plan.tasks.len() {
                let seat = self.seat(plan, layout, task, phase);
                self.start(seat, arena)?;
            }
            for task in 0..plan.tasks.len() {
                let seat = self.seat(plan, layout, task, phase);
                self.finish(seat, plan, arena)?;
            }
            if phase == 0 {
                self.fed()?;
                self.check_crew(plan, layout, arena)?;
                self.serve(plan, layout, arena)?;
            }
            let after = plan.tasks[0].threads_after;
            if phase == after {
                for task in &plan.tasks {
                    for thread in self.image.tasks[task.index].other_threads() {
                        self.trace(task.index, thread.tid.0)?;
                    }
                }
                late::make(&mut self.opener, Moment::Threads)?;
                unix::deliver_late(&mut self.opener, slots, Moment::Threads)?;
                io_uring::register_all(&mut self.opener, slots)?;
                arena.go(word::THREADS);
            } else if phase == after + 1 {
                self.finish_threads(plan, layout, arena)?;
            }
        }
        for task in &plan.tasks {
            self.outside(task)?;
        }
        self.opener.wanted()?;
        inode::seal(&self.opener)?;
        rules::put_all_back(&mut self.opener)?;
        self.complete_all(plan, layout, arena)?;
        io_uring::settle(&mut self.opener)?;
        sysv::settle(&mut self.opener)?;
        mqueue::settle(&mut self.opener)?;
        Ok(())
    }

    /// Ends the feeding of tasks: all have their contents, or have failed.
    fn fed(&mut self) -> Result<()> {
        self.feeds.take().map_or(Ok(()), Feeds::finish)
    }

    /// Writes contexts and scripts.
    fn fill(&self, plan: &Plan, layout: &Layout, arena: &mut Arena, fds: &[OwnedFd]) {
        let around = Surroundings {
            base: plan.place.arena,
            shared: 0,
            contexts: SHARED,
            stacks: layout.stacks,
            stack_size: STACK,
            descriptor: &|slot| fds.get(slot as usize).map_or(-1, AsRawFd::as_raw_fd),
        };
        for (phase, placed) in plan.begin.iter().zip(&layout.begin) {
            phase.script.encode(*placed, &around, arena.bytes());
        }
        let births = plan.births.iter().chain(&plan.helpers);
        for (script, placed) in births.clone().zip(layout.births.iter().chain(&layout.helpers)) {
            script.encode(*placed, &around, arena.bytes());
        }
        let base = |placed: Placed, script: &Script, tgid: i32, tid: i32| Context {
            base: plan.place.arena,
            ops: placed.ops,
            count: script.steps().len() as u32,
            tgid,
            tid,
            signal: plan.trap,
            heal: Heal { kind: heal::EXIT, ..Heal::default() },
            ..Context::default()
        };
        for (i, (node, script)) in plan.lineage.nodes.iter().zip(&plan.births).enumerate() {
            let (script, placed) =
                if i == 0 { (&plan.begin[0].script, layout.begin[0]) } else { (script, layout.births[i]) };
            arena.set_context(i, &base(placed, script, node.pid, node.pid));
        }
        // A trap of theirs would be a failure.
        for (i, (script, placed)) in plan.helpers.iter().zip(&layout.helpers).enumerate() {
            arena.set_context(plan.first_helper() + i, &base(*placed, script, 0, 0));
        }
        for (task, (phases, threads, stops)) in plan.tasks.iter().zip(&layout.tasks) {
            for (phase, placed) in task.phases.iter().zip(phases) {
                phase.script.encode(*placed, &around, arena.bytes());
            }
            task.stops.encode(*stops, &around, arena.bytes());
            let image = &self.image.tasks[task.index];
            for (n, (script, placed)) in task.threads.iter().zip(threads).enumerate() {
                script.encode(*placed, &around, arena.bytes());
                let tid = image.other_threads()[n].tid.0;
                let context = base(*placed, script, image.pid.0, tid);
                arena.set_context(task.first_thread as usize + n, &context);
            }
        }
    }

    fn seat<'p>(&self, plan: &'p Plan, layout: &Layout, task: usize, phase: usize) -> Seat<'p> {
        Seat {
            tid: self.traced[task][0],
            context: task,
            task,
            script: &plan.tasks[task].phases[phase].script,
            placed: layout.tasks[task].0[phase],
        }
    }

    /// From here on the thread dies when we do.
    fn trace(&mut self, task: usize, tid: i32) -> Result<()> {
        ptrace::seize(Tid(tid), ptrace::OPTION_SYSGOOD | ptrace::OPTION_EXITKILL)
            .map_err(Error::kernel(self.image.tasks[task].title()))?;
        self.traced[task].push(Tid(tid));
        Ok(())
    }

    fn cont(&self, tid: Tid, signal: i32) -> Result<()> {
        ptrace::cont(tid, signal).map_err(Error::kernel(format!("thread {tid}")))
    }

    /// Sends a thread that stands at its trap into the next script; an empty one needs no sending.
    fn start(&self, seat: Seat<'_>, arena: &mut Arena) -> Result<()> {
        if seat.script.is_empty() {
            return Ok(());
        }
        let context = Context {
            ops: seat.placed.ops,
            count: seat.script.steps().len() as u32,
            state: state::RUNNING,
            command: command::RUN,
            ..arena.context(seat.context)
        };
        arena.set_context(seat.context, &context);
        self.cont(seat.tid, 0)
    }

    /// Waits until a thread is through with its script.
    fn finish(&self, seat: Seat<'_>, plan: &Plan, arena: &mut Arena) -> Result<()> {
        if seat.script.is_empty() {
            return Ok(());
        }
        let title = || self.image.tasks[seat.task].title();
        loop {
            match ptrace::wait(seat.tid).map_err(Error::kernel(title()))? {
                // It may be sent by others, too: by the end of a child that tells of it by this signal.
                Stop::Signal(signal)
                    if signal == plan.trap && arena.context(seat.context).state != state::RUNNING =>
                {
                    break;
                }
                Stop::Signal(signal) if ptrace::is_fault(signal) => {
                    return Err(self.died(seat.task, &format!("signal {signal} in the executor")));
                }
                Stop::Exited(code) => return Err(self.died(seat.task, &format!("exit code {code}"))),
                Stop::Killed(signal) => return Err(self.died(seat.task, &format!("signal {signal}"))),
                Stop::Signal(_) | Stop::Syscall | Stop::Event { .. } => self.cont(seat.tid, 0)?,
            }
        }
        if arena.context(seat.context).state == state::DONE {
            return Ok(());
        }
        Err(self.failure(&title(), seat.script, seat.placed, arena, seat.context))
    }

    fn finish_threads(&self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        for task in &plan.tasks {
            let first = self.traced[task.index].len() - task.threads.len();
            for (n, script) in task.threads.iter().enumerate() {
                let seat = Seat {
                    tid: self.traced[task.index][first + n],
                    context: task.first_thread as usize + n,
                    task: task.index,
                    script,
                    placed: layout.tasks[task.index].1[n],
                };
                self.finish(seat, plan, arena)?;
            }
        }
        Ok(())
    }

    fn died(&self, task: usize, how: &str) -> Error {
        Error::Died { task: self.image.tasks[task].title(), how: how.to_owned() }
    }

    /// What is set from outside, in /proc.
    fn outside(&self, plan: &TaskPlan) -> Result<()> {
        let task = &self.image.tasks[plan.index];
        let write = |name: &str, text: String| {
            std::fs::write(format!("/proc/{}/{name}", task.pid), text).map_err(|e| {
                let what = format!("{}: its {name}", task.title());
                match Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)) {
                    errno @ (Errno::EACCES | Errno::EPERM) => {
                        let remedy = "run torpor with CAP_SYS_RESOURCE";
                        Error::Permission { what, call: "write", errno, remedy }
                    }
                    errno => Error::Open { what, call: "write", errno },
                }
            })
        };
        if let Some(value) = plan.oom_score_adj {
            write("oom_score_adj", value.to_string())?;
        }
        if let Some(value) = plan.coredump_filter {
            write("coredump_filter", format!("{value:#x}"))?;
        }
        Ok(())
    }

    /// Lets go.
    fn release(&mut self, stopped: bool) {
        self.done = true;
        self.opener.keep();
        // Ends of ours would keep the tree from seeing that nobody is at the other end.
        self.opener.let_go();
        terminal::set_up(&self.opener);
        if stopped {
            for task in self.image.tasks.iter().filter(|t| !t.stopped) {
                // SAFETY: kill takes numbers only. The threads take the signal once they are let go.
                unsafe { libc::kill(task.pid.0, libc::SIGSTOP) };
            }
        }
        // Should we die between two of these, those already let go must not be killed with the others.
        for tid in self.traced.iter().flatten() {
            let _gone = ptrace::set_options(*tid, 0);
        }
        if let Some(serving) = &self.serving {
            serving.go();
        }
        for tid in self.traced.iter().flatten() {
            // One that was killed meanwhile needs no letting go.
            let _gone = ptrace::detach(*tid, 0);
        }
        for task in self.image.tasks.iter().filter(|t| stopped || t.stopped) {
            for _ in 0..10_000 {
                let status = torpor_kernel::status::of_process(Pid(task.pid.0));
                if status.map_or(true, |s| s.state != 'R' && s.state != 'S') {
                    break;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

/// Every process that has been made, as the results in the arena tell.
fn made(plan: &Plan, layout: &Layout, arena: &mut Arena) -> Vec<i32> {
    let mut all = vec![plan.lineage.nodes[0].pid];
    let scripts = plan.births.iter().chain(&plan.helpers).zip(layout.births.iter().chain(&layout.helpers));
    for (script, placed) in scripts {
        let outcome = script.outcome(*placed, arena.bytes());
        for (i, step) in script.steps().iter().enumerate().filter(|(_, s)| s.kind == kind::SPAWN) {
            let result = outcome.result(OpId(i as u32));
            if result > 0 && result == step.expected {
                all.push(result as i32);
            }
        }
    }
    all
}

impl Building<'_> {
    /// Ends everyone who is traced, and collects the root.
    fn kill_traced(&mut self) {
        if self.done || !std::mem::replace(&mut self.born, false) {
            return;
        }
        let root = self.image.tasks[0].pid.0;
        let traced = self.image.tasks.iter().zip(&self.traced).filter(|(_, t)| !t.is_empty());
        for pid in traced.map(|(task, _)| task.pid.0).chain([root]) {
            // SAFETY: kill takes numbers only; who is traced here, and the root, nobody else can have reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        // One that has become another user's already only its tracer may end.
        for tid in self.traced.iter().filter_map(|t| t.first()) {
            let _gone = ptrace::kill(*tid);
        }
        for tid in self.traced.iter().rev().flat_map(|t| t.iter().rev()) {
            while let Ok(stop) = ptrace::wait(*tid) {
                if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                    break;
                }
            }
        }
        // Never traced, if that failed; else there is nothing left to wait for.
        let _reaped = ptrace::wait(Tid(root));
        self.traced.iter_mut().for_each(Vec::clear);
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        self.kill_traced();
    }
}
