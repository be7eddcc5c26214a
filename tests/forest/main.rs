//! Random trees of processes: what /proc says of every member must be the same after each of two restores, and
//! every member must find all as it was.
//!
//! `FOREST_TREES` says how many, `FOREST_SEED` which one alone; `KEEP` leaves its directory.

mod look;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use torpor_image::Image;
use torpor_tests::{
    Outcome, PATIENCE, Victim, difference, ensure, is_root, run_torpor, threads_of, torpor, victim,
};

/// About 40 seconds on two idle cpus.
const TREES: u64 = 200;
/// How many at once.
const WORKERS: usize = 2;

fn main() {
    torpor_tests::become_subreaper();
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = Trial::test("random trees", random_trees).with_ignored_flag(!is_root());
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn random_trees() -> Result<(), Failed> {
    let (first, trees) = match number("FOREST_SEED") {
        Some(seed) => (seed, 1),
        // Other trees each time; the seed of one that fails is told.
        None => (u64::from(std::process::id()) << 20, number("FOREST_TREES").unwrap_or(TREES)),
    };
    let _built = (torpor(), victim("forest")?);
    let (next, wrong, sizes) = (AtomicU64::new(0), Mutex::new(Vec::new()), Mutex::new([0usize; 3]));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= trees {
                        break;
                    }
                    match tree(first + n) {
                        Ok(size) => {
                            let mut sizes = sizes.lock().expect("nobody panics with it");
                            sizes.iter_mut().zip(size).for_each(|(sum, n)| *sum += n);
                        }
                        Err(e) => {
                            eprintln!("FOREST_SEED={}: {e}", first + n);
                            wrong.lock().expect("nobody panics with it").push(first + n);
                        }
                    }
                }
            });
        }
    });
    let [processes, zombies, helped] = *sizes.lock().map_err(|e| e.to_string())?;
    println!("{trees} trees: {processes} processes, {zombies} zombies, {helped} births through others");
    let wrong = wrong.lock().map_err(|e| e.to_string())?;
    if wrong.is_empty() { Ok(()) } else { Err(format!("trees that went wrong: {wrong:?}").into()) }
}

/// What the log says of the members: by number, their pid and what they do.
fn members(victim: &Victim) -> BTreeMap<String, (i32, String)> {
    let text = std::fs::read_to_string(victim.log()).unwrap_or_default();
    let member = |line: &str| {
        let mut words = line.strip_prefix("member ")?.split(' ');
        Some((words.next()?.to_owned(), (words.next()?.parse().ok()?, words.next()?.to_owned())))
    };
    text.lines().filter_map(member).collect()
}

/// How often each member has gone round.
fn rounds(victim: &Victim) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(victim.log()).unwrap_or_default();
    let mut all = BTreeMap::new();
    for member in text.lines().filter_map(|l| l.strip_prefix("tick ")) {
        *all.entry(member.to_owned()).or_default() += 1;
    }
    all
}

