//! What a process is must survive, kind by kind.

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, difference, ensure, picture, run, run_torpor, state};

/// Victims that need no more than two rounds of dump and restore: name, arguments, what it is about.
const PLAIN: &[(&str, &[&str], &str)] = &[
    ("ticker", &[], "a small process"),
    ("registers", &[], "general and vector registers of spinning threads"),
    ("threads", &[], "tls, names and scheduling of threads"),
    ("signals", &[], "signal masks, actions and pending signals"),
    ("altstack", &[], "a thread in a handler on its alternate stack"),
    ("rseq", &[], "restartable sequences"),
    ("futexes", &[], "robust mutexes and joins"),
    ("memory", &[], "memory of every kind"),
    ("huge", &[], "huge pages"),
    ("timers", &[], "itimers and POSIX timers"),
    ("credentials", &[], "credentials of a process that dropped privileges"),
    ("credentials", &["plain"], "credentials of root"),
    ("process", &[], "limits, directories, umask, personality"),
    ("process", &["chroot"], "a changed root directory"),
    ("files", &[], "files, directories and devices"),
    ("pipes", &[], "pipes and fifos"),
    ("events", &[], "eventfd, timerfd, signalfd and epoll"),
    ("inotify", &[], "inotify watches"),
    ("locks", &[], "flock and POSIX locks"),
    ("unix", &[], "unix sockets"),
    ("flight", &[], "what is on its way in unix sockets"),
    ("peers", &[], "who is at the other end of unix sockets"),
    ("kin", &[], "unix sockets between the processes of a tree"),
    ("tcp", &[], "listening tcp sockets"),
    ("connections", &[], "tcp connections within the process"),
    ("udp", &[], "udp sockets"),
    ("raw", &[], "raw, packet and ping sockets"),
    ("netlink", &[], "netlink sockets"),
    ("pidfd", &[], "pidfds"),
    ("pidfd", &["family"], "pidfds of a family"),
    ("kitchen", &[], "a bit of everything"),
    ("crowd", &["1000", "sleep"], "a thousand sleeping threads"),
    ("crowd", &["100", "spin"], "a hundred spinning threads"),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(victim, args, about) in PLAIN {
        trials.push(Trial::test(format!("state: {about}"), move || Ok(cycles(victim, args)?)));
        trials.push(Trial::test(format!("left running: {about}"), move || Ok(left_running(victim, args)?)));
    }
    trials.extend([
        Trial::test("state: interrupted system calls", || Ok(calls(0)?)),
        Trial::test("state: system calls interrupted again and again", || Ok(calls(10)?)),
        Trial::test("state: a process stopped by SIGSTOP stays stopped", || Ok(stopped()?)),
        Trial::test("dump --leave-stopped, restore --stopped", || Ok(leave_stopped()?)),
        Trial::test("left running: everything in /proc is as before", || Ok(still()?)),
        Trial::test("an image is restored twice, and not written to", || Ok(twice()?)),
        Trial::test("show, verify and check tell of a real process", || Ok(tools()?)),
        Trial::test(
            "an attached restore passes signals on and exits as its program does",
            || Ok(attached()?),
        ),
    ]);
    trials
}

fn cycles(name: &str, args: &[&str]) -> Outcome {
    let mut victim = Victim::start(name, args)?;
    if skipped(&victim) {
        return Ok(());
    }
    victim.cycles(6)
}

/// A victim that found no such thing here.
fn skipped(victim: &Victim) -> bool {
    std::fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("SKIP"))
}

fn left_running(name: &str, args: &[&str]) -> Outcome {
    let mut victim = Victim::start(name, args)?;
    let mut last = None;
    for round in 1..=5 {
        last = Some(victim.dump_with(&["--leave-running"]).map_err(|e| format!("round {round}: {e}"))?);
        victim.ticks(2).map_err(|e| format!("after dump {round}: {e}"))?;
    }
    // What it is by now is not what the image says; still the image must work.
    let image = last.ok_or("no image")?;
    run_torpor(&["verify", image.to_str().ok_or("a path")?])?.expect(0).map(drop)
}

fn calls(dumps_before: u32) -> Outcome {
    let mut victim = Victim::start("syscalls", &[])?;
    for n in 0..dumps_before {
        victim.dump_with(&["--leave-running"])?;
        victim.ticks(usize::from(n % 3 == 0)).map_err(|e| format!("after dump {n}: {e}"))?;
    }
    victim.cycles(4)?;
    let calls: Vec<_> =
        victim.interrupted().into_iter().filter(|c| c != "epoll_wait" && c != "sigtimedwait").collect();
    ensure!(
        calls.is_empty(),
        "these calls failed with EINTR, and nobody sent a signal: {}",
        calls.join(", ")
    );
    Ok(())
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes numbers; the process is a child of ours.
    unsafe { libc::kill(pid, signal) };
}

