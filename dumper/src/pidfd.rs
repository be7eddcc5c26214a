//! pidfd_open(2), from fdinfo.

use torpor_image::description::Kind;
use torpor_image::pidfd::PidFd;
use torpor_kernel::{process, status};

use crate::collect::Collector;
use crate::description::Found;

/// `pid` is what fdinfo says: -1 when the process has ended and was waited for.
pub(crate) fn collect(collector: &mut Collector, found: &Found, pid: i32) -> Option<Kind> {
    let member = torpor_image::Pid(pid);
    if pid == -1 {
        return Some(Kind::PidFd(PidFd { pid: None }));
    }
    if collector.is_member(pid) || is_zombie_of_member(collector, pid) {
        return Some(Kind::PidFd(PidFd { pid: Some(member) }));
    }
    let whom = match pid {
        0 => "a process of another pid namespace".to_owned(),
        pid => format!("pid {pid} ({})", process::who_holds(pid).unwrap_or_default()),
    };
    collector.refuse(
        found.title(),
        format!("it stands for {whom}, which is not part of the dump"),
        "close it before the dump, or dump both",
    );
    None
}

/// Whether a process has ended and waits for a parent that is part of the dump.
fn is_zombie_of_member(collector: &Collector, pid: i32) -> bool {
    let status = status::of_process(torpor_kernel::Pid(pid));
    status.is_ok_and(|s| s.state == 'Z' && collector.is_member(s.ppid))
}
