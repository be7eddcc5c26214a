//! A tree whose members pass tokens to each other through every kind of channel, and dumps of it that are killed:
//! those that let it run on, and those that end it. Nobody may be harmed, and no channel may be deaf.
//!
//! A dump that ends the tree has written the image before: if that is there when the dump is killed, the tree may
//! be gone, whole or in part. Then it goes on from the image.
//!
//! `TORTURE_KINDS` says which kinds of channels (tests/victims/grove.c); all that `torpor check` accepts if unset.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use torpor_tests::{
    Outcome, PATIENCE, Victim, difference, ensure, light_picture, members, run_torpor, state, threads_of,
};

use crate::{Random, killed_dump, number};

/// All kinds; the first choice.
const KINDS: &str = "puqytm";
/// What has to be there in any case.
const LEAST: &str = "pum";
const MEMBERS: usize = 20;
/// How long all members may take until they are as before.
const RECOVERY: Duration = Duration::from_secs(2);
/// How long tokens may take to go round twice.
const ROUND: Duration = Duration::from_secs(5);

struct Grove {
    victim: Victim,
    image: PathBuf,
    pids: Vec<i32>,
    before: BTreeMap<String, Vec<String>>,
}

pub(crate) fn torture(rounds: u64) -> Outcome {
    let seed = number("TORTURE_SEED", std::process::id().into());
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let kinds = kinds()?;
    let mut grove = Grove::start(&kinds)?;
    let mut duration = grove.duration()?;
    let (mut killed, mut finished, mut restored, mut worst) = (0, 0, 0, Duration::ZERO);
    let (mut harms, mut harmed) = (0, String::new());
    for round in 0..10 * rounds {
        if killed == rounds || harms > 10 {
            break;
        }
        if round % 50 == 49 {
            duration = grove.duration()?;
        }
        let options: &[&str] = if round % 2 == 0 { &["--leave-running"] } else { &[] };
        let moment = duration.mul_f64(1.3 * random.unit());
        let died = killed_dump(grove.victim.pid, &grove.image, options, moment)?;
        killed += u64::from(died);
        finished += u64::from(!died);
        let went = match grove.gone_on(options.is_empty()) {
            Ok(back) => {
                restored += u64::from(back);
                grove.unharmed()
            }
            Err(e) => Err(e),
        };
        match went {
            Ok(took) => worst = worst.max(took),
            Err(e) => {
                harms += 1;
                let _ = writeln!(
                    harmed,
                    "round {round}, {options:?} killed {died} at {moment:?} of {duration:?}: {e}"
                );
                grove = Grove::start(&kinds)?;
                duration = grove.duration()?;
            }
        }
    }
    println!(
        "grove of {kinds}: {killed} dumps killed within 1.3 times {duration:?}, {finished} were through by then; \
         {restored} times it came back from its image; {harms} harmed; slowest recovery {worst:?}; seed {seed}"
    );
    let interrupted = grove.victim.interrupted();
    ensure!(interrupted.is_empty(), "these calls failed with EINTR: {interrupted:?}");
    ensure!(harms == 0, "{harms} of {rounds} rounds harmed it (seed {seed}):\n{harmed}");
    Ok(())
}

/// The kinds of channels that a dump takes.
fn kinds() -> Outcome<String> {
    if let Ok(kinds) = std::env::var("TORTURE_KINDS") {
        return Ok(kinds);
    }
    let mut kinds = KINDS.to_owned();
    for kind in KINDS.chars() {
        let mut victim = Victim::start("grove", &[&kind.to_string()])?;
        if run_torpor(&["check", &victim.pid.to_string()])?.code() != 0 {
            ensure!(!LEAST.contains(kind), "channels of kind {kind} are refused");
            kinds.retain(|k| k != kind);
        }
        victim.kill();
    }
    Ok(kinds)
}

