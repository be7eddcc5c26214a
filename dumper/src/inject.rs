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

use torpor_blob::{BLOB, ENTRY};
use torpor_kernel::ids::{RemoteAddr, Tid};
use torpor_kernel::maps::Mapping;
use torpor_kernel::memory::Memory;
use torpor_kernel::ptrace::{self, Stop};
use torpor_parasite::script::{Outcome, Placed, Script, Surroundings};
use torpor_parasite::wire::{Context, Heal, STACK, TRAPS, command, heal, state};

use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::gadget::Gadgets;

const PAGE: u64 = 4096;
/// `si_code` of a signal sent by tgkill (asm-generic/siginfo.h).
const SI_TKILL: i32 = -6;

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

/// One thread's part of the arena.
#[derive(Clone, Copy, Debug, Default)]
struct Seat {
    context: u64,
    stack_top: u64,
    frame: u64,
    script: Option<(Placed, u32)>,
}

/// Runs `scripts[i]` in `threads[i]` (the leader first) and gives what they left. The process is afterwards
/// as it was before; also on error, unless the process itself has ended.
pub(crate) fn run(
    frozen: &mut Frozen,
    memory: &Memory,
    threads: &[Before],
    entry: &Entry<'_>,
    scripts: &[Script],
) -> Result<Vec<Outcome>> {
    let mut infected = Infected::enter(frozen, memory, threads, entry, scripts)?;
    let result = infected.run_scripts(scripts);
    let left = infected.leave();
    let outcomes = result?;
    left?;
    Ok(outcomes)
}

/// A process with our mapping in it.
struct Infected<'a> {
    frozen: &'a mut Frozen,
    memory: &'a Memory,
    threads: &'a [Before],
    gadgets: Gadgets,
    own_tgid: i32,
    trap: i32,
    /// First address of the mapping; the blob's page.
    base: u64,
    length: u64,
    /// First address of the arena in it.
    arena: u64,
    arena_length: u64,
    /// Arena offset of the count of threads whose frames lie in the arena.
    guests: u64,
    seats: Vec<Seat>,
    /// Address of the frame that makes the leader call munmap, and of the one behind it.
    unmap_frame: u64,
    home_frame: u64,
    /// Bytes at the end of the stack to be zero again.
    was_zero: Option<(u64, u64)>,
    /// Whether our pages are mapped.
    mapped: bool,
    /// How many of the other threads have been sent into the blob.
    entered: Vec<usize>,
}

