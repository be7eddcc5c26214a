//! The smaller things to know of a process or a thread: one file or one call each.
//!
//! All from outside and without stopping it. What is asked of a running process may be outdated at once; freezing
//! first, or reading again afterwards, is the caller's business.

use std::mem::size_of;

use nix::errno::Errno;

use crate::error::check;
use crate::text::{hex, lines, list, list_numbers, number, read, read_record, readlink, words};
use crate::{Error, Pid, Result, Tid, abi, stat};

/// The threads, in order of tid.
pub fn tasks(pid: Pid) -> Result<Vec<Tid>> {
    Ok(list_numbers(&format!("/proc/{pid}/task"))?.into_iter().map(Tid).collect())
}

/// The children of all threads (a child belongs to the thread that made it). Needs CONFIG_PROC_CHILDREN.
///
/// Only complete while the process is frozen (proc_pid_children(5)). Threads that end meanwhile are skipped.
pub fn children(pid: Pid) -> Result<Vec<Pid>> {
    children_of(pid, tasks(pid)?)
}

/// The children of some of its threads.
pub fn children_of(pid: Pid, threads: impl IntoIterator<Item = Tid>) -> Result<Vec<Pid>> {
    let mut all = Vec::new();
    for tid in threads {
        let path = format!("/proc/{pid}/task/{tid}/children");
        let text = match read(&path) {
            Err(error) if error.is_gone() && tid != pid.leader() => continue,
            text => text?,
        };
        for word in words(text.trim_ascii()) {
            all.push(Pid(number(word).ok_or_else(|| Error::parse(&path, word))?));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// Number of resource limits (`RLIM_NLIMITS`).
pub const LIMITS: usize = 16;

/// Soft and hard limits, indexed by `RLIMIT_*`; `u64::MAX` is unlimited.
pub fn limits(pid: Pid) -> Result<[(u64, u64); LIMITS]> {
    let mut all = [(0, 0); LIMITS];
    for (resource, limit) in all.iter_mut().enumerate() {
        let mut raw = [0u64; 2];
        // SAFETY: `struct rlimit64` is two u64; nothing is set.
        let got = unsafe {
            libc::syscall(libc::SYS_prlimit64, pid.0, resource, std::ptr::null::<u64>(), raw.as_mut_ptr())
        };
        check(got, "prlimit64", pid)?;
        *limit = (raw[0], raw[1]);
    }
    Ok(all)
}

/// The auxiliary vector as it is in memory: pairs of words.
pub fn auxv(pid: Pid) -> Result<Vec<u8>> {
    read(&format!("/proc/{pid}/auxv"))
}

/// The arguments, each ended by a NUL (unless the process overwrote them).
pub fn cmdline(pid: Pid) -> Result<Vec<u8>> {
    read(&format!("/proc/{pid}/cmdline"))
}

/// The thread's name.
pub fn comm(pid: Pid, tid: Tid) -> Result<Vec<u8>> {
    let mut name = read_record(&format!("/proc/{pid}/task/{tid}/comm"))?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Ok(name)
}

/// The executable's path, perhaps with " (deleted)".
pub fn exe(pid: Pid) -> Result<Vec<u8>> {
    readlink(&format!("/proc/{pid}/exe"))
}

/// The working directory, perhaps with " (deleted)".
pub fn cwd(pid: Pid) -> Result<Vec<u8>> {
    readlink(&format!("/proc/{pid}/cwd"))
}

/// The root directory.
pub fn root(pid: Pid) -> Result<Vec<u8>> {
    readlink(&format!("/proc/{pid}/root"))
}

/// The execution domain, as of personality(2).
pub fn personality(pid: Pid) -> Result<u32> {
    let path = format!("/proc/{pid}/personality");
    let text = read_record(&path)?;
    hex(&text).and_then(|value| u32::try_from(value).ok()).ok_or_else(|| Error::parse(path, &text))
}

/// How likely the process is to be killed for want of memory: -1000 to 1000.
pub fn oom_score_adj(pid: Pid) -> Result<i32> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let text = read_record(&path)?;
    number(&text).ok_or_else(|| Error::parse(path, &text))
}

/// How many tasks the user of a process may have for it to make another (`RLIMIT_NPROC`); `None` for no limit.
/// Read from /proc: prlimit64 of another user's process wants a privilege that even root may lack.
pub fn task_limit(pid: Pid) -> Option<u64> {
    let text = read(&format!("/proc/{pid}/limits")).ok()?;
    let line = lines(&text).find_map(|l| l.strip_prefix(b"Max processes"))?;
    number(line.trim_ascii_start().split(u8::is_ascii_whitespace).next()?)
}

/// How many tasks there are in all, those of the kernel among them (/proc/loadavg, the second number of the fourth
/// field).
pub fn tasks_of_all_users() -> Option<u64> {
    let text = read("/proc/loadavg").ok()?;
    let field = text.split(u8::is_ascii_whitespace).nth(3)?;
    number(field.splitn(2, |b| *b == b'/').nth(1)?)
}

/// How many tasks want to run for each processor at this moment, `more` of them as soon as they can; 1 where it is not told.
pub fn crowd(more: u32) -> u32 {
    let running = || {
        let text = read("/proc/loadavg").ok()?;
        let field = text.split(u8::is_ascii_whitespace).nth(3)?;
        number::<u32>(field.split(|b| *b == b'/').next()?)
    };
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    running().map_or(1, |running| (running + more).div_ceil(processors))
}

/// How many tasks have this real user. Takes a look at every process.
pub fn tasks_of_user(uid: u32) -> u64 {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid));
    let of_user = pids.filter_map(|pid| crate::status::of_process(pid).ok()).filter(|s| s.uids[0] == uid);
    of_user.map(|s| u64::from(s.threads)).sum()
}

