//! Entering a stopped process to run scripts in it, and leaving it as it was.
//!
//! # The way in
//! One thread, the leader, is made to call mmap at a chosen address through a `syscall; ret` of its own
//! code. The blob is written there, then scripts and contexts beside it, all through /proc/PID/mem: the
//! process never holds a descriptor of ours. The mapping's code is never writable to the process and its
//! data never executable.
//!
//! # The way back
//! At every instant the thread's registers, run without a tracer, lead back to where it was. Before they
//! are first changed two signal frames are written below the stack:
//!
//! ```text
//!   frame 2: the thread as it was           reached by `ret` from munmap
//!   frame 1: a call of munmap(our mapping)  reached by `ret` from whatever call is being made
//! ```
//! Every injected call returns with `ret` into the rt_sigreturn code that every libc has, which loads the
//! next frame. Once the blob runs it heals by itself (`parasite::executor`). The other threads' frames lie
//! in the mapping, as nothing is known of their stacks (a goroutine's has no room for a frame).
//!
//! The tracer itself takes the shorter way: registers are set back through ptrace, so that the kernel's own
//! memory of an interrupted system call, which rt_sigreturn would clear, still holds.

mod birth;
mod infected;
mod room;

use std::os::fd::OwnedFd;

use infected::Infected;
use torpor_kernel::ids::Tid;
use torpor_kernel::maps::Mapping;
use torpor_kernel::memory::Memory;
use torpor_kernel::priority::Punctual;
use torpor_kernel::ptrace;
use torpor_parasite::script::{OpId, Outcome, Script, Value};
use torpor_parasite::wire::TRAPS;

use crate::error::Result;
use crate::freeze::Frozen;
use crate::gadget::Gadgets;
use crate::snapshot::{Birth, Snapshot};

/// What a thread looked like when it stopped: enough to put it back.
#[derive(Clone, Debug)]
pub(crate) struct Before {
    pub(crate) tid: Tid,
    /// The thread id in the process's own pid namespace.
    pub(crate) own_tid: i32,
    pub(crate) registers: arch::Registers,
    /// The same for a way back that is not ptrace's: with the number of an interrupted call that the kernel
    /// itself does not need.
    pub(crate) elsewhere: arch::Registers,
    pub(crate) xstate: Vec<u8>,
    pub(crate) mask: u64,
}

/// What entering needs to know of the process.
pub(crate) struct Entry<'a> {
    pub(crate) maps: &'a [Mapping],
    pub(crate) gadgets: Gadgets,
    /// Signals that the process handles or has pending.
    pub(crate) taken_signals: u64,
    /// The process id in the process's own pid namespace.
    pub(crate) own_tgid: i32,
}

/// A process to be entered, and what to run in it: `scripts[i]` in `threads[i]`, the leader first.
pub(crate) struct Visit<'a> {
    pub(crate) frozen: &'a mut Frozen,
    pub(crate) memory: &'a Memory,
    pub(crate) threads: &'a [Before],
    pub(crate) entry: Entry<'a>,
    pub(crate) scripts: &'a [Script],
    /// The operation of the leader's script after which it shows us a descriptor ([`lend`]).
    pub(crate) lends: Option<OpId>,
    /// To make a copy of the process, after the scripts.
    pub(crate) birth: Option<&'a Birth>,
}

/// Adds to the script of a leader, which knows itself by `own_tgid` and `own_tid`: a call of ours that makes a
/// descriptor, a moment in which the tracer may copy it, and that it is closed. It is, also should we be killed then: the
/// signal that stops a traced thread is nothing to another.
pub(crate) fn lend(
    script: &mut Script,
    purpose: &'static str,
    (nr, args): (i64, &[Value]),
    (own_tgid, own_tid): (i32, i32),
    taken_signals: u64,
) -> Option<OpId> {
    let trap = trap(taken_signals)?;
    let made = script.call(purpose, nr, args);
    let shown: [Value; 3] = [own_tgid.into(), own_tid.into(), trap.into()];
    script.call("showing it to torpor", libc::SYS_tgkill, &shown);
    script.call("closing it again", libc::SYS_close, &[made.into()]);
    Some(made)
}

/// The signal by which a thread shows that it is done, of those that the process has no use for.
fn trap(taken_signals: u64) -> Option<i32> {
    TRAPS.into_iter().find(|s| taken_signals & (1 << (s - 1)) == 0)
}

/// Visits of more threads than this take long enough for something else to be done beside them. Where it is done for
/// fewer, a thread that is let go finds the processor where it ran taken by that, and ours by us, and waits for longer than
/// the whole visit takes.
const FEW: usize = 16;

/// Processes that can be entered: their way back is written.
pub(crate) struct Ready<'a>(Vec<Infected<'a>>);

/// Writes the way back of every process below its stack, so that nothing else of theirs is changed from here on but
/// what is mapped for the visit.
pub(crate) fn prepare(visits: Vec<Visit<'_>>) -> Result<Ready<'_>> {
    let mut ready = Ready(Vec::with_capacity(visits.len()));
    for visit in visits {
        match Infected::prepare(visit) {
            Ok(infected) => ready.0.push(infected),
            Err(e) => {
                ready.0.iter().try_for_each(Infected::clear_room)?;
                return Err(e);
            }
        }
    }
    Ok(ready)
}

/// What a visit left.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) outcomes: Vec<Outcome>,
    lent: Option<OwnedFd>,
    pub(crate) snapshot: Option<Snapshot>,
}

