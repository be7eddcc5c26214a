//! The general registers of a thread, as `PTRACE_GETREGSET(NT_PRSTATUS)` gives them.

/// `struct user_regs_struct` (sys/user.h), in the kernel's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[expect(missing_docs, reason = "the fields are the registers of their names")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const _: () = assert!(size_of::<Registers>() == 27 * 8);

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
/// Length of the `syscall` instruction, 0f 05.
const SYSCALL_LENGTH: u64 = 2;
/// Selector of 64-bit user code (arch/x86/include/asm/segment.h, `__USER_CS`).
const USER_CS: u64 = 0x33;
/// EFLAGS for code of ours: interrupts on, reserved bit 1, nothing else; DF above all is clear.
const EFLAGS: u64 = 0x202;

impl Registers {
    /// Address of the next instruction.
    pub fn ip(&self) -> u64 {
        self.rip
    }

    /// Sets the address of the next instruction.
    pub fn set_ip(&mut self, ip: u64) {
        self.rip = ip;
    }

    /// The stack pointer.
    pub fn sp(&self) -> u64 {
        self.rsp
    }

    /// Where a new frame may begin: the 128 bytes below the stack pointer belong to the running
    /// function (System V ABI, "red zone").
    pub fn frame_top(&self) -> u64 {
        self.rsp.wrapping_sub(128)
    }

    /// Thread pointer (fs base), where these registers hold it.
    pub fn tls(&self) -> Option<u64> {
        Some(self.fs_base)
    }

    /// What the last system call returned.
    pub fn result(&self) -> i64 {
        self.rax as i64
    }

    /// Whether the thread runs 64-bit code; a 32-bit task needs another blob and another restore.
    pub fn native(&self) -> bool {
        self.cs == USER_CS
    }

    /// The system call the thread was stopped in and that the kernel would restart on resume.
    pub fn interrupted_call(&self) -> Option<u64> {
        let restarts =
            matches!(self.result(), ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK);
        (self.orig_rax as i64 >= 0 && restarts).then_some(self.orig_rax)
    }

    /// These registers with a system call that the stop itself made fail set up to be made again.
    ///
    /// Some calls return a plain EINTR when they are interrupted, even by a stop without any signal to
    /// handle (signal(7), "interruption of system calls by stop signals"). None of those listed here has
    /// done anything when it says so.
    pub fn retried(&self) -> Option<Self> {
        const EINTR: i64 = -4;
        // read, recvfrom, recvmsg, accept (with a receive timeout), semop, rt_sigtimedwait, io_getevents,
        // semtimedop, epoll_wait, epoll_pwait, readv, accept4, recvmmsg, io_pgetevents, io_uring_enter,
        // epoll_pwait2.
        const CALLS: [u64; 16] = [0, 45, 47, 43, 65, 128, 208, 220, 232, 281, 19, 288, 299, 333, 426, 441];
        (self.result() == EINTR && CALLS.contains(&self.orig_rax)).then(|| Self {
            rax: self.orig_rax,
            rip: self.rip.wrapping_sub(SYSCALL_LENGTH),
            orig_rax: u64::MAX,
            ..*self
        })
    }

    /// Bytes before [`Registers::ip`] that [`Registers::resolved`] looks at.
    pub const CALL_SITE: usize = 7;

    /// These registers with the number of the call that is being restarted, where they only say that one is.
    ///
    /// After a first stop an interrupted call with a relative timeout goes on as restart_syscall(2), whose
    /// meaning only the kernel knows. Its number is told by the code, where that is `mov $nr, %eax; syscall`
    /// (`site` are the bytes before ip); its arguments still lie in their registers. `None` where it is not.
    pub fn resolved(&self, site: &[u8; Self::CALL_SITE]) -> Option<Self> {
        if self.interrupted_call() != Some(crate::nr::RESTART_SYSCALL) {
            return Some(*self);
        }
        let nr = u64::from(u32::from_le_bytes([site[1], site[2], site[3], site[4]]));
        // poll, nanosleep, futex, clock_nanosleep: those that use a restart block.
        const CALLS: [u64; 4] = [7, 35, 202, 230];
        (site[0] == 0xb8 && site[5..] == [0x0f, 0x05] && CALLS.contains(&nr))
            .then_some(Self { orig_rax: nr, ..*self })
    }

    /// These registers, in which a call is being restarted, with the number it really has.
    pub fn with_restarted_call(&self, nr: u64) -> Self {
        Self { orig_rax: nr, ..*self }
    }

