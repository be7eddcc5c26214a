//! What a process of an image has open, and the locks it holds.

use std::collections::HashMap;
use std::fmt::Write as _;

use torpor_image::description::{Description, Kind};
use torpor_image::inode::Inode;
use torpor_image::lock::Flock;
use torpor_image::pty::{Pty, PtyEnd, Side};
use torpor_image::rules::Rule;
use torpor_image::task::Task;
use torpor_image::tcp::{Connection, Peer};
use torpor_image::unix::{State, UnixSocket};
use torpor_image::{Bytes, DescriptionId, Image};

use super::process::{stored, time};
use crate::names;
use crate::output::{self, Table};

/// Descriptors and locks.
pub(super) fn write(out: &mut String, image: &Image, task: &Task) -> Result<(), std::fmt::Error> {
    writeln!(out, "\n{}", output::count(task.descriptors.len(), "descriptor", "descriptors"))?;
    let mut table = Table::new(&["FD", "KIND", "FLAGS", "POSITION", "WHAT"], &[0, 3]);
    let mut first: HashMap<DescriptionId, i32> = HashMap::new();
    for descriptor in &task.descriptors {
        let Some(description) = image.objects.descriptions.get(descriptor.description.0 as usize) else {
            continue;
        };
        let mut flags = names::open_flags(description.flags);
        if descriptor.close_on_exec {
            flags.push_str(" cloexec");
        }
        // Others have the same number there, but it means nothing.
        let seekable = matches!(description.kind, Kind::File(_));
        let position = if seekable { description.position.to_string() } else { String::new() };
        let what = match first.get(&descriptor.description) {
            Some(fd) => format!("the same as fd {fd}"),
            None => {
                first.insert(descriptor.description, descriptor.fd);
                what(image, description)
            }
        };
        table.row([descriptor.fd.to_string(), description.kind.noun().into(), flags, position, what]);
    }
    if !table.is_empty() {
        write!(out, "{table}")?;
    }
    locks(out, image, task, &first)
}

fn what(image: &Image, description: &Description) -> String {
    let objects = &image.objects;
    match &description.kind {
        Kind::File(id) => objects.inodes.get(id.0 as usize).map_or_else(String::new, |i| file(image, i)),
        Kind::Pipe(end) => objects.pipes.get(end.pipe.0 as usize).map_or_else(String::new, |pipe| {
            let name = match pipe.fifo.and_then(|id| objects.inodes.get(id.0 as usize)) {
                Some(fifo) => fifo.name(),
                None => format!("pipe:[{}]", pipe.number),
            };
            format!("{name}, {} of {} in it", output::bytes(pipe.data.len() as u64), capacity(pipe.capacity))
        }),
        Kind::EventFd(event) => {
            format!("count {}{}", event.count, if event.semaphore { ", semaphore" } else { "" })
        }
        Kind::TimerFd(timer) => {
            let [left, period] = [timer.setting.value, timer.setting.period].map(|(s, ns)| time(s, ns));
            let clock = names::clock(timer.clock);
            format!("{clock}, in {left}, then every {period}, {} unread", timer.ticks)
        }
        Kind::SignalFd(signals) => names::signals(signals.mask),
        Kind::Epoll(epoll) => {
            let fds: Vec<String> = epoll.targets.iter().map(|t| t.fd.to_string()).collect();
            if fds.is_empty() { "watches nothing".into() } else { format!("watches fd {}", fds.join(", ")) }
        }
        Kind::Inotify(inotify) => {
            let paths: Vec<_> = inotify.watches.iter().map(|w| w.path.text()).collect();
            format!("watches {}", paths.join(", "))
        }
        Kind::Unix(socket) => unix(socket),
        Kind::Inet(socket) => {
            let local = socket.local.map_or_else(|| "not bound".to_owned(), |address| address.to_string());
            match (socket.listening, &socket.connection) {
                (Some(backlog), _) => format!("listens on {local}, backlog {backlog}"),
                (None, Some(connection)) => format!("{local}, {}", tcp(connection)),
                (None, None) => local,
            }
        }
        Kind::Udp(udp) => udp.summary(),
        Kind::Raw(raw) => raw.summary(),
        Kind::Netlink(netlink) => netlink.summary(),
        Kind::IoUring(ring) => ring.summary(),
        Kind::Packet(packet) => packet.summary(),
        Kind::PidFd(pidfd) => match pidfd.pid {
            Some(pid) => format!("of pid {pid}"),
            None => "of a process that has ended".to_owned(),
        },
        Kind::Mqueue(id) => objects.mqueues.get(id.0 as usize).map_or_else(String::new, |queue| {
            format!("{}, {} of {} messages in it", queue.name, queue.messages.len(), queue.max_messages)
        }),
        Kind::Terminal(terminal) => {
            let (rows, columns) = terminal.size;
            format!("{}, {columns} x {rows}", terminal.path)
        }
        Kind::Pty(end) => {
            objects.ptys.get(end.pty.0 as usize).map_or_else(String::new, |pty| self::pty(pty, end))
        }
    }
}

fn pty(pty: &Pty, end: &PtyEnd) -> String {
    let of = if end.path == pty.path { String::new() } else { format!(" of {}", pty.path) };
    if end.side == Side::HungUp {
        return format!("{}, hung up", end.path);
    }
    let typed = pty.lines.iter().map(|line| line.len()).sum::<usize>() + pty.unfinished.len();
    format!(
        "{}{of}, {} x {}, {} written and {} typed not read",
        end.path,
        pty.size[1],
        pty.size[0],
        output::bytes(pty.output.len() as u64),
        output::bytes(typed as u64)
    )
}

