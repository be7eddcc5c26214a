//! Planning interval timers and POSIX timers.

use torpor_image::timer::{Interval, PosixTimer, Timers};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// `struct sigevent`
const SIGEVENT: usize = 64;

/// Both kinds of setting put the period first.
fn words(setting: &Interval) -> [u64; 4] {
    [setting.period.0, setting.period.1, setting.value.0, setting.value.1].map(|n| n as u64)
}

/// All timers of a process, armed; its threads exist already.
pub(crate) fn plan(script: &mut Script, timers: &Timers, host: &Host) {
    create(script, &timers.posix, host);
    for timer in &timers.posix {
        if timer.setting.value != (0, 0) {
            let setting = script.words(&words(&timer.setting));
            let purpose = format!("POSIX timer {}", timer.id);
            call!(script, purpose, libc::SYS_timer_settime, timer.id, 0, setting, 0);
        }
    }
    for (which, timer) in timers.interval.iter().enumerate() {
        // A periodic timer whose signal has not been taken yet stands still until then
        // (kernel/signal.c, `dequeue_signal`), and shows no time left.
        let value = if timer.value == (0, 0) { timer.period } else { timer.value };
        if value != (0, 0) {
            let setting = script.words(&words(&Interval { value, ..*timer }));
            call!(script, format!("interval timer {which}"), libc::SYS_setitimer, which, setting, 0);
        }
    }
}

fn create(script: &mut Script, timers: &[PosixTimer], host: &Host) {
    if timers.is_empty() {
        return;
    }
    let mut timers: Vec<&PosixTimer> = timers.iter().collect();
    timers.sort_by_key(|t| t.id);
    if host.timer_ids {
        let n = Value::Number;
        script.call("timer ids", libc::SYS_prctl, &[n(PR_TIMER_CREATE_RESTORE_IDS), n(1)]);
        for timer in timers {
            create_one(script, timer);
        }
        script.call("timer ids", libc::SYS_prctl, &[n(PR_TIMER_CREATE_RESTORE_IDS), n(0)]);
        return;
    }
    // Ids are given in sequence from 0 (kernel/time/posix-timers.c): those not wanted are made and deleted.
    let mut next = 0;
    for timer in timers {
        while next < timer.id {
            let id = script.data(&next.to_ne_bytes());
            let purpose = format!("a place holder for POSIX timer {next}");
            call!(script, purpose.clone(), libc::SYS_timer_create, libc::CLOCK_MONOTONIC, 0, id);
            call!(script, purpose, libc::SYS_timer_delete, next);
            next += 1;
        }
        create_one(script, timer);
        next += 1;
    }
}

fn create_one(script: &mut Script, timer: &PosixTimer) {
    let mut event = [0u8; SIGEVENT];
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.thread.to_ne_bytes());
    let event = script.data(&event);
    let id = script.data(&timer.id.to_ne_bytes());
    call!(script, format!("POSIX timer {}", timer.id), libc::SYS_timer_create, timer.clock, event, id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_reached_by_place_holders_on_old_kernels() {
        let timer = PosixTimer {
            id: 2,
            clock: 1,
            notify: 0,
            signal: 10,
            value: 0,
            thread: 0,
            setting: Interval::default(),
            overrun: 0,
        };
        let mut script = Script::new();
        create(&mut script, &[timer], &crate::tests::host());
        assert_eq!(script.steps().len(), 3);
        let old = Host { timer_ids: false, ..crate::tests::host() };
        let mut script = Script::new();
        create(&mut script, &[timer], &old);
        assert_eq!(script.steps().len(), 5);
    }
}
