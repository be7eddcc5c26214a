//! Stopping every thread of every process of a tree, and letting it go on.
//!
//! Seizing and interrupting one thread after the other takes a scheduling round for each that spins; all of
//! a generation are seized, then all interrupted, then all waited for. Threads and processes may be born and
//! die meanwhile, so the lists are read again until they hold still: only one that runs can make another, and
//! what a stopped process has made is in its list of children (proc_pid_children(5)). A process whose parent
//! ends moves to a relative that may have been looked at before, so all lists are read once more at the end.
//!
//! A thread that waits for its vfork child to execute another program or to end sleeps where no tracer stops
//! it (kernel/fork.c, `wait_for_vfork_done`): the tree is let go and tried again a moment later.
//!
//! `PTRACE_SEIZE` sends no signal and leaves no trace; when this process dies the kernel detaches and every
//! thread goes on (ptrace(2)).

use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::priority::RealTime;
use torpor_kernel::ptrace::{self, Stop};
use torpor_kernel::task_struct::Told;
use torpor_kernel::{process, status};

use crate::error::{Error, Refusal, Result};
use crate::thread::Unasked;

/// How threads are traced.
pub(crate) const OPTIONS: u32 = ptrace::OPTION_SYSGOOD;
/// How long a thread may take to stop, and a tree to hold still.
const PATIENCE: Duration = Duration::from_secs(10);
/// After which time a thread that has not stopped is asked whether it waits for a vfork child.
const SUSPICION: Duration = Duration::from_millis(2);
/// How often a tree is tried again in which somebody does: 511 ms in all.
const VFORKS: u32 = 9;
/// How many times 100 microseconds a thread that does not stand gets to stop for its release.
const STRAGGLER: u32 = 1000;

/// How a stop is waited for: how often the processor is given to others before we sleep, and for how long we do at first.
#[derive(Clone, Copy)]
struct Pace {
    yields: u32,
    nap: Duration,
}

/// Threads that run beside ours, for us.
const RUNNING: Pace = Pace { yields: 32, nap: Duration::from_micros(20) };
/// Threads that are to stop. With the priority that we have then those that share our processor do not run while we do, and
/// a shorter sleep is over before any of them has been switched to and stands.
const STOPPING: Pace = Pace { yields: 2, nap: Duration::from_micros(50) };

/// A tree whose threads all stand. Dropped, it goes on as before.
#[derive(Debug)]
pub(crate) struct FrozenTree {
    /// Its processes, the root first and every other after its parent.
    pub(crate) processes: Vec<Frozen>,
    /// Members that have ended and wait for their parents.
    pub(crate) zombies: Vec<Pid>,
    /// How long it took until all stood.
    pub(crate) freezing: Duration,
    /// When all stood.
    pub(crate) since: Instant,
}

/// A process whose threads all stand. Dropped, it goes on as before.
///
/// A tracee belongs to the thread that attached to it (ptrace(2)), so this cannot be sent to another.
#[derive(Debug)]
pub(crate) struct Frozen {
    pid: Pid,
    threads: Vec<FrozenThread>,
    /// Threads that work for its rings of io_uring: the kernel's own, which run no program.
    workers: Vec<Tid>,
    /// Signals that were taken off a thread while it ran for us, to be sent again.
    pub(crate) resend: Vec<(Tid, i32)>,
    gone: bool,
    told: HashMap<Tid, Told>,
    _bound_to_thread: PhantomData<*const ()>,
}

/// A stopped thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrozenThread {
    pub(crate) tid: Tid,
    /// The job-control signal it was stopped by before.
    pub(crate) group_stop: Option<i32>,
}

/// What became of an attempt.
enum Attempt {
    Stands(FrozenTree),
    /// Thread and process that wait for a vfork child.
    Vfork(Pid, Tid),
}

impl FrozenTree {
    /// Stops every thread of `root` and of all processes below it.
    pub(crate) fn freeze(root: Pid, unasked: &Unasked) -> Result<Self> {
        let mut attempt = 0;
        loop {
            match Self::attempt(root, unasked)? {
                Attempt::Stands(tree) => return Ok(tree),
                Attempt::Vfork(..) if attempt < VFORKS => {
                    std::thread::sleep(Duration::from_millis(1 << attempt));
                    attempt += 1;
                }
                Attempt::Vfork(pid, tid) => {
                    return Err(Error::Refused { pid: root, refusals: vec![vfork(pid, tid)] });
                }
            }
        }
    }

