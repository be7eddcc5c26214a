//! Whether there is room for what is to be measured: memory and disk are asked first, nobody shall be ended for us.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::ensure;

/// Fails, and says why, where `memory` bytes of memory or `disk` bytes in `dir` are not to be had.
pub(crate) fn need(memory: u64, disk: u64, dir: &Path) -> anyhow::Result<()> {
    let there = available_memory();
    ensure!(
        there >= memory,
        "skipped: it takes {} MiB of memory, {} MiB are available",
        memory >> 20,
        there >> 20
    );
    let there = available_disk(dir);
    ensure!(
        there >= disk,
        "skipped: it takes {} MiB in `{}`, {} MiB are free",
        disk >> 20,
        dir.display(),
        there >> 20
    );
    Ok(())
}

/// proc_meminfo(5).
fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// statvfs(3).
fn available_disk(dir: &Path) -> u64 {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else { return 0 };
    // SAFETY: all zeros is a valid statvfs; the path ends with a zero.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(path.as_ptr(), &raw mut stat) != 0 {
            return 0;
        }
        stat.f_bavail * stat.f_frsize
    }
}

/// What the figures were measured on.
pub(crate) fn machine(dir: &Path) -> serde_json::Value {
    let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().next().and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map(|l| l.trim_start_matches([' ', '\t', ':']));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let on = |l: &&str| l.split(' ').nth(1).is_some_and(|at| dir.starts_with(at));
    let mount = mounts.lines().filter(on).max_by_key(|l| l.split(' ').nth(1).map_or(0, str::len));
    serde_json::json!({
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "cpu": cpu,
        "memory, MiB": memory.map(|kib| kib >> 10),
        "kernel": line("/proc/sys/kernel/osrelease"),
        "load before": line("/proc/loadavg"),
        "transparent huge pages": line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "images on": mount.and_then(|l| l.split(' ').nth(2)),
    })
}
