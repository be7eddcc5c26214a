//! Dumps that build on others: what was written in between is in them, whatever happens to torpor.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, ensure, run_torpor, torpor_command};

/// Exit codes (docs/exit-codes.md).
const DAMAGED: i32 = 6;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("track: a chain of five dumps", || Ok(chain(&["24", "100"])?)),
        Trial::test("track: only what was written is copied", || Ok(little()?)),
        Trial::test("track: the chain of a tree", || Ok(tree()?)),
        Trial::test("track: dumps that are killed forget nothing", || Ok(killed()?)),
        Trial::test("track: a dump without --track leaves the watch alone", || Ok(beside()?)),
        Trial::test("track: nothing is left of a watch that ends", || Ok(traceless()?)),
        Trial::test("track: parents that are missing or altered are named", || Ok(lost_parent()?)),
        Trial::test("track: memory that may be written to unseen is copied whole", || Ok(pinned()?)),
        Trial::test("track: pages that are given up are not what they were", || Ok(given_up()?)),
        Trial::test("track: an area that loses its watch forgets what it showed", || Ok(remapped()?)),
        Trial::test("track: a squashed image needs no other", || Ok(squashed()?)),
        Trial::test("track: dumps made every so often", || Ok(every()?)),
    ]
}

pub(crate) fn path(path: &Path) -> Outcome<&str> {
    Ok(path.to_str().ok_or("a path")?)
}

/// A dump that follows what is written, on top of another.
pub(crate) fn follow(victim: &mut Victim, parent: Option<&Path>) -> Outcome<PathBuf> {
    let mut options = vec!["--track"];
    if let Some(parent) = parent {
        options.extend(["--parent", path(parent)?]);
    }
    victim.dump_with(&options)
}

/// Writes in the image's own data files.
pub(crate) fn own_bytes(image: &Path) -> Outcome<u64> {
    let image = torpor_image::Image::open(image).map_err(|e| e.to_string())?;
    Ok(image.data_files().map(|(_, file)| file.size).sum())
}

pub(crate) fn restore(victim: &mut Victim, image: &Path) -> Outcome {
    // The victim has gone on writing its log.
    victim.restore_with(&["--accept-changed"], image)
}

fn chain(args: &[&str]) -> Outcome {
    let mut victim = Victim::start("written", args)?;
    let mut images: Vec<PathBuf> = Vec::new();
    for _ in 0..5 {
        images.push(follow(&mut victim, images.last().map(PathBuf::as_path))?);
        victim.ticks(3)?;
    }
    let parent = images[4].clone();
    images.push(victim.dump_with(&["--parent", path(&parent)?])?);
    victim.reap_all(&images[5])?;
    for image in &images {
        let said = run_torpor(&["verify", path(image)?])?;
        said.expect(0)?;
    }
    for image in [&images[5], &images[2], &images[5]] {
        restore(&mut victim, image)?;
        victim.ticks(8)?;
        victim.kill();
    }
    Ok(())
}

/// What a victim has that writes next to nothing is not copied again, however long it takes until it stands.
fn little() -> Outcome {
    let mut victim = Victim::start("large", &["16"])?;
    let first = follow(&mut victim, None)?;
    victim.ticks(3)?;
    let second = victim.dump_with(&["--parent", path(&first)?])?;
    victim.reap_all(&second)?;
    let (bytes, whole) = (own_bytes(&second)?, own_bytes(&first)?);
    ensure!(bytes * 8 < whole, "{bytes} bytes of {whole} were written again");
    restore(&mut victim, &second)?;
    victim.ticks(8)
}

fn tree() -> Outcome {
    let mut victim = Victim::start("cow", &[])?;
    let mut parent = follow(&mut victim, None)?;
    for _ in 0..3 {
        victim.ticks(2)?;
        parent = follow(&mut victim, Some(&parent))?;
    }
    victim.ticks(1)?;
    let last = victim.dump_with(&["--parent", path(&parent)?])?;
    victim.reap_all(&last)?;
    for _ in 0..2 {
        restore(&mut victim, &last)?;
        victim.ticks(4)?;
        victim.kill();
    }
    Ok(())
}

