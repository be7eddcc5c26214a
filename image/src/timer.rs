//! Timers of a process: setitimer(2) and timer_create(2).

use serde::{Deserialize, Serialize};

/// Time until the next expiration and the period after it; zero means disarmed or one-shot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// Time left, in seconds and nanoseconds (setitimer: microseconds).
    pub value: (i64, i64),
    /// Period.
    pub period: (i64, i64),
}

/// Timers of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timers {
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF, in microseconds.
    pub interval: Vec<Interval>,
    /// timer_create(2)
    pub posix: Vec<PosixTimer>,
}

/// A POSIX timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Its id.
    pub id: i32,
    /// `CLOCK_*`
    pub clock: i32,
    /// `SIGEV_*`
    pub notify: i32,
    /// The signal.
    pub signal: i32,
    /// `sigev_value`
    pub value: u64,
    /// The thread of `SIGEV_THREAD_ID`.
    pub thread: i32,
    /// Time left and period, in nanoseconds.
    pub setting: Interval,
    /// timer_getoverrun(2)
    pub overrun: i32,
}
