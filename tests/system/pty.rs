//! Pseudo terminals with both ends in the process.
//!
//! Numbers of pseudo terminals are few and shared by all who use a devpts: another test may have taken the one that a
//! restore needs. So victims get a devpts of their own, where one can be mounted.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;
use torpor_tests::{
    Outcome, Victim, difference, ensure, light_picture, members, run, run_torpor, state, torpor_command,
};

const REFUSED: i32 = 5;
const CONFLICT: i32 = 8;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("state: pseudo terminals", || Ok(cycles()?)),
        Trial::test("state: pseudo terminals among those of others", || Ok(shared()?)),
        Trial::test("state: pseudo terminals with an end in flight", || Ok(in_flight()?)),
        Trial::test("left running: pseudo terminals", || Ok(left_running()?)),
        Trial::test("tree: a terminal multiplexer with a shell", || Ok(multiplexer(&[])?)),
        Trial::test("tree: a shell that has closed its terminal", || Ok(multiplexer(&["closed"])?)),
        Trial::test("fault: pseudo terminals that cannot be dumped", || Ok(refusals()?)),
        Trial::test("fault: a pseudo terminal whose number is taken", || Ok(taken()?)),
        Trial::test("fault: a pseudo terminal that only somebody else has open", || Ok(elsewhere()?)),
    ]
}

/// A devpts of its own; unmounted on drop.
struct Devpts {
    dir: tempfile::TempDir,
}

impl Devpts {
    fn mount() -> Outcome<Option<Self>> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let mut command = Command::new("mount");
        command.args(["-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=0620", "torpor-test"]);
        if run(command.arg(dir.path()))?.code() != 0 {
            eprintln!("skipped: no devpts can be mounted here");
            return Ok(None);
        }
        Ok(Some(Devpts { dir }))
    }

    fn path(&self) -> &str {
        self.dir.path().to_str().unwrap_or_default()
    }

    /// Opens the lowest master there is.
    fn open(&self) -> Outcome<OwnedFd> {
        open(&self.dir.path().join("ptmx"))
    }
}

impl Drop for Devpts {
    fn drop(&mut self) {
        let _best_effort = run(Command::new("umount").arg("-l").arg(self.dir.path()));
    }
}

fn open(ptmx: &Path) -> Outcome<OwnedFd> {
    let path = std::ffi::CString::new(ptmx.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: the path ends with a zero.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    ensure!(fd >= 0, "{}: {}", ptmx.display(), std::io::Error::last_os_error());
    // SAFETY: it was just opened.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn cycles() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    let mut victim = Victim::start("pty", &[devpts.path()])?;
    let before = terminal_of(victim.pid)?;
    ensure!(before.0 != 0 && before.1 == victim.pid, "it has no terminal, or is not in its foreground");
    victim.cycles(30)?;
    let after = terminal_of(victim.pid)?;
    ensure!(before == after, "controlling terminal and foreground group were {before:?} and are {after:?}");
    Ok(())
}

/// Ends that no process has open.
fn in_flight() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    for what in ["master", "slave", "both"] {
        let at = |e: String| format!("{what}: {e}");
        let mut victim = Victim::start("ptyflight", &[what, devpts.path()]).map_err(at)?;
        for _ in 0..3 {
            victim.dump_with(&["--leave-running"]).map_err(at)?;
            victim.ticks(1).map_err(at)?;
        }
        victim.cycles(4).map_err(at)?;
    }
    Ok(())
}

/// Controlling terminal and its foreground group.
fn terminal_of(pid: i32) -> Outcome<(i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| e.to_string())?;
    let fields: Vec<i32> =
        stat.rsplit(')').next().into_iter().flat_map(str::split_whitespace).flat_map(str::parse).collect();
    Ok((*fields.get(3).ok_or("short")?, *fields.get(4).ok_or("short")?))
}

fn multiplexer(args: &[&str]) -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    let mut victim = Victim::start("ptytree", &[&[devpts.path()], args].concat())?;
    let pictures =
        |victim: &Victim| members(victim.pid).into_iter().map(terminal_of).collect::<Outcome<Vec<_>>>();
    let before = pictures(&victim)?;
    ensure!(before.len() == 5 && before.iter().filter(|t| t.0 != 0).count() == 3, "terminals: {before:?}");
    for round in 1..=3 {
        victim.dump_with(&["--leave-running"]).map_err(|e| format!("round {round}: {e}"))?;
        victim.ticks(3).map_err(|e| format!("after dump {round}: {e}"))?;
    }
    victim.cycles(20)?;
    let after = pictures(&victim)?;
    ensure!(before == after, "terminals and foreground groups were {before:?} and are {after:?}");
    Ok(())
}

