//! timerfd_create(2), from fdinfo.

use std::os::fd::AsRawFd;

use torpor_image::description::Kind;
use torpor_image::timer::Interval;
use torpor_image::timerfd::TimerFd;
use torpor_kernel::fdinfo::{Detail, Timerfd, fdinfo};

use crate::collect::Collector;
use crate::description::Found;
use crate::error::{Error, Result};

/// A periodic timer that has expired stands still until it is looked at, and only then the kernel counts the
/// periods that went by (fs/timerfd.c): so it is looked at first, which its owner cannot notice.
pub(crate) fn collect(collector: &mut Collector, found: &Found, timer: &Timerfd) -> Result<Kind> {
    let mut timer = *timer;
    if timer.it_value == (0, 0) && timer.it_interval != (0, 0) && !collector.live {
        let fd = found.get(collector)?;
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut setting = libc::itimerspec { it_interval: zero, it_value: zero };
        // SAFETY: `setting` is an itimerspec of ours, to be filled.
        unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut setting) };
        let again = fdinfo(collector.pid, found.fd)
            .map_err(Error::kernel(collector.pid, format!("reading {}", found.title())))?;
        if let Detail::Timerfd(now) = again.detail {
            timer = now;
        }
    }
    Ok(Kind::TimerFd(TimerFd {
        clock: timer.clockid,
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        setting: Interval { value: timer.it_value, period: timer.it_interval },
    }))
}
