//! What Torpor knows of x86_64 and nowhere else: registers, the signal frame that leads a thread back,
//! the syscall stub, the instruction patterns it borrows from the target, and cpu features.
//!
//! `arch/aarch64` exports the same names with the same signatures.
#![no_std]

#[cfg(target_arch = "x86_64")]
pub mod cpu;
mod frame;
mod gadget;
mod registers;
#[cfg(target_arch = "x86_64")]
mod stub;

pub use frame::{SignalFrame, xstate_components};
pub use gadget::{SIGRETURN_PATTERNS, SYSCALL_INSTRUCTION, SYSCALL_PATTERNS};
pub use registers::{Registers, call_asleep_in};
#[cfg(target_arch = "x86_64")]
pub use stub::{leave, sigreturn, spawn, syscall};

/// The machine as `uname -m` spells it; also what the image header carries.
pub const MACHINE: &str = "x86_64";
/// `e_machine` of ELF files of this architecture (elf.h, `EM_X86_64`).
pub const ELF_MACHINE: u16 = 62;
/// The ptrace note that carries FPU, vector and all other xsave state (elf.h, `NT_X86_XSTATE`).
pub const NT_FPSTATE: i32 = 0x202;
/// One past the highest user address with four-level page tables
/// (arch/x86/include/asm/page_64_types.h, `TASK_SIZE_MAX`).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Syscall numbers the executor itself needs (asm/unistd_64.h).
pub mod nr {
    /// munmap(2)
    pub const MUNMAP: u64 = 11;
    /// sched_yield(2)
    pub const SCHED_YIELD: u64 = 24;
    /// nanosleep(2)
    pub const NANOSLEEP: u64 = 35;
    /// exit_group(2)
    pub const EXIT_GROUP: u64 = 231;
    /// futex(2)
    pub const FUTEX: u64 = 202;
    /// tgkill(2)
    pub const TGKILL: u64 = 234;
    /// clone3(2)
    pub const CLONE3: u64 = 435;
    /// rt_sigreturn(2)
    pub const RT_SIGRETURN: u64 = 15;
    /// restart_syscall(2)
    pub const RESTART_SYSCALL: u64 = 219;
}
