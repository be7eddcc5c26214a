//! Planning a process: the phases its leader goes through.

use torpor_image::Image;
use torpor_image::inode::Source;
use torpor_image::task::Task;
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::host::Host;
use crate::plan::{Open, Planner};

const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
/// `struct prctl_mm_map` (linux/prctl.h): eleven addresses, the auxv with its length, a descriptor.
const MM_MAP: usize = 104;
const MM_AUXV: u32 = 88;
const MM_AUXV_SIZE: usize = 96;
const MM_EXE_FD: u32 = 100;
const PR_SET_MDWE: u64 = 65;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_THP_DISABLE: u64 = 41;
const RLIMIT_NOFILE: usize = 7;

/// Room for descriptor numbers while the table is built.
pub(crate) fn raise_descriptor_limit(script: &mut Script, host: &Host) {
    let (soft, hard) = host.limits[RLIMIT_NOFILE];
    if soft < hard {
        let limit = script.words(&[hard, hard]);
        call!(script, "room for descriptors", libc::SYS_prlimit64, 0, RLIMIT_NOFILE, limit, 0);
    }
}

/// The kernel's notes of the program: code, data, heap, arguments, auxiliary vector, program file.
pub(crate) fn mm_fields(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    let f = &task.memory.fields;
    let addresses = [
        f.start_code,
        f.end_code,
        f.start_data,
        f.end_data,
        f.start_brk,
        f.brk,
        f.start_stack,
        f.arg_start,
        f.arg_end,
        f.env_start,
        f.env_end,
    ];
    let mut bytes: Vec<u8> = addresses.iter().flat_map(|a| a.to_ne_bytes()).collect();
    bytes.resize(MM_MAP, 0);
    bytes[MM_AUXV_SIZE..MM_AUXV_SIZE + 4].copy_from_slice(&(task.memory.auxv.len() as u32).to_ne_bytes());
    let map = script.data(&bytes);
    let auxv = script.data(&task.memory.auxv);
    script.point(map.at(MM_AUXV), auxv);
    let program = &planner.image.objects.inodes[task.memory.exe.0 as usize];
    let named = matches!(program.source, Source::Path { .. });
    if named && (program.device, program.number) == planner.host.program {
        // A new task begins with our program, and may not change it for what it maps (kernel/fork.c,
        // `replace_mm_exe_file`).
        let none = script.data(&u32::MAX.to_ne_bytes());
        script.copy("the program file", map.at(MM_EXE_FD), none, 4);
    } else {
        let slot = planner.open(Open::Program { inode: task.memory.exe });
        let program = planner.descriptor(slot);
        let args = [program, libc::F_DUPFD_CLOEXEC.into(), 0.into()];
        let exe = script.call("the program file", libc::SYS_fcntl, &args);
        script.copy("the program file", map.at(MM_EXE_FD), Value::ResultAddress(exe), 4);
    }
    let n = Value::Number;
    let args = [n(PR_SET_MM), n(PR_SET_MM_MAP), map.into(), n(MM_MAP as u64), n(0)];
    script.call("the addresses of program, heap and arguments", libc::SYS_prctl, &args);
}

/// Root and working directory.
pub(crate) fn directories(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    if &*task.root != b"/" {
        let slot = planner.open(Open::Directory { path: task.root.clone() });
        let root = planner.descriptor(slot);
        call!(script, "the root directory", libc::SYS_fchdir, root);
        let here = script.c_string(b".");
        call!(script, "the root directory", libc::SYS_chroot, here);
    }
    let slot = planner.open(Open::Directory { path: task.cwd.clone() });
    let cwd = planner.descriptor(slot);
    call!(script, "the working directory", libc::SYS_fchdir, cwd);
}

