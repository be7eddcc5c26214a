//! Threads: what ptrace and /proc tell from outside, and the few calls only the thread itself can make.

mod unasked;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use torpor_image::scheduling::Scheduling;
use torpor_image::signal::{AltStack, ThreadSignals};
use torpor_image::thread::{Rseq, Thread};
use torpor_image::{Bytes, Pid as ImagePid};
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::{Pid, RemoteAddr, Tid};
use torpor_kernel::memory::Memory;
use torpor_kernel::task_struct::Told;
use torpor_kernel::{process, ptrace, status};
use torpor_parasite::call;
use torpor_parasite::script::{Data, Outcome, Script, Value};

use crate::collect::Collector;
use crate::error::{Error, Refusal, Result};
use crate::freeze;
use crate::inject::Before;
use crate::restart::Restarts;
use crate::{credentials, scheduling};

pub(crate) use unasked::Unasked;

/// prctl(2) operations (linux/prctl.h).
const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_TID_ADDRESS: u64 = 40;

/// What /proc and the scheduler tell of a thread.
#[derive(Clone, Debug)]
pub(crate) struct Outside {
    pub(crate) status: status::Status,
    name: Bytes,
    robust_list: (u64, u64),
    scheduling: Scheduling,
}

/// Reads all of it.
pub(crate) fn look(pid: Pid, tid: Tid) -> Result<Outside> {
    let fail = |what: &str| Error::kernel(pid, format!("reading {what} of thread {tid}"));
    Ok(Outside {
        status: status::of_task(pid, tid).map_err(fail("the status"))?,
        name: process::comm(pid, tid).map_err(fail("the name"))?.into(),
        robust_list: process::robust_list(tid).map_err(fail("the robust list"))?,
        scheduling: scheduling::collect(tid).map_err(fail("the scheduling"))?,
    })
}

/// The same of a thread of which something is known already, beside the leader: as a rule it has most in common with that.
pub(crate) fn look_beside(
    (pid, tid): (Pid, Tid),
    told: Option<&Told>,
    (leader, its): (&Outside, Option<&Told>),
) -> Result<Outside> {
    let (Some(told), Some(its)) = (told, its) else { return look(pid, tid) };
    if told.common != its.common {
        return look(pid, tid);
    }
    let fail = |what: &str| Error::kernel(pid, format!("reading {what} of thread {tid}"));
    let end = told.name.iter().position(|b| *b == 0).unwrap_or(told.name.len());
    let mut status = leader.status.clone();
    (status.pid, status.sig_pending) = (tid.0, told.pending);
    status.ns_pid = vec![told.own_tid];
    status.name = told.name[..end].to_vec();
    Ok(Outside {
        status,
        name: told.name[..end].to_vec().into(),
        robust_list: process::robust_list(tid).map_err(fail("the robust list"))?,
        scheduling: scheduling::collect(tid).map_err(fail("the scheduling"))?,
    })
}

/// A stopped thread with everything that is known without entering it.
#[derive(Clone, Debug)]
pub(crate) struct Stopped {
    pub(crate) before: Before,
    pub(crate) outside: Outside,
    pub(crate) rseq: Option<Rseq>,
    /// Whether it is in a system call that can only be told to have been interrupted.
    pub(crate) lost_call: bool,
}

/// The code before addresses that threads of a process stand at: many stand at the same.
pub(crate) type Sites = HashMap<u64, [u8; arch::Registers::CALL_SITE]>;