impl<'a> Infected<'a> {
    fn enter(
        frozen: &'a mut Frozen,
        memory: &'a Memory,
        threads: &'a [Before],
        entry: &Entry<'_>,
        scripts: &[Script],
    ) -> Result<Self> {
        let pid = frozen.pid();
        let injection = |what: &str| Error::Injection { pid, what: what.to_owned() };
        let trap = TRAPS
            .into_iter()
            .find(|s| entry.taken_signals & (1 << (s - 1)) == 0)
            .ok_or_else(|| injection("it handles or holds every signal that could serve as a trap"))?;

        // The arena: the count of guests, then for each thread a context, a stack, a frame and a script.
        let guests = 0u64;
        let mut at = 64u64;
        let mut seats = Vec::with_capacity(threads.len());
        for (i, thread) in threads.iter().enumerate() {
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
        let arena_length = at.next_multiple_of(PAGE);
        let code = (BLOB.len() as u64).next_multiple_of(PAGE);
        let length = code + arena_length;
        let base = hole(entry.maps, length)
            .ok_or_else(|| injection("its address space has no room for a few pages"))?;

        let leader = &threads[0];
        let frame_size = (arch::SignalFrame::size(leader.xstate.len()) as u64).next_multiple_of(64);
        let room = room_on_stack(entry.maps, &leader.registers, 2 * frame_size, memory)
            .ok_or_else(|| injection("its stack has no room for two signal frames"))?;
        let (unmap_frame, home_frame) = (room.at, room.at + frame_size);

        let mut infected = Infected {
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
            entered: Vec::new(),
        };
        infected.write_frames()?;
        if let Err(e) = infected.map().and_then(|()| infected.fill(scripts)) {
            // Nobody runs in it yet: leaving is a plain unmapping.
            infected.leave()?;
            return Err(e);
        }
        Ok(infected)
    }

    fn kernel(&self, doing: &'static str) -> impl FnOnce(torpor_kernel::Error) -> Error + use<> {
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

    /// Makes the leader map our pages: code first, then the arena made writable.
    fn map(&mut self) -> Result<()> {
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let (pid, kib) = (self.frozen.pid(), self.length / 1024);
        let failed = |call: &str, result| Error::Injection {
            pid,
            what: format!("{call} of {kib} KiB: {}", errno_text(result)),
        };
        let args = [self.base, self.length, protection, flags, u64::MAX, 0];
        let address = self.call(libc::SYS_mmap, args, self.unmap_frame)?;
        if address as u64 != self.base {
            return Err(failed("mmap", address));
        }
        self.mapped = true;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let args = [self.arena, self.arena_length, protection, 0, 0, 0];
        match self.call(libc::SYS_mprotect, args, self.unmap_frame)? {
            0 => Ok(()),
            e => Err(failed("mprotect", e)),
        }
    }

    /// Makes the leader do one system call; untraced, it would go on into the frame at `then`.
    fn call(&mut self, nr: i64, args: [u64; 6], then: u64) -> Result<i64> {
        let leader = &self.threads[0];
        let regs = leader
            .registers
            .with_call(self.gadgets.syscall, then, nr as u64, args)
            .returning_to(self.gadgets.sigreturn);
        // Registers before the mask: with the mask alone changed, an untraced thread would stay deaf.
        ptrace::set_registers(leader.tid, &regs).map_err(self.kernel("setting its registers"))?;
        ptrace::set_signal_mask(leader.tid, u64::MAX).map_err(self.kernel("blocking its signals"))?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::resume_to_syscall(leader.tid, 0).map_err(self.kernel("running a call in it"))?;
            match self.frozen.wait(leader.tid)? {
                Stop::Syscall => stops += 1,
                // A job-control stop asked for meanwhile; the kernel repeats it when we let go.
                Stop::Event { .. } => {}
                Stop::Signal(signal) => self.put_aside(leader.tid, signal)?,
                _ => {}
            }
        }
        Ok(ptrace::registers(leader.tid).map_err(self.kernel("reading its registers"))?.result())
    }

    /// Writes blob, contexts, frames and scripts.
    fn fill(&mut self, scripts: &[Script]) -> Result<()> {
        self.memory.write_all_at(RemoteAddr(self.base), BLOB).map_err(self.kernel("writing the executor"))?;
        let mut arena = vec![0u8; self.arena_length as usize];
        for (i, (seat, thread)) in self.seats.iter().zip(self.threads).enumerate() {
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
                scripts[i].encode(placed, &around, &mut arena);
            }
        }
        self.memory.write_all_at(RemoteAddr(self.arena), &arena).map_err(self.kernel("writing the scripts"))
    }

