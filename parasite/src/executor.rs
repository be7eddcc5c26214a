//! The executor: runs the operations of a context, then hands control to the tracer.
//!
//! # The trap
//! A thread says that it is done with `tgkill` of itself with a signal that is ignored by default. Traced,
//! it stops in signal-delivery-stop and the tracer drops the signal (ptrace(2)); untraced, nothing happens
//! and the next instruction runs: the tracer is gone. A breakpoint instruction would kill an untraced
//! target, and waiting on a futex would need shared memory, hence a descriptor in the target.
//!
//! # The way back
//! With the tracer gone the thread returns through its signal frame. The frame of one thread lies in memory
//! of the target's own (see the dumper's `inject`); that thread leaves last and unmaps everything. The
//! frames of the others lie in the arena, so they must have gone through rt_sigreturn before the arena goes.
//! No thread can tell others of an instruction that comes after its last one; each yields first, counts
//! itself off right before the call, and the last one waits a grace period that is long against the few
//! instructions that are left.

use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use crate::wire::{Context, Op, arg, command, expect, heal, kind, state};

/// Highest `-errno`.
const MAX_ERRNO: i64 = 4095;
const ENOSYS: i64 = 38;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
/// How long the last thread waits for the others, and then for their last instructions.
const MILLISECOND: u64 = 1_000_000;
const PATIENCE: u32 = 10_000;
const GRACE: u64 = 100 * MILLISECOND;
/// Offsets of `stack` and `stack_size` in `struct clone_args` (linux/sched.h), in words.
const CLONE_STACK: usize = 5;
const CLONE_STACK_SIZE: usize = 6;

/// Runs `context` and whatever the tracer puts there next, for ever; the tracer takes the thread away at a
/// trap by setting its registers.
///
/// # Safety
/// `context` describes operations inside an arena that this thread may use, and those are the caller's
/// responsibility, system calls above all.
pub unsafe extern "C" fn run(context: *mut Context) -> ! {
    loop {
        // SAFETY: the caller's promise; the tracer rewrites the context only while this thread is stopped.
        unsafe {
            (&raw mut (*context).command).write_volatile(command::NONE);
            run_script(context);
            trap(context);
            if (&raw const (*context).command).read_volatile() != command::RUN {
                leave(context);
            }
        }
    }
}

/// Runs every operation of `context` until one fails.
///
/// # Safety
/// As [`run`].
pub unsafe fn run_script(context: *mut Context) {
    // SAFETY: `context` is valid by the caller's promise, and so are `count` operations at `base + ops`.
    unsafe {
        let base = (*context).base;
        let ops = (base + (*context).ops) as *mut Op;
        let mut i = 0;
        while i < (*context).count {
            let op = ops.add(i as usize);
            if (*op).kind == kind::AGAIN {
                // The result counts how often it was done.
                if ((*op).result as u64) < (*op).args[1] {
                    (*op).result += 1;
                    i = (*op).args[0] as u32;
                } else {
                    i += 1;
                }
                continue;
            }
            let result = run_op(ops, op, base);
            (*op).result = result;
            let good = match (*op).expect {
                expect::ANY => true,
                expect::OK => !(-MAX_ERRNO..0).contains(&result),
                _ => result == (*op).expected,
            };
            if !good {
                (*context).failed = i;
                (*context).state = state::FAILED;
                return;
            }
            i += 1;
        }
        (*context).state = state::DONE;
    }
}

