//! /proc/PID/status: credentials, signal sets, capabilities, ids in each pid namespace.
//!
//! Lines are `Key:\tvalue` (fs/proc/array.c). Which lines there are depends on version and configuration, so a missing
//! one leaves its default, and one that does not parse is an error. `Name` is escaped (`\n` and `\\`): the kernel
//! uses `string_escape` flags `ESCAPE_SPACE | ESCAPE_SPECIAL` there, so `\t`, `\a`, `\e`, `"` are escaped as well.

use crate::text::{hex, key_value, lines, number, octal, read_record, words};
use crate::{Error, Pid, Result, Tid};

/// What the status file says, as far as a dumper needs it.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Status {
    /// The thread's name, unescaped.
    pub name: Vec<u8>,
    /// File mode creation mask; 0 for a zombie.
    pub umask: u32,
    /// State letter: R, S, D, T, t, X, Z, P, I.
    pub state: char,
    /// Thread group.
    pub tgid: i32,
    /// The thread.
    pub pid: i32,
    /// Parent.
    pub ppid: i32,
    /// Who traces it; 0 for nobody, or somebody in another pid namespace.
    pub tracer_pid: i32,
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// Real, effective, saved and file system group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Process id in each pid namespace, ours first.
    pub ns_tgid: Vec<i32>,
    /// Thread id in each pid namespace, ours first.
    pub ns_pid: Vec<i32>,
    /// Process group in each pid namespace, ours first; 0 where it is not visible.
    pub ns_pgid: Vec<i32>,
    /// Session in each pid namespace, ours first; 0 where it is not visible.
    pub ns_sid: Vec<i32>,
    /// Threads of the process.
    pub threads: u32,
    /// Pending for the thread, bit 0 for signal 1; so for all sets.
    pub sig_pending: u64,
    /// Pending for the process.
    pub shared_pending: u64,
    /// Blocked.
    pub blocked: u64,
    /// Ignored.
    pub ignored: u64,
    /// With a handler.
    pub caught: u64,
    /// Inheritable capabilities, bit 0 for capability 0; so for all sets.
    pub cap_inheritable: u64,
    /// Permitted capabilities.
    pub cap_permitted: u64,
    /// Effective capabilities.
    pub cap_effective: u64,
    /// Bounding set.
    pub cap_bounding: u64,
    /// Ambient capabilities.
    pub cap_ambient: u64,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filters.
    pub seccomp: u32,
    /// Number of seccomp filters; `None` before 5.9.
    pub seccomp_filters: Option<u32>,
    /// Whether transparent huge pages are allowed (`PR_SET_THP_DISABLE`); `None` before 5.0 and for zombies.
    pub thp_enabled: Option<bool>,
    /// A core dump is being written; `None` before 4.15.
    pub core_dumping: Option<bool>,
    /// Locked and unlocked features of shadow stacks, as text; x86 with CET only.
    pub x86_thread_features: Vec<u8>,
    /// CPUs it may run on, in list form, as text.
    pub cpus_allowed: Vec<u8>,
    /// Memory nodes it may allocate from, in list form, as text.
    pub mems_allowed: Vec<u8>,
    /// Peak and present sizes are not kept, but this one decides how a snapshot is taken: resident memory, kB.
    pub rss_kb: u64,
}

/// The status of a process, which is that of its leader.
pub fn of_process(pid: Pid) -> Result<Status> {
    let path = format!("/proc/{pid}/status");
    parse_file(&path, &read_record(&path)?)
}

/// The status of one thread.
pub fn of_task(pid: Pid, tid: Tid) -> Result<Status> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    parse_file(&path, &read_record(&path)?)
}

/// Parses the text of a status file.
pub fn parse(text: &[u8]) -> Result<Status> {
    parse_file("status", text)
}

fn parse_file(file: &str, text: &[u8]) -> Result<Status> {
    let mut status = Status { state: '?', ..Status::default() };
    for line in lines(text) {
        if let Some((key, value)) = key_value(line) {
            add(&mut status, key, value).ok_or_else(|| Error::parse(file, line))?;
        }
    }
    if status.pid == 0 {
        return Err(Error::parse(file, text));
    }
    Ok(status)
}

