//! System calls and jumps that no compiler can write.

use core::arch::{asm, naked_asm};

/// Makes a system call.
///
/// # Safety
/// As dangerous as the call that is made.
#[inline(always)]
pub unsafe fn syscall(nr: u64, args: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the kernel clobbers rax, rcx and r11 only; memory effects are the caller's to answer for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
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
    // rdx and rcx do not reach the child (the kernel clobbers rcx), so both go through r8 and r9.
    naked_asm!(
        "mov r8, rdx",
        "mov r9, rcx",
        "mov eax, {clone3}",
        "syscall",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "xor ebp, ebp",
        "mov rdi, r9",
        "call r8",
        "ud2",
        clone3 = const crate::nr::CLONE3,
    )
}

/// rt_sigreturn with the frame that `sp` stands above; see [`crate::SignalFrame::sigreturn_sp`].
///
/// # Safety
/// A valid signal frame lies below `sp`.
#[unsafe(naked)]
pub unsafe extern "C" fn sigreturn(sp: u64) -> ! {
    naked_asm!("mov rsp, rdi", "mov eax, {nr}", "syscall", "ud2", nr = const crate::nr::RT_SIGRETURN)
}

/// Leaves code that is about to be unmapped: jumps to the borrowed `syscall; ret` at `gadget` so that
/// `munmap(start, length)` returns into the frame at `frame`, whose first word is code that calls
/// rt_sigreturn.
///
/// # Safety
/// `gadget` is such an instruction pair outside the range, and `frame` a signal frame outside of it.
#[unsafe(naked)]
pub unsafe extern "C" fn leave(gadget: u64, start: u64, length: u64, frame: u64) -> ! {
    naked_asm!(
        "mov rsp, rcx",
        "mov r11, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov eax, {nr}",
        "jmp r11",
        nr = const crate::nr::MUNMAP,
    )
}
