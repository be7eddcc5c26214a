//! Planning threads: how they are made and what each sets for itself.

use torpor_image::task::Task;
use torpor_image::thread::Thread;
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;
use crate::{credentials, scheduling, signal};

/// Bytes of `struct clone_args` up to and with `set_tid_size` (linux/sched.h, `CLONE_ARGS_SIZE_VER1`).
pub(crate) const CLONE_ARGS: usize = 80;
/// Offset of `set_tid` in it.
pub(crate) const SET_TID: u32 = 64;
/// What all threads of a process share.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;
const PR_SET_NAME: u64 = 15;

/// Makes the other threads; each begins in its own context, `first` and those that follow, and waits for a
/// shared word.
pub(crate) fn spawn(script: &mut Script, task: &Task, first: u32, stack_size: u64) {
    for (context, thread) in (first..).zip(task.other_threads()) {
        let tid = script.data(&thread.tid.0.to_ne_bytes());
        let mut args = [0u64; CLONE_ARGS / 8];
        args[0] = THREAD;
        args[9] = 1;
        let args = script.words(&args);
        script.point(args.at(SET_TID), tid);
        let purpose = format!("thread {} ({})", thread.tid, thread.name);
        script.spawn(purpose, args, context, stack_size, Some(i64::from(thread.tid.0)));
    }
}

/// What a thread sets for itself.
pub(crate) fn plan(script: &mut Script, task: &Task, thread: &Thread, host: &Host) {
    let n = Value::Number;
    let name = script.c_string(&thread.name);
    script.call("the name", libc::SYS_prctl, &[n(PR_SET_NAME), name.into()]);
    call!(script, "the clear_child_tid address", libc::SYS_set_tid_address, thread.clear_child_tid);
    if thread.robust_list.0 != 0 {
        let (head, length) = thread.robust_list;
        call!(script, "the robust list", libc::SYS_set_robust_list, head, length);
    }
    if let Some(rseq) = thread.rseq {
        call!(script, "the rseq area", libc::SYS_rseq, rseq.address, rseq.size, 0, rseq.signature);
    }
    signal::altstack(script, thread.signals.altstack);
    scheduling::plan(script, &thread.scheduling, host);
    signal::thread_pending(script, task.pid.0, thread.tid.0, &thread.signals.pending);
    credentials::plan(script, &thread.credentials, host);
    if thread.parent_death_signal != 0 && thread.tid != task.pid {
        let signal = thread.parent_death_signal;
        call!(script, "the parent death signal", libc::SYS_prctl, libc::PR_SET_PDEATHSIG, signal);
    }
}