fn capacity(bytes: u32) -> String {
    output::bytes(bytes.into())
}

fn file(image: &Image, inode: &Inode) -> String {
    let name = inode.name();
    match inode.content() {
        None if inode.rule == Rule::Truncate => {
            format!("{name}, to be cut back to {}", output::bytes(inode.size))
        }
        None => name,
        Some(extents) => {
            let stored = output::bytes(stored(image.records(extents), 0, u64::MAX));
            format!("{name}, {}, {stored} in the image", output::bytes(inode.size))
        }
    }
}

fn unix(socket: &UnixSocket) -> String {
    let kind = match socket.kind {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => "socket",
    };
    let state = match socket.state {
        State::Idle => "not connected".to_owned(),
        State::Listening { backlog } => format!("listens, backlog {backlog}"),
        State::Connected { peer } => format!("connected to socket:[{peer}]"),
        State::Waiting { listener } => format!("waits to be accepted by socket:[{listener}]"),
        State::Orphaned => "its peer is gone".to_owned(),
        State::Towards { peer } => format!("sends to socket:[{peer}]"),
        State::Outside => match &socket.peer_name {
            Some(name) => format!("to be connected anew to {}", unix_name(name)),
            None => "to be connected anew".to_owned(),
        },
    };
    let mut text = format!("socket:[{}], {kind}, {state}", socket.number);
    if let Some(name) = socket.name.as_ref().filter(|name| !name.is_empty()) {
        text.push_str(&format!(", {}", unix_name(name)));
    }
    let queued: usize = socket.queue.iter().map(|message| message.len()).sum();
    if queued > 0 {
        text.push_str(&format!(", {} queued", output::bytes(queued as u64)));
    }
    let rights: usize = socket.attached.iter().map(|a| a.rights.len()).sum();
    if rights > 0 {
        text.push_str(&format!(", {rights} descriptors in flight"));
    }
    text
}

fn tcp(connection: &Connection) -> String {
    let remote = connection.remote.map_or_else(|| "nobody".to_owned(), |remote| remote.to_string());
    let mut text = match &connection.peer {
        Peer::Inside { number } => format!("connected to {remote}, socket:[{number}]"),
        Peer::Waiting { listener } => format!("waits to be accepted at {remote} by socket:[{listener}]"),
        Peer::Closed => format!("was connected to {remote}, which was closed"),
        Peer::Sought => format!("is about to connect to {remote}"),
        Peer::Over => "its connection is over".to_owned(),
        Peer::Kept(_) => format!("connected to {remote}, outside"),
    };
    for (queue, word) in [(&connection.received, "received"), (&connection.sent, "on the way")] {
        if !queue.is_empty() {
            text.push_str(&format!(", {} {word}", output::bytes(queue.len() as u64)));
        }
    }
    text
}

/// An abstract name begins with a zero byte; /proc/net/unix and `ss` show it as `@`.
fn unix_name(name: &Bytes) -> String {
    match name.strip_prefix(b"\0") {
        Some(rest) => format!("@{}", String::from_utf8_lossy(rest)),
        None => name.text().into_owned(),
    }
}

fn locks(
    out: &mut String,
    image: &Image,
    task: &Task,
    first: &HashMap<DescriptionId, i32>,
) -> Result<(), std::fmt::Error> {
    let kind = |exclusive| if exclusive { "exclusive" } else { "shared" };
    let mut table = Table::new(&["FD", "LOCK", "KIND", "BYTES"], &[0]);
    for description in &image.objects.descriptions {
        if let (Some(Flock::Whole { exclusive }), Some(fd)) = (description.flock, first.get(&description.id))
        {
            table.row([fd.to_string(), "flock".into(), kind(exclusive).into(), "all".into()]);
        }
        for (lock, fd) in description.ofd_locks.iter().zip(first.get(&description.id).into_iter().cycle()) {
            let end = lock.end.map_or_else(|| "end".to_owned(), |end| end.to_string());
            let range = format!("{} to {end}", lock.start);
            table.row([fd.to_string(), "ofd".into(), kind(lock.exclusive).into(), range]);
        }
    }
    for lock in &task.locks {
        let end = lock.end.map_or_else(|| "end".to_owned(), |end| end.to_string());
        let range = format!("{} to {end}", lock.start);
        table.row([lock.fd.to_string(), "posix".into(), kind(lock.exclusive).into(), range]);
    }
    if table.is_empty() { Ok(()) } else { write!(out, "\nlocks\n{table}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unix_socket_in_words() {
        let mut socket = UnixSocket {
            state: State::Connected { peer: 8 },
            name: Some(Bytes(b"\0abstract".to_vec())),
            queue: vec![Bytes(b"12".to_vec()), Bytes(b"3".to_vec())],
            ..UnixSocket::new(7, libc::SOCK_STREAM)
        };
        assert_eq!(unix(&socket), "socket:[7], stream, connected to socket:[8], @abstract, 3 B queued");
        socket.state = State::Orphaned;
        (socket.name, socket.queue) = (None, Vec::new());
        assert_eq!(unix(&socket), "socket:[7], stream, its peer is gone");
    }
}
