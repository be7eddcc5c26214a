//! `--freeze fork`: memory of one instant, and nothing that anybody sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_image::Image;
use torpor_image::manifest::Freeze;
use torpor_tests::{Outcome, PATIENCE, Victim, ensure, members, run_torpor, state, torpor_command};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("freeze fork: memory is of one instant, and no child is seen", || Ok(instant()?)),
        Trial::test("freeze fork: pages that a tree shares copy-on-write", || Ok(tree("cow")?)),
        Trial::test("freeze fork: a tree that never holds still", || Ok(tree("forker")?)),
        Trial::test("freeze fork: pipes end with those who hold them", || Ok(pipes()?)),
        Trial::test("freeze fork: the copy has nothing of its process but memory", || Ok(copy()?)),
        Trial::test("freeze fork: a dump that is killed takes the copy along", || Ok(killed()?)),
        Trial::test("freeze fork: a copy that is ended is made up for", || Ok(lost()?)),
        Trial::test("freeze fork: who would find the copies is copied", || Ok(subreaper()?)),
        Trial::test("freeze: the way is chosen by what there is", || Ok(chosen()?)),
    ]
}

fn freeze_of(image: &Path) -> Outcome<(Freeze, Option<String>)> {
    let manifest = Image::open(image).map_err(|e| e.to_string())?.manifest;
    Ok((manifest.freeze, manifest.fallback))
}

/// Its log grows after the dump.
const LOG: [&str; 2] = ["--truncate-files", "**/log"];
const RUNNING: [&str; 5] = ["--leave-running", "--freeze", "fork", LOG[0], LOG[1]];

/// Dumps, again and again: one whose children come and go may be refused for a moment.
fn patiently(victim: &mut Victim, options: &[&str]) -> Outcome<PathBuf> {
    for _ in 0..50 {
        match victim.dump_with(options) {
            Err(e) if e.contains("not part of the dump") => {}
            done => return done,
        }
    }
    Err("refused each time".into())
}

/// Dumps it over and over while it works, and wakes it up from the last image.
fn rounds(mut victim: Victim, rounds: usize) -> Outcome {
    let mut last = None;
    for round in 1..=rounds {
        let image = victim.dump_with(&RUNNING).map_err(|e| format!("round {round}: {e}"))?;
        victim.ticks(2).map_err(|e| format!("after dump {round}: {e}"))?;
        ensure!(freeze_of(&image)? == (Freeze::Fork, None), "round {round}: {:?}", freeze_of(&image)?);
        last = Some(image);
    }
    let image = last.ok_or("no image")?;
    run_torpor(&["verify", image.to_str().ok_or("a path")?])?.expect(0)?;
    victim.kill();
    victim.restore(&image)?;
    victim.ticks(5)
}

fn instant() -> Outcome {
    rounds(Victim::start("snapshot", &[])?, 5)?;
    // Also where it ends with the dump.
    let mut victim = Victim::start("snapshot", &[])?;
    let image = victim.dump_with(&["--freeze", "fork"])?;
    victim.reap_all(&image)?;
    victim.restore(&image)?;
    victim.ticks(5)
}

fn tree(name: &str) -> Outcome {
    let mut victim = Victim::start(name, &[])?;
    for _ in 0..3 {
        victim.dump_with(&RUNNING)?;
        victim.ticks(2)?;
    }
    let image = victim.dump_with(&["--freeze", "fork"])?;
    // One of them collects orphans.
    let way = if name == "forker" { Freeze::Copy } else { Freeze::Fork };
    ensure!(freeze_of(&image)?.0 == way, "{:?}", freeze_of(&image)?);
    victim.reap_all(&image)?;
    let stored: u64 =
        Image::open(&image).map_err(|e| e.to_string())?.manifest.files.iter().map(|f| f.size).sum();
    ensure!(name != "cow" || stored < 38 << 20, "five processes that share 32 MiB have {} KiB", stored >> 10);
    victim.restore(&image)?;
    victim.ticks(5)
}

fn pipes() -> Outcome {
    let mut victim = Victim::start("eof", &[])?;
    for _ in 0..6 {
        let image = patiently(&mut victim, &RUNNING)?;
        ensure!(freeze_of(&image)?.0 == Freeze::Fork, "{:?}", freeze_of(&image)?);
        fs::remove_dir_all(image).map_err(|e| e.to_string())?;
    }
    victim.ticks(5)
}

/// Processes of this name.
fn named(name: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    })
    .collect()
}

/// Starts a dump and waits until the copy of this victim is being read, the dump having been stopped.
fn caught(victim: &mut Victim) -> Outcome<(Child, i32)> {
    for _ in 0..50 {
        if let Some(caught) = catch(victim)? {
            return Ok(caught);
        }
    }
    Err("none is caught".into())
}

fn catch(victim: &mut Victim) -> Outcome<Option<(Child, i32)>> {
    let image = victim.image();
    let mut command = torpor_command(&["dump", "--leave-running", "--freeze", "fork"]);
    command.arg(victim.pid.to_string()).arg(image);
    let mut dump = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let deadline = Instant::now() + PATIENCE;
    let tracer = format!("TracerPid:\t{}\n", dump.id());
    loop {
        let status = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let copy = named("torpor-snapshot").into_iter().find(|pid| status(pid).contains(&tracer));
        // Looked at afterwards: then it goes on already.
        let free = status(&victim.pid).contains("TracerPid:\t0\n");
        if let (true, Some(copy)) = (free, copy) {
            // SAFETY: kill takes numbers; the dump is our child.
            unsafe { libc::kill(dump.id() as i32, libc::SIGSTOP) };
            if state(copy).is_some_and(|s| s == 't') {
                return Ok(Some((dump, copy)));
            }
        }
        if dump.try_wait().map_err(|e| e.to_string())?.is_some() {
            return Ok(None);
        }
        ensure!(Instant::now() < deadline, "no copy is seen");
    }
}

