//! `cargo xtask counts`: what a dump costs in things that do not depend on the machine, against a committed table.
//!
//! Times say little on a machine that others use; how often the kernel is called says whether something was made worse.
//! The dump and its victim run on one processor, so that the dump has one thread, and under a tracer that counts its calls by
//! name. Left out are calls whose number depends on how long others take: waiting, yielding, sleeping.
//!
//! Most rows are of one thread, area, descriptor, process or MiB *more*: the difference of two dumps. One call more for each of
//! them is seen at once, and what else is on the machine (libraries, mounts, control groups) cancels out. Nor does the
//! environment count (the loader tries four places for each library in each directory of `LD_LIBRARY_PATH`, which cargo sets), nor
//! where memory happens to lie, nor how much vector state the processor has. What a
//! kernel offers changes the counts all the same: the table has a part for each set of interfaces that it was written with,
//! and on a machine with another set the counts are shown, and said to be skipped.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::bench::{adopt, directory};
use crate::chain::size_of_files;
use crate::room;
use crate::sample::{empty, end, session, start_still};
use crate::victim::Kind;

/// Name, what is dumped, how large, and with which options.
const CASES: &[(&str, Kind, usize, &[&str])] = &[
    ("a process of 4 MiB, copy", Kind::Memory, 4, &["--freeze", "copy"]),
    ("a process of 4 MiB, fork", Kind::Memory, 4, &["--freeze", "fork"]),
    ("a process of 4 MiB, track", Kind::Memory, 4, &["--track"]),
];
type Pair = (&'static str, Kind, (usize, usize), &'static [&'static str]);
/// Name, what is dumped, in which two sizes, and with which options. As many threads as the kernel's memory is looked at for
/// have bpf(2).
const PAIRS: &[Pair] = &[
    ("each thread", Kind::Sleeping, (10, 30), &["--freeze", "copy"]),
    ("each of many threads", Kind::Sleeping, (100, 300), &["--freeze", "copy"]),
    ("each area", Kind::Areas, (200, 1000), &["--freeze", "copy"]),
    ("each descriptor", Kind::Descriptors, (40, 200), &["--freeze", "copy"]),
    ("each process of 4 MiB, copy", Kind::Processes, (4, 12), &["--freeze", "copy"]),
    ("each process of 4 MiB, fork", Kind::Processes, (4, 12), &["--freeze", "fork"]),
    ("each MiB, copy", Kind::Memory, (16, 80), &["--freeze", "copy"]),
    ("each MiB, fork", Kind::Memory, (16, 80), &["--freeze", "fork"]),
];
/// From so many threads on a dump looks at them in the kernel's memory, and bpf(2) is not refused.
const MANY: usize = 100;
/// Calls whose number depends on how long others take.
const WAITING: [i64; 9] = [
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_ppoll,
];

/// What is counted, and how far off it may be: in a dump, and for each of something.
const COUNTED: [(&str, Slack, Slack); 7] = [
    ("calls", Slack(12.0, 0.04), Slack(0.3, 0.01)),
    ("ptrace requests", Slack(2.0, 0.04), Slack(0.1, 0.01)),
    ("stops waited for", Slack(2.0, 0.04), Slack(0.1, 0.01)),
    ("context switches of the victim", Slack(4.0, 0.04), Slack(0.5, 0.02)),
    // Without the vector state of its threads.
    ("bytes of metadata", Slack(1024.0, 0.04), Slack(24.0, 0.04)),
    // Whether a program has touched the last page of a stack or a heap is a matter of chance.
    ("bytes of pages", Slack(32768.0, 0.02), Slack(6144.0, 0.02)),
    ("faults of the victim", Slack(4.0, 0.04), Slack(0.5, 0.01)),
];

/// So much, and so large a part of what is in the table.
#[derive(Clone, Copy, Debug)]
struct Slack(f64, f64);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The torpor to count for; one with debug assertions, as tests are, is built from this tree when not given.
    #[arg(long)]
    torpor: Option<PathBuf>,
    /// Write the table anew, for machines that offer what this one does.
    #[arg(long)]
    write: bool,
    /// Print the number of each call (by its number in the kernel) too.
    #[arg(long)]
    calls: bool,
}

/// In the order of [`COUNTED`].
type Counts = [f64; COUNTED.len()];
/// A row of the table.
type Row = BTreeMap<String, f64>;

/// The table for machines that offer the same.
#[derive(Default)]
struct Part {
    interfaces: BTreeMap<String, bool>,
    rows: BTreeMap<String, Row>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let torpor = arguments.torpor.as_ref().map_or_else(build, |path| Ok(fs::canonicalize(path)?))?;
    adopt();
    // SAFETY: numbers, and a set of ours.
    unsafe {
        // Of all that is started here.
        libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut one);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one);
    }
    let dir = directory(None)?;
    let result = compare(arguments, &torpor, &dir);
    fs::remove_dir_all(&dir)?;
    result
}

