//! Descriptors of anonymous inodes that cannot be dumped: why, and what to do about it.

use crate::collect::{Collector, stat_path};
use crate::description::Found;

const CLOSE_IT: &str = "close it before the dump";

/// The beginning of a class, what it is, and why it is refused, and a remedy.
const CLASSES: &[(&[u8], &str, &str)] = &[
    (
        b"[userfaultfd]",
        "a userfaultfd: the kernel does not tell which memory it watches",
        "dump the process after its migration or snapshot is done, with this closed",
    ),
    (
        b"[perf_event]",
        "a perf event: its counts and buffers are the kernel's own",
        "stop profiling before the dump",
    ),
    (
        b"[fanotify]",
        "a fanotify group cannot be made again with the events it holds back",
        "stop the watch before the dump",
    ),
    (b"bpf", "an object of bpf(2): it lives in the kernel", "detach it, or close it before the dump"),
    (b"btf", "an object of bpf(2): it lives in the kernel", CLOSE_IT),
    (
        b"seccomp notify",
        "a listener of seccomp: others wait for its answers",
        "end the supervision before the dump",
    ),
    (
        b"kvm",
        "a virtual machine (KVM) lives in the kernel",
        "save it by the means of its monitor, and close it",
    ),
    (b"[landlock-ruleset]", "rules of landlock cannot be read back", CLOSE_IT),
    (
        b"[fscontext]",
        "a file system that is being configured cannot be read back",
        "finish mounting before the dump",
    ),
    (
        b"[vfio",
        "a device that was handed over (VFIO) lives in the kernel",
        "give the device back before the dump",
    ),
    (b"sync_file", "a fence of a graphics device lives in the kernel", "close the device before the dump"),
];

/// Refuses a descriptor of an anonymous inode.
pub(crate) fn refuse(collector: &mut Collector, found: &Found, class: &[u8]) {
    let known = CLASSES.iter().find(|(begin, ..)| class.starts_with(begin));
    match known {
        Some((_, why, remedy)) => collector.refuse(found.title(), *why, remedy),
        None => {
            let class = String::from_utf8_lossy(class);
            let why = format!("a descriptor of kind `{class}` cannot be dumped");
            collector.refuse(found.title(), why, CLOSE_IT);
        }
    }
}

/// Refuses what looks like a file that was removed and is none, and says whether it did.
pub(crate) fn refuse_pseudo(collector: &mut Collector, found: &Found) -> bool {
    if found.link.starts_with(b"/secretmem (deleted)") && stat_path(&found.link[..].into()).is_none() {
        let why = "secret memory (memfd_secret) is kept from everyone but the program, also from torpor";
        collector.refuse(found.title(), why, "start the program without it");
        return true;
    }
    if found.link.starts_with(b"/dmabuf:") {
        let why = "a buffer shared with a device (dma-buf) lives in the kernel";
        collector.refuse(found.title(), why, "close the device before the dump");
        return true;
    }
    false
}
