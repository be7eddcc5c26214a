//! The layout both sides share: operations, contexts and how arguments are given.
//!
//! Everything is `repr(C)` with fixed-width fields and no implicit padding. Addresses inside the arena are
//! offsets from the arena's base in the task that runs the script, so that one arena can lie at different
//! addresses for those outside and inside.

/// Signals that can serve as the trap, the least used first: SIGURG, SIGWINCH, SIGCHLD, whose default is to be
/// ignored. Their numbers are the same on all architectures of Linux that Torpor knows (signal(7)).
pub const TRAPS: [i32; 3] = [23, 28, 17];
/// Bytes of stack for the executor, which calls two functions deep.
pub const STACK: u64 = 4096;

/// What an operation does.
pub mod kind {
    /// `syscall(nr, args)`
    pub const CALL: u32 = 1;
    /// Copies `args[2]` bytes from `args[1]` to `args[0]`.
    pub const COPY: u32 = 2;
    /// Waits until the 32-bit word at `args[0]` is at least `args[1]`.
    pub const WAIT: u32 = 3;
    /// Adds `args[1]` to the 32-bit word at `args[0]` and wakes all who wait for it.
    pub const WAKE: u32 = 4;
    /// clone3 with `args[1]` bytes of clone_args at `args[0]`; the child runs the context at `args[2]` on
    /// the stack of `args[4]` bytes at `args[3]`.
    pub const SPAWN: u32 = 5;
    /// Goes back to operation `args[0]`, an earlier one, `args[1]` times before it goes on; both are numbers.
    pub const AGAIN: u32 = 6;
}

/// What result an operation must have for the script to go on.
pub mod expect {
    /// Anything.
    pub const ANY: u32 = 0;
    /// No error: not in `-4095..=-1`.
    pub const OK: u32 = 1;
    /// Exactly `Op::expected`.
    pub const EXACT: u32 = 2;
}

/// How an argument is to be read; four bits each in `Op::arg_kinds`, the first argument lowest.
pub mod arg {
    /// The value itself.
    pub const VALUE: u32 = 0;
    /// An offset from the arena's base; the argument is the address.
    pub const ARENA: u32 = 1;
    /// The index of an earlier operation of this script, whose result is the argument.
    pub const RESULT: u32 = 2;
    /// An offset from the arena's base; the argument is the 32-bit word there, sign extended.
    pub const WORD: u32 = 3;
}

/// One operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Op {
    /// See [`kind`].
    pub kind: u32,
    /// See [`expect`].
    pub expect: u32,
    /// System call number.
    pub nr: u64,
    /// Arguments, read as `arg_kinds` says.
    pub args: [u64; 6],
    /// See [`arg`].
    pub arg_kinds: u32,
    /// Explicit padding.
    pub reserved: u32,
    /// The one right result under [`expect::EXACT`].
    pub expected: i64,
    /// What came out: a result or `-errno`.
    pub result: i64,
}

const _: () = assert!(size_of::<Op>() == 88);

/// `Context::state`.
pub mod state {
    /// Not yet run to its end.
    pub const RUNNING: u32 = 0;
    /// Every operation was run and had the result it must have.
    pub const DONE: u32 = 1;
    /// `Context::failed` did not.
    pub const FAILED: u32 = 2;
}

/// `Context::command`: what a thread does that comes back from a trap.
pub mod command {
    /// Nobody asked for anything: the tracer is gone. Heal.
    pub const NONE: u32 = 0;
    /// Run the script that `Context` describes now.
    pub const RUN: u32 = 1;
}

/// `Heal::kind`: the way back when the tracer is gone.
pub mod heal {
    /// There is none (a task under restore): exit.
    pub const EXIT: u32 = 0;
    /// The thread whose frame lies in the target's own memory: wait until the others have left, unmap all
    /// that Torpor mapped and return through the frame.
    pub const LAST: u32 = 1;
    /// A thread whose frame lies in the arena: count itself off and return through the frame.
    pub const EARLY: u32 = 2;
}

/// The way back of one thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Heal {
    /// See [`heal`].
    pub kind: u32,
    /// Whether there are other threads, which may still be on their way out.
    pub company: u32,
    /// Address of the signal frame that leads back.
    pub frame: u64,
    /// Address of a `syscall; ret` in the target's own code.
    pub gadget: u64,
    /// Start of all that Torpor mapped.
    pub start: u64,
    /// Its length.
    pub length: u64,
    /// Arena offset of the 32-bit count of threads that have yet to leave.
    pub guests: u64,
}

/// What one thread runs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Address of the arena in this task.
    pub base: u64,
    /// Arena offset of the operations.
    pub ops: u64,
    /// Number of operations.
    pub count: u32,
    /// See [`state`].
    pub state: u32,
    /// Index of the operation that failed.
    pub failed: u32,
    /// See [`command`].
    pub command: u32,
    /// Thread group id as the task itself sees it, for the trap.
    pub tgid: i32,
    /// Thread id likewise.
    pub tid: i32,
    /// The signal that makes the trap: one that is ignored by default and not handled by the target.
    pub signal: i32,
    /// Explicit padding.
    pub reserved: u32,
    /// The way back.
    pub heal: Heal,
}

const _: () = assert!(size_of::<Heal>() == 48 && size_of::<Context>() == 96);
