//! ptrace requests, as free functions on a thread.
//!
//! nix covers the common half: it lacks `PEEKSIGINFO`, `GETSIGMASK`, `GET_RSEQ_CONFIGURATION`, the seccomp and
//! syscall-user-dispatch requests, and its register sets are of fixed size while XSAVE state is not. So all
//! requests stand here, on the bare system call: glibc's `ptrace` adds nothing but a different prototype per libc.
//!
//! The kernel ties a tracee to the *thread* that attached; from any other thread all of this is `ESRCH`. All
//! requests but `seize` and `interrupt` want the tracee in a ptrace-stop, and say `ESRCH` too when it is not.
//! Keeping that order is the caller's business; see ptrace(2).

use std::mem::size_of;

use nix::errno::Errno;

use crate::abi;
use crate::error::check;
use crate::{Error, Result, Tid};

/// Syscall stops are told apart from `SIGTRAP` by bit 7.
pub const OPTION_SYSGOOD: u32 = libc::PTRACE_O_TRACESYSGOOD.cast_unsigned();
/// New tasks of fork(2) are traced too.
pub const OPTION_FORK: u32 = libc::PTRACE_O_TRACEFORK.cast_unsigned();
/// New tasks of vfork(2) are traced too.
pub const OPTION_VFORK: u32 = libc::PTRACE_O_TRACEVFORK.cast_unsigned();
/// New tasks of clone(2) are traced too.
pub const OPTION_CLONE: u32 = libc::PTRACE_O_TRACECLONE.cast_unsigned();
/// Stop at execve(2).
pub const OPTION_EXEC: u32 = libc::PTRACE_O_TRACEEXEC.cast_unsigned();
/// Stop at exit, before the task lets go of anything.
pub const OPTION_EXIT: u32 = libc::PTRACE_O_TRACEEXIT.cast_unsigned();
/// The tracee is killed when its tracer ends.
pub const OPTION_EXITKILL: u32 = libc::PTRACE_O_EXITKILL.cast_unsigned();
/// Seccomp filters of the tracee are not applied; needs `CAP_SYS_ADMIN` (include/uapi/linux/ptrace.h).
pub const OPTION_SUSPEND_SECCOMP: u32 = libc::PTRACE_O_SUSPEND_SECCOMP.cast_unsigned();

/// A fork was seen.
pub const EVENT_FORK: i32 = libc::PTRACE_EVENT_FORK;
/// A vfork was seen.
pub const EVENT_VFORK: i32 = libc::PTRACE_EVENT_VFORK;
/// A clone was seen.
pub const EVENT_CLONE: i32 = libc::PTRACE_EVENT_CLONE;
/// An execve was seen.
pub const EVENT_EXEC: i32 = libc::PTRACE_EVENT_EXEC;
/// The task is about to exit.
pub const EVENT_EXIT: i32 = libc::PTRACE_EVENT_EXIT;
/// `interrupt` took effect, or a group-stop, or the first stop of an automatically attached child.
pub const EVENT_STOP: i32 = abi::PTRACE_EVENT_STOP;

/// Where a thread stands, as wait(2) told.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Stop {
    /// Ended with this exit code.
    Exited(i32),
    /// Ended by this signal.
    Killed(i32),
    /// Signal-delivery-stop: this signal is about to be delivered.
    Signal(i32),
    /// Syscall-stop (entry and exit look alike). Needs `OPTION_SYSGOOD`.
    Syscall,
    /// A `PTRACE_EVENT_*`. For `EVENT_STOP`, a signal other than `SIGTRAP` means group-stop by that signal.
    Event {
        /// Which `EVENT_*`.
        event: i32,
        /// The signal reported with it.
        signal: i32,
    },
}

