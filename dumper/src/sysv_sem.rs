//! System V semaphores, and the adjustments that the end of a process makes to them (`SEM_UNDO`).
//!
//! Adjustments (`semadj`) are shown nowhere. But semop(2) tells where their range ends: an operation with SEM_UNDO
//! fails with ERANGE if it would take the adjustment out of -32768..=32767 (ipc/sem.c, `perform_atomic_semop_slow`),
//! before anything is changed; and operations made together are made all or none. So a task is made to ask, in one
//! call: is the value what it was a moment ago (take it, wait for zero); operate with SEM_UNDO; and last two operations
//! of which one can never be done (wait for zero, take one), whatever the value is. Nothing is ever changed by it.
//! ERANGE means that the adjustment had no room. EAGAIN means that it had, or that somebody else has changed the value
//! meanwhile: so each question is asked both ways, and just one of the two answers must be ERANGE.
//!
//! Only a process that has a list of adjustments at all is asked, which kcmp(2) tells: torpor itself has none, and
//! whose list is the same as torpor's has none either. (Every process with threads has one, empty or not, since they
//! share it.)

use std::cmp::Ordering;

use torpor_image::Pid as ImagePid;
use torpor_image::sysv_sem::{Adjustment, Semaphore, SemaphoreSet};
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::Pid;
use torpor_kernel::sysv;
use torpor_parasite::script::{OpId, Outcome, Script};

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::sysv::{members, outsider, permissions, refuse, started};
use crate::sysv_msg::gone;

/// include/uapi/linux/sem.h
const SEM_UNDO: i16 = 0x1000;
const SEMVMX: i32 = 32767;
/// Questions that one script asks about one semaphore.
const QUESTIONS: i32 = 64;
/// How often a semaphore is asked about whose value others change.
const PATIENCE: u32 = 20;
/// Semaphores that are asked about at most.
const MOST: usize = 4096;

/// Sets that a process of the dump operated on last.
pub(crate) fn collect(collector: &mut Collector, members: &[Pid]) -> Result<()> {
    let root = members.iter().filter_map(|pid| started(*pid)).min().unwrap_or(u64::MAX);
    for set in list(collector)? {
        let kept = match read(&set) {
            Ok(kept) => kept,
            Err(e) if gone(&e) => continue,
            Err(_) => {
                maybe_own(collector, &set, root);
                continue;
            }
        };
        if kept.semaphores.iter().any(|s| members.contains(&Pid(s.pid))) {
            add(collector, members, &set, kept);
        } else if kept.semaphores.iter().all(|s| s.pid == 0) {
            maybe_own(collector, &set, root);
        }
    }
    if collector.live {
        let looked_at = collector.pid;
        for pid in members {
            collector.turn_to(crate::survey::living(*pid));
            if has_list(collector, *pid) {
                let asked =
                    list(collector)?.iter().filter(|s| s.operated != 0).map(|s| s.count as usize).sum();
                refuse_many(collector, asked);
            }
        }
        collector.turn_to(looked_at);
    }
    Ok(())
}

/// Refuses to ask about more semaphores than can be asked about; says whether it did.
fn refuse_many(collector: &mut Collector, asked: usize) -> bool {
    if asked > MOST {
        collector.refuse(
            "its semaphore adjustments (SEM_UNDO)",
            format!("there are {asked} semaphores on this machine to be asked about, and no more than {MOST} can be"),
            "remove what nobody uses (`ipcs -s`, `ipcrm`)",
        );
    }
    asked > MOST
}

/// Whether a process has an undo list; one that it shares with another is refused.
fn has_list(collector: &mut Collector, title: Pid) -> bool {
    let pid = collector.pid;
    // This thread must have none, to compare with; one that has made another has (`CLONE_SYSVSEM`, pthread_create(3)).
    // SAFETY: both calls take numbers only; we do not operate on semaphores with SEM_UNDO.
    let this = Pid(unsafe {
        libc::unshare(libc::CLONE_SYSVSEM);
        libc::gettid()
    });
    if !fds::kcmp(pid, this, KcmpType::Sysvsem, 0, 0).is_ok_and(|o| o != Ordering::Equal) {
        return false;
    }
    let same =
        |other: &&Pid| fds::kcmp(pid, **other, KcmpType::Sysvsem, 0, 0).is_ok_and(|o| o == Ordering::Equal);
    if let Some(other) = collector.sysv.undo.iter().find(same) {
        let why = format!("pid {title} and pid {other} share it (CLONE_SYSVSEM)");
        let remedy = "let them operate on semaphores without SEM_UNDO";
        refuse(collector, "a list of semaphore adjustments".into(), why, remedy);
    }
    collector.sysv.undo.push(pid);
    true
}

