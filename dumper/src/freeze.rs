//! Stopping every thread of a process, and letting it go on.
//!
//! Seizing and interrupting one thread after the other takes a scheduling round for each that spins; all
//! are seized, then all interrupted, then all waited for. Threads may be born and die meanwhile, so the
//! list is read again until it holds still: only a thread that runs can make another, and once all of a
//! list have stopped, a second look finds those made in between.
//!
//! `PTRACE_SEIZE` sends no signal and leaves no trace; when this process dies the kernel detaches and every
//! thread goes on (ptrace(2)).

use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::ptrace::{self, Stop};
use torpor_kernel::{process, status};

use crate::error::{Error, Result};
use crate::priority::RealTime;

/// How long a thread may take to stop.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many times 100 microseconds a thread that does not stand gets to stop for its release.
const STRAGGLER: u32 = 1000;

/// A process whose threads all stand. Dropped, it goes on as before.
///
/// A tracee belongs to the thread that attached to it (ptrace(2)), so this cannot be sent to another.
#[derive(Debug)]
pub(crate) struct Frozen {
    pid: Pid,
    threads: Vec<FrozenThread>,
    /// How long it took until all stood.
    pub(crate) freezing: Duration,
    /// When all stood.
    pub(crate) since: Instant,
    /// Signals that were taken off a thread while it ran for us, to be sent again.
    pub(crate) resend: Vec<(Tid, i32)>,
    gone: bool,
    _bound_to_thread: PhantomData<*const ()>,
}

/// A stopped thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrozenThread {
    pub(crate) tid: Tid,
    /// The job-control signal it was stopped by before.
    pub(crate) group_stop: Option<i32>,
}

impl Frozen {
    /// Stops every thread of `pid`.
    pub(crate) fn freeze(pid: Pid) -> Result<Self> {
        let _priority = RealTime::raise();
        let begin = Instant::now();
        let mut frozen = Frozen {
            pid,
            threads: Vec::new(),
            freezing: Duration::ZERO,
            since: begin,
            resend: Vec::new(),
            gone: false,
            _bound_to_thread: PhantomData,
        };
        loop {
            let new: Vec<Tid> = match process::tasks(pid) {
                Ok(all) => all.into_iter().filter(|t| !frozen.threads.iter().any(|f| f.tid == *t)).collect(),
                Err(e) if e.is_gone() => return Err(frozen.died("it is gone")),
                Err(e) => return Err(Error::kernel(pid, "listing its threads")(e)),
            };
            if new.is_empty() {
                break;
            }
            frozen.stop(&new)?;
        }
        // The leader comes first in the image, and a process whose leader has exited shows it as a zombie
        // that cannot be seized.
        let Some(leader) = frozen.threads.iter().position(|t| t.tid == pid.leader()) else {
            return Err(Error::NotDumpable {
                pid,
                why: "its first thread has exited while others go on; dumping such a process comes with \
                      trees"
                    .into(),
            });
        };
        frozen.threads.swap(0, leader);
        frozen.threads[1..].sort_by_key(|t| t.tid);
        frozen.freezing = begin.elapsed();
        frozen.since = Instant::now();
        Ok(frozen)
    }

