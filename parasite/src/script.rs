//! Composing scripts, on the outside.
//!
//! A [`Script`] is pure data: it knows neither where its arena will lie nor which numbers descriptors will
//! have; both are filled in by [`Script::encode`]. Every operation carries its purpose, so that a failure
//! can be told in the words of the object that was being dumped or restored.

use std::borrow::Cow;

use crate::wire::{self, Context, Op, arg, expect, kind};

/// Bytes of the script's data area, to be given to calls by address or read back afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Offset in the data area.
    pub offset: u32,
    /// Length in bytes.
    pub len: u32,
}

impl Data {
    /// The part of these bytes that begins at `offset`.
    pub fn at(self, offset: u32) -> Data {
        Data { offset: self.offset + offset, len: self.len - offset }
    }
}

/// An operation of this script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(pub u32);

/// An argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// The number itself.
    Number(u64),
    /// The address of bytes in the data area.
    Address(Data),
    /// The 32-bit word at the start of these bytes.
    Word(Data),
    /// The result of an earlier operation.
    Result(OpId),
    /// The address of the result of an earlier operation.
    ResultAddress(OpId),
    /// The number that a descriptor opened outside has in the task.
    Descriptor(u32),
    /// The address of a word shared by all scripts of the arena.
    Shared(u32),
    /// The address of another context of the arena.
    Context(u32),
    /// The address of that context's stack.
    Stack(u32),
}

macro_rules! number {
    ($($from:ty),*) => {$(impl From<$from> for Value {
        fn from(value: $from) -> Self { Value::Number(value as i64 as u64) }
    })*};
}
number!(i32, u32, i64, usize);

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Value::Number(value)
    }
}

impl From<Data> for Value {
    fn from(value: Data) -> Self {
        Value::Address(value)
    }
}

impl From<OpId> for Value {
    fn from(value: OpId) -> Self {
        Value::Result(value)
    }
}

/// One operation with its arguments still symbolic.
#[derive(Clone, Debug)]
pub struct Step {
    /// See [`wire::kind`].
    pub kind: u32,
    /// System call number.
    pub nr: i64,
    /// Arguments.
    pub args: [Value; 6],
    /// How many of the arguments count, for printing.
    pub arity: u8,
    /// See [`wire::expect`].
    pub expect: u32,
    /// The one right result.
    pub expected: i64,
    /// What this is for, as a noun phrase: "size of pipe fd 7".
    pub purpose: Cow<'static, str>,
}

/// A list of operations and the data they use.
#[derive(Clone, Debug, Default)]
pub struct Script {
    steps: Vec<Step>,
    data: Vec<u8>,
    /// Words of the data area that must hold the address of others.
    pointers: Vec<(Data, Data)>,
}

/// Where a script lies in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Offset of the operations.
    pub ops: u64,
    /// Offset of the data area.
    pub data: u64,
    /// End of both.
    pub end: u64,
}

/// What encoding needs to know of the arena.
pub struct Surroundings<'a> {
    /// Address of the arena in the task.
    pub base: u64,
    /// Offset of the words shared by all scripts.
    pub shared: u64,
    /// Offset of the first context; the others follow.
    pub contexts: u64,
    /// Offset of the first stack.
    pub stacks: u64,
    /// Size of each stack.
    pub stack_size: u64,
    /// The number a descriptor has in the task.
    pub descriptor: &'a dyn Fn(u32) -> i32,
}

/// Appends a system call that must not fail: `call!(script, "purpose", SYS_x, arg, ...)`.
#[macro_export]
macro_rules! call {
    ($script:expr, $purpose:expr, $nr:expr $(, $arg:expr)* $(,)?) => {
        $script.call($purpose, $nr, &[$($crate::script::Value::from($arg)),*])
    };
}

impl Script {
    /// An empty script.
    pub fn new() -> Self {
        Self::default()
    }

    /// The operations.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Puts `bytes` into the data area, aligned to 8.
    pub fn data(&mut self, bytes: &[u8]) -> Data {
        let data = self.reserve(bytes.len());
        self.data[data.offset as usize..][..bytes.len()].copy_from_slice(bytes);
        data
    }

    /// Puts words into the data area.
    pub fn words(&mut self, words: &[u64]) -> Data {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.data(&bytes)
    }

