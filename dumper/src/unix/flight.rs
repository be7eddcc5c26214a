//! What waits in receive queues, and the descriptors that are on their way in them (SCM_RIGHTS).
//!
//! Before anything is described, the queues of all sockets are read (`scan`): a description may be only on its
//! way, closed everywhere else, and it may be a socket with a queue of its own, or one that waits in itself by
//! way of others. Each is met once, told by its inode. When all that tables hold is described, so is what
//! is on its way (`resolve`), and the queues are told the numbers.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use torpor_image::description::Kind;
use torpor_image::unix::Attached;
use torpor_image::{Bytes, DescriptionId};
use torpor_kernel::ids::Pid;
use torpor_kernel::sock_queue;

use super::outside::ExternalUnix;
use super::peek::{Peeked, Queue, peek_offset};
use crate::collect::Collector;
use crate::description::{self, Found};
use crate::error::{Error, Result};

const TRY_AGAIN: &str = "try again once the program has received it";

/// What is known of sockets and their queues.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// What its user wants done with those whose peers are outside.
    pub(crate) rules: Vec<ExternalUnix>,
    /// Inode numbers of all sockets that are dumped, also of those that are only on their way.
    owned: HashSet<u32>,
    /// Queues by the inode number of their socket; `None` where it was refused.
    queues: HashMap<u32, Option<Waiting>>,
    flight: Vec<Arc<OwnedFd>>,
    /// Of each the socket in whose queue it waits, for messages.
    carriers: Vec<String>,
    /// That of the descriptor that is being looked at.
    carrier: Option<String>,
    /// There may be more on its way than was looked at, since the process runs.
    unseen: bool,
    /// Tells how many messages wait; `Some(None)` where the kernel does not let us know.
    counter: Option<Option<sock_queue::Look>>,
}

/// What waits in one queue.
#[derive(Debug, Default)]
struct Waiting {
    messages: Vec<Bytes>,
    attached: Vec<Attached>,
    /// For each of `attached`, which of `Sockets::flight` belong to it.
    rights: Vec<Vec<usize>>,
}

/// What a queue holds, for the image: descriptors on their way are told later.
pub(crate) type Contents = (Vec<Bytes>, Vec<Attached>);

impl Sockets {
    /// How many messages wait in a socket, if that can be known.
    fn count(&mut self, fd: &OwnedFd) -> Option<u32> {
        let look = self.counter.get_or_insert_with(|| sock_queue::Look::open().ok()).as_ref()?;
        look.count(fd.as_fd()).ok()
    }

    pub(crate) fn owns(&self, inode: u32) -> bool {
        self.owned.contains(&inode)
    }

    /// What is on its way, as descriptors of torpor's own.
    pub(crate) fn flight(&self) -> &[Arc<OwnedFd>] {
        &self.flight
    }

    /// The socket by which the descriptor that is being looked at is on its way, if it is.
    pub(crate) fn carrier(&self) -> Option<&str> {
        self.carrier.as_deref()
    }

    /// Whether there may be descriptors on their way that only the frozen process shows.
    pub(crate) fn unseen(&self) -> bool {
        self.unseen
    }

    /// What waits in the queue of a socket; `None` where that was refused.
    pub(crate) fn waiting(&self, inode: u32) -> Option<Contents> {
        match self.queues.get(&inode) {
            Some(Some(waiting)) => Some((waiting.messages.clone(), waiting.attached.clone())),
            Some(None) => None,
            None => Some(Contents::default()),
        }
    }
}

/// Notes all sockets of a table, and reads the queues of the unix sockets among them and on their way.
pub(crate) fn scan(collector: &mut Collector, all: &[Found]) -> Result<()> {
    let mut sockets: Vec<(Pid, String, u32, OwnedFd)> = Vec::new();
    for found in all.iter().filter(|f| f.link.starts_with(b"socket:[")) {
        let number = found.stat.st_ino as u32;
        if collector.sockets.owned.insert(number) && collector.unix_socket(number)?.is_some() {
            match found.get(collector) {
                Ok(fd) => sockets.push((found.pid, found.title(), number, fd)),
                // Closed since.
                Err(_) if collector.live => {}
                Err(e) => return Err(e),
            }
        }
    }
    let looked_at = collector.pid;
    while let Some((pid, title, number, fd)) = sockets.pop() {
        collector.turn_to(pid);
        let Some(peeked) = read(collector, &title, number, &fd)? else {
            collector.sockets.queues.insert(number, None);
            continue;
        };
        let mut waiting = Waiting::default();
        for (index, message) in peeked.into_iter().enumerate() {
            let from = (!message.from.is_empty()).then(|| super::address(&message.from));
            let urgent = message.urgent;
            if urgent || from.is_some() || message.credentials.is_some() || !message.rights.is_empty() {
                let mut rights = Vec::new();
                for fd in message.rights {
                    if let Some(socket) = socket_number(&fd)
                        && collector.sockets.owned.insert(socket)
                        && collector.unix_socket(socket)?.is_some()
                    {
                        let fd = fd.try_clone().map_err(|e| cannot_dup(collector.pid, &e))?;
                        sockets.push((pid, format!("a socket in flight (socket:[{socket}])"), socket, fd));
                    }
                    rights.push(collector.sockets.flight.len());
                    collector.sockets.flight.push(Arc::new(fd));
                    let carrier = collector.named(title.clone());
                    collector.sockets.carriers.push(carrier);
                }
                waiting.rights.push(rights);
                waiting.attached.push(Attached {
                    message: index as u32,
                    rights: Vec::new(),
                    credentials: message.credentials,
                    from,
                    urgent,
                });
            }
            waiting.messages.push(Bytes(message.data));
        }
        collector.sockets.queues.insert(number, Some(waiting));
    }
    collector.turn_to(looked_at);
    Ok(())
}

