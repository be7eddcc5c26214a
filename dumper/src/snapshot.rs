//! Copy-on-write children (`--freeze fork`): a tree goes on at once, and its memory is read from copies of it.
//!
//! # What must not be seen of them
//! A child can be waited for by the process that made it, also one without an exit signal (wait(2), `__WALL`). So every
//! process makes two: the first shares its memory, as one of vfork(2) does, makes the second, the copy, and ends; it is
//! collected by the process itself, entered as it is, before that goes on. The copy is then a child of whoever
//! collects orphans (kernel/exit.c, `forget_original_parent`), and its end is told to that one. Where this would be a
//! member of the tree (`PR_SET_CHILD_SUBREAPER`, the init of a pid namespace) no copy is made.
//!
//! Before the copy is made the first child lets go of all descriptors, by giving itself a table that is empty
//! (close_range(2), `CLOSE_RANGE_UNSHARE`): closing those of a copied table would be noticed by some, and a pipe would
//! not end that somebody holds open. It goes into a session of its own, so that signals to groups miss the copy. Shared
//! mappings are kept out of the copy by `MADV_DONTFORK`, for as long as it takes to make it: System V shared memory
//! counts who has it attached.
//!
//! # What keeps it from staying
//! The copy is traced from its birth, never runs an instruction, and ends with its tracer (ptrace(2),
//! `PTRACE_O_EXITKILL`). That option can be given to it by way of the first child only: one given to the process
//! would end that too. Were we killed before it is set, both children run on, and exit by their scripts; and so
//! does the process to the end of its own script, which puts everything back.
//!
//! # What it costs
//! Page tables for the copy inside the freeze; then a page for every page that the process writes before it has been
//! read. It shall not be the process that ends for want of memory: a copy is the first to be taken
//! (proc_pid_oom_score_adj(5)), and then memory is copied in a second freeze.

use std::collections::HashSet;
use std::marker::PhantomData;

use torpor_image::manifest::Freeze;
use torpor_image::vma::Vma;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::maps::Mapping;
use torpor_kernel::ptrace::{self, Stop};
use torpor_kernel::{cgroup, process, status};
use torpor_parasite::script::{OpId, Script, Value};

use crate::error::{Error, Result};
use crate::stage;
use crate::survey::Survey;

/// Memory below this is copied sooner than a process has been made to fork.
const WORTH: u64 = 64 << 20;
/// Tasks that a limit must leave to the program besides those that we make.
const SPARE_TASKS: u64 = 32;
/// Shared mappings that are kept out of a copy, each by two calls; of more only those that are counted.
const MOST_SHARED: usize = 2000;

/// linux/sched.h
const CLONE_ARGS: usize = 8;
/// asm-generic/mman-common.h
const MADV_DONTFORK: u64 = 10;
const MADV_DOFORK: u64 = 11;
const CLOSE_RANGE_UNSHARE: u64 = 1 << 1;

/// In which way memory is taken, and why not in a better one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// The way.
    pub freeze: Freeze,
    /// What stands in the way of the one that was asked for, or that would have been chosen.
    pub fallback: Option<String>,
}

impl Way {
    /// By copying, because of this.
    pub fn copy_because(why: String) -> Self {
        Way { freeze: Freeze::Copy, fallback: Some(why) }
    }
}

/// Chooses a way for a tree with so much anonymous memory.
pub(crate) fn choose(
    root: Pid,
    survey: &Survey,
    anonymous: u64,
    wish: Option<Freeze>,
    runs_on: bool,
) -> Result<Way> {
    match wish {
        Some(Freeze::Track) => {
            Err(Error::Declined { pid: root, freeze: Freeze::Track, why: "this build cannot do that".into() })
        }
        Some(Freeze::Copy) => Ok(Way::default()),
        None if !runs_on || anonymous < WORTH => Ok(Way::default()),
        None | Some(Freeze::Fork) => {
            let processes: Vec<Pid> = survey.processes.iter().map(|p| p.pid).collect();
            let fork = Way { freeze: Freeze::Fork, fallback: None };
            Ok(obstacle(&processes, anonymous).map_or(fork, Way::copy_because))
        }
    }
}

