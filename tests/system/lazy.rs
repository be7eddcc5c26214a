//! Trees that run before their memory is there, and what becomes of them when it does not come.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_tests::{Outcome, PATIENCE, Victim, ended, ensure, run_torpor, state, torpor_command};

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("lazy: ", $name), || Ok($test?))),*] };
    }
    all![
        "memory that is thrown away, moved, forked and unmapped while it comes" => cycles("lazy", &["128"], &[]),
        "the same where nothing comes unasked" => recorded(),
        "memory of every kind" => cycles("memory", &[], &[]),
        "a bit of everything" => cycles("kitchen", &[], &[]),
        "pages shared copy-on-write" => cycles("cow", &[], &[]),
        "huge pages" => cycles("huge", &[], &[]),
        "restartable sequences" => cycles("rseq", &[], &[]),
        "a thousand threads" => cycles("crowd", &["1000", "sleep"], &[]),
        "a tree whose server is killed is ended, and sees no wrong byte" => server_killed(20),
        "a tree whose image is cut off is ended, and sees no wrong byte" => cut_off(),
        "a tree that is still filled is not dumped" => not_dumped(),
        "areas that were one become one again" => mended(),
    ]
}

/// Waits until nobody but us is its parent: all its memory is there.
fn filled(victim: &Victim) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    let us = std::process::id().cast_signed();
    loop {
        let parent = torpor_kernel::stat::of_process(torpor_kernel::Pid(victim.pid)).map(|s| s.ppid);
        if parent.is_ok_and(|p| p == us) {
            return Ok(());
        }
        if state(victim.pid).is_none() {
            victim.count()?;
            return Err("the victim is gone".into());
        }
        ensure!(Instant::now() < deadline, "its memory does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn no_trace(pid: i32) -> Outcome {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).map_err(|e| e.to_string())?;
    let watched = |l: &&str| l.starts_with("VmFlags:") && (l.contains(" um") || l.contains(" uw"));
    ensure!(smaps.lines().find(watched).is_none(), "areas are still watched");
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| e.to_string())?.flatten() {
        let target = fs::read_link(fd.path()).unwrap_or_default();
        ensure!(!target.to_string_lossy().contains("userfaultfd"), "{target:?} is still open");
    }
    Ok(())
}

fn cycles(name: &str, args: &[&str], options: &[&str]) -> Outcome {
    let mut victim = Victim::start(name, args)?;
    for round in 1..=3 {
        let at = |e: String| format!("round {round}: {e}");
        let image = dump(&mut victim, &[]).map_err(at)?;
        victim.restore_with(&[&["--lazy"], options].concat(), &image).map_err(at)?;
        victim.ticks(2).map_err(at)?;
        filled(&victim).map_err(at)?;
        no_trace(victim.pid).map_err(at)?;
        victim.ticks(2).map_err(at)?;
    }
    Ok(())
}

/// Dumps it; children that it makes may just be on their way.
fn dump(victim: &mut Victim, options: &[&str]) -> Outcome<PathBuf> {
    let image = victim.dump_with(options)?;
    victim.reap_all(&image)?;
    Ok(image)
}

/// All memory comes by faults, and what they were is used.
fn recorded() -> Outcome {
    let mut victim = Victim::start("lazy", &["64"])?;
    let list = victim.dir.path().join("working-set");
    let list = list.to_str().ok_or("a path")?;
    for round in 1..=20 {
        let image = dump(&mut victim, &[])?;
        victim.restore_with(&["--lazy", "--record", list], &image)?;
        victim.ticks(2)?;
        filled(&victim)?;
        let text = fs::read_to_string(list).map_err(|e| format!("{list}: {e}"))?;
        victim.ticks(2)?;
        // What a child shares with it cannot wait, and it makes one now and then.
        let image = torpor_image::Image::open(&image).map_err(|e| e.to_string())?;
        if image.manifest.tasks.len() == 1 {
            ensure!(text.lines().count() > 10, "little was needed: {text}");
            break;
        }
        ensure!(round < 20, "it always has a child");
        fs::remove_file(list).map_err(|e| e.to_string())?;
    }
    let image = dump(&mut victim, &[])?;
    victim.restore_with(&["--lazy", "--working-set", list], &image)?;
    victim.ticks(2)?;
    filled(&victim)?;
    no_trace(victim.pid)?;
    fs::write(list, "something else\n").map_err(|e| e.to_string())?;
    let image = dump(&mut victim, &[])?;
    let image = image.to_str().ok_or("a path")?;
    run_torpor(&["restore", "--detach", "--lazy", "--working-set", list, image])?.expect(2)?;
    Ok(())
}

