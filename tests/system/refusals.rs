//! What a dump refuses: by name, with a remedy, and with no harm done.

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, difference, ensure, light_picture, run_torpor};

const REFUSED: i32 = 5;

/// When a dump is refused.
#[derive(Clone, Copy, PartialEq)]
enum When {
    /// Before anything is stopped: `torpor check` says the same.
    Before,
    /// Only what stands tells it.
    Frozen,
}
use When::{Before, Frozen};

/// What the victim owns, when it is refused, and words of what is said: about the object, the reason, and what to do.
const ALL: &[(&str, When, &[&str])] = &[
    ("userfaultfd", Before, &["anon_inode:[userfaultfd]", "which memory it watches", "closed"]),
    ("perf_event", Before, &["anon_inode:[perf_event]", "counts", "stop profiling"]),
    ("fanotify", Before, &["anon_inode:[fanotify]", "stop the watch"]),
    ("bpf", Before, &["anon_inode:bpf-map", "lives in the kernel", "close it"]),
    ("landlock", Before, &["anon_inode:[landlock-ruleset]", "close it"]),
    ("fscontext", Before, &["anon_inode:[fscontext]", "finish mounting"]),
    ("memfd_secret", Before, &["/secretmem", "memfd_secret", "start the program without"]),
    ("kvm", Before, &["anon_inode:kvm-vm", "virtual machine", "save it"]),
    (
        "seccomp listener",
        Before,
        &["anon_inode:seccomp notify", "wait for its answers", "end the supervision"],
    ),
    ("vsock", Before, &["a vsock socket", "close it"]),
    ("alg", Before, &["AF_ALG", "close it"]),
    ("xdp", Before, &["AF_XDP", "close it"]),
    ("can", Before, &["a CAN socket", "close it"]),
    ("mptcp", Before, &["an MPTCP socket", "close it"]),
    ("pidfd", Before, &["anon_inode:[pidfd]", "not part of the dump", "dump both"]),
    ("corked", Before, &["MSG_MORE or UDP_CORK", "try again"]),
    ("filter", Before, &["eBPF filter", "SO_DETACH_FILTER"]),
    ("tcp filter", Before, &["eBPF filter", "SO_DETACH_FILTER"]),
    ("unix filter", Before, &["a socket filter", "close it"]),
    ("ring", Before, &["PACKET_RX_RING", "close it"]),
    ("fanout", Before, &["PACKET_FANOUT_DATA", "close it"]),
    ("netlink", Frozen, &["messages of the kernel wait", "try again"]),
    ("md5", Before, &["MD5 signatures", "keys cannot be read", "close it"]),
    ("urgent", Frozen, &["urgent data waits", "try again"]),
    ("pair", Before, &["its other end belongs to pid ", "(victims-refused)", "--external-unix closed"]),
    ("seccomp", Before, &["seccomp: its filters", "start the program without them"]),
    ("seccomp thread", Before, &["seccomp of thread ", "start the program without them"]),
    ("dispatch", Frozen, &["syscall user dispatch of thread ", "turn it off"]),
    ("files of a thread", Before, &["the descriptor table of thread ", "unshare", "end the thread"]),
    ("directory of a thread", Before, &["the working directory of thread ", "unshare", "end the thread"]),
    ("namespace of a thread", Before, &["the uts namespace of thread ", "unshare", "end the thread"]),
    ("clock of a thread", Before, &["POSIX timer 0", "the clock of one thread", "delete it"]),
    (
        "working directory",
        Before,
        &["its working directory `", "gone (deleted)", "change to another directory"],
    ),
    ("root directory", Before, &["its root directory `", "it was removed"]),
    ("memory of the parent", Before, &["its memory: shared with its parent, pid ", "with all below it"]),
    ("table of the parent", Before, &["its descriptor table: shared with its parent", "with all below it"]),
    (
        "directory of the parent",
        Before,
        &["its working directory: shared with its parent", "with all below it"],
    ),
    ("actions of the parent", Before, &["its signal actions: shared with its parent", "with all below it"]),
    ("sealed", Before, &["sealed memory (mseal)", "unmap it"]),
    ("droppable", Before, &["droppable memory", "unmap it"]),
    ("huge", Before, &["memory of explicit huge pages", "unmap it"]),
    ("aio", Before, &["asynchronous I/O (io_setup)", "io_destroy"]),
    ("watched memory", Before, &["served by a userfaultfd", "unmap it"]),
    ("mapped ring", Before, &["memory shared with a socket", "unmap it"]),
    ("mapped link", Before, &["its name was removed", "give it a name where the old one was"]),
    ("removed directory", Before, &["it is a directory that was removed", "close it"]),
    ("symbolic link", Before, &["a symbolic link itself", "close it"]),
    ("namespace", Before, &["uts:[", "it stands for a namespace", "close it"]),
    ("detached mount", Before, &["attached nowhere", "undo that mount"]),
    ("character device", Before, &["/dev/kmsg", "a character device other than", "close it"]),
    ("block device", Before, &["/dev/loop0", "a block device", "close it"]),
    (
        "pipe",
        Before,
        &["it is read by pid ", "(victims-refused), which is not part", "dump a tree with both ends"],
    ),
    ("fifo", Before, &["/fifo", "it is read by pid ", "dump a tree with both ends"]),
    ("lost entry", Before, &["it watches what fd ", "EPOLL_CTL_DEL"]),
    ("set in flight", Before, &["on its way through fd ", "that no process has open", "try again"]),
    ("userfaultfd in flight", Before, &["in flight (anon_inode:[userfaultfd]), on its way through fd "]),
    ("watch", Before, &["watch 1 is on inode ", "of which no path is found", "inotify_rm_watch"]),
    (
        "undo list",
        Before,
        &["a list of semaphore adjustments", "share it (CLONE_SYSVSEM)", "without SEM_UNDO"],
    ),
    ("notification", Before, &["waits to be notified", "null pointer"]),
    ("shared queue", Before, &["it is also open in pid ", "end that process"]),
];

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |&(what, when, words): &(&'static str, When, &'static [&'static str])| {
        Trial::test(format!("refused: {what}"), move || Ok(refused(what, when, words)?))
    };
    ALL.iter().map(trial).collect()
}