/// The one that the tests are made with, however this program was built: with debug assertions there are calls more.
fn build() -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    ensure!(
        Command::new(cargo).args(["build", "--quiet", "-p", "torpor"]).status()?.success(),
        "torpor does not build"
    );
    let own = std::env::current_exe()?;
    let all = own.parent().and_then(Path::parent).context("where programs are built")?;
    Ok(all.join("debug/torpor"))
}

fn compare(arguments: &Arguments, torpor: &Path, dir: &Path) -> anyhow::Result<()> {
    let Some(interfaces) = interfaces(torpor, dir)? else {
        println!("skipped: processes cannot be dumped here (`torpor check` tells why)");
        return Ok(());
    };
    let counted = count_all(arguments, torpor, dir)?;
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../counts.json");
    let mut parts = read(&table)?;
    // What the table does not know yet says nothing about the machine.
    let same = |part: &Part| part.interfaces.iter().all(|(name, there)| interfaces.get(name) == Some(there));
    if arguments.write {
        parts.retain(|part| !same(part));
        parts.push(Part { interfaces, rows: counted });
        let parts: Vec<Value> =
            parts.iter().map(|p| json!({ "interfaces": p.interfaces, "counts": p.rows })).collect();
        return Ok(fs::write(&table, serde_json::to_string_pretty(&parts)? + "\n")?);
    }
    let part = parts.iter().find(|part| same(part));
    let mut changed = Vec::new();
    for (name, row) in &counted {
        for (what, whole, each) in COUNTED {
            let now = row.get(what).copied().unwrap_or(f64::NAN);
            let before = part.and_then(|part| part.rows.get(name)?.get(what)).copied();
            let slack = if name.starts_with("each") { each } else { whole };
            let slack = before.map_or(0.0, |before| slack.0 + before * slack.1);
            println!("{name}: {what} {now} ({})", before.map_or("new".into(), |b| b.to_string()));
            if before.is_some_and(|before| (now - before).abs() > slack) {
                let before = before.unwrap_or(f64::NAN);
                changed.push(format!(
                    "{name}: {what} {now}, {before} in the table, {slack:.2} more or less allowed"
                ));
            }
        }
    }
    if part.is_none() {
        println!("skipped: no part of tests/counts.json was written with the interfaces of this machine:");
        for known in &parts {
            let differs = |(name, there): &(&String, &bool)| interfaces.get(*name) != Some(*there);
            let names: Vec<&str> =
                known.interfaces.iter().filter(differs).map(|(name, _)| name.as_str()).collect();
            println!("  unlike one of them in: {}", names.join(", "));
        }
    }
    ensure!(
        changed.is_empty(),
        "counts have changed (`cargo xtask counts --write` if so wanted):\n{}",
        changed.join("\n")
    );
    Ok(())
}

fn count_all(arguments: &Arguments, torpor: &Path, dir: &Path) -> anyhow::Result<BTreeMap<String, Row>> {
    let row =
        |counts: Counts| COUNTED.iter().zip(counts).map(|((name, ..), n)| ((*name).to_owned(), n)).collect();
    let count = |name: &str, kind, size, how: &[&str]| {
        let (counts, calls) =
            count(torpor, kind, size, how, dir).with_context(|| format!("{name}, {size}"))?;
        if arguments.calls {
            println!("{name}, {size}: {calls:?}");
        }
        anyhow::Ok(counts)
    };
    let mut rows = BTreeMap::new();
    for (name, kind, size, how) in CASES {
        rows.insert((*name).to_owned(), row(count(name, *kind, *size, how)?));
    }
    for (name, kind, (few, many), how) in PAIRS {
        let (less, more) = (count(name, *kind, *few, how)?, count(name, *kind, *many, how)?);
        // Two digits.
        let each = |i: usize| ((more[i] - less[i]) / (many - few) as f64 * 100.0).round() / 100.0;
        rows.insert((*name).to_owned(), row(std::array::from_fn(each)));
    }
    Ok(rows)
}