/// Which kinds of mappings go into a core dump; `None` for a task without memory, or without CONFIG_ELF_CORE.
pub fn coredump_filter(pid: Pid) -> Result<Option<u32>> {
    let path = format!("/proc/{pid}/coredump_filter");
    let text = match read_record(&path) {
        Err(error) if error.errno() == Some(Errno::ENOENT) => {
            // Either the file or the process is missing.
            return stat::of_process(pid).map(|_| None);
        }
        text => text?,
    };
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    let value = hex(&text).and_then(|value| u32::try_from(value).ok());
    value.map(Some).ok_or_else(|| Error::parse(path, &text))
}

/// How late timers of the thread may be, in nanoseconds. Of a foreign task: `CAP_SYS_NICE`.
pub fn timerslack_ns(tid: Tid) -> Result<u64> {
    let path = format!("/proc/{tid}/timerslack_ns");
    let text = read(&path)?;
    number(&text).ok_or_else(|| Error::parse(path, &text))
}

/// All entries of /proc/PID/ns with the inode that identifies the namespace, by name.
///
/// `pid_for_children` is missing between unshare(2) and the first child: there is no namespace to show then.
pub fn namespaces(pid: Pid) -> Result<Vec<(String, u64)>> {
    let directory = format!("/proc/{pid}/ns");
    let mut all = Vec::new();
    for name in list(&directory)? {
        let name = String::from_utf8_lossy(&name).into_owned();
        let path = format!("{directory}/{name}");
        let target = match readlink(&path) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => continue,
            target => target?,
        };
        all.push((name, namespace_inode(&target).ok_or_else(|| Error::parse(path, &target))?));
    }
    all.sort_unstable();
    Ok(all)
}

/// `net:[4026531840]`
fn namespace_inode(link: &[u8]) -> Option<u64> {
    let open = link.iter().position(|byte| *byte == b'[')?;
    number(link[open + 1..].strip_suffix(b"]")?)
}

