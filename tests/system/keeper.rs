//! The process that keeps watches from one dump to the next: what becomes of them when it, or who asks it, is killed.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use libtest_mimic::Trial;
use torpor_kernel::probe;
use torpor_tests::{Outcome, Victim, ensure, run_torpor, torpor_command};

use crate::track::{follow, path, restore};

/// Exit code (docs/exit-codes.md).
const REFUSED: i32 = 5;
/// What a dump says that knows nothing of what was written.
const ALL: &str = "everything counts as changed";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("track: a watch whose keeper is killed is gone, and nothing else", || {
            watched(|victim, first, keeper| {
                let image = victim.image();
                let pid = victim.pid.to_string();
                signal(keeper, libc::SIGSTOP);
                let dump = torpor_command(&["dump", "--parent", path(first)?, &pid, path(&image)?])
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .map_err(|e| e.to_string())?;
                // It asks somebody who does not answer, and then is no more.
                std::thread::sleep(Duration::from_millis(300));
                signal(keeper, libc::SIGKILL);
                let said = dump.wait_with_output().map_err(|e| e.to_string())?;
                let words = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
                ensure!(said.status.success(), "{}: {words}", said.status);
                ensure!(words.contains(ALL), "it believes in a watch that has ended: {words}");
                victim.reap_all(&image)?;
                restore(victim, &image)
            })
        }),
        Trial::test("track: a watch is not given to those who have gone", || {
            watched(|victim, first, keeper| {
                signal(keeper, libc::SIGSTOP);
                let asked = ask(victim.pid)?;
                drop(asked);
                signal(keeper, libc::SIGCONT);
                let pid = victim.pid.to_string();
                let second = victim.image();
                let said =
                    run_torpor(&["dump", "--parent", path(first)?, &pid, path(&second)?])?.expect(0)?;
                ensure!(!said.contains(ALL), "the watch was lost: {said}");
                victim.reap_all(&second)?;
                restore(victim, &second)
            })
        }),
        Trial::test("track: who follows a process already is not disturbed", || {
            watched(|victim, first, keeper| {
                let pid = victim.pid.to_string();
                // One that gives nothing away.
                signal(keeper, libc::SIGSTOP);
                let refused = |options: &[&str], image: &Path| {
                    let said =
                        run_torpor(&[&["dump"], options, &[&pid, path(image)?]].concat())?.expect(REFUSED)?;
                    ensure!(said.contains("it is followed already"), "it does not say why: {said}");
                    ensure!(!image.exists(), "an image is left of a dump that was refused");
                    Ok(())
                };
                let image = victim.image();
                refused(&["--track"], &image)?;
                refused(&["--leave-running", "--parent", path(first)?], &image)?;
                victim.dump_with(&["--leave-running"])?;
                signal(keeper, libc::SIGCONT);
                victim.ticks(3)?;
                let second = victim.dump_with(&["--parent", path(first)?])?;
                victim.reap_all(&second)?;
                restore(victim, &second)
            })
        }),
    ]
}

/// What is done with a victim that is watched, its first image, and the process that keeps the watch.
fn watched(trial: fn(&mut Victim, &Path, i32) -> Outcome) -> Result<(), libtest_mimic::Failed> {
    let mut victim = Victim::start("written", &["8", "40"])?;
    let first = follow(&mut victim, None)?;
    if !probe::one("userfaultfd WP_ASYNC").is_some_and(probe::State::is_present) {
        eprintln!("skipped (this kernel has no asynchronous write protection)");
        return Ok(());
    }
    victim.ticks(2)?;
    let keeper = keeper(victim.pid)?;
    trial(&mut victim, &first, keeper)?;
    Ok(victim.ticks(6)?)
}

/// The process that keeps the watch over a victim of ours.
fn keeper(victim: i32) -> Outcome<i32> {
    let keeps = |pid: &i32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        let of_it = |text: String| text.lines().any(|l| l == format!("Pid:\t{victim}"));
        name == "torpor-track\n"
            && descriptors.flat_map(|entry| std::fs::read_to_string(entry.path())).any(of_it)
    };
    let all = std::fs::read_dir("/proc").map_err(|e| e.to_string())?.flatten();
    let mut all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.find(keeps).ok_or_else(|| "nobody keeps the watch".into())
}

fn signal(keeper: i32, signal: i32) {
    // SAFETY: kill takes numbers; the process was started by a dump of ours.
    unsafe { libc::kill(keeper, signal) };
}

/// Asks for the watch over a process, as a dump does.
fn ask(pid: i32) -> Outcome<OwnedFd> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| e.to_string())?;
    let started = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19)).ok_or("a stat")?;
    let name = format!("\0torpor-track-{pid}-{started}");
    // SAFETY: takes numbers, gives a descriptor that is ours; an all-zero sockaddr_un is a valid one, and is passed with
    // the length that is used.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        ensure!(fd >= 0, "no socket: {}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let length = (size_of::<libc::sa_family_t>() + name.len()) as libc::socklen_t;
        let connected = libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length);
        ensure!(connected == 0, "{name:?}: {}", std::io::Error::last_os_error());
        ensure!(libc::send(socket.as_raw_fd(), b"t".as_ptr().cast(), 1, 0) == 1, "nobody listens");
        Ok(socket)
    }
}
