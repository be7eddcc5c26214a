//! The last steps of tasks that are built: out of the executor, into their registers, into job-control stops.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_image::thread::Thread;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::ptrace::{self, Stop};

use super::{Building, PATIENCE, Seat};
use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::plan::{Layout, Plan, TaskPlan};

impl Building<'_> {
    /// The last of all tasks: they leave the executor for good, have their registers, and stand if they are to stand.
    pub(super) fn complete_all(&mut self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        // Children before their parents, who may have to be asked about children that stand.
        if plan.tasks.iter().any(|t| !t.stops.is_empty()) {
            return plan
                .tasks
                .iter()
                .rev()
                .try_for_each(|task| self.complete(plan, layout, std::slice::from_ref(task), arena));
        }
        self.complete(plan, layout, &plan.tasks, arena)
    }

    /// The same of some tasks, each step by all of them before the next.
    fn complete(
        &mut self,
        plan: &Plan,
        layout: &Layout,
        tasks: &[TaskPlan],
        arena: &mut Arena,
    ) -> Result<()> {
        for task in tasks {
            let index = task.index;
            let stops = Seat {
                tid: self.traced[index][0],
                context: index,
                task: index,
                script: &task.stops,
                placed: layout.tasks[index].2,
            };
            self.start(stops, arena)?;
            self.finish(stops, plan, arena)?;
            if let Some(status) = self.image.tasks[index].leader_ended {
                self.end_leader(plan, index, status)?;
            }
        }
        let owners = || tasks.iter().filter(|t| t.owns_memory);
        owners().try_for_each(|task| self.begin_unmap(task, arena))?;
        owners().try_for_each(|task| {
            self.wait_for_call(task)?;
            ptrace::resume_to_syscall(self.traced[task.index][0], 0).map_err(self.fail(task.index))
        })?;
        owners().try_for_each(|task| self.end_unmap(task))?;
        for task in tasks.iter().rev() {
            let image = &self.image.tasks[task.index];
            for (tid, thread) in self.traced[task.index].iter().zip(&image.threads) {
                self.set_state(task.index, *tid, thread)?;
            }
            if image.stopped {
                self.stop(task.index)?;
            }
        }
        Ok(())
    }

    /// Lets a first thread end that had ended at the dump; others go on.
    fn end_leader(&mut self, plan: &Plan, index: usize, status: i32) -> Result<()> {
        let leader = self.traced[index].remove(0);
        let title = self.image.tasks[index].title();
        let registers = ptrace::registers(leader).map_err(Error::kernel(title.clone()))?;
        // The vdso of the process has a system call instruction.
        let status = (status >> 8) as u64 & 0xff;
        let exit = [status, 0, 0, 0, 0, 0];
        let exit =
            registers.with_call(plan.tasks[index].last_call, registers.sp(), libc::SYS_exit as u64, exit);
        ptrace::set_registers(leader, &exit).map_err(Error::kernel(title.clone()))?;
        self.cont(leader, 0)?;
        // A tracer is told of the end of a first thread only after that of all others.
        let deadline = Instant::now() + PATIENCE;
        let pid = Pid(self.image.tasks[index].pid.0);
        while torpor_kernel::status::of_task(pid, leader).is_ok_and(|s| s.state != 'Z') {
            if Instant::now() > deadline {
                return Err(self.died(index, "its first thread does not end"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    fn fail(&self, task: usize) -> impl FnOnce(torpor_kernel::Error) -> Error + use<> {
        Error::kernel(self.image.tasks[task].title())
    }

    /// Makes a thread unmap executor and arena, by an instruction of the task's own memory.
    fn begin_unmap(&self, plan: &TaskPlan, arena: &Arena) -> Result<()> {
        let leader = self.traced[plan.index][0];
        let (start, length) = arena.range();
        let home = &self.image.tasks[plan.index].leader().registers;
        let regs =
            home.with_call(plan.last_call, home.sp(), libc::SYS_munmap as u64, [start, length, 0, 0, 0, 0]);
        ptrace::set_registers(leader, &regs).map_err(self.fail(plan.index))?;
        ptrace::resume_to_syscall(leader, 0).map_err(self.fail(plan.index))
    }

    /// Waits for the stop before or after the call.
    fn wait_for_call(&self, plan: &TaskPlan) -> Result<()> {
        let leader = self.traced[plan.index][0];
        loop {
            match ptrace::wait(leader).map_err(self.fail(plan.index))? {
                Stop::Syscall => return Ok(()),
                Stop::Exited(code) => return Err(self.died(plan.index, &format!("exit code {code}"))),
                Stop::Killed(signal) => return Err(self.died(plan.index, &format!("signal {signal}"))),
                Stop::Signal(signal) if ptrace::is_fault(signal) => {
                    let how = format!("signal {signal} on leaving the executor");
                    return Err(self.died(plan.index, &how));
                }
                Stop::Signal(_) | Stop::Event { .. } => {}
            }
            ptrace::resume_to_syscall(leader, 0).map_err(self.fail(plan.index))?;
        }
    }

    fn end_unmap(&self, plan: &TaskPlan) -> Result<()> {
        self.wait_for_call(plan)?;
        match ptrace::registers(self.traced[plan.index][0]).map_err(self.fail(plan.index))?.result() {
            0 => Ok(()),
            e => Err(Error::Script {
                task: self.image.tasks[plan.index].title(),
                purpose: "unmapping the executor".into(),
                errno: Errno::from_raw(-e as i32),
            }),
        }
    }

    /// Vector state, registers and mask: the last of all, from outside.
    fn set_state(&self, task: usize, tid: Tid, thread: &Thread) -> Result<()> {
        let fail = || Error::kernel(format!("{}: thread {tid}", self.image.tasks[task].title()));
        ptrace::set_xstate(tid, &thread.xstate).map_err(fail())?;
        ptrace::set_registers(tid, &thread.registers.restarted()).map_err(fail())?;
        ptrace::set_signal_mask(tid, thread.signals.mask).map_err(fail())
    }

    /// Stops a task by job control, traced as it is: one thread takes the signal, which stops all, before the others
    /// are let go into that stop. Nothing of the program runs.
    fn stop(&self, index: usize) -> Result<()> {
        let task = &self.image.tasks[index];
        let fail = || Error::kernel(format!("{}: stopping it", task.title()));
        // The parent has yet to ask for the stop: by the signal it was, if nobody handles that by now.
        let usable = |signal: i32| {
            let action = task.signals.actions.get(signal as usize - 1);
            [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal)
                && action.is_some_and(|a| a.handler == 0)
                && task.leader().signals.mask & (1 << (signal - 1)) == 0
        };
        let signal = if usable(task.stop_report.max(1)) { task.stop_report } else { libc::SIGSTOP };
        let (first, others) =
            self.traced[index].split_first().ok_or_else(|| self.died(index, "no thread"))?;
        // SAFETY: tgkill takes numbers only.
        unsafe { libc::syscall(libc::SYS_tgkill, task.pid.0, first.0, signal) };
        let mut deliver = 0;
        loop {
            ptrace::cont(*first, deliver).map_err(fail())?;
            match ptrace::wait(*first).map_err(fail())? {
                Stop::Signal(got) if got == signal => deliver = signal,
                stop if stop.group_stop().is_some() => break,
                Stop::Exited(_) | Stop::Killed(_) => return Err(self.died(index, "it was killed")),
                _ => deliver = 0,
            }
        }
        for tid in others {
            loop {
                ptrace::cont(*tid, 0).map_err(fail())?;
                match ptrace::wait(*tid).map_err(fail())? {
                    stop if stop.group_stop().is_some() => break,
                    Stop::Exited(_) | Stop::Killed(_) => return Err(self.died(index, "it was killed")),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
