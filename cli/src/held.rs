//! Signals held back while processes stand or are being built.
//!
//! Ctrl-Z at the wrong moment would leave us stopped, and with us the processes that we hold; Ctrl-C would leave half
//! an image behind, or files that a restore made. What asks us to end calls the work off, and takes effect once everything
//! is cleared away.

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use crate::{exit, output};

const ENDS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
const STOPS: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];

/// Signals are held back; they are let go on drop.
pub(crate) struct Held {
    before: Option<SigSet>,
}

impl Held {
    /// Holds back what stops us and what ends us, but for `never`.
    pub(crate) fn begin(never: &[Signal]) -> Self {
        // What is ignored (nohup(1)) would wait as well while it is blocked.
        let ends = ENDS.into_iter().filter(|s| !never.contains(s) && !is_ignored(*s));
        let signals = SigSet::from_iter(STOPS.into_iter().chain(ends));
        // It cannot fail; if it did, the signals would only do what they always do.
        Held { before: signals.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok() }
    }

    /// Whether a signal that would end us waits.
    pub(crate) fn wants_end() -> bool {
        // SAFETY: an all-zero sigset_t is a valid one.
        let mut pending: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `pending` is a sigset_t of ours, first to be filled and then read.
        unsafe {
            libc::sigpending(&raw mut pending) == 0
                && ENDS.iter().any(|s| libc::sigismember(&raw const pending, *s as i32) == 1)
        }
    }

    /// After a failure lets signals go; it is told before one of them ends us.
    pub(crate) fn end<T>(self, result: anyhow::Result<T>) -> anyhow::Result<(T, Self)> {
        match result {
            Ok(done) => Ok((done, self)),
            Err(e) => {
                if Self::wants_end() {
                    output::complain(&exit::message(&e));
                }
                drop(self);
                Err(e)
            }
        }
    }

    /// It is done: what came too late must not make it look as if it were not.
    pub(crate) fn keep(mut self) {
        self.before = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _cannot_fail = before.thread_set_mask();
        }
    }
}

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and `now` is a sigaction of ours to be filled.
    let got = unsafe { libc::sigaction(signal as i32, std::ptr::null(), &raw mut now) };
    got == 0 && now.sa_sigaction == libc::SIG_IGN
}
