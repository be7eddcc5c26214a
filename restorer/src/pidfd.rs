//! pidfd_open(2)
//!
//! One of a process of the image is opened by the task itself, since none of them exists before. One of a process
//! that has ended is as good as any other such: a child of ours that ends at once gives it.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use torpor_image::DescriptionId;
use torpor_image::description::{Description, Kind};
use torpor_image::task::Task;
use torpor_parasite::script::{OpId, Script, Value};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::plan::Planner;

/// A pidfd of a process that has ended.
pub(crate) fn of_nobody(what: &str) -> Result<OwnedFd> {
    // SAFETY: the child does nothing but end; the pid is a child of ours that nobody else waits for.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(0);
        }
        if pid < 0 {
            return Err(Error::last(what, "fork"));
        }
        let fd = owned(what, "pidfd_open", libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32);
        while libc::waitpid(pid, std::ptr::null_mut(), 0) < 0 && Errno::last() == Errno::EINTR {}
        fd
    }
}

/// Whether the task opens this description itself.
pub(crate) fn is_inside(description: &Description) -> bool {
    matches!(&description.kind, Kind::PidFd(pidfd) if pidfd.pid.is_some())
}

/// Opens one inside of the task, above all numbers that are wanted.
pub(crate) fn plan(
    script: &mut Script,
    planner: &mut Planner<'_>,
    task: &Task,
    id: DescriptionId,
    spare: i32,
) -> Option<OpId> {
    let description = &planner.image.objects.descriptions[id.0 as usize];
    let Kind::PidFd(pidfd) = &description.kind else { return None };
    let pid = pidfd.pid?;
    let others = planner.image.tasks.iter().filter(|t| t.pid != task.pid);
    if others.flat_map(|t| &t.descriptors).any(|d| d.description == id) {
        planner.note(format!("{}: its pidfd of pid {pid} is shared with no other process", task.title()));
    }
    // PIDFD_NONBLOCK and PIDFD_THREAD are these (linux/pidfd.h).
    let flags = description.flags & (libc::O_NONBLOCK | libc::O_EXCL) as u32;
    let purpose = format!("pidfd of pid {pid}");
    let opened = script.call(purpose.clone(), libc::SYS_pidfd_open, &[pid.0.into(), flags.into()]);
    let args = [Value::Result(opened), libc::F_DUPFD_CLOEXEC.into(), spare.into()];
    Some(script.call(purpose, libc::SYS_fcntl, &args))
}
