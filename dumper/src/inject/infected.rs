//! One process on its way in and out, step by step.

use std::os::fd::{AsFd, OwnedFd};

use torpor_blob::{BLOB, ENTRY};
use torpor_image::manifest::Freeze;
use torpor_kernel::fds;
use torpor_kernel::ids::{RemoteAddr, Tid};
use torpor_kernel::memory::Memory;
use torpor_kernel::ptrace::{self, Stop};
use torpor_parasite::script::{OpId, Outcome, Placed, Script, Surroundings};
use torpor_parasite::wire::{Context, Heal, STACK, command, heal, state};

use super::birth::{Nursery, Progress};
use super::{Before, Visit, room, trap};
use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::gadget::Gadgets;
use crate::snapshot::Birth;

const PAGE: u64 = 4096;
/// `si_code` of a signal sent by tgkill (asm-generic/siginfo.h).
const SI_TKILL: i32 = -6;

/// One thread's part of the arena.
#[derive(Clone, Copy, Debug, Default)]
struct Seat {
    context: u64,
    stack_top: u64,
    frame: u64,
    script: Option<(Placed, u32)>,
}

/// A process with our mapping in it.
pub(super) struct Infected<'a> {
    frozen: &'a mut Frozen,
    pub(super) memory: &'a Memory,
    pub(super) threads: &'a [Before],
    gadgets: Gadgets,
    own_tgid: i32,
    trap: i32,
    /// First address of the mapping; the blob's page.
    pub(super) base: u64,
    pub(super) length: u64,
    /// First address of the arena in it.
    pub(super) arena: u64,
    pub(super) arena_length: u64,
    /// Arena offset of the count of threads whose frames lie in the arena.
    guests: u64,
    seats: Vec<Seat>,
    /// Address of the frame that makes the leader call munmap, and of the one behind it.
    pub(super) unmap_frame: u64,
    pub(super) home_frame: u64,
    /// Bytes at the end of the stack to be zero again.
    pub(super) was_zero: Option<(u64, u64)>,
    /// Whether our pages are mapped.
    pub(super) mapped: bool,
    /// What `munmap` of them gave.
    pub(super) unmapped: i64,
    /// Which of the other threads have been sent into the blob.
    entered: Vec<usize>,
    scripts: &'a [Script],
    pub(super) outcomes: Vec<Outcome>,
    lends: Option<OpId>,
    /// Our copy of the descriptor that was shown to us.
    pub(super) lent: Option<OwnedFd>,
    /// What went wrong on the way in.
    pub(super) failed: Option<Error>,
    /// How the way out went.
    pub(super) left: Result<()>,
    /// The copy to be made, and where its scripts lie.
    pub(super) birth: Option<(&'a Birth, Nursery)>,
    pub(super) progress: Progress,
}

impl<'a> Infected<'a> {
    /// Decides where everything goes and writes the way back; the process has not run yet.
    pub(super) fn prepare(visit: Visit<'a>) -> Result<Self> {
        let Visit { frozen, memory, threads, entry, scripts, lends, birth } = visit;
        let pid = frozen.pid();
        let injection = |what: &str| Error::Injection { pid, what: what.to_owned() };
        let trap = trap(entry.taken_signals).ok_or_else(|| {
            injection(
                "it handles or holds SIGURG, SIGWINCH and SIGCHLD, of which one must be left to torpor: let it give \
                 up one",
            )
        })?;

        // The arena: the count of guests, then for each thread a context, a stack, a frame and a script.
        let guests = 0u64;
        let mut at = 64u64;
        let mut seats = Vec::with_capacity(threads.len());
        for (i, thread) in threads.iter().enumerate() {
            // A thread that is not entered needs nothing.
            if i > 0 && scripts.get(i).is_none_or(Script::is_empty) {
                seats.push(Seat::default());
                continue;
            }
            let context = at;
            let stack_top = (context + size_of::<Context>() as u64 + STACK).next_multiple_of(64);
            let frame = stack_top;
            at = frame;
            if i > 0 {
                at += arch::SignalFrame::size(thread.xstate.len()) as u64;
            }
            let script = scripts.get(i).filter(|s| !s.is_empty()).map(|s| {
                let placed = s.place(at);
                at = placed.end;
                (placed, s.steps().len() as u32)
            });
            at = at.next_multiple_of(64);
            seats.push(Seat { context, stack_top, frame, script });
        }
        let birth = birth.map(|birth| (birth, Nursery::at(at, birth)));
        at = birth.map_or(at, |(_, nursery)| nursery.end);
        let arena_length = at.next_multiple_of(PAGE);
        let code = (BLOB.len() as u64).next_multiple_of(PAGE);
        let length = code + arena_length;
        let base = room::hole(entry.maps, length)
            .ok_or_else(|| injection("its address space has no room for a few pages"))?;

        let leader = &threads[0];
        let frame_size = (arch::SignalFrame::size(leader.xstate.len()) as u64).next_multiple_of(64);
        let room = room::room_on_stack(entry.maps, &leader.registers, 2 * frame_size, memory)
            .ok_or_else(|| injection("its stack has no room for two signal frames"))?;
        let (unmap_frame, home_frame) = (room.at, room.at + frame_size);

        let infected = Infected {
            frozen,
            memory,
            threads,
            gadgets: entry.gadgets,
            own_tgid: entry.own_tgid,
            trap,
            base,
            length,
            arena: base + code,
            arena_length,
            guests,
            seats,
            unmap_frame,
            home_frame,
            was_zero: room.was_zero,
            mapped: false,
            unmapped: 0,
            entered: Vec::new(),
            scripts,
            outcomes: Vec::new(),
            lends,
            lent: None,
            failed: None,
            left: Ok(()),
            birth,
            progress: Progress::default(),
        };
        infected.write_frames()?;
        Ok(infected)
    }