/// The parts of the table.
fn read(table: &Path) -> anyhow::Result<Vec<Part>> {
    let parts: Vec<Value> = serde_json::from_slice(&fs::read(table)?).context("tests/counts.json")?;
    let part = |part: &Value| {
        Ok(Part {
            interfaces: serde_json::from_value(part["interfaces"].clone())?,
            rows: serde_json::from_value(part["counts"].clone())?,
        })
    };
    parts.iter().map(part).collect()
}

/// What there is here that changes the counts; nothing if there can be no dump.
fn interfaces(torpor: &Path, dir: &Path) -> anyhow::Result<Option<BTreeMap<String, bool>>> {
    let shown = Command::new(torpor).args(["check", "--json"]).output()?;
    let check: Value = serde_json::from_slice(&shown.stdout).context("torpor check --json")?;
    if check["dump"] != json!(true) {
        return Ok(None);
    }
    let mut all = BTreeMap::new();
    for interface in check["interfaces"].as_array().into_iter().flatten() {
        let name = interface["name"].as_str().unwrap_or_default().to_owned();
        all.insert(name, interface["present"] == json!(true));
    }
    let machine = room::machine(dir);
    let huge = machine["transparent huge pages"].as_str().unwrap_or_default();
    all.insert(
        "as root".into(),
        fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0),
    );
    all.insert("x86_64".into(), cfg!(target_arch = "x86_64"));
    all.insert("control groups of version 1".into(), Path::new("/sys/fs/cgroup/memory").exists());
    all.insert("huge pages where asked for".into(), huge.contains("[madvise]"));
    all.insert("images on tmpfs".into(), machine["images on"] == json!("tmpfs"));
    Ok(Some(all))
}

/// Dumps one victim, and lets it run on. Gives all calls by number, too.
fn count(
    torpor: &Path,
    kind: Kind,
    size: usize,
    how: &[&str],
    dir: &Path,
) -> anyhow::Result<(Counts, BTreeMap<i64, u64>)> {
    let image = empty(dir, "image")?;
    let victim = start_still(kind, size, dir)?;
    let pid = victim.id() as i32;
    let mut args =
        vec![torpor.as_os_str().as_bytes().to_vec(), b"dump".to_vec(), b"--leave-running".to_vec()];
    args.extend(how.iter().map(|word| word.as_bytes().to_vec()));
    args.extend([b"--quiet".to_vec(), pid.to_string().into_bytes(), image.as_os_str().as_bytes().to_vec()]);
    let args = args.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
    let counted = (|| {
        let (faults_before, (threads, switches_before)) = (faults(pid)?, switches(pid)?);
        let traced = trace(&args, kind == Kind::Sleeping && size >= MANY)?;
        // What was stopped goes back to sleep.
        std::thread::sleep(std::time::Duration::from_millis(20));
        anyhow::Ok((traced, threads, faults(pid)? - faults_before, switches(pid)?.1 - switches_before))
    })();
    end(victim);
    let (traced, threads, faults, switches) = counted?;
    let calls =
        traced.calls.iter().filter(|(number, _)| !WAITING.contains(number)).map(|(_, n)| n).sum::<u64>();
    let ptrace = traced.calls.get(&libc::SYS_ptrace).copied().unwrap_or(0);
    let pages = size_of_files(&image, |name| name.ends_with(".dat"));
    let metadata = size_of_files(&image, |name| !name.ends_with(".dat"));
    let metadata = metadata.saturating_sub(traced.vector_state * threads);
    let counts = [calls, ptrace, traced.stops, switches, metadata, pages, faults];
    Ok((counts.map(|count| count as f64), traced.calls))
}

/// Minor faults of a process (proc_pid_stat(5), the tenth field).
fn faults(pid: i32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit(')').next().context("a stat line")?;
    Ok(rest.split_ascii_whitespace().nth(7).context("a stat line")?.parse()?)
}

/// The number of threads of a session, and how often they have given up the processor of themselves: a stop is one, and so
/// is going back to sleep.
fn switches(sid: i32) -> anyhow::Result<(u64, u64)> {
    let (mut threads, mut sum) = (0, 0);
    for pid in session(sid) {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let status = fs::read_to_string(task.path().join("status"))?;
            let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            sum += line.context("voluntary_ctxt_switches")?.trim().parse::<u64>()?;
            threads += 1;
        }
    }
    Ok((threads, sum))
}

