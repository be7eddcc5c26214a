//! timerfd_create(2)

use serde::{Deserialize, Serialize};

use crate::timer::Interval;

/// A timerfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// `CLOCK_*`
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// Flags of timerfd_settime (`TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`).
    pub settime_flags: u32,
    /// Time left until the next expiration and the period after it.
    pub setting: Interval,
}
