//! Trees of processes as they come about, planned and born again in a little kernel.
//!
//! A history of calls, all of them legal, begins with one process. What there is at its end must be planned, and
//! the scripts of the plan must bring it about, in whatever order the processes get to run: every call succeeds,
//! nobody waits for ever, and nothing else is left in the end.

use std::collections::BTreeMap;

use proptest::prelude::*;
use torpor_image::extent::{Extents, Record, Where};
use torpor_image::manifest::ImageFile;
use torpor_image::task::Task;
use torpor_image::zombie::Zombie;
use torpor_image::{Image, Pid};
use torpor_parasite::script::{OpId, Script, Step, Value};
use torpor_parasite::wire::kind;

use super::kernel::{INIT, Kernel, Process};
use super::{bytes, host, parts, thread};
use crate::birth::word;
use crate::lineage::Role;
use crate::plan::{Options, Plan, plan};

const TORPOR: i32 = 3;
/// Of torpor's; its group is that of `host()`.
const SESSION: i32 = 2;
/// Where pids begin that nobody asked for.
const FREE: i32 = 1_000_000;
/// The session and group a root is in that has made none.
const OUTSIDE: (i32, i32) = (20, 21);

/// One thing that a process does: which one of what is possible, who, and with what.
type Act = (u8, u8, u8);

/// A history of a tree, and its state in the end.
struct History {
    kernel: Kernel,
    root: i32,
    told: Vec<String>,
}

impl History {
    fn of(acts: &[Act], own_session: bool) -> Self {
        let mut kernel = Kernel::new(100);
        kernel.put(OUTSIDE.0, INIT, OUTSIDE.0, OUTSIDE.0);
        kernel.put(OUTSIDE.1, OUTSIDE.0, OUTSIDE.1, OUTSIDE.0);
        let root = kernel.fork(OUTSIDE.1, false, libc::SIGCHLD, None).expect("a root");
        if own_session {
            kernel.setsid(root).expect("it leads no group");
        }
        let mut history = History { kernel, root, told: Vec::new() };
        for act in acts {
            history.act(*act);
        }
        history
    }

    fn act(&mut self, (what, who, with): Act) {
        let tree = self.kernel.tree(self.root);
        let living: Vec<i32> = tree.iter().copied().filter(|p| self.kernel.lives(*p)).collect();
        // The young ones a bit more often: long lines of descent are where it gets hard.
        let mut at = usize::from(who) * living.len() / 256;
        if with % 3 == 0 {
            at = at.max(usize::from(who) / 2 * living.len() / 128);
        }
        let by = living[at];
        let process = self.kernel.processes[&by].clone();
        let kernel = &mut self.kernel;
        let told = match what {
            0..=69 => {
                // Of a session that the root has left, an image does not tell that it came from outside. A stand-in
                // leads it, whose children have one signal.
                let signal = match with {
                    _ if by == self.root && process.sid != by => libc::SIGCHLD,
                    250.. => libc::SIGUSR1,
                    245.. => 0,
                    _ => libc::SIGCHLD,
                };
                kernel.fork(by, false, signal, None).map(|pid| format!("forks {pid} {signal}"))
            }
            70..=79 if by != self.root => {
                kernel.fork(by, true, 0, None).map(|pid| format!("clones {pid} as a sibling"))
            }
            80..=119 => kernel.setsid(by).map(|_| "setsid".to_owned()),
            120..=139 => kernel.setpgid(by, 0).map(|_| "a group of its own".to_owned()),
            140..=169 => {
                let own = tree.iter().map(|pid| &kernel.processes[pid]);
                let groups: Vec<i32> = own.filter(|p| p.sid == process.sid).map(|p| p.pgid).collect();
                let pgid = groups[usize::from(with) * groups.len() / 256];
                kernel.setpgid(by, pgid).map(|_| format!("joins group {pgid}"))
            }
            170..=189 => {
                kernel.processes.get_mut(&by).expect("it lives").subreaper = with % 4 != 0;
                Ok(format!("subreaper {}", with % 4 != 0))
            }
            190..=239 if by != self.root => {
                let status =
                    if with % 2 == 0 { i32::from(with) << 8 } else { [9, 15, 11][usize::from(with) % 3] };
                kernel.end(by, status);
                if what < 225 && kernel.processes.contains_key(&by) {
                    kernel.wait(process.parent, by).expect("a child");
                    Ok("ends".into())
                } else {
                    Ok(format!("ends as a zombie, {status}"))
                }
            }
            240.. => {
                let ended = |c: &i32| !kernel.lives(*c);
                match kernel.children(by).into_iter().find(ended) {
                    Some(child) => kernel.wait(by, child).map(|_| format!("collects {child}")),
                    None => return,
                }
            }
            _ => return,
        };
        if let Ok(told) = told {
            self.told.push(format!("{by} {told}"));
        }
        // Whoever leaves the tree is gone for us.
        for lost in self.kernel.children(INIT).into_iter().filter(|p| *p > self.root) {
            for pid in self.kernel.tree(lost) {
                self.kernel.processes.remove(&pid);
            }
        }
    }

