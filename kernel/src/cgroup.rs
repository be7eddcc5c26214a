//! What the control groups of this process still let it have.
//!
//! A limit that is met makes the kernel end some process of the group (Documentation/admin-guide/cgroup-v2.rst,
//! "memory.max"), which may be the one that is to be left alone. So whoever takes much memory asks before.

use crate::mountinfo::{Mount, mountinfo};
use crate::text::{lines, number, read};
use crate::{Pid, Result};

/// Bytes that may still be taken before the tightest limit of memory is met, of the group and of all above it; `None`
/// without any limit that can be read.
pub fn memory_left() -> Option<u64> {
    memory_left_of(Pid::this())
}

/// The same for the groups of another process.
pub fn memory_left_of(pid: Pid) -> Option<u64> {
    left_of(pid, MEMORY)
}

/// How many more tasks the groups of a process may have; `None` without any limit that can be read.
pub fn tasks_left_of(pid: Pid) -> Option<u64> {
    left_of(pid, TASKS)
}

/// The groups of a process, as /proc tells of them: processes of which it tells the same are in the same groups.
pub fn groups(pid: Pid) -> Result<Vec<u8>> {
    read(&format!("/proc/{pid}/cgroup"))
}

fn left_of(pid: Pid, what: Resource) -> Option<u64> {
    let groups = groups(pid).ok()?;
    let mounts = mountinfo(Pid::this()).ok()?;
    let left = lines(&groups).filter_map(|line| group(line, &mounts, what)).flat_map(|(at, top, files)| {
        let above = std::iter::successors(Some(at), |at| at.parent().map(Into::into));
        above.take_while(move |at| at.starts_with(&top)).filter_map(move |at| left(&at, files).ok().flatten())
    });
    left.min()
}

/// Names of the files that tell limit and usage.
type Files = (&'static str, &'static str);

/// What is limited.
#[derive(Clone, Copy)]
struct Resource {
    /// Its controller of version 1.
    controller: &'static [u8],
    v1: Files,
    v2: Files,
}

const MEMORY: Resource = Resource {
    controller: b"memory",
    v1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    v2: ("memory.max", "memory.current"),
};
const TASKS: Resource =
    Resource { controller: b"pids", v1: ("pids.max", "pids.current"), v2: ("pids.max", "pids.current") };

/// The directory of a group that limits a resource, and the mount that it is below.
fn group(
    line: &[u8],
    mounts: &[Mount],
    what: Resource,
) -> Option<(std::path::PathBuf, std::path::PathBuf, Files)> {
    use std::os::unix::ffi::OsStrExt;
    let mut fields = line.splitn(3, |b| *b == b':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let is_v1 = controllers.split(|b| *b == b',').any(|c| c == what.controller);
    let (kind, files): (&[u8], Files) = match controllers {
        b"" => (b"cgroup2", what.v2),
        _ if is_v1 => (b"cgroup", what.v1),
        _ => return None,
    };
    let fits = |m: &&Mount| {
        m.fs_type == kind && (!is_v1 || m.super_options.split(|b| *b == b',').any(|o| o == what.controller))
    };
    let mount = mounts.iter().find(fits)?;
    // A group above the mounted one cannot be seen.
    let below = if mount.root == b"/" { path } else { path.strip_prefix(mount.root.as_slice())? };
    let below = below.strip_prefix(b"/").unwrap_or(below);
    let top = std::path::PathBuf::from(std::ffi::OsStr::from_bytes(&mount.mount_point));
    Some((top.join(std::ffi::OsStr::from_bytes(below)), top, files))
}

fn left(at: &std::path::Path, (limit, usage): Files) -> Result<Option<u64>> {
    let value = |name: &str| Ok::<_, crate::Error>(number::<u64>(&read(&at.join(name).to_string_lossy())?));
    // "max" is no number.
    let Some(limit) = value(limit)? else { return Ok(None) };
    Ok(value(usage)?.map(|used| limit.saturating_sub(used)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts() -> Vec<Mount> {
        crate::mountinfo::parse(
            b"30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
              31 20 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
              32 20 0:28 /box /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        )
        .expect("parses")
    }

    #[test]
    fn groups_are_found_below_their_mounts() {
        let of = |line: &[u8]| group(line, &mounts(), MEMORY).map(|(at, ..)| at.display().to_string());
        assert_eq!(of(b"4:memory:/a/b").as_deref(), Some("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(of(b"0::/box/c").as_deref(), Some("/sys/fs/cgroup/unified/c"));
        assert_eq!(of(b"0::/elsewhere"), None);
        assert_eq!(of(b"1:cpu:/"), None);
    }

    #[test]
    fn limits_are_read() {
        let dir = std::env::temp_dir().join(format!("torpor-cgroup-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("made");
        let files = ("memory.max", "memory.current");
        let set = |limit: &str, used: &str| {
            std::fs::write(dir.join(files.0), limit).expect("written");
            std::fs::write(dir.join(files.1), used).expect("written");
            left(&dir, files).expect("read")
        };
        assert_eq!(set("max\n", "5\n"), None);
        assert_eq!(set("100\n", "40\n"), Some(60));
        assert_eq!(set("100\n", "140\n"), Some(0));
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
