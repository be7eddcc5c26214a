//! The blob runs a script, in a child that is not traced.

use crate::mapped::{Mapped, wait};
use torpor_parasite::script::{Script, Value};
use torpor_parasite::wire::{Heal, heal, state};

#[test]
fn the_blob_is_small() {
    println!("the blob takes {} bytes", torpor_blob::BLOB.len());
    assert!((1..=4096).contains(&torpor_blob::BLOB.len()));
}

/// Runs `mapped` in a child and returns how that ended.
fn run(mapped: &Mapped) -> i32 {
    // SAFETY: the child makes one call and jumps into the blob, whose script is harmless.
    let child = unsafe {
        match libc::fork() {
            0 => {
                mapped.prepare(libc::getpid(), Heal { kind: heal::EXIT, ..Heal::default() });
                let entry: extern "C" fn(u64) -> ! = std::mem::transmute(mapped.entry() as usize);
                entry(mapped.context() as u64)
            }
            child => child,
        }
    };
    assert!(child > 0);
    wait(child)
}

#[test]
fn a_script_runs_and_an_untraced_thread_exits() {
    let mut script = Script::new();
    let pid = script.call("own pid", libc::SYS_getpid, &[]);
    let fds = script.reserve(8);
    script.call("a pipe", libc::SYS_pipe2, &[fds.into(), 0.into()]);
    let text = script.data(b"torpor");
    let back = script.reserve(6);
    script.call_for("write", libc::SYS_write, &[Value::Word(fds.at(4)), text.into(), 6.into()], 6);
    script.call_for("read", libc::SYS_read, &[Value::Word(fds), back.into(), 6.into()], 6);
    let copy = script.reserve(6);
    script.copy("copy", copy, back, 6);
    let mapped = Mapped::new(script);

    let status = run(&mapped);
    let (context, outcome) = mapped.outcome();
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1, "status {status:#x}");
    assert_eq!(context.state, state::DONE);
    assert_eq!(outcome.result(pid), i64::from(context.tgid));
    assert_eq!(outcome.bytes(copy), b"torpor");
}

#[test]
fn overlapping_copies_keep_the_source() {
    let mut script = Script::new();
    let up = script.data(b"0123456789");
    script.copy("upward", up.at(2), up, 8);
    let down = script.data(b"0123456789");
    script.copy("downward", down, down.at(2), 8);
    let mapped = Mapped::new(script);

    run(&mapped);
    let (_, outcome) = mapped.outcome();
    assert_eq!((outcome.bytes(up), outcome.bytes(down)), (&b"0101234567"[..], &b"2345678989"[..]));
}

#[test]
fn a_failed_operation_is_named() {
    let mut script = Script::new();
    let bad = script.call("no such descriptor", libc::SYS_close, &[(-1).into()]);
    let never = script.call("never", libc::SYS_getpid, &[]);
    let mapped = Mapped::new(script);

    run(&mapped);
    let (context, outcome) = mapped.outcome();
    assert_eq!((context.state, context.failed), (state::FAILED, 0));
    assert_eq!((outcome.result(bad), outcome.result(never)), (-i64::from(libc::EBADF), 0));
}
