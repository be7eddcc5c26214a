//! sched(7), real-time priority: outranking others for a moment that must not be long.
//!
//! Threads that we stop and wake are one case: a woken thread would else take our cpu before the next is woken, 3 ms each
//! time on a busy machine.

/// Real-time priority of this thread while it lives, where the kernel gives it; below that of [`urgent`].
#[derive(Debug)]
#[must_use]
pub struct RealTime {
    before: Option<(i32, libc::sched_param)>,
}

impl RealTime {
    /// Raises it.
    pub fn raise() -> Self {
        // SAFETY: sched_getscheduler reads nothing of ours; an all-zero sched_param is a valid one.
        let (policy, mut param) = unsafe { (libc::sched_getscheduler(0), std::mem::zeroed()) };
        // SAFETY: `param` is a sched_param of ours.
        let known = policy >= 0 && unsafe { libc::sched_getparam(0, &raw mut param) } == 0;
        if !known || policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO {
            return RealTime { before: None };
        }
        let high = libc::sched_param { sched_priority: 1 };
        // SAFETY: `high` is a sched_param of ours.
        let raised = unsafe {
            libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const high)
        };
        RealTime { before: (raised == 0).then_some((policy, param)) }
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        if let Some((policy, param)) = self.before {
            // SAFETY: `param` is a sched_param of ours. Lowering one's own priority is always allowed, but
            // clearing the flag is not.
            unsafe {
                if libc::sched_setscheduler(0, policy, &raw const param) != 0 {
                    libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &raw const param);
                }
            }
        }
    }
}

/// Short sleeps of this thread end when they should while this lives, not up to 50 microseconds later (`PR_SET_TIMERSLACK`,
/// prctl(2)). Nothing for a thread with real-time priority, and over when it has had that.
#[derive(Debug)]
#[must_use]
pub struct Punctual {
    before: libc::c_int,
}

impl Punctual {
    /// From now on.
    pub fn be() -> Self {
        // SAFETY: these take numbers; the shortest slack is one nanosecond.
        unsafe {
            let before = libc::prctl(libc::PR_GET_TIMERSLACK);
            libc::prctl(libc::PR_SET_TIMERSLACK, 1);
            Punctual { before }
        }
    }
}

impl Drop for Punctual {
    fn drop(&mut self) {
        if let Ok(before @ 1..) = libc::c_ulong::try_from(self.before) {
            // SAFETY: takes numbers.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, before) };
        }
    }
}

/// Gives this thread real-time priority for good: for a process that puts back what a program must not meet when it
/// goes on. Calls nothing but the kernel. Whether it is given.
pub fn urgent() -> bool {
    let high = libc::sched_param { sched_priority: 2 };
    // SAFETY: `high` is a sched_param of ours.
    unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const high) == 0 }
}

/// This thread stays on the processor where it is, and children that it makes with it, until this is dropped
/// (sched_setaffinity(2)).
#[derive(Debug)]
#[must_use]
pub struct Stay {
    before: Vec<u8>,
}

impl Stay {
    /// Nothing if that cannot be.
    pub fn here() -> Option<Self> {
        // SAFETY: takes nothing.
        let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
        let before = crate::process::affinity(crate::Tid(nix::unistd::gettid().as_raw())).ok()?;
        let mut one = vec![0; before.len()];
        *one.get_mut(cpu / 8)? |= 1 << (cpu % 8);
        let stay = Stay { before };
        set_affinity(&one).then_some(stay)
    }

    /// May go elsewhere again. Calls nothing but the kernel.
    pub fn leave(&self) {
        set_affinity(&self.before);
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.leave();
    }
}

fn set_affinity(mask: &[u8]) -> bool {
    // SAFETY: the mask is as long as it says.
    unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, mask.len(), mask.as_ptr()) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_for_a_while() {
        let own = || crate::process::affinity(crate::Tid(nix::unistd::gettid().as_raw())).unwrap();
        let before = own();
        let stay = Stay::here().unwrap();
        assert_eq!(own().iter().map(|b| b.count_ones()).sum::<u32>(), 1);
        drop(stay);
        assert_eq!(own(), before);
    }

    #[test]
    fn a_thread_is_punctual_for_a_while() {
        // SAFETY: takes a number.
        let slack = || unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) };
        let before = slack();
        let punctual = Punctual::be();
        assert_eq!(slack(), 1);
        drop(punctual);
        assert_eq!(slack(), before);
    }
}