/// Head and length of the robust futex list, as given to set_robust_list(2); head 0 for none.
pub fn robust_list(tid: Tid) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0usize, 0usize);
    // SAFETY: both places are words of ours.
    let got = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    check(got, "get_robust_list", tid)?;
    Ok((head as u64, len as u64))
}

/// Scheduling, as of sched_setattr(2).
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct SchedAttr {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value, for the normal policies.
    pub nice: i32,
    /// Static priority, for the real-time policies.
    pub priority: u32,
    /// Nanoseconds, for the deadline policy (and the slice of the normal ones since 6.12).
    pub runtime: u64,
    /// Nanoseconds, for the deadline policy.
    pub deadline: u64,
    /// Nanoseconds, for the deadline policy.
    pub period: u64,
    /// Utilization clamp: least.
    pub util_min: u32,
    /// Utilization clamp: most.
    pub util_max: u32,
}

/// The scheduling of a thread.
pub fn scheduling(tid: Tid) -> Result<SchedAttr> {
    let mut raw = abi::sched_attr::default();
    // SAFETY: the kernel writes at most the size given.
    let got = unsafe {
        libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut raw, size_of::<abi::sched_attr>(), 0)
    };
    check(got, "sched_getattr", tid)?;
    Ok(SchedAttr {
        policy: raw.sched_policy,
        flags: raw.sched_flags,
        nice: raw.sched_nice,
        priority: raw.sched_priority,
        runtime: raw.sched_runtime,
        deadline: raw.sched_deadline,
        period: raw.sched_period,
        util_min: raw.sched_util_min,
        util_max: raw.sched_util_max,
    })
}

/// The CPUs a thread may run on: a bit set of as many bytes as the kernel uses, CPU 0 in the lowest bit of the first.
pub fn affinity(tid: Tid) -> Result<Vec<u8>> {
    // `EINVAL` if the set is larger than the buffer; the largest CONFIG_NR_CPUS is 8192, 1 KiB.
    let mut mask = vec![0u8; 8192];
    // SAFETY: the kernel writes at most the length given.
    let got = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid.0, mask.len(), mask.as_mut_ptr()) };
    let got = check(got, "sched_getaffinity", tid)?;
    mask.truncate(usize::try_from(got).unwrap_or(0));
    Ok(mask)
}

/// I/O scheduling class and priority, as of ioprio_set(2); class 0 means "follows the nice value".
pub fn io_priority(tid: Tid) -> Result<i32> {
    // SAFETY: takes two numbers.
    let got = unsafe { libc::syscall(libc::SYS_ioprio_get, abi::IOPRIO_WHO_PROCESS, tid.0) };
    Ok(check(got, "ioprio_get", tid)? as i32)
}

/// The system call a thread is blocked in.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct BlockedCall {
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
    /// The stack pointer of the thread.
    pub sp: u64,
    /// Its instruction pointer.
    pub ip: u64,
}

/// The system call a thread is blocked in (/proc/PID/task/TID/syscall, proc_pid_syscall(5)); `None` when it runs or is
/// blocked for another reason.
pub fn blocked_call(pid: Pid, tid: Tid) -> Result<Option<BlockedCall>> {
    let text = read(&format!("/proc/{pid}/task/{tid}/syscall"))?;
    Ok(parse_blocked_call(&String::from_utf8_lossy(&text)))
}

fn parse_blocked_call(text: &str) -> Option<BlockedCall> {
    let mut words = text.split_ascii_whitespace();
    let nr = words.next()?.parse().ok().filter(|nr| *nr >= 0)?;
    let mut next = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let args = [next()?, next()?, next()?, next()?, next()?, next()?];
    Some(BlockedCall { nr, args, sp: next()?, ip: next()? })
}

