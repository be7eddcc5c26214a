//! System V semaphores: values are set outside, by children with the pids that operated on them last; adjustments
//! (`SEM_UNDO`) are made by each task itself.
//!
//! To get an adjustment without a change of the value, a task operates with SEM_UNDO and takes that back without, in one
//! call (semop(2)): all or nothing, so nobody sees a value in between.

use torpor_image::Image;
use torpor_image::sysv_sem::{Semaphore, SemaphoreSet};
use torpor_image::task::Task;
use torpor_kernel::{child, sysv};
use torpor_parasite::call;
use torpor_parasite::script::Script;

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::sysv::{Class, Found, act, create, find};

/// include/uapi/linux/sem.h
const SEM_UNDO: i16 = 0x1000;
const SEMVMX: i32 = 32767;
const PLAIN: i16 = libc::IPC_NOWAIT as i16;

/// Makes a set, or finds it.
pub(crate) fn make(opener: &mut Opener<'_>, set: &SemaphoreSet) -> Result<()> {
    let what = format!("System V semaphore set {}", set.permissions.title(set.id));
    let all = sysv::sets().map_err(Error::kernel(what.as_str()))?;
    let pids = |s: &sysv::Set| -> Vec<i32> {
        let mut pids: Vec<i32> =
            (0..s.count).filter_map(|i| sysv::last_operator(s.id, i).ok()).filter(|p| *p != 0).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    };
    // Who operated on it is asked only of those that could be in the way.
    let near = |s: &sysv::Set| {
        s.id % sysv::INDEXES == set.id % sysv::INDEXES
            || s.permissions.key != 0 && s.permissions.key == set.permissions.key
    };
    let found: Vec<Found> = all
        .iter()
        .filter(|s| near(s))
        .map(|s| Found {
            id: s.id,
            key: s.permissions.key,
            creator: (s.permissions.cuid, s.permissions.cgid),
            fits: s.count as usize == set.semaphores.len(),
            pids: pids(s),
            changed: s.changed,
        })
        .collect();
    let permissions = &set.permissions;
    if find(opener, &what, set.id, permissions, &found)? {
        let old = sysv::values(set.id, set.semaphores.len() as u32).map_err(Error::kernel(what.as_str()))?;
        opener.sysv.old_values.push((set.id, old));
    } else {
        let (key, count) = (permissions.key, set.semaphores.len() as i32);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | (permissions.mode & 0o777) as i32;
        let pid = set.semaphores.iter().map(|s| s.pid).find(|p| *p != 0).unwrap_or(0);
        create(opener, &what, Class::Set, (set.id, pid), permissions, || {
            // SAFETY: semget takes numbers only.
            unsafe { libc::semget(key, count, flags) }
        })?;
        opener.sysv.sets.push(set.id);
    }
    let now = all.iter().find(|s| s.id == set.id).map(|s| s.permissions);
    let is = now.map_or((permissions.cuid, permissions.cgid, permissions.mode), |p| (p.uid, p.gid, p.mode));
    if is != (permissions.uid, permissions.gid, permissions.mode) {
        // SAFETY: an all-zero semid_ds is valid; IPC_SET reads it.
        unsafe {
            let mut status: libc::semid_ds = std::mem::zeroed();
            status.sem_perm.uid = permissions.uid;
            status.sem_perm.gid = permissions.gid;
            status.sem_perm.mode = permissions.mode as _;
            if libc::semctl(set.id, 0, libc::IPC_SET, &raw mut status) != 0 {
                return Err(Error::last(&what, "semctl(IPC_SET)"));
            }
        }
    }
    let mut pids: Vec<i32> = set.semaphores.iter().map(|s| s.pid).collect();
    pids.sort_unstable();
    pids.dedup();
    for pid in pids {
        let failed = act(opener.image, &what, pid, || set_values(set, pid))?;
        if failed < 0 {
            let errno = nix::errno::Errno::from_raw(-failed as i32);
            return Err(Error::Open { what, call: "semctl(SETVAL)", errno });
        }
    }
    Ok(())
}