/// What stands in the way of copies of these processes; as far as it can be told while they run.
fn obstacle(processes: &[Pid], anonymous: u64) -> Option<String> {
    let mib = |bytes: u64| bytes >> 20;
    if stage::available() < anonymous + anonymous / 16 {
        return Some(format!(
            "the machine has {} MiB of memory left, and the program may write to {} MiB while they are read",
            mib(stage::available()),
            mib(anonymous)
        ));
    }
    let new = processes.len() as u64 + 1;
    let mut seen = HashSet::new();
    for pid in processes {
        // As a rule all are in the same.
        if cgroup::groups(*pid).is_ok_and(|groups| !seen.insert(groups)) {
            continue;
        }
        if let Some(left) = cgroup::memory_left_of(*pid).filter(|left| *left < anonymous + anonymous / 16) {
            return Some(format!(
                "the memory control group of pid {pid} has {} MiB left, and the program may write to {} MiB while \
                 they are read",
                mib(left),
                mib(anonymous)
            ));
        }
        if let Some(left) = cgroup::tasks_left_of(*pid).filter(|left| *left < new + SPARE_TASKS) {
            return Some(format!(
                "the control group of pid {pid} may have {left} more tasks only (pids.max)"
            ));
        }
    }
    for pid in processes {
        if let Some((limit, used)) = tasks_of_user(*pid).filter(|(l, used)| used + new + SPARE_TASKS > *l) {
            return Some(format!("its user may have {limit} tasks (RLIMIT_NPROC), and has {used}"));
        }
    }
    None
}

/// How many tasks the user of a process may have, and how many there are; `None` where no limit holds or is near.
fn tasks_of_user(pid: Pid) -> Option<(u64, u64)> {
    let status = status::of_process(pid).ok()?;
    const SYS_ADMIN_OR_RESOURCE: u64 = 1 << 21 | 1 << 24;
    if status.uids[0] == 0 || status.cap_effective & SYS_ADMIN_OR_RESOURCE != 0 {
        return None;
    }
    let limit = process::task_limit(pid)?;
    // As a rule there are fewer tasks on the whole machine.
    let all = process::tasks_of_all_users()?;
    if all + 2 * SPARE_TASKS <= limit {
        return None;
    }
    Some((limit, process::tasks_of_user(status.uids[0])))
}

/// Whether an area's pages are in the copy as they are in the process.
pub(crate) fn copies(vma: &Vma) -> bool {
    !vma.advice.iter().any(|a| [libc::MADV_DONTFORK, libc::MADV_WIPEONFORK].contains(a))
}

/// What stands in the way of a copy of a process that stands.
pub(crate) fn obstacle_of(pid: Pid, own_tgid: i32, subreaper: bool) -> Option<String> {
    if subreaper {
        return Some(format!(
            "pid {pid} collects orphans (PR_SET_CHILD_SUBREAPER) and would find the copies"
        ));
    }
    if own_tgid == 1 {
        return Some(format!("pid {pid} is the init of its pid namespace and would find the copies"));
    }
    if std::fs::read_link(format!("/proc/{pid}/ns/pid_for_children")).is_err() {
        return Some(format!("the next child of pid {pid} would be the init of a new pid namespace"));
    }
    None
}

/// The scripts by which a process makes a copy of itself.
#[derive(Debug)]
pub(crate) struct Birth {
    /// Of the process, of its first child, and of the copy: the latter two in the order of their contexts.
    pub(crate) process: Script,
    pub(crate) children: [Script; 2],
    made: OpId,
    ordered: OpId,
}

/// Context numbers of the two children.
pub(crate) const CHILDREN: usize = 2;

impl Birth {
    /// For a process with these areas; `stack` is the size of each child's stack.
    pub(crate) fn of(maps: &[Mapping], stack: u64) -> Self {
        let n = Value::Number;
        let mut copy = Script::new();
        copy.call("the end of an untraced copy", libc::SYS_exit_group, &[n(0)]);

        let mut first = Script::new();
        let all = [n(0), n(u64::from(u32::MAX)), n(CLOSE_RANGE_UNSHARE)];
        first.call("an empty table of descriptors", libc::SYS_close_range, &all);
        first.call("a session of its own", libc::SYS_setsid, &[]);
        let name = first.data(b"torpor-snapshot\0");
        first.try_call("its name", libc::SYS_prctl, &[n(libc::PR_SET_NAME as u64), name.into()]);
        let plain = first.words(&[0; CLONE_ARGS]);
        let ordered = first.spawn("the copy", plain, 1, stack, None);
        first.call("its end", libc::SYS_exit_group, &[n(0)]);

        let mut process = Script::new();
        let apart = apart(maps);
        for (start, length) in &apart {
            let args = [n(*start), n(*length), n(MADV_DONTFORK)];
            process.try_call("keeping shared memory out", libc::SYS_madvise, &args);
        }
        let shared = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS;
        let mut words = [0; CLONE_ARGS];
        words[0] = shared as u64;
        let words = process.words(&words);
        let made = process.try_spawn("the copy's parent", words, 0, stack);
        // By waitid: were there no child, waitpid would take the number of the error for that of a process group.
        let (kind, how) = (u64::from(libc::P_PID), (libc::WEXITED | libc::__WALL) as u64);
        let args = [n(kind), made.into(), n(0), n(how), n(0)];
        process.try_call("its end", libc::SYS_waitid, &args);
        for (start, length) in &apart {
            let args = [n(*start), n(*length), n(MADV_DOFORK)];
            process.try_call("shared memory as before", libc::SYS_madvise, &args);
        }
        Birth { process, children: [first, copy], made, ordered }
    }

