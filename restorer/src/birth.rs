//! How processes come into the world: the script of each from its first instruction until the whole tree is
//! there, and the first call of all, which makes the root.
//!
//! The root is made by clone3 with the pid it must have, as a copy of this process that runs the executor from
//! its first instruction; once it has no memory but that, it makes the others, and they theirs, as
//! [`crate::lineage`] says. Nobody goes on before all are born, since groups can be joined only when their
//! leaders are there, and stand-ins end only when nobody needs them any more.
//!
//! Orphans come to their parents before that, one after the other: the parent is the only subreaper for the time in which
//! the one that made the orphan ends. Only then those become subreapers that are to be.

use nix::errno::Errno;
use torpor_blob::ENTRY;
use torpor_image::Image;
use torpor_image::task::Task;
use torpor_image::zombie::Zombie;
use torpor_kernel::process;
use torpor_parasite::call;
use torpor_parasite::script::{OpId, Script, Value};
use torpor_parasite::wire::STACK;

use crate::error::{Error, Result};
use crate::holder;
use crate::host::Host;
use crate::lineage::{Lineage, Role, Stage, Way};
use crate::plan::Place;
use crate::thread::{CLONE_ARGS, SET_TID};

/// Shared words: who waits for a word does nothing before it has its value.
pub(crate) mod word {
    /// 1: the root is traced.
    pub(crate) const ROOT: u32 = 0;
    /// 1: all threads are traced.
    pub(crate) const THREADS: u32 = 1;
    /// Processes that have been born and lead the session or group they are to lead.
    pub(crate) const BORN: u32 = 2;
    /// Processes that are in their group.
    pub(crate) const JOINED: u32 = 3;
    /// 1: all processes are traced.
    pub(crate) const TRACED: u32 = 4;
    /// Steps that orphans have made on the way to their parents, [`TURN`] for each.
    pub(crate) const TURNS: u32 = 5;
    /// Of each task that others help to read its memory: pieces whose pages are there.
    pub(crate) const READ: u32 = 6;
    /// The orphan no longer dies with the one that made it; its parent is a subreaper; the one that made it has
    /// ended; the parent is no subreaper any more.
    pub(crate) const TURN: u32 = 4;
}

const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_NAME: u64 = 15;
/// sched.h, asm-generic/resource.h
const RLIMIT_CORE: u64 = 4;

/// A process of no particular pid that is only there for the time of the restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Helper {
    /// Makes this orphan.
    Maker(usize),
    /// Keeps the group of this process, which goes to another one, until all are in it that are to be.
    Keeper(usize),
}

/// The helpers of a restore, each with its context in the arena.
#[derive(Clone, Debug)]
pub(crate) struct Helpers(pub(crate) Vec<(Helper, u32)>);

impl Helpers {
    /// Everyone that a restore needs, with contexts from `first` on.
    pub(crate) fn of(lineage: &Lineage, first: u32) -> Self {
        let makers = lineage.turns.iter().map(|i| Helper::Maker(*i));
        let left = (0..lineage.nodes.len()).filter(|i| lineage.left_own_group(*i));
        Helpers(makers.chain(left.map(Helper::Keeper)).zip(first..).collect())
    }

    fn context(&self, helper: Helper) -> u32 {
        self.0.iter().find(|h| h.0 == helper).map_or(0, |h| h.1)
    }

    /// The script of each.
    pub(crate) fn scripts(&self, lineage: &Lineage) -> Vec<Script> {
        self.0.iter().map(|(helper, _)| self::helper(lineage, *helper)).collect()
    }
}

