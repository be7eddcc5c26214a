//! Running a plan: building the tasks, stopped, until nothing can fail any more; then letting them go.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::Image;
use torpor_image::task::Task;
use torpor_image::thread::Thread;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::ptrace::{self, Stop};
use torpor_parasite::script::{OpId, Placed, Script, Surroundings};
use torpor_parasite::wire::{Context, Heal, STACK, command, heal, kind, state};

use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::open::Opener;
use crate::plan::{GO_TASK, GO_THREADS, Layout, Plan, SHARED, TaskPlan, layout, plan};
use crate::{birth, inode, terminal};

/// How often a plan is made anew when its place in our memory was taken meanwhile.
const ATTEMPTS: u32 = 8;

/// A tree that stands complete but for its first instruction. Dropped, it is gone again.
pub struct Prepared<'i> {
    building: Building<'i>,
}

/// A tree that runs.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    pid: i32,
}

impl Running {
    /// The root's pid: a child of this process.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

/// A task being built; killed on drop. Bound to the thread that traces it.
struct Building<'i> {
    image: &'i Image,
    opener: Opener<'i>,
    task: &'i Task,
    /// Threads that are traced, the leader first.
    traced: Vec<Tid>,
    born: bool,
    done: bool,
    _bound_to_thread: PhantomData<*const ()>,
}