fn list(collector: &Collector) -> Result<Vec<sysv::Set>> {
    sysv::sets().map_err(Error::kernel(collector.pid, "listing System V semaphores"))
}

/// A set that nobody ever operated on, made by a user of the dump in its time: whose it is cannot be known.
fn maybe_own(collector: &mut Collector, set: &sysv::Set, root: u64) {
    let owner = nix::sys::stat::stat(format!("/proc/{}", collector.pid).as_str()).map(|s| s.st_uid);
    if set.changed >= root && owner == Ok(set.permissions.cuid) {
        collector
            .losses
            .push(format!("{}, if it is its own: nobody has operated on it since it was made", title(set)));
    }
}

/// "System V semaphore set 7 (key 0x51)"
fn title(set: &sysv::Set) -> String {
    format!("System V semaphore set {}", permissions(&set.permissions).title(set.id))
}

fn read(set: &sysv::Set) -> torpor_kernel::Result<SemaphoreSet> {
    let values = sysv::values(set.id, set.count)?;
    let with_pid = |(i, value)| Ok(Semaphore { value, pid: sysv::last_operator(set.id, i as u32)? });
    Ok(SemaphoreSet {
        id: set.id,
        permissions: permissions(&set.permissions),
        semaphores: values.into_iter().enumerate().map(with_pid).collect::<torpor_kernel::Result<_>>()?,
        operated: set.operated != 0,
        adjustments: Vec::new(),
    })
}

fn add(collector: &mut Collector, members: &[Pid], set: &sysv::Set, kept: SemaphoreSet) {
    let used = set.operated.max(set.changed);
    if let Some(other) = kept.semaphores.iter().find_map(|s| outsider(members, s.pid, used)) {
        refuse(
            collector,
            title(set),
            format!("it is also used by {other}, which is not part of the dump"),
            "end that process before the dump",
        );
        return;
    }
    collector.objects.sysv_sem.push(kept);
}

/// What the scripts ask about: a semaphore, its value, and the range its adjustment is in.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    set: i32,
    semaphore: u16,
    value: i32,
    low: i32,
    high: i32,
}

/// Finds the adjustments of the process that is being looked at, and the sets they are of. `ask` runs a script in it.
pub(crate) fn adjustments(
    collector: &mut Collector,
    pid: Pid,
    mut ask: impl FnMut(&Script) -> Result<Outcome>,
) -> Result<()> {
    if !has_list(collector, pid) {
        return Ok(());
    }
    let mut candidates = Vec::new();
    // Being asked about a set makes the end of a process count as an operation on it (ipc/sem.c, `exit_sem`), which
    // programs may wait for: sets that were never operated on are left alone, and have no adjustments.
    for set in list(collector)?.into_iter().filter(|s| s.operated != 0) {
        let Ok(values) = sysv::values(set.id, set.count) else { continue };
        candidates.extend(values.into_iter().enumerate().map(|(i, value)| Candidate {
            set: set.id,
            semaphore: i as u16,
            value: value.into(),
            low: -SEMVMX - 1,
            high: SEMVMX,
        }));
    }
    if refuse_many(collector, candidates.len()) {
        return Ok(());
    }
    // Most are 0: two questions tell.
    let mut unknown: Vec<i32> = Vec::new();
    let mut first = true;
    let mut patience = PATIENCE;
    while candidates.iter().any(|c| c.low != c.high) {
        let width = |all: &[Candidate]| all.iter().map(|c| i64::from(c.high - c.low)).sum::<i64>();
        let before = width(&candidates);
        let answers = round(&candidates, |c| if first { vec![0, 1] } else { thresholds(c) }, &mut ask)?;
        candidates.retain_mut(|c| narrow(c, &answers, &mut unknown) && (c.low, c.high) != (0, 0));
        if width(&candidates) == before {
            patience -= 1;
            if patience == 0 {
                unknown.extend(candidates.iter().filter(|c| c.low != c.high).map(|c| c.set));
                candidates.retain(|c| c.low == c.high);
            }
            for c in &mut candidates {
                let value = sysv::value(c.set, c.semaphore.into());
                c.value = value.map_or(c.value, i32::from);
            }
        }
        first = false;
    }
    unknown.sort_unstable();
    unknown.dedup();
    for set in unknown {
        collector.losses.push(format!(
            "adjustments that pid {pid} may have of System V semaphore set {set}, which it may not use, or others use \
             all the time"
        ));
    }
    for found in candidates.into_iter().filter(|c| c.low != 0) {
        let adjustment = Adjustment { pid: ImagePid(pid.0), semaphore: found.semaphore, value: found.low };
        if !collector.objects.sysv_sem.iter().any(|s| s.id == found.set) {
            let set = list(collector)?.into_iter().find(|s| s.id == found.set);
            if let Some((set, kept)) = set.and_then(|s| Some((s, read(&s).ok()?))) {
                let members = members(collector);
                add(collector, &members, &set, kept);
            }
        }
        if let Some(set) = collector.objects.sysv_sem.iter_mut().find(|s| s.id == found.set) {
            set.adjustments.push(adjustment);
        }
    }
    Ok(())
}