fn add(status: &mut Status, key: &[u8], value: &[u8]) -> Option<()> {
    match key {
        b"Name" => status.name = unescape_name(value),
        b"Umask" => status.umask = u32::try_from(octal(value)?).ok()?,
        b"State" => status.state = char::from(*value.first()?),
        b"Tgid" => status.tgid = number(value)?,
        b"Pid" => status.pid = number(value)?,
        b"PPid" => status.ppid = number(value)?,
        b"TracerPid" => status.tracer_pid = number(value)?,
        b"Uid" => status.uids = numbers(value)?.try_into().ok()?,
        b"Gid" => status.gids = numbers(value)?.try_into().ok()?,
        b"Groups" => status.groups = numbers(value)?,
        b"NStgid" => status.ns_tgid = numbers(value)?,
        b"NSpid" => status.ns_pid = numbers(value)?,
        b"NSpgid" => status.ns_pgid = numbers(value)?,
        b"NSsid" => status.ns_sid = numbers(value)?,
        b"Threads" => status.threads = number(value)?,
        b"SigPnd" => status.sig_pending = hex(value)?,
        b"ShdPnd" => status.shared_pending = hex(value)?,
        b"SigBlk" => status.blocked = hex(value)?,
        b"SigIgn" => status.ignored = hex(value)?,
        b"SigCgt" => status.caught = hex(value)?,
        b"CapInh" => status.cap_inheritable = hex(value)?,
        b"CapPrm" => status.cap_permitted = hex(value)?,
        b"CapEff" => status.cap_effective = hex(value)?,
        b"CapBnd" => status.cap_bounding = hex(value)?,
        b"CapAmb" => status.cap_ambient = hex(value)?,
        b"NoNewPrivs" => status.no_new_privs = number::<u32>(value)? != 0,
        b"Seccomp" => status.seccomp = number(value)?,
        b"Seccomp_filters" => status.seccomp_filters = Some(number(value)?),
        b"THP_enabled" => status.thp_enabled = Some(number::<u32>(value)? != 0),
        b"CoreDumping" => status.core_dumping = Some(number::<u32>(value)? != 0),
        b"x86_Thread_features" => status.x86_thread_features = value.to_vec(),
        b"Cpus_allowed_list" => status.cpus_allowed = value.to_vec(),
        b"Mems_allowed_list" => status.mems_allowed = value.to_vec(),
        b"VmRSS" => status.rss_kb = number(value.strip_suffix(b"kB")?)?,
        _ => {}
    }
    Some(())
}

fn numbers<T: std::str::FromStr>(value: &[u8]) -> Option<Vec<T>> {
    words(value).map(number).collect()
}

/// Undoes `string_escape_str(.., ESCAPE_SPACE | ESCAPE_SPECIAL, "\n\\")` (lib/string_helpers.c).
fn unescape_name(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut bytes = name.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b'n') => out.push(b'\n'),
            Some(b'r') => out.push(b'\r'),
            Some(b't') => out.push(b'\t'),
            Some(b'v') => out.push(0x0b),
            Some(b'f') => out.push(0x0c),
            Some(b'a') => out.push(0x07),
            Some(b'e') => out.push(0x1b),
            // The backslash itself and the quotation mark.
            Some(other) => out.push(other),
            None => out.push(b'\\'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"Name:\ta b\\\\\\n\xff\nUmask:\t0022\nState:\tT (stopped)\nTgid:\t3973\nNgid:\t0\nPid:\t3974\n\
PPid:\t3970\nTracerPid:\t7\nUid:\t0\t1\t2\t3\nGid:\t4\t5\t6\t7\nFDSize:\t256\nGroups:\t4 24 \n\
NStgid:\t3973\t1\nNSpid:\t3974\t2\nNSpgid:\t3970\t0\nNSsid:\t3429\t0\nVmRSS:\t   14860 kB\nTHP_enabled:\t1\n\
Threads:\t2\nSigQ:\t3/96365\nSigPnd:\t0000000000000001\nShdPnd:\t0000000000000002\nSigBlk:\t8000000000000000\n\
SigIgn:\t0000000001001000\nSigCgt:\t0000000000000002\nCapInh:\t0000000000000000\nCapPrm:\t000001fffeffffff\n\
CapEff:\t000001fffeffffff\nCapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n\
Seccomp_filters:\t3\nCpus_allowed:\t3\nCpus_allowed_list:\t0-1\nMems_allowed_list:\t0\n";

    #[test]
    fn text() {
        let status = parse(TEXT).unwrap();
        assert_eq!(status.name, b"a b\\\n\xff");
        assert_eq!((status.umask, status.state), (0o22, 'T'));
        assert_eq!((status.tgid, status.pid, status.ppid, status.tracer_pid), (3973, 3974, 3970, 7));
        assert_eq!((status.uids, status.gids), ([0, 1, 2, 3], [4, 5, 6, 7]));
        assert_eq!(status.groups, [4, 24]);
        assert_eq!((status.ns_pid.as_slice(), status.ns_sid.as_slice()), (&[3974, 2][..], &[3429, 0][..]));
        assert_eq!((status.sig_pending, status.shared_pending, status.blocked), (1, 2, 1 << 63));
        assert_eq!((status.ignored, status.caught), (0x100_1000, 2));
        assert_eq!(status.cap_effective, 0x1ff_feff_ffff);
        assert!(status.no_new_privs);
        assert_eq!((status.seccomp, status.seccomp_filters), (2, Some(3)));
        assert_eq!((status.thp_enabled, status.core_dumping), (Some(true), None));
        assert_eq!(status.cpus_allowed, b"0-1");
        assert_eq!((status.threads, status.rss_kb), (2, 14860));
    }

    #[test]
    fn odd_input_is_an_error() {
        for text in
            [&b""[..], b"\xff\n", b"Pid:\t1\nUid:\t1\t2\n", b"Pid:\t1\nState:\t\n", b"Pid:\t1\nSigBlk:\tx\n"]
        {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn our_own() {
        let status = of_process(Pid::this()).unwrap();
        assert_eq!(status.tgid, Pid::this().0);
        let status = of_task(Pid::this(), Tid::this()).unwrap();
        assert_eq!(status.pid, Tid::this().0);
    }
}