/// Builds everything of a plan. `progress` is told of bytes written into files that are made again.
pub fn prepare<'i>(
    image: &'i Image,
    plan_: &Plan,
    progress: Option<&'i (dyn Fn(u64) + Sync)>,
) -> Result<Prepared<'i>> {
    let task_plan = &plan_.tasks[0];
    let task = &image.tasks[task_plan.index];
    let title = task.title();
    let mut building = Building {
        image,
        opener: Opener::new(image, plan_.options.accept_changed, progress),
        task,
        traced: Vec::new(),
        born: false,
        done: false,
        _bound_to_thread: PhantomData,
    };
    let fds = plan_.opens.iter().map(|open| building.opener.open(open)).collect::<Result<Vec<_>>>()?;
    match Arena::map(task_plan, &title)? {
        Some(arena) => building.build(task_plan, arena, &fds)?,
        None => {
            // Another restore of this process, or its own memory, has the place by now.
            let mut attempts = ATTEMPTS;
            loop {
                let host = Host::probe()?;
                let again = plan(image, &host, &plan_.options)?;
                if let Some(arena) = Arena::map(&again.tasks[0], &title)? {
                    building.build(&again.tasks[0], arena, &fds)?;
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
        self.building.task.pid.0
    }

    /// Lets the tree run, or leaves it stopped as by SIGSTOP.
    pub fn resume(mut self, stopped: bool) -> Running {
        let pid = self.pid();
        self.building.release(stopped);
        Running { pid }
    }

    /// Takes down everything that was made.
    pub fn abort(self) {
        drop(self);
    }
}

impl Building<'_> {
    fn build(&mut self, plan: &TaskPlan, mut arena: Arena, fds: &[OwnedFd]) -> Result<()> {
        let layout = layout(&plan.phases, &plan.threads, self.task.threads.len());
        self.fill(plan, &layout, &mut arena, fds);
        birth::spawn(plan, self.task, arena.context_address(0), plan.arena + layout.stacks)?;
        self.born = true;
        self.trace(self.task.pid.0)?;
        arena.go(GO_TASK);
        for (i, phase) in plan.phases.iter().enumerate() {
            if i > 0 {
                let context = Context {
                    ops: layout.phases[i].ops,
                    count: phase.script.steps().len() as u32,
                    state: state::RUNNING,
                    command: command::RUN,
                    ..arena.context(0)
                };
                arena.set_context(0, &context);
                self.cont(0)?;
            }
            self.finish_script(0, plan, &phase.script, layout.phases[i], &mut arena)?;
            if i == plan.threads_after {
                for thread in &self.task.threads[1..] {
                    self.trace(thread.tid.0)?;
                }
                arena.go(GO_THREADS);
            } else if i == plan.threads_after + 1 {
                for n in 1..self.task.threads.len() {
                    self.finish_script(n, plan, &plan.threads[n - 1], layout.threads[n - 1], &mut arena)?;
                }
            }
        }
        self.outside(plan)?;
        inode::seal(&self.opener)?;
        self.unmap(plan, &arena)?;
        for (i, thread) in self.task.threads.iter().enumerate() {
            self.set_state(self.traced[i], thread)?;
        }
        Ok(())
    }

    /// Writes contexts and scripts.
    fn fill(&self, plan: &TaskPlan, layout: &Layout, arena: &mut Arena, fds: &[OwnedFd]) {
        let around = Surroundings {
            base: plan.arena,
            shared: 0,
            contexts: SHARED,
            stacks: layout.stacks,
            stack_size: STACK,
            descriptor: &|slot| fds.get(slot as usize).map_or(-1, AsRawFd::as_raw_fd),
        };
        for (phase, placed) in plan.phases.iter().zip(&layout.phases) {
            phase.script.encode(*placed, &around, arena.bytes());
        }
        for (script, placed) in plan.threads.iter().zip(&layout.threads) {
            script.encode(*placed, &around, arena.bytes());
        }
        for (n, thread) in self.task.threads.iter().enumerate() {
            let (script, placed) = if n == 0 {
                (&plan.phases[0].script, layout.phases[0])
            } else {
                (&plan.threads[n - 1], layout.threads[n - 1])
            };
            let context = Context {
                base: plan.arena,
                ops: placed.ops,
                count: script.steps().len() as u32,
                tgid: self.task.pid.0,
                tid: thread.tid.0,
                signal: plan.trap,
                heal: Heal { kind: heal::EXIT, ..Heal::default() },
                ..Context::default()
            };
            arena.set_context(n, &context);
        }
    }

    /// From here on the task dies when we do.
    fn trace(&mut self, tid: i32) -> Result<()> {
        ptrace::seize(Tid(tid), ptrace::OPTION_SYSGOOD | ptrace::OPTION_EXITKILL)
            .map_err(Error::kernel(self.task.title()))?;
        self.traced.push(Tid(tid));
        Ok(())
    }

    fn cont(&self, n: usize) -> Result<()> {
        ptrace::cont(self.traced[n], 0).map_err(Error::kernel(self.task.title()))
    }

    /// Waits until thread `n` is through with `script`.
    fn finish_script(
        &self,
        n: usize,
        plan: &TaskPlan,
        script: &Script,
        placed: Placed,
        arena: &mut Arena,
    ) -> Result<()> {
        loop {
            match ptrace::wait(self.traced[n]).map_err(Error::kernel(self.task.title()))? {
                Stop::Signal(signal) if signal == plan.trap => break,
                Stop::Signal(signal) if ptrace::is_fault(signal) => {
                    return Err(self.died(&format!("signal {signal} in the executor")));
                }
                Stop::Exited(code) => return Err(self.died(&format!("exit code {code}"))),
                Stop::Killed(signal) => return Err(self.died(&format!("signal {signal}"))),
                Stop::Signal(_) | Stop::Syscall | Stop::Event { .. } => self.cont(n)?,
            }
        }
        let context = arena.context(n);
        if context.state == state::DONE {
            return Ok(());
        }
        let failed = context.failed as usize;
        let result = script.outcome(placed, arena.bytes()).result(OpId(context.failed));
        let errno = Errno::from_raw(-result as i32);
        let purpose =
            script.steps().get(failed).map_or_else(|| "state".to_owned(), |s| s.purpose.to_string());
        let spawns = || script.steps()[..failed].iter().filter(|s| s.kind == kind::SPAWN).count();
        if script.steps().get(failed).is_some_and(|s| s.kind == kind::SPAWN)
            && let Some(thread) = self.task.threads.get(1 + spawns())
        {
            return Err(birth::failure(self.task, thread.tid.0, errno));
        }
        if result >= 0 {
            // A read that came up short: the file is not what it was.
            return Err(Error::Script {
                task: self.task.title(),
                purpose: format!("{purpose}: unexpected result {result}"),
                errno: Errno::EIO,
            });
        }
        Err(Error::Script { task: self.task.title(), purpose, errno })
    }

    fn died(&self, how: &str) -> Error {
        Error::Died { task: self.task.title(), how: how.to_owned() }
    }

    /// What is set from outside, in /proc.
    fn outside(&self, plan: &TaskPlan) -> Result<()> {
        let pid = self.task.pid;
        let write = |name: &str, text: String| {
            std::fs::write(format!("/proc/{pid}/{name}"), text).map_err(|e| Error::Permission {
                what: format!("{}: its {name}", self.task.title()),
                call: "write",
                errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
                remedy: "run torpor with CAP_SYS_RESOURCE",
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

    /// Makes the leader unmap executor and arena, by an instruction of its own memory.
    fn unmap(&self, plan: &TaskPlan, arena: &Arena) -> Result<()> {
        let fail = || Error::kernel(self.task.title());
        let leader = self.traced[0];
        let (start, length) = arena.range();
        let home = &self.task.leader().registers;
        let regs =
            home.with_call(plan.last_call, home.sp(), libc::SYS_munmap as u64, [start, length, 0, 0, 0, 0]);
        ptrace::set_registers(leader, &regs).map_err(fail())?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::resume_to_syscall(leader, 0).map_err(fail())?;
            match ptrace::wait(leader).map_err(fail())? {
                Stop::Syscall => stops += 1,
                Stop::Exited(code) => return Err(self.died(&format!("exit code {code}"))),
                Stop::Killed(signal) => return Err(self.died(&format!("signal {signal}"))),
                Stop::Signal(signal) if ptrace::is_fault(signal) => {
                    return Err(self.died(&format!("signal {signal} on leaving the executor")));
                }
                Stop::Signal(_) | Stop::Event { .. } => {}
            }
        }
        match ptrace::registers(leader).map_err(fail())?.result() {
            0 => Ok(()),
            e => Err(Error::Script {
                task: self.task.title(),
                purpose: "unmapping the executor".into(),
                errno: Errno::from_raw(-e as i32),
            }),
        }
    }

    /// Vector state, registers and mask: the last of all, from outside.
    fn set_state(&self, tid: Tid, thread: &Thread) -> Result<()> {
        let fail = || Error::kernel(format!("{}: thread {tid}", self.task.title()));
        ptrace::set_xstate(tid, &thread.xstate).map_err(fail())?;
        ptrace::set_registers(tid, &thread.registers.restarted()).map_err(fail())?;
        ptrace::set_signal_mask(tid, thread.signals.mask).map_err(fail())
    }

    /// Lets go.
    fn release(&mut self, stopped: bool) {
        self.done = true;
        self.opener.keep();
        // Ends of ours would keep the tree from seeing that nobody is at the other end.
        self.opener.let_go();
        for (fd, termios) in &self.opener.terminals {
            terminal::set_up(fd, termios);
        }
        let pid = self.task.pid.0;
        if stopped || self.task.stopped {
            // SAFETY: kill takes numbers only. The threads take the signal once they are let go.
            unsafe { libc::kill(pid, libc::SIGSTOP) };
        }
        // Should we die between two of these, those already let go must not be killed with the others.
        for tid in &self.traced {
            let _gone = ptrace::set_options(*tid, 0);
        }
        for tid in &self.traced {
            // One that was killed meanwhile needs no letting go.
            let _gone = ptrace::detach(*tid, 0);
        }
        if stopped || self.task.stopped {
            for _ in 0..10_000 {
                if torpor_kernel::status::of_process(Pid(pid))
                    .map_or(true, |s| s.state != 'R' && s.state != 'S')
                {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        }
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        let _image = self.image;
        if self.done || !self.born {
            return;
        }
        // SAFETY: kill takes numbers only; the pid is a child of ours that nobody else can have reaped.
        unsafe { libc::kill(self.task.pid.0, libc::SIGKILL) };
        for tid in self.traced.iter().rev() {
            while let Ok(stop) = ptrace::wait(*tid) {
                if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                    break;
                }
            }
        }
        // Never traced, if that failed; else there is nothing left to wait for.
        let _reaped = ptrace::wait(Tid(self.task.pid.0));
    }
}
