//! Standing in for a restored process in front of the shell or supervisor that started us.
//!
//! Signals are not handled but blocked and waited for, together with SIGCHLD, in one loop: there is no
//! handler that could run at a bad moment, and none is lost between a look at the child and the wait.
//!
//! The process has the process group of its dump, which the shell knows nothing of. On a terminal we do for
//! it what a shell does for a job ("Implementing a Job Control Shell", glibc manual): lend it the terminal,
//! and when it is stopped from the keyboard take the terminal back and stop as well, so that Ctrl-Z, `fg` and
//! `bg` work as with any program.

use std::io::{self, IsTerminal};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, SigmaskHow, Signal};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpgrp, getpid, getsid, tcgetpgrp, tcsetpgrp};

use crate::exit::Exit;

/// What is passed on.
const FORWARDED: [Signal; 9] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGWINCH,
];
/// `si_code` of what the kernel sends of itself, as the terminal does for Ctrl-C (asm-generic/siginfo.h).
const SI_KERNEL: i32 = 0x80;

/// The terminal as it was before the restored process got it; it is put back on drop.
pub(crate) struct Terminal {
    settings: Option<Termios>,
}

impl Terminal {
    /// Remembers the settings of standard input, if that is a terminal.
    pub(crate) fn remember() -> Self {
        Terminal { settings: io::stdin().is_terminal().then(|| tcgetattr(io::stdin()).ok()).flatten() }
    }

    fn restore(&self) {
        if let Some(settings) = &self.settings
            && foreground() == Some(getpgrp())
        {
            // The terminal may be gone by now.
            let _best_effort = tcsetattr(io::stdin(), SetArg::TCSADRAIN, settings);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.restore();
    }
}

/// The process group in the foreground of our terminal, if standard input is the terminal of our session.
fn foreground() -> Option<Pid> {
    // It fails for a terminal that is not that of the session.
    tcgetpgrp(io::stdin()).ok()
}

/// The signals we take for the restored process, blocked; put back on drop.
pub(crate) struct Attached {
    waited: SigSet,
    before: SigSet,
}

impl Attached {
    /// Blocks what will be passed on. From here on [`Attached::wait`] has to follow soon.
    pub(crate) fn begin() -> anyhow::Result<Self> {
        let mut waited = SigSet::from_iter(FORWARDED);
        waited.add(Signal::SIGCHLD);
        let mut blocked = waited;
        // So that the terminal can be taken back from the background (tcsetpgrp(3)).
        blocked.add(Signal::SIGTTOU);
        let before = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot block signals")?;
        Ok(Attached { waited, before })
    }

    /// Lends the terminal to the process, which must not run yet: it might read from it at once. `front` is the
    /// process group of its tree that had its terminal at the dump, if that is another than its own.
    pub(crate) fn lend_terminal<'t>(&self, pid: i32, front: Option<i32>, terminal: &'t Terminal) -> Lent<'t> {
        let pid = Pid::from_raw(pid);
        let same_session = getsid(Some(pid)).is_ok_and(|session| Ok(session) == getsid(None));
        let job = match getpgid(Some(pid)) {
            Ok(group) if same_session && io::stdin().is_terminal() => {
                if group == getpgrp() {
                    Job::Ours
                } else {
                    Job::Own(group)
                }
            }
            _ => Job::Apart,
        };
        let front = front.map(Pid::from_raw).filter(|group| *group != getpgrp());
        let lent = Lent { terminal, pid, job, front, settings: None };
        lent.lend();
        lent
    }

    /// Waits until process `pid`, a child, ends, and gives its status as a shell would.
    pub(crate) fn wait(&self, pid: i32, mut terminal: Lent<'_>) -> anyhow::Result<Exit> {
        let pid = Pid::from_raw(pid);
        loop {
            // Only keyboard stops concern us, hence a look at the state before each wait for a signal.
            match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Exited(_, status)) => return Ok(Exit::Program(status as u8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Exit::Program(128 + signal as u8)),
                Ok(WaitStatus::Stopped(_, signal)) => terminal.stopped(signal),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e).with_context(|| format!("cannot wait for pid {pid}")),
            }
            let (signal, code) = next(&self.waited).context("cannot wait for signals")?;
            // The terminal signals the whole foreground group: a process in our own has got it as well.
            let had_it = code == SI_KERNEL && getpgid(Some(pid)).is_ok_and(|group| group == getpgrp());
            match signal {
                Signal::SIGCHLD => {}
                _ if had_it => {}
                Signal::SIGCONT => terminal.resume(),
                // It may have ended meanwhile; SIGCHLD will tell.
                signal => drop(signal::kill(pid, signal)),
            }
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _cannot_fail = self.before.thread_set_mask();
    }
}