/// A victim that is dumped once and restored again and again. It has no child just then: what both see does not wait.
fn dumped() -> Outcome<(Victim, PathBuf)> {
    for _ in 0..20 {
        let mut victim = Victim::start("lazy", &["256"])?;
        let log = victim.log();
        let image = dump(&mut victim, &["--truncate-files", log.to_str().ok_or("a path")?])?;
        let tasks = fs::read_dir(&image).map_err(|e| e.to_string())?.flatten();
        if tasks.filter(|f| f.file_name().to_string_lossy().starts_with("task-")).count() == 1 {
            return Ok((victim, image));
        }
    }
    Err("it always has a child".into())
}

/// Collects those of the victim's group that have become our children.
fn collect(victim: &Victim) {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-victim.pid, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

fn guards() -> usize {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|p| p.file_name().to_str()?.parse().ok());
    let named =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "lazy-guard\n");
    pids.filter(named).filter(|pid| state(*pid).is_some_and(|s| s != 'Z')).count()
}

/// Restores it, and gives who serves it.
fn restore(victim: &Victim, image: &Path, options: &[&str]) -> Outcome<i32> {
    let image = image.to_str().ok_or("a path")?;
    let args = [&["restore", "--json", "--detach", "--lazy"], options, &[image]].concat();
    let deadline = Instant::now() + PATIENCE;
    loop {
        collect(victim);
        let said = run_torpor(&args)?;
        // Children that it had are ended after it.
        if said.code() == 8 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        let text = said.expect(0)?;
        let at = text.find("\"server\":").ok_or("no server")? + 9;
        let digits: String = text[at..].trim_start().chars().take_while(char::is_ascii_digit).collect();
        return digits.parse().map_err(|e| format!("{text}: {e}"));
    }
}