/// Describes what is on its way, and tells the queues. `ends` are those of pipes and FIFOs, by inode.
pub(crate) fn resolve(collector: &mut Collector, ends: &HashMap<(u64, u64), Vec<&Found>>) -> Result<()> {
    let flight = collector.sockets.flight.clone();
    let mut ids: Vec<Option<DescriptionId>> = Vec::with_capacity(flight.len());
    for (i, fd) in flight.iter().enumerate() {
        collector.sockets.carrier = collector.sockets.carriers.get(i).cloned();
        ids.push(collector.describe_own(ends, fd)?);
    }
    collector.sockets.carrier = None;
    for description in &mut collector.objects.descriptions {
        let Kind::Unix(unix) = &mut description.kind else { continue };
        let Some(Some(waiting)) = collector.sockets.queues.get(&unix.number) else { continue };
        // Where the queue is left out, so is what is attached to it.
        for (attached, rights) in unix.attached.iter_mut().zip(&waiting.rights) {
            attached.rights = rights.iter().filter_map(|i| ids[*i]).collect();
        }
    }
    Ok(())
}

/// What is on its way, as entries of a table.
pub(crate) fn flight(collector: &Collector) -> Vec<Found> {
    let all = collector.sockets.flight.iter();
    all.filter_map(|fd| description::look_at(fd).ok()).collect()
}

/// One message and whether it is the urgent byte.
struct Message {
    data: Vec<u8>,
    rights: Vec<OwnedFd>,
    credentials: Option<torpor_image::unix::Sender>,
    from: Vec<u8>,
    urgent: bool,
}

impl From<Peeked> for Message {
    fn from(p: Peeked) -> Self {
        Message { data: p.data, rights: p.rights, credentials: p.credentials, from: p.from, urgent: false }
    }
}

/// Reads a queue; `None` when it was refused.
fn read(collector: &mut Collector, title: &str, number: u32, fd: &OwnedFd) -> Result<Option<Vec<Message>>> {
    const LISTEN: u8 = 10;
    let Some(diag) = collector.unix_socket(number)? else { return Ok(Some(Vec::new())) };
    if diag.state == LISTEN {
        return Ok(Some(Vec::new()));
    }
    let queue = Queue { fd, kind: diag.kind, bytes: diag.rqueue, ended: diag.shutdown & 1 != 0 };
    let ready = readiness(fd);
    let stream = diag.kind == libc::SOCK_STREAM;
    if !stream && ready.contains(PollFlags::POLLERR) {
        // To read is to take the error away.
        if diag.rqueue > 0 {
            collector.refuse(title, "an error waits before what is in its queue", TRY_AGAIN);
            return Ok(None);
        }
        return Ok(Some(Vec::new()));
    }
    let failed = |errno| {
        Error::kernel(collector.pid, format!("reading {title}"))(torpor_kernel::Error::syscall(
            "recvmsg", number, errno,
        ))
    };
    if collector.live {
        // It may be changed while it runs: what is seen tells only what else is to be looked at.
        let first = queue.first().map_err(failed)?;
        let seen = |p: &Peeked| stream && p.data.len() >= diag.rqueue as usize;
        collector.sockets.unseen |= if let Some(p) = &first { !seen(p) } else { peek_offset(fd) >= 0 };
        return Ok(Some(first.into_iter().map(Message::from).collect()));
    }
    let peeked = queue.all().map_err(failed)?;
    if peeked.iter().any(|p| p.cut) {
        let why = "more descriptors are on their way through it than torpor may open";
        collector.refuse(title, why, "raise torpor's limit (`ulimit -n`)");
        return Ok(None);
    }
    if !stream && ready.contains(PollFlags::POLLIN) {
        let hidden =
            collector.sockets.count(fd).map_or(0, |count| (count as usize).saturating_sub(peeked.len()));
        if hidden > 0 {
            let why = format!(
                "{hidden} empty message(s) in its queue cannot be seen any more, since they were peeked at before \
                 (by another dump, or by the program)"
            );
            collector.refuse(title, why, "try again when the program has received them");
            return Ok(None);
        }
    }
    let mut messages: Vec<Message> = peeked.into_iter().map(Message::from).collect();
    if stream && ready.contains(PollFlags::POLLPRI) {
        // A plain peek ends before the urgent byte, which shows under SO_PEEK_OFF among the others, except at the
        // head of the queue: there both pass over it.
        let seen: usize = messages.iter().map(|m| m.data.len()).sum();
        let marked = match (at_mark(fd), seen == diag.rqueue as usize) {
            (true, true) => mark_urgent(&mut messages, 0),
            (true, false) => urgent_byte(fd).is_some_and(|byte| {
                messages.insert(0, Message { data: vec![byte], urgent: true, ..Peeked::default().into() });
                true
            }),
            (false, true) if peek_offset(fd) < 0 => {
                let first = queue.first().map_err(failed)?;
                first.is_some_and(|first| mark_urgent(&mut messages, first.data.len()))
            }
            (false, _) => false,
        };
        if !marked {
            collector.refuse(
                title,
                "where in its queue the urgent byte (MSG_OOB) lies cannot be told",
                TRY_AGAIN,
            );
            return Ok(None);
        }
    }
    Ok(Some(messages))
}

