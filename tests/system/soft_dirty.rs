//! Dumps that follow writes by soft-dirty bits: on kernels that have nothing better (tests/vm/run).

use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use torpor_kernel::probe;
use torpor_tests::{Outcome, Victim, ensure, run_torpor};

use crate::track::{follow, own_bytes, path, restore};

/// What makes a trial.
type Body = fn() -> Outcome;

pub(crate) fn trials() -> Vec<Trial> {
    let all: [(&str, Body); 5] = [
        ("track: by soft-dirty bits only what was written is copied", small),
        ("track: soft-dirty bits that somebody else clears are not trusted", cleared),
        ("track: page tables that move show no soft-dirty bits", moved),
        ("track: another program has soft-dirty bits of its own", executed),
        ("track: without its keeper everything counts as changed", forgotten),
    ];
    all.into_iter()
        .map(|(name, trial)| {
            Trial::test(name, move || match missing() {
                Some(why) => {
                    eprintln!("skipped ({why})");
                    Ok(())
                }
                None => Ok(trial()?),
            })
        })
        .collect()
}

/// Whether writes are followed by soft-dirty bits here.
pub(crate) fn missing() -> Option<&'static str> {
    let has = |name| probe::one(name).is_some_and(probe::State::is_present);
    match (has("userfaultfd WP_ASYNC"), has("soft-dirty")) {
        (true, _) => Some("this kernel has asynchronous write protection, which is used instead"),
        (_, false) => Some("this kernel has no soft-dirty bits, or shows no page frames"),
        _ => None,
    }
}

/// By what writes were followed for an image.
fn followed(image: &Path) -> Outcome<Option<String>> {
    Ok(torpor_image::Image::open(image).map_err(|e| e.to_string())?.manifest.followed)
}

/// Dumps once more, for the last time, and checks that the image goes on right.
fn end(victim: &mut Victim, parent: &Path) -> Outcome<PathBuf> {
    let last = victim.dump_with(&["--parent", path(parent)?])?;
    victim.reap_all(&last)?;
    restore(victim, &last)?;
    victim.ticks(4)?;
    victim.kill();
    Ok(last)
}

fn small() -> Outcome {
    let mut victim = Victim::start("sparse", &["24"])?;
    let first = follow(&mut victim, None)?;
    ensure!(followed(&first)?.as_deref() == Some("soft-dirty"), "it is followed by {:?}", followed(&first)?);
    let shown = run_torpor(&["show", path(&first)?])?.expect(0)?;
    ensure!(shown.contains("track by soft-dirty"), "show does not say how it is followed: {shown}");
    victim.ticks(1)?;
    let second = follow(&mut victim, Some(&first))?;
    victim.ticks(1)?;
    let third = end(&mut victim, &second)?;
    let whole = own_bytes(&first)?;
    for image in [&second, &third] {
        let bytes = own_bytes(image)?;
        ensure!(bytes * 2 < whole, "{bytes} bytes of {whole} were written again");
    }
    restore(&mut victim, &second)?;
    victim.ticks(4)
}

fn cleared() -> Outcome {
    let mut victim = Victim::start("written", &["8", "10"])?;
    let first = follow(&mut victim, None)?;
    victim.ticks(2)?;
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid), "4").map_err(|e| e.to_string())?;
    let second = end(&mut victim, &first)?;
    let (bytes, whole) = (own_bytes(&second)?, own_bytes(&first)?);
    ensure!(bytes * 2 > whole, "{bytes} bytes of {whole} only were written again");
    Ok(())
}

fn moved() -> Outcome {
    let mut victim = Victim::start("tables", &[])?;
    let mut images = vec![follow(&mut victim, None)?];
    for _ in 0..4 {
        victim.ticks(1)?;
        images.push(follow(&mut victim, images.last().map(PathBuf::as_path))?);
    }
    images.push(end(&mut victim, &images[4])?);
    for image in &images[1..] {
        restore(&mut victim, image)?;
        victim.ticks(3)?;
        victim.kill();
    }
    Ok(())
}

/// The same addresses, as nothing is placed at random, and a guard that looks the same.
fn executed() -> Outcome {
    let mut victim = Victim::prepare()?;
    let program = torpor_tests::victim("ticker")?;
    let script = r#"log=$1; home=$2; program=$3; while [ ! -e "$home/go" ]; do sleep 0.01; echo tick >>"$log"; done; exec "$program" "$log" "$home""#;
    let mut command = std::process::Command::new("setarch");
    command.args(["-R", "bash", "-c", script, "bash"]);
    command.arg(victim.log()).arg(victim.home()).arg(&program);
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    victim.spawn(&mut command)?;
    victim.ticks(2)?;
    let first = follow(&mut victim, None)?;
    std::fs::write(victim.home().join("go"), "").map_err(|e| e.to_string())?;
    victim.ticks(20)?;
    let second = end(&mut victim, &first)?;
    ensure!(followed(&second)?.as_deref() == Some("soft-dirty"), "it is not followed");
    Ok(())
}

fn forgotten() -> Outcome {
    let mut victim = Victim::start("written", &["8", "10"])?;
    let first = follow(&mut victim, None)?;
    // A dump on its own takes no notice of the bits; one that follows begins anew.
    victim.dump_with(&["--leave-running"])?;
    let _another = follow(&mut victim, None)?;
    victim.ticks(1)?;
    let last = end(&mut victim, &first)?;
    let (bytes, whole) = (own_bytes(&last)?, own_bytes(&first)?);
    ensure!(bytes * 2 > whole, "{bytes} bytes of {whole} only were written again");
    Ok(())
}
