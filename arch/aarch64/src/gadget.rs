//! Instruction sequences that every real program has somewhere, and that Torpor runs in place so that no
//! byte of the target's code is ever changed. The vdso has both: the fallbacks of clock_gettime end in the
//! first, `__kernel_rt_sigreturn` is the second.

/// `svc #0; ret`: makes one system call and goes on at the address in x30.
///
/// Do not borrow the very instruction at which a thread was interrupted in a call: the kernel, which on
/// this architecture knows such a call by its address alone, may turn ours into restart_syscall
/// (arch/arm64/kernel/signal.c, `setup_restart_syscall`).
pub const SYSCALL_PATTERNS: &[&[u8]] = &[&[
    0x01, 0x00, 0x00, 0xd4, // svc #0
    0xc0, 0x03, 0x5f, 0xd6, // ret
]];

/// `mov x8, #139; svc #0` and `mov w8, #139; svc #0`: rt_sigreturn.
pub const SIGRETURN_PATTERNS: &[&[u8]] = &[
    &[
        0x68, 0x11, 0x80, 0xd2, // mov x8, #139
        0x01, 0x00, 0x00, 0xd4, // svc #0
    ],
    &[
        0x68, 0x11, 0x80, 0x52, // mov w8, #139
        0x01, 0x00, 0x00, 0xd4, // svc #0
    ],
];

/// A system call instruction (`svc #0`), for a call after which the tracer is in control.
pub const SYSCALL_INSTRUCTION: &[u8] = &[0x01, 0x00, 0x00, 0xd4];
