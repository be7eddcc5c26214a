//! The general registers of a thread, as `PTRACE_GETREGSET(NT_PRSTATUS)` gives them.

/// `struct user_pt_regs` (asm/ptrace.h), in the kernel's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Registers {
    /// x0 to x30
    pub regs: [u64; 31],
    /// Stack pointer
    pub sp: u64,
    /// Address of the next instruction
    pub pc: u64,
    /// Flags, mode and the like
    pub pstate: u64,
}

const _: () = assert!(size_of::<Registers>() == 34 * 8);

/// Index of the register that holds the system call number.
const NUMBER: usize = 8;
/// Index of the frame pointer.
const FRAME: usize = 29;
/// Index of the link register.
const LINK: usize = 30;
/// `PSR_MODE32_BIT` (asm/ptrace.h)
const PSR_MODE32: u64 = 1 << 4;
/// `PSR_BTYPE_MASK`: what kind of branch the next instruction must accept.
const PSR_BTYPE: u64 = 3 << 10;
/// `DBG_SPSR_SS`: a single step is under way.
const PSR_SS: u64 = 1 << 21;

impl Registers {
    /// Address of the next instruction.
    pub fn ip(&self) -> u64 {
        self.pc
    }

    /// Sets the address of the next instruction.
    pub fn set_ip(&mut self, ip: u64) {
        self.pc = ip;
    }

    /// The stack pointer.
    pub fn sp(&self) -> u64 {
        self.sp
    }

    /// Where a new frame may begin: the stack pointer, as the AAPCS64 has no red zone.
    pub fn frame_top(&self) -> u64 {
        self.sp
    }

    /// Thread pointer, where these registers hold it: TPIDR_EL0 is in a regset of its own (`NT_ARM_TLS`).
    pub fn tls(&self) -> Option<u64> {
        None
    }

    /// What the last system call returned.
    pub fn result(&self) -> i64 {
        self.regs[0] as i64
    }

    /// Whether the thread runs 64-bit code; a 32-bit task needs another blob and another restore.
    pub fn native(&self) -> bool {
        self.pstate & PSR_MODE32 == 0
    }

    /// The system call the thread was stopped in and that the kernel would restart on resume, as far as
    /// the registers tell. Here they never do; see [`Registers::restarted`].
    pub fn interrupted_call(&self) -> Option<u64> {
        None
    }

    /// These registers made independent of the kernel's memory of an interrupted system call.
    ///
    /// They are so already. Before it lets a tracer see a stop (interrupt, group stop, signal delivery), the
    /// kernel puts the hidden first argument back into x0 and the program counter onto the `svc`
    /// (arch/arm64/kernel/signal.c, `do_signal`: "so that a debugger will see the already changed PC"),
    /// and it forgets the call (`NT_ARM_SYSTEM_CALL` reads -1). The number is in x8, so whoever gets these
    /// registers makes the call again. With `ERESTART_RESTARTBLOCK` the timeout starts over; a
    /// restart_syscall made elsewhere yields EINTR by itself. An x0 that looks like `-ERESTART*` is thus
    /// the program's own number and must not be touched. (At a syscall-exit stop, which Torpor never
    /// dumps at, it would not be.)
    pub fn restarted(&self) -> Self {
        *self
    }

    /// On this architecture nothing: a failed call's first argument is gone, as x0 holds the error.
    pub fn retried(&self) -> Option<Self> {
        None
    }

    /// Bytes before [`Registers::ip`] that [`Registers::resolved`] looks at.
    pub const CALL_SITE: usize = 7;

    /// On this architecture nothing is to be resolved: the kernel has set the call up to be made again.
    pub fn resolved(&self, _site: &[u8; Self::CALL_SITE]) -> Option<Self> {
        Some(*self)
    }

    /// On this architecture nothing, as above.
    pub fn with_restarted_call(&self, _nr: u64) -> Self {
        *self
    }

    /// Registers that make one system call at the instruction `at` with the stack at `sp`.
    ///
    /// Where the thread goes on afterwards is in x30, hence always [`Registers::returning_to`] as well.
    pub fn with_call(&self, at: u64, sp: u64, nr: u64, args: [u64; 6]) -> Self {
        let mut regs = *self;
        regs.regs[..6].copy_from_slice(&args);
        regs.regs[NUMBER] = nr;
        regs.at(at, sp)
    }

    /// These registers with `back` as the address that a `ret` with the stack pointer at a signal frame
    /// goes to: the frame's `pretcode`. On x86_64 the frame itself holds it.
    pub fn returning_to(&self, back: u64) -> Self {
        let mut regs = *self;
        regs.regs[LINK] = back;
        regs
    }

    /// Registers that enter a C function at `entry` with one argument and the stack top `sp`
    /// (aligned to 16), as if called.
    pub fn with_entry(&self, entry: u64, sp: u64, argument: u64) -> Self {
        let mut regs = *self;
        regs.regs[0] = argument;
        regs.regs[FRAME] = 0;
        regs.regs[LINK] = 0;
        regs.at(entry, sp)
    }

    fn at(mut self, pc: u64, sp: u64) -> Self {
        self.pc = pc;
        self.sp = sp;
        // The target may have been stopped right behind an indirect branch or amid a step.
        self.pstate &= !(PSR_BTYPE | PSR_SS);
        self
    }

    /// Names and values, for people.
    pub fn named(&self) -> [(&'static str, u64); 34] {
        const NAMES: [&str; 34] = [
            "pc", "sp", "pstate", "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11",
            "x12", "x13", "x14", "x15", "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25",
            "x26", "x27", "x28", "x29", "x30",
        ];
        core::array::from_fn(|i| {
            let value = match i {
                0 => self.pc,
                1 => self.sp,
                2 => self.pstate,
                _ => self.regs[i - 3],
            };
            (NAMES[i], value)
        })
    }
}

/// The call that a thread makes by way of restart_syscall(2): not needed on this architecture.
pub fn call_asleep_in(_channel: &str, _args: &[u64; 6]) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Registers {
        let mut regs = Registers { sp: 0x7000, pc: 0x4000, pstate: PSR_BTYPE | PSR_SS, ..Default::default() };
        for (i, r) in regs.regs.iter_mut().enumerate() {
            *r = 100 + i as u64;
        }
        regs
    }

    #[test]
    fn a_call_has_its_number_arguments_and_way_back() {
        let call = some().with_call(0x1000, 0x6000, 215, [1, 2, 3, 4, 5, 6]).returning_to(0x2000);
        assert_eq!((call.pc, call.sp, call.pstate), (0x1000, 0x6000, 0));
        assert_eq!(call.regs[..9], [1, 2, 3, 4, 5, 6, 106, 107, 215]);
        assert_eq!((call.regs[29], call.regs[30]), (129, 0x2000));
    }

    #[test]
    fn a_number_that_looks_like_a_restart_is_left_alone() {
        let mut regs = some();
        regs.regs[0] = -512i64 as u64;
        assert_eq!((regs.restarted(), regs.interrupted_call()), (regs, None));
    }

    #[test]
    fn every_register_has_its_name() {
        let named = some().named();
        assert_eq!(
            (named[0], named[1], named[3], named[33]),
            (("pc", 0x4000), ("sp", 0x7000), ("x0", 100), ("x30", 130))
        );
    }
}