/// Sets the semaphores that `pid` operated on last; semctl(2) notes the caller as that. Makes system calls only.
fn set_values(set: &SemaphoreSet, pid: i32) -> i64 {
    let mut touched = false;
    for (i, semaphore) in set.semaphores.iter().enumerate().filter(|(_, s)| s.pid == pid) {
        // Nobody was ever noted for one that never changed.
        if *semaphore == Semaphore::default() {
            continue;
        }
        // SAFETY: SETVAL takes numbers only.
        let got = unsafe { libc::semctl(set.id, i as i32, libc::SETVAL, i32::from(semaphore.value)) };
        if got < 0 {
            return child::result(got);
        }
        if !set.operated || touched {
            continue;
        }
        // Programs wait for the time of the first semop to be set (semget(2)).
        let mut steps = no_change(i as u16, semaphore.value);
        let count = if semaphore.value == 0 { 1 } else { 2 };
        // SAFETY: semop reads `count` operations.
        let got = unsafe { libc::semop(set.id, steps.as_mut_ptr(), count) };
        if got < 0 {
            return child::result(got);
        }
        touched = true;
    }
    0
}

/// Operations that leave a semaphore as it is.
fn no_change(semaphore: u16, value: u16) -> [libc::sembuf; 2] {
    let step = |by| libc::sembuf { sem_num: semaphore, sem_op: by, sem_flg: PLAIN };
    [step(-i16::from_ne_bytes(value.min(1).to_ne_bytes())), step(1)]
}

/// Plans the adjustments of a task.
pub(crate) fn plan(script: &mut Script, image: &Image, task: &Task) {
    for set in &image.objects.sysv_sem {
        for adjustment in set.adjustments.iter().filter(|a| a.pid == task.pid) {
            let value = set.semaphores.get(usize::from(adjustment.semaphore)).map_or(0, |s| s.value);
            let steps = adjust(value.into(), adjustment.value);
            let bytes: Vec<u8> = steps
                .iter()
                .flat_map(|(by, flags)| {
                    [adjustment.semaphore.to_ne_bytes(), by.to_ne_bytes(), flags.to_ne_bytes()]
                })
                .flatten()
                .collect();
            let operations = script.data(&bytes);
            let purpose = format!("the adjustment of semaphore {} of set {}", adjustment.semaphore, set.id);
            call!(script, purpose, libc::SYS_semop, set.id, operations, steps.len());
        }
    }
}

/// Plans who operated last on semaphores that others have adjustments of: making those was operating, too. All
/// tasks have made theirs by now.
pub(crate) fn operators(script: &mut Script, image: &Image, task: &Task) {
    for set in &image.objects.sysv_sem {
        for (i, semaphore) in set.semaphores.iter().enumerate().filter(|(_, s)| s.pid == task.pid.0) {
            if !set.adjustments.iter().any(|a| usize::from(a.semaphore) == i && a.pid != task.pid) {
                continue;
            }
            let steps = no_change(i as u16, semaphore.value);
            let count = if semaphore.value == 0 { 1 } else { 2 };
            let words =
                |s: &libc::sembuf| [s.sem_num.to_ne_bytes(), s.sem_op.to_ne_bytes(), s.sem_flg.to_ne_bytes()];
            let bytes: Vec<u8> = steps[..count].iter().flat_map(words).flatten().collect();
            let operations = script.data(&bytes);
            let purpose = format!("the last operator of semaphore {i} of set {}", set.id);
            call!(script, purpose, libc::SYS_semop, set.id, operations, count);
        }
    }
}

/// Operations that leave the value as it is and add `by` to the adjustment.
fn adjust(value: i32, by: i32) -> Vec<(i16, i16)> {
    let mut steps = Vec::new();
    let mut step = |by: i32, flags| {
        if by != 0 {
            steps.push((by as i16, flags));
        }
    };
    step(-value, PLAIN);
    if by > 0 {
        step(by, PLAIN);
        step(-by, PLAIN | SEM_UNDO);
    } else {
        let first = by.max(-SEMVMX);
        for part in [first, by - first] {
            step(-part, PLAIN | SEM_UNDO);
            step(part, PLAIN);
        }
    }
    step(value, PLAIN);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjustments_change_no_value() {
        for value in [0, 1, 700, 32767] {
            for wanted in [-32768, -32767, -5, 1, 32767] {
                let (mut now, mut adjustment) = (value, 0);
                for (by, flags) in adjust(value, wanted) {
                    now += i32::from(by);
                    assert!((0..=SEMVMX).contains(&now), "value {value} adjustment {wanted}");
                    if flags & SEM_UNDO != 0 {
                        adjustment -= i32::from(by);
                        assert!((-SEMVMX - 1..=SEMVMX).contains(&adjustment));
                    }
                }
                assert_eq!((now, adjustment), (value, wanted));
            }
        }
    }
}
