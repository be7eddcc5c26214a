//! `cargo xtask counts`: what a dump costs in things that do not depend on the machine, against a committed table.
//!
//! Times say little on a machine that others use; how often the kernel is called says whether something was made worse. The
//! dump runs on one processor, so that it has one thread, and under a tracer that counts its calls by name. Left out are calls
//! whose number depends on how long others take: waiting, yielding, sleeping.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::bench::torpor;
use crate::sample::{end, start};
use crate::victim::Kind;

/// What is dumped, and how.
const CASES: &[(&str, Kind, usize, &[&str])] = &[
    ("4 MiB, copy", Kind::Memory, 4, &["--freeze", "copy"]),
    ("4 MiB, fork", Kind::Memory, 4, &["--freeze", "fork"]),
    ("128 MiB, fork", Kind::Memory, 128, &["--freeze", "fork"]),
    ("100 threads, copy", Kind::Sleeping, 100, &["--freeze", "copy"]),
    ("1000 areas, copy", Kind::Areas, 1000, &["--freeze", "copy"]),
    ("200 descriptors, copy", Kind::Descriptors, 200, &["--freeze", "copy"]),
    ("10 processes, copy", Kind::Processes, 10, &["--freeze", "copy"]),
    ("10 processes, fork", Kind::Processes, 10, &["--freeze", "fork"]),
];
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
/// By how much a count may differ, and by how many parts of it.
const SLACK: (u64, u64) = (12, 25);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The torpor to count for; built from this tree when not given.
    #[arg(long)]
    torpor: Option<PathBuf>,
    /// Write the table anew.
    #[arg(long)]
    write: bool,
}

/// Calls in all, requests of ptrace(2) among them, bytes of the image, and faults of the victim's first process.
type Counts = [(&'static str, u64); 4];

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // SAFETY: numbers, and a set of ours.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut one);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one);
    }
    let torpor = torpor(arguments.torpor.as_ref())?;
    let dir = std::env::temp_dir().join(format!("torpor-counts-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let counted: anyhow::Result<Vec<(&str, Counts)>> = CASES
        .iter()
        .map(|(name, kind, size, how)| Ok((*name, count(&torpor, *kind, *size, how, &dir)?)))
        .collect();
    fs::remove_dir_all(&dir)?;
    let counted = counted?;
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../counts.json");
    if arguments.write {
        let rows: BTreeMap<&str, BTreeMap<&str, u64>> =
            counted.iter().map(|(name, counts)| (*name, counts.iter().copied().collect())).collect();
        return Ok(fs::write(&table, serde_json::to_string_pretty(&rows)? + "\n")?);
    }
    let known: BTreeMap<String, BTreeMap<String, u64>> =
        serde_json::from_slice(&fs::read(&table)?).context("tests/counts.json")?;
    let mut worse = Vec::new();
    for (name, counts) in &counted {
        for (what, now) in counts {
            let before = known.get(*name).and_then(|row| row.get(*what)).copied();
            println!("{name}: {what} {now} ({})", before.map_or("new".into(), |b| b.to_string()));
            let Some(before) = before else { continue };
            let slack = SLACK.0 + before / SLACK.1;
            if now.abs_diff(before) > slack {
                worse.push(format!(
                    "{name}: {what} {now}, {before} in the table, {slack} more or less allowed"
                ));
            }
        }
    }
    ensure!(
        worse.is_empty(),
        "counts have changed (`cargo xtask counts --write` if so wanted):\n{}",
        worse.join("\n")
    );
    Ok(())
}

fn count(torpor: &Path, kind: Kind, size: usize, how: &[&str], dir: &Path) -> anyhow::Result<Counts> {
    let image = dir.join("image");
    let _none = fs::remove_dir_all(&image);
    let victim = start(kind, size, dir)?;
    let pid = victim.id() as i32;
    let before = faults(pid)?;
    let mut args =
        vec![torpor.as_os_str().as_bytes().to_vec(), b"dump".to_vec(), b"--leave-running".to_vec()];
    args.extend(how.iter().map(|word| word.as_bytes().to_vec()));
    args.extend([b"--quiet".to_vec(), pid.to_string().into_bytes(), image.as_os_str().as_bytes().to_vec()]);
    let args = args.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
    let calls = calls(&args);
    let after = faults(pid)?;
    end(victim);
    let calls = calls?;
    let bytes = fs::read_dir(&image)?.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum();
    let ptrace = calls.get(&libc::SYS_ptrace).copied().unwrap_or(0);
    let all = calls.iter().filter(|(nr, _)| !WAITING.contains(nr)).map(|(_, n)| n).sum();
    Ok([
        ("calls", all),
        ("ptrace requests", ptrace),
        ("bytes", bytes),
        ("faults of the victim", after - before),
    ])
}

/// Minor faults of a process (proc_pid_stat(5), the tenth field).
fn faults(pid: i32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit(')').next().context("a stat line")?;
    Ok(rest.split_ascii_whitespace().nth(7).context("a stat line")?.parse()?)
}

/// Runs a program to its end and counts the system calls of all its threads and children by number.
fn calls(args: &[CString]) -> anyhow::Result<BTreeMap<i64, u64>> {
    let pointers: Vec<*const libc::c_char> =
        args.iter().map(|a| a.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: the child makes system calls on memory that was made ready; this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            libc::execv(pointers[0], pointers.as_ptr());
            libc::_exit(127);
        }
    }
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_EXITKILL;
    let mut inside: BTreeMap<i32, bool> = BTreeMap::new();
    let mut counts = BTreeMap::new();
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
                return Ok(counts);
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
            (begun, signal) = (true, 0);
        } else if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            let entered = inside.entry(tid).or_default();
            *entered = !*entered;
            if *entered {
                *counts.entry(number(tid)).or_default() += 1;
            }
        } else if status >> 16 != 0 || signal == libc::SIGSTOP || signal == libc::SIGTRAP {
            signal = 0;
        }
        // SAFETY: it stands, or has gone, which is told next.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, signal) };
    }
}

/// The number of the call that a thread enters (ptrace(2), `PTRACE_GET_SYSCALL_INFO`).
fn number(tid: i32) -> i64 {
    let mut info = [0u64; 11];
    // SAFETY: the kernel fills as much as it is told there is.
    unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size_of_val(&info), &raw mut info) };
    info[3].cast_signed()
}