/// Values that split what is left of a range evenly.
fn thresholds(candidate: &Candidate) -> Vec<i32> {
    let (low, width) = (candidate.low, candidate.high - candidate.low);
    let mut all: Vec<i32> = (1..=QUESTIONS).map(|i| low + (width * i + QUESTIONS - 1) / QUESTIONS).collect();
    all.dedup();
    all.retain(|t| *t > candidate.low && *t <= candidate.high);
    all
}

/// An answer: is the adjustment at least this? `Err` if the task may not ask, `Ok(None)` if the value has changed.
type Answer = ((i32, u16), i32, Result<Option<bool>, ()>);

fn round(
    candidates: &[Candidate],
    thresholds: impl Fn(&Candidate) -> Vec<i32>,
    ask: &mut impl FnMut(&Script) -> Result<Outcome>,
) -> Result<Vec<Answer>> {
    let mut answers = Vec::new();
    let open: Vec<&Candidate> = candidates.iter().filter(|c| c.low != c.high).collect();
    // A script of some hundred kilobytes at most.
    for part in open.chunks(16) {
        let mut script = Script::new();
        let mut asked = Vec::new();
        for &candidate in part {
            for threshold in thresholds(candidate) {
                let above = question(&mut script, candidate, &raise(candidate.value, SEMVMX + 1 - threshold));
                let below = question(&mut script, candidate, &lower(candidate.value, threshold + SEMVMX + 1));
                asked.push((candidate, threshold, above, below));
            }
        }
        let outcome = ask(&script)?;
        for (candidate, threshold, above, below) in asked {
            let errno = |op| -outcome.result(op) as i32;
            let answer = answer(errno(above), errno(below));
            answers.push(((candidate.set, candidate.semaphore), threshold, answer));
        }
    }
    Ok(answers)
}

fn answer(above: i32, below: i32) -> Result<Option<bool>, ()> {
    match (above, below) {
        (libc::ERANGE, libc::EAGAIN) => Ok(Some(true)),
        (libc::EAGAIN, libc::ERANGE) => Ok(Some(false)),
        (libc::EAGAIN, libc::EAGAIN) => Ok(None),
        _ => Err(()),
    }
}

fn question(script: &mut Script, candidate: &Candidate, steps: &Steps) -> OpId {
    let bytes: Vec<u8> = steps
        .iter()
        .flat_map(|(by, flags)| [candidate.semaphore.to_ne_bytes(), by.to_ne_bytes(), flags.to_ne_bytes()])
        .flatten()
        .collect();
    let operations = script.data(&bytes);
    let purpose = format!("the adjustment of semaphore {} of set {}", candidate.semaphore, candidate.set);
    let args = [candidate.set.into(), operations.into(), steps.len().into()];
    script.try_call(purpose, libc::SYS_semop, &args)
}

type Steps = Vec<(i16, i16)>;
const PLAIN: i16 = libc::IPC_NOWAIT as i16;