    /// These registers made independent of the kernel's memory of an interrupted system call.
    ///
    /// A thread stopped in a system call shows `-ERESTART*` in rax; the kernel acts on it when the same
    /// task resumes (arch/x86/kernel/signal.c, `arch_do_signal_or_restart`). A new task, or one that comes
    /// back by `rt_sigreturn`, has no such memory, so the call is set up to be made again with its
    /// arguments. For `ERESTART_RESTARTBLOCK` (nanosleep, poll, futex with a relative timeout) the kernel
    /// alone knows the time that is left: the timeout starts over, where a plain resume would yield EINTR.
    pub fn restarted(&self) -> Self {
        let mut regs = *self;
        if let Some(nr) = self.interrupted_call() {
            // restart_syscall(2) itself cannot be made again elsewhere: its argument was in the kernel.
            if nr == crate::nr::RESTART_SYSCALL {
                regs.rax = -4i64 as u64;
            } else {
                regs.rax = nr;
                regs.rip = self.rip.wrapping_sub(SYSCALL_LENGTH);
            }
        }
        regs.orig_rax = u64::MAX;
        regs
    }

    /// Registers that make one system call at the instruction `at` with the stack at `sp`.
    /// `orig_rax` is -1, lest the kernel take this for a call to restart. Where the thread goes on
    /// afterwards is the word at `sp`; elsewhere a register, hence always [`Registers::returning_to`] as well.
    pub fn with_call(&self, at: u64, sp: u64, nr: u64, args: [u64; 6]) -> Self {
        Self {
            rip: at,
            rsp: sp,
            rax: nr,
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            r10: args[3],
            r8: args[4],
            r9: args[5],
            eflags: EFLAGS,
            orig_rax: u64::MAX,
            ..*self
        }
    }

    /// These registers with `back` as the address that a `ret` with the stack pointer at a signal frame
    /// goes to: the frame's `pretcode`, which here lies in the frame itself, so that nothing is changed.
    /// On aarch64 it is in a register.
    pub fn returning_to(&self, _back: u64) -> Self {
        *self
    }

    /// Registers that enter a C function at `entry` with one argument and the stack top `sp`
    /// (aligned to 16), as if called.
    pub fn with_entry(&self, entry: u64, sp: u64, argument: u64) -> Self {
        Self { rip: entry, rsp: sp - 8, rdi: argument, rbp: 0, eflags: EFLAGS, orig_rax: u64::MAX, ..*self }
    }

    /// Names and values, for people.
    pub fn named(&self) -> [(&'static str, u64); 20] {
        [
            ("rip", self.rip),
            ("rsp", self.rsp),
            ("rax", self.rax),
            ("rbx", self.rbx),
            ("rcx", self.rcx),
            ("rdx", self.rdx),
            ("rsi", self.rsi),
            ("rdi", self.rdi),
            ("rbp", self.rbp),
            ("r8", self.r8),
            ("r9", self.r9),
            ("r10", self.r10),
            ("r11", self.r11),
            ("r12", self.r12),
            ("r13", self.r13),
            ("r14", self.r14),
            ("r15", self.r15),
            ("eflags", self.eflags),
            ("fs_base", self.fs_base),
            ("gs_base", self.gs_base),
        ]
    }
}

/// The call that a thread makes by way of restart_syscall(2), told by the kernel function it sleeps in and its
/// arguments.
pub fn call_asleep_in(channel: &str, args: &[u64; 6]) -> Option<u64> {
    const POLL: u64 = 7;
    const NANOSLEEP: u64 = 35;
    const CLOCK_NANOSLEEP: u64 = 230;
    // clock_nanosleep begins with a small clock number, nanosleep with an address.
    const CLOCKS: u64 = 16;
    if channel.contains("futex") {
        Some(crate::nr::FUTEX)
    } else if channel.contains("poll") {
        Some(POLL)
    } else if channel.contains("nanosleep") {
        Some(if args[0] < CLOCKS { CLOCK_NANOSLEEP } else { NANOSLEEP })
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_call_is_made_again() {
        let regs = Registers { rax: ERESTARTSYS as u64, orig_rax: 202, rip: 0x1002, ..Default::default() };
        let again = regs.restarted();
        assert_eq!((again.rip, again.rax, again.orig_rax as i64), (0x1000, 202, -1));
    }

    #[test]
    fn a_result_outside_a_call_is_left_alone() {
        let regs =
            Registers { rax: ERESTARTSYS as u64, orig_rax: u64::MAX, rip: 0x1002, ..Default::default() };
        assert_eq!(regs.restarted(), regs);
    }
}