/// Reads a stopped thread.
///
/// A thread stopped inside an rseq critical section is moved to the section's abort handler here, as the
/// kernel does with every thread that is preempted in one (kernel/rseq.c, `rseq_ip_fixup`): the note of the
/// section would be cleared as soon as the thread runs anything else, and the section then go on unaborted.
pub(crate) fn read(
    pid: Pid,
    tid: Tid,
    outside: Outside,
    (memory, sites): (&Memory, &mut Sites),
    restarts: &Restarts,
) -> Result<Stopped> {
    let status = &outside.status;
    let fail = |what: &str| Error::kernel(pid, format!("reading {what} of thread {tid}"));
    let mut registers = ptrace::registers(tid).map_err(|e| match e.errno() {
        Some(_) => fail("the registers")(e),
        // Another set of registers than ours.
        None => Error::Refused { pid, refusals: vec![foreign_code(tid)] },
    })?;
    let mask = ptrace::signal_mask(tid).map_err(fail("the signal mask"))?;
    let rseq = ptrace::rseq_configuration(tid).map_err(fail("the rseq area"))?;
    if let Some(rseq) = &rseq
        && let Some(abort) = interrupted_section(memory, rseq.address, registers.ip())
    {
        registers.set_ip(abort);
    }
    // A call that our stop alone has made fail is made again; one that a signal to be handled has
    // interrupted fails rightly.
    let due = (status.sig_pending | status.shared_pending) & !mask & !status.ignored;
    if due == 0
        && let Some(retried) = registers.retried()
    {
        registers = retried;
    }
    let site = sites.entry(registers.ip()).or_insert_with(|| {
        let mut site = [0u8; arch::Registers::CALL_SITE];
        let before = registers.ip().wrapping_sub(site.len() as u64);
        match memory.read_exact_at(RemoteAddr(before), &mut site) {
            Ok(()) => site,
            Err(_unreadable) => [0; arch::Registers::CALL_SITE],
        }
    });
    let elsewhere = registers.resolved(site);
    let elsewhere =
        elsewhere.or_else(|| restarts.of(tid, &registers).map(|nr| registers.with_restarted_call(nr)));
    let own_tid = status.ns_pid.last().copied().unwrap_or(tid.0);
    Ok(Stopped {
        before: Before {
            tid,
            own_tid,
            registers,
            elsewhere: elsewhere.unwrap_or(registers),
            xstate: ptrace::xstate(tid).map_err(fail("the vector state"))?,
            mask,
        },
        lost_call: elsewhere.is_none(),
        outside,
        rseq: rseq.map(|r| Rseq { address: r.address, size: r.size, signature: r.signature }),
    })
}

pub(crate) fn infos(pending: Vec<ptrace::SignalInfo>) -> Vec<Bytes> {
    pending.into_iter().map(|info| Bytes(info.to_vec())).collect()
}

/// A thread that runs code of another word size.
fn foreign_code(tid: Tid) -> Refusal {
    Refusal {
        object: format!("the code of thread {tid}"),
        why: "it is of another word size than torpor's".into(),
        remedy: "use a program of this word size, or try again when the thread is back in code of this one"
            .into(),
    }
}

/// Refuses of the threads of a running process what /proc tells.
pub(crate) fn survey(collector: &mut Collector, pid: Pid) {
    let leader = collector.pid;
    let tids = process::tasks(pid).unwrap_or_default();
    let several = tids.len() > 1;
    let own = if several { process::namespaces(leader).unwrap_or_default() } else { Vec::new() };
    let mut asleep = Vec::new();
    for tid in tids {
        // It may have ended.
        let Ok(status) = status::of_task(pid, tid) else { continue };
        if matches!(status.state, 'Z' | 'X') {
            continue;
        }
        if status.state == 'D' {
            asleep.push((tid, runs(pid, tid)));
        }
        told(collector, tid, &status, false);
        if tid.0 == leader.0 || !several {
            continue;
        }
        let theirs = process::namespaces(Pid(tid.0)).unwrap_or_default();
        for (name, inode) in theirs {
            let other = own.iter().any(|(n, own)| *n == name && *own != inode);
            if other && !name.ends_with("_for_children") {
                let why = "it is not that of the other threads (unshare, setns)";
                let object = format!("the {name} namespace of thread {tid}");
                collector.refuse(object, why, "end the thread before the dump");
            }
        }
    }
    stuck(collector, pid, asleep);
}

