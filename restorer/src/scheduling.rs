//! Planning scheduling: what differs from what a new task begins with.

use torpor_image::scheduling::Scheduling;
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;

/// Bytes of `struct sched_attr` with utilization clamps (linux/sched/types.h).
const SCHED_ATTR: u32 = 56;
const IOPRIO_WHO_PROCESS: i32 = 1;
const PR_SET_TIMERSLACK: u64 = 29;

pub(crate) fn plan(script: &mut Script, wanted: &Scheduling, host: &Host) {
    let clamped = wanted.flags & 0x60 != 0;
    if (wanted.policy, wanted.nice) != host.scheduling || wanted.priority != 0 || wanted.flags != 0 {
        let mut attr = Vec::with_capacity(SCHED_ATTR as usize);
        attr.extend_from_slice(&SCHED_ATTR.to_ne_bytes());
        attr.extend_from_slice(&wanted.policy.to_ne_bytes());
        attr.extend_from_slice(&wanted.flags.to_ne_bytes());
        attr.extend_from_slice(&wanted.nice.to_ne_bytes());
        attr.extend_from_slice(&wanted.priority.to_ne_bytes());
        for time in [wanted.runtime, wanted.deadline, wanted.period] {
            attr.extend_from_slice(&time.to_ne_bytes());
        }
        let clamps = if clamped { wanted.utilization } else { (0, 0) };
        attr.extend_from_slice(&clamps.0.to_ne_bytes());
        attr.extend_from_slice(&clamps.1.to_ne_bytes());
        let attr = script.data(&attr);
        call!(script, "the scheduling policy", libc::SYS_sched_setattr, 0, attr, 0);
    }
    // Policies other than the usual one keep a nice value that sched_setattr does not set.
    if wanted.policy != 0 && wanted.nice != host.scheduling.1 {
        call!(script, "the nice value", libc::SYS_setpriority, libc::PRIO_PROCESS as i32, 0, wanted.nice);
    }
    if wanted.affinity != host.affinity {
        let mask = script.data(&wanted.affinity);
        call!(script, "the cpu affinity", libc::SYS_sched_setaffinity, 0, wanted.affinity.len(), mask);
    }
    if wanted.io_priority != 0 {
        call!(script, "the i/o priority", libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, wanted.io_priority);
    }
    // Real-time threads have none, and setting 0 would mean the default.
    if wanted.timer_slack != 0 {
        let args = [Value::Number(PR_SET_TIMERSLACK), wanted.timer_slack.into()];
        script.call("the timer slack", libc::SYS_prctl, &args);
    }
}