/// Adds `by` to the adjustment, if the value is `value`: it leaves its range if it is at least 32768 - `by`.
fn raise(value: i32, by: i32) -> Steps {
    both(value, by, |part| [(part, PLAIN), (-part, PLAIN | SEM_UNDO)])
}

/// Subtracts `by` from the adjustment, if the value is `value`: it leaves its range if it is below `by` - 32768.
fn lower(value: i32, by: i32) -> Steps {
    both(value, by, |part| [(part, PLAIN | SEM_UNDO), (-part, PLAIN)])
}

fn both(value: i32, by: i32, pair: impl Fn(i16) -> [(i16, i16); 2]) -> Steps {
    let mut steps = Vec::new();
    if value > 0 {
        steps.push((-value as i16, PLAIN));
    }
    steps.push((0, PLAIN));
    let mut rest = by;
    while rest > 0 {
        let part = rest.min(SEMVMX);
        steps.extend(pair(part as i16));
        rest -= part;
    }
    // Never both, whatever the value.
    steps.extend([(0, PLAIN), (-1, PLAIN)]);
    steps
}

/// Takes the answers about a candidate; false if it cannot be asked.
fn narrow(candidate: &mut Candidate, answers: &[Answer], unknown: &mut Vec<i32>) -> bool {
    let key = (candidate.set, candidate.semaphore);
    for (_, threshold, answer) in answers.iter().filter(|(of, ..)| *of == key) {
        match answer {
            Ok(Some(true)) => candidate.low = candidate.low.max(*threshold),
            Ok(Some(false)) => candidate.high = candidate.high.min(*threshold - 1),
            Ok(None) => {}
            Err(()) => {
                unknown.push(candidate.set);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer (ipc/sem.c, `perform_atomic_semop_slow`).
    fn semop(mut value: i32, mut adjustment: i32, steps: &Steps) -> i32 {
        for &(by, flags) in steps {
            if by == 0 && value != 0 || value + i32::from(by) < 0 {
                return libc::EAGAIN;
            }
            value += i32::from(by);
            if value > SEMVMX {
                return libc::ERANGE;
            }
            if flags & SEM_UNDO != 0 {
                adjustment -= i32::from(by);
                if !(-SEMVMX - 1..=SEMVMX).contains(&adjustment) {
                    return libc::ERANGE;
                }
            }
        }
        0
    }

    #[test]
    fn every_adjustment_is_found_and_nothing_changed() {
        for value in [0, 1, 5, 32766, 32767] {
            for adjustment in [-32768, -32767, -300, -1, 0, 1, 2, 255, 4711, 32766, 32767] {
                let mut c = Candidate { set: 1, semaphore: 0, value, low: -SEMVMX - 1, high: SEMVMX };
                let mut rounds = 0;
                let mut next = vec![0, 1];
                while c.low != c.high {
                    let answers: Vec<Answer> = next
                        .iter()
                        .map(|&t| {
                            let above = semop(value, adjustment, &raise(value, SEMVMX + 1 - t));
                            let below = semop(value, adjustment, &lower(value, t + SEMVMX + 1));
                            let answer = answer(above, below);
                            assert!(matches!(answer, Ok(Some(_))), "{value} {adjustment} {t}: {answer:?}");
                            ((1, 0), t, answer)
                        })
                        .collect();
                    assert!(narrow(&mut c, &answers, &mut Vec::new()));
                    next = thresholds(&c);
                    rounds += 1;
                    assert!(rounds < 5, "value {value} adjustment {adjustment}: {c:?}");
                }
                assert_eq!(c.low, adjustment, "value {value}");
            }
        }
    }

    #[test]
    fn a_value_that_changes_meanwhile_is_no_answer() {
        for value in [0, 1, 5, 32767] {
            for now in (0..=SEMVMX).step_by(331).filter(|n| *n != value) {
                for (adjustment, t) in [(0, 0), (0, 1), (7, 7), (-32768, -32767), (32767, 32767)] {
                    for steps in [raise(value, SEMVMX + 1 - t), lower(value, t + SEMVMX + 1)] {
                        assert_eq!(semop(now, adjustment, &steps), libc::EAGAIN, "{value} {now} {t}");
                    }
                }
            }
        }
    }
}
