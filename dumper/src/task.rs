//! Putting a process together: what the frozen process is asked, from outside and from inside.

use std::collections::HashMap;
use std::sync::Arc;

use torpor_image::extent::Extents;
use torpor_image::inode::Source;
use torpor_image::memory::{AddressSpace, MmFields};
use torpor_image::task::{Shares, Task};
use torpor_image::vma::Vma;
use torpor_image::{Bytes, InodeId, Pid as ImagePid};
use torpor_kernel::ids::{Pid, RemoteAddr, Tid};
use torpor_kernel::maps::Mapping;
use torpor_kernel::memory::Memory;
use torpor_kernel::stat::{self, Stat};
use torpor_kernel::task_struct::Told;
use torpor_kernel::timers::{self, PosixTimer};
use torpor_kernel::{process, ptrace};
use torpor_parasite::script::{Data, OpId, Outcome, Script, Value};

use crate::collect::{Collector, stat_path};
use crate::description::Table;
use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::gadget::Gadgets;
use crate::inject::{self, Before, Entry, Visit};
use crate::restart::Restarts;
use crate::snapshot::{self, Birth};
use crate::thread::Answers;
use crate::{areas, signal, sysv_sem, terminal, thread, timer};

/// prctl(2) operations (linux/prctl.h).
const PR_GET_DUMPABLE: u64 = 3;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_THP_DISABLE: u64 = 42;
const PR_GET_TSC: u64 = 25;
const PR_TSC_ENABLE: u32 = 1;
const PR_MCE_KILL_GET: u64 = 34;
const PR_MCE_KILL_DEFAULT: i64 = 2;
const PR_GET_MDWE: u64 = 66;
const PR_GET_MEMORY_MERGE: u64 = 68;
/// linux/membarrier.h
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;

/// What only the process itself can tell.
struct Asked {
    brk: OpId,
    dumpable: OpId,
    subreaper: Data,
    thp_disabled: OpId,
    membarrier: OpId,
    mdwe: OpId,
    memory_merge: OpId,
    machine_checks: OpId,
    tsc: Data,
    limits: Vec<Data>,
}

fn ask(script: &mut Script) -> Asked {
    let n = Value::Number;
    let subreaper = script.reserve(8);
    script.call("the subreaper attribute", libc::SYS_prctl, &[n(PR_GET_CHILD_SUBREAPER), subreaper.into()]);
    // Asked inside: prlimit64 of another user's process wants CAP_SYS_RESOURCE, which even root may lack.
    let limits = (0..process::LIMITS)
        .map(|resource| {
            let limit = script.reserve(16);
            let args = [n(0), n(resource as u64), n(0), limit.into()];
            script.call(format!("limit {resource}"), libc::SYS_prlimit64, &args);
            limit
        })
        .collect();
    let tsc = script.reserve(8);
    script.try_call("the time stamp counter attribute", libc::SYS_prctl, &[n(PR_GET_TSC), tsc.into()]);
    let zero = [n(0); 3];
    let get = |option| [&[n(option), n(0)][..], &zero].concat();
    Asked {
        tsc,
        // Newer than some kernels; EINVAL means that there is nothing to be kept.
        mdwe: script.try_call("the write-xor-execute attribute", libc::SYS_prctl, &get(PR_GET_MDWE)),
        memory_merge: script.try_call(
            "the page merging attribute",
            libc::SYS_prctl,
            &get(PR_GET_MEMORY_MERGE),
        ),
        machine_checks: script.try_call("the machine check policy", libc::SYS_prctl, &get(PR_MCE_KILL_GET)),
        limits,
        brk: script.call("the program break", libc::SYS_brk, &[n(0)]),
        dumpable: script.call("the dumpable attribute", libc::SYS_prctl, &[n(PR_GET_DUMPABLE)]),
        subreaper,
        thp_disabled: script.try_call("the huge page attribute", libc::SYS_prctl, &[n(PR_GET_THP_DISABLE)]),
        membarrier: script.try_call(
            "membarrier registrations",
            libc::SYS_membarrier,
            &[n(MEMBARRIER_CMD_GET_REGISTRATIONS)],
        ),
    }
}

/// What /proc tells of a stopped process.
#[derive(Debug)]
pub(crate) struct Outside {
    pub(crate) maps: Arc<[Mapping]>,
    stat: Stat,
    /// Of a thread that lives: of a first thread that has ended no addresses are shown.
    living: Stat,
    posix: Vec<PosixTimer>,
    auxv: Bytes,
    coredump_filter: Option<u32>,
    pub(crate) cwd: Bytes,
    root: Bytes,
    personality: u32,
    oom_score_adj: i32,
}