    /// What a dump would have.
    fn image(&self, related: u8) -> Image {
        let mut parts = parts();
        parts.records =
            vec![Record { address: 0x10_0000_0000, length: 4096, place: Where::Data, file: 0, offset: 0 }];
        parts.manifest.files.push(ImageFile { name: "pages-0.dat".into(), size: 4096, crc32c: 0 });
        let (mut tasks, mut zombies) = (Vec::new(), Vec::new());
        for (n, pid) in self.kernel.tree(self.root).into_iter().enumerate() {
            let process = &self.kernel.processes[&pid];
            let ids = (Pid(pid), Pid(process.parent), Pid(process.pgid), Pid(process.sid));
            if let Some(status) = process.ended {
                let (pid, ppid, pgid, sid) = ids;
                let exit_signal = process.exit_signal;
                zombies.push(Zombie { pid, ppid, pgid, sid, name: bytes("gone"), status, exit_signal });
                continue;
            }
            let mut task =
                Task { threads: vec![thread(pid)], child_subreaper: process.subreaper, ..parts.task.clone() };
            (task.pid, task.ppid, task.pgid, task.sid) = ids;
            task.exit_signal = process.exit_signal;
            // Some have a page in common with their parents.
            if related >> (n % 8) & 1 != 0 {
                task.memory.pages = Extents { first: 0, count: 1 };
            }
            tasks.push(task);
        }
        parts.manifest.root = Pid(self.root);
        parts.manifest.tasks = tasks.iter().map(|t| t.pid).collect();
        parts.manifest.zombies = zombies;
        Image::from_parts("/nowhere".into(), parts.manifest, tasks, parts.objects, parts.records)
            .expect("the parts fit together")
    }
}

/// A process under restore.
struct Runner<'p> {
    scripts: Vec<&'p Script>,
    at: (usize, usize),
    results: BTreeMap<(usize, u32), i64>,
    pending: Option<i32>,
}

/// The scripts of a plan, run in the little kernel.
struct Machine<'p> {
    plan: &'p Plan,
    kernel: Kernel,
    running: BTreeMap<i32, Runner<'p>>,
    words: BTreeMap<u32, u32>,
    random: u64,
}

/// What came of a step.
enum Went {
    On(i64),
    Waits,
    Ended,
}

impl<'p> Machine<'p> {
    fn run(plan: &'p Plan, random: u64) -> Result<Kernel, String> {
        let mut kernel = Kernel::new(FREE);
        kernel.put(SESSION, INIT, SESSION, SESSION);
        kernel.put(TORPOR, SESSION, host().pgid, SESSION);
        kernel.processes.get_mut(&TORPOR).expect("torpor").subreaper = random.is_multiple_of(2);
        let root = plan.lineage.nodes[0].pid;
        kernel.fork(TORPOR, false, libc::SIGCHLD, Some(root)).map_err(|e| format!("the root: {e}"))?;
        let mut machine =
            Machine { plan, kernel, running: BTreeMap::new(), words: BTreeMap::new(), random: random | 1 };
        machine.start(root, 0);
        machine.words.insert(word::ROOT, 1);
        loop {
            if machine.word(word::JOINED) >= plan.lineage.staying() {
                machine.words.insert(word::TRACED, 1);
            }
            let mut all: Vec<i32> = machine.running.keys().copied().collect();
            let mut went = false;
            while !all.is_empty() && !went {
                machine.random ^= machine.random << 13;
                machine.random ^= machine.random >> 7;
                machine.random ^= machine.random << 17;
                let pid = all.swap_remove(machine.random as usize % all.len());
                went = machine.step(pid)?;
            }
            if !went {
                break;
            }
        }
        let done = |r: &Runner<'_>| r.at.0 == r.scripts.len();
        let stuck: Vec<String> = machine
            .running
            .iter()
            .filter(|(_, r)| !done(r))
            .map(|(pid, r)| format!("{pid} at `{}`", r.scripts[r.at.0].steps()[r.at.1].purpose))
            .collect();
        if stuck.is_empty() { Ok(machine.kernel) } else { Err(format!("these wait for ever: {stuck:?}")) }
    }

    fn word(&self, word: u32) -> u32 {
        self.words.get(&word).copied().unwrap_or(0)
    }

