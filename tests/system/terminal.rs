//! A terminal as stdio: a restored program talks to the terminal it is restored on.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_kernel::{Pid, stat, tty};
use torpor_tests::{Outcome, Victim, ensure, torpor, torpor_command, victim};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("state: a terminal as stdio, restored on another", || Ok(terminal()?)),
        Trial::test("state: a job of a shell, restored as one", || Ok(job(false)?)),
        Trial::test("tree: a job with jobs of its own, one of them in the foreground", || Ok(job(true)?)),
    ]
}

/// A terminal and what comes out of it.
struct Pty {
    master: File,
    slave: OwnedFd,
    seen: String,
}

impl Pty {
    fn open() -> Outcome<Self> {
        let (mut master, mut slave) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: two places for numbers; the rest may be null.
        let result =
            unsafe { libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()) };
        ensure!(result == 0, "openpty: {}", std::io::Error::last_os_error());
        // SAFETY: both are open and ours. The master must not block nor be inherited.
        unsafe {
            libc::fcntl(master, libc::F_SETFL, libc::O_NONBLOCK);
            libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
            libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
            Ok(Pty {
                master: File::from_raw_fd(master),
                slave: OwnedFd::from_raw_fd(slave),
                seen: String::new(),
            })
        }
    }

    fn resize(&self, rows: u16, columns: u16) -> Outcome {
        tty::set_size(&self.master, [rows, columns, 0, 0]).map_err(|e| e.to_string())
    }

    /// The process group in its foreground.
    fn foreground(&self) -> i32 {
        // SAFETY: takes a number.
        unsafe { libc::tcgetpgrp(self.master.as_raw_fd()) }
    }

    /// Waits until a process group is in its foreground.
    fn until_foreground(&mut self, group: i32) -> Outcome {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.foreground() != group {
            self.listen();
            ensure!(
                Instant::now() < deadline,
                "group {} instead of {group} has the terminal, where there is {:?}",
                self.foreground(),
                self.seen
            );
        }
        Ok(())
    }

    /// Makes it the controlling terminal and stdio of a command.
    fn give(&self, command: &mut Command) -> Outcome {
        let stdio = || self.slave.try_clone().map(Stdio::from).map_err(|e| e.to_string());
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
        // SAFETY: both are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
                Ok(())
            });
        }
        Ok(())
    }

    /// Waits until `text` has come out.
    fn until(&mut self, text: &str) -> Outcome {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.seen.contains(text) {
            ensure!(Instant::now() < deadline, "no {text:?} on the terminal, only {:?}", self.seen);
            self.listen();
        }
        Ok(())
    }

    /// Takes what has come out, or waits a little.
    fn listen(&mut self) {
        let mut buffer = [0; 4096];
        match self.master.read(&mut buffer) {
            Ok(n) if n > 0 => self.seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }

    fn type_(&self, text: &str) -> Outcome {
        use std::io::Write;
        (&self.master).write_all(text.as_bytes()).map_err(|e| e.to_string())
    }
}

fn terminal() -> Outcome {
    let mut first = Pty::open()?;
    first.resize(24, 80)?;
    let mut subject = Victim::prepare()?;
    let mut command = Command::new(victim("tty")?);
    command.arg(subject.log()).arg(subject.home());
    first.give(&mut command)?;
    let mut child = command.spawn().map_err(|e| e.to_string())?;
    subject.pid = child.id() as i32;
    let result = subject.ticks(3).and_then(|()| first.until("count 3")).and_then(|()| subject.dump_with(&[]));
    let _gone = child.kill();
    let _reaped = child.wait();
    let image = result?;
    drop(first);

    let mut second = Pty::open()?;
    second.resize(50, 132)?;
    let mut command = torpor_command(&["restore", image.to_str().ok_or("a path")?]);
    second.give(&mut command)?;
    let before = subject.count()?;
    let mut torpor: Child = command.spawn().map_err(|e| e.to_string())?;
    let result = (|| {
        second.until("count ")?;
        second.type_("q")?;
        second.until("typed q")?;
        second.until("now 50 x 132")?;
        subject.ticks_from(before, 3)
    })();
    // SAFETY: kill takes numbers; torpor is an unreaped child of ours and passes the signal on.
    unsafe { libc::kill(torpor.id() as i32, libc::SIGTERM) };
    let deadline = Instant::now() + Duration::from_secs(5);
    while torpor.try_wait().map_err(|e| e.to_string())?.is_none() {
        if Instant::now() > deadline {
            let _gone = torpor.kill();
            let _reaped = torpor.wait();
            return result.and(Err("torpor does not end with its program".into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    result
}

/// What a shell with job control does to run a command.
const SHELL: &str = "set -m; \"$@\"; echo ended $?; read line";
/// The same, without waiting for input.
const INNER: &str = "set -m; \"$@\"; echo ended $?";

/// A program that a shell runs, or with `inner` a shell that runs it as a job of its own.
fn job(inner: bool) -> Outcome {
    let mut first = Pty::open()?;
    first.resize(24, 80)?;
    let mut subject = Victim::prepare()?;
    let mut command = Command::new("bash");
    command.args(["-c", SHELL, "-"]);
    if inner {
        command.args(["bash", "-c", INNER, "-"]);
    }
    command.arg(victim("tty")?).arg(subject.log()).arg(subject.home());
    first.give(&mut command)?;
    let mut shell = command.spawn().map_err(|e| format!("bash: {e}"))?;
    let mut front = 0;
    let image = (|| {
        first.until("count 3")?;
        front = first.foreground();
        ensure!(front != shell.id() as i32, "the job has no group of its own");
        let root = stat::of_process(Pid(front)).map_err(|e| e.to_string())?.ppid;
        subject.pid = if inner { root } else { front };
        let image = subject.dump_with(&[])?;
        first.until("ended 137")?;
        // Without its parent it has become a child of ours.
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(front, std::ptr::null_mut(), 0) };
        Ok(image)
    })();
    let _gone = shell.kill();
    let _reaped = shell.wait();
    let image = image?;

    let mut second = Pty::open()?;
    second.resize(24, 80)?;
    let before = tty::termios(&second.slave).map_err(|e| e.to_string())?;
    let mut command = Command::new("bash");
    command.args(["-c", SHELL, "-"]).arg(torpor()).arg("restore").arg(&image);
    second.give(&mut command)?;
    let count = subject.count()?;
    let mut shell = command.spawn().map_err(|e| format!("bash: {e}"))?;
    let result = (|| {
        second.until_foreground(front)?;
        second.until("count ")?;
        let now = tty::termios(&second.slave).map_err(|e| e.to_string())?;
        ensure!(now.lflag & libc::ICANON == 0, "its settings did not come with it");
        second.type_("q")?;
        second.until("typed q")?;
        subject.ticks_from(count, 3)?;
        ensure!(!second.seen.contains("now "), "it was told of a size that is the same: {}", second.seen);
        second.resize(50, 132)?;
        second.until("now 50 x 132")?;
        // The terminal is its own, so that this goes to it; a shell in between ends likewise.
        second.type_("\x03")?;
        second.until("ended 130")?;
        second.until_foreground(shell.id() as i32)?;
        let after = tty::termios(&second.slave).map_err(|e| e.to_string())?;
        ensure!(before == after, "settings were {before:?} and are {after:?}");
        Ok(())
    })();
    let _gone = shell.kill();
    let _reaped = shell.wait();
    result
}
