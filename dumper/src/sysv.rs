//! System V IPC: which objects belong to the processes of a dump.
//!
//! Such an object outlives every process, and the kernel keeps no list of who uses it (ipc/util.c). What it does note
//! are pids: of who created or attached a segment, who operated on a semaphore last, who sent or received last. So an
//! object belongs to the dump when
//!
//! - a segment is attached by a process of the dump, or was created by one and is attached by nobody;
//! - a semaphore was operated on last (SETVAL and SETALL included) by one, or one has an adjustment of it;
//! - the last sender or receiver of a queue is one.
//!
//! If a process outside is found in the same place, the object is shared with it and the dump refused: what that
//! process does meanwhile would be undone by a restore.

use std::collections::HashMap;

use torpor_image::sysv::Permissions;
use torpor_kernel::ids::Pid;
use torpor_kernel::{stat, status, sysv};

use crate::collect::Collector;
use crate::error::{Refusal, Result};
use crate::{freeze, sysv_msg, sysv_sem, sysv_shm};

/// What the collectors of System V IPC note on their way.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Areas that map a segment, by its id.
    pub(crate) attached: HashMap<i32, u64>,
    /// Segments as listed when the first of them was met.
    pub(crate) segments: Option<Vec<sysv::Segment>>,
    /// Processes that have an undo list, by a thread that lives.
    pub(crate) undo: Vec<Pid>,
}

/// Collects what belongs to the processes of the dump, once the memory of each was looked at.
pub(crate) fn collect(collector: &mut Collector) -> Result<()> {
    let members = &members(collector);
    sysv_shm::collect(collector, members)?;
    sysv_sem::collect(collector, members)?;
    sysv_msg::collect(collector, members)
}

/// What was found to belong to the dump, for people.
pub(crate) fn names(collector: &Collector) -> Vec<String> {
    let objects = &collector.objects;
    let segments =
        objects.inodes.iter().filter_map(|i| i.segment()).map(|s| ("shared memory", s.id, &s.permissions));
    let sets = objects.sysv_sem.iter().map(|s| ("semaphores", s.id, &s.permissions));
    let queues = objects.sysv_msg.iter().map(|q| ("message queue", q.id, &q.permissions));
    let all = segments.chain(sets).chain(queues);
    all.map(|(kind, id, permissions)| format!("{kind} {}", permissions.title(id))).collect()
}

/// All processes of the dump.
pub(crate) fn members(collector: &Collector) -> Vec<Pid> {
    collector.members.iter().map(|pid| Pid(*pid)).collect()
}

/// Refuses an object that is not one process's in particular.
pub(crate) fn refuse(collector: &mut Collector, object: String, why: String, remedy: &str) {
    collector.refusals.push(Refusal { object, why, remedy: remedy.to_owned() });
}

pub(crate) fn permissions(p: &sysv::Permissions) -> Permissions {
    Permissions { key: p.key, uid: p.uid, gid: p.gid, cuid: p.cuid, cgid: p.cgid, mode: p.mode }
}

/// Whether a noted pid is that of a process of the dump, or of a thread: who is handed a message while it waits is noted
/// by thread (ipc/msg.c, `pipelined_send`).
pub(crate) fn is_member(members: &[Pid], pid: i32) -> bool {
    let of_thread = |tid| status::of_process(Pid(tid)).is_ok_and(|s| members.contains(&Pid(s.tgid)));
    members.contains(&Pid(pid)) || pid > 0 && of_thread(pid)
}

/// "pid 7 (psql)" if `pid` is a process outside of the dump that was there at `used` (seconds since 1970) already.
/// Pids are noted for ever; one that began later is another process of that pid.
pub(crate) fn outsider(members: &[Pid], pid: i32, used: u64) -> Option<String> {
    if pid <= 0 || is_member(members, pid) || pid == Pid::this().0 {
        return None;
    }
    let pid = Pid(pid);
    // It shows no longer what it has once it has ended.
    if status::of_process(pid).is_ok_and(|s| matches!(s.state, 'Z' | 'X')) {
        return None;
    }
    (started(pid)? <= used + 1).then(|| format!("pid {pid} ({})", freeze::name_of(pid.0)))
}

/// When a process started, in seconds since 1970.
pub(crate) fn started(pid: Pid) -> Option<u64> {
    u64::try_from(stat::of_process(pid).ok()?.started() / 1_000_000_000).ok()
}
