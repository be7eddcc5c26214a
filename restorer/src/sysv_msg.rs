//! System V message queues: messages are sent by a child with the pid of who sent last.

use nix::errno::Errno;
use torpor_image::sysv_msg::{Message, MessageQueue};
use torpor_kernel::{child, sysv};

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::sysv::{Class, Found, act, create, find};

/// Makes a queue, or finds it.
pub(crate) fn make(opener: &mut Opener<'_>, index: usize, queue: &MessageQueue) -> Result<()> {
    let what = title(queue);
    let all = sysv::queues().map_err(Error::kernel(what.as_str()))?;
    let found: Vec<Found> = all
        .iter()
        .map(|q| Found {
            id: q.id,
            key: q.permissions.key,
            creator: (q.permissions.cuid, q.permissions.cgid),
            fits: true,
            pids: vec![q.sender, q.receiver],
            changed: q.changed,
        })
        .collect();
    let permissions = &queue.permissions;
    if find(opener, &what, queue.id, permissions, &found)? {
        let now = all.iter().find(|q| q.id == queue.id);
        if contents(&what, queue.id, now.map_or(0, |q| q.bytes))? != queue.messages {
            opener.sysv.stale_queues.push(index);
        }
        return Ok(());
    }
    let key = permissions.key;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (permissions.mode & 0o777) as i32;
    let pid = if queue.sender != 0 { queue.sender } else { queue.receiver };
    create(opener, &what, Class::Queue, (queue.id, pid), permissions, || {
        // SAFETY: msgget takes numbers only.
        unsafe { libc::msgget(key, flags) }
    })?;
    opener.sysv.queues.push(queue.id);
    fill(opener, queue)
}

/// Gives a queue that was found the messages of the image.
pub(crate) fn refill(opener: &Opener<'_>, index: usize) -> Result<()> {
    let queue = &opener.image.objects.sysv_msg[index];
    let what = title(queue);
    let all = sysv::queues().map_err(Error::kernel(what.as_str()))?;
    let bytes = all.iter().find(|q| q.id == queue.id).map_or(0, |q| q.bytes);
    let mut room = vec![0u8; 8 + bytes as usize];
    loop {
        // SAFETY: msgrcv fills a word and at most as many bytes as are behind it.
        let got =
            unsafe { libc::msgrcv(queue.id, room.as_mut_ptr().cast(), bytes as usize, 0, libc::IPC_NOWAIT) };
        match Errno::last() {
            _ if got >= 0 => {}
            Errno::ENOMSG => break,
            errno => return Err(Error::Open { what, call: "msgrcv", errno }),
        }
    }
    fill(opener, queue)
}

fn title(queue: &MessageQueue) -> String {
    format!("System V message queue {}", queue.permissions.title(queue.id))
}

fn contents(what: &str, id: i32, bytes: u64) -> Result<Vec<Message>> {
    let mut all = Vec::new();
    while let Some((kind, text)) = sysv::peek(id, all.len(), bytes as usize).map_err(Error::kernel(what))? {
        all.push(Message { kind, text: text.into() });
    }
    Ok(all)
}

/// Sends the messages into an empty queue. A first one without text passes through it, for who received last.
fn fill(opener: &Opener<'_>, queue: &MessageQueue) -> Result<()> {
    let what = title(queue);
    let bytes: u64 = queue.messages.iter().map(|m| m.text.len() as u64).sum();
    // What a queue takes may have been lowered below what it holds; a message without text counts, too.
    set(&what, queue, queue.capacity.max(bytes).max(queue.messages.len() as u64).max(1))?;
    let messages: Vec<Vec<u8>> =
        queue.messages.iter().map(|m| [&m.kind.to_ne_bytes()[..], &m.text].concat()).collect();
    let send = |message: &[u8]| {
        // SAFETY: msgsnd reads a word and the text behind it.
        let got =
            unsafe { libc::msgsnd(queue.id, message.as_ptr().cast(), message.len() - 8, libc::IPC_NOWAIT) };
        child::result(got)
    };
    let checked = |result: Result<i64>, call| match result? {
        e if e < 0 => Err(Error::Open { what: what.clone(), call, errno: Errno::from_raw(-e as i32) }),
        _ => Ok(()),
    };
    let empty = 1i64.to_ne_bytes();
    if queue.receiver != 0 {
        checked(act(opener.image, &what, queue.sender, || send(&empty)), "msgsnd")?;
        let receive = || {
            let mut room = [0i64; 1];
            // SAFETY: msgrcv fills a word, and no text.
            let got = unsafe { libc::msgrcv(queue.id, room.as_mut_ptr().cast(), 0, 0, libc::IPC_NOWAIT) };
            child::result(got as i64)
        };
        checked(act(opener.image, &what, queue.receiver, receive), "msgrcv")?;
    }
    if !messages.is_empty() {
        let all = || messages.iter().map(|m| send(m)).find(|r| *r < 0).unwrap_or(0);
        checked(act(opener.image, &what, queue.sender, all), "msgsnd")?;
    }
    set(&what, queue, queue.capacity)
}

/// Capacity, owner and mode.
fn set(what: &str, queue: &MessageQueue, capacity: u64) -> Result<()> {
    // SAFETY: an all-zero msqid_ds is one to be filled; IPC_STAT fills it, IPC_SET reads it.
    unsafe {
        let mut status: libc::msqid_ds = std::mem::zeroed();
        if libc::msgctl(queue.id, libc::IPC_STAT, &raw mut status) != 0 {
            return Err(Error::last(what, "msgctl(IPC_STAT)"));
        }
        let wanted = &queue.permissions;
        let mode = u32::from(status.msg_perm.mode) & 0o777;
        let is = (status.msg_qbytes, status.msg_perm.uid, status.msg_perm.gid, mode);
        if is == (capacity, wanted.uid, wanted.gid, wanted.mode) {
            return Ok(());
        }
        status.msg_qbytes = capacity;
        status.msg_perm.uid = wanted.uid;
        status.msg_perm.gid = wanted.gid;
        status.msg_perm.mode = wanted.mode as _;
        if libc::msgctl(queue.id, libc::IPC_SET, &raw mut status) != 0 {
            return Err(match Errno::last() {
                errno @ Errno::EPERM => Error::Permission {
                    what: what.to_owned(),
                    call: "msgctl(IPC_SET)",
                    errno,
                    remedy: "raise /proc/sys/kernel/msgmnb, or run torpor with CAP_SYS_RESOURCE",
                },
                errno => Error::Open { what: what.to_owned(), call: "msgctl(IPC_SET)", errno },
            });
        }
    }
    Ok(())
}