    fn attempt(root: Pid, unasked: &Unasked) -> Result<Attempt> {
        let _priority = RealTime::raise();
        let begin = Instant::now();
        let mut tree =
            FrozenTree { processes: Vec::new(), zombies: Vec::new(), freezing: Duration::ZERO, since: begin };
        let mut known = HashSet::from([root]);
        let mut new = vec![root];
        while !new.is_empty() {
            if begin.elapsed() > PATIENCE {
                let what =
                    "it makes new processes faster than they can be stopped: try again when it makes fewer";
                return Err(Error::Inconsistent { pid: root, what: what.into() });
            }
            let first = tree.processes.len();
            tree.processes.extend(new.drain(..).map(Frozen::new));
            if let Some((pid, tid)) = stop_all(&mut tree.processes[first..])? {
                return Ok(Attempt::Vfork(pid, tid));
            }
            for process in tree.processes.split_off(first) {
                match process {
                    p if !p.threads.is_empty() => tree.processes.push(p),
                    p if status::of_process(p.pid).is_ok_and(|s| s.state == 'Z') => {
                        if p.pid == root {
                            let why = "it has ended and waits for its parent to collect its status: nothing of it is left to be dumped";
                            return Err(Error::NotDumpable { pid: root, why: why.into() });
                        }
                        tree.zombies.push(p.pid);
                    }
                    p if p.pid == root => return Err(p.died("it is gone")),
                    // It may come again under the same number.
                    p => {
                        known.remove(&p.pid);
                    }
                }
            }
            // Children of the new ones, and of all once more when there are no new ones.
            let mut list = |some: &mut [Frozen], new: &mut Vec<Pid>| -> Result<()> {
                for process in some {
                    new.extend(process.children(unasked)?.into_iter().filter(|child| known.insert(*child)));
                }
                Ok(())
            };
            list(&mut tree.processes[first..], &mut new)?;
            if new.is_empty() && tree.processes.len() > 1 {
                list(&mut tree.processes, &mut new)?;
            }
        }
        tree.zombies.retain(|z| status::of_process(*z).is_ok());
        for process in &mut tree.processes {
            // The leader comes first in the image, unless it has ended.
            let leader = process.pid.leader();
            process.threads.sort_by_key(|t| (t.tid != leader, t.tid));
        }
        tree.freezing = begin.elapsed();
        tree.since = Instant::now();
        Ok(Attempt::Stands(tree))
    }

    /// The root.
    pub(crate) fn root(&self) -> &Frozen {
        &self.processes[0]
    }

    /// Lets the tree go on.
    pub(crate) fn release(&mut self) {
        let _priority = RealTime::raise();
        self.processes.iter_mut().for_each(Frozen::release);
    }

    /// Lets go of the tree but leaves every process of it stopped, as `kill -STOP` does.
    pub(crate) fn keep_stopped(self) -> Result<()> {
        self.processes.into_iter().try_for_each(Frozen::keep_stopped)
    }

    /// Whether the kernel ends all processes should we end now.
    pub(crate) fn bind(&self, bound: bool) {
        let options = if bound { OPTIONS | ptrace::OPTION_EXITKILL } else { OPTIONS };
        for thread in self.processes.iter().flat_map(|p| &p.threads) {
            // One that is gone has ended.
            let _gone = ptrace::set_options(thread.tid, options);
        }
    }

    /// Ends every process and waits until nothing of them is left but what parents must collect. `meanwhile` is done
    /// while they end.
    pub(crate) fn kill(mut self, meanwhile: impl FnOnce()) -> Result<()> {
        // From here on they end with us: were we killed between the signals, those without one would go on alone.
        self.bind(true);
        // All at once, before any end can be noticed by another.
        for process in &self.processes {
            process.signal(nix::sys::signal::Signal::SIGKILL, "ending it")?;
        }
        meanwhile();
        // The last first: a parent that goes before its children hands them to somebody else to be collected,
        // either way.
        self.processes.iter_mut().rev().for_each(Frozen::wait_for_end);
        Ok(())
    }
}