fn wait_for_state(pid: i32, wanted: char) -> Outcome {
    for _ in 0..500 {
        if state(pid) == Some(wanted) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Err(format!("state {:?} instead of {wanted}", state(pid)))
}

fn stopped() -> Outcome {
    let mut victim = Victim::start("threads", &[])?;
    signal(victim.pid, libc::SIGSTOP);
    wait_for_state(victim.pid, 'T')?;
    victim.dump_with(&["--leave-running"])?;
    wait_for_state(victim.pid, 'T')?;
    let count = victim.count()?;
    let image = victim.dump()?;
    victim.restore(&image)?;
    wait_for_state(victim.pid, 'T')?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    ensure!(victim.count()? == count, "it ran although it was stopped");
    signal(victim.pid, libc::SIGCONT);
    victim.ticks(5)
}

fn leave_stopped() -> Outcome {
    let mut victim = Victim::start("threads", &[])?;
    let image = victim.dump_with(&["--leave-stopped"])?;
    wait_for_state(victim.pid, 'T')?;
    signal(victim.pid, libc::SIGCONT);
    victim.ticks(3)?;
    victim.kill();
    // Its log grew since the dump.
    victim.restore_with(&["--stopped", "--accept-changed"], &image)?;
    wait_for_state(victim.pid, 'T')?;
    let count = victim.count()?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    ensure!(victim.count()? == count, "it ran although it was to be stopped");
    signal(victim.pid, libc::SIGCONT);
    victim.ticks(5)
}

fn still() -> Outcome {
    let mut victim = Victim::start("still", &[])?;
    let before = picture(victim.pid);
    for n in 1..=3 {
        victim.dump_with(&["--leave-running"])?;
        if let Some(difference) = difference(&before, &picture(victim.pid)) {
            return Err(format!("after dump {n}:\n{difference}"));
        }
    }
    // And the same of a restored one.
    let image = victim.dump()?;
    victim.restore(&image)?;
    let mut after = picture(victim.pid);
    let mut before = before;
    for all in [&mut before, &mut after] {
        // Numbers that only the kernel gives: inodes in links and fdinfo, sizes of tables.
        all.retain(|k, _| !k.starts_with("fdinfo/"));
        for line in all.get_mut("status").into_iter().flatten() {
            if line.starts_with("FDSize")
                || line.starts_with("PPid")
                || line.starts_with("VmData")
                || line.starts_with("VmStk")
            {
                line.clear();
            }
        }
        for name in ["fds", "maps", "smaps"] {
            for line in all.get_mut(name).into_iter().flatten() {
                *line = line.split('[').next().unwrap_or_default().to_owned();
                let fields: Vec<&str> = line.split_whitespace().collect();
                // Of anonymous shared memory, device and inode are new.
                if line.contains("/dev/zero (deleted)") && fields.len() > 5 {
                    *line = format!("{} {} {}", fields[0], fields[1], fields[2]);
                }
            }
        }
    }
    match difference(&before, &after) {
        Some(difference) => Err(format!("after the restore:\n{difference}")),
        None => Ok(()),
    }
}

fn twice() -> Outcome {
    let mut victim = Victim::start("kitchen", &[])?;
    let image = victim.dump()?;
    let list = |dir: &std::path::Path| -> Outcome<Vec<String>> {
        let said = run(std::process::Command::new("sh")
            .arg("-c")
            .arg("ls -ln --time-style=full-iso; cksum *")
            .current_dir(dir))?;
        Ok(said.text.lines().map(str::to_owned).collect())
    };
    let before = list(&image)?;
    for _ in 0..2 {
        // Its log grew since the dump.
        victim.restore_with(&["--accept-changed"], &image)?;
        victim.ticks(5)?;
        victim.kill();
    }
    ensure!(before == list(&image)?, "the image changed");
    Ok(())
}

fn tools() -> Outcome {
    let mut victim = Victim::start("kitchen", &[])?;
    let pid = victim.pid.to_string();
    run_torpor(&["check"])?.expect(0)?;
    run_torpor(&["check", &pid])?.expect(0)?;
    let json: serde_json::Value = serde_json::from_str(&run_torpor(&["check", "--json", &pid])?.expect(0)?)
        .map_err(|e| e.to_string())?;
    ensure!(json.is_object(), "check --json: {json}");
    let image = victim.dump()?;
    let image = image.to_str().ok_or("a path")?;
    run_torpor(&["verify", image])?.expect(0)?;
    let text = run_torpor(&["show", image])?.expect(0)?;
    for word in ["k-0", "k-5", "eventfd", "pipe", &pid] {
        ensure!(text.contains(word), "show does not tell of {word}:\n{text}");
    }
    let json: serde_json::Value = serde_json::from_str(&run_torpor(&["show", "--json", image])?.expect(0)?)
        .map_err(|e| e.to_string())?;
    ensure!(json["tasks"][0]["threads"].as_array().is_some_and(|t| t.len() == 7), "show --json: {json}");
    let plan = run_torpor(&["restore", "--plan", image])?.expect(0)?;
    ensure!(plan.contains("kitchen") || plan.contains(&pid), "the plan:\n{plan}");
    ensure!(state(victim.pid).is_none(), "a plan was carried out");
    Ok(())
}

fn attached() -> Outcome {
    use std::process::Stdio;
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump()?;
    let mut torpor = torpor_tests::torpor_command(&["restore", image.to_str().ok_or("a path")?])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let ticked = victim.ticks_from(victim.count()?, 5);
    signal(torpor.id() as i32, libc::SIGTERM);
    let status = torpor_tests::ended(&mut torpor)?;
    ticked?;
    ensure!(status.code() == Some(128 + libc::SIGTERM), "it exits with {status}");
    ensure!(state(victim.pid).is_none(), "the program is still there");
    Ok(())
}