    /// Puts a path into the data area, with the zero that ends it.
    pub fn c_string(&mut self, bytes: &[u8]) -> Data {
        let mut bytes = bytes.to_vec();
        bytes.push(0);
        self.data(&bytes)
    }

    /// What lies in the data area so far.
    pub fn bytes(&self, data: Data) -> &[u8] {
        &self.data[data.offset as usize..][..data.len as usize]
    }

    /// Reserves zeroed bytes for results, aligned to 8.
    pub fn reserve(&mut self, len: usize) -> Data {
        let offset = self.data.len().next_multiple_of(8);
        self.data.resize(offset + len, 0);
        Data { offset: offset as u32, len: len as u32 }
    }

    /// A system call that must not fail.
    pub fn call(&mut self, purpose: impl Into<Cow<'static, str>>, nr: i64, args: &[Value]) -> OpId {
        self.push(kind::CALL, purpose, nr, args, expect::OK, 0)
    }

    /// A system call that may have any result.
    pub fn try_call(&mut self, purpose: impl Into<Cow<'static, str>>, nr: i64, args: &[Value]) -> OpId {
        self.push(kind::CALL, purpose, nr, args, expect::ANY, 0)
    }

    /// A system call that must return exactly `expected`.
    pub fn call_for(
        &mut self,
        purpose: impl Into<Cow<'static, str>>,
        nr: i64,
        args: &[Value],
        expected: i64,
    ) -> OpId {
        self.push(kind::CALL, purpose, nr, args, expect::EXACT, expected)
    }

    /// Makes the eight bytes at `slot` hold the address of `target`: for structures with pointers.
    pub fn point(&mut self, slot: Data, target: Data) {
        self.pointers.push((slot, target));
    }

    /// Copies `len` bytes from `from` to `to`.
    pub fn copy(
        &mut self,
        purpose: impl Into<Cow<'static, str>>,
        to: impl Into<Value>,
        from: impl Into<Value>,
        len: u64,
    ) {
        self.push(kind::COPY, purpose, 0, &[to.into(), from.into(), len.into()], expect::ANY, 0);
    }

    /// Does all operations from `first` up to here `times` more often.
    pub fn again(&mut self, purpose: impl Into<Cow<'static, str>>, first: OpId, times: u64) {
        let args = [Value::Number(u64::from(first.0)), Value::Number(times)];
        self.push(kind::AGAIN, purpose, 0, &args, expect::ANY, 0);
    }

    /// Waits until the shared `word` is at least `value`.
    pub fn wait(&mut self, purpose: impl Into<Cow<'static, str>>, word: u32, value: u32) {
        self.push(kind::WAIT, purpose, 0, &[Value::Shared(word), value.into()], expect::ANY, 0);
    }

    /// Adds one to the shared `word` and wakes all who wait for it.
    pub fn wake(&mut self, purpose: impl Into<Cow<'static, str>>, word: u32) {
        self.push(kind::WAKE, purpose, 0, &[Value::Shared(word), 1u64.into()], expect::OK, 0);
    }

    /// clone3 with these `clone_args` (its stack fields are filled in); the child runs `context`. Must
    /// return `id` unless that is `None`.
    pub fn spawn(
        &mut self,
        purpose: impl Into<Cow<'static, str>>,
        clone_args: Data,
        context: u32,
        stack_size: u64,
        id: Option<i64>,
    ) -> OpId {
        let args = [
            clone_args.into(),
            Value::Number(u64::from(clone_args.len)),
            Value::Context(context),
            Value::Stack(context),
            stack_size.into(),
        ];
        let expect = if id.is_some() { expect::EXACT } else { expect::OK };
        self.push(kind::SPAWN, purpose, libc_clone3(), &args, expect, id.unwrap_or(0))
    }

    /// The same, with any result.
    pub fn try_spawn(
        &mut self,
        purpose: impl Into<Cow<'static, str>>,
        clone_args: Data,
        context: u32,
        stack_size: u64,
    ) -> OpId {
        let op = self.spawn(purpose, clone_args, context, stack_size, None);
        self.steps[op.0 as usize].expect = expect::ANY;
        op
    }