    pub(super) fn kernel(&self, doing: &'static str) -> impl FnOnce(torpor_kernel::Error) -> Error + use<> {
        Error::kernel(self.frozen.pid(), doing)
    }

    /// Writes the leader's two frames below its stack; memory that is dead by the ABI.
    fn write_frames(&self) -> Result<()> {
        let leader = &self.threads[0];
        let size = (self.home_frame - self.unmap_frame) as usize;
        let mut bytes = vec![0u8; 2 * size];
        let unmap = leader.registers.with_call(
            self.gadgets.syscall,
            self.home_frame,
            libc::SYS_munmap as u64,
            [self.base, self.length, 0, 0, 0, 0],
        );
        let unmap = unmap.returning_to(self.gadgets.sigreturn);
        let pretcode = self.gadgets.sigreturn;
        let (first, second) = bytes.split_at_mut(size);
        arch::SignalFrame::write(first, self.unmap_frame, pretcode, &unmap, u64::MAX, &leader.xstate);
        let home = leader.elsewhere.restarted();
        arch::SignalFrame::write(second, self.home_frame, pretcode, &home, leader.mask, &leader.xstate);
        self.memory
            .write_all_at(RemoteAddr(self.unmap_frame), &bytes)
            .map_err(self.kernel("writing the way back below its stack"))
    }

    pub(super) fn no_room(&self, call: &str, result: i64) -> Error {
        let what = format!("{call} of {} KiB: {}", self.length / 1024, errno_text(result));
        Error::Injection { pid: self.frozen.pid(), what }
    }

    /// Sets the leader up for one system call and lets it run; untraced, it would go on into the frame at `then`.
    pub(super) fn begin_call(&mut self, nr: i64, args: [u64; 6], then: u64) -> Result<()> {
        let leader = &self.threads[0];
        let regs = leader
            .registers
            .with_call(self.gadgets.syscall, then, nr as u64, args)
            .returning_to(self.gadgets.sigreturn);
        // Registers before the mask: with the mask alone changed, an untraced thread would stay deaf.
        ptrace::set_registers(leader.tid, &regs).map_err(self.kernel("setting its registers"))?;
        ptrace::set_signal_mask(leader.tid, u64::MAX).map_err(self.kernel("blocking its signals"))?;
        ptrace::resume_to_syscall(leader.tid, 0).map_err(self.kernel("running a call in it"))
    }

    /// Sees the leader into the call.
    pub(super) fn pass_entry(&mut self) -> Result<()> {
        self.wait_for_syscall()?;
        let tid = self.threads[0].tid;
        ptrace::resume_to_syscall(tid, 0).map_err(self.kernel("running a call in it"))
    }

    /// Sees the leader out of the call, and gives its result.
    pub(super) fn end_call(&mut self) -> Result<i64> {
        self.wait_for_syscall()?;
        let tid = self.threads[0].tid;
        Ok(ptrace::registers(tid).map_err(self.kernel("reading its registers"))?.result())
    }