pub(crate) fn server_killed(rounds: u32) -> Outcome {
    let (mut victim, image) = dumped()?;
    let mut ended = 0;
    for round in 0..rounds {
        // Every other time nothing comes unasked, so that the server is at work for longer.
        let list = victim.dir.path().join(format!("working-set-{round}"));
        let list = ["--stopped", "--record", list.to_str().ok_or("a path")?];
        let server = restore(&victim, &image, if round % 2 == 0 { &list } else { &[] })?;
        victim.restored();
        // Of those some have not run at all: a fast machine may have asked for everything by then.
        if round % 4 == 2 {
            // SAFETY: kill takes numbers only; the group is the victim's own.
            unsafe { libc::kill(-victim.pid, libc::SIGCONT) };
        }
        std::thread::sleep(Duration::from_micros(u64::from(round) * 7919 % 100_000));
        // SAFETY: takes numbers; nobody else reaps what will be our child, nor the victim.
        unsafe {
            libc::kill(server, libc::SIGKILL);
            libc::kill(-victim.pid, libc::SIGCONT);
        }
        let deadline = Instant::now() + PATIENCE;
        let begin = Instant::now();
        loop {
            collect(&victim);
            victim.count()?;
            if state(victim.pid).is_none_or(|s| s == 'Z') {
                ended += 1;
                break;
            }
            // All was there by then.
            if guards() == 0 && begin.elapsed() > Duration::from_millis(300) {
                victim.ticks(2)?;
                no_trace(victim.pid)?;
                victim.kill();
                break;
            }
            ensure!(Instant::now() < deadline, "the tree neither ends nor goes on");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    ensure!(ended > 0, "no server was killed while it served");
    Ok(())
}

/// The data file loses its end while the tree runs.
fn cut_off() -> Outcome {
    let (mut victim, image) = dumped()?;
    let data = image.join("pages-1.dat");
    let data = if data.exists() { data } else { biggest(&image)? };
    let file = fs::File::options().write(true).open(&data).map_err(|e| format!("{data:?}: {e}"))?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    // Nothing comes unasked, and nothing is asked for until it goes on: what is cut off is still needed.
    let list = victim.dir.path().join("working-set");
    let (list, path) = (list.to_str().ok_or("a path")?, image.to_str().ok_or("a path")?);
    let args = ["restore", "--lazy", "--stopped", "--record", list, path];
    let said = fs::File::create(victim.dir.path().join("torpor-said")).map_err(|e| e.to_string())?;
    let before = victim.count()?;
    let mut child = torpor_command(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said)
        .spawn()
        .map_err(|e| e.to_string())?;
    let deadline = Instant::now() + PATIENCE;
    while state(victim.pid) != Some('T') {
        ensure!(Instant::now() < deadline, "it is not restored");
        std::thread::sleep(Duration::from_millis(1));
    }
    file.set_len(length / 8).map_err(|e| e.to_string())?;
    // SAFETY: kill takes numbers only; the group is the victim's own.
    unsafe { libc::kill(-victim.pid, libc::SIGCONT) };
    let status = ended(&mut child).map_err(|e| format!("{args:?} {e}"))?;
    let said = fs::read_to_string(victim.dir.path().join("torpor-said")).unwrap_or_default();
    ensure!(status.code() == Some(12), "{status} instead of exit code 12: {said}");
    ensure!(said.contains("cannot be read"), "it does not say why: {said}");
    ensure!(victim.count()? >= before, "the log is gone");
    ensure!(state(victim.pid).is_none_or(|s| s == 'Z'), "the victim is still there");
    collect(&victim);
    victim.kill();
    Ok(())
}

fn biggest(image: &Path) -> Outcome<PathBuf> {
    let all = fs::read_dir(image).map_err(|e| e.to_string())?.flatten();
    let sized = all.filter_map(|e| Some((e.metadata().ok()?.len(), e.path())));
    sized.max().map(|(_, path)| path).ok_or_else(|| "an empty image".to_owned())
}

fn mended() -> Outcome {
    let mut victim = Victim::start("mended", &["64"])?;
    let image = victim.dump()?;
    fs::write(victim.home().join("go"), "").map_err(|e| e.to_string())?;
    let list = victim.dir.path().join("working-set");
    // Nothing comes unasked for a while.
    restore(&victim, &image, &["--record", list.to_str().ok_or("a path")?])?;
    victim.restored();
    victim.ticks(3)?;
    filled(&victim)
}

fn not_dumped() -> Outcome {
    // On a slow machine the tree may have all of its memory before it is looked at, and be dumped.
    for _ in 0..10 {
        let (mut victim, image) = dumped()?;
        let list = victim.dir.path().join("working-set");
        restore(&victim, &image, &["--record", list.to_str().ok_or("a path")?])?;
        victim.restored();
        let (pid, another) = (victim.pid.to_string(), victim.image());
        let said = run_torpor(&["dump", pid.as_str(), another.to_str().ok_or("a path")?])?;
        if said.code() == 0 {
            continue;
        }
        let said = said.expect(5)?;
        ensure!(said.contains("still being restored lazily"), "{said}");
        victim.ticks(2)?;
        return filled(&victim);
    }
    Err("it was always filled before it was looked at".into())
}