fn shared() -> Outcome {
    let mut victim = Victim::start("pty", &[])?;
    for round in 1..=2 {
        let image = victim.dump().map_err(|e| format!("round {round}: {e}"))?;
        let mut tries = 0;
        while let Err(e) = victim.restore(&image) {
            // By a terminal that another test has for the moment.
            ensure!(e.contains("is taken") && tries < 500, "round {round}: {e}");
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        victim.ticks(10).map_err(|e| format!("round {round}: {e}"))?;
    }
    Ok(())
}

fn left_running() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    let mut victim = Victim::start("pty", &[devpts.path()])?;
    let mut last = PathBuf::new();
    for round in 1..=10 {
        last = victim.dump_with(&["--leave-running"]).map_err(|e| format!("round {round}: {e}"))?;
        victim.ticks(9).map_err(|e| format!("after dump {round}: {e}"))?;
    }
    victim.kill();
    victim.restore_with(&["--accept-changed"], &last)?;
    victim.ticks(30)
}

/// What a dump of the victim says, which must refuse it and not harm it.
fn refused(victim: &mut Victim) -> Outcome<String> {
    let before = light_picture(victim.pid);
    let image = victim.image();
    let said = run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?;
    let text = said.expect(REFUSED)?;
    ensure!(!image.exists(), "it left {}", image.display());
    victim.ticks(2)?;
    match difference(&before, &light_picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(text),
    }
}

fn refusals() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    for (what, words) in [
        ("discipline", &["line discipline", "N_TTY"][..]),
        ("path", &["O_PATH"]),
        ("status", &["packet mode", "try again"]),
        ("one-way", &["one direction"]),
        ("relocked", &["locked again", "unlock"]),
        ("stopped", &["output of its master is stopped"]),
        ("echo", &["before its slave was ever opened"]),
        ("console", &["neither a standard stream"]),
    ] {
        let mut victim = Victim::start("ptyodd", &[devpts.path(), what])?;
        if fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("SKIP")) {
            eprintln!("skipped: {what}");
            continue;
        }
        let text = refused(&mut victim).map_err(|e| format!("{what}: {e}"))?;
        for word in words {
            ensure!(text.contains(word), "{what}: it does not say {word}: {text}");
        }
    }
    Ok(())
}

fn taken() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    let mut victim = Victim::start("pty", &[devpts.path()])?;
    let image = victim.dump()?;
    let holders = (0..4).map(|_| devpts.open()).collect::<Outcome<Vec<_>>>()?;
    let before = fs::read_dir(devpts.path()).map_err(|e| e.to_string())?.count();
    let said = torpor_command(&["restore", "--detach", image.to_str().ok_or("a path")?]);
    let text = run(&mut { said })?.expect(CONFLICT)?;
    let name = format!("/0 is taken by pid {} (", std::process::id());
    ensure!(text.contains(&name), "it does not say {name}: {text}");
    ensure!(state(victim.pid).is_none(), "a process is left");
    let after = fs::read_dir(devpts.path()).map_err(|e| e.to_string())?.count();
    ensure!(before == after, "{before} terminals before and {after} after");
    drop(holders);
    victim.restore(&image)?;
    victim.ticks(10)
}

fn elsewhere() -> Outcome {
    let Some(devpts) = Devpts::mount()? else { return Ok(()) };
    let mut victim = Victim::start("ptyodd", &[devpts.path(), "alone"])?;
    // The victim has closed its slave, which this has opened before.
    let slave = open(&devpts.dir.path().join("0"))?;
    fs::write(victim.home().join("go"), "").map_err(|e| e.to_string())?;
    victim.ticks(20)?;
    let text = refused(&mut victim)?;
    for word in [format!("pid {}", std::process::id()), "not part of the dump".into()] {
        ensure!(text.contains(&word), "it does not say {word}: {text}");
    }
    ensure!(slave.as_raw_fd() >= 0, "closed");
    drop(slave);
    victim.cycles(5)
}
