//! What a dump refuses: by name, with a remedy, and with no harm done.

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, difference, ensure, light_picture, run_torpor};

const REFUSED: i32 = 5;

/// What the victim owns, and words of what is said: about the object, and what to do.
const ALL: &[(&str, &[&str])] = &[
    ("userfaultfd", &["anon_inode:[userfaultfd]", "which memory it watches", "closed"]),
    ("perf_event", &["anon_inode:[perf_event]", "counts", "stop profiling"]),
    ("fanotify", &["anon_inode:[fanotify]", "stop the watch"]),
    ("bpf", &["anon_inode:bpf-map", "lives in the kernel", "close it"]),
    ("landlock", &["anon_inode:[landlock-ruleset]", "close it"]),
    ("fscontext", &["anon_inode:[fscontext]", "finish mounting"]),
    ("memfd_secret", &["/secretmem", "memfd_secret", "start the program without"]),
    ("kvm", &["anon_inode:kvm-vm", "virtual machine", "save it"]),
    ("vsock", &["a vsock socket", "close it"]),
    ("alg", &["address family 38", "close it"]),
    ("xdp", &["address family 44", "close it"]),
    ("can", &["address family 29", "close it"]),
    ("mptcp", &["an MPTCP socket", "close it"]),
    ("pidfd", &["anon_inode:[pidfd]", "not part of the dump", "dump both"]),
    ("corked", &["MSG_MORE or UDP_CORK", "try again"]),
    ("filter", &["eBPF filter", "SO_DETACH_FILTER"]),
    ("ring", &["PACKET_RX_RING", "close it"]),
    ("netlink", &["messages of the kernel wait", "try again"]),
];

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |&(what, words): &(&'static str, &'static [&'static str])| {
        Trial::test(format!("refused: {what}"), move || Ok(refused(what, words)?))
    };
    ALL.iter().map(trial).collect()
}

fn refused(what: &str, words: &[&str]) -> Outcome {
    let mut victim = Victim::start("refused", &[what])?;
    if std::fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("SKIP")) {
        eprintln!("skipped: this kernel gives no {what}");
        return Ok(());
    }
    let before = light_picture(victim.pid);
    let image = victim.image();
    let pid = victim.pid.to_string();
    let text = run_torpor(&["dump", &pid, image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
    for word in words {
        ensure!(text.contains(word), "it does not say `{word}`: {text}");
    }
    ensure!(!image.exists(), "it left {}", image.display());
    victim.ticks(2)?;
    match difference(&before, &light_picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(()),
    }
}
