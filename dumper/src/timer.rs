//! setitimer(2) and timer_create(2): ids and targets from /proc/PID/timers, times by calls inside.

use torpor_image::timer::{Interval, PosixTimer, Timers};
use torpor_kernel::timers::{self, Notify, Target};
use torpor_parasite::call;
use torpor_parasite::script::{Data, OpId, Outcome, Script};

use crate::collect::Collector;

/// `SIGEV_*` (asm-generic/siginfo.h)
const SIGEV_SIGNAL: i32 = 0;
const SIGEV_NONE: i32 = 1;
const SIGEV_THREAD: i32 = 2;
const SIGEV_THREAD_ID: i32 = 4;

/// Whether a clock is that of the thread that made the timer: which one that was is told nowhere. Libc and kernel turn
/// CLOCK_THREAD_CPUTIME_ID into the clock of thread 0, that of the caller (include/linux/posix-timers_types.h: the
/// complement of the pid, a bit for threads, two bits for what is counted).
fn is_of_its_maker(clock: i32) -> bool {
    clock == libc::CLOCK_THREAD_CPUTIME_ID || clock < 0 && clock & 4 != 0 && !(clock >> 3) == 0
}

/// Refuses what a running process shows of that.
pub(crate) fn survey(collector: &mut Collector, threads: usize) {
    // Where they cannot be read, they cannot be on the frozen process either, which is an error then.
    let posix = if threads > 1 { timers::timers(collector.pid).unwrap_or_default() } else { Vec::new() };
    refuse(collector, &posix, threads);
}

/// Refuses timers that could not be made again.
pub(crate) fn refuse(collector: &mut Collector, posix: &[timers::PosixTimer], threads: usize) {
    for timer in posix.iter().filter(|t| is_of_its_maker(t.clockid) && threads > 1) {
        collector.refuse(
            format!("POSIX timer {}", timer.id),
            "it runs on the clock of one thread, and the kernel does not tell of which",
            "delete it before the dump",
        );
    }
}

#[derive(Debug)]
pub(crate) struct Asked {
    interval: Vec<Data>,
    posix: Vec<(Data, OpId)>,
}

pub(crate) fn ask(script: &mut Script, posix: &[timers::PosixTimer]) -> Asked {
    let interval = (0..3u64)
        .map(|which| {
            let value = script.reserve(32);
            call!(script, format!("interval timer {which}"), libc::SYS_getitimer, which, value);
            value
        })
        .collect();
    let posix = posix
        .iter()
        .map(|timer| {
            let value = script.reserve(32);
            call!(script, format!("POSIX timer {}", timer.id), libc::SYS_timer_gettime, timer.id, value);
            let overrun = call!(
                script,
                format!("the overrun of POSIX timer {}", timer.id),
                libc::SYS_timer_getoverrun,
                timer.id
            );
            (value, overrun)
        })
        .collect();
    Asked { interval, posix }
}

pub(crate) fn assemble(asked: &Asked, outcome: &Outcome, posix: &[timers::PosixTimer]) -> Timers {
    // struct itimerval and struct itimerspec both put the period first.
    let setting = |data: Data| {
        let word = |at| outcome.u64(data.at(at)) as i64;
        Interval { period: (word(0), word(8)), value: (word(16), word(24)) }
    };
    Timers {
        interval: asked.interval.iter().map(|&data| setting(data)).collect(),
        posix: posix
            .iter()
            .zip(&asked.posix)
            .map(|(timer, &(data, overrun))| {
                let thread = if let Target::Thread(tid) = timer.target { tid } else { 0 };
                let notify = match timer.notify {
                    Notify::Signal if thread != 0 => SIGEV_THREAD_ID,
                    Notify::Signal => SIGEV_SIGNAL,
                    Notify::None => SIGEV_NONE,
                    Notify::Thread => SIGEV_THREAD,
                };
                PosixTimer {
                    id: timer.id,
                    clock: timer.clockid,
                    notify,
                    signal: timer.signo,
                    value: timer.sigval,
                    thread,
                    setting: setting(data),
                    overrun: outcome.result(overrun) as i32,
                }
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_threads() {
        for clock in [libc::CLOCK_THREAD_CPUTIME_ID, -2, -3, -4] {
            assert!(is_of_its_maker(clock), "{clock}");
        }
        // Thread 7 by number; process 0, which is the caller's; process 7.
        for clock in [!7 << 3 | 6, -6, !7 << 3 | 2, libc::CLOCK_MONOTONIC, libc::CLOCK_PROCESS_CPUTIME_ID] {
            assert!(!is_of_its_maker(clock), "{clock}");
        }
    }
}
