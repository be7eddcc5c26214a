//! sched(7), all of it from outside but the timer slack, which is 0 here.

use torpor_image::scheduling::Scheduling;
use torpor_kernel::ids::Tid;
use torpor_kernel::process;

pub(crate) fn collect(tid: Tid) -> torpor_kernel::Result<Scheduling> {
    let attr = process::scheduling(tid)?;
    Ok(Scheduling {
        policy: attr.policy,
        flags: attr.flags,
        nice: attr.nice,
        priority: attr.priority,
        runtime: attr.runtime,
        deadline: attr.deadline,
        period: attr.period,
        utilization: (attr.util_min, attr.util_max),
        affinity: process::affinity(tid)?.into(),
        io_priority: process::io_priority(tid)?,
        timer_slack: 0,
    })
}