impl Outside {
    /// The parent.
    pub(crate) fn ppid(&self) -> i32 {
        self.stat.ppid
    }
}

/// Reads all of it, of process `own_pid` by way of its thread `pid`; `areas` is its memory map, if that is known.
pub(crate) fn look(own_pid: Pid, pid: Pid, areas: Option<&Arc<[Mapping]>>) -> Result<Outside> {
    let fail = |what: &str| Error::kernel(pid, format!("reading {what}"));
    let stat = stat::of_process(own_pid).map_err(fail("its stat"))?;
    Ok(Outside {
        maps: areas::of(pid, areas)?,
        living: if own_pid == pid {
            stat.clone()
        } else {
            stat::of_process(pid).map_err(fail("its stat"))?
        },
        stat,
        posix: timers::timers(pid).map_err(fail("its timers"))?,
        auxv: process::auxv(pid).map_err(fail("its auxiliary vector"))?.into(),
        coredump_filter: process::coredump_filter(pid).map_err(fail("its coredump filter"))?,
        cwd: process::cwd(pid).map_err(fail("its working directory"))?.into(),
        root: process::root(pid).map_err(fail("its root directory"))?.into(),
        personality: process::personality(pid).map_err(fail("its personality"))?,
        oom_score_adj: process::oom_score_adj(pid).map_err(fail("its oom_score_adj"))?,
    })
}

/// A stopped process whose scripts are written.
pub(crate) struct Prepared {
    memory: Memory,
    stopped: Vec<thread::Stopped>,
    before: Vec<Before>,
    /// Signals that it handles or has pending.
    taken: u64,
    own_tgid: i32,
    asked: Asked,
    signals: Vec<Data>,
    timers: timer::Asked,
    threads: Vec<thread::Asked>,
    scripts: Vec<Script>,
    /// What is known of the threads without asking them; only the leader is asked then.
    told: HashMap<Tid, Told>,
}

/// Reads the threads of a process, and writes what they will be asked.
pub(crate) fn prepare(
    collector: &mut Collector,
    frozen: &Frozen,
    outside: &Outside,
    threads: Vec<thread::Outside>,
    restarts: &Restarts,
) -> Result<Prepared> {
    let (own_pid, pid) = (frozen.pid(), frozen.living());
    let memory = Memory::open(pid, true).map_err(Error::kernel(pid, "opening its memory"))?;
    let mut sites = thread::Sites::default();
    let stopped = frozen
        .threads()
        .iter()
        .zip(threads)
        .map(|(t, outside)| thread::read(own_pid, t.tid, outside, (&memory, &mut sites), restarts))
        .collect::<Result<Vec<_>>>()?;
    let told = frozen.told().clone();
    let shares = |tid: Tid| told.get(&tid).map(|t| t.common);
    let leader = shares(stopped[0].before.tid);
    for thread in &stopped {
        let tid = thread.before.tid;
        thread::refuse(collector, thread, leader.is_some() && shares(tid) == leader);
        if thread.lost_call {
            collector.lose(format!("thread {tid}: which call a signal interrupts; it fails with EINTR"));
        }
    }
    timer::refuse(collector, &outside.posix, stopped.len());
    let mut leader = Script::new();
    let asked = ask(&mut leader);
    let signals = signal::ask(&mut leader);
    let timers = timer::ask(&mut leader, &outside.posix);
    let mut threads = vec![thread::ask(&mut leader)];
    let mut scripts = vec![leader];
    if told.is_empty() {
        let (others, theirs): (Vec<_>, Vec<_>) = stopped[1..].iter().map(|_| asking()).unzip();
        threads.extend(others);
        scripts.extend(theirs);
    }
    let taken = stopped
        .iter()
        .map(|s| &s.outside.status)
        .fold(0, |all, s| all | s.caught | s.sig_pending | s.shared_pending);
    Ok(Prepared {
        memory,
        before: stopped.iter().map(|s| s.before.clone()).collect(),
        taken,
        // Ids as the process itself sees them differ from ours in a pid namespace of its own.
        own_tgid: if frozen.leader_ended() { own_pid.0 } else { stopped[0].before.own_tid },
        stopped,
        asked,
        signals,
        timers,
        threads,
        scripts,
        told,
    })
}