fn wait(what: &str, victim: &Victim, done: impl Fn() -> Option<String>) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        victim.count()?;
        let Some(left) = done() else { return Ok(()) };
        ensure!(Instant::now() < deadline, "{what}: {left}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Waits until every member that is to run has gone round twice more.
fn all_run(what: &str, victim: &Victim, members: &BTreeMap<String, (i32, String)>) -> Outcome {
    let before = rounds(victim);
    let get = |all: &BTreeMap<String, usize>, n: &str| all.get(n).copied().unwrap_or(0);
    wait(what, victim, || {
        let now = rounds(victim);
        let late =
            |(n, (_, does)): &(&String, &(i32, String))| does == "runs" && get(&now, n) < get(&before, n) + 2;
        let (n, (pid, _)) = members.iter().find(late)?;
        Some(format!("member {n}, pid {pid}, does nothing\n{}", threads_of(*pid)))
    })
}

/// One tree from its seed to its end: how many processes and zombies it had, and helpers of a restore.
fn tree(seed: u64) -> Outcome<[usize; 3]> {
    let mut victim = Victim::prepare()?;
    let went = grown(seed, &mut victim);
    // Of a tree that went wrong the members may be below nobody any more but this process.
    let log = victim.log().display().to_string();
    for (pid, _) in members(&victim).into_values().filter(|_| went.is_err()) {
        if std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|c| String::from_utf8_lossy(&c).contains(&log))
        {
            // SAFETY: kill takes numbers; the process has our log for its argument.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    went
}

fn grown(seed: u64, victim: &mut Victim) -> Outcome<[usize; 3]> {
    let mut command = Command::new(self::victim("forest")?);
    command.arg(victim.log()).arg(victim.home()).arg(seed.to_string());
    let said = std::fs::File::create(victim.dir.path().join("said")).map_err(|e| e.to_string())?;
    command.stdin(Stdio::null()).stdout(said.try_clone().map_err(|e| e.to_string())?).stderr(said);
    victim.spawn(&mut command)?;
    let pid = victim.pid;
    wait("it does not settle", victim, || {
        let settled = std::fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("settled"));
        (!settled).then(|| threads_of(pid))
    })?;
    let all = members(victim);
    all_run("before the dump", victim, &all)?;
    let before = look::at(pid)?;
    let mut size = [0; 3];
    for round in 1..=2 {
        let at = |e: String| format!("round {round}: {e}");
        let image = victim.dump().map_err(at)?;
        let (tasks, zombies, helpers) = planned(&image).map_err(at)?;
        ensure!(
            tasks + zombies == before.keys().filter(|k| k.ends_with("/relations")).count(),
            "round {round}: the image has {tasks} processes and {zombies} zombies"
        );
        size = [tasks, zombies, helpers];
        victim.restore(&image).map_err(at)?;
        all_run("after a restore", victim, &all).map_err(at)?;
        if let Some(difference) = difference(&before, &look::at(pid)?) {
            return Err(at(format!("not as before:\n{difference}")));
        }
    }
    // Those who stood still have yet to look at themselves.
    let mut awake = all.clone();
    for (pid, does) in awake.values_mut() {
        // SAFETY: both take numbers only.
        unsafe {
            match does.as_str() {
                "stops" => i64::from(libc::kill(*pid, libc::SIGCONT)),
                "pauses" => libc::syscall(libc::SYS_tgkill, *pid, *pid, libc::SIGRTMIN() + 1),
                _ => 0,
            }
        };
        *does = "runs".into();
    }
    all_run("after all were woken", victim, &awake)?;
    let pids = torpor_tests::members(pid);
    victim.kill();
    for pid in pids {
        // SAFETY: no status is asked for; whose parents have ended are children of ours.
        let reap = || unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
        while Path::new(&format!("/proc/{pid}")).exists() && reap() != pid {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(size)
}

/// Tasks and zombies of an image, and the processes that only help in its plan; the plan has a birth for each.
fn planned(image: &Path) -> Outcome<(usize, usize, usize)> {
    let manifest = Image::open(image).map_err(|e| e.to_string())?.manifest;
    let path = image.to_str().ok_or("a path")?;
    let text = run_torpor(&["restore", "--plan", "--json", path])?.expect(0)?;
    let json = text.find('{').map_or("", |at| &text[at..]);
    let plan: serde_json::Value = serde_json::from_str(json).map_err(|e| format!("{e}: {text}"))?;
    let parts = plan["parts"].as_array().ok_or("a plan without parts")?;
    let births = parts.iter().filter_map(|p| p["name"].as_str()).filter(|n| n.ends_with(": phase birth"));
    let (helpers, births): (Vec<&str>, Vec<&str>) =
        births.partition(|n| n.starts_with("helper ") || n.contains("(stands in for a leader)"));
    let (tasks, zombies) = (manifest.tasks.len(), manifest.zombies.len());
    ensure!(
        births.len() == tasks + zombies,
        "the plan has {} births for {tasks} processes and {zombies} zombies",
        births.len()
    );
    Ok((tasks, zombies, helpers.len()))
}