impl Stop {
    /// Reads a wait status (the encodings of ptrace(2), "Stopped states").
    pub fn from_status(status: i32) -> Stop {
        if libc::WIFEXITED(status) {
            return Stop::Exited(libc::WEXITSTATUS(status));
        }
        if libc::WIFSIGNALED(status) {
            return Stop::Killed(libc::WTERMSIG(status));
        }
        let signal = libc::WSTOPSIG(status);
        match (status >> 16, signal) {
            (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            (0, signal) => Stop::Signal(signal),
            (event, signal) => Stop::Event { event, signal },
        }
    }

    /// The stopping signal, when this is a group-stop (job control), which `LISTEN` keeps and `CONT` ends.
    pub fn group_stop(self) -> Option<i32> {
        match self {
            Stop::Event { event: EVENT_STOP, signal } if signal != libc::SIGTRAP => Some(signal),
            _ => None,
        }
    }
}

/// Where a thread registered its rseq area, from `PTRACE_GET_RSEQ_CONFIGURATION`.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct RseqConfiguration {
    /// Address of the `struct rseq`.
    pub address: u64,
    /// Its registered length.
    pub size: u32,
    /// The signature before each abort handler.
    pub signature: u32,
    /// Flags; 0 so far.
    pub flags: u32,
}

/// Syscall user dispatch (Documentation/admin-guide/syscall-user-dispatch.rst).
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct SyscallUserDispatch {
    /// Whether dispatch is switched on.
    pub on: bool,
    /// Address of the selector byte, 0 if none.
    pub selector: u64,
    /// Start of the code that may always make system calls.
    pub offset: u64,
    /// Length of that code.
    pub len: u64,
}