/// A script that asks a thread, and what it asks.
fn asking() -> (thread::Asked, Script) {
    let mut script = Script::new();
    (thread::ask(&mut script), script)
}

impl Prepared {
    /// The way into the process, to ask what is to be asked or, if given, something else of the leader.
    pub(crate) fn visit<'a>(
        &'a self,
        frozen: &'a mut Frozen,
        gadgets: Gadgets,
        maps: &'a [Mapping],
        other: Option<&'a [Script]>,
        birth: Option<&'a Birth>,
    ) -> Visit<'a> {
        Visit {
            frozen,
            memory: &self.memory,
            threads: &self.before,
            entry: Entry { maps, gadgets, taken_signals: self.taken, own_tgid: self.own_tgid },
            scripts: other.unwrap_or(&self.scripts),
            lends: None,
            birth,
        }
    }

    /// What stands in the way of a copy of the process, after it was asked.
    pub(crate) fn obstacle(&self, pid: Pid, outcomes: &[Outcome]) -> Option<String> {
        let subreaper = outcomes.first().is_some_and(|first| first.u32(self.asked.subreaper) != 0);
        snapshot::obstacle_of(pid, self.own_tgid, subreaper)
    }

    /// The code that the kernel maps into every process, if this one has not unmapped it.
    pub(crate) fn vdso(&self, outside: &Outside) -> Option<Result<Bytes>> {
        let mapping = outside.maps.iter().find(|m| m.path == b"[vdso]")?;
        let mut bytes = vec![0u8; (mapping.end - mapping.start) as usize];
        let read = self.memory.read_exact_at(RemoteAddr(mapping.start), &mut bytes);
        let failed = Error::kernel(Pid(outside.stat.pid), "reading its vdso");
        Some(read.map(|()| bytes.into()).map_err(failed))
    }
}

/// Puts the answers together.
pub(crate) fn assemble(
    collector: &mut Collector,
    frozen: &mut Frozen,
    gadgets: Gadgets,
    (prepared, outside): (Prepared, Outside),
    outcomes: &[Outcome],
    (exe, vmas, table): (InodeId, Vec<Vma>, Table),
) -> Result<Task> {
    let (own_pid, pid) = (frozen.pid(), frozen.living());
    sysv_sem::adjustments(collector, own_pid, |script| {
        let script = std::slice::from_ref(script);
        let visit = prepared.visit(frozen, gadgets, &outside.maps, Some(script), None);
        let answers = inject::prepare(vec![visit])?.run()?;
        Ok(answers.into_iter().flatten().next().unwrap_or_default())
    })?;
    let answers = answers(&prepared, frozen, gadgets, &outside.maps, outcomes)?;
    let Prepared { stopped, asked, signals, timers, .. } = prepared;
    let Outside { stat, living, posix, .. } = outside;
    let first = &outcomes[0];
    // Read after the timers: a signal that a timer sends in between is kept twice rather than lost.
    let shared_pending = thread::infos(
        ptrace::pending(torpor_kernel::ids::Tid(pid.0), true)
            .map_err(Error::kernel(pid, "reading pending signals"))?,
    );
    let umask = stopped[0].outside.status.umask;
    let signals = signal::assemble(&signals, first, shared_pending);
    let timers = timer::assemble(&timers, first, &posix);
    let stopped_by_job_control = frozen.stopped();
    let threads = stopped
        .into_iter()
        .zip(answers)
        .map(|(stopped, answers)| thread::assemble(pid, stopped, answers, !posix.is_empty()))
        .collect::<Result<Vec<_>>>()?;
    let policy = first.result(asked.machine_checks);
    if policy >= 0 && policy != PR_MCE_KILL_DEFAULT {
        collector.lose(format!("the machine check policy {policy} (PR_MCE_KILL)"));
    }
    let tsc = first.u32(asked.tsc);
    if tsc != 0 && tsc != PR_TSC_ENABLE {
        collector.lose("that reading the time stamp counter is a fault (PR_SET_TSC)");
    }
    let number = |op: OpId| first.result(op).max(0) as u32;
    let fields = MmFields {
        start_code: living.start_code,
        end_code: living.end_code,
        start_data: living.start_data,
        end_data: living.end_data,
        start_brk: living.start_brk,
        brk: first.result(asked.brk) as u64,
        start_stack: living.start_stack,
        arg_start: living.arg_start,
        arg_end: living.arg_end,
        env_start: living.env_start,
        env_end: living.env_end,
    };
    let address_space = AddressSpace {
        vmas,
        pages: Extents::default(),
        fields,
        auxv: outside.auxv,
        exe,
        dumpable: number(asked.dumpable),
        thp_disabled: number(asked.thp_disabled),
        mdwe: number(asked.mdwe),
        memory_merge: number(asked.memory_merge),
        coredump_filter: outside.coredump_filter,
        membarrier: number(asked.membarrier),
    };
    let task = Task {
        pid: ImagePid(own_pid.0),
        ppid: ImagePid(stat.ppid),
        pgid: ImagePid(stat.pgrp),
        sid: ImagePid(stat.session),
        stopped: stopped_by_job_control,
        threads,
        memory: address_space,
        descriptors: table.descriptors,
        locks: table.locks,
        signals,
        timers,
        limits: asked.limits.iter().map(|&l| (first.u64(l), first.u64(l.at(8)))).collect(),
        cwd: outside.cwd,
        root: outside.root,
        umask,
        personality: outside.personality,
        oom_score_adj: outside.oom_score_adj,
        child_subreaper: first.u32(asked.subreaper) != 0,
        exit_signal: stat.exit_signal,
        stop_report: if stopped_by_job_control { stat.exit_code & 0x7f } else { 0 },
        leader_ended: frozen.leader_ended().then_some(stat.exit_code),
        shares: Shares::default(),
        terminal: terminal::controlling(collector, &living)?,
    };
    Ok(task)
}