fn refused(what: &str, when: When, words: &[&str]) -> Outcome {
    let mut victim = Victim::start("refused", &[what])?;
    if std::fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("SKIP")) {
        eprintln!("skipped: this kernel gives no {what}");
        return Ok(());
    }
    let before = light_picture(victim.pid);
    let image = victim.image();
    let log = std::fs::read_to_string(victim.log()).map_err(|e| e.to_string())?;
    let child = log.lines().find_map(|line| line.strip_prefix("CHILD "));
    let pid = child.map_or_else(|| victim.pid.to_string(), str::to_owned);
    let checked = run_torpor(&["check", &pid])?.expect(if when == Before { REFUSED } else { 0 })?;
    let text = run_torpor(&["dump", &pid, image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
    for word in words {
        ensure!(text.contains(word), "it does not say `{word}`: {text}");
    }
    let whom = format!("error: cannot dump pid {pid} (victims-refused), which goes on as before:");
    ensure!(text.starts_with(&whom), "it does not name the process: {text}");
    // An object, the reason, and what to do.
    for line in text.lines().skip(1) {
        let parts = line.split_once(": ").and_then(|(_, rest)| rest.rsplit_once("; "));
        ensure!(line.starts_with("  ") && parts.is_some(), "it lacks a reason or a remedy: {line}");
        let object = line.trim().split(": ").next().unwrap_or_default();
        ensure!(when == Frozen || checked.contains(object), "check does not name {object}: {checked}");
    }
    ensure!(!image.exists(), "it left {}", image.display());
    victim.ticks(2)?;
    match difference(&before, &light_picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(()),
    }
}