/// The next of `signals`, and its `si_code`.
fn next(signals: &SigSet) -> nix::Result<(Signal, i32)> {
    loop {
        // SAFETY: an all-zero siginfo_t is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: both point to structures of ours.
        let number = unsafe { libc::sigwaitinfo(signals.as_ref(), &raw mut info) };
        match Errno::result(number) {
            Ok(number) => return Ok((Signal::try_from(number)?, info.si_code)),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// What the process is to the shell that started us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Of our process group: the terminal treats it as it treats us.
    Ours,
    /// Of a group of its own in our session: it can have the terminal.
    Own(Pid),
    /// Of another session, or there is no terminal.
    Apart,
}

/// A terminal that the restored process may use; taken back on drop.
pub(crate) struct Lent<'t> {
    terminal: &'t Terminal,
    pid: Pid,
    job: Job,
    /// The process group of its tree that is to have the terminal, if not its own.
    front: Option<Pid>,
    /// The settings the process had when it was stopped.
    settings: Option<Termios>,
}

impl Lent<'_> {
    /// Lends it, if it is ours to lend; says whether it was.
    fn lend(&self) -> bool {
        let groups = match self.job {
            Job::Own(group) => [self.front, Some(group)],
            Job::Ours => [self.front, None],
            Job::Apart => return false,
        };
        if groups == [None, None] || foreground() != Some(getpgrp()) {
            return false;
        }
        if let Some(settings) = &self.settings {
            let _best_effort = tcsetattr(io::stdin(), SetArg::TCSADRAIN, settings);
        }
        // A group whose last process has just ended cannot have it, and needs it no more.
        groups.into_iter().flatten().any(|group| tcsetpgrp(io::stdin(), group).is_ok())
    }

    fn take_back(&mut self) {
        if self.job != Job::Apart
            && let Some(group) = foreground()
            && self.is_of_tree(group)
        {
            // Whom the tree itself has given the terminal gets it again.
            self.front = Some(group);
            self.settings = tcgetattr(io::stdin()).ok();
            let _best_effort = tcsetpgrp(io::stdin(), getpgrp());
            self.terminal.restore();
        }
    }

    /// Whether a process group is of the tree: known as such, or with a member that descends from it.
    fn is_of_tree(&self, group: Pid) -> bool {
        if group == getpgrp() {
            return false;
        }
        self.job == Job::Own(group) || self.front == Some(group) || has_descendant_of(group, self.pid)
    }

    /// The process was stopped by `signal`: from the keyboard, for reading or writing in the background, or,
    /// which does not concern us, by somebody who will let it go on as well.
    fn stopped(&mut self, signal: Signal) {
        let in_background = matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU);
        if self.job == Job::Apart || !in_background && signal != Signal::SIGTSTP {
            return;
        }
        // It went on in the background, and we have come to the foreground since.
        if in_background && self.lend() {
            return self.go_on();
        }
        self.take_back();
        // Others of our group were stopped by the terminal only if the process is one of them.
        let whom = if self.job == Job::Ours { getpid() } else { Pid::from_raw(0) };
        if !stop_ourselves(whom, signal) {
            // Nobody would ever let us go on, for our group is orphaned: such a job cannot be stopped either.
            self.resume();
        }
    }

    /// We were told to go on: by `fg`, or by `bg`.
    fn resume(&mut self) {
        self.lend();
        self.go_on();
    }

    fn go_on(&self) {
        // It may be gone.
        let _gone = match self.job {
            Job::Own(group) => signal::killpg(group, Signal::SIGCONT),
            Job::Ours | Job::Apart => signal::kill(self.pid, Signal::SIGCONT),
        };
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.take_back();
    }
}

/// Stops `whom`, us or our process group, as the terminal would have done, and returns when we go on; false
/// when the kernel would not stop us.
fn stop_ourselves(whom: Pid, signal: Signal) -> bool {
    let only = SigSet::from_iter([signal]);
    let Ok(before) = only.thread_swap_mask(SigmaskHow::SIG_UNBLOCK) else { return false };
    // Delivered before this call returns, as it is not blocked.
    let sent = signal::kill(whom, signal);
    let _cannot_fail = before.thread_set_mask();
    // What let us go on was a SIGCONT, which is blocked and will be passed on in its turn.
    sent.is_ok() && is_pending(Signal::SIGCONT)
}

/// Whether a process of `group` descends from `root`.
fn has_descendant_of(group: Pid, root: Pid) -> bool {
    let of = |pid: i32| torpor_kernel::stat::of_process(torpor_kernel::Pid(pid)).ok();
    let members = torpor_kernel::tty::everybody().into_iter().filter_map(|pid| of(pid.0));
    members.filter(|member| member.pgrp == group.as_raw()).any(|member| {
        let mut ancestor = Some(member);
        // As deep as no tree is, should pids be used anew while this looks.
        for _ in 0..1000 {
            match ancestor {
                Some(stat) if stat.pid == root.as_raw() => return true,
                Some(stat) if stat.ppid > 1 => ancestor = of(stat.ppid),
                _ => return false,
            }
        }
        false
    })
}

fn is_pending(signal: Signal) -> bool {
    // SAFETY: an all-zero sigset_t is valid.
    let mut pending: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: it is filled in by the first call, and read by the second.
    unsafe {
        libc::sigpending(&raw mut pending) == 0 && libc::sigismember(&raw const pending, signal as i32) == 1
    }
}
