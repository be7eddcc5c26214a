//! The signal frame: a thread's whole register state in memory, which the kernel loads on rt_sigreturn.
//!
//! It is the way back of a target whose tracer has died (docs/architecture.md, "the way back"): a thread
//! that reaches rt_sigreturn with its stack pointer just above [`SignalFrame::pretcode`] is where it was,
//! with its registers, vector state and signal mask.

use crate::Registers;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;
/// An alternate-stack mode that does not exist: `restore_altstack` fails with EINVAL, which rt_sigreturn
/// ignores, and the thread keeps the alternate stack it has (kernel/signal.c, `do_sigaltstack`).
const KEEP_ALTSTACK: i32 = 0x0bad;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Where `struct _fpx_sw_bytes` lies in the FXSAVE area (asm/sigcontext.h); ptrace puts the feature mask
/// at the same place (asm/user.h, `USER_XSTATE_XCR0_WORD`).
const SW_BYTES: usize = 464;
/// Size of the legacy FXSAVE area; a regset this long has no xsave header.
const FXSAVE: usize = 512;
/// Offset of `xstate_bv` in the xsave area.
const XSTATE_BV: usize = 512;

/// `struct rt_sigframe` without the siginfo, which rt_sigreturn does not read
/// (arch/x86/include/asm/sigframe.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RtSigframe {
    pretcode: u64,
    uc_flags: u64,
    uc_link: u64,
    ss_sp: u64,
    ss_flags: i32,
    pad: i32,
    ss_size: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    eflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    err: u64,
    trapno: u64,
    oldmask: u64,
    cr2: u64,
    fpstate: u64,
    reserved: [u64; 8],
    sigmask: u64,
}

/// Size of `RtSigframe`: pretcode, ucontext up to and with the mask.
const FRAME: usize = 8 + 40 + 256 + 8;
const _: () = assert!(size_of::<RtSigframe>() == FRAME);

/// Builds signal frames.
pub struct SignalFrame;

impl SignalFrame {
    /// Bytes a frame with this much vector state takes, with room for alignment.
    pub const fn size(xstate: usize) -> usize {
        // 64 to align the xsave area, 4 for the second magic, rounded up to 16.
        (FRAME + 64 + xstate + 4 + 15) & !15
    }

    /// Writes into `buffer`, which will lie at address `at` of the target, a frame that leads to `regs`
    /// with `mask` blocked. `xstate` is what `PTRACE_GETREGSET(NT_X86_XSTATE)` gave. `pretcode` is the
    /// address of code that calls rt_sigreturn: a `ret` with the stack pointer at `at` goes there.
    ///
    /// `at` must be aligned to 16 (8 would do here, but not on aarch64), and `buffer` at least [`SignalFrame::size`] long.
    pub fn write(buffer: &mut [u8], at: u64, pretcode: u64, regs: &Registers, mask: u64, xstate: &[u8]) {
        let area = (at + FRAME as u64 + 63) & !63;
        let frame = RtSigframe {
            pretcode,
            uc_flags: UC_SIGCONTEXT_SS
                | UC_STRICT_RESTORE_SS
                | if xstate.len() > FXSAVE { UC_FP_XSTATE } else { 0 },
            ss_flags: KEEP_ALTSTACK,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rdi: regs.rdi,
            rsi: regs.rsi,
            rbp: regs.rbp,
            rbx: regs.rbx,
            rdx: regs.rdx,
            rax: regs.rax,
            rcx: regs.rcx,
            rsp: regs.rsp,
            rip: regs.rip,
            eflags: regs.eflags,
            cs: regs.cs as u16,
            ss: regs.ss as u16,
            fpstate: if xstate.is_empty() { 0 } else { area },
            sigmask: mask,
            ..Default::default()
        };
        // SAFETY: RtSigframe is repr(C), made of integers without padding (asserted above by its size).
        let bytes = unsafe { core::slice::from_raw_parts((&raw const frame).cast::<u8>(), FRAME) };
        buffer[..FRAME].copy_from_slice(bytes);
        if xstate.is_empty() {
            return;
        }
        let from = (area - at) as usize;
        buffer[from..from + xstate.len()].copy_from_slice(xstate);
        if xstate.len() > FXSAVE {
            // check_xstate_in_sigframe (arch/x86/kernel/fpu/signal.c) wants both magics and the sizes.
            let features = u64::from_le_bytes(array(xstate, SW_BYTES));
            let sw = from + SW_BYTES;
            buffer[sw..sw + 4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
            buffer[sw + 4..sw + 8].copy_from_slice(&(xstate.len() as u32 + 4).to_le_bytes());
            buffer[sw + 8..sw + 16].copy_from_slice(&features.to_le_bytes());
            buffer[sw + 16..sw + 20].copy_from_slice(&(xstate.len() as u32).to_le_bytes());
            let end = from + xstate.len();
            buffer[end..end + 4].copy_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
        }
    }

    /// The stack pointer rt_sigreturn expects for a frame at `at`: what `ret` through `pretcode` leaves.
    pub const fn sigreturn_sp(at: u64) -> u64 {
        at + 8
    }
}

/// The xsave components in use in a vector state that ptrace gave (`XSTATE_BV`): what a processor must
/// have to take it back.
pub fn xstate_components(xstate: &[u8]) -> u64 {
    if xstate.len() < XSTATE_BV + 8 { 3 } else { u64::from_le_bytes(array(xstate, XSTATE_BV)) }
}

fn array(bytes: &[u8], at: usize) -> [u8; 8] {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    out
}