fn killed() -> Outcome {
    let mut victim = Victim::start("written", &["16", "60"])?;
    let mut parent = follow(&mut victim, None)?;
    let pid = victim.pid.to_string();
    for round in 0..12u64 {
        let image = victim.image();
        let mut dump = torpor_command(&["dump", "--track", "--parent", path(&parent)?, &pid, path(&image)?])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_millis(3 + round * 7 % 60));
        dump.kill().and_then(|()| dump.wait()).map_err(|e| e.to_string())?;
        victim.ticks(2).map_err(|e| format!("after kill {round}: {e}"))?;
        // On what was there before, or on one that was complete already.
        if image.join("manifest.tpr").exists() {
            parent = image;
        }
        parent = follow(&mut victim, Some(&parent))?;
        victim.ticks(1)?;
    }
    let last = victim.dump_with(&["--parent", path(&parent)?])?;
    victim.reap_all(&last)?;
    restore(&mut victim, &last)?;
    victim.ticks(8)
}

fn beside() -> Outcome {
    let mut victim = Victim::start("written", &["8", "40"])?;
    let first = follow(&mut victim, None)?;
    victim.ticks(2)?;
    let whole = victim.dump_with(&["--leave-running"])?;
    victim.ticks(2)?;
    let said = run_torpor(&["check", &victim.pid.to_string()])?;
    said.expect(0)?;
    let second = victim.image();
    let pid = victim.pid.to_string();
    let said = run_torpor(&["dump", "--parent", path(&first)?, &pid, path(&second)?])?;
    let said = said.expect(0)?;
    ensure!(!said.contains("everything counts as changed"), "the watch was lost: {said}");
    victim.reap_all(&second)?;
    for image in [&second, &whole] {
        restore(&mut victim, image)?;
        victim.ticks(8)?;
        victim.kill();
    }
    Ok(())
}

fn traceless() -> Outcome {
    let mut victim = Victim::start("written", &["8", "40"])?;
    let watched = |victim: &Victim| {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", victim.pid)).unwrap_or_default();
        smaps.lines().any(|l| l.starts_with("VmFlags:") && l.contains(" uw"))
    };
    let descriptors = |victim: &Victim| {
        let all = std::fs::read_dir(format!("/proc/{}/fd", victim.pid)).map_err(|e| e.to_string())?;
        Ok::<usize, String>(all.count())
    };
    let before = descriptors(&victim)?;
    let first = follow(&mut victim, None)?;
    // Soft-dirty bits are no flag of an area.
    ensure!(watched(&victim) || crate::soft_dirty::missing().is_none(), "nothing is watched");
    ensure!(descriptors(&victim)? == before, "it has another number of descriptors");
    victim.dump_with(&["--leave-running", "--parent", path(&first)?])?;
    ensure!(!watched(&victim), "something is still watched");
    ensure!(descriptors(&victim)? == before, "it has another number of descriptors");
    victim.ticks(4)
}

fn lost_parent() -> Outcome {
    let mut victim = Victim::start("written", &["8", "40"])?;
    let first = follow(&mut victim, None)?;
    victim.ticks(2)?;
    let second = victim.dump_with(&["--parent", path(&first)?])?;
    victim.reap_all(&second)?;
    let refused = |word: &str| -> Outcome {
        let said = run_torpor(&["restore", "--detach", path(&second)?])?.expect(DAMAGED)?;
        for word in [word, path(&first)?] {
            ensure!(said.contains(word), "it does not say `{word}`: {said}");
        }
        Ok(())
    };
    let aside = first.with_extension("aside");
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).map_err(|e| e.to_string());
    rename(&first, &aside)?;
    refused("no image")?;
    // Another image in its place.
    let mut other = Victim::start("ticker", &[])?;
    let another = other.dump()?;
    rename(&another, &first)?;
    refused("another image")?;
    std::fs::remove_dir_all(&first).map_err(|e| e.to_string())?;
    rename(&aside, &first)?;
    restore(&mut victim, &second)?;
    victim.ticks(4)
}

fn given_up() -> Outcome {
    asked("given_up", 3)
}

fn remapped() -> Outcome {
    asked("remapped", 6)
}