    fn push(
        &mut self,
        kind: u32,
        purpose: impl Into<Cow<'static, str>>,
        nr: i64,
        args: &[Value],
        expect: u32,
        expected: i64,
    ) -> OpId {
        let mut all = [Value::Number(0); 6];
        all[..args.len()].copy_from_slice(args);
        let id = OpId(self.steps.len() as u32);
        debug_assert!(args.iter().all(|a| !matches!(a, Value::Result(of) if of.0 >= id.0)));
        self.steps.push(Step {
            kind,
            nr,
            args: all,
            arity: args.len() as u8,
            expect,
            expected,
            purpose: purpose.into(),
        });
        id
    }

    /// Where this script lies when it begins at arena offset `at`.
    pub fn place(&self, at: u64) -> Placed {
        let ops = at.next_multiple_of(16);
        let data = ops + (self.steps.len() * size_of::<Op>()) as u64;
        let data = data.next_multiple_of(16);
        Placed { ops, data, end: data + self.data.len() as u64 }
    }

    /// Writes operations and data into `arena` (its first byte is offset 0).
    pub fn encode(&self, placed: Placed, around: &Surroundings<'_>, arena: &mut [u8]) {
        for (i, step) in self.steps.iter().enumerate() {
            let mut op = Op {
                kind: step.kind,
                expect: step.expect,
                nr: step.nr as u64,
                expected: step.expected,
                ..Op::default()
            };
            for (j, value) in step.args.iter().enumerate() {
                let (kind, raw) = match *value {
                    Value::Number(n) => (arg::VALUE, n),
                    Value::Address(d) => (arg::ARENA, placed.data + u64::from(d.offset)),
                    Value::Word(d) => (arg::WORD, placed.data + u64::from(d.offset)),
                    Value::Result(of) => (arg::RESULT, u64::from(of.0)),
                    Value::ResultAddress(of) => {
                        let result = std::mem::offset_of!(Op, result) as u64;
                        (arg::ARENA, placed.ops + u64::from(of.0) * size_of::<Op>() as u64 + result)
                    }
                    Value::Descriptor(d) => (arg::VALUE, (around.descriptor)(d) as i64 as u64),
                    Value::Shared(word) => (arg::ARENA, around.shared + 4 * u64::from(word)),
                    Value::Context(c) => {
                        (arg::ARENA, around.contexts + u64::from(c) * size_of::<Context>() as u64)
                    }
                    Value::Stack(c) => (arg::ARENA, around.stacks + u64::from(c) * around.stack_size),
                };
                op.args[j] = raw;
                op.arg_kinds |= kind << (4 * j);
            }
            let at = placed.ops as usize + i * size_of::<Op>();
            arena[at..at + size_of::<Op>()].copy_from_slice(op.bytes());
        }
        let data = &mut arena[placed.data as usize..placed.end as usize];
        data.copy_from_slice(&self.data);
        for (slot, target) in &self.pointers {
            let address = around.base + placed.data + u64::from(target.offset);
            data[slot.offset as usize..][..8].copy_from_slice(&address.to_ne_bytes());
        }
    }

    /// Reads what the operations left in `arena`.
    pub fn outcome(&self, placed: Placed, arena: &[u8]) -> Outcome {
        let results = (0..self.steps.len())
            .map(|i| {
                let at = placed.ops as usize + i * size_of::<Op>() + std::mem::offset_of!(Op, result);
                i64::from_ne_bytes(arena[at..at + 8].try_into().expect("eight bytes"))
            })
            .collect();
        Outcome { results, data: arena[placed.data as usize..placed.end as usize].to_vec() }
    }
}

/// The number of clone3, which is the same on every architecture.
fn libc_clone3() -> i64 {
    arch::nr::CLONE3 as i64
}

/// What a script that was run has left.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    results: Vec<i64>,
    data: Vec<u8>,
}

impl Outcome {
    /// The result of `op`: a value or `-errno`.
    pub fn result(&self, op: OpId) -> i64 {
        self.results[op.0 as usize]
    }

    /// Whether `op` did not fail.
    pub fn ok(&self, op: OpId) -> bool {
        !(-4095..0).contains(&self.result(op))
    }

    /// The bytes of `data`.
    pub fn bytes(&self, data: Data) -> &[u8] {
        &self.data[data.offset as usize..][..data.len as usize]
    }

    /// The 64-bit word at the start of `data`.
    pub fn u64(&self, data: Data) -> u64 {
        u64::from_ne_bytes(self.bytes(data)[..8].try_into().expect("eight bytes"))
    }

