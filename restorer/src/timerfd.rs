//! timerfd_create(2)

use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::timerfd::TimerFd;

use crate::description::owned;
use crate::error::{Error, Result};

const TFD_TIMER_ABSTIME: u32 = 1;
const TFD_TIMER_CANCEL_ON_SET: u32 = 2;
/// linux/timerfd.h: `_IOW('T', 0, __u64)`
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
const NANOSECONDS: u64 = 1_000_000_000;

/// `taken_at` is when the image was taken, in nanoseconds since 1970.
pub(crate) fn open(what: &str, timer: &TimerFd, taken_at: u64) -> Result<OwnedFd> {
    // SAFETY: timerfd_create takes numbers only.
    let fd = owned(what, "timerfd_create", unsafe { libc::timerfd_create(timer.clock, libc::TFD_CLOEXEC) })?;
    if timer.setting.value != (0, 0) || timer.setting.period != (0, 0) {
        let (flags, value) = setting(timer, taken_at);
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: timer.setting.period.0, tv_nsec: timer.setting.period.1 },
            it_value: libc::timespec { tv_sec: value.0, tv_nsec: value.1 },
        };
        // SAFETY: `spec` is an itimerspec of ours.
        let set = unsafe {
            libc::timerfd_settime(fd.as_raw_fd(), flags as i32, &raw const spec, std::ptr::null_mut())
        };
        if set != 0 {
            return Err(Error::last(what, "timerfd_settime"));
        }
    }
    if timer.ticks > 0 {
        // SAFETY: TFD_IOC_SET_TICKS reads a u64.
        if unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const timer.ticks) } != 0 {
            return Err(Error::last(what, "ioctl(TFD_IOC_SET_TICKS)"));
        }
    }
    Ok(fd)
}

/// The kernel tells the time that is left, also of a timer set to a point in time. Where that point is one
/// of the calendar, it is set again; the other clocks do not go on while the process is away.
fn setting(timer: &TimerFd, taken_at: u64) -> (u32, (i64, i64)) {
    // A periodic timer that has expired stands still until it is read (fs/timerfd.c), and shows no time left.
    if timer.setting.value == (0, 0) {
        return (0, timer.setting.period);
    }
    let left = timer.setting.value;
    let calendar = matches!(timer.clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
    if timer.settime_flags & TFD_TIMER_ABSTIME == 0 || !calendar {
        return (0, left);
    }
    let left = (left.0 as u64).saturating_mul(NANOSECONDS).saturating_add(left.1 as u64);
    let at = taken_at.saturating_add(left);
    let flags = timer.settime_flags & (TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET);
    (flags, ((at / NANOSECONDS) as i64, (at % NANOSECONDS) as i64))
}

#[cfg(test)]
mod tests {
    use torpor_image::timer::Interval;

    use super::*;

    #[test]
    fn a_point_of_the_calendar_stays_where_it_is() {
        let timer = TimerFd {
            clock: libc::CLOCK_REALTIME,
            ticks: 0,
            settime_flags: TFD_TIMER_ABSTIME,
            setting: Interval { value: (5, 500_000_000), period: (0, 0) },
        };
        assert_eq!(setting(&timer, 100 * NANOSECONDS + 600_000_000), (1, (106, 100_000_000)));
        let monotonic = TimerFd { clock: libc::CLOCK_MONOTONIC, ..timer };
        assert_eq!(setting(&monotonic, 100 * NANOSECONDS), (0, (5, 500_000_000)));
    }
}