/// The script of node `i` from its first instruction on. `fill` adds what makes its memory complete, where
/// others begin with it.
pub(crate) fn plan(
    image: &Image,
    host: &Host,
    lineage: &Lineage,
    i: usize,
    helpers: &Helpers,
    session: impl FnOnce(&mut Script),
    fill: impl FnOnce(&mut Script),
) -> Script {
    let mut script = Script::new();
    let node = &lineage.nodes[i];
    if i != 0 {
        die_with_parent(&mut script, lineage.born_below(i));
    }
    let mut makers = Vec::new();
    let mut spawn_all = |script: &mut Script, stage| {
        for (child, way) in lineage.made_by(i, stage) {
            if way == Way::Orphan {
                makers.push((child, spawn_helper(script, lineage, Helper::Maker(child), helpers)));
            } else {
                spawn(script, image, lineage, child, way);
            }
        }
    };
    spawn_all(&mut script, Stage::Early);
    let left_own_group = lineage.left_own_group(i);
    let mut keeper = None;
    if node.leads_session() {
        call!(script, "a session of its own", libc::SYS_setsid);
    } else if node.leads_group() || left_own_group {
        call!(script, "a process group of its own", libc::SYS_setpgid, 0, 0);
    }
    session(&mut script);
    if left_own_group {
        keeper = Some(spawn_helper(&mut script, lineage, Helper::Keeper(i), helpers));
    }
    spawn_all(&mut script, Stage::Bare);
    if lineage.made_by(i, Stage::Filled).next().is_some() {
        fill(&mut script);
        spawn_all(&mut script, Stage::Filled);
    }
    script.wake("being born", word::BORN);
    script.wait("the birth of all", word::BORN, lineage.born());
    turns(&mut script, lineage, i, &makers);
    if let Role::Task(task) = node.role
        && image.tasks[task].child_subreaper
    {
        if !lineage.turns.is_empty() {
            let steps = word::TURN * lineage.turns.len() as u32;
            script.wait("orphans being with their parents", word::TURNS, steps);
        }
        subreaper(&mut script, true);
    }
    if !node.leads_group() && !node.stand_in() {
        match lineage.outside_group {
            // The root is in it from its birth.
            Some(group) if group == node.pgid && i == 0 && !left_own_group => {}
            Some(group) if group == node.pgid => {
                call!(script, "torpor's process group", libc::SYS_setpgid, 0, host.pgid);
            }
            _ => {
                call!(script, format!("process group {}", node.pgid), libc::SYS_setpgid, 0, node.pgid);
            }
        }
    }
    if !node.stand_in() {
        script.wake("being in its group", word::JOINED);
    }
    if let Some(keeper) = keeper {
        await_end(&mut script, "the end of a process that kept a group", keeper);
    }
    match node.role {
        Role::Task(_) => script.wait("being traced", word::TRACED, 1),
        Role::Zombie(zombie) => {
            script.wait("all being in their groups", word::JOINED, lineage.staying());
            collect_stand_ins(&mut script, lineage, i);
            end(&mut script, &image.manifest.zombies[zombie]);
        }
        Role::Session | Role::Group => {
            script.wait("all being in their groups", word::JOINED, lineage.staying());
            collect_stand_ins(&mut script, lineage, i);
            call!(script, "ending", libc::SYS_exit_group, 0);
        }
    }
    script
}

/// What a process does so that orphans come to their parents: as the orphan, as its parent, or as the one that
/// made the one that made it.
fn turns(script: &mut Script, lineage: &Lineage, i: usize, makers: &[(usize, OpId)]) {
    for (orphan, turn) in lineage.turns.iter().zip(0u32..) {
        let node = &lineage.nodes[*orphan];
        let maker = makers.iter().find(|m| m.0 == *orphan);
        if *orphan != i && node.parent != Some(i) && maker.is_none() {
            continue;
        }
        let first = turn * word::TURN;
        let purpose = format!("the turn of pid {}", node.pid);
        let wait = |script: &mut Script, steps| script.wait(purpose.clone(), word::TURNS, first + steps);
        if *orphan == i {
            wait(script, 0);
            let live = [Value::from(libc::PR_SET_PDEATHSIG), 0.into()];
            script.call("not dying with its parent", libc::SYS_prctl, &live);
            script.wake(purpose.clone(), word::TURNS);
        }
        let parent = node.parent == Some(i);
        if parent {
            wait(script, 1);
            subreaper(script, true);
            script.wake(purpose.clone(), word::TURNS);
        }
        if let Some((_, maker)) = maker {
            await_end(script, "the end of a process that made another", *maker);
            script.wake(purpose.clone(), word::TURNS);
        }
        if *orphan == i {
            wait(script, 3);
            die_with_parent(script, node.parent.map(|p| lineage.nodes[p].pid));
        }
        if parent {
            wait(script, 3);
            subreaper(script, false);
            script.wake(purpose.clone(), word::TURNS);
        }
    }
}

