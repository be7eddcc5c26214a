//! POSIX message queues: made again, or found by their names and given the messages of the image.
//!
//! A queue outlives its processes. What one that is found holds cannot be brought back once it was taken out, so
//! that is done when all else stands.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use torpor_image::description::Kind;
use torpor_image::mqueue::Mqueue;
use torpor_image::task::{Descriptor, Task};
use torpor_image::{Image, MqueueId};
use torpor_kernel::mqueue;
use torpor_parasite::call;
use torpor_parasite::script::Script;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;
use crate::pipe::reopen;

/// A queue that was made or found.
#[derive(Debug)]
pub(crate) struct Queue {
    id: MqueueId,
    /// For reading and writing, without waiting.
    fd: OwnedFd,
    /// Its name, if it was made here and is to go again should the restore fail.
    made: Option<CString>,
    /// Its messages are not those of the image.
    stale: bool,
}

impl Queue {
    /// Everything stands.
    pub(crate) fn keep(&mut self) {
        self.made = None;
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(name) = self.made.take() {
            unlink(&name);
        }
    }
}

fn unlink(name: &CString) {
    // SAFETY: the name ends with a zero.
    unsafe { libc::mq_unlink(name.as_ptr()) };
}

pub(crate) fn open(opener: &mut Opener<'_>, what: &str, id: MqueueId, flags: u32) -> Result<OwnedFd> {
    let known = opener.mqueues.iter().position(|q| q.id == id);
    let at = match known {
        Some(at) => at,
        None => {
            let queue = make(what, id, &opener.image.objects.mqueues[id.0 as usize])?;
            opener.mqueues.push(queue);
            opener.mqueues.len() - 1
        }
    };
    reopen(what, &opener.mqueues[at].fd, flags & !(libc::O_CREAT | libc::O_EXCL) as u32)
}

fn make(what: &str, id: MqueueId, queue: &Mqueue) -> Result<Queue> {
    let damaged = |_nul| Error::Open { what: what.to_owned(), call: "mq_open", errno: Errno::EINVAL };
    let own = format!("/.torpor-{}-{id}", std::process::id());
    let name = if queue.unlinked { own.into_bytes() } else { queue.name.0.clone() };
    let name = CString::new(name).map_err(damaged)?;
    // SAFETY: an all-zero mq_attr is valid.
    let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
    attr.mq_maxmsg = queue.max_messages as _;
    attr.mq_msgsize = queue.message_size as _;
    let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let create = flags | libc::O_CREAT | libc::O_EXCL;
    // SAFETY: the name ends with a zero, and mq_open reads the attributes.
    let fd = unsafe { libc::mq_open(name.as_ptr(), create, 0o600 as libc::mode_t, &raw const attr) };
    if fd < 0 {
        return match Errno::last() {
            Errno::EEXIST if !queue.unlinked => found(what, id, queue, &name, flags),
            errno @ (Errno::EINVAL | Errno::EMFILE | Errno::ENOSPC | Errno::ENOMEM) => Err(Error::Conflict {
                what: what.to_owned(),
                why: format!("mq_open: {errno}"),
                remedy: "raise the limits in /proc/sys/fs/mqueue and RLIMIT_MSGQUEUE (`ulimit -q`), or run \
                         torpor with CAP_SYS_RESOURCE"
                    .into(),
            }),
            errno => Err(Error::Open { what: what.to_owned(), call: "mq_open", errno }),
        };
    }
    let made = Queue { id, fd: owned(what, "mq_open", fd)?, made: Some(name), stale: false };
    nix::unistd::fchown(&made.fd, Some(queue.uid.into()), Some(queue.gid.into()))
        .map_err(Error::open(what, "fchown"))?;
    let mode = nix::sys::stat::Mode::from_bits_truncate(queue.mode & 0o777);
    nix::sys::stat::fchmod(&made.fd, mode).map_err(Error::open(what, "fchmod"))?;
    fill(what, &made.fd, queue)?;
    let mut made = made;
    if queue.unlinked {
        // Its name goes now.
        drop(made.made.take().inspect(unlink));
    }
    Ok(made)
}

