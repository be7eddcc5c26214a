//! Trees: every process, what they share, and how they are related.

use libtest_mimic::Trial;
use torpor_image::Image;
use torpor_tests::{Holder, Outcome, Victim, ensure, members, run_torpor};

/// Victims that need no more than two rounds of dump and restore: name, what it is about.
const PLAIN: &[(&str, &str)] = &[
    ("tree", "parents, sessions, groups, orphans and zombies"),
    ("stops", "children stopped by job control"),
    ("leader", "a first thread that has ended"),
    ("sharing", "memory, descriptors, directories and actions shared by processes"),
    ("cow", "memory shared copy-on-write"),
    ("shared", "memory shared on purpose, and locks in it"),
    ("handed", "open files, pipes, epoll sets and locks of several processes"),
    ("common", "pidfds and files of /proc that several have"),
    ("forker", "a tree that never holds still"),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(victim, about) in PLAIN {
        trials
            .push(Trial::test(format!("tree: {about}"), move || Ok(Victim::start(victim, &[])?.cycles(4)?)));
        trials.push(Trial::test(format!("tree left running: {about}"), move || Ok(left_running(victim)?)));
    }
    trials.extend([
        Trial::test("tree: shared pages are stored once and shared again", || Ok(once()?)),
        Trial::test("tree: a thread that waits for a vfork child is refused by name", || Ok(vfork()?)),
        Trial::test("tree: a taken pid below the root leaves nothing behind", || Ok(taken()?)),
        Trial::test("tree: pidfds and files of /proc in flight in a stream", || {
            Ok(Victim::start("common", &["stream"])?.cycles(4)?)
        }),
        Trial::test("tree: show and check tell of it", || Ok(tools()?)),
    ]);
    trials
}

fn left_running(name: &str) -> Outcome {
    let mut victim = Victim::start(name, &[])?;
    let mut last = None;
    for round in 1..=4 {
        last = Some(victim.dump_with(&["--leave-running"]).map_err(|e| format!("round {round}: {e}"))?);
        victim.ticks(2).map_err(|e| format!("after dump {round}: {e}"))?;
    }
    let image = last.ok_or("no image")?;
    run_torpor(&["verify", image.to_str().ok_or("a path")?])?.expect(0).map(drop)
}

/// KiB of a process in memory, and how much of it others have, too.
fn shared_kib(pid: i32) -> Outcome<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(|e| e.to_string())?;
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0)
    };
    Ok((field("Rss:"), field("Shared_Dirty:") + field("Shared_Clean:")))
}

fn once() -> Outcome {
    let mut victim = Victim::start("cow", &[])?;
    let image = victim.dump()?;
    let stored: u64 =
        Image::open(&image).map_err(|e| e.to_string())?.manifest.files.iter().map(|f| f.size).sum();
    // 32 MiB, and a hundredth of it for each of four.
    ensure!(stored < 38 << 20, "the image of five processes that share 32 MiB has {} KiB", stored >> 10);
    victim.restore(&image)?;
    victim.ticks(2)?;
    for pid in members(victim.pid) {
        let (all, shared) = shared_kib(pid)?;
        ensure!(shared > 25 << 10, "pid {pid} has {all} KiB, of which it shares {shared}");
    }
    Ok(())
}

fn vfork() -> Outcome {
    let victim = Victim::start("vforker", &[])?;
    let dir = victim.dir.path().join("image");
    let dir = dir.to_str().ok_or("a path")?;
    let text = run_torpor(&["dump", &victim.pid.to_string(), dir])?.expect(5)?;
    ensure!(text.contains("vfork(2)") && text.contains("try again"), "it says: {text}");
    victim.ticks(2)
}

fn taken() -> Outcome {
    let mut victim = Victim::start("tree", &[])?;
    let image = victim.dump()?;
    let pids: Vec<i32> =
        Image::open(&image).map_err(|e| e.to_string())?.manifest.tasks.iter().map(|p| p.0).collect();
    let last = *pids.last().ok_or("no process")?;
    let holder = Holder::of(last)?;
    let path = image.to_str().ok_or("a path")?;
    let said = run_torpor(&["restore", "--detach", path])?;
    let left: Vec<i32> = pids
        .iter()
        .copied()
        .filter(|pid| *pid != last && torpor_tests::state(*pid).is_some_and(|s| s != 'Z'))
        .collect();
    drop(holder);
    // What was made for the restore has become a child of ours, stand-ins for leaders too.
    let opened = Image::open(&image).map_err(|e| e.to_string())?;
    let ids = opened.tasks.iter().flat_map(|t| [t.pid, t.sid, t.pgid]);
    let zombies = opened.manifest.zombies.iter().map(|z| z.pid);
    for pid in &ids.chain(zombies).map(|p| p.0).collect::<std::collections::BTreeSet<_>>() {
        for _ in 0..1000 {
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(*pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
            if torpor_tests::state(*pid).is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    ensure!(
        said.code() != 0 && said.text.contains(&format!("pid {last} is taken")),
        "it says: {}",
        said.text
    );
    ensure!(left.is_empty(), "still there after a restore that failed: {left:?}");
    victim.restore(&image)?;
    victim.ticks(2)
}

fn tools() -> Outcome {
    let mut victim = Victim::start("handed", &[])?;
    let text = run_torpor(&["check", &victim.pid.to_string()])?.expect(0)?;
    ensure!(text.contains("PROCESS") && text.contains("shared descriptors"), "check says: {text}");
    let image = victim.dump()?;
    let path = image.to_str().ok_or("a path")?;
    let text = run_torpor(&["show", path])?.expect(0)?;
    ensure!(text.contains("tree") && text.contains("shared with"), "show says: {text}");
    victim.restore(&image)?;
    victim.ticks(2)
}
