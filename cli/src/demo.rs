//! `torpor demo`: a dump and a restore in words that a newcomer understands.

pub(crate) mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, mkdtemp};
use serde::Serialize;
use torpor_image::Image;

use crate::args::DemoArgs;
use crate::dump::{Afterwards, Choices, Summary, dump};
use crate::exit::{Exit, Failure};
use crate::{check, output, restore, show};

/// How many numbers are shown before and after.
const SHOWN: usize = 6;
/// How long the program is left alone when it is gone.
const PAUSE: Duration = Duration::from_millis(500);
/// What is due in some tenths of a second.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Serialize)]
struct Outcome {
    pid: i32,
    /// Numbers it had written when it was dumped.
    before: usize,
    /// Numbers it had written when the demo was over.
    after: usize,
    dump: Summary,
    /// How long the restore took, in nanoseconds.
    restored_in: u64,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<Exit> {
    if let Err(why) = check::may_restore() {
        let text = format!(
            "the demo needs the privilege to restore ({why}); run it as root, or with CAP_CHECKPOINT_RESTORE, and \
             see `torpor check`"
        );
        return Err(Failure::new(Exit::Permission, text).into());
    }
    let say = |text: &str| if args.json { Ok(()) } else { output::print(text) };

    say("Torpor freezes a running program into a directory, and wakes it up again. Like this:\n\n")?;
    let mut counter = Counter::start()?;
    let pid = counter.pid.as_raw();
    say(&format!(
        "1. A program starts, as process {pid}. It counts, ten times a second, into a file. A second thread\n   \
         of it watches over a temporary file that has no name any more: only the program still has it open.\n\n"
    ))?;
    let numbers = counter.wait_for(SHOWN)?;
    say(&format!("     it counts: {}\n\n", numbers.join(" ")))?;

    let dir = counter.dir.join("image");
    say(&format!(
        "2. Torpor freezes it, writes all that it is to a directory, and ends it.\n\n     \
         $ torpor dump {pid} {}\n\n",
        dir.display()
    ))?;
    let (summary, held) = dump(pid, &dir, Afterwards::Ended, false, Choices::default())?;
    drop(held);
    counter.bury()?;
    let image = Image::open(&dir)?;
    say(&indented(&show::head(&image)?))?;

    let before = counter.numbers()?;
    thread::sleep(PAUSE);
    let later = counter.numbers()?;
    ensure!(before == later, "something counts although the program has ended");
    let last = before.last().cloned().unwrap_or_default();
    say(&format!(
        "\n3. Now the program is nowhere but in that directory. There is no process {pid} any more, and half a\n   \
         second later its last number still is {last}.\n\n"
    ))?;

    say(&format!("4. Torpor wakes it up again.\n\n     $ torpor restore --detach {}\n\n", dir.display()))?;
    let begin = Instant::now();
    let plan = restore::plan(&image, false, false, None)?;
    let running = torpor_restorer::prepare(&image, &plan, None)?.resume(false);
    let restored_in = begin.elapsed();
    counter.alive = true;
    ensure!(running.pid() == pid, "it came back as process {}", running.pid());
    say(&format!("     process {pid} is back after {}\n\n", output::duration(restored_in)))?;

    let after = counter.wait_for(before.len() + SHOWN)?;
    say(&format!(
        "5. It goes on where it was, and has noticed nothing: its memory, its threads, its pid and its nameless\n   \
         file are what they were.\n\n     it counts: {}\n\n",
        after[before.len()..].join(" ")
    ))?;
    say(
        "Now with a program of yours: `torpor check PID` tells whether it can be dumped, `torpor dump PID DIR`\n\
         and `torpor restore DIR` do it, and `torpor show DIR` looks inside.\n",
    )?;
    if args.json {
        let (before, after) = (before.len(), after.len());
        let restored_in = restored_in.as_nanos() as u64;
        output::json(&Outcome { pid, before, after, dump: summary, restored_in })?;
    }
    Ok(Exit::Ok)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("     {line}\n")).collect()
}

/// The program and its directory; both are gone when this is dropped.
struct Counter {
    pid: Pid,
    dir: PathBuf,
    alive: bool,
}

impl Counter {
    fn start() -> anyhow::Result<Self> {
        let template = std::env::temp_dir().join("torpor-demo-XXXXXX");
        let dir = mkdtemp(&template).with_context(|| format!("cannot make `{}`", template.display()))?;
        let mut counter = Counter { pid: Pid::from_raw(0), dir, alive: false };
        let torpor = std::env::current_exe().context("cannot find the torpor program")?;
        let child = Command::new(&torpor)
            .arg("demo-program")
            .arg(&counter.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start `{}`", torpor.display()))?;
        counter.pid = Pid::from_raw(child.id().cast_signed());
        counter.alive = true;
        Ok(counter)
    }

    /// The numbers it has written; an error when it has found something of it lost.
    fn numbers(&self) -> anyhow::Result<Vec<String>> {
        let path = self.dir.join(program::NUMBERS);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("cannot read `{}`", path.display())),
        };
        // A line that is being written is none yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let numbers: Vec<String> = whole.lines().map(str::to_owned).collect();
        for (found, expected) in numbers.iter().zip(1..) {
            ensure!(found != program::BAD, "the program says that something of it was lost");
            ensure!(*found == expected.to_string(), "the program wrote {found} where {expected} was due");
        }
        Ok(numbers)
    }

    /// Its numbers, once there are `count`.
    fn wait_for(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            let numbers = self.numbers()?;
            if numbers.len() >= count {
                return Ok(numbers);
            }
            thread::sleep(Duration::from_millis(20));
        }
        let found = self.numbers()?.len();
        bail!("the program does not count: {found} numbers after {}", output::duration(PATIENCE));
    }

    /// Collects the status of the ended program, without which its pid is not free.
    fn bury(&mut self) -> anyhow::Result<()> {
        match waitpid(self.pid, None) {
            // To a tracer that is the parent as well the end is told only once.
            Ok(_) | Err(Errno::ECHILD) => self.alive = false,
            Err(e) => return Err(e).context("cannot wait for the end of the program"),
        }
        ensure!(kill(self.pid, None) == Err(Errno::ESRCH), "process {} is still there", self.pid);
        Ok(())
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if self.alive {
            let _ended_already = kill(self.pid, Signal::SIGKILL);
            let _ended_already = waitpid(self.pid, None);
        }
        remove(&self.dir);
    }
}

fn remove(dir: &Path) {
    if let Err(e) = fs::remove_dir_all(dir) {
        output::note(&format!("cannot remove `{}`: {e}", dir.display()));
    }
}
