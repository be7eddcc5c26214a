//! IPC objects: numbers that calls are made with.

use std::collections::BTreeSet;

use crate::Image;
use crate::mqueue::Mqueue;

/// The largest value of a semaphore (include/uapi/linux/sem.h, `SEMVMX`), and the range of adjustments.
const SEMVMX: i32 = 32767;
/// Most semaphores of a set (ipc/sem.c: the index is an unsigned short).
const SEMAPHORES: usize = 65535;
/// include/linux/ipc_namespace.h (`HARD_MSGMAX`, `HARD_MSGSIZEMAX`), include/uapi/linux/mqueue.h (`MQ_PRIO_MAX`).
const MAX_MESSAGES: u64 = 65536;
const MAX_MESSAGE_SIZE: u64 = 16 << 20;
const MAX_PRIORITY: u32 = 32767;

/// Says what is impossible.
pub(super) fn check(image: &Image) -> Result<(), String> {
    let objects = &image.objects;
    let mut segments = BTreeSet::new();
    for inode in &objects.inodes {
        let Some(segment) = inode.segment() else { continue };
        if segment.id < 0 || inode.size == 0 || !segments.insert(segment.id) {
            return Err(format!("inode {} is an impossible System V segment", inode.id));
        }
    }
    let mut sets = BTreeSet::new();
    for set in &objects.sysv_sem {
        let count = set.semaphores.len();
        let right = set.id >= 0
            && sets.insert(set.id)
            && (1..=SEMAPHORES).contains(&count)
            && set.semaphores.iter().all(|s| i32::from(s.value) <= SEMVMX)
            && set.adjustments.iter().all(|a| {
                usize::from(a.semaphore) < count && (-SEMVMX - 1..=SEMVMX).contains(&a.value) && a.pid.0 > 0
            });
        if !right {
            return Err(format!("semaphore set {} is impossible", set.id));
        }
    }
    let mut queues = BTreeSet::new();
    for queue in &objects.sysv_msg {
        let right = queue.id >= 0 && queues.insert(queue.id) && queue.messages.iter().all(|m| m.kind > 0);
        if !right {
            return Err(format!("message queue {} is impossible", queue.id));
        }
    }
    match objects
        .mqueues
        .iter()
        .position(|q| !mqueue(q) || q.asked.is_some_and(|pid| !image.manifest.tasks.contains(&pid)))
    {
        Some(i) => Err(format!("POSIX message queue {i} is impossible")),
        None => Ok(()),
    }
}

fn mqueue(queue: &Mqueue) -> bool {
    let name = queue.name.strip_prefix(b"/");
    name.is_some_and(|n| !n.is_empty() && n.len() <= 255 && !n.contains(&b'/') && !n.contains(&0))
        && (1..=MAX_MESSAGES).contains(&queue.max_messages)
        && (1..=MAX_MESSAGE_SIZE).contains(&queue.message_size)
        && queue.messages.len() as u64 <= queue.max_messages
        && queue
            .messages
            .iter()
            .all(|m| m.priority <= MAX_PRIORITY && m.text.len() as u64 <= queue.message_size)
}
