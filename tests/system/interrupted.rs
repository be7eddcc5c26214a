//! Signals to torpor itself: what they call off leaves nothing behind, and is told.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, difference, ensure, light_picture, run_torpor, state, torpor_command};

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("interrupted: ", $name), || Ok($test()?))),*] };
    }
    all![
        "a dump that is called off says so" => dump,
        "a dump under nohup goes on" => nohup,
        "a restore that is called off leaves nothing" => restore,
        "a restore that is killed leaves no process" => killed,
    ]
}

/// Starts torpor with its errors in a file.
fn start(args: &[&str], said: &Path, ignored: Option<i32>) -> Outcome<Child> {
    let said = fs::File::create(said).map_err(|e| e.to_string())?;
    let mut command = torpor_command(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    if let Some(signal) = ignored {
        // SAFETY: signal is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::signal(signal, libc::SIG_IGN);
                Ok(())
            });
        }
    }
    command.spawn().map_err(|e| e.to_string())
}

/// Dumps a victim so that it can be restored again and again after having run: its log is cut back.
fn dump_for_good(victim: &mut Victim) -> Outcome<PathBuf> {
    let log = victim.log();
    let image = victim.dump_with(&["--truncate-files", log.to_str().ok_or("a path")?])?;
    victim.reap()?;
    Ok(image)
}

/// Delays until a signal that fall all over what takes as long as `undisturbed`, or somewhat more, and so often that one
/// of them hits on any machine.
fn delays(undisturbed: Duration) -> impl Iterator<Item = Duration> {
    (0..ROUNDS).map(move |n| undisturbed.mul_f64(f64::from(n * 7 % 31) / 24.0))
}

/// How often at least, and at most if nothing was called off, a signal is sent.
const ENOUGH: u32 = 40;
const ROUNDS: u32 = 400;

fn send(child: &Child, signal: i32) {
    // SAFETY: kill takes numbers only; the child was not waited for yet.
    unsafe { libc::kill(child.id() as i32, signal) };
}

fn dump() -> Outcome {
    let mut victim = Victim::start("kitchen", &[])?;
    let before = light_picture(victim.pid);
    let (pid, said) = (victim.pid.to_string(), victim.dir.path().join("torpor-said"));
    let begin = Instant::now();
    victim.dump_with(&["--leave-running"])?;
    let mut called_off = 0;
    for (round, delay) in (0..).zip(delays(begin.elapsed())) {
        if round >= ENOUGH && called_off > 0 {
            break;
        }
        let image = victim.image();
        let args = ["dump", "--leave-running", pid.as_str(), image.to_str().ok_or("a path")?];
        let mut child = start(&args, &said, None)?;
        std::thread::sleep(delay);
        send(&child, libc::SIGINT);
        let status = torpor_tests::ended(&mut child)?;
        let text = fs::read_to_string(&said).map_err(|e| e.to_string())?;
        match status.signal() {
            Some(libc::SIGINT) => {
                ensure!(!image.exists(), "round {round}: it left {}", image.display());
                called_off += usize::from(text.contains("was called off; the process goes on as before"));
            }
            _ => ensure!(status.success(), "round {round}: {status}: {text}"),
        }
        victim.ticks(1)?;
    }
    ensure!(called_off > 0, "it never says that it was called off");
    match difference(&before, &light_picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(()),
    }
}

fn nohup() -> Outcome {
    let mut victim = Victim::start("kitchen", &[])?;
    let (pid, said) = (victim.pid.to_string(), victim.dir.path().join("torpor-said"));
    for round in 0..20u64 {
        let image = victim.image();
        let args = ["dump", "--leave-running", pid.as_str(), image.to_str().ok_or("a path")?];
        let mut child = start(&args, &said, Some(libc::SIGHUP))?;
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(1 + round % 4));
            send(&child, libc::SIGHUP);
        }
        let status = torpor_tests::ended(&mut child)?;
        let text = fs::read_to_string(&said).map_err(|e| e.to_string())?;
        ensure!(status.success(), "round {round}: {status}: {text}");
    }
    victim.ticks(2)
}

