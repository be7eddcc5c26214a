//! What Torpor knows of aarch64 and nowhere else: registers, the signal frame that leads a thread back,
//! the syscall stub, the instruction patterns it borrows from the target, and cpu features.
//!
//! `arch/x86_64` exports the same names with the same signatures. All but the stub also compiles, and is
//! tested, on other machines.
//!
//! Not carried, and for the caller to refuse: SVE and SME state in use (`NT_ARM_SVE`, `NT_ARM_ZA`), a
//! guarded control stack (`NT_ARM_GCS`), 32-bit tasks.
#![no_std]

pub mod cpu;
mod frame;
mod gadget;
mod registers;
#[cfg(target_arch = "aarch64")]
mod stub;

pub use frame::{SignalFrame, xstate_components};
pub use gadget::{SIGRETURN_PATTERNS, SYSCALL_INSTRUCTION, SYSCALL_PATTERNS};
pub use registers::{Registers, call_asleep_in};
#[cfg(target_arch = "aarch64")]
pub use stub::{leave, sigreturn, spawn, syscall};

/// The machine as `uname -m` spells it; also what the image header carries.
pub const MACHINE: &str = "aarch64";
/// `e_machine` of ELF files of this architecture (elf.h, `EM_AARCH64`).
pub const ELF_MACHINE: u16 = 183;
/// The ptrace note that carries the FP and SIMD state, `struct user_fpsimd_state` (elf.h, `NT_PRFPREG`).
pub const NT_FPSTATE: i32 = 2;
/// One past the highest user address with 48-bit virtual addresses (arch/arm64/include/asm/processor.h,
/// `DEFAULT_MAP_WINDOW_64`); more is given only to those who ask for it.
pub const TASK_SIZE: u64 = 1 << 48;

/// Syscall numbers the executor itself needs (asm-generic/unistd.h).
pub mod nr {
    /// munmap(2)
    pub const MUNMAP: u64 = 215;
    /// sched_yield(2)
    pub const SCHED_YIELD: u64 = 124;
    /// nanosleep(2)
    pub const NANOSLEEP: u64 = 101;
    /// exit_group(2)
    pub const EXIT_GROUP: u64 = 94;
    /// futex(2)
    pub const FUTEX: u64 = 98;
    /// tgkill(2)
    pub const TGKILL: u64 = 131;
    /// clone3(2)
    pub const CLONE3: u64 = 435;
    /// rt_sigreturn(2)
    pub const RT_SIGRETURN: u64 = 139;
    /// restart_syscall(2)
    pub const RESTART_SYSCALL: u64 = 128;
}