    /// Begins the scripts of a context.
    fn start(&mut self, pid: i32, context: u32) {
        let (plan, context) = (self.plan, context as usize);
        let mut scripts: Vec<&Script> = Vec::new();
        if context == 0 {
            scripts.extend(plan.begin.iter().map(|p| &p.script));
        }
        match plan.births.get(context) {
            Some(birth) => scripts.push(birth),
            None => scripts.push(&plan.helpers[context - plan.first_helper()]),
        }
        if let Some(task) = plan.tasks.get(context) {
            scripts.extend(task.phases.iter().filter(|p| p.name == "threads").map(|p| &p.script));
        }
        let runner = Runner { scripts, at: (0, 0), results: BTreeMap::new(), pending: None };
        self.running.insert(pid, runner);
    }

    /// Runs one operation of a process; false if it waits or is through.
    fn step(&mut self, pid: i32) -> Result<bool, String> {
        let Some(runner) = self.running.get_mut(&pid) else { return Ok(false) };
        while runner.scripts.get(runner.at.0).is_some_and(|s| s.steps().len() == runner.at.1) {
            runner.at = (runner.at.0 + 1, 0);
        }
        let at = runner.at;
        let Some(script) = runner.scripts.get(at.0).copied() else { return Ok(false) };
        let step = &script.steps()[at.1];
        let went = self.operation(pid, script, step)?;
        let killed: Vec<i32> = self.running.keys().copied().filter(|p| !self.kernel.lives(*p)).collect();
        for other in killed {
            self.running.remove(&other);
            if other != pid {
                return Err(format!("{other} was killed when {pid} ended"));
            }
        }
        match went {
            Went::Waits => Ok(false),
            Went::Ended => Ok(true),
            Went::On(result) => {
                let good = match step.expect {
                    0 => true,
                    1 => result >= 0,
                    _ => result == step.expected,
                };
                if !good {
                    return Err(format!("{pid}: {}: {result}, not {}", step.purpose, step.expected));
                }
                let runner = self.running.get_mut(&pid).expect("it runs");
                runner.results.insert((at.0, at.1 as u32), result);
                runner.at = (at.0, at.1 + 1);
                Ok(true)
            }
        }
    }

    fn number(&self, pid: i32, value: Value) -> i64 {
        let runner = &self.running[&pid];
        match value {
            Value::Number(n) => n as i64,
            Value::Result(OpId(of)) => runner.results[&(runner.at.0, of)],
            other => panic!("{other:?} is no number"),
        }
    }

    fn operation(&mut self, pid: i32, script: &Script, step: &Step) -> Result<Went, String> {
        let number = |n: usize| self.number(pid, step.args[n]);
        let result =
            |r: Result<i32, nix::errno::Errno>| Went::On(r.map_or_else(|e| -i64::from(e as i32), i64::from));
        Ok(match step.kind {
            kind::WAIT | kind::WAKE => {
                let Value::Shared(word) = step.args[0] else { panic!("{:?}", step.args[0]) };
                let value = number(1) as u32;
                if step.kind == kind::WAKE {
                    *self.words.entry(word).or_default() += value;
                    Went::On(0)
                } else if self.word(word) >= value {
                    Went::On(0)
                } else {
                    Went::Waits
                }
            }
            kind::SPAWN => {
                let (Value::Address(args), Value::Context(context)) = (step.args[0], step.args[2]) else {
                    panic!("{:?}", step.args)
                };
                let word =
                    |n: u32| u64::from_ne_bytes(script.bytes(args.at(8 * n))[..8].try_into().expect("8"));
                let flags = word(0);
                if flags & !(libc::CLONE_PARENT as u64) != 0 {
                    return Err(format!("{pid}: {}: flags {flags:x}", step.purpose));
                }
                let wanted = (word(9) == 1).then_some(step.expected as i32);
                let sibling = flags != 0;
                if sibling && word(4) != 0 {
                    return Err(format!("{pid}: {}: a signal with CLONE_PARENT", step.purpose));
                }
                let made = self.kernel.fork(pid, sibling, word(4) as i32, wanted);
                if let Ok(made) = made {
                    self.start(made, context);
                }
                result(made)
            }
            kind::CALL => match step.nr {
                libc::SYS_setsid => result(self.kernel.setsid(pid)),
                libc::SYS_getppid => Went::On(self.kernel.processes[&pid].parent.into()),
                libc::SYS_setpgid => {
                    let (who, pgid) = (number(0), number(1) as i32);
                    assert_eq!(who, 0, "of another process");
                    result(self.kernel.setpgid(pid, pgid))
                }
                libc::SYS_prctl => {
                    let (what, value) = (number(0) as i32, step.args[1]);
                    let process = self.kernel.processes.get_mut(&pid).expect("it calls");
                    match (what, value) {
                        (libc::PR_SET_PDEATHSIG, Value::Number(signal)) => {
                            process.death_signal = signal as i32
                        }
                        (libc::PR_SET_CHILD_SUBREAPER, Value::Number(on)) => process.subreaper = on != 0,
                        _ => {}
                    }
                    Went::On(0)
                }
                libc::SYS_wait4 => match self.kernel.wait(pid, number(0) as i32) {
                    Ok(None) => Went::Waits,
                    Ok(Some(child)) => Went::On(child.into()),
                    Err(e) => Went::On(-i64::from(e as i32)),
                },
                libc::SYS_waitid => match self.kernel.processes.get(&(number(1) as i32)) {
                    Some(p) if p.parent != pid => Went::On(-i64::from(libc::ECHILD)),
                    Some(p) if p.ended.is_none() => Went::Waits,
                    Some(_) => Went::On(0),
                    None => Went::On(-i64::from(libc::ECHILD)),
                },
                libc::SYS_exit_group => {
                    let status = (number(0) as i32 & 0xff) << 8;
                    self.kernel.end(pid, status);
                    Went::Ended
                }
                libc::SYS_kill => {
                    let (who, signal) = (number(0) as i32, number(1) as i32);
                    assert_eq!(who, pid, "it ends itself");
                    if signal == libc::SIGKILL {
                        self.kernel.end(pid, signal);
                        return Ok(Went::Ended);
                    }
                    self.running.get_mut(&pid).expect("it runs").pending = Some(signal);
                    Went::On(0)
                }
                libc::SYS_rt_sigprocmask => match self.running[&pid].pending {
                    Some(signal) => {
                        self.kernel.end(pid, signal);
                        Went::Ended
                    }
                    None => Went::On(0),
                },
                // Memory and the like.
                _ => Went::On(step.expected),
            },
            _ => Went::On(0),
        })
    }
}

