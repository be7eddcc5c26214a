//! POSIX message queues: files of a file system of their own, which no user needs to have mounted.
//!
//! Their messages can be seen only by receiving them, which `torpor_kernel::mqueue::peek` does and undoes. That must
//! not be seen by anyone: neither by a process outside of the dump nor by one that waits to be notified of the next
//! message to an empty queue (mq_notify(3)), so both are refused. The latter would have to be told a value, too, which the
//! kernel shows to nobody; only who asked not to be told (`SIGEV_NONE`) may ask again, of a queue that is empty.

use nix::fcntl::OFlag;
use torpor_image::MqueueId;
use torpor_image::description::Kind;
use torpor_image::mqueue::{Mqueue, MqueueMessage};
use torpor_kernel::ids::Pid;
use torpor_kernel::{fds, mqueue};

use crate::collect::Collector;
use crate::description::{Found, without_deleted};
use crate::error::{Error, Result};
use crate::freeze;

/// A queue that was met, and what makes it the same.
#[derive(Debug)]
pub(crate) struct Known {
    key: (u64, u64),
    id: MqueueId,
    title: String,
}

/// Whether a descriptor is a message queue.
pub(crate) fn is_queue(found: &Found) -> bool {
    libc::major(found.stat.st_dev) == 0 && mqueue::is_queue(found.pid, found.fd, &found.stat)
}

pub(crate) fn collect(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let key = (found.stat.st_dev, found.stat.st_ino);
    if let Some(known) = collector.mqueues.iter().find(|k| k.key == key) {
        return Ok(Some(Kind::Mqueue(known.id)));
    }
    let title = found.title();
    let doing = |what: &str| Error::kernel(collector.pid, format!("{what} {title}"));
    // A description of our own: reading and setting O_NONBLOCK are nobody else's business.
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
    let fd = match fds::open(found.pid, found.fd, flags) {
        Ok(fd) => fd,
        Err(e) => {
            let why = format!("its messages cannot be read ({e})");
            collector.refuse(title, why, "run torpor as its owner or as root");
            return Ok(None);
        }
    };
    let status = mqueue::status(&fd).map_err(doing("reading"))?;
    let attributes = mqueue::attributes(&fd).map_err(doing("reading"))?;
    if let Some((pid, how)) = status.notify {
        let name = freeze::name_of(pid);
        let why = match how {
            // Nothing is told, so nothing is lost; putting messages back would count as the next one.
            libc::SIGEV_NONE if !collector.is_member(pid) => "which is not part of the dump",
            libc::SIGEV_NONE if status.bytes > 0 => "and messages are in it, which cannot be looked at then",
            libc::SIGEV_NONE => "",
            _ => "and the kernel does not tell with which value",
        };
        if !why.is_empty() {
            collector.refuse(
                title,
                format!("pid {pid} ({name}) waits to be notified of its next message (mq_notify), {why}"),
                "let the program take that back before the dump (mq_notify with a null pointer)",
            );
            return Ok(None);
        }
    }
    let messages = if collector.live { Vec::new() } else { mqueue::peek(&fd).map_err(doing("reading"))? };
    let path = without_deleted(&found.link);
    let last = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    let id = MqueueId(collector.objects.mqueues.len() as u32);
    collector.objects.mqueues.push(Mqueue {
        name: [b"/", last].concat().into(),
        unlinked: found.stat.st_nlink == 0,
        mode: found.stat.st_mode & 0o777,
        uid: found.stat.st_uid,
        gid: found.stat.st_gid,
        max_messages: attributes.max_messages,
        message_size: attributes.message_size,
        messages: messages
            .into_iter()
            .map(|(priority, text)| MqueueMessage { priority, text: text.into() })
            .collect(),
        asked: status.notify.map(|(pid, _)| torpor_image::Pid(pid)),
    });
    collector.mqueues.push(Known { key, id, title });
    Ok(Some(Kind::Mqueue(id)))
}

/// Refuses queues that processes outside of the dump have open. Asked before any message is touched, on the
/// running processes.
pub(crate) fn refuse_shared(collector: &mut Collector) {
    for Known { key, title, .. } in std::mem::take(&mut collector.mqueues) {
        let others: Vec<String> = mqueue::open_in(key.0, key.1)
            .into_iter()
            .filter(|pid| !collector.is_member(pid.0) && *pid != Pid::this())
            .map(|pid| format!("pid {pid} ({})", freeze::name_of(pid.0)))
            .collect();
        if !others.is_empty() {
            crate::sysv::refuse(
                collector,
                title,
                format!("it is also open in {}, which is not part of the dump", others.join(", ")),
                "end that process before the dump, or let it close the queue",
            );
        }
    }
}
