//! timerfd_create(2), from fdinfo.

use torpor_image::description::Kind;
use torpor_image::timer::Interval;
use torpor_image::timerfd::TimerFd;
use torpor_kernel::fdinfo::Timerfd;

pub(crate) fn collect(timer: &Timerfd) -> Kind {
    Kind::TimerFd(TimerFd {
        clock: timer.clockid,
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        setting: Interval { value: timer.it_value, period: timer.it_interval },
    })
}