/// Attributes of the process.
pub(crate) fn attributes(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    let n = Value::Number;
    call!(script, "the umask", libc::SYS_umask, task.umask);
    call!(script, "the personality", libc::SYS_personality, task.personality);
    if task.memory.thp_disabled != 0 {
        // Bit 0 is the state, the others are flags (linux/prctl.h, PR_THP_DISABLE_EXCEPT_ADVISED).
        let flags = u64::from(task.memory.thp_disabled & !1);
        let args = [n(PR_SET_THP_DISABLE), n(1), n(flags), n(0), n(0)];
        script.call("the huge page attribute", libc::SYS_prctl, &args);
    }
    for bit in (0..32).filter(|b| task.memory.membarrier & (1 << b) != 0) {
        call!(script, "a membarrier registration", libc::SYS_membarrier, 1u64 << bit, 0, 0);
    }
    limits(script, planner, task);
}

/// Resource limits by number (asm-generic/resource.h).
const LIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

/// A limit in words.
fn amount(limit: u64) -> String {
    if limit == libc::RLIM_INFINITY { "unlimited".to_owned() } else { limit.to_string() }
}

fn limits(script: &mut Script, planner: &mut Planner<'_>, task: &Task) {
    for (resource, &(soft, hard)) in task.limits.iter().enumerate() {
        let (_, ceiling) = planner.host.limits[resource];
        let (soft, hard) = if hard > ceiling && !planner.host.may_raise_limits {
            planner.note(format!(
                "{}: its hard limit {} was {} and cannot be raised above {} without CAP_SYS_RESOURCE",
                task.title(),
                LIMITS.get(resource).unwrap_or(&"?"),
                amount(hard),
                amount(ceiling)
            ));
            (soft.min(ceiling), ceiling)
        } else {
            (soft, hard)
        };
        let limit = script.words(&[soft, hard]);
        call!(script, format!("limit {resource}"), libc::SYS_prlimit64, 0, resource, limit, 0);
    }
}

/// Collects the stop of each child whose stop the parent has been told of, so that it is not told again, and
/// forgets the signal that came of it.
pub(crate) fn collect_stops(image: &Image, task: &Task) -> Script {
    let mut script = Script::new();
    let stopped = image.tasks.iter().filter(|t| t.ppid == task.pid && t.stopped);
    let mut signals = Vec::new();
    for child in stopped {
        if child.stop_report == 0 {
            let info = script.reserve(128);
            let purpose = format!("the stop of {}", child.title());
            let how = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
            call!(script, purpose, libc::SYS_waitid, libc::P_PID, child.pid.0, info, how, 0);
        }
        let pending =
            task.signals.pending.iter().any(|i| i.first_chunk() == Some(&libc::SIGCHLD.to_ne_bytes()));
        if !pending && signals.is_empty() {
            signals.push(libc::SIGCHLD);
        }
    }
    crate::birth::forget(&mut script, &signals);
    script
}

/// What changes of credentials would undo.
pub(crate) fn last(script: &mut Script, planner: &mut Planner<'_>, task: &Task, detach: bool) {
    let n = Value::Number;
    // 2 cannot be set: it comes of itself for a program that one may run but not read.
    if task.memory.dumpable < 2 {
        let args = [n(PR_SET_DUMPABLE), n(u64::from(task.memory.dumpable))];
        script.call("the dumpable attribute", libc::SYS_prctl, &args);
    }
    if task.memory.memory_merge != 0 {
        let args = [n(PR_SET_MEMORY_MERGE), n(u64::from(task.memory.memory_merge)), n(0), n(0), n(0)];
        script.call("the page merging attribute", libc::SYS_prctl, &args);
    }
    if task.memory.mdwe != 0 {
        let args = [n(PR_SET_MDWE), n(u64::from(task.memory.mdwe)), n(0), n(0), n(0)];
        script.call("the write-xor-execute attribute", libc::SYS_prctl, &args);
    }
    let mut signal = task.leader().parent_death_signal;
    if signal != 0 && detach {
        planner.note(format!("{}: its parent death signal {signal} was about another parent", task.title()));
        signal = 0;
    }
    call!(script, "the parent death signal", libc::SYS_prctl, libc::PR_SET_PDEATHSIG, signal);
}
