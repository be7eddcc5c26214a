//! System calls and jumps that no compiler can write.

use core::arch::{asm, naked_asm};

/// Makes a system call.
///
/// # Safety
/// As dangerous as the call that is made.
#[inline(always)]
pub unsafe fn syscall(nr: u64, args: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the kernel changes x0 only; memory effects are the caller's to answer for.
    unsafe {
        asm!(
            "svc #0",
            in("x8") nr,
            inlateout("x0") args[0] => result,
            in("x1") args[1],
            in("x2") args[2],
            in("x3") args[3],
            in("x4") args[4],
            in("x5") args[5],
            options(nostack),
        );
    }
    result
}

/// clone3(2) whose child calls `entry(argument)` on the stack that `clone_args` names; `entry` must never
/// return. The parent gets the child's id or `-errno`.
///
/// # Safety
/// `clone_args` points to `size` bytes of `struct clone_args` with a stack of its own for the child (its
/// top aligned to 16), and `entry` and `argument` are valid in the child's memory.
#[unsafe(naked)]
pub unsafe extern "C" fn spawn(clone_args: u64, size: u64, entry: u64, argument: u64) -> i64 {
    // All but x0 reach the child.
    naked_asm!(
        "mov x8, #{clone3}",
        "svc #0",
        "cbz x0, 2f",
        "ret",
        "2:",
        "mov x29, xzr",
        "mov x30, xzr",
        "mov x0, x3",
        "blr x2",
        "udf #0",
        clone3 = const crate::nr::CLONE3,
    )
}

/// rt_sigreturn with the frame at `sp`; see [`crate::SignalFrame::sigreturn_sp`].
///
/// # Safety
/// A valid signal frame lies at `sp`.
#[unsafe(naked)]
pub unsafe extern "C" fn sigreturn(sp: u64) -> ! {
    naked_asm!("mov sp, x0", "mov x8, #{nr}", "svc #0", "udf #0", nr = const crate::nr::RT_SIGRETURN)
}

/// Leaves code that is about to be unmapped: jumps to the borrowed `svc #0; ret` at `gadget` so that
/// `munmap(start, length)` returns into the frame at `frame`, whose first word is code that calls
/// rt_sigreturn.
///
/// # Safety
/// `gadget` is such an instruction pair outside the range, and `frame` a signal frame outside of it.
#[unsafe(naked)]
pub unsafe extern "C" fn leave(gadget: u64, start: u64, length: u64, frame: u64) -> ! {
    // `ret`, not `br`: an indirect branch into a page with BTI must land on a `bti` (Arm ARM, BTYPE).
    naked_asm!(
        "mov sp, x3",
        "ldr x30, [x3]",
        "mov x4, x0",
        "mov x0, x1",
        "mov x1, x2",
        "mov x8, #{nr}",
        "ret x4",
        nr = const crate::nr::MUNMAP,
    )
}