    /// The 32-bit word at the start of `data`.
    pub fn u32(&self, data: Data) -> u32 {
        u32::from_ne_bytes(self.bytes(data)[..4].try_into().expect("four bytes"))
    }
}

macro_rules! as_bytes {
    ($($t:ty),*) => {$(impl $t {
        /// The memory of this structure.
        pub fn bytes(&self) -> &[u8] {
            // SAFETY: repr(C) of integers without padding, as the asserted size shows.
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast::<u8>(), size_of::<$t>()) }
        }

        /// The structure that lies in the first bytes of `bytes`.
        pub fn from_bytes(bytes: &[u8]) -> Self {
            assert!(bytes.len() >= size_of::<$t>());
            // SAFETY: every bit pattern is valid for integers, and the length was checked.
            unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() }
        }
    })*};
}
as_bytes!(Op, Context, wire::Heal);

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script in this process, as the blob would.
    fn run(script: &Script) -> (Context, Outcome) {
        let placed = script.place(256);
        let mut arena = vec![0u8; placed.end as usize];
        let around = Surroundings {
            base: arena.as_ptr() as u64,
            shared: 0,
            contexts: 0,
            stacks: 0,
            stack_size: 0,
            descriptor: &|slot| slot as i32 + 100,
        };
        script.encode(placed, &around, &mut arena);
        let mut context = Context {
            base: arena.as_mut_ptr() as u64,
            ops: placed.ops,
            count: script.steps().len() as u32,
            ..Context::default()
        };
        // SAFETY: the context describes the arena just encoded; the calls of these tests are harmless.
        unsafe { crate::executor::run_script(&mut context) };
        (context, script.outcome(placed, &arena))
    }

    const GETPID: i64 = 39;
    const PIPE: i64 = 22;
    const READ: i64 = 0;
    const WRITE: i64 = 1;
    const CLOSE: i64 = 3;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn results_and_words_reach_later_operations() {
        let mut s = Script::new();
        let pid = call!(s, "own pid", GETPID);
        let fds = s.reserve(8);
        call!(s, "a pipe", PIPE, fds);
        let text = s.data(b"torpor");
        let back = s.reserve(6);
        s.call_for("write", WRITE, &[Value::Word(fds.at(4)), text.into(), 6.into()], 6);
        s.call_for("read", READ, &[Value::Word(fds), back.into(), 6.into()], 6);
        call!(s, "close", CLOSE, Value::Word(fds));
        call!(s, "close", CLOSE, Value::Word(fds.at(4)));
        let copy = s.reserve(6);
        s.copy("copy", copy, back, 6);
        let (context, out) = run(&s);
        assert_eq!(context.state, wire::state::DONE);
        assert_eq!(out.result(pid), i64::from(std::process::id()));
        assert_eq!(out.bytes(copy), b"torpor");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_failure_stops_the_script_and_is_named() {
        let mut s = Script::new();
        s.try_call("may fail", CLOSE, &[(-1).into()]);
        let bad = call!(s, "must not fail", CLOSE, Value::Number(u64::MAX));
        let never = call!(s, "never", GETPID);
        let (context, out) = run(&s);
        assert_eq!((context.state, context.failed), (wire::state::FAILED, 1));
        assert_eq!((out.result(bad), out.result(never)), (-9, 0));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn operations_are_done_again() {
        let mut s = Script::new();
        let fds = s.reserve(8);
        call!(s, "a pipe", PIPE, fds);
        let byte = s.data(b"x");
        let first = s.call_for("write", WRITE, &[Value::Word(fds.at(4)), byte.into(), 1.into()], 1);
        s.again("more", first, 4);
        let back = s.reserve(16);
        s.call_for("read", READ, &[Value::Word(fds), back.into(), 16.into()], 5);
        call!(s, "close", CLOSE, Value::Word(fds));
        call!(s, "close", CLOSE, Value::Word(fds.at(4)));
        assert_eq!(run(&s).0.state, wire::state::DONE);
    }

    #[test]
    fn unknown_operations_are_refused() {
        let mut s = Script::new();
        s.push(99, "odd", 0, &[], expect::OK, 0);
        let (context, _) = run(&s);
        assert_eq!(context.state, wire::state::FAILED);
    }
}