/// What all threads of a process answer. Those that were not asked are, if what is known of the leader is not what it
/// says itself.
fn answers(
    prepared: &Prepared,
    frozen: &mut Frozen,
    gadgets: Gadgets,
    maps: &[Mapping],
    outcomes: &[Outcome],
) -> Result<Vec<Answers>> {
    let Prepared { stopped, threads, told, .. } = prepared;
    let asked = |threads: &[thread::Asked], outcomes: &[Outcome]| -> Vec<Answers> {
        threads.iter().zip(outcomes).map(|(asked, outcome)| thread::answered(*asked, outcome)).collect()
    };
    let own = asked(threads, outcomes);
    let known: Vec<Answers> =
        stopped.iter().filter_map(|s| told.get(&s.before.tid)).map(|t| Answers::from(*t)).collect();
    if own.len() == stopped.len() || known.first() == own.first() {
        return Ok(if own.len() == stopped.len() { own } else { known });
    }
    let (threads, scripts): (Vec<_>, Vec<_>) = stopped.iter().map(|_| asking()).unzip();
    let visit = prepared.visit(frozen, gadgets, maps, Some(&scripts), None);
    let outcomes: Vec<Outcome> = inject::prepare(vec![visit])?.run()?.into_iter().flatten().collect();
    Ok(asked(&threads, &outcomes))
}

/// The program file, which /proc/PID/exe and `prctl(PR_SET_MM_EXE_FILE)` are about.
pub(crate) fn exe(collector: &mut Collector) -> Result<InodeId> {
    let pid = collector.pid;
    let path = Bytes(process::exe(pid).map_err(Error::kernel(pid, "reading its program file"))?);
    if let Some(stat) = stat_path(&path) {
        if let Some(id) = collector.known_inode(stat.st_dev, stat.st_ino) {
            return Ok(id);
        }
        return Ok(collector.add_inode(&stat, Source::Path { path }));
    }
    // A program file that was removed is mapped, as a rule, and so among the inodes already.
    let stat = nix::sys::stat::stat(format!("/proc/{pid}/exe").as_str()).map_err(|e| {
        Error::kernel(pid, "reading its program file")(torpor_kernel::Error::syscall(
            "stat",
            "/proc/PID/exe",
            e,
        ))
    })?;
    if let Some(id) = collector.known_inode(stat.st_dev, stat.st_ino) {
        return Ok(id);
    }
    let file = std::fs::File::open(format!("/proc/{pid}/exe")).map_err(|e| {
        Error::kernel(pid, "opening its program file")(torpor_kernel::Error::io("open", "/proc/PID/exe", &e))
    })?;
    let source =
        Source::Deleted { path: crate::description::without_deleted(&path), content: Extents::default() };
    let id = collector.add_inode(&stat, source);
    collector.contents.push((id, crate::collect::Content::File(file.into())));
    Ok(id)
}