impl Grove {
    fn start(kinds: &str) -> Outcome<Self> {
        let victim = Victim::start("grove", &[kinds])?;
        let image = victim.dir.path().join("image");
        let mut grove = Grove { victim, image, pids: Vec::new(), before: BTreeMap::new() };
        grove.look()?;
        Ok(grove)
    }

    /// Notes what everybody is like.
    fn look(&mut self) -> Outcome {
        self.pids = members(self.victim.pid);
        self.pids.push(self.victim.pid);
        ensure!(self.pids.len() == MEMBERS, "it has {} members", self.pids.len());
        std::thread::sleep(Duration::from_millis(20));
        self.before = self.picture();
        Ok(())
    }

    fn picture(&self) -> BTreeMap<String, Vec<String>> {
        let all = self.pids.iter().flat_map(|pid| {
            light_picture(*pid).into_iter().map(move |(key, lines)| (format!("{pid}/{key}"), lines))
        });
        all.collect()
    }

    /// How long an undisturbed dump takes.
    fn duration(&mut self) -> Outcome<Duration> {
        let mut all = Vec::new();
        for _ in 0..3 {
            let begin = Instant::now();
            let killed = killed_dump(self.victim.pid, &self.image, &["--leave-running"], PATIENCE)?;
            ensure!(!killed, "a dump hangs");
            all.push(begin.elapsed());
            self.unharmed().map_err(|e| format!("after a dump that nobody disturbed: {e}"))?;
        }
        all.sort();
        Ok(all[1])
    }

    /// Brings the tree back if a dump that was to end it has got as far as that; whether it had.
    fn gone_on(&mut self, ends: bool) -> Outcome<bool> {
        let gone = |pid: &i32| state(*pid).is_none_or(|s| matches!(s, 'Z' | 'X'));
        if !self.pids.iter().any(gone) {
            return Ok(false);
        }
        ensure!(ends, "somebody has ended: {:?}", self.pids.iter().filter(|p| gone(p)).collect::<Vec<_>>());
        ensure!(self.image.join("manifest.tpr").exists(), "it was ended without an image");
        for pid in &self.pids {
            // SAFETY: kill takes numbers; what there is left is below an uncollected child of ours.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        self.victim.reap()?;
        let deadline = Instant::now() + PATIENCE;
        for pid in &self.pids {
            // SAFETY: no status is asked for; whose parents have ended are children of ours.
            let reap = || unsafe { libc::waitpid(*pid, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
            while Path::new(&format!("/proc/{pid}")).exists() && reap() != *pid {
                ensure!(Instant::now() < deadline, "pid {pid} does not go away");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        // Its log grew while it was dumped before.
        let image = self.image.clone();
        self.victim.restore_with(&["--accept-changed"], &image)?;
        self.victim.ticks(1)?;
        self.look()?;
        fs::remove_dir_all(&self.image).map_err(|e| e.to_string())?;
        Ok(true)
    }

    /// Whether everybody is as before, and tokens go round; how long the former took.
    fn unharmed(&self) -> Outcome<Duration> {
        let begin = Instant::now();
        loop {
            let now = self.picture();
            let stopped: Vec<_> =
                self.pids.iter().filter(|pid| !matches!(state(**pid), Some('R' | 'S' | 'D'))).collect();
            match difference(&self.before, &now) {
                None if stopped.is_empty() => break,
                _ if begin.elapsed() < RECOVERY => std::thread::sleep(Duration::from_millis(1)),
                difference => {
                    let log = self.victim.count().err().unwrap_or_default();
                    let what = difference.unwrap_or_default();
                    return Err(format!("{log} these do not run: {stopped:?}\n{what}"));
                }
            }
        }
        let took = begin.elapsed();
        let before = self.victim.count()?;
        let begin = Instant::now();
        while self.victim.count()? < before + 2 {
            if begin.elapsed() > ROUND {
                let threads: String =
                    self.pids.iter().map(|pid| format!("{pid}:\n{}", threads_of(*pid))).collect();
                return Err(format!("tokens do not go round:\n{threads}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(took)
    }
}
