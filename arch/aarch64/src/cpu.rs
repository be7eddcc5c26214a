//! What the processor has, as far as the state of a task depends on it.

/// The component that every task of this architecture has.
pub(crate) const FPSIMD: u64 = 1;

/// The components of vector state that Torpor carries: FP and SIMD, which Linux takes for granted.
pub fn xstate_features() -> u64 {
    FPSIMD
}

/// Names of the components in `mask`, for messages.
pub fn component_names(mask: u64) -> impl Iterator<Item = &'static str> {
    const NAMES: [&str; 1] = ["FP and SIMD"];
    NAMES.iter().enumerate().filter(move |(i, _)| mask & (1 << i) != 0).map(|(_, name)| *name)
}

/// Bytes of the vector state as ptrace gives and takes it: `struct user_fpsimd_state`.
pub fn xstate_size() -> usize {
    528
}

/// The thread pointer of the calling thread.
#[cfg(target_arch = "aarch64")]
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: reads a register that user code may read.
    unsafe {
        core::arch::asm!("mrs {}, tpidr_el0", out(reg) pointer, options(nomem, nostack, preserves_flags));
    }
    pointer
}
