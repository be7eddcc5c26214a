//! What the processor has, as far as the state of a task depends on it.

use core::arch::asm;
use core::arch::x86_64::__cpuid;

/// The xsave components the kernel has enabled (XCR0), or x87 and SSE alone without xsave.
pub fn xstate_features() -> u64 {
    // CPUID.1:ECX.OSXSAVE says that the kernel allows xgetbv.
    if __cpuid(1).ecx & (1 << 27) == 0 {
        return 3;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE is set, so xgetbv with index 0 is defined; it reads one register.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Bytes of the vector state as ptrace gives and takes it, all enabled components in place.
pub fn xstate_size() -> usize {
    // CPUID.(EAX=0DH, ECX=0):EBX, the size for what XCR0 enables.
    if __cpuid(1).ecx & (1 << 27) == 0 { 512 } else { core::arch::x86_64::__cpuid_count(0xd, 0).ebx as usize }
}

/// The thread pointer of the calling thread: its thread control block, whose first word points to itself.
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: reads the word at fs:0, which the ABI reserves for this (System V ABI, "thread-local
    // storage").
    unsafe {
        asm!("mov {}, fs:0", out(reg) pointer, options(nostack, preserves_flags, readonly));
    }
    pointer
}

/// Names of the xsave components in `mask`, for messages.
pub fn component_names(mask: u64) -> impl Iterator<Item = &'static str> {
    const NAMES: [&str; 20] = [
        "x87",
        "SSE",
        "AVX",
        "MPX bounds",
        "MPX config",
        "AVX-512 opmask",
        "AVX-512 ZMM_Hi256",
        "AVX-512 Hi16_ZMM",
        "PT",
        "PKRU",
        "PASID",
        "CET user",
        "CET kernel",
        "HDC",
        "UINTR",
        "LBR",
        "HWP",
        "AMX tile config",
        "AMX tile data",
        "APX",
    ];
    NAMES.iter().enumerate().filter(move |(i, _)| mask & (1 << i) != 0).map(|(_, name)| *name)
}
