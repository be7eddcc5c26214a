//! Instruction sequences that every real program has somewhere, and that Torpor runs in place so that no
//! byte of the target's code is ever changed.

/// `syscall; ret`: makes one system call and goes on at the address on the stack.
pub const SYSCALL_PATTERNS: &[&[u8]] = &[&[0x0f, 0x05, 0xc3]];

/// `mov $15, %eax; syscall` and `mov $15, %rax; syscall`: rt_sigreturn, the code that `SA_RESTORER` makes
/// every libc and the Go runtime carry.
pub const SIGRETURN_PATTERNS: &[&[u8]] =
    &[&[0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05], &[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05]];

/// A system call instruction, for a call after which the tracer is in control.
pub const SYSCALL_INSTRUCTION: &[u8] = &[0x0f, 0x05];
