//! Rings of io_uring: kept at rest, waited for while they are busy, and refused by name.

use std::collections::BTreeMap;

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, difference, ensure, light_picture, run_torpor, state};

const REFUSED: i32 = 5;

/// What the victim does, and words of what is said.
const REFUSALS: &[(&str, &[&str])] = &[
    ("poll", &["fd 4 (anon_inode:[io_uring])", "1 request is in flight (POLL_ADD)", "try again"]),
    ("read", &["1 request is in flight (READ)", "kernel.io_uring_disabled"]),
    ("timeout", &["1 request is in flight (TIMEOUT)"]),
    ("worker", &["1 request is in flight (OPENAT)"]),
    ("deferred", &["2 requests are in flight (TIMEOUT, 1 more)"]),
    ("hidden", &["2 requests are in flight (POLL_ADD, TIMEOUT)"]),
    ("skipped", &["has taken 1 requests and given 0 completions", "new ring"]),
    ("sqpoll", &["was set up with IORING_SETUP_SQPOLL"]),
    ("iopoll", &["was set up with IORING_SETUP_IOPOLL"]),
    ("personality", &["it has personalities"]),
    ("provided", &["it has provided buffers"]),
    ("restricted", &["it has restrictions"]),
    ("file", &["its registered file 0", "keep it open"]),
    ("eventfd", &["its registered eventfd", "keep it open"]),
    ("unmapped", &["no process that may use it has its queues mapped"]),
];

pub(crate) fn trials() -> Vec<Trial> {
    let kept = |name: &'static str, args: &'static [&'static str]| {
        Trial::test(format!("io_uring: {name}"), move || Ok(kept(args)?))
    };
    let mut all = vec![
        kept("positions, completions not taken, requests not submitted", &["plain"]),
        kept("positions far from the beginning", &["plain", "3000000"]),
        kept("registered buffers, files, eventfd and index", &["registered"]),
        kept("rings of one thread", &["threads"]),
        kept("a ring of two processes", &["shared"]),
        kept("rings of parent and child", &["family"]),
        kept("requests that are soon over", &["passing"]),
        Trial::test("io_uring: a dump leaves a ring as it was", || Ok(unharmed()?)),
        Trial::test("io_uring: dumps that are killed", || Ok(killed()?)),
    ];
    all.extend(REFUSALS.iter().map(|&(what, words)| {
        Trial::test(format!("io_uring: refused: {what}"), move || Ok(refused(what, words)?))
    }));
    all
}

/// A victim, unless this machine cannot keep rings at all: then why.
pub(crate) fn victim(name: &str, args: &[&str]) -> Outcome<Option<Victim>> {
    let victim = Victim::start(name, args)?;
    let log = std::fs::read_to_string(victim.log()).unwrap_or_default();
    if let Some(line) = log.lines().find(|l| l.starts_with("SKIP")) {
        eprintln!("skipped: {line}");
        return Ok(None);
    }
    if let Err(e) = torpor_kernel::io_uring::look::Look::open() {
        eprintln!("skipped: the kernel does not tell of rings: {e}");
        return Ok(None);
    }
    Ok(Some(victim))
}

fn kept(args: &[&str]) -> Outcome {
    let Some(mut victim) = victim("io_uring", args)? else { return Ok(()) };
    victim.ticks(5)?;
    victim.cycles(10)
}

/// What must stay, but for workers, which come and go, and files of /proc that the victim opens for a moment.
fn picture(pid: i32) -> BTreeMap<String, Vec<String>> {
    let mut all = light_picture(pid);
    all.retain(|key, _| !key.starts_with("task/"));
    for lines in all.values_mut() {
        lines.retain(|l| !l.contains("/proc/") && !l.contains("os error") && !l.starts_with("Threads"));
    }
    all
}

/// Dumps from which it runs on change nothing of it.
fn unharmed() -> Outcome {
    for mode in ["plain", "registered", "threads", "shared"] {
        let Some(mut victim) = victim("io_uring", &[mode])? else { return Ok(()) };
        let before = picture(victim.pid);
        for _ in 0..5 {
            victim.dump_with(&["--leave-running"])?;
            victim.ticks(3)?;
        }
        if let Some(difference) = difference(&before, &picture(victim.pid)) {
            return Err(format!("{mode} changed:\n{difference}"));
        }
    }
    Ok(())
}

/// Dumps that are killed at any moment leave rings as they were.
fn killed() -> Outcome {
    for mode in ["plain", "threads"] {
        let Some(mut victim) = victim("io_uring", &[mode])? else { return Ok(()) };
        for round in 0..25u64 {
            let image = victim.image();
            let mut command =
                torpor_tests::torpor_command(&["dump", "--leave-running", &victim.pid.to_string()]);
            let mut child = command
                .arg(&image)
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .map_err(|e| e.to_string())?;
            std::thread::sleep(std::time::Duration::from_millis(10 + round * 7));
            let _gone = child.kill();
            child.wait().map_err(|e| e.to_string())?;
            ensure!(state(victim.pid).is_some_and(|s| s != 'T' && s != 't'), "it stands still");
            victim.ticks(1)?;
        }
    }
    Ok(())
}

fn refused(what: &str, words: &[&str]) -> Outcome {
    let Some(mut victim) = victim("io_uring_busy", &[what])? else { return Ok(()) };
    let before = picture(victim.pid);
    let image = victim.image();
    let pid = victim.pid.to_string();
    for _ in 0..2 {
        let text = run_torpor(&["dump", &pid, image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
        for word in words {
            ensure!(text.contains(word), "it does not say `{word}`: {text}");
        }
        ensure!(!image.exists(), "it left {}", image.display());
        victim.ticks(3)?;
    }
    match difference(&before, &picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(()),
    }
}
