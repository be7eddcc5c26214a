//! What a freestanding blob needs to link: the entry, a panic handler that no code path may reach, and the
//! memory functions the compiler calls. Written in assembly, since a Rust loop would be compiled into a
//! call of the very function it implements.

use core::panic::PanicInfo;

use crate::wire::Context;

/// The blob's entry, at its first byte (`.text.entry` in the linker script).
///
/// # Safety
/// As [`crate::executor::run`].
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn _start(context: *mut Context) -> ! {
    // SAFETY: the same promise.
    unsafe { crate::executor::run(context) }
}

unsafe extern "C" {
    /// Not defined anywhere: a panic that survives optimisation is a link error.
    fn parasite_must_not_panic() -> !;
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: never linked.
    unsafe { parasite_must_not_panic() }
}

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".section .text.memory, \"ax\", @progbits",
    ".globl memcpy",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".globl memmove",
    "memmove:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "cmp rdi, rsi",
    "ja 2f",
    "rep movsb",
    "ret",
    "2:",
    // The destination lies above: copy from the end, lest the source be overwritten.
    "lea rdi, [rdi + rcx - 1]",
    "lea rsi, [rsi + rcx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    ".globl memset",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".text",
);

#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".section .text.memory, \"ax\", @progbits",
    ".globl memcpy",
    ".globl memmove",
    "memcpy:",
    "memmove:",
    "cmp x0, x1",
    "b.hi 3f",
    "mov x3, x0",
    "2:",
    "cbz x2, 4f",
    "ldrb w4, [x1], #1",
    "strb w4, [x3], #1",
    "sub x2, x2, #1",
    "b 2b",
    "3:",
    // The destination lies above: copy from the end, lest the source be overwritten.
    "cbz x2, 4f",
    "sub x2, x2, #1",
    "ldrb w4, [x1, x2]",
    "strb w4, [x0, x2]",
    "b 3b",
    "4:",
    "ret",
    ".globl memset",
    "memset:",
    "mov x3, x0",
    "5:",
    "cbz x2, 6f",
    "strb w1, [x3], #1",
    "sub x2, x2, #1",
    "b 5b",
    "6:",
    "ret",
    ".text",
);