/// A victim does something when it is asked to, between two dumps each time.
fn asked(name: &str, times: usize) -> Outcome {
    let mut victim = Victim::start(name, &[])?;
    let mut image = follow(&mut victim, None)?;
    for _ in 0..times {
        // SAFETY: kill takes numbers; the process is a child of ours.
        unsafe { libc::kill(victim.pid, libc::SIGUSR1) };
        victim.ticks(3)?;
        image = follow(&mut victim, Some(&image))?;
    }
    victim.kill();
    std::fs::write(victim.home().join("look"), "").map_err(|e| e.to_string())?;
    restore(&mut victim, &image)?;
    victim.ticks(3)
}

fn squashed() -> Outcome {
    let mut victim = Victim::start("written", &["8", "40"])?;
    let first = follow(&mut victim, None)?;
    victim.ticks(2)?;
    let second = follow(&mut victim, Some(&first))?;
    victim.ticks(2)?;
    let third = victim.dump_with(&["--parent", path(&second)?])?;
    victim.reap_all(&third)?;
    let elsewhere = victim.image();
    run_torpor(&["squash", path(&third)?, path(&elsewhere)?])?.expect(0)?;
    run_torpor(&["squash", path(&second)?])?.expect(0)?;
    let left = std::fs::read_dir(second.parent().ok_or("a directory")?).map_err(|e| e.to_string())?;
    ensure!(
        left.flatten().all(|e| !e.file_name().to_string_lossy().starts_with('.')),
        "something is left of the old image"
    );
    // The third goes on building on the second, but needs the first as well.
    run_torpor(&["verify", path(&third)?])?.expect(0)?;
    std::fs::remove_dir_all(&first).map_err(|e| e.to_string())?;
    for image in [&second, &elsewhere] {
        run_torpor(&["verify", path(image)?])?.expect(0)?;
        restore(&mut victim, image)?;
        victim.ticks(6)?;
        victim.kill();
    }
    Ok(())
}

fn every() -> Outcome {
    let mut victim = Victim::start("written", &["16", "60"])?;
    let dir = victim.image();
    let pid = victim.pid.to_string();
    let mut dumps =
        torpor_command(&["dump", "--every", "150ms", "--keep", "3", "--quiet", &pid, path(&dir)?])
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
    let names = || {
        let all = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        let mut all: Vec<PathBuf> = all.map(|e| e.path()).collect();
        all.sort();
        all
    };
    let begin = std::time::Instant::now();
    while !names().last().is_some_and(|n| n.ends_with("000008")) {
        ensure!(begin.elapsed() < Duration::from_secs(60), "there are {:?} only", names());
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: a child of ours that was not collected yet.
    unsafe { libc::kill(dumps.id() as i32, libc::SIGINT) };
    torpor_tests::ended(&mut dumps)?;
    victim.ticks(4)?;
    victim.kill();
    let complete: Vec<PathBuf> = names().into_iter().filter(|n| n.join("manifest.tpr").exists()).collect();
    ensure!((2..=4).contains(&complete.len()), "{} images are kept", complete.len());
    for image in &complete {
        run_torpor(&["verify", path(image)?])?.expect(0)?;
        restore(&mut victim, image)?;
        victim.ticks(6)?;
        victim.kill();
    }
    Ok(())
}

/// Buffers that are registered with a ring: neither the image with the ring nor one that builds on it trusts what is known.
fn pinned() -> Outcome {
    let Some(mut victim) = crate::io_uring::victim("io_uring", &["registered"])? else { return Ok(()) };
    let first = follow(&mut victim, None)?;
    victim.ticks(2)?;
    let second = victim.dump_with(&["--parent", path(&first)?])?;
    victim.reap_all(&second)?;
    let image = torpor_image::Image::open(&second).map_err(|e| e.to_string())?;
    // Files and shared memory are compared.
    let records = image.tasks.iter().flat_map(|task| image.records(task.memory.pages));
    let borrows = |file| image.manifest.borrowed.iter().any(|b| b.number == file);
    let borrowed =
        records.filter(|r| r.place == torpor_image::extent::Where::Data && borrows(r.file)).count();
    ensure!(borrowed == 0, "{borrowed} records of its memory are the parent's");
    restore(&mut victim, &second)?;
    victim.ticks(4)
}