impl Ready<'_> {
    /// Whether something is written in a process for the time of the visit where it may have live memory.
    pub(crate) fn borrows(&self) -> bool {
        self.0.iter().any(|i| i.was_zero.is_some())
    }

    /// Whether so many threads are visited that something else had better be done meanwhile.
    pub(crate) fn takes_long(&self) -> bool {
        self.0.iter().map(|i| i.threads.len()).sum::<usize>() > FEW
    }

    /// Runs the scripts of all visits, side by side, and gives what each left. Every process is afterwards as it was
    /// before; also on error, unless the process itself has ended. No two may share their memory.
    ///
    /// Each step is taken by all before the next one by any: while the tracer prepares one, others run.
    pub(crate) fn run(self) -> Result<Vec<Vec<Outcome>>> {
        self.visit(|_| Ok(())).into_iter().map(|left| left.map(|left| left.outcomes)).collect()
    }

    /// The same, for what was lent by each; an error concerns one of them.
    pub(crate) fn borrow(self) -> Vec<Result<Option<OwnedFd>>> {
        self.visit(|_| Ok(())).into_iter().map(|left| left.map(|left| left.lent)).collect()
    }

    /// The same as `run`, and makes copies of the processes that are to have one unless `allow` finds, in what the scripts
    /// left, that there must be none.
    pub(crate) fn run_then(self, allow: impl FnOnce(&[&[Outcome]]) -> Result<()>) -> Result<Vec<Left>> {
        self.visit(allow).into_iter().collect()
    }

    fn visit(self, allow: impl FnOnce(&[&[Outcome]]) -> Result<()>) -> Vec<Result<Left>> {
        // What runs for us is waited for in short sleeps.
        let _punctual = Punctual::be();
        let mut all = self.0;
        let fine = |all: &[Infected<'_>]| all.iter().all(|i| i.failed.is_none());
        enter(&mut all);
        if fine(&all) {
            sweep(&mut all, Infected::start);
            sweep(&mut all, Infected::collect);
        }
        if fine(&all) && all.iter().any(|i| i.birth.is_some()) {
            let outcomes: Vec<&[Outcome]> = all.iter().map(|i| &i.outcomes[..]).collect();
            match allow(&outcomes) {
                Ok(()) => birth::run(&mut all),
                Err(e) => all[0].failed = Some(e),
            }
        }
        leave(&mut all);
        all.into_iter()
            .map(|i| match (i.failed, i.left) {
                (Some(e), _) | (None, Err(e)) => Err(e),
                (None, Ok(())) => Ok(Left { outcomes: i.outcomes, lent: i.lent, snapshot: i.progress.copy }),
            })
            .collect()
    }
}

/// Takes a step with each that nothing has happened to.
fn sweep<'a>(all: &mut [Infected<'a>], step: impl Fn(&mut Infected<'a>) -> Result<()>) {
    for infected in all.iter_mut().filter(|i| i.failed.is_none()) {
        infected.failed = step(infected).err();
    }
}

/// Makes every leader map our pages: code first, then the arena made writable.
fn enter(all: &mut [Infected<'_>]) {
    sweep(all, |i| {
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let args = [i.base, i.length, protection, flags, u64::MAX, 0];
        i.begin_call(libc::SYS_mmap, args, i.unmap_frame)
    });
    sweep(all, Infected::pass_entry);
    sweep(all, |i| {
        let address = i.end_call()?;
        if address as u64 != i.base {
            return Err(i.no_room("mmap", address));
        }
        i.mapped = true;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let args = [i.arena, i.arena_length, protection, 0, 0, 0];
        i.begin_call(libc::SYS_mprotect, args, i.unmap_frame)
    });
    sweep(all, Infected::pass_entry);
    sweep(all, |i| match i.end_call()? {
        0 => i.fill(),
        e => Err(i.no_room("mprotect", e)),
    });
}

/// Puts every thread back and unmaps our pages, whatever happened before.
fn leave<'a>(all: &mut [Infected<'a>]) {
    let step = |all: &mut [Infected<'a>], step: &dyn Fn(&mut Infected<'a>) -> Result<()>| {
        for infected in all.iter_mut().filter(|i| i.left.is_ok()) {
            infected.left = step(infected);
        }
    };
    step(all, &|i| {
        i.retreat()?;
        match i.mapped {
            true => i.begin_call(libc::SYS_munmap, [i.base, i.length, 0, 0, 0, 0], i.home_frame),
            false => Ok(()),
        }
    });
    step(all, &|i| if i.mapped { i.pass_entry() } else { Ok(()) });
    step(all, &|i| {
        if i.mapped {
            i.unmapped = i.end_call()?;
        }
        // The kernel acts on an interrupted call's -ERESTART* only on its way out of a signal stop; the
        // stop at the end of a system call is not one.
        let tid = i.threads[0].tid;
        ptrace::interrupt(tid).map_err(i.kernel("stopping it"))?;
        ptrace::cont(tid, 0).map_err(i.kernel("stopping it"))
    });
    step(all, &Infected::home);
}
