//! Planning credentials: last of all, since most other calls need the privilege that goes here.

use nix::errno::Errno;
use torpor_image::credentials::Credentials;
use torpor_image::task::Task;
use torpor_kernel::ids::Pid;
use torpor_kernel::status;
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::error::Error;
use crate::host::Host;

const SECBIT_KEEP_CAPS: u32 = 1 << 4;
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Gives a thread its credentials; nothing where it has them already.
pub(crate) fn plan(script: &mut Script, wanted: &Credentials, host: &Host) {
    let have = &host.credentials;
    let no_new_privileges = |script: &mut Script| {
        if wanted.no_new_privileges && !have.no_new_privileges {
            let args = [Value::from(libc::PR_SET_NO_NEW_PRIVS), 1.into(), 0.into(), 0.into(), 0.into()];
            script.call("no_new_privs", libc::SYS_prctl, &args);
        }
    };
    if (Credentials { no_new_privileges: have.no_new_privileges, ..wanted.clone() }) == *have {
        no_new_privileges(script);
        return;
    }
    let prctl = |script: &mut Script, purpose: String, args: &[u64]| {
        let args: Vec<Value> = args.iter().map(|a| Value::Number(*a)).collect();
        script.call(purpose, libc::SYS_prctl, &args);
    };
    if wanted.groups != have.groups {
        let bytes: Vec<u8> = wanted.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
        let data = script.data(&bytes);
        call!(script, "supplementary groups", libc::SYS_setgroups, wanted.groups.len(), data);
    }
    let all = have.permitted;
    // Inheritable capabilities may exceed a bounding set only while that has not shrunk yet.
    capset(script, all, all, wanted.inheritable);
    for capability in 0..=host.last_capability {
        let bit = 1u64 << capability;
        if wanted.bounding & bit == 0 && have.bounding & bit != 0 {
            prctl(
                script,
                format!("the bounding set (capability {capability})"),
                &[libc::PR_CAPBSET_DROP as u64, u64::from(capability)],
            );
        }
    }
    let changes_bits = wanted.securebits != have.securebits;
    let changes_ids = wanted.uids != have.uids || wanted.gids != have.gids;
    if changes_ids {
        // Permitted capabilities must outlive the change of user id; what is to go goes by capset below.
        if have.permitted != 0 {
            prctl(script, "keeping capabilities".into(), &[libc::PR_SET_KEEPCAPS as u64, 1]);
        }
        let [real, effective, saved, fs] = wanted.gids;
        call!(script, "group ids", libc::SYS_setresgid, real, effective, saved);
        if fs != effective {
            script.try_call("the file system group id", libc::SYS_setfsgid, &[fs.into()]);
        }
        let [real, effective, saved, fs] = wanted.uids;
        call!(script, "user ids", libc::SYS_setresuid, real, effective, saved);
        if fs != effective {
            script.try_call("the file system user id", libc::SYS_setfsuid, &[fs.into()]);
        }
        // The change of ids took the effective ones away.
        capset(script, all, all, wanted.inheritable);
    }
    // Ambient capabilities must be permitted and inheritable, and securebits may forbid to raise them.
    if have.ambient != 0 {
        prctl(
            script,
            "ambient capabilities".into(),
            &[libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0, 0, 0],
        );
    }
    for capability in 0..=host.last_capability {
        if wanted.ambient & (1 << capability) != 0 {
            prctl(
                script,
                format!("ambient capability {capability}"),
                &[
                    libc::PR_CAP_AMBIENT as u64,
                    libc::PR_CAP_AMBIENT_RAISE as u64,
                    u64::from(capability),
                    0,
                    0,
                ],
            );
        }
    }
    if changes_bits {
        prctl(script, "securebits".into(), &[libc::PR_SET_SECUREBITS as u64, u64::from(wanted.securebits)]);
    } else if changes_ids && have.permitted != 0 && wanted.securebits & SECBIT_KEEP_CAPS == 0 {
        prctl(script, "keeping capabilities".into(), &[libc::PR_SET_KEEPCAPS as u64, 0]);
    }
    capset(script, wanted.permitted, wanted.effective, wanted.inheritable);
    no_new_privileges(script);
}

fn capset(script: &mut Script, permitted: u64, effective: u64, inheritable: u64) {
    let header = script.data(&[LINUX_CAPABILITY_VERSION_3.to_ne_bytes(), [0; 4]].concat());
    let halves = |shift: u32| {
        [effective, permitted, inheritable].map(|set| ((set >> shift) as u32).to_ne_bytes()).concat()
    };
    let data = script.data(&[halves(0), halves(32)].concat());
    call!(script, "capabilities", libc::SYS_capset, header, data);
}

/// Capabilities by number (linux/capability.h), without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Names of capabilities.
fn names(set: u64) -> String {
    let all = NAMES.iter().enumerate().filter(|(i, _)| set & (1 << i) != 0);
    all.map(|(_, name)| format!("CAP_{name}")).collect::<Vec<_>>().join(", ")
}

/// What a user or group that cannot be had means, told by the purpose of the call: in a user namespace there are those
/// that are mapped into it (user_namespaces(7)).
pub(crate) fn unmapped(task: &Task, purpose: &str) -> Option<Error> {
    let first = &task.leader().credentials;
    let wanted = match purpose {
        "user ids" => format!("user {}", first.uids[0]),
        "group ids" => format!("group {}", first.gids[0]),
        "supplementary groups" => format!("every one of the groups {:?}", first.groups),
        _ => return None,
    };
    Some(Error::Unfit {
        what: task.title(),
        why: format!("torpor's user namespace does not have {wanted}"),
        remedy: "restore it outside of that namespace, or map it there (/proc/PID/uid_map, gid_map)".into(),
    })
}

/// What a call of [`plan`] that is not permitted means, told by its purpose.
pub(crate) fn denied(task: &Task, purpose: &str) -> Option<Error> {
    let error = |what: String, call, remedy| Error::Permission { what, call, errno: Errno::EPERM, remedy };
    let title = task.title();
    Some(match purpose {
        "group ids" => error(title, "setresgid", "run torpor with CAP_SETGID"),
        "supplementary groups" => error(title, "setgroups", "run torpor with CAP_SETGID"),
        "user ids" => error(title, "setresuid", "run torpor with CAP_SETUID"),
        "capabilities" => {
            let have = status::of_process(Pid::this()).map_or(0, |own| own.cap_permitted);
            let wanted = task.threads.iter().fold(0, |all, t| all | t.credentials.permitted);
            let what = match names(wanted & !have) {
                lacking if lacking.is_empty() => title,
                lacking => format!("{title}, which has {lacking} and torpor has not"),
            };
            error(what, "capset", "run torpor with all capabilities of the process")
        }
        "securebits" => error(title, "prctl(PR_SET_SECUREBITS)", "run torpor with CAP_SETPCAP"),
        _ if purpose.starts_with("the bounding set") => {
            error(title, "prctl(PR_CAPBSET_DROP)", "run torpor with CAP_SETPCAP")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_names() {
        assert_eq!(names(0), "");
        assert_eq!(names(1 << 40 | 1 << 21 | 1), "CAP_CHOWN, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE");
    }
}