/// The kernel function a thread sleeps in (/proc/PID/task/TID/wchan), empty where the kernel does not tell.
pub fn wait_channel(pid: Pid, tid: Tid) -> Result<String> {
    let text = read(&format!("/proc/{pid}/task/{tid}/wchan"))?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

/// Whether it has ended or is about to: its memory and files go first, while its state still reads as running.
pub fn is_ending(pid: Pid) -> bool {
    stat::of_process(pid).map_or(true, |stat| stat.flags & abi::PF_EXITING != 0)
}

/// Whether it is a kernel thread.
pub fn is_kernel_thread(pid: Pid) -> Result<bool> {
    Ok(stat::of_process(pid)?.flags & abi::PF_KTHREAD != 0)
}

/// Whether a thread works for a ring of io_uring (`iou-wrk-PID`, `iou-sqp-PID`): it runs no program.
pub fn is_io_worker(pid: Pid, tid: Tid) -> bool {
    stat::of_task(pid, tid).is_ok_and(|stat| stat.flags & abi::PF_IO_WORKER != 0)
}

/// The name of the process or thread that has this number. A number may also be taken as that of a process group or
/// session whose leader is gone; then nobody is found.
pub fn who_holds(number: i32) -> Option<String> {
    // /proc lists leaders only, but opens by any tid.
    let name = read(&format!("/proc/{number}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

/// The number that all pids are below.
pub fn pid_max() -> Option<i32> {
    number(read("/proc/sys/kernel/pid_max").ok()?.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_call_is_read() {
        let call = parse_blocked_call("219 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffd0 0x7f01\n").expect("a call");
        assert_eq!((call.nr, call.args[5], call.sp, call.ip), (219, 6, 0x7_ffd0, 0x7f01));
        assert_eq!(parse_blocked_call("running\n"), None);
        assert_eq!(parse_blocked_call("-1 0x7ffd0 0x7f01\n"), None);
    }

    #[test]
    fn our_own() {
        let (pid, tid) = (Pid::this(), Tid::this());
        assert!(tasks(pid).unwrap().contains(&tid));
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        assert!(children(pid).unwrap().contains(&Pid(child.id().cast_signed())));
        child.kill().unwrap();
        child.wait().unwrap();
        let (soft, hard) = limits(pid).unwrap()[libc::RLIMIT_NOFILE as usize];
        assert!(soft <= hard && soft > 0);
        assert_eq!(auxv(pid).unwrap().len() % 16, 0);
        assert!(!cmdline(pid).unwrap().is_empty());
        assert!(exe(pid).unwrap().starts_with(b"/"));
        assert!(cwd(pid).unwrap().starts_with(b"/"));
        assert_eq!(root(pid).unwrap(), b"/");
        assert!(!comm(pid, tid).unwrap().is_empty());
        personality(pid).unwrap();
        assert!((-1000..=1000).contains(&oom_score_adj(pid).unwrap()));
        coredump_filter(pid).unwrap();
        assert!(timerslack_ns(tid).unwrap() > 0);
        assert!(namespaces(pid).unwrap().iter().any(|(name, inode)| name == "pid" && *inode != 0));
        robust_list(tid).unwrap();
        assert_eq!(scheduling(tid).unwrap().policy, libc::SCHED_OTHER.cast_unsigned());
        let mask = affinity(tid).unwrap();
        assert!(mask.len().is_multiple_of(8) && mask.iter().any(|byte| *byte != 0));
        io_priority(tid).unwrap();
        assert!(!is_kernel_thread(pid).unwrap());
        assert!(who_holds(tid.0).is_some());
        assert_eq!(who_holds(0x3fff_ffff), None);
        assert!(pid_max().is_some_and(|max| max > pid.0));
        assert!(coredump_filter(Pid(0x3fff_ffff)).unwrap_err().is_gone());
    }

    #[test]
    fn links() {
        assert_eq!(namespace_inode(b"net:[4026531840]"), Some(4_026_531_840));
        for link in [&b""[..], b"net:[", b"net:[x]", b"net:4"] {
            assert_eq!(namespace_inode(link), None);
        }
    }
}