/// What is in a directory, and below it.
fn names(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        all.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.extend(names(&entry.path()));
        }
    }
    all.sort();
    all
}

/// Files and sockets that are gone must be gone again, and no process be there, when the restore was called off.
fn restore() -> Outcome {
    let mut victim = Victim::start("unix", &[])?;
    let image = dump_for_good(&mut victim)?;
    let dir = image.to_str().ok_or("a path")?.to_owned();
    for file in names(&victim.home()) {
        let _directory = fs::remove_file(file);
    }
    let (before, said) = (names(&victim.home()), victim.dir.path().join("torpor-said"));
    let begin = Instant::now();
    victim.restore(&image)?;
    let undisturbed = begin.elapsed();
    victim.kill();
    for file in names(&victim.home()) {
        let _directory = fs::remove_file(file);
    }
    let mut called_off = 0;
    for (round, delay) in (0..).zip(delays(undisturbed)) {
        if round >= ENOUGH && called_off > 0 {
            break;
        }
        let mut child = start(&["restore", "--detach", &dir], &said, None)?;
        std::thread::sleep(delay);
        send(&child, [libc::SIGINT, libc::SIGTERM, libc::SIGHUP][round as usize % 3]);
        let status = torpor_tests::ended(&mut child)?;
        if status.success() {
            // It was too late.
            victim.restored();
            victim.kill();
            for file in names(&victim.home()) {
                let _directory = fs::remove_file(file);
            }
            continue;
        }
        let text = fs::read_to_string(&said).map_err(|e| e.to_string())?;
        ensure!(status.signal().is_some(), "round {round}: {status}: {text}");
        called_off += usize::from(text.contains("was called off; nothing of it is left"));
        ensure!(state(victim.pid).is_none(), "round {round}: a process is left");
        ensure!(names(&victim.home()) == before, "round {round}: it left {:?}", names(&victim.home()));
    }
    ensure!(called_off > 0, "it never says that it was called off");
    victim.restore(&image)?;
    victim.ticks(2)
}

/// Waits until none of these processes is there any more, at most two seconds.
fn are_gone(pids: &[i32]) -> bool {
    let gone = |pid: &i32| {
        // SAFETY: no status is asked for. Who was adopted is reaped.
        unsafe { libc::waitpid(*pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
        state(*pid).is_none()
    };
    (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        pids.iter().all(gone)
    })
}

/// Above all in the moment in which the process is born.
fn killed() -> Outcome {
    let mut victim = Victim::start("kin", &[])?;
    let image = dump_for_good(&mut victim)?;
    let dir = image.to_str().ok_or("a path")?;
    let pid = |name: String| name.rsplit_once("task-")?.1.strip_suffix(".tpr")?.parse::<i32>().ok();
    let pids: Vec<i32> = names(&image).into_iter().filter_map(pid).collect();
    ensure!(pids.len() > 2 && pids.contains(&victim.pid), "it is no tree: {pids:?}");
    for round in 0..150u64 {
        let said = victim.dir.path().join("torpor-said");
        let mut child = start(&["restore", "--detach", dir], &said, None)?;
        std::thread::sleep(Duration::from_micros(round * 131 % 6_500));
        send(&child, if round % 2 == 0 { libc::SIGKILL } else { libc::SIGQUIT });
        let status = torpor_tests::ended(&mut child)?;
        if status.success() {
            victim.restored();
            victim.kill();
            continue;
        }
        if !are_gone(&pids) {
            // All of them were let go already.
            victim.ticks(1).map_err(|e| format!("round {round}: not all processes are gone: {e}"))?;
            victim.restored();
            victim.kill();
        }
    }
    run_torpor(&["verify", dir])?.expect(0)?;
    victim.restore(&image)?;
    victim.ticks(2)
}