/// How long a thread may sleep where nothing can interrupt it before a dump is not even tried, if others leave it a
/// processor: where many want to run, so does who holds what it waits for.
const STUCK: Duration = Duration::from_millis(500);
/// As many times as long at most.
const CROWDED: u32 = 20;

/// Refuses threads that cannot be stopped: while one is waited for, all others would stand. What waits for a vfork
/// child is another matter (`survey`).
fn stuck(collector: &mut Collector, pid: Pid, mut asleep: Vec<(Tid, Option<u64>)>) {
    asleep.retain(|(tid, runs)| runs.is_some() && !freeze::waits_for_vfork(pid, *tid));
    if asleep.is_empty() {
        return;
    }
    let begin = Instant::now();
    let mut patience = STUCK;
    loop {
        // Who waits for the same will want to run at the same time, and at any moment there may be few who do.
        let crowd = process::crowd(asleep.len() as u32);
        patience = patience.max(STUCK * crowd.clamp(1, CROWDED));
        if asleep.is_empty() || begin.elapsed() >= patience {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        asleep.retain(|(tid, before)| {
            status::of_task(pid, *tid).is_ok_and(|s| s.state == 'D') && runs(pid, *tid) == *before
        });
    }
    for (tid, _) in asleep {
        collector.refuse(
            format!("thread {tid}"),
            format!(
                "it has been inside the kernel for more than {} ms where nothing interrupts it (state D), as on a \
                 hanging file system, and cannot be stopped meanwhile",
                patience.as_millis()
            ),
            "try again when that call has returned",
        );
    }
}

/// How often a thread has been given a cpu (Documentation/scheduler/sched-stats.rst), where the kernel counts it.
fn runs(pid: Pid, tid: Tid) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    text.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// Refuses what is told of a thread that runs, and of one that stands.
fn told(collector: &mut Collector, tid: Tid, status: &status::Status, shares: bool) {
    let leader = collector.pid;
    let mut refuse = |what: &str, why: &str, remedy: &str| {
        collector.refuse(format!("{what} of thread {tid}"), why, remedy);
    };
    // That of the leader is refused as the process's.
    if status.seccomp != 0 && tid.0 != leader.0 {
        refuse("seccomp", "its filters cannot be dumped yet", "start the program without them");
    }
    if status.x86_thread_features.split(|b| *b == b' ').any(|f| f == b"shstk") {
        refuse("the shadow stack", "it cannot be dumped yet", "start the program without it");
    }
    if shares {
        return;
    }
    for (kind, what) in [(KcmpType::Files, "the descriptor table"), (KcmpType::Fs, "the working directory")] {
        let own = |order| order != std::cmp::Ordering::Equal;
        if tid.0 != leader.0 && fds::kcmp(leader, Pid(tid.0), kind, 0, 0).is_ok_and(own) {
            refuse(what, "it is not that of the other threads (unshare)", "end the thread before the dump");
        }
    }
}

/// Refuses threads in which the executor could not run, or not without harm, before any is entered. `shares` tells that
/// a thread is known to have the descriptors and directories of the leader.
pub(crate) fn refuse(collector: &mut Collector, stopped: &Stopped, shares: bool) {
    let tid = stopped.before.tid;
    told(collector, tid, &stopped.outside.status, shares);
    if ptrace::syscall_user_dispatch(tid).ok().flatten().is_some_and(|d| d.on) {
        let object = format!("syscall user dispatch of thread {tid}");
        collector.refuse(object, "it cannot be dumped yet", "turn it off before the dump");
    }
    if !stopped.before.registers.native() {
        collector.refusals.push(foreign_code(tid));
    }
}

/// The abort handler of the rseq critical section that `ip` is in.
fn interrupted_section(memory: &Memory, area: u64, ip: u64) -> Option<u64> {
    // struct rseq: rseq_cs at offset 8; struct rseq_cs: version, flags, start_ip, post_commit_offset,
    // abort_ip (linux/rseq.h).
    let section = memory.read_u64(RemoteAddr(area + 8)).ok().filter(|s| *s != 0)?;
    let field = |at: u64| memory.read_u64(RemoteAddr(section + at)).ok();
    let (start, length, abort) = (field(8)?, field(16)?, field(24)?);
    (ip.wrapping_sub(start) < length).then_some(abort)
}

/// Operations of a thread's script.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    altstack: Data,
    clear_child_tid: Data,
    parent_death_signal: Data,
    securebits: torpor_parasite::script::OpId,
    timer_slack: torpor_parasite::script::OpId,
}