/// What a program did.
#[derive(Debug, Default)]
struct Traced {
    /// System calls by number.
    calls: BTreeMap<i64, u64>,
    /// Calls of wait4(2) that gave a thread or process.
    stops: u64,
    /// Bytes of the vector state of a thread on this processor.
    vector_state: u64,
}

/// Runs a program to its end and counts the system calls of all its threads and children. Those that stay behind are ended.
fn trace(args: &[CString], with_bpf: bool) -> anyhow::Result<Traced> {
    let pointers: Vec<*const libc::c_char> =
        args.iter().map(|a| a.as_ptr()).chain([std::ptr::null()]).collect();
    let environment = [std::ptr::null()];
    // SAFETY: the child makes system calls on memory that was made ready; this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            if !with_bpf {
                refuse_bpf();
            }
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            libc::execve(pointers[0], pointers.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
    }
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_EXITKILL;
    // The call that each thread is in.
    let mut inside: BTreeMap<i32, Option<i64>> = BTreeMap::new();
    let mut traced = Traced::default();
    let mut begun = false;
    loop {
        let mut status = 0;
        // SAFETY: a place for one status.
        let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        ensure!(tid > 0, "the program that is counted is lost");
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            inside.remove(&tid);
            if tid == child {
                ensure!(
                    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
                    "it ended with {status:#x}"
                );
                inside.into_keys().for_each(take_away);
                return Ok(traced);
            }
            continue;
        }
        if !libc::WIFSTOPPED(status) {
            continue;
        }
        let mut signal = libc::WSTOPSIG(status);
        if !begun {
            // SAFETY: the child stands.
            unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options) };
            traced.vector_state = vector_state(tid);
            (begun, signal) = (true, 0);
        } else if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            let entered = inside.entry(tid).or_default();
            let value = value(tid);
            match entered.take() {
                Some(libc::SYS_wait4) if value > 0 => traced.stops += 1,
                Some(_) => {}
                None => {
                    *entered = Some(value);
                    *traced.calls.entry(value).or_default() += 1;
                }
            }
        } else if status >> 16 != 0 || signal == libc::SIGSTOP || signal == libc::SIGTRAP {
            signal = 0;
        }
        // SAFETY: it stands, or has gone, which is told next.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, signal) };
    }
}

/// Ends a thread that is traced: one that follows writes stays behind after a dump, and would be counted with the next.
fn take_away(tid: i32) {
    let mut status = 0;
    // SAFETY: the id is of a thread that we trace and have not collected, so nobody else's.
    unsafe {
        libc::kill(tid, libc::SIGKILL);
        while libc::waitpid(tid, &raw mut status, libc::__WALL) == tid && libc::WIFSTOPPED(status) {
            libc::ptrace(libc::PTRACE_CONT, tid, 0, 0);
        }
    }
}

/// How much of it the kernel tells of a thread that stands: as much as its processor has (ptrace(2), `PTRACE_GETREGSET`).
fn vector_state(tid: i32) -> u64 {
    let mut state = vec![0u8; 1 << 16];
    let mut part = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
    // SAFETY: the kernel fills as much as it is told there is, and tells how much it was.
    let got = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, tid, arch::NT_FPSTATE, &raw mut part) };
    if got == 0 { part.iov_len as u64 } else { 0 }
}

/// Has bpf(2) fail from now on. Whether it is worth to look into the kernel's memory is decided by time, of which a dump that
/// is traced takes much; and the kernel's description of itself is read in more than a thousand calls.
fn refuse_bpf() {
    let filter = |code: u16, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let call = libc::SYS_bpf as u32;
    let code = [
        // The number of the call (seccomp_data.nr); all others than bpf are allowed.
        filter(0x20, 0, 0, 0),
        filter(0x15, 1, 0, call),
        filter(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        filter(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_ptr().cast_mut() };
    // SAFETY: the program is there for as long as the call takes. Where it fails, some more is counted.
    unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
}

/// The number of the call that a thread enters, or what the one gives that it leaves (ptrace(2), `PTRACE_GET_SYSCALL_INFO`).
fn value(tid: i32) -> i64 {
    let mut info = [0u64; 11];
    // SAFETY: the kernel fills as much as it is told there is.
    unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size_of_val(&info), &raw mut info) };
    info[3].cast_signed()
}