    /// Why there is no copy, from what the scripts of the process and of its first child left.
    pub(crate) fn why(
        &self,
        process: &torpor_parasite::script::Outcome,
        first: &torpor_parasite::script::Outcome,
    ) -> String {
        let text = |result: i64| nix::errno::Errno::from_raw(-result as i32).to_string();
        if !process.ok(self.made) {
            return format!("clone3(2) in it failed ({})", text(process.result(self.made)));
        }
        let failed = (0..=self.ordered.0).map(OpId).find(|op| !first.ok(*op));
        match failed {
            Some(op) => {
                let purpose = &self.children[0].steps()[op.0 as usize].purpose;
                format!("{purpose} could not be had ({})", text(first.result(op)))
            }
            None => "the copy ended".into(),
        }
    }
}

/// Shared areas that are to be kept out: start and length of each.
fn apart(maps: &[Mapping]) -> Vec<(u64, u64)> {
    // Of some the kernel does not take it back (mm/madvise.c), and others are none of memory. A shared mapping of what
    // is open for reading only counts as one that may be shared (mm/mmap.c, `do_mmap`).
    let may = |m: &&Mapping| {
        m.flags.has("ms") && !["dc", "io", "pf", "mm", "de", "ht"].iter().any(|word| m.flags.has(word))
    };
    let mut all: Vec<&Mapping> = maps.iter().filter(may).collect();
    if all.len() > MOST_SHARED {
        all.retain(|m| m.path.starts_with(b"/SYSV"));
    }
    all.into_iter().map(|m| (m.start, m.end - m.start)).collect()
}

/// The copy of a process: it stands, traced by this thread. Dropped, it has ended.
#[derive(Debug)]
pub(crate) struct Snapshot {
    tid: Tid,
    killed: bool,
    gone: bool,
    _bound_to_thread: PhantomData<*const ()>,
}

impl Snapshot {
    /// Takes charge of a child that was born traced.
    pub(crate) fn of(tid: Tid) -> Self {
        Snapshot { tid, killed: false, gone: false, _bound_to_thread: PhantomData }
    }

    /// By which /proc knows it.
    pub(crate) fn pid(&self) -> Pid {
        Pid(self.tid.0)
    }

    /// Makes it the first to be ended for want of memory.
    pub(crate) fn expose(&self) {
        // It may be so already, and one that cannot be is no worse than the process itself.
        let _best_effort = std::fs::write(format!("/proc/{}/oom_score_adj", self.tid), "1000");
    }

    /// Whether it stands as it was made. What is read of one that is ending is nothing, or zeros: a request is
    /// refused from the moment at which it is sent a signal that ends it (kernel/ptrace.c, `ptrace_freeze_traced`).
    pub(crate) fn stands(&self) -> bool {
        ptrace::signal_mask(self.tid).is_ok()
    }

    /// It has ended, and that was told to us.
    pub(crate) fn gone(&mut self) {
        self.gone = true;
    }

    /// Sends it the signal that ends it, which takes the kernel a while.
    pub(crate) fn kill(&mut self) {
        if !std::mem::replace(&mut self.killed, true) {
            // SAFETY: kill takes numbers; the child is traced and not collected, so the number is still its own.
            unsafe { libc::kill(self.tid.0, libc::SIGKILL) };
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        self.kill();
        while let Ok(stop) = ptrace::wait(self.tid) {
            if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                break;
            }
        }
    }
}