fn subreaper(script: &mut Script, on: bool) {
    let args = [Value::Number(PR_SET_CHILD_SUBREAPER), u64::from(on).into()];
    script.call("the subreaper attribute", libc::SYS_prctl, &args);
}

fn await_end(script: &mut Script, purpose: &'static str, made: OpId) {
    let args = [Value::Result(made), 0.into(), libc::__WALL.into(), 0.into()];
    script.call(purpose, libc::SYS_wait4, &args);
}

/// Should its parent die before it is traced, the new process must not wait for ever: nor if that is dead already,
/// when nobody sends the signal any more. A script that fails without a tracer ends its process.
pub(crate) fn die_with_parent(script: &mut Script, parent: Option<i32>) {
    let die = [Value::from(libc::PR_SET_PDEATHSIG), libc::SIGKILL.into()];
    script.call("dying with its parent", libc::SYS_prctl, &die);
    if let Some(parent) = parent {
        script.call_for("having its parent still", libc::SYS_getppid, &[], parent.into());
    }
}

fn spawn(script: &mut Script, image: &Image, lineage: &Lineage, child: usize, way: Way) {
    let node = &lineage.nodes[child];
    let mut flags = if way == Way::Sibling { libc::CLONE_PARENT as u64 } else { 0 };
    if let Role::Task(task) = node.role {
        let shares = image.tasks[task].shares;
        let flag = |shared: bool, flag: i32| if shared { flag as u64 } else { 0 };
        flags |= flag(shares.memory.is_some(), libc::CLONE_VM)
            | flag(shares.descriptors.is_some(), libc::CLONE_FILES)
            | flag(shares.directories.is_some(), libc::CLONE_FS)
            | flag(shares.signal_actions.is_some(), libc::CLONE_SIGHAND);
    }
    make(script, node.pid, flags, if way == Way::Sibling { 0 } else { node.exit_signal }, child as u32);
}

/// A new process with the given pid.
fn make(script: &mut Script, pid: i32, flags: u64, exit_signal: i32, context: u32) {
    let tid = script.data(&pid.to_ne_bytes());
    let mut args = [0u64; CLONE_ARGS / 8];
    args[0] = flags;
    args[4] = exit_signal as u64;
    args[9] = 1;
    let args = script.words(&args);
    script.point(args.at(SET_TID), tid);
    script.spawn(format!("pid {pid}"), args, context, STACK, Some(i64::from(pid)));
}

fn spawn_helper(script: &mut Script, lineage: &Lineage, helper: Helper, helpers: &Helpers) -> OpId {
    let mut args = [0u64; CLONE_ARGS / 8];
    args[4] = libc::SIGCHLD as u64;
    let args = script.words(&args);
    let purpose = match helper {
        Helper::Maker(orphan) => format!("a process that makes pid {}", lineage.nodes[orphan].pid),
        Helper::Keeper(leader) => format!("a process that keeps group {}", lineage.nodes[leader].pid),
    };
    script.spawn(purpose, args, helpers.context(helper), STACK, None)
}

/// The script of a helper.
fn helper(lineage: &Lineage, helper: Helper) -> Script {
    let mut script = Script::new();
    let maker = match helper {
        Helper::Maker(orphan) => lineage.nodes[orphan].origin.map(|o| o.creator),
        Helper::Keeper(leader) => Some(leader),
    };
    die_with_parent(&mut script, maker.map(|i| lineage.nodes[i].pid));
    match helper {
        Helper::Maker(orphan) => {
            let node = &lineage.nodes[orphan];
            make(&mut script, node.pid, 0, node.exit_signal, orphan as u32);
            let turn = lineage.turns.iter().position(|i| *i == orphan).unwrap_or(0) as u32;
            script.wait("the turn of its child", word::TURNS, word::TURN * turn + 2);
        }
        Helper::Keeper(_) => {
            script.wait("all being in their groups", word::JOINED, lineage.staying());
        }
    }
    call!(script, "ending", libc::SYS_exit_group, 0);
    script
}