    fn wait_for_syscall(&mut self) -> Result<()> {
        let tid = self.threads[0].tid;
        loop {
            match self.frozen.wait(tid)? {
                Stop::Syscall => return Ok(()),
                // A job-control stop asked for meanwhile; the kernel repeats it when we let go.
                Stop::Event { .. } => {}
                Stop::Signal(signal) => self.put_aside(tid, signal)?,
                _ => {}
            }
            ptrace::resume_to_syscall(tid, 0).map_err(self.kernel("running a call in it"))?;
        }
    }

    /// Writes blob, contexts, frames and scripts.
    pub(super) fn fill(&mut self) -> Result<()> {
        self.memory.write_all_at(RemoteAddr(self.base), BLOB).map_err(self.kernel("writing the executor"))?;
        let mut arena = vec![0u8; self.arena_length as usize];
        for (i, (seat, thread)) in self.seats.iter().zip(self.threads).enumerate() {
            if i > 0 && seat.script.is_none() {
                continue;
            }
            let (ops, count) = seat.script.map_or((0, 0), |(placed, count)| (placed.ops, count));
            let heal = Heal {
                kind: if i == 0 { heal::LAST } else { heal::EARLY },
                company: u32::from(self.threads.len() > 1),
                frame: if i == 0 { self.home_frame } else { self.arena + seat.frame },
                gadget: self.gadgets.syscall,
                start: self.base,
                length: self.length,
                guests: self.guests,
            };
            let context = Context {
                base: self.arena,
                ops,
                count,
                state: state::RUNNING,
                failed: 0,
                command: command::NONE,
                tgid: self.own_tgid,
                tid: thread.own_tid,
                signal: self.trap,
                reserved: 0,
                heal,
            };
            let at = seat.context as usize;
            arena[at..at + size_of::<Context>()].copy_from_slice(context.bytes());
            if i > 0 {
                let size = arch::SignalFrame::size(thread.xstate.len());
                arch::SignalFrame::write(
                    &mut arena[seat.frame as usize..][..size],
                    self.arena + seat.frame,
                    self.gadgets.sigreturn,
                    &thread.elsewhere.restarted(),
                    thread.mask,
                    &thread.xstate,
                );
            }
            if let Some((placed, _)) = seat.script {
                let around = Surroundings {
                    base: self.arena,
                    shared: 0,
                    contexts: 0,
                    stacks: 0,
                    stack_size: 0,
                    descriptor: &|_| -1,
                };
                self.scripts[i].encode(placed, &around, &mut arena);
            }
        }
        if let Some((birth, nursery)) = self.birth {
            nursery.fill(birth, self.arena, &mut arena);
        }
        self.memory.write_all_at(RemoteAddr(self.arena), &arena).map_err(self.kernel("writing the scripts"))
    }

    /// What the leader's context says besides its script.
    pub(super) fn leader_context(&self) -> Context {
        let heal = Heal {
            kind: heal::LAST,
            company: u32::from(self.threads.len() > 1),
            frame: self.home_frame,
            gadget: self.gadgets.syscall,
            start: self.base,
            length: self.length,
            guests: self.guests,
        };
        let tid = self.threads[0].own_tid;
        Context { base: self.arena, tgid: self.own_tgid, tid, signal: self.trap, heal, ..Context::default() }
    }

