//! IPC objects that a victim has made: they outlive it, and are removed with it.

use std::ffi::CString;

use torpor_kernel::sysv;

/// Ids of System V objects.
#[derive(Debug, Default)]
pub struct Objects {
    /// Shared memory.
    pub segments: Vec<i32>,
    /// Semaphore sets.
    pub sets: Vec<i32>,
    /// Message queues.
    pub queues: Vec<i32>,
}

impl Objects {
    /// Those of a victim: it has used them last, or they have a key of its own, which ends in its pid.
    pub fn of(pid: i32) -> Objects {
        let own = |key: i32| (0..3).any(|n| key & 0xff_ffff == pid + n * 4096) && key >> 24 >= 0x70;
        let ids = |all: Vec<(i32, i32, i32)>| -> Vec<i32> {
            all.into_iter().filter(|(_, key, by)| *by == pid || own(*key)).map(|(id, ..)| id).collect()
        };
        let operator =
            |s: &sysv::Set| (0..s.count).any(|i| sysv::last_operator(s.id, i).is_ok_and(|p| p == pid));
        let (segments, sets, queues) = (sysv::segments(), sysv::sets(), sysv::queues());
        let set = |s: &sysv::Set| (s.id, s.permissions.key, if operator(s) { pid } else { 0 });
        Objects {
            segments: ids(segments
                .unwrap_or_default()
                .iter()
                .map(|s| (s.id, s.permissions.key, s.creator))
                .collect()),
            sets: ids(sets.unwrap_or_default().iter().map(set).collect()),
            queues: ids(queues
                .unwrap_or_default()
                .iter()
                .map(|q| (q.id, q.permissions.key, q.sender))
                .collect()),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.sets.is_empty() && self.queues.is_empty()
    }
}

/// The name that a victim's POSIX message queue has.
pub fn queue_name(pid: i32) -> CString {
    CString::new(format!("/torpor-victim-{pid}")).unwrap_or_default()
}

/// Removes everything of a victim.
pub fn remove(pid: i32) {
    let objects = Objects::of(pid);
    // SAFETY: removes by id or name what the victim has made.
    unsafe {
        for id in objects.segments {
            libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        }
        for id in objects.sets {
            libc::semctl(id, 0, libc::IPC_RMID);
        }
        for id in objects.queues {
            libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut());
        }
        libc::mq_unlink(queue_name(pid).as_ptr());
    }
}