/// Waits for the end of stand-ins and zombies, and forgets the signals that came of it.
pub(crate) fn collect_children(script: &mut Script, lineage: &Lineage, i: usize) {
    let mut signals = collect_stand_ins(script, lineage, i);
    for node in lineage.nodes.iter().filter(|n| n.parent == Some(i) && matches!(n.role, Role::Zombie(_))) {
        let info = script.reserve(128);
        let purpose = format!("the end of pid {}, a zombie", node.pid);
        let how = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        call!(script, purpose, libc::SYS_waitid, libc::P_PID, node.pid, info, how, 0);
        signals.push(node.exit_signal);
    }
    let made = [Stage::Early, Stage::Bare].into_iter().flat_map(|stage| lineage.made_by(i, stage));
    if made.into_iter().any(|(_, way)| way == Way::Orphan) || lineage.left_own_group(i) {
        signals.push(libc::SIGCHLD);
    }
    forget(script, &signals);
}

/// Takes pending signals away. A process whose end is not told by any has exit signal 0.
pub(crate) fn forget(script: &mut Script, signals: &[i32]) {
    for signal in signals.iter().filter(|s| **s != 0) {
        let set = script.words(&[1u64 << (signal - 1)]);
        let zero = script.words(&[0, 0]);
        let args = [set.into(), 0.into(), zero.into(), 8.into()];
        script.try_call("signals of ended stand-ins", libc::SYS_rt_sigtimedwait, &args);
    }
}

fn collect_stand_ins(script: &mut Script, lineage: &Lineage, i: usize) -> Vec<i32> {
    let mut signals = Vec::new();
    for node in lineage.nodes.iter().filter(|n| n.parent == Some(i) && n.stand_in()) {
        let purpose = format!("the end of pid {}, which stood in for a leader", node.pid);
        let args = [Value::from(node.pid), 0.into(), libc::__WALL.into(), 0.into()];
        script.call(purpose, libc::SYS_wait4, &args);
        signals.push(node.exit_signal);
    }
    signals
}

/// Ends as the zombie has ended.
fn end(script: &mut Script, zombie: &Zombie) {
    let name = script.c_string(&zombie.name);
    script.call("the name", libc::SYS_prctl, &[Value::Number(PR_SET_NAME), name.into()]);
    let signal = zombie.status & 0x7f;
    if signal == 0 {
        call!(script, "ending", libc::SYS_exit_group, (zombie.status >> 8) & 0xff);
        return;
    }
    let none = script.words(&[0, 0]);
    script.call(
        "writing no core",
        libc::SYS_prlimit64,
        &[0.into(), Value::Number(RLIMIT_CORE), none.into(), 0.into()],
    );
    let default = script.words(&[0, 0, 0, 0]);
    if signal != libc::SIGKILL {
        call!(script, "ending by a signal", libc::SYS_rt_sigaction, signal, default, 0, 8);
    }
    call!(script, "ending by a signal", libc::SYS_kill, zombie.pid.0, signal);
    let set = script.words(&[1u64 << (signal - 1)]);
    call!(script, "ending by a signal", libc::SYS_rt_sigprocmask, libc::SIG_UNBLOCK, set, 0, 8);
    call!(script, "ending", libc::SYS_exit_group, 1);
}

/// asm-generic/rseq.h and glibc's sysdeps: the signature glibc registers with.
const RSEQ_SIGNATURE: u32 = if cfg!(target_arch = "aarch64") { 0xd428_bc00 } else { 0x5305_3053 };
const RSEQ_FLAG_UNREGISTER: i32 = 1;