/// # Safety
/// `op` is one of `ops`, an arena begins at `base`, and what the operation does is the caller's to answer
/// for.
unsafe fn run_op(ops: *mut Op, op: *mut Op, base: u64) -> i64 {
    // SAFETY: as promised by the caller; RESULT arguments name earlier operations (checked when encoded).
    unsafe {
        let mut args = [0u64; 6];
        let mut kinds = (*op).arg_kinds;
        let from = (&raw const (*op).args).cast::<u64>();
        let to = (&raw mut args).cast::<u64>();
        let mut i = 0;
        while i < 6 {
            let value = *from.add(i);
            *to.add(i) = match kinds & 0xf {
                arg::ARENA => base + value,
                arg::RESULT => (*ops.add(value as usize)).result as u64,
                arg::WORD => *((base + value) as *const i32) as i64 as u64,
                _ => value,
            };
            kinds >>= 4;
            i += 1;
        }
        match (*op).kind {
            kind::CALL => arch::syscall((*op).nr, args),
            kind::COPY => {
                core::ptr::copy(args[1] as *const u8, args[0] as *mut u8, args[2] as usize);
                0
            }
            kind::WAIT => wait(args[0], args[1] as u32),
            kind::WAKE => wake(args[0], args[1] as u32),
            kind::SPAWN => {
                let clone_args = args[0] as *mut u64;
                *clone_args.add(CLONE_STACK) = args[3];
                *clone_args.add(CLONE_STACK_SIZE) = args[4];
                arch::spawn(args[0], args[1], run as *const () as u64, args[2])
            }
            _ => -ENOSYS,
        }
    }
}

/// # Safety
/// `word` is the address of an aligned 32-bit word shared by those who wait and wake.
unsafe fn wait(word: u64, value: u32) -> i64 {
    // SAFETY: as promised by the caller.
    let atomic = unsafe { AtomicU32::from_ptr(word as *mut u32) };
    loop {
        let now = atomic.load(Ordering::Acquire);
        if now >= value {
            return 0;
        }
        // SAFETY: FUTEX_WAIT reads the word and sleeps while it is `now`; EAGAIN and EINTR go round again.
        unsafe { arch::syscall(arch::nr::FUTEX, [word, FUTEX_WAIT, u64::from(now), 0, 0, 0]) };
    }
}

/// # Safety
/// As [`wait`].
unsafe fn wake(word: u64, add: u32) -> i64 {
    // SAFETY: as promised by the caller.
    unsafe {
        AtomicU32::from_ptr(word as *mut u32).fetch_add(add, Ordering::AcqRel);
        arch::syscall(arch::nr::FUTEX, [word, FUTEX_WAKE, i32::MAX as u64, 0, 0, 0])
    }
}

/// # Safety
/// `context` is valid.
unsafe fn trap(context: *const Context) {
    // SAFETY: `context` is valid; the signal is one whose default is to be ignored.
    unsafe {
        let (tgid, tid, signal) = ((*context).tgid as u64, (*context).tid as u64, (*context).signal as u64);
        arch::syscall(arch::nr::TGKILL, [tgid, tid, signal, 0, 0, 0]);
    }
}

/// # Safety
/// `context` is valid, and its `heal` describes the way back of this thread.
unsafe fn leave(context: *const Context) -> ! {
    // SAFETY: the dumper wrote `heal` and the frame it names before it let this thread run.
    unsafe {
        let way = (*context).heal;
        let guests = ((*context).base + way.guests) as *mut i32;
        match way.kind {
            heal::LAST => {
                let guests = AtomicI32::from_ptr(guests);
                let mut left = PATIENCE;
                while guests.load(Ordering::Acquire) > 0 && left > 0 {
                    sleep(MILLISECOND);
                    left -= 1;
                }
                // The count may be behind by the one thread that was being sent in or taken out.
                if way.company != 0 {
                    sleep(GRACE);
                }
                arch::leave(way.gadget, way.start, way.length, way.frame)
            }
            heal::EARLY => {
                arch::syscall(arch::nr::SCHED_YIELD, [0; 6]);
                AtomicI32::from_ptr(guests).fetch_sub(1, Ordering::AcqRel);
                arch::sigreturn(way.frame + (arch::SignalFrame::sigreturn_sp(0)))
            }
            _ => loop {
                arch::syscall(arch::nr::EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
            },
        }
    }
}

/// Sleeps `nanoseconds`, less than a second; never makes a call whose restart the kernel would remember
/// for the target, as all signals are blocked here.
fn sleep(nanoseconds: u64) {
    let duration = [0u64, nanoseconds];
    // SAFETY: nanosleep reads a `struct timespec`, two 64-bit words.
    unsafe { arch::syscall(arch::nr::NANOSLEEP, [(&raw const duration) as u64, 0, 0, 0, 0, 0]) };
}
