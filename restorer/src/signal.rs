//! Planning signal actions and pending signals.

use torpor_image::Bytes;
use torpor_image::signal::{AltStack, ProcessSignals};
use torpor_parasite::call;
use torpor_parasite::script::Script;

/// `si_signo` lies at the start of a siginfo_t.
fn number(info: &Bytes) -> i32 {
    info.first_chunk().map_or(0, |n| i32::from_ne_bytes(*n))
}

/// Signal actions.
pub(crate) fn actions(script: &mut Script, signals: &ProcessSignals) {
    for (i, action) in signals.actions.iter().enumerate() {
        let signal = i as i32 + 1;
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let data = script.words(&[action.handler, action.flags, action.restorer, action.mask]);
        let purpose = format!("the action of signal {signal}");
        call!(script, purpose, libc::SYS_rt_sigaction, signal, data, 0, 8);
    }
}

/// Signals pending for the process. A task may queue any siginfo for itself (kernel/signal.c,
/// `do_rt_sigqueueinfo`).
pub(crate) fn pending(script: &mut Script, pid: i32, signals: &ProcessSignals) {
    for info in &signals.pending {
        let data = script.data(info);
        let signal = number(info);
        let purpose = format!("pending signal {signal}");
        call!(script, purpose, libc::SYS_rt_sigqueueinfo, pid, signal, data);
    }
}

/// Signals pending for one thread.
pub(crate) fn thread_pending(script: &mut Script, pid: i32, tid: i32, pending: &[Bytes]) {
    for info in pending {
        let data = script.data(info);
        let signal = number(info);
        let purpose = format!("pending signal {signal} of thread {tid}");
        call!(script, purpose, libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, data);
    }
}

/// The alternate stack. `SS_ONSTACK` is not a setting but says where the thread is.
pub(crate) fn altstack(script: &mut Script, stack: AltStack) {
    let flags = (stack.flags & !libc::SS_ONSTACK) as u32;
    let data = script.words(&[stack.base, u64::from(flags), stack.size]);
    call!(script, "the alternate signal stack", libc::SYS_sigaltstack, data, 0);
}

/// Every signal that is pending somewhere in a task, bit N-1 for signal N.
pub(crate) fn all_pending(task: &torpor_image::task::Task) -> u64 {
    let threads = task.threads.iter().flat_map(|t| &t.signals.pending);
    task.signals
        .pending
        .iter()
        .chain(threads)
        .filter_map(|info| 1u64.checked_shl((number(info) - 1).cast_unsigned()))
        .fold(0, |all, bit| all | bit)
}