/// Adds what only the thread itself can tell.
pub(crate) fn ask(script: &mut Script) -> Asked {
    let altstack = script.reserve(24);
    call!(script, "the alternate signal stack", libc::SYS_sigaltstack, 0, altstack);
    let clear_child_tid = script.reserve(8);
    // Missing only in kernels without checkpoint/restore support.
    call!(script, "the clear_child_tid address", libc::SYS_prctl, PR_GET_TID_ADDRESS, clear_child_tid);
    let parent_death_signal = script.reserve(8);
    call!(script, "the parent death signal", libc::SYS_prctl, PR_GET_PDEATHSIG, parent_death_signal);
    Asked {
        altstack,
        clear_child_tid,
        parent_death_signal,
        securebits: script.call("securebits", libc::SYS_prctl, &[Value::Number(PR_GET_SECUREBITS)]),
        timer_slack: script.call("the timer slack", libc::SYS_prctl, &[Value::Number(PR_GET_TIMERSLACK)]),
    }
}

/// What a thread answered, by the calls that ask for it.
pub(crate) fn answered(asked: Asked, outcome: &Outcome) -> Answers {
    let altstack = outcome.bytes(asked.altstack);
    Answers {
        altstack: (
            u64::from_ne_bytes(altstack[..8].try_into().expect("eight bytes")),
            i32::from_ne_bytes(altstack[8..12].try_into().expect("four bytes")),
            u64::from_ne_bytes(altstack[16..24].try_into().expect("eight bytes")),
        ),
        clear_child_tid: outcome.u64(asked.clear_child_tid),
        parent_death_signal: outcome.u32(asked.parent_death_signal) as i32,
        securebits: outcome.result(asked.securebits) as u32,
        timer_slack: outcome.result(asked.timer_slack) as u64,
    }
}

/// What only the thread itself can tell, or the kernel's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answers {
    altstack: (u64, i32, u64),
    clear_child_tid: u64,
    parent_death_signal: i32,
    securebits: u32,
    timer_slack: u64,
}

impl From<Told> for Answers {
    fn from(told: Told) -> Self {
        let Told { altstack, clear_child_tid, parent_death_signal, securebits, timer_slack, .. } = told;
        Answers { altstack, clear_child_tid, parent_death_signal, securebits, timer_slack }
    }
}

/// Puts a thread together. `timers` tells that its process has some, which may have sent it a signal since.
pub(crate) fn assemble(pid: Pid, stopped: Stopped, answers: Answers, timers: bool) -> Result<Thread> {
    let tid = stopped.before.tid;
    let fail = |what: &str| Error::kernel(pid, format!("reading {what} of thread {tid}"));
    let (base, flags, size) = answers.altstack;
    Ok(Thread {
        tid: ImagePid(tid.0),
        name: stopped.outside.name,
        registers: stopped.before.elsewhere,
        xstate: stopped.before.xstate.into(),
        signals: ThreadSignals {
            mask: stopped.before.mask,
            pending: match stopped.outside.status.sig_pending {
                0 if !timers => Vec::new(),
                _ => infos(ptrace::pending(tid, false).map_err(fail("pending signals"))?),
            },
            altstack: AltStack { base, flags, size },
        },
        rseq: stopped.rseq,
        robust_list: stopped.outside.robust_list,
        clear_child_tid: answers.clear_child_tid,
        parent_death_signal: answers.parent_death_signal,
        scheduling: Scheduling { timer_slack: answers.timer_slack, ..stopped.outside.scheduling },
        credentials: credentials::collect(&stopped.outside.status, answers.securebits),
    })
}