/// Makes the root; it waits for its shared word. `context` and `stack` are addresses in the arena.
pub(crate) fn spawn_root(place: &Place, root: &Task, trap: i32, context: u64, stack: u64) -> Result<()> {
    let pid = root.pid.0;
    let mut args = [0u64; CLONE_ARGS / 8];
    args[4] = libc::SIGCHLD as u64;
    args[5] = stack;
    args[6] = STACK;
    args[8] = (&raw const pid) as u64;
    args[9] = 1;
    let rseq = Rseq::take();
    // The new task must not run handlers of ours, nor miss its trap. Signals of libc's own are blocked too,
    // which its wrapper would not do.
    let mask: u64 = !(1 << (trap - 1));
    let mut before = 0u64;
    // SAFETY: rt_sigprocmask reads and fills masks of eight bytes. `spawn` gets arguments for clone3 as
    // described there: a stack of its own, and executor and context that the copy of our memory has too.
    // Between the two masks nothing of ours runs in the child.
    let got = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut before, 8);
        let got = arch::spawn(args.as_ptr() as u64, CLONE_ARGS as u64, place.blob + ENTRY, context);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
        got
    };
    drop(rseq);
    if got >= 0 {
        return Ok(());
    }
    Err(failure(&root.title(), pid, Errno::from_raw(-got as i32)))
}

/// Why an id could not be had.
pub(crate) fn failure(task: &str, id: i32, errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => match holder::of_pid(id) {
            Some((why, remedy)) => Error::Conflict { what: task.to_owned(), why, remedy: remedy.into() },
            None => Error::Fleeting { what: task.to_owned(), id },
        },
        Errno::EAGAIN => Error::Limit {
            what: task.to_owned(),
            call: "clone3",
            errno,
            remedy: "raise the limit of processes (`ulimit -u`, pids.max of the cgroup), or end some of that user's",
        },
        Errno::EPERM => Error::Permission {
            what: task.to_owned(),
            call: "clone3 with a given pid",
            errno,
            remedy: "run torpor as root or with CAP_CHECKPOINT_RESTORE",
        },
        Errno::EINVAL => Error::Unfit {
            what: task.to_owned(),
            why: match process::pid_max() {
                Some(max) if id >= max => format!("pid {id} is beyond the highest here, {}", max - 1),
                _ => "the kernel gives no pid on request: it is older than Linux 5.5, or this pid namespace has no \
                      first process yet"
                    .into(),
            },
            remedy: match process::pid_max() {
                Some(max) if id >= max => "raise /proc/sys/kernel/pid_max",
                _ => "begin the namespace with `unshare --fork --pid`, or use a newer kernel",
            }
            .into(),
        },
        errno => Error::Open { what: task.to_owned(), call: "clone3", errno },
    }
}

/// The rseq area of this thread, given back on drop. A copy of this process would inherit its
/// registration, and be killed by the kernel once that memory is unmapped.
struct Rseq {
    registered: Option<(u64, u32)>,
}

impl Rseq {
    fn take() -> Self {
        // SAFETY: looks a symbol up by a name that ends with a zero.
        let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
        if offset.is_null() {
            return Rseq { registered: None };
        }
        // SAFETY: glibc defines the symbol as a constant ptrdiff_t (sys/rseq.h).
        let offset = unsafe { offset.cast::<isize>().read() };
        let address = arch::cpu::thread_pointer().wrapping_add_signed(offset as i64);
        // 32 bytes were registered up to glibc 2.39; later what the kernel asks for in the auxiliary vector.
        // SAFETY: getauxval takes a number.
        let wanted = unsafe { libc::getauxval(27) } as u32;
        let registered =
            [32, wanted.max(32)].into_iter().find(|size| call(address, *size, RSEQ_FLAG_UNREGISTER));
        Rseq { registered: registered.map(|size| (address, size)) }
    }
}

impl Drop for Rseq {
    fn drop(&mut self) {
        if let Some((address, size)) = self.registered {
            call(address, size, 0);
        }
    }
}

fn call(address: u64, size: u32, flags: i32) -> bool {
    // SAFETY: the area belongs to this thread for its whole life.
    unsafe { libc::syscall(libc::SYS_rseq, address, size, flags, RSEQ_SIGNATURE) == 0 }
}