/// Splits the message that has byte `at` of the stream, so that it is a message of its own.
fn mark_urgent(messages: &mut Vec<Message>, at: usize) -> bool {
    let mut start = 0;
    let holds = |m: &Message| {
        let here = (start..start + m.data.len()).contains(&at);
        if !here {
            start += m.data.len();
        }
        here
    };
    let Some(index) = messages.iter().position(holds) else { return false };
    let whole = &mut messages[index];
    // Descriptors come with the first byte of their message.
    if at > start && !whole.rights.is_empty() {
        return false;
    }
    let plain = |data, of: &Message| Message {
        data,
        rights: Vec::new(),
        credentials: of.credentials,
        from: Vec::new(),
        urgent: false,
    };
    let rest = whole.data.split_off(at - start + 1);
    let byte = whole.data.split_off(at - start);
    let rest = (!rest.is_empty()).then(|| plain(rest, whole));
    let mut urgent = plain(byte, whole);
    urgent.urgent = true;
    if whole.data.is_empty() {
        urgent.rights = std::mem::take(&mut whole.rights);
        messages[index] = urgent;
    } else {
        messages.insert(index + 1, urgent);
    }
    if let Some(rest) = rest {
        let after = messages.iter().position(|m| m.urgent).map_or(messages.len(), |i| i + 1);
        messages.insert(after, rest);
    }
    true
}

/// poll(2) without waiting; tells of errors without taking them away.
pub(super) fn readiness(fd: &OwnedFd) -> PollFlags {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLPRI)];
    let _ready = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().unwrap_or(PollFlags::empty())
}

/// SIOCATMARK (sockatmark(3)): the urgent byte is next.
fn at_mark(fd: &OwnedFd) -> bool {
    const SIOCATMARK: libc::Ioctl = 0x8905;
    let mut at = 0i32;
    // SAFETY: SIOCATMARK fills an int.
    unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK, &raw mut at) == 0 && at != 0 }
}

/// The urgent byte, which stays where it is.
fn urgent_byte(fd: &OwnedFd) -> Option<u8> {
    let mut byte = 0u8;
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: one byte of ours.
    let got = unsafe { libc::recv(fd.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    (got == 1).then_some(byte)
}

fn socket_number(fd: &OwnedFd) -> Option<u32> {
    let stat = nix::sys::stat::fstat(fd).ok()?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFSOCK).then_some(stat.st_ino as u32)
}

fn cannot_dup(pid: Pid, error: &std::io::Error) -> Error {
    let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE));
    Error::kernel(pid, "keeping a descriptor in flight")(torpor_kernel::Error::syscall("dup", "", errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(data: &[u8]) -> Message {
        Message {
            data: data.to_vec(),
            rights: Vec::new(),
            credentials: None,
            from: Vec::new(),
            urgent: false,
        }
    }

    #[test]
    fn the_urgent_byte_becomes_a_message() {
        let split = |all: &[&[u8]], at| {
            let mut messages: Vec<_> = all.iter().map(|d| message(d)).collect();
            let done = mark_urgent(&mut messages, at);
            done.then(|| messages.into_iter().map(|m| (m.data, m.urgent)).collect::<Vec<_>>())
        };
        let wanted =
            |all: &[(&[u8], bool)]| Some(all.iter().map(|(d, u)| (d.to_vec(), *u)).collect::<Vec<_>>());
        assert_eq!(split(&[b"abXcd"], 2), wanted(&[(b"ab", false), (b"X", true), (b"cd", false)]));
        assert_eq!(split(&[b"X"], 0), wanted(&[(b"X", true)]));
        assert_eq!(split(&[b"ab", b"cX"], 3), wanted(&[(b"ab", false), (b"c", false), (b"X", true)]));
        assert_eq!(split(&[b"ab", b"Xd"], 2), wanted(&[(b"ab", false), (b"X", true), (b"d", false)]));
        assert_eq!(split(&[b"ab"], 2), None);
    }
}
