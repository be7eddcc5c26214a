//! kill -9 of `torpor dump` at random moments: the processes must never notice.
//!
//! `TORTURE_ROUNDS` says how often (40 if unset), `TORTURE_SEED` which moments, `TORTURE_FREEZE` by which way to freeze
//! in all of them (`--freeze`).

mod grove;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use torpor_tests::{
    Outcome, PATIENCE, Victim, build, difference, ensure, is_root, light_picture, state, threads_of, torpor,
    torpor_command, victim, workspace,
};

/// How long the process may take until it is as before.
const RECOVERY: Duration = Duration::from_secs(1);

fn main() {
    torpor_tests::become_subreaper();
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("VICTIM_TOLERATES_EINTR", "1") };
    let mut arguments = Arguments::from_args();
    // Each measures time.
    arguments.test_threads = Some(1);
    let mut trials =
        vec![Trial::test("killed dumps of a busy process", || Ok(torture(&victim("kitchen")?)?))];
    let shared = workspace().join("../shared/acceptance/src/kitchen.c");
    if shared.exists() {
        trials.push(Trial::test("killed dumps of the acceptance kitchen", move || {
            Ok(torture(&build(&shared)?)?)
        }));
    }
    trials.push(Trial::test("killed dumps of sockets that are peeked at", || {
        Ok(torture_with(&victim("udp")?, number("TORTURE_ROUNDS", 40) / 2 + 1)?)
    }));
    trials.push(Trial::test("killed dumps of spinning threads", || {
        Ok(torture_with(&victim("registers")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?)
    }));
    trials.push(Trial::test("killed dumps of pseudo terminals", || {
        Ok(torture_with(&victim("pty")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?)
    }));
    trials.push(Trial::test("killed dumps of restartable sequences and calls", || {
        torture_with(&victim("rseq")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?;
        Ok(torture_with(&victim("syscalls")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?)
    }));
    trials.push(Trial::test("killed dumps of System V IPC", || {
        torture_with(&victim("sysv_shm")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?;
        torture_with(&victim("sysv_msg")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?;
        Ok(torture_with(&victim("sysv_sem")?, number("TORTURE_ROUNDS", 40) / 4 + 1)?)
    }));
    trials.push(Trial::test("killed dumps by copy-on-write children", || {
        let rounds = number("TORTURE_ROUNDS", 40);
        torture_by(&victim("snapshot")?, rounds, Some("fork"))?;
        torture_by(&victim("kitchen")?, rounds / 2 + 1, Some("fork"))?;
        Ok(torture_by(&victim("sysv_shm")?, rounds / 4 + 1, Some("fork"))?)
    }));
    trials.push(Trial::test("killed dumps that follow what is written", || {
        let rounds = number("TORTURE_ROUNDS", 40);
        torture_by(&victim("snapshot")?, rounds, Some("track"))?;
        torture_by(&victim("kitchen")?, rounds / 2 + 1, Some("track"))?;
        Ok(torture_by(&victim("cow")?, rounds / 4 + 1, Some("track"))?)
    }));
    trials.push(Trial::test("killed dumps of a tree", || Ok(grove::torture(number("TORTURE_ROUNDS", 40))?)));
    let trials = trials.into_iter().map(|t| t.with_ignored_flag(!is_root())).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn torture(program: &Path) -> Outcome {
    torture_with(program, number("TORTURE_ROUNDS", 40))
}

fn torture_with(program: &Path, rounds: u64) -> Outcome {
    torture_by(program, rounds, None)
}

/// Kills dumps that freeze in this way.
fn torture_by(program: &Path, rounds: u64, freeze: Option<&'static str>) -> Outcome {
    let seed = number("TORTURE_SEED", std::process::id().into());
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut subject = Subject::start(program, freeze)?;
    let mut duration = subject.duration()?;
    let (mut harmed, mut killed, mut finished, mut worst) = (String::new(), 0, 0, Duration::ZERO);
    let mut harms = 0;
    for round in 0.. {
        // A dump that was through before its moment does not count.
        if killed == rounds || round > 10 * rounds || harms > 20 {
            break;
        }
        if round % 25 == 24 {
            duration = subject.duration()?;
        }
        let moment = duration.mul_f64(1.3 * random.unit());
        let died = subject.killed_dump(moment)?;
        killed += u64::from(died);
        finished += u64::from(!died);
        match subject.unharmed() {
            Ok(took) => worst = worst.max(took),
            Err(e) => {
                harms += 1;
                let _ = writeln!(
                    harmed,
                    "round {round}, killed {died} at {moment:?} of {duration:?}: {e}\n{}",
                    threads_of(subject.victim.pid)
                );
                subject = Subject::start(program, freeze)?;
                duration = subject.duration()?;
            }
        }
    }
    let name = program.file_name().unwrap_or_default().display();
    println!(
        "{name}: {killed} dumps killed within 1.3 times {duration:?}, {finished} were through by then; \
         {harms} harmed; slowest recovery {worst:?}; seed {seed}"
    );
    let interrupted: Vec<_> = subject
        .victim
        .interrupted()
        .into_iter()
        .filter(|c| !["epoll_wait", "sigtimedwait", "semop", "msgrcv", "msgsnd"].contains(&c.as_str()))
        .collect();
    ensure!(interrupted.is_empty(), "these calls failed with EINTR: {interrupted:?}");
    ensure!(harms == 0, "{harms} of {rounds} rounds harmed it (seed {seed}):\n{harmed}");
    // The next dump clears away what the killed ones left, and its image works.
    subject.clean()?;
    let image = subject.victim.dump()?;
    subject.victim.restore(&image)?;
    subject.victim.ticks(3)
}

struct Subject {
    victim: Victim,
    image: PathBuf,
    before: BTreeMap<String, Vec<String>>,
    options: Vec<String>,
}

impl Subject {
    fn start(program: &Path, freeze: Option<&str>) -> Outcome<Self> {
        let victim = Victim::start_program(program, &[])?;
        std::thread::sleep(Duration::from_millis(100));
        // What holds most of the time: a busy process may have something open for a moment.
        let mut seen: Vec<(BTreeMap<_, _>, u32)> = Vec::new();
        for _ in 0..15 {
            let picture = light_picture(victim.pid);
            match seen.iter_mut().find(|(p, _)| *p == picture) {
                Some((_, n)) => *n += 1,
                None => seen.push((picture, 1)),
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let before = seen.into_iter().max_by_key(|(_, n)| *n).ok_or("no picture")?.0;
        let image = victim.dir.path().join("image");
        let mut options = vec!["--leave-running".to_owned()];
        let everywhere = std::env::var("TORTURE_FREEZE").ok();
        if let Some(freeze) = freeze.or(everywhere.as_deref()) {
            options.extend(["--freeze".to_owned(), freeze.to_owned()]);
        }
        Ok(Subject { victim, image, before, options })
    }

    /// How long an undisturbed dump takes.
    fn duration(&mut self) -> Outcome<Duration> {
        let mut all = Vec::new();
        for _ in 0..3 {
            let begin = Instant::now();
            ensure!(!self.killed_dump(PATIENCE)?, "a dump hangs");
            all.push(begin.elapsed());
            self.unharmed().map_err(|e| format!("after a dump that nobody disturbed: {e}"))?;
        }
        all.sort();
        Ok(all[1])
    }

    fn killed_dump(&mut self, moment: Duration) -> Outcome<bool> {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        killed_dump(self.victim.pid, &self.image, &options, moment)
    }

    /// Whether the process is as it was, and how long it took to be.
    fn unharmed(&self) -> Outcome<Duration> {
        let begin = Instant::now();
        loop {
            let now = light_picture(self.victim.pid);
            let state = state(self.victim.pid);
            let stopped = !matches!(state, Some('R' | 'S' | 'D'));
            match difference(&self.before, &now) {
                None if !stopped => break,
                _ if begin.elapsed() < RECOVERY => std::thread::sleep(Duration::from_micros(300)),
                difference => {
                    let log = self.victim.count().err().unwrap_or_default();
                    return Err(format!("state {state:?} {log}\n{}", difference.unwrap_or_default()));
                }
            }
        }
        let took = begin.elapsed();
        no_copies()?;
        self.victim.ticks(2)?;
        Ok(took)
    }

    /// Nothing is left behind by those that were killed.
    fn clean(&mut self) -> Outcome {
        if self.image.join("manifest.tpr").exists() {
            fs::remove_dir_all(&self.image).map_err(|e| e.to_string())?;
        }
        let (pid, image) = (self.victim.pid.to_string(), self.image.to_str().ok_or("a path")?);
        torpor_tests::run_torpor(&["dump", "--leave-running", &pid, image])?.expect(0)?;
        torpor_tests::run_torpor(&["verify", image])?.expect(0)?;
        for entry in fs::read_dir(&self.image).map_err(|e| e.to_string())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with('.') && !name.contains("partial"), "left behind: {name}");
        }
        let around: Vec<_> = fs::read_dir(self.victim.dir.path())
            .map_err(|e| e.to_string())?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|n| n.starts_with('.'))
            .collect();
        ensure!(around.is_empty(), "left beside the image: {around:?}");
        // Orphans would be children of this process by now.
        let mine = fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()))
            .unwrap_or_default();
        for pid in mine.split_whitespace().filter_map(|p| p.parse::<i32>().ok()) {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            ensure!(exe != torpor(), "a torpor process is left: {pid}");
        }
        Ok(())
    }
}

/// No copy of a process is left, nor what made one: orphans are children of this process.
fn no_copies() -> Outcome {
    let begin = Instant::now();
    loop {
        let mine = fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()));
        let mine = mine.unwrap_or_default();
        let copies = mine.split_whitespace().filter_map(|p| p.parse::<i32>().ok()).filter(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim_end() == "torpor-snapshot"
        });
        let copies: Vec<i32> = copies.collect();
        if copies.is_empty() {
            return Ok(());
        }
        for pid in &copies {
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(*pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
        }
        // Memory of a hundred MiB is given back in a time that others on the machine decide.
        let states: Vec<_> = copies.iter().map(|pid| (*pid, state(*pid), threads_of(*pid))).collect();
        ensure!(begin.elapsed() < 10 * RECOVERY, "copies are left: {states:?}");
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Starts a dump and kills it after `moment`; whether it had not ended by itself.
fn killed_dump(pid: i32, image: &Path, options: &[&str], moment: Duration) -> Outcome<bool> {
    if image.join("manifest.tpr").exists() {
        fs::remove_dir_all(image).map_err(|e| e.to_string())?;
    }
    let pid = pid.to_string();
    let mut command = torpor_command(&["dump"]);
    command.args(options).arg(pid).arg(image);
    let begin = Instant::now();
    let mut dump = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    while begin.elapsed() < moment {
        if moment == PATIENCE && dump.try_wait().map_err(|e| e.to_string())?.is_some() {
            break;
        }
        let left = moment.saturating_sub(begin.elapsed());
        if left > Duration::from_micros(200) {
            std::thread::sleep((left - Duration::from_micros(100)).min(Duration::from_micros(500)));
        }
    }
    let ended = dump.try_wait().map_err(|e| e.to_string())?;
    dump.kill().map_err(|e| e.to_string())?;
    let status = dump.wait().map_err(|e| e.to_string())?;
    if let Some(status) = ended {
        ensure!(status.success(), "a dump that was not disturbed ended with {status}");
    }
    use std::os::unix::process::ExitStatusExt;
    Ok(status.signal() == Some(libc::SIGKILL))
}

/// xorshift64
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}
