//! What /proc and kcmp(2) say of every member of a tree, in a form that must be the same after a restore.

use std::collections::BTreeMap;
use std::fs;

use torpor_tests::{Outcome, descriptors, members, tids};

/// By pid and subject.
pub(crate) type Look = BTreeMap<String, Vec<String>>;

/// Of a field of /proc/PID/stat, by its number in proc_pid_stat(5); the first after the name is 3.
struct Stat(Vec<String>);

impl Stat {
    fn of(pid: i32) -> Outcome<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| format!("pid {pid}: {e}"))?;
        let rest = text.rsplit_once(')').ok_or("no name")?.1;
        Ok(Stat(rest.split_ascii_whitespace().map(str::to_owned).collect()))
    }

    fn field(&self, number: usize) -> &str {
        self.0.get(number - 3).map_or("", String::as_str)
    }
}

/// Everything about the tree below `root`, which does nothing but go round.
pub(crate) fn at(root: i32) -> Outcome<Look> {
    let mut all = Look::new();
    let mut pids = members(root);
    pids.push(root);
    pids.sort_unstable();
    let mut open = Vec::new();
    for &pid in &pids {
        let stat = Stat::of(pid)?;
        let state = match stat.field(3) {
            "R" | "S" | "D" => "lives",
            "T" => "stopped",
            other => other,
        };
        let ppid = if pid == root { "-" } else { stat.field(4) };
        let mut relations: Vec<String> =
            [("group", 5), ("session", 6), ("tty", 7), ("exit signal", 38), ("threads", 20)]
                .iter()
                .map(|(name, n)| format!("{name} {}", stat.field(*n)))
                .collect();
        relations.extend([format!("state {state}"), format!("parent {ppid}")]);
        let ended = state == "Z";
        if ended {
            relations.push(format!("status {}", stat.field(52)));
        }
        all.insert(format!("{pid}/relations"), relations);
        let keys: &[&str] = if ended {
            &["Name", "State", "Tgid", "PPid"]
        } else {
            &[
                "Name",
                "Umask",
                "Tgid",
                "TracerPid",
                "Uid",
                "Gid",
                "Groups",
                "Threads",
                "ShdPnd",
                "SigIgn",
                "SigCgt",
                "CapEff",
                "NoNewPrivs",
            ]
        };
        let keys = if ended && pid == root { &keys[..3] } else { keys };
        all.insert(format!("{pid}/status"), status(pid, pid, keys));
        if ended {
            continue;
        }
        for tid in tids(pid) {
            all.insert(
                format!("{pid}/thread {tid}"),
                status(pid, tid, &["Name", "SigPnd", "SigBlk", "Cpus_allowed"]),
            );
        }
        all.insert(format!("{pid}/maps"), maps(pid));
        for (fd, link) in descriptors(pid) {
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            let flags = info.lines().find(|l| l.starts_with("flags:")).unwrap_or_default().to_owned();
            open.push((pid, fd, link, flags));
        }
    }
    let groups = shared(&open);
    for ((pid, fd, link, flags), group) in open.iter().zip(groups) {
        let (first, number, ..) = &open[group];
        let kind = link.split('[').next().unwrap_or_default();
        let line = format!("{fd} {kind} {flags} the same as {first}/{number}");
        all.entry(format!("{pid}/fds")).or_default().push(line);
    }
    Ok(all)
}

fn status(pid: i32, tid: i32, keys: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    text.lines().filter(|l| keys.iter().any(|k| l.split(':').next() == Some(k))).map(str::to_owned).collect()
}

/// Ranges, permissions and names; offsets in files. Private anonymous areas side by side are one or several as their
/// pages came about (mm/vma.c, `is_mergeable_anon_vma`), and count as one.
fn maps(pid: i32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut all: Vec<(String, String, String)> = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (start, end) = fields[0].split_once('-').unwrap_or_default();
        let name = fields.get(5..).unwrap_or_default().join(" ");
        let offset = if name.starts_with('/') { fields[2] } else { "" };
        let what = format!("{} {offset} {name}", fields[1]);
        match all.last_mut() {
            Some((_, last, other)) if last == start && name.is_empty() && *other == what => {
                *last = end.to_owned()
            }
            _ => all.push((start.to_owned(), end.to_owned(), what)),
        }
    }
    all.into_iter().map(|(start, end, what)| format!("{start}-{end} {what}")).collect()
}

/// For each open descriptor the first one that shares its description.
fn shared(open: &[(i32, i32, String, String)]) -> Vec<usize> {
    const KCMP_FILE: i32 = 0;
    let mut firsts: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut all = Vec::with_capacity(open.len());
    for (i, (pid, fd, link, _)) in open.iter().enumerate() {
        let firsts = firsts.entry(link).or_default();
        let same = |&&first: &&usize| {
            let (other, number, ..) = &open[first];
            // SAFETY: kcmp takes numbers only.
            unsafe { libc::syscall(libc::SYS_kcmp, *pid, *other, KCMP_FILE, *fd as u64, *number as u64) == 0 }
        };
        let first = firsts.iter().find(same).copied().unwrap_or(i);
        if first == i {
            firsts.push(i);
        }
        all.push(first);
    }
    all
}