    /// Sends every thread that has a script into the blob and waits for all.
    fn run_scripts(&mut self, scripts: &[Script]) -> Result<Vec<Outcome>> {
        let busy: Vec<usize> = (0..self.seats.len()).filter(|&i| self.seats[i].script.is_some()).collect();
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
        for &i in &busy {
            self.wait_for_trap(i)?;
        }
        let mut arena = vec![0u8; self.arena_length as usize];
        self.memory
            .read_exact_at(RemoteAddr(self.arena), &mut arena)
            .map_err(self.kernel("reading what the scripts left"))?;
        let mut outcomes = vec![Outcome::default(); self.seats.len()];
        for &i in &busy {
            let seat = self.seats[i];
            let (placed, _) = seat.script.expect("busy threads have one");
            let context = Context::from_bytes(&arena[seat.context as usize..]);
            let outcome = scripts[i].outcome(placed, &arena);
            if context.state != state::DONE {
                let failed = context.failed as usize;
                let step = scripts[i].steps().get(failed);
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
        Ok(outcomes)
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
    fn wait_for_trap(&mut self, i: usize) -> Result<()> {
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
                        return Ok(());
                    }
                    self.put_aside(tid, signal)?;
                }
                Stop::Exited(_) | Stop::Killed(_) => return Err(self.frozen.died("it ended")),
                Stop::Event { .. } | Stop::Syscall => {}
            }
            ptrace::cont(tid, 0).map_err(self.kernel("running a script in it"))?;
        }
    }

    fn count_guests(&self, count: usize) -> Result<()> {
        self.memory
            .write_all_at(RemoteAddr(self.arena + self.guests), &(count as i32).to_ne_bytes())
            .map_err(self.kernel("counting its threads"))
    }

    /// Puts every thread back and unmaps our pages.
    fn leave(&mut self) -> Result<()> {
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
        let mut result = 0;
        if self.mapped {
            let args = [self.base, self.length, 0, 0, 0, 0];
            result = self.call(libc::SYS_munmap, args, self.home_frame)?;
        }
        // The kernel acts on an interrupted call's -ERESTART* only on its way out of a signal stop; the
        // stop at the end of a system call is not one.
        ptrace::interrupt(leader.tid).map_err(self.kernel("stopping it"))?;
        loop {
            ptrace::cont(leader.tid, 0).map_err(self.kernel("stopping it"))?;
            match self.frozen.wait(leader.tid)? {
                Stop::Event { .. } => break,
                Stop::Signal(signal) => self.put_aside(leader.tid, signal)?,
                _ => {}
            }
        }
        self.put_back(leader)?;
        if let Some((start, length)) = self.was_zero {
            self.memory
                .write_all_at(RemoteAddr(start), &vec![0u8; length as usize])
                .map_err(self.kernel("clearing the end of its stack"))?;
        }
        if result != 0 {
            return Err(Error::Injection {
                pid: self.frozen.pid(),
                what: format!("munmap: {}", errno_text(result)),
            });
        }
        Ok(())
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

/// A place for `length` bytes with a free page on either side, so that no area of the target merges with
/// ours; not in the way of a stack or heap that grows.
fn hole(maps: &[Mapping], length: u64) -> Option<u64> {
    let mut best: Option<u64> = None;
    for pair in maps.windows(2) {
        let (low, high) = (&pair[0], &pair[1]);
        let grows = high.flags.has("gd") || high.path == b"[stack]";
        if low.path == b"[heap]" || grows || high.start > arch::TASK_SIZE || low.end < 1 << 16 {
            continue;
        }
        if high.start.saturating_sub(low.end) >= length + 2 * PAGE {
            best = Some(high.start - PAGE - length);
        }
    }
    // All areas side by side, or only growing ones: right below the first, if that leaves the lowest 64 KiB.
    best.or_else(|| {
        let first = maps.first()?;
        first.start.checked_sub(length + PAGE).filter(|start| *start >= 1 << 16)
    })
}

/// Memory of the target that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    at: u64,
    /// Bytes to be zero again afterwards.
    was_zero: Option<(u64, u64)>,
}

/// Finds room for `size` bytes: below the leader's stack pointer where that lies on the process stack, which
/// the kernel grows as for a signal frame of its own. Else (the leader runs on an alternate stack, or on one
/// of its language's making) the low end of that stack, as long as nothing but zeros is there.
fn room_on_stack(maps: &[Mapping], regs: &arch::Registers, size: u64, memory: &Memory) -> Option<Room> {
    let stack = maps.iter().find(|m| m.path == b"[stack]" && m.write)?;
    let top = regs.frame_top();
    if top > stack.start && top <= stack.end {
        return top.checked_sub(size).map(|at| Room { at: at & !63, was_zero: None });
    }
    let mut low = vec![0u8; size as usize];
    memory.read_exact_at(RemoteAddr(stack.start), &mut low).ok()?;
    let zero = low.iter().all(|b| *b == 0);
    zero.then_some(Room { at: stack.start, was_zero: Some((stack.start, size)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(text: &str) -> Vec<Mapping> {
        torpor_kernel::maps::parse_maps(text.as_bytes()).expect("parses")
    }

    #[test]
    fn the_hole_keeps_clear_of_heap_and_stack() {
        let maps = maps(
            "00400000-00401000 r-xp 00000000 08:01 1 /bin/x\n\
             00500000-00600000 rw-p 00000000 00:00 0 [heap]\n\
             7f0000000000-7f0000001000 r--p 00000000 08:01 2 /lib/a\n\
             7f0000100000-7f0000101000 r--p 00000000 08:01 2 /lib/b\n\
             7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 [stack]\n",
        );
        assert_eq!(hole(&maps, 0x4000), Some(0x7f00_0010_0000 - 0x5000));
        assert_eq!(hole(&maps, 1 << 30), None);
    }
}
