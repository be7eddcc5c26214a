//! The stub and the frame at work; needs the machine or qemu-user (`tests/aarch64-blob.sh`).
#![cfg(target_arch = "aarch64")]

use std::arch::naked_asm;
use std::ptr;

use torpor_arch_aarch64::{self as arch, Registers, SignalFrame};

const X19: u64 = 0x1919;
const D8: u64 = 0x0808;

/// Where the frames of these tests lead: checks registers and ends the process with 0 if all are right.
#[unsafe(naked)]
unsafe extern "C" fn landed() -> ! {
    naked_asm!(
        "mov x1, #{x19}",
        "cmp x19, x1",
        "b.ne 2f",
        "fmov x2, d8",
        "mov x1, #{d8}",
        "cmp x2, x1",
        "b.ne 2f",
        // The argument is the stack pointer.
        "mov x1, sp",
        "cmp x0, x1",
        "b.ne 2f",
        "mov x0, #0",
        "b 3f",
        "2:",
        "mov x0, #1",
        "3:",
        "mov x8, #{exit}",
        "svc #0",
        "udf #0",
        x19 = const X19,
        d8 = const D8,
        exit = const arch::nr::EXIT_GROUP,
    )
}

/// `svc #0; ret`, then code that calls rt_sigreturn.
#[unsafe(naked)]
unsafe extern "C" fn gadgets() {
    naked_asm!("svc #0", "ret", "mov x8, #139", "svc #0")
}

/// A frame, aligned as the kernel wants it.
#[repr(align(16))]
struct Frame([u8; SignalFrame::size(528)]);

fn frame(stack: &mut [u8]) -> Box<Frame> {
    let top = (stack.as_mut_ptr() as u64 + stack.len() as u64) & !15;
    let mut regs = Registers { pc: landed as *const () as u64, sp: top, ..Default::default() };
    regs.regs[0] = top;
    regs.regs[19] = X19;
    let mut xstate = [0; 528];
    xstate[8 * 16..][..8].copy_from_slice(&D8.to_le_bytes());
    let mut frame = Box::new(Frame([0; _]));
    let at = &raw const *frame as u64;
    SignalFrame::write(&mut frame.0, at, gadgets as *const () as u64 + 8, &regs, 0, &xstate);
    frame
}

/// Runs `child` in a child process and returns its exit status.
fn in_child(child: impl FnOnce()) -> i32 {
    // SAFETY: the child makes system calls only, and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            child();
            libc::_exit(9);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        libc::WEXITSTATUS(status)
    }
}

#[test]
fn the_patterns_are_what_the_assembler_makes() {
    // SAFETY: four instructions.
    let code = unsafe { std::slice::from_raw_parts(gadgets as *const u8, 16) };
    assert_eq!(&code[..8], arch::SYSCALL_PATTERNS[0]);
    assert_eq!(&code[8..], arch::SIGRETURN_PATTERNS[0]);
}

#[test]
fn the_frame_is_the_one_libc_knows() {
    let mcontext = 128 + std::mem::offset_of!(libc::ucontext_t, uc_mcontext);
    let mut stack = vec![0; 4096];
    let frame = frame(&mut stack);
    let word = |at: usize| u64::from_le_bytes(frame.0[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!(word(mcontext + std::mem::offset_of!(libc::mcontext_t, regs) + 19 * 8), X19);
    assert_eq!(word(mcontext + std::mem::offset_of!(libc::mcontext_t, pc)), landed as *const () as u64);
    // `__reserved` follows pstate, aligned to 16.
    let records = mcontext + (std::mem::offset_of!(libc::mcontext_t, pstate) + 8).next_multiple_of(16);
    assert_eq!(word(records), 0x210_4650_8001);
}

#[test]
fn sigreturn_loads_the_frame() {
    let mut stack = vec![0; 4096];
    let frame = frame(&mut stack);
    let sp = SignalFrame::sigreturn_sp(&raw const *frame as u64);
    // SAFETY: a valid frame, in a child that it makes end.
    assert_eq!(in_child(|| unsafe { arch::sigreturn(sp) }), 0);
}

#[test]
fn leaving_unmaps_and_returns_through_the_frame() {
    let mut stack = vec![0; 4096];
    let frame = frame(&mut stack);
    let at = &raw const *frame as u64;
    // SAFETY: a mapping that nobody uses, and a valid frame, in a child that it makes end.
    let status = in_child(|| unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), 1 << 16, libc::PROT_READ, flags, -1, 0);
        arch::leave(gadgets as *const () as u64, page as u64, 1 << 16, at)
    });
    assert_eq!(status, 0);
}

#[test]
fn a_call_gets_six_arguments() {
    // SAFETY: mmap of a new page and its end.
    unsafe {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let page = arch::syscall(libc::SYS_mmap as u64, [0, 4096, 3, flags, u64::MAX, 0]);
        assert!(page > 0);
        assert_eq!(arch::syscall(arch::nr::MUNMAP, [page as u64, 4096, 0, 0, 0, 0]), 0);
        assert_eq!(arch::syscall(arch::nr::MUNMAP, [1, 4096, 0, 0, 0, 0]), -i64::from(libc::EINVAL));
    }
}

extern "C" fn spawned(status: u64) -> ! {
    // SAFETY: ends the child.
    unsafe { libc::_exit(status as i32) }
}

#[test]
fn a_spawned_child_runs_its_entry() {
    let mut stack = vec![0u128; 4096];
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls
    let mut args = [0u64; 8];
    args[4] = libc::SIGCHLD as u64;
    args[5] = stack.as_mut_ptr() as u64;
    args[6] = stack.len() as u64 * 16;
    // SAFETY: as `spawn` wants it; the child has its own copy of this memory.
    let pid = unsafe { arch::spawn(args.as_ptr() as u64, 64, spawned as *const () as u64, 42) };
    if pid == -i64::from(libc::ENOSYS) {
        println!("skipped (no clone3, as in qemu-user)");
        return;
    }
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(pid as i32, &raw mut status, 0) } as i64, pid);
    assert_eq!(libc::WEXITSTATUS(status), 42);
}