/// Victims with so much memory that a dump can be caught in the middle.
fn large() -> Outcome<Victim> {
    Victim::start("eof", &[])
}

fn gone(pid: i32) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        // SAFETY: no status is asked for; orphans are ours.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
        if state(pid).is_none_or(|s| s == 'Z') {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the copy {pid} is still there: {:?}", state(pid));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn copy() -> Outcome {
    let mut victim = large()?;
    let (mut dump, copy) = caught(&mut victim)?;
    let look = || {
        let fds = fs::read_dir(format!("/proc/{copy}/fd")).map_err(|e| e.to_string())?.count();
        ensure!(fds == 0, "the copy holds {fds} descriptors");
        ensure!(!members(victim.pid).contains(&copy), "the copy is below its process");
        // SAFETY: getsid takes a number.
        let (own, its) = unsafe { (libc::getsid(victim.pid), libc::getsid(copy)) };
        ensure!(own != its, "the copy is in session {its} of its process");
        let score = fs::read_to_string(format!("/proc/{copy}/oom_score_adj")).map_err(|e| e.to_string())?;
        ensure!(score.trim_end() == "1000", "its oom_score_adj is {score}");
        let maps = fs::read_to_string(format!("/proc/{copy}/maps")).map_err(|e| e.to_string())?;
        let shared: Vec<&str> =
            maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|p| p.ends_with('s'))).collect();
        ensure!(shared.is_empty(), "the copy maps {shared:?}");
        Ok(())
    };
    let looked = look();
    // What is asked of the process while its copy is there.
    let ticks = victim.ticks(4);
    // SAFETY: kill takes numbers; the dump is our child.
    unsafe { libc::kill(dump.id() as i32, libc::SIGCONT) };
    let status = torpor_tests::ended(&mut dump)?;
    looked?;
    ticks?;
    ensure!(status.success(), "the dump ends with {status}");
    gone(copy)
}

fn killed() -> Outcome {
    let mut victim = large()?;
    for _ in 0..5 {
        let (mut dump, copy) = caught(&mut victim)?;
        dump.kill().map_err(|e| e.to_string())?;
        dump.wait().map_err(|e| e.to_string())?;
        gone(copy)?;
        victim.ticks(2)?;
    }
    Ok(())
}

fn lost() -> Outcome {
    let mut victim = large()?;
    let (mut dump, copy) = caught(&mut victim)?;
    for entry in fs::read_dir(victim.dir.path()).map_err(|e| e.to_string())?.flatten() {
        if entry.path().join("manifest.tpr").exists() {
            fs::remove_dir_all(entry.path()).map_err(|e| e.to_string())?;
        }
    }
    // SAFETY: kill takes numbers.
    unsafe {
        libc::kill(copy, libc::SIGKILL);
        libc::kill(dump.id() as i32, libc::SIGCONT);
    }
    let status = torpor_tests::ended(&mut dump)?;
    ensure!(status.success(), "the dump ends with {status}");
    gone(copy)?;
    let mut images = fs::read_dir(victim.dir.path()).map_err(|e| e.to_string())?.flatten();
    let image = images.find(|e| e.path().join("manifest.tpr").exists()).ok_or("no image")?.path();
    let (freeze, why) = freeze_of(&image)?;
    ensure!(freeze == Freeze::Copy && why.as_ref().is_some_and(|w| w.contains("ended")), "{freeze} {why:?}");
    run_torpor(&["verify", image.to_str().ok_or("a path")?])?.expect(0)?;
    victim.ticks(2)
}

fn subreaper() -> Outcome {
    let mut victim = Victim::start("snapshot", &["subreaper"])?;
    let image = victim.dump_with(&RUNNING)?;
    let (freeze, why) = freeze_of(&image)?;
    let named = why.as_ref().is_some_and(|why| why.contains("PR_SET_CHILD_SUBREAPER"));
    ensure!(freeze == Freeze::Copy && named, "{freeze}: {why:?}");
    let shown = run_torpor(&["show", image.to_str().ok_or("a path")?])?.expect(0)?;
    ensure!(shown.contains("freeze") && shown.contains("PR_SET_CHILD_SUBREAPER"), "show says: {shown}");
    victim.ticks(3)
}

fn chosen() -> Outcome {
    let mut small = Victim::start("snapshot", &[])?;
    let image = small.dump_with(&["--leave-running"])?;
    ensure!(freeze_of(&image)? == (Freeze::Copy, None), "{:?}", freeze_of(&image)?);
    let mut large = large()?;
    let image = patiently(&mut large, &["--leave-running"])?;
    ensure!(freeze_of(&image)? == (Freeze::Fork, None), "{:?}", freeze_of(&image)?);
    let image = patiently(&mut large, &["--leave-running", "--freeze", "copy"])?;
    ensure!(freeze_of(&image)? == (Freeze::Copy, None), "{:?}", freeze_of(&image)?);
    large.ticks(2)
}