/// Stops every thread of all these processes. Gives the one that waits for a vfork child, if one does.
fn stop_all(processes: &mut [Frozen]) -> Result<Option<(Pid, Tid)>> {
    loop {
        let mut seized = Vec::new();
        for (i, process) in processes.iter_mut().enumerate() {
            for tid in process.unknown_threads()? {
                if process.seize(tid)? {
                    seized.push((i, tid));
                }
            }
        }
        if seized.is_empty() {
            return Ok(None);
        }
        for &(i, tid) in &seized {
            match ptrace::interrupt(tid) {
                Ok(()) => {}
                Err(e) if e.is_gone() => {}
                Err(e) => return Err(Error::kernel(processes[i].pid, "stopping it")(e)),
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for &(i, tid) in &seized {
            if processes[i].stand(tid, deadline)? {
                return Ok(Some((processes[i].pid, tid)));
            }
        }
    }
}

impl Frozen {
    fn new(pid: Pid) -> Self {
        Frozen {
            pid,
            threads: Vec::new(),
            workers: Vec::new(),
            resend: Vec::new(),
            gone: false,
            told: HashMap::new(),
            _bound_to_thread: PhantomData,
        }
    }

    /// Threads that have not been seized yet.
    fn unknown_threads(&self) -> Result<Vec<Tid>> {
        match process::tasks(self.pid) {
            Ok(mut all) => {
                let known: HashSet<Tid> =
                    self.threads.iter().map(|t| t.tid).chain(self.workers.iter().copied()).collect();
                all.retain(|t| !known.contains(t));
                Ok(all)
            }
            Err(e) if e.is_gone() => Ok(Vec::new()),
            Err(e) => Err(Error::kernel(self.pid, "listing its threads")(e)),
        }
    }

    fn children(&mut self, unasked: &Unasked) -> Result<Vec<Pid>> {
        self.told = unasked.of(self.living(), self.threads.iter().map(|t| t.tid));
        let all = if self.told.is_empty() {
            process::children(self.pid)
        } else {
            // Threads that are not among them have none, or have ended, and their children are another's.
            let with = self.threads.iter().map(|t| t.tid).filter(|t| !self.told[t].childless);
            process::children_of(self.pid, with.chain(self.workers.iter().copied()))
        };
        all.map_err(Error::kernel(self.pid, "listing its children"))
    }

    /// What is known of its threads without asking them; of all, or of none.
    pub(crate) fn told(&self) -> &HashMap<Tid, Told> {
        &self.told
    }

    /// Attaches to a thread; false when it has ended.
    fn seize(&mut self, tid: Tid) -> Result<bool> {
        let pid = self.pid;
        // Such a thread can be attached to and does not stop, and what it waits for is interrupted.
        // It has no robust list, as those of libc have, which is asked in less time than for its flags.
        let listed = || process::robust_list(tid).is_ok_and(|(head, _)| head != 0);
        if tid != pid.leader() && !listed() && process::is_io_worker(pid, tid) {
            self.workers.push(tid);
            return Ok(false);
        }
        match ptrace::seize(tid, OPTIONS) {
            Ok(()) => {
                self.threads.push(FrozenThread { tid, group_stop: None });
                Ok(true)
            }
            Err(e) if e.is_gone() => Ok(false),
            Err(e) if e.errno() == Some(Errno::EPERM) => {
                // A thread that is exiting cannot be seized either, and a leader may be a zombie.
                match status::of_task(pid, tid) {
                    // It was waiting for a vfork child when all others were let go.
                    Ok(s) if s.tracer_pid == Pid::this().0 => {
                        self.threads.push(FrozenThread { tid, group_stop: None });
                        Ok(true)
                    }
                    Ok(s) if s.tracer_pid != 0 => {
                        Err(Error::Traced { pid, tracer: s.tracer_pid, name: name_of(s.tracer_pid) })
                    }
                    Ok(s) if s.state == 'Z' || s.state == 'X' => Ok(false),
                    Ok(_) if process::is_ending(Pid(tid.0)) => Ok(false),
                    Ok(_) => Err(Error::Permission { pid, source: e }),
                    Err(_) => Ok(false),
                }
            }
            Err(e) => Err(Error::kernel(pid, "attaching")(e)),
        }
    }

    /// Waits for the stop of a thread that was interrupted; true when it waits for a vfork child instead.
    fn stand(&mut self, tid: Tid, deadline: Instant) -> Result<bool> {
        let suspicion = Instant::now() + SUSPICION;
        let stop = match self.wait_until(tid, suspicion.min(deadline), STOPPING) {
            Err(Error::Timeout { .. }) if waits_for_vfork(self.pid, tid) => return Ok(true),
            // A first thread that has ended is not reported until all others have.
            Err(Error::Timeout { state: 'Z', .. }) => None,
            Err(Error::Timeout { .. }) => self.wait_until(tid, deadline, STOPPING)?,
            other => other?,
        };
        match stop {
            Some(stop) => {
                let signal = stop.group_stop();
                if signal.is_some()
                    && let Some(thread) = self.threads.iter_mut().find(|t| t.tid == tid)
                {
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
        Ok(false)
    }

    /// Lets `tid` take `signal` and waits for the stop that its interrupt asked for.
    fn deliver_then_stop(&mut self, tid: Tid, mut signal: i32, deadline: Instant) -> Result<()> {
        loop {
            ptrace::cont(tid, signal).map_err(Error::kernel(self.pid, "delivering a signal"))?;
            match self.wait_until(tid, deadline, STOPPING)? {
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
    fn wait_until(&self, tid: Tid, deadline: Instant, pace: Pace) -> Result<Option<Stop>> {
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
            if rounds < pace.yields {
                std::thread::yield_now();
            } else if Instant::now() < deadline {
                let longer = Duration::from_micros(10 * u64::from((rounds - pace.yields).min(100)));
                std::thread::sleep(pace.nap.max(longer));
            } else {
                let state = status::of_task(self.pid, tid).map_or('?', |s| s.state);
                return Err(Error::Timeout { pid: self.pid, tid, seconds: PATIENCE.as_secs(), state });
            }
        }
    }

    /// Waits for the next stop of a thread that runs for us; an error when the process has ended.
    pub(crate) fn wait(&self, tid: Tid) -> Result<Stop> {
        match self.wait_until(tid, Instant::now() + PATIENCE, RUNNING)? {
            Some(stop) => Ok(stop),
            None => Err(self.died(&format!("thread {tid} ended"))),
        }
    }

    /// Waits for the next stop of a task that was born for us; `None` when it has ended.
    pub(crate) fn wait_for_born(&self, tid: Tid) -> Result<Option<Stop>> {
        self.wait_until(tid, Instant::now() + PATIENCE, RUNNING)
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// A thread of it that lives, by whose number /proc shows what the process has: that of a first thread that
    /// has ended shows neither memory nor descriptors.
    pub(crate) fn living(&self) -> Pid {
        Pid(self.threads[0].tid.0)
    }

    /// Whether its first thread has ended while others go on.
    pub(crate) fn leader_ended(&self) -> bool {
        self.threads[0].tid != self.pid.leader()
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

    /// Lets go of the process but leaves it stopped, as `kill -STOP` does; `kill -CONT` lets it go on.
    pub(crate) fn keep_stopped(mut self) -> Result<()> {
        let pid = self.pid;
        self.signal(nix::sys::signal::Signal::SIGSTOP, "stopping it")?;
        self.release();
        // The stop is carried out by the threads themselves, once they run again.
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && status::of_process(pid).is_ok_and(|s| s.state != 'T') {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn signal(&self, signal: nix::sys::signal::Signal, doing: &str) -> Result<()> {
        let pid = self.pid;
        match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(Error::kernel(pid, doing)(torpor_kernel::Error::syscall("kill", pid, e))),
        }
    }

    /// Waits until nothing of a killed process is left but what its parent must collect.
    fn wait_for_end(&mut self) {
        // The end of a tracee is told to its tracer first, thread by thread and the leader last.
        for thread in self.threads.iter().rev() {
            while let Ok(stop) = ptrace::wait(thread.tid) {
                if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                    break;
                }
            }
        }
        self.gone = true;
    }

    /// Lets every thread go on.
    fn release(&mut self) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
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

/// A thread that waits for its vfork child cannot be stopped.
pub(crate) fn vfork(pid: Pid, tid: Tid) -> Refusal {
    Refusal {
        object: format!("thread {tid} of pid {pid} ({})", name_of(pid.0)),
        why:
            "it waits for a child of vfork(2) that neither ends nor executes another program, and cannot be \
              stopped meanwhile"
                .into(),
        remedy: "try again when that child has gone on".into(),
    }
}

/// Whether a thread sleeps until a child of vfork(2) gives the shared memory back.
pub(crate) fn waits_for_vfork(pid: Pid, tid: Tid) -> bool {
    let Ok(Some(call)) = process::blocked_call(pid, tid) else { return false };
    match call.nr {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork => true,
        libc::SYS_clone => call.args[0] & libc::CLONE_VFORK as u64 != 0,
        // Its flags are in memory.
        libc::SYS_clone3 => true,
        _ => false,
    }
}

/// The name of a process for a message.
pub(crate) fn name_of(pid: i32) -> String {
    status::of_process(Pid(pid))
        .map_or_else(|_| "?".into(), |s| String::from_utf8_lossy(&s.name).into_owned())
}