/// Attaches without stopping. With options, so that no event is lost in between.
pub fn seize(tid: Tid, options: u32) -> Result<()> {
    request("PTRACE_SEIZE", abi::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Asks a seized thread to stop; `wait` then tells `EVENT_STOP`, or some other stop that came first.
pub fn interrupt(tid: Tid) -> Result<()> {
    request("PTRACE_INTERRUPT", abi::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run, delivering `signal` unless it is 0.
pub fn cont(tid: Tid, signal: i32) -> Result<()> {
    request("PTRACE_CONT", abi::PTRACE_CONT, tid, 0, signal_word(signal)).map(drop)
}

/// Lets a thread run until the next entry to or exit from a system call.
pub fn resume_to_syscall(tid: Tid, signal: i32) -> Result<()> {
    request("PTRACE_SYSCALL", abi::PTRACE_SYSCALL, tid, 0, signal_word(signal)).map(drop)
}

/// Leaves a thread in its group-stop, but lets it tell us of further events.
pub fn listen(tid: Tid) -> Result<()> {
    request("PTRACE_LISTEN", abi::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Ends tracing; the thread runs on, `signal` delivered unless 0 (or goes on being stopped in a group-stop).
pub fn detach(tid: Tid, signal: i32) -> Result<()> {
    request("PTRACE_DETACH", abi::PTRACE_DETACH, tid, 0, signal_word(signal)).map(drop)
}

/// Ends the process of a thread, also one whose user has become another than ours: of who traces nothing more is
/// asked. It must stand (before Linux 5.19).
pub fn kill(tid: Tid) -> Result<()> {
    request("PTRACE_KILL", libc::PTRACE_KILL, tid, 0, 0).map(drop)
}

/// Replaces the options that were given to `seize`.
pub fn set_options(tid: Tid, options: u32) -> Result<()> {
    request("PTRACE_SETOPTIONS", abi::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// The message of the last event: the new tid of a fork or clone, the exit status.
pub fn event_message(tid: Tid) -> Result<u64> {
    let mut message: libc::c_ulong = 0;
    let address = (&raw mut message).expose_provenance();
    request("PTRACE_GETEVENTMSG", abi::PTRACE_GETEVENTMSG, tid, 0, address)?;
    Ok(message)
}

/// The general registers.
pub fn registers(tid: Tid) -> Result<arch::Registers> {
    let mut registers = arch::Registers::default();
    let got = get_regset(tid, abi::NT_PRSTATUS, (&raw mut registers).cast(), size_of::<arch::Registers>())?;
    if got != size_of::<arch::Registers>() {
        // A 32-bit task under a 64-bit kernel answers with its own, shorter set.
        return Err(Error::Parse { file: format!("registers of {tid}"), what: format!("{got} bytes") });
    }
    Ok(registers)
}

/// Sets the general registers.
pub fn set_registers(tid: Tid, registers: &arch::Registers) -> Result<()> {
    let bytes: *const arch::Registers = registers;
    set_regset(tid, abi::NT_PRSTATUS, bytes.cast(), size_of::<arch::Registers>())
}

/// The floating point and vector state: XSAVE format on x86_64, `user_fpsimd_state` on aarch64.
///
/// Its length is the one the kernel answers with. CPUID must not be asked instead: kernel and CPUID may disagree on
/// the features in use, and then `set_xstate` fails with `EINVAL`.
pub fn xstate(tid: Tid) -> Result<Vec<u8>> {
    regset(tid, arch::NT_FPSTATE as u32)
}

/// Sets what `xstate` returned.
pub fn set_xstate(tid: Tid, state: &[u8]) -> Result<()> {
    set_regset(tid, arch::NT_FPSTATE as u32, state.as_ptr(), state.len())
}

/// Any register set by its note number (include/uapi/linux/elf.h).
pub fn regset(tid: Tid, note: u32) -> Result<Vec<u8>> {
    // Most are small, and there may be thousands of threads; what does not fit is cut off.
    const USUAL: usize = 4 * 1024;
    const LARGEST: usize = 64 * 1024;
    let mut bytes = vec![0; USUAL];
    let mut got = get_regset(tid, note, bytes.as_mut_ptr(), USUAL)?;
    if got == USUAL {
        bytes.resize(LARGEST, 0);
        got = get_regset(tid, note, bytes.as_mut_ptr(), LARGEST)?;
    }
    bytes.truncate(got);
    bytes.shrink_to_fit();
    Ok(bytes)
}

/// Sets any register set by its note number.
pub fn set_regset_bytes(tid: Tid, note: u32, bytes: &[u8]) -> Result<()> {
    set_regset(tid, note, bytes.as_ptr(), bytes.len())
}

/// The blocked signals, bit 0 for signal 1.
pub fn signal_mask(tid: Tid) -> Result<u64> {
    let mut mask = 0u64;
    let address = (&raw mut mask).expose_provenance();
    request("PTRACE_GETSIGMASK", abi::PTRACE_GETSIGMASK, tid, size_of::<u64>(), address)?;
    Ok(mask)
}

/// Sets the blocked signals. The kernel drops `SIGKILL` and `SIGSTOP` from the set.
pub fn set_signal_mask(tid: Tid, mask: u64) -> Result<()> {
    let address = (&raw const mask).expose_provenance();
    request("PTRACE_SETSIGMASK", abi::PTRACE_SETSIGMASK, tid, size_of::<u64>(), address).map(drop)
}

/// Whether a signal is one that the kernel raises for what the code itself did (signal(7), "synchronously generated
/// signals").
pub fn is_fault(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP | libc::SIGSYS
    )
}

/// One `siginfo_t`, as the kernel keeps it.
pub type SignalInfo = [u8; abi::SIGINFO_SIZE];

/// The queued signals in order: of the thread, or (`shared`) of its process. None is taken off the queue.
pub fn pending(tid: Tid, shared: bool) -> Result<Vec<SignalInfo>> {
    const AT_ONCE: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut some: [SignalInfo; AT_ONCE] = [[0; abi::SIGINFO_SIZE]; AT_ONCE];
        let arguments = abi::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: if shared { abi::PTRACE_PEEKSIGINFO_SHARED } else { 0 },
            nr: AT_ONCE as i32,
        };
        let got = request(
            "PTRACE_PEEKSIGINFO",
            abi::PTRACE_PEEKSIGINFO,
            tid,
            (&raw const arguments).expose_provenance(),
            (&raw mut some).expose_provenance(),
        )?;
        let got = usize::try_from(got).unwrap_or(0).min(AT_ONCE);
        all.extend_from_slice(&some[..got]);
        if got < AT_ONCE {
            return Ok(all);
        }
    }
}

/// The signal of the present signal-delivery-stop (`EINVAL` in a group-stop).
pub fn signal_info(tid: Tid) -> Result<SignalInfo> {
    let mut info: SignalInfo = [0; abi::SIGINFO_SIZE];
    let address = (&raw mut info).expose_provenance();
    request("PTRACE_GETSIGINFO", abi::PTRACE_GETSIGINFO, tid, 0, address)?;
    Ok(info)
}

/// Replaces the signal information that `cont` or `detach` will deliver.
pub fn set_signal_info(tid: Tid, info: &SignalInfo) -> Result<()> {
    let address = (&raw const *info).expose_provenance();
    request("PTRACE_SETSIGINFO", abi::PTRACE_SETSIGINFO, tid, 0, address).map(drop)
}

/// The rseq registration; `None` if there is none, or if the kernel (before 5.13, or without CONFIG_RSEQ) cannot tell.
pub fn rseq_configuration(tid: Tid) -> Result<Option<RseqConfiguration>> {
    let mut raw = abi::ptrace_rseq_configuration::default();
    let address = (&raw mut raw).expose_provenance();
    let size = size_of::<abi::ptrace_rseq_configuration>();
    let call = "PTRACE_GET_RSEQ_CONFIGURATION";
    match request(call, abi::PTRACE_GET_RSEQ_CONFIGURATION, tid, size, address) {
        Err(Error::Syscall { errno: Errno::EIO | Errno::EINVAL, .. }) => return Ok(None),
        answer => answer?,
    };
    Ok((raw.rseq_abi_pointer != 0).then_some(RseqConfiguration {
        address: raw.rseq_abi_pointer,
        size: raw.rseq_abi_size,
        signature: raw.signature,
        flags: raw.flags,
    }))
}

/// The syscall user dispatch setting; `None` if the kernel (before 6.4) cannot tell.
pub fn syscall_user_dispatch(tid: Tid) -> Result<Option<SyscallUserDispatch>> {
    let mut raw = abi::ptrace_sud_config::default();
    let address = (&raw mut raw).expose_provenance();
    let call = "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG";
    let size = size_of::<abi::ptrace_sud_config>();
    match request(call, abi::PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, address) {
        Err(Error::Syscall { errno: Errno::EIO | Errno::EINVAL, .. }) => return Ok(None),
        answer => answer?,
    };
    Ok(Some(SyscallUserDispatch {
        on: raw.mode != abi::PR_SYS_DISPATCH_OFF,
        selector: raw.selector,
        offset: raw.offset,
        len: raw.len,
    }))
}

/// The `index`th seccomp filter (0 is the one installed last) as raw `struct sock_filter`s; `None` past the last.
///
/// Needs `CAP_SYS_ADMIN`, and that we ourselves run without seccomp (`EACCES` else); see kernel/seccomp.c.
pub fn seccomp_filter(tid: Tid, index: usize) -> Result<Option<Vec<[u8; 8]>>> {
    let call = "PTRACE_SECCOMP_GET_FILTER";
    let count = match request(call, abi::PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Err(Error::Syscall { errno: Errno::ENOENT | Errno::EINVAL, .. }) => return Ok(None),
        answer => usize::try_from(answer?).unwrap_or(0),
    };
    let mut program = vec![[0u8; 8]; count];
    request(call, abi::PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr().expose_provenance())?;
    Ok(Some(program))
}

/// Waits until the thread stops or ends.
pub fn wait(tid: Tid) -> Result<Stop> {
    wait_with(tid, 0).map(|status| Stop::from_status(status.unwrap_or(0)))
}

/// Whether the thread has stopped or ended; `None` while it runs.
pub fn try_wait(tid: Tid) -> Result<Option<Stop>> {
    wait_with(tid, libc::WNOHANG).map(|status| status.map(Stop::from_status))
}

fn wait_with(tid: Tid, flags: i32) -> Result<Option<i32>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for one int.
        // `__WALL`: threads and children that do not signal `SIGCHLD` are not waited for without it (wait(2)).
        let got = unsafe { libc::waitpid(tid.0, &raw mut status, libc::__WALL | flags) };
        match (got, Errno::last()) {
            (0, _) => return Ok(None),
            (-1, Errno::EINTR) => {}
            (-1, errno) => return Err(Error::syscall("waitpid", tid, errno)),
            _ => return Ok(Some(status)),
        }
    }
}

fn signal_word(signal: i32) -> usize {
    usize::try_from(signal).unwrap_or(0)
}

fn get_regset(tid: Tid, note: u32, buffer: *mut u8, len: usize) -> Result<usize> {
    let mut iov = libc::iovec { iov_base: buffer.cast(), iov_len: len };
    buffer.expose_provenance();
    let address = (&raw mut iov).expose_provenance();
    request("PTRACE_GETREGSET", abi::PTRACE_GETREGSET, tid, note as usize, address)?;
    Ok(iov.iov_len.min(len))
}

fn set_regset(tid: Tid, note: u32, bytes: *const u8, len: usize) -> Result<()> {
    let mut iov = libc::iovec { iov_base: bytes.cast_mut().cast(), iov_len: len };
    bytes.expose_provenance();
    let address = (&raw mut iov).expose_provenance();
    request("PTRACE_SETREGSET", abi::PTRACE_SETREGSET, tid, note as usize, address).map(drop)
}

/// The bare call. `address` and `data` mean what the request says: numbers, or addresses of live objects of ours.
pub(crate) fn request(
    call: &'static str,
    request: u32,
    tid: Tid,
    address: usize,
    data: usize,
) -> Result<libc::c_long> {
    // SAFETY: each function above passes, for a request that makes the kernel read or write our memory, the address of
    // an object that outlives the call and is as large as the request's length (or the kernel's structure) says.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            libc::c_ulong::from(request),
            libc::c_long::from(tid.0),
            address as libc::c_ulong,
            data as libc::c_ulong,
        )
    };
    check(returned, call, tid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Victim(Child);
    impl Victim {
        fn start() -> (Victim, Tid) {
            let child = Command::new("sleep").arg("100").spawn().unwrap();
            let tid = Tid(child.id().cast_signed());
            (Victim(child), tid)
        }
    }
    impl Drop for Victim {
        fn drop(&mut self) {
            let _: std::io::Result<()> = self.0.kill();
            let _: std::io::Result<std::process::ExitStatus> = self.0.wait();
        }
    }

    #[test]
    fn statuses() {
        assert_eq!(Stop::from_status(7 << 8), Stop::Exited(7));
        assert_eq!(Stop::from_status(9), Stop::Killed(9));
        assert_eq!(Stop::from_status(0x80 | 11), Stop::Killed(11));
        assert_eq!(Stop::from_status(0x137f), Stop::Signal(19));
        assert_eq!(Stop::from_status(0x857f), Stop::Syscall);
        let stop = Stop::from_status(0x80_057f);
        assert_eq!(stop, Stop::Event { event: EVENT_STOP, signal: 5 });
        assert_eq!(stop.group_stop(), None);
        assert_eq!(Stop::from_status(0x80_137f).group_stop(), Some(19));
    }

    #[test]
    fn a_stopped_process_can_be_read_and_goes_on() {
        let (_victim, tid) = Victim::start();
        // Let it get past execve, so that libc has registered rseq.
        std::thread::sleep(std::time::Duration::from_millis(100));
        seize(tid, OPTION_SYSGOOD).unwrap();
        assert_eq!(try_wait(tid).unwrap(), None);
        interrupt(tid).unwrap();
        assert_eq!(wait(tid).unwrap(), Stop::Event { event: EVENT_STOP, signal: libc::SIGTRAP });

        let registers = registers(tid).unwrap();
        set_registers(tid, &registers).unwrap();
        let state = xstate(tid).unwrap();
        assert!(state.len() >= 512);
        set_xstate(tid, &state).unwrap();
        assert_eq!(xstate(tid).unwrap(), state);

        assert_eq!(signal_mask(tid).unwrap(), 0);
        let usr1 = 1 << (libc::SIGUSR1 - 1);
        set_signal_mask(tid, usr1).unwrap();
        assert_eq!(signal_mask(tid).unwrap(), usr1);
        assert!(pending(tid, true).unwrap().is_empty());
        // SAFETY: plain system call on our own child.
        assert_eq!(unsafe { libc::kill(tid.0, libc::SIGUSR1) }, 0);
        let queued = pending(tid, true).unwrap();
        assert_eq!(queued.len(), 1);
        assert_eq!(i32::from_ne_bytes(queued[0][..4].try_into().unwrap()), libc::SIGUSR1);
        assert!(pending(tid, false).unwrap().is_empty());

        rseq_configuration(tid).unwrap();
        if let Some(dispatch) = syscall_user_dispatch(tid).unwrap() {
            assert!(!dispatch.on);
        }
        assert_eq!(seccomp_filter(tid, 0).unwrap_or(None), None);
        detach(tid, 0).unwrap();
        assert_eq!(cont(tid, 0).unwrap_err().errno(), Some(Errno::ESRCH));
    }
}
