//! Making a new task: clone3 with the pid it must have, as a copy of this process that runs the executor
//! from its first instruction.

use nix::errno::Errno;
use torpor_blob::ENTRY;
use torpor_image::task::Task;
use torpor_kernel::process;
use torpor_parasite::wire::STACK;

use crate::error::{Error, Result};
use crate::plan::TaskPlan;
use crate::thread::CLONE_ARGS;

/// asm-generic/rseq.h and glibc's sysdeps: the signature glibc registers with.
const RSEQ_SIGNATURE: u32 = if cfg!(target_arch = "aarch64") { 0xd428_bc00 } else { 0x5305_3053 };
const RSEQ_FLAG_UNREGISTER: i32 = 1;

/// Makes the task; it waits for its shared word. `context` and `stack` are addresses in the arena.
pub(crate) fn spawn(plan: &TaskPlan, task: &Task, context: u64, stack: u64) -> Result<()> {
    let pid = task.pid.0;
    let mut args = [0u64; CLONE_ARGS / 8];
    args[4] = libc::SIGCHLD as u64;
    args[5] = stack;
    args[6] = STACK;
    args[8] = (&raw const pid) as u64;
    args[9] = 1;
    let rseq = Rseq::take();
    // The new task must not run handlers of ours, nor miss its trap. Signals of libc's own are blocked too,
    // which its wrapper would not do.
    let mask: u64 = !(1 << (plan.trap - 1));
    let mut before = 0u64;
    // SAFETY: rt_sigprocmask reads and fills masks of eight bytes. `spawn` gets arguments for clone3 as
    // described there: a stack of its own, and executor and context that the copy of our memory has too.
    // Between the two masks nothing of ours runs in the child.
    let got = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut before, 8);
        let got = arch::spawn(args.as_ptr() as u64, CLONE_ARGS as u64, plan.blob + ENTRY, context);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
        got
    };
    drop(rseq);
    if got >= 0 {
        return Ok(());
    }
    Err(failure(task, task.pid.0, Errno::from_raw(-got as i32)))
}

/// Why an id could not be had.
pub(crate) fn failure(task: &Task, id: i32, errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::Conflict {
            what: task.title(),
            why: match process::who_holds(id) {
                Some(name) => format!("pid {id} is taken by `{name}`"),
                None => format!("pid {id} is taken, perhaps by the id of a process group or session"),
            },
            remedy: "wait until it ends, or stop it".into(),
        },
        Errno::EPERM => Error::Permission {
            what: task.title(),
            call: "clone3 with a given pid",
            errno,
            remedy: "run torpor as root or with CAP_CHECKPOINT_RESTORE",
        },
        Errno::EINVAL => Error::Unfit {
            what: task.title(),
            why: format!("this machine gives no pid as high as {id}, or its kernel none at all on request"),
            remedy: "raise /proc/sys/kernel/pid_max (Linux 5.5 or newer)".into(),
        },
        errno => Error::Open { what: task.title(), call: "clone3", errno },
    }
}

/// The rseq area of this thread, given back on drop. A copy of this process would inherit its
/// registration, and be killed by the kernel once that memory is unmapped.
struct Rseq {
    registered: Option<(u64, u32)>,
}

impl Rseq {
    fn take() -> Self {
        // SAFETY: looks a symbol up by a name that ends with a zero.
        let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
        if offset.is_null() {
            return Rseq { registered: None };
        }
        // SAFETY: glibc defines the symbol as a constant ptrdiff_t (sys/rseq.h).
        let offset = unsafe { offset.cast::<isize>().read() };
        let address = arch::cpu::thread_pointer().wrapping_add_signed(offset as i64);
        // 32 bytes were registered up to glibc 2.39; later what the kernel asks for in the auxiliary vector.
        // SAFETY: getauxval takes a number.
        let wanted = unsafe { libc::getauxval(27) } as u32;
        let registered =
            [32, wanted.max(32)].into_iter().find(|size| call(address, *size, RSEQ_FLAG_UNREGISTER));
        Rseq { registered: registered.map(|size| (address, size)) }
    }
}

impl Drop for Rseq {
    fn drop(&mut self) {
        if let Some((address, size)) = self.registered {
            call(address, size, 0);
        }
    }
}

fn call(address: u64, size: u32, flags: i32) -> bool {
    // SAFETY: the area belongs to this thread for its whole life.
    unsafe { libc::syscall(libc::SYS_rseq, address, size, flags, RSEQ_SIGNATURE) == 0 }
}
