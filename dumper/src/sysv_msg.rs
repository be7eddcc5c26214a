//! System V message queues: messages are copied, not taken (`MSG_COPY`, msgrcv(2)).

use torpor_image::sysv_msg::{Message, MessageQueue};
use torpor_kernel::ids::Pid;
use torpor_kernel::sysv;

use crate::collect::Collector;
use crate::error::{Error, Result};
use crate::sysv::{is_member, outsider, permissions, refuse};

pub(crate) fn collect(collector: &mut Collector, members: &[Pid]) -> Result<()> {
    let all = sysv::queues().map_err(Error::kernel(collector.pid, "listing System V message queues"))?;
    for queue in all {
        let used = [queue.sender, queue.receiver];
        if !used.iter().any(|pid| is_member(members, *pid)) {
            continue;
        }
        let title = format!("System V message queue {}", permissions(&queue.permissions).title(queue.id));
        if let Some(other) = used.iter().find_map(|pid| outsider(members, *pid, queue.used)) {
            refuse(
                collector,
                title,
                format!("it is also used by {other}, which is not part of the dump"),
                "end that process before the dump",
            );
            continue;
        }
        match read(collector, &queue) {
            Ok(kept) => collector.objects.sysv_msg.push(kept),
            // Gone since it was listed.
            Err(e) if gone(&e) => {}
            Err(e) => {
                let (why, remedy) = match e.errno() {
                    Some(nix::errno::Errno::ENOSYS) => (
                        "this kernel does not show messages without taking them (MSG_COPY)".to_owned(),
                        "use a kernel with CONFIG_CHECKPOINT_RESTORE, or remove the queue",
                    ),
                    _ => (format!("it cannot be read ({e})"), "run torpor as its owner or as root"),
                };
                refuse(collector, title, why, remedy);
            }
        }
    }
    Ok(())
}

/// An object that was removed: its id means nothing any more, or another object's index.
pub(crate) fn gone(error: &torpor_kernel::Error) -> bool {
    matches!(error.errno(), Some(nix::errno::Errno::EINVAL | nix::errno::Errno::EIDRM))
}

fn read(collector: &Collector, queue: &sysv::Queue) -> torpor_kernel::Result<MessageQueue> {
    let mut messages = Vec::new();
    if collector.live {
        // Whether messages can be read is known by the first one.
        sysv::peek(queue.id, 0, queue.bytes as usize)?;
    } else {
        while let Some((kind, text)) = sysv::peek(queue.id, messages.len(), queue.bytes as usize)? {
            messages.push(Message { kind, text: text.into() });
        }
    }
    Ok(MessageQueue {
        id: queue.id,
        permissions: permissions(&queue.permissions),
        capacity: sysv::capacity(queue.id)?,
        sender: queue.sender,
        receiver: queue.receiver,
        messages,
    })
}