    /// Address of the leader's context.
    pub(super) fn leader_seat(&self) -> u64 {
        self.arena + self.seats[0].context
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8], doing: &'static str) -> Result<()> {
        self.memory.write_all_at(RemoteAddr(address), bytes).map_err(self.kernel(doing))
    }

    pub(super) fn wait_for_born(&self, tid: Tid) -> Result<Option<Stop>> {
        self.frozen.wait_for_born(tid)
    }

    /// No copy can be made of it.
    pub(super) fn declined(&self, why: String) -> Error {
        Error::Declined { pid: self.frozen.pid(), freeze: Freeze::Fork, why }
    }

    /// Threads that have a script.
    fn busy(&self) -> Vec<usize> {
        (0..self.seats.len()).filter(|&i| self.seats[i].script.is_some()).collect()
    }

    /// Sends every thread that has a script into the blob.
    pub(super) fn start(&mut self) -> Result<()> {
        let busy = self.busy();
        for &i in &busy {
            let thread = &self.threads[i];
            let seat = self.seats[i];
            let regs = thread.registers.with_entry(
                self.base + ENTRY,
                self.arena + seat.stack_top,
                self.arena + seat.context,
            );
            ptrace::set_registers(thread.tid, &regs).map_err(self.kernel("setting its registers"))?;
            ptrace::set_signal_mask(thread.tid, !(1 << (self.trap - 1)))
                .map_err(self.kernel("blocking its signals"))?;
            if i > 0 {
                self.entered.push(i);
                self.count_guests(self.entered.len())?;
            }
        }
        for &i in &busy {
            ptrace::cont(self.threads[i].tid, 0).map_err(self.kernel("running a script in it"))?;
        }
        Ok(())
    }

    /// Waits for all of them, and reads what the scripts left.
    pub(super) fn collect(&mut self) -> Result<()> {
        let busy = self.busy();
        for &i in &busy {
            self.wait_for_trap(i)?;
            if i == 0 {
                self.take_lent()?;
            }
        }
        let arena = self.read_arena()?;
        let mut outcomes = vec![Outcome::default(); self.seats.len()];
        for &i in &busy {
            let seat = self.seats[i];
            let (placed, _) = seat.script.expect("busy threads have one");
            let context = Context::from_bytes(&arena[seat.context as usize..]);
            let outcome = self.scripts[i].outcome(placed, &arena);
            if context.state != state::DONE {
                let failed = context.failed as usize;
                let step = self.scripts[i].steps().get(failed);
                return Err(Error::Script {
                    pid: self.frozen.pid(),
                    tid: self.threads[i].tid,
                    purpose: step.map_or_else(|| "state".into(), |s| s.purpose.to_string()),
                    errno: step.map_or(nix::errno::Errno::UnknownErrno, |_| {
                        let op = torpor_parasite::script::OpId(context.failed);
                        nix::errno::Errno::from_raw(-outcome.result(op) as i32)
                    }),
                });
            }
            outcomes[i] = outcome;
        }
        self.outcomes = outcomes;
        Ok(())
    }

    fn read_arena(&self) -> Result<Vec<u8>> {
        let mut arena = vec![0u8; self.arena_length as usize];
        self.memory
            .read_exact_at(RemoteAddr(self.arena), &mut arena)
            .map_err(self.kernel("reading what the scripts left"))?;
        Ok(arena)
    }

    /// Copies the descriptor that the leader shows, and lets it go on to the end of its script.
    fn take_lent(&mut self) -> Result<()> {
        let (Some(op), Some((placed, _))) = (self.lends, self.seats[0].script) else { return Ok(()) };
        let arena = self.read_arena()?;
        if Context::from_bytes(&arena[self.seats[0].context as usize..]).state != state::RUNNING {
            // It got none, and is at its end.
            return Ok(());
        }
        let number = self.scripts[0].outcome(placed, &arena).result(op) as i32;
        let pid = self.frozen.living();
        let pidfd = fds::pidfd_open(pid).map_err(self.kernel("opening its pidfd"))?;
        self.lent = Some(fds::getfd(pidfd.as_fd(), number).map_err(self.kernel("copying its descriptor"))?);
        ptrace::cont(self.threads[0].tid, 0).map_err(self.kernel("running a script in it"))?;
        self.wait_for_trap(0)
    }

    /// Takes a signal off a thread that runs for us, to be sent again when it is let go. A fault is our own
    /// doing, and would come again and again.
    fn put_aside(&mut self, tid: Tid, signal: i32) -> Result<()> {
        let info = ptrace::signal_info(tid).map_err(self.kernel("reading a signal"))?;
        let code = i32::from_ne_bytes(info[8..12].try_into().expect("four bytes"));
        if ptrace::is_fault(signal) && code > 0 {
            return Err(Error::Injection {
                pid: self.frozen.pid(),
                what: format!("signal {signal} (code {code}) in thread {tid} while it ran the executor"),
            });
        }
        self.frozen.resend.push((tid, signal));
        Ok(())
    }

    /// Waits until thread `i` says that its script is done.
    pub(super) fn wait_for_trap(&mut self, i: usize) -> Result<()> {
        let tid = self.threads[i].tid;
        while self.trap_or_event(i)?.is_some() {
            ptrace::cont(tid, 0).map_err(self.kernel("running a script in it"))?;
        }
        Ok(())
    }

    /// Waits until thread `i` says that its script is done (`None`), or for any event before.
    pub(super) fn trap_or_event(&mut self, i: usize) -> Result<Option<Stop>> {
        let tid = self.threads[i].tid;
        loop {
            match self.frozen.wait(tid)? {
                Stop::Signal(signal) => {
                    let info = ptrace::signal_info(tid).map_err(self.kernel("reading a signal"))?;
                    let code = i32::from_ne_bytes(info[8..12].try_into().expect("four bytes"));
                    let sender = i32::from_ne_bytes(info[16..20].try_into().expect("four bytes"));
                    // si_pid is told in the reader's pid namespace: compare with what we know it by.
                    let own = sender == self.frozen.pid().0 || sender == self.own_tgid;
                    if signal == self.trap && code == SI_TKILL && own {
                        return Ok(None);
                    }
                    self.put_aside(tid, signal)?;
                }
                Stop::Exited(_) | Stop::Killed(_) => return Err(self.frozen.died("it ended")),
                event @ (Stop::Event { .. } | Stop::Syscall) => return Ok(Some(event)),
            }
            ptrace::cont(tid, 0).map_err(self.kernel("running a script in it"))?;
        }
    }

    fn count_guests(&self, count: usize) -> Result<()> {
        self.memory
            .write_all_at(RemoteAddr(self.arena + self.guests), &(count as i32).to_ne_bytes())
            .map_err(self.kernel("counting its threads"))
    }

    /// Puts the other threads back, and sees to it that the leader stands.
    pub(super) fn retreat(&mut self) -> Result<()> {
        if self.failed.is_some() {
            // A process that waits for its child cannot be stopped.
            self.progress = Progress::default();
        }
        while let Some(i) = self.entered.pop() {
            let thread = &self.threads[i];
            if !self.is_stopped(thread.tid) {
                // Its script failed to end; it is made to stop where it is.
                let _gone = ptrace::interrupt(thread.tid);
                self.frozen.wait(thread.tid)?;
            }
            self.count_guests(self.entered.len())?;
            self.put_back(thread)?;
        }
        let leader = &self.threads[0];
        if !self.is_stopped(leader.tid) {
            let _gone = ptrace::interrupt(leader.tid);
            self.frozen.wait(leader.tid)?;
        }
        Ok(())
    }

    /// Puts the leader back.
    pub(super) fn home(&mut self) -> Result<()> {
        let leader = &self.threads[0];
        loop {
            match self.frozen.wait(leader.tid)? {
                Stop::Event { .. } => break,
                Stop::Signal(signal) => self.put_aside(leader.tid, signal)?,
                _ => {}
            }
            ptrace::cont(leader.tid, 0).map_err(self.kernel("stopping it"))?;
        }
        self.put_back(leader)?;
        self.clear_room()?;
        if self.unmapped != 0 {
            return Err(Error::Injection {
                pid: self.frozen.pid(),
                what: format!("munmap: {}", errno_text(self.unmapped)),
            });
        }
        Ok(())
    }

    /// Makes the end of the stack zero again where that was taken for room.
    pub(super) fn clear_room(&self) -> Result<()> {
        let Some((start, length)) = self.was_zero else { return Ok(()) };
        self.memory
            .write_all_at(RemoteAddr(start), &vec![0u8; length as usize])
            .map_err(self.kernel("clearing the end of its stack"))
    }

    /// The mask first: an untraced thread still finds its way back from where its registers are, but with
    /// the registers put back alone it would stay deaf.
    fn put_back(&self, thread: &Before) -> Result<()> {
        ptrace::set_signal_mask(thread.tid, thread.mask).map_err(self.kernel("unblocking its signals"))?;
        ptrace::set_xstate(thread.tid, &thread.xstate).map_err(self.kernel("setting its vector state"))?;
        ptrace::set_registers(thread.tid, &thread.registers).map_err(self.kernel("setting its registers"))
    }

    fn is_stopped(&self, tid: Tid) -> bool {
        // Only a stopped tracee has registers to read.
        ptrace::signal_mask(tid).is_ok()
    }
}

fn errno_text(result: i64) -> String {
    nix::errno::Errno::from_raw(-result as i32).to_string()
}