    /// Seizes and interrupts all of `tids`, then waits for each.
    fn stop(&mut self, tids: &[Tid]) -> Result<()> {
        let pid = self.pid;
        let mut seized = Vec::with_capacity(tids.len());
        for &tid in tids {
            match ptrace::seize(tid, ptrace::OPTION_SYSGOOD) {
                Ok(()) => {
                    self.threads.push(FrozenThread { tid, group_stop: None });
                    seized.push(tid);
                }
                Err(e) if e.is_gone() => {}
                Err(e) if e.errno() == Some(Errno::EPERM) => {
                    // A thread that is exiting cannot be seized either, and a leader may be a zombie.
                    let now = status::of_task(pid, tid);
                    match now {
                        Ok(s) if s.tracer_pid != 0 => {
                            return Err(Error::Traced {
                                pid,
                                tracer: s.tracer_pid,
                                name: name_of(s.tracer_pid),
                            });
                        }
                        Ok(s) if s.state == 'Z' || s.state == 'X' => {
                            if tid == pid.leader() {
                                let others = process::tasks(pid).map_or(0, |t| t.len());
                                let why = if others > 1 {
                                    "its first thread has exited while others go on"
                                } else {
                                    "it has ended and waits for its parent to collect its status"
                                };
                                return Err(Error::NotDumpable { pid, why: why.into() });
                            }
                        }
                        Ok(_) => return Err(Error::Permission { pid, source: e }),
                        Err(_) => {}
                    }
                }
                Err(e) => return Err(Error::kernel(pid, "attaching")(e)),
            }
        }
        for &tid in &seized {
            match ptrace::interrupt(tid) {
                Ok(()) => {}
                Err(e) if e.is_gone() => {}
                Err(e) => return Err(Error::kernel(pid, "stopping it")(e)),
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for &tid in &seized {
            match self.wait_until(tid, deadline)? {
                Some(stop) => {
                    let signal = stop.group_stop();
                    if let Some(thread) = self.threads.iter_mut().find(|t| t.tid == tid) {
                        thread.group_stop = signal;
                    }
                    // A signal that arrived before the interrupt is shown first; it must be delivered, and
                    // the interrupt follows it.
                    if let Stop::Signal(signal) = stop {
                        self.deliver_then_stop(tid, signal, deadline)?;
                    }
                }
                None => self.threads.retain(|t| t.tid != tid),
            }
        }
        if self.threads.is_empty() {
            return Err(self.died("it ended"));
        }
        Ok(())
    }

    /// Lets `tid` take `signal` and waits for the stop that its interrupt asked for.
    fn deliver_then_stop(&mut self, tid: Tid, mut signal: i32, deadline: Instant) -> Result<()> {
        loop {
            ptrace::cont(tid, signal).map_err(Error::kernel(self.pid, "delivering a signal"))?;
            match self.wait_until(tid, deadline)? {
                None => {
                    self.threads.retain(|t| t.tid != tid);
                    return Ok(());
                }
                Some(Stop::Signal(next)) => signal = next,
                Some(stop) => {
                    if let Some(thread) = self.threads.iter_mut().find(|t| t.tid == tid) {
                        thread.group_stop = stop.group_stop();
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Waits for a stop of `tid`; `None` when the thread has ended.
    fn wait_until(&self, tid: Tid, deadline: Instant) -> Result<Option<Stop>> {
        let mut rounds = 0u32;
        loop {
            match ptrace::try_wait(tid) {
                Ok(Some(Stop::Exited(_) | Stop::Killed(_))) => return Ok(None),
                Ok(Some(stop)) => return Ok(Some(stop)),
                Ok(None) => {}
                // No such tracee any more: it ended, or another thread's execve replaced it.
                Err(e) if e.errno() == Some(Errno::ECHILD) => return Ok(None),
                Err(e) => return Err(Error::kernel(self.pid, "waiting for a thread to stop")(e)),
            }
            rounds += 1;
            if rounds < 32 {
                std::thread::yield_now();
            } else if Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(10 * u64::from((rounds - 30).min(100))));
            } else {
                let state = status::of_task(self.pid, tid).map_or('?', |s| s.state);
                return Err(Error::Timeout { pid: self.pid, tid, seconds: PATIENCE.as_secs(), state });
            }
        }
    }

    /// Waits for the next stop of a thread that runs for us; an error when the process has ended.
    pub(crate) fn wait(&self, tid: Tid) -> Result<Stop> {
        match self.wait_until(tid, Instant::now() + PATIENCE)? {
            Some(stop) => Ok(stop),
            None => Err(self.died(&format!("thread {tid} ended"))),
        }
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Its threads, the leader first.
    pub(crate) fn threads(&self) -> &[FrozenThread] {
        &self.threads
    }

    /// Whether it was stopped by job control before we came.
    pub(crate) fn stopped(&self) -> bool {
        self.threads.iter().any(|t| t.group_stop.is_some())
    }

    pub(crate) fn died(&self, how: &str) -> Error {
        Error::Died { pid: self.pid, how: how.to_owned() }
    }

    /// Lets the process go on.
    pub(crate) fn resume(mut self) {
        self.release();
    }

    /// Lets go of the process but leaves it stopped, as `kill -STOP` does; `kill -CONT` lets it go on.
    pub(crate) fn keep_stopped(mut self) -> Result<()> {
        let pid = self.pid;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), nix::sys::signal::Signal::SIGSTOP)
            .map_err(|e| Error::kernel(pid, "stopping it")(torpor_kernel::Error::syscall("kill", pid, e)))?;
        self.release();
        // The stop is carried out by the threads themselves, once they run again.
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && status::of_process(pid).is_ok_and(|s| s.state != 'T') {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Ends the process and waits until nothing of it is left but what its parent must collect.
    pub(crate) fn kill(mut self) -> Result<()> {
        let pid = self.pid;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), nix::sys::signal::Signal::SIGKILL)
            .map_err(|e| Error::kernel(pid, "ending it")(torpor_kernel::Error::syscall("kill", pid, e)))?;
        // The end of a tracee is told to its tracer first, thread by thread and the leader last.
        for thread in self.threads.iter().rev() {
            while let Ok(stop) = ptrace::wait(thread.tid) {
                if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                    break;
                }
            }
        }
        self.gone = true;
        Ok(())
    }

    /// Lets every thread go on.
    pub(crate) fn release(&mut self) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        let _priority = RealTime::raise();
        for thread in &self.threads {
            // Only a stopped thread can be let go. One that is not, after a failure, is stopped for that; one
            // that cannot be, in uninterruptible sleep, stays ours until this process ends.
            let mut let_go = ptrace::detach(thread.tid, 0);
            for _ in 0..STRAGGLER {
                if let_go.is_ok() || ptrace::interrupt(thread.tid).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_micros(100));
                let _stop = ptrace::try_wait(thread.tid);
                let_go = ptrace::detach(thread.tid, 0);
            }
        }
        for (tid, signal) in self.resend.drain(..) {
            // SAFETY: tgkill touches no memory of ours.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid.0, tid.0, signal) };
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release();
    }
}

/// The name of a process for a message.
pub(crate) fn name_of(pid: i32) -> String {
    status::of_process(Pid(pid))
        .map_or_else(|_| "?".into(), |s| String::from_utf8_lossy(&s.name).into_owned())
}