/// Plans what a history has left, brings it about, and compares.
fn comes_again(history: &History, related: u8, random: u64) -> Result<(), String> {
    let image = history.image(related);
    let plan = plan(&image, &host(), &Options::default()).map_err(|e| format!("refused: {e}"))?;
    let staying = plan.lineage.nodes.iter().filter(|n| matches!(n.role, Role::Task(_) | Role::Zombie(_)));
    assert_eq!(staying.count(), image.tasks.len() + image.manifest.zombies.len());
    let told = |e: String| {
        let text = plan.to_string();
        let births = text.split("\npid ").filter(|part| part.contains(": phase birth"));
        format!("{}\n{e}", births.collect::<Vec<_>>().join("\n"))
    };
    let after = Machine::run(&plan, random).map_err(told)?;
    let outside = |p: &Process| Process {
        sid: if plan.lineage.outside_session == Some(p.sid) { SESSION } else { p.sid },
        pgid: if plan.lineage.outside_group == Some(p.pgid) { host().pgid } else { p.pgid },
        ..p.clone()
    };
    let mut expected: BTreeMap<i32, Process> = history
        .kernel
        .tree(history.root)
        .into_iter()
        .map(|p| (p, outside(&history.kernel.processes[&p])))
        .collect();
    expected.get_mut(&history.root).expect("the root").parent = TORPOR;
    for process in expected.values_mut() {
        // Until they are let go, all die with their parents.
        process.death_signal = libc::SIGKILL;
        process.subreaper &= process.ended.is_none();
    }
    let mut born = after.processes;
    for own in [INIT, SESSION, TORPOR] {
        born.remove(&own);
    }
    for process in born.values_mut() {
        process.subreaper &= process.ended.is_none();
    }
    for pid in expected.keys().chain(born.keys()) {
        let (wanted, got) = (expected.get(pid), born.get(pid));
        if wanted != got {
            return Err(told(format!("{pid} is {got:?} instead of {wanted:?}")));
        }
    }
    Ok(())
}

fn cases() -> u32 {
    std::env::var("LINEAGE_CASES").ok().and_then(|c| c.parse().ok()).unwrap_or(500)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(), failure_persistence: None, max_shrink_iters: 20_000, ..ProptestConfig::default()
    })]

    #[test]
    fn every_tree_that_came_about_comes_about_again(
        acts in prop::collection::vec(any::<Act>(), 0..120),
        own_session: bool,
        related: u8,
        random: u64,
    ) {
        let history = History::of(&acts, own_session);
        if let Err(e) = comes_again(&history, related, random) {
            return Err(TestCaseError::fail(format!("{}\n{e}", history.told.join("\n"))));
        }
    }
}
