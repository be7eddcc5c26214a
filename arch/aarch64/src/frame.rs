//! The signal frame: a thread's whole register state in memory, which the kernel loads on rt_sigreturn.
//!
//! It is the way back of a target whose tracer has died (docs/architecture.md, "the way back"): a thread
//! that reaches rt_sigreturn with its stack pointer at the frame is where it was, with its registers, FP and
//! SIMD state and signal mask. The kernel's frame has no return address, as x30 holds it; Torpor's keeps
//! `pretcode` in its first word, as on x86_64, in the siginfo that rt_sigreturn does not read.
//!
//! The record for SVE is left out: what a thread has beyond SIMD is lost on this way.

use crate::{Registers, cpu};

/// An alternate-stack mode that does not exist: `restore_altstack` fails with EINVAL, which rt_sigreturn
/// ignores, and the thread keeps the alternate stack it has (kernel/signal.c, `do_sigaltstack`).
const KEEP_ALTSTACK: i32 = 0x0bad;
/// `FPSIMD_MAGIC` (asm/sigcontext.h)
const FPSIMD_MAGIC: u32 = 0x4650_8001;
/// `struct user_fpsimd_state`: 32 vectors, then fpsr, fpcr and padding.
const FPSIMD_STATE: usize = 528;
/// Bytes of its vectors.
const VECTORS: usize = 512;

/// `struct rt_sigframe` (arch/arm64/kernel/signal.c), as far as it is used: the kernel reads the records
/// one by one and stops at the one without magic.
#[repr(C)]
#[derive(Clone, Copy)]
struct RtSigframe {
    /// In place of the siginfo's first word.
    pretcode: u64,
    siginfo: [u64; 15],
    uc_flags: u64,
    uc_link: u64,
    ss_sp: u64,
    ss_flags: i32,
    pad: i32,
    ss_size: u64,
    sigmask: u64,
    unused: [u64; 15],
    /// The machine context is aligned to 16.
    align: u64,
    fault_address: u64,
    regs: Registers,
    /// And so are its records.
    align_records: u64,
    magic: u32,
    size: u32,
    fpsr: u32,
    fpcr: u32,
    vectors: [u8; VECTORS],
    end: [u64; 2],
}

const FRAME: usize = size_of::<RtSigframe>();
const _: () = {
    use core::mem::offset_of;
    assert!(FRAME == 128 + 464 + FPSIMD_STATE + 16);
    assert!(offset_of!(RtSigframe, sigmask) == 128 + 40);
    assert!(offset_of!(RtSigframe, fault_address) == 128 + 176);
    assert!(offset_of!(RtSigframe, magic) == 128 + 464);
};

/// Builds signal frames.
pub struct SignalFrame;

impl SignalFrame {
    /// Bytes a frame with this much vector state takes, with room for alignment.
    pub const fn size(_xstate: usize) -> usize {
        FRAME
    }

    /// Writes into `buffer`, which will lie at address `at` of the target, a frame that leads to `regs`
    /// with `mask` blocked. `xstate` is what `PTRACE_GETREGSET(NT_PRFPREG)` gave; without it the thread
    /// gets zeros. `pretcode` is the address of code that calls rt_sigreturn, for [`crate::leave`]; all
    /// others go there by [`Registers::returning_to`].
    ///
    /// `at` must be aligned to 16, and `buffer` at least [`SignalFrame::size`] long.
    pub fn write(buffer: &mut [u8], at: u64, pretcode: u64, regs: &Registers, mask: u64, xstate: &[u8]) {
        debug_assert!(at.is_multiple_of(16));
        let mut vectors = [0; VECTORS];
        let (mut fpsr, mut fpcr) = (0, 0);
        if let Some((all, control)) = xstate.split_at_checked(VECTORS)
            && let [a, b, c, d, e, f, g, h, ..] = *control
        {
            vectors.copy_from_slice(all);
            fpsr = u32::from_le_bytes([a, b, c, d]);
            fpcr = u32::from_le_bytes([e, f, g, h]);
        }
        let frame = RtSigframe {
            pretcode,
            siginfo: [0; 15],
            uc_flags: 0,
            uc_link: 0,
            ss_sp: 0,
            ss_flags: KEEP_ALTSTACK,
            pad: 0,
            ss_size: 0,
            sigmask: mask,
            unused: [0; 15],
            align: 0,
            fault_address: 0,
            regs: *regs,
            align_records: 0,
            magic: FPSIMD_MAGIC,
            size: FPSIMD_STATE as u32,
            fpsr,
            fpcr,
            vectors,
            end: [0; 2],
        };
        // SAFETY: RtSigframe is repr(C), made of integers without padding (asserted above by its size).
        let bytes = unsafe { core::slice::from_raw_parts((&raw const frame).cast::<u8>(), FRAME) };
        buffer[..FRAME].copy_from_slice(bytes);
    }

    /// The stack pointer rt_sigreturn expects for a frame at `at`.
    pub const fn sigreturn_sp(at: u64) -> u64 {
        at
    }
}

/// The components in use in a vector state that ptrace gave: what a processor must have to take it back.
pub fn xstate_components(_xstate: &[u8]) -> u64 {
    cpu::FPSIMD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_and_control_words_are_where_the_record_has_them() {
        let mut xstate = [0x55; FPSIMD_STATE];
        xstate[512..516].copy_from_slice(&0x0800_0000u32.to_le_bytes());
        xstate[516..520].copy_from_slice(&0x0040_0000u32.to_le_bytes());
        let mut buffer = [0xff; SignalFrame::size(FPSIMD_STATE)];
        SignalFrame::write(&mut buffer, 0x1000, 0x1234, &Registers::default(), 7, &xstate);
        let word =
            |at: usize| u32::from_le_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]]);
        assert_eq!((word(0), word(128 + 40)), (0x1234, 7));
        assert_eq!(
            [word(592), word(596), word(600), word(604)],
            [FPSIMD_MAGIC, 528, 0x0800_0000, 0x0040_0000]
        );
        assert_eq!((word(608), word(608 + 508), word(608 + 512)), (0x5555_5555, 0x5555_5555, 0));
    }
}
