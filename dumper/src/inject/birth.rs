//! Making copies of the processes that are being visited (`snapshot`): the tracer sees each child into the world.
//!
//! A child of a traced thread is traced from its birth by the same tracer, with the same options, and stands before
//! its first instruction (ptrace(2), `PTRACE_O_TRACECLONE`). All processes take each step before the next one is
//! taken by any, so that the kernel copies their page tables side by side.

use torpor_kernel::ids::{RemoteAddr, Tid};
use torpor_kernel::memory::Memory;
use torpor_kernel::ptrace::{self, EVENT_CLONE, EVENT_VFORK, Stop};
use torpor_parasite::script::{Outcome, Placed, Surroundings};
use torpor_parasite::wire::{Context, Heal, STACK, command, heal, state};

use super::infected::Infected;
use super::sweep;
use crate::error::{Error, Result};
use crate::freeze::OPTIONS;
use crate::snapshot::{Birth, CHILDREN, Snapshot};

/// How a process is traced that is to have children.
const FERTILE: u32 = OPTIONS | ptrace::OPTION_VFORK | ptrace::OPTION_CLONE;

/// Where the scripts of a birth lie in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nursery {
    pub(super) contexts: u64,
    pub(super) stacks: u64,
    pub(super) process: Placed,
    pub(super) children: [Placed; CHILDREN],
    pub(super) end: u64,
}

impl Nursery {
    pub(super) fn at(at: u64, birth: &Birth) -> Self {
        let contexts = at.next_multiple_of(64);
        let stacks = (contexts + (CHILDREN * size_of::<Context>()) as u64).next_multiple_of(64);
        let process = birth.process.place(stacks + CHILDREN as u64 * STACK);
        let first = birth.children[0].place(process.end);
        let copy = birth.children[1].place(first.end);
        Nursery { contexts, stacks, process, children: [first, copy], end: copy.end }
    }

    /// Writes the scripts, and the contexts of the children, which exit when nobody traces them. `base` is the address
    /// of the arena in the process.
    pub(super) fn fill(&self, birth: &Birth, base: u64, arena: &mut [u8]) {
        let around = Surroundings {
            base,
            shared: 0,
            contexts: self.contexts,
            stacks: self.stacks,
            stack_size: STACK,
            descriptor: &|_| -1,
        };
        birth.process.encode(self.process, &around, arena);
        for (i, (script, placed)) in birth.children.iter().zip(self.children).enumerate() {
            script.encode(placed, &around, arena);
            let context = Context {
                base,
                ops: placed.ops,
                count: script.steps().len() as u32,
                heal: Heal { kind: heal::EXIT, ..Heal::default() },
                ..Context::default()
            };
            let at = self.contexts as usize + i * size_of::<Context>();
            arena[at..at + size_of::<Context>()].copy_from_slice(context.bytes());
        }
    }
}

/// How far a birth has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The first child, which makes the copy and ends.
    first: Option<Snapshot>,
    pub(super) copy: Option<Snapshot>,
    /// The process is through with its script already.
    done: bool,
}