/// A queue of that name is there.
fn found(what: &str, id: MqueueId, queue: &Mqueue, name: &CString, flags: i32) -> Result<Queue> {
    let conflict =
        |why: String, remedy: &str| Error::Conflict { what: what.to_owned(), why, remedy: remedy.to_owned() };
    // SAFETY: the name ends with a zero.
    let fd = owned(what, "mq_open", unsafe { libc::mq_open(name.as_ptr(), flags) })?;
    let now = mqueue::attributes(&fd).map_err(Error::kernel(what))?;
    if (now.max_messages, now.message_size) != (queue.max_messages, queue.message_size) {
        return Err(conflict(
            format!(
                "the queue `{}` takes {} messages of {} bytes by now instead of {} of {}",
                queue.name, now.max_messages, now.message_size, queue.max_messages, queue.message_size
            ),
            "remove it (mq_unlink) if nobody needs it",
        ));
    }
    let stat = nix::sys::stat::fstat(&fd).map_err(Error::open(what, "fstat"))?;
    let this = torpor_kernel::Pid::this();
    if let Some(pid) = mqueue::open_in(stat.st_dev, stat.st_ino).into_iter().find(|pid| *pid != this) {
        let name = torpor_kernel::process::who_holds(pid.0).unwrap_or_default();
        return Err(conflict(
            format!("the queue `{}` is in use by pid {pid} ({name})", queue.name),
            "end that process",
        ));
    }
    Ok(Queue { id, fd, made: None, stale: true })
}

fn fill(what: &str, fd: &OwnedFd, queue: &Mqueue) -> Result<()> {
    for message in &queue.messages {
        mqueue::send(fd, message.priority, &message.text).map_err(Error::kernel(what))?;
    }
    Ok(())
}

/// Gives queues that were found the messages of the image: among the last that may fail of a restore.
pub(crate) fn settle(opener: &mut Opener<'_>) -> Result<()> {
    for found in &mut opener.mqueues {
        if !std::mem::take(&mut found.stale) {
            continue;
        }
        let queue = &opener.image.objects.mqueues[found.id.0 as usize];
        let what = format!("message queue `{}`", queue.name);
        // Who has asked for the next message would get one that is put back. (What is taken out nobody is told.)
        if queue.asked.is_some() {
            mqueue::drain(&found.fd).map_err(Error::kernel(what.as_str()))?;
            continue;
        }
        let now = mqueue::peek(&found.fd).map_err(Error::kernel(what.as_str()))?;
        let wanted = queue.messages.iter().map(|m| (m.priority, &*m.text));
        if now.iter().map(|(p, t)| (*p, t.as_slice())).eq(wanted) {
            continue;
        }
        mqueue::drain(&found.fd).map_err(Error::kernel(what.as_str()))?;
        fill(&what, &found.fd, queue)?;
    }
    Ok(())
}

/// Asks to be notified without being told, as before. Closing any descriptor for the queue takes that back
/// (ipc/mqueue.c, `mqueue_flush_file`), so all have their numbers.
pub(crate) fn ask(script: &mut Script, image: &Image, task: &Task) {
    let shared = task.shares.descriptors;
    let table = shared.and_then(|pid| image.tasks.iter().find(|t| t.pid == pid)).unwrap_or(task);
    for descriptor in &table.descriptors {
        let Kind::Mqueue(id) = image.objects.descriptions[descriptor.description.0 as usize].kind else {
            continue;
        };
        let queue = &image.objects.mqueues[id.0 as usize];
        let again = |d: &&Descriptor| {
            d.fd < descriptor.fd
                && image.objects.descriptions[d.description.0 as usize].kind == Kind::Mqueue(id)
        };
        if queue.asked != Some(task.pid) || table.descriptors.iter().any(|d| again(&d)) {
            continue;
        }
        // struct sigevent: value, signal, how (asm-generic/siginfo.h).
        let mut event = [0u8; 64];
        event[12..16].copy_from_slice(&libc::SIGEV_NONE.to_ne_bytes());
        let event = script.data(&event);
        call!(
            script,
            format!("mq_notify on fd {}", descriptor.fd),
            libc::SYS_mq_notify,
            descriptor.fd,
            event
        );
    }
}