/// Makes a copy of every process that is to have one.
pub(super) fn run<'a>(all: &mut [Infected<'a>]) {
    let step = |all: &mut [Infected<'a>], step: fn(&mut Infected<'a>) -> Result<()>| {
        sweep(all, |i: &mut Infected<'a>| if i.birth.is_some() { step(i) } else { Ok(()) });
    };
    step(all, Infected::order);
    step(all, Infected::see_first);
    step(all, Infected::bind_first);
    step(all, Infected::see_copy);
    step(all, Infected::end_first);
    step(all, Infected::hold_copy);
}

impl Infected<'_> {
    /// Lets the leader, which stands at the end of its script, run the one that makes the copy.
    fn order(&mut self) -> Result<()> {
        let (birth, nursery) = self.birth.expect("only those that have one");
        let leader = self.threads[0].tid;
        let context = Context {
            ops: nursery.process.ops,
            count: birth.process.steps().len() as u32,
            state: state::RUNNING,
            command: command::RUN,
            ..self.leader_context()
        };
        self.write(self.leader_seat(), context.bytes(), "writing the script of a copy")?;
        ptrace::set_options(leader, FERTILE).map_err(self.kernel("tracing its children"))?;
        ptrace::cont(leader, 0).map_err(self.kernel("running a script in it"))
    }

    fn see_first(&mut self) -> Result<()> {
        let leader = self.threads[0].tid;
        self.progress.first = self.born(leader, EVENT_VFORK)?.map(Snapshot::of);
        match self.progress.first {
            Some(_) => ptrace::cont(leader, 0).map_err(self.kernel("running a script in it")),
            None => {
                self.progress.done = true;
                Ok(())
            }
        }
    }

    /// From here on the children end with us.
    fn bind_first(&mut self) -> Result<()> {
        let Some(first) = &self.progress.first else { return Ok(()) };
        let tid = Tid(first.pid().0);
        self.stand(tid)?;
        ptrace::set_options(tid, FERTILE | ptrace::OPTION_EXITKILL)
            .map_err(self.kernel("tying a copy's parent to us"))?;
        ptrace::cont(tid, 0).map_err(self.kernel("running a copy's parent"))
    }

    fn see_copy(&mut self) -> Result<()> {
        let Some(first) = &self.progress.first else { return Ok(()) };
        let tid = Tid(first.pid().0);
        self.progress.copy = self.born(tid, EVENT_CLONE)?.map(Snapshot::of);
        if self.progress.copy.is_some() {
            ptrace::cont(tid, 0).map_err(self.kernel("running a copy's parent"))?;
        }
        Ok(())
    }

    /// Sees to it that the first child is gone, which the process then collects, and that this is through.
    fn end_first(&mut self) -> Result<()> {
        if let Some(mut first) = self.progress.first.take() {
            let tid = Tid(first.pid().0);
            while let Some(stop) = self.wait_for_born(tid)? {
                let signal = if let Stop::Signal(signal) = stop { signal } else { 0 };
                ptrace::cont(tid, signal).map_err(self.kernel("running a copy's parent"))?;
            }
            first.gone();
        }
        if !self.progress.done {
            self.wait_for_trap(0)?;
        }
        let leader = self.threads[0].tid;
        ptrace::set_options(leader, OPTIONS).map_err(self.kernel("tracing it"))
    }

    fn hold_copy(&mut self) -> Result<()> {
        let (birth, nursery) = self.birth.expect("only those that have one");
        let Some(copy) = &self.progress.copy else {
            let mut arena = vec![0u8; self.arena_length as usize];
            self.memory
                .read_exact_at(RemoteAddr(self.arena), &mut arena)
                .map_err(self.kernel("reading what the scripts left"))?;
            let process: Outcome = birth.process.outcome(nursery.process, &arena);
            let first = birth.children[0].outcome(nursery.children[0], &arena);
            return Err(self.declined(birth.why(&process, &first)));
        };
        let pid = copy.pid();
        self.stand(Tid(pid.0))?;
        copy.expose();
        let Some((start, length)) = self.was_zero else { return Ok(()) };
        let failed = || Error::kernel(pid, "clearing the end of a copied stack");
        let memory = Memory::open(pid, true).map_err(failed())?;
        memory.write_all_at(RemoteAddr(start), &vec![0u8; length as usize]).map_err(failed())
    }

    /// Waits until `parent` has a child; `None` when it is through, or has ended, without one.
    fn born(&mut self, parent: Tid, event: i32) -> Result<Option<Tid>> {
        let is_leader = parent == self.threads[0].tid;
        loop {
            let stop = if is_leader { self.trap_or_event(0)? } else { self.wait_for_born(parent)? };
            let signal = match stop {
                None => return Ok(None),
                Some(Stop::Event { event: seen, .. }) if seen == event => {
                    let child = ptrace::event_message(parent).map_err(self.kernel("making a copy of it"))?;
                    return Ok(Some(Tid(child as i32)));
                }
                Some(Stop::Signal(signal)) if !is_leader => signal,
                Some(_) => 0,
            };
            ptrace::cont(parent, signal).map_err(self.kernel("running a script in it"))?;
        }
    }

    /// Waits for the first stop of a child.
    fn stand(&self, tid: Tid) -> Result<()> {
        match self.wait_for_born(tid)? {
            Some(_) => Ok(()),
            None => Err(self.declined("the copy was ended".into())),
        }
    }
}
