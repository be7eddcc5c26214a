//! Open file descriptions, and all else that several tasks may share.

use serde::{Deserialize, Serialize};

use crate::directory::Directory;
use crate::epoll::Epoll;
use crate::eventfd::EventFd;
use crate::inet::InetSocket;
use crate::inode::Inode;
use crate::inotify::Inotify;
use crate::io_uring::IoUring;
use crate::lock::{Flock, Lease, OfdLock};
use crate::mqueue::Mqueue;
use crate::netlink::NetlinkSocket;
use crate::packet::PacketSocket;
use crate::pidfd::PidFd;
use crate::pipe::{Pipe, PipeEnd};
use crate::pty::{Pty, PtyEnd, Side};
use crate::raw::RawSocket;
use crate::signalfd::SignalFd;
use crate::sysv_msg::MessageQueue;
use crate::sysv_sem::SemaphoreSet;
use crate::terminal::Terminal;
use crate::timerfd::TimerFd;
use crate::udp::UdpSocket;
use crate::unix::UnixSocket;
use crate::{DescriptionId, InodeId, MqueueId};

/// Everything of the image that is not of one task alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Objects {
    /// Open file descriptions; number N is at index N.
    pub descriptions: Vec<Description>,
    /// Files; number N is at index N.
    pub inodes: Vec<Inode>,
    /// Pipes and opened FIFOs; number N is at index N.
    pub pipes: Vec<Pipe>,
    /// Directories that are made again when they are missing, parents before their children.
    #[serde(default)]
    pub directories: Vec<Directory>,
    /// POSIX message queues; number N is at index N.
    #[serde(default)]
    pub mqueues: Vec<Mqueue>,
    /// System V semaphores.
    #[serde(default)]
    pub sysv_sem: Vec<SemaphoreSet>,
    /// System V message queues.
    #[serde(default)]
    pub sysv_msg: Vec<MessageQueue>,
    /// Pairs of pseudo terminals; number N is at index N.
    #[serde(default)]
    pub ptys: Vec<Pty>,
}

/// An open file description: what `dup` and `fork` share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Its number in this image.
    pub id: DescriptionId,
    /// Status flags and access mode (`O_*`, fcntl(F_GETFL)).
    pub flags: u32,
    /// File position.
    pub position: u64,
    /// Who gets SIGIO.
    pub owner: Option<Owner>,
    /// The flock(2) it holds.
    pub flock: Option<Flock>,
    /// Its locks on parts of the file.
    #[serde(default)]
    pub ofd_locks: Vec<OfdLock>,
    /// Its lease.
    #[serde(default)]
    pub lease: Option<Lease>,
    /// What it is open on.
    pub kind: Kind,
}

/// What a description is open on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file, directory, device or memfd.
    File(InodeId),
    /// One end of a pipe, or a FIFO.
    Pipe(PipeEnd),
    /// eventfd(2)
    EventFd(EventFd),
    /// timerfd_create(2)
    TimerFd(TimerFd),
    /// signalfd(2)
    SignalFd(SignalFd),
    /// epoll_create(2)
    Epoll(Epoll),
    /// inotify_init(2)
    Inotify(Inotify),
    /// A Unix socket.
    Unix(UnixSocket),
    /// An IPv4 or IPv6 socket.
    Inet(InetSocket),
    /// A terminal from outside.
    Terminal(Terminal),
    /// A UDP, UDP-Lite or ping socket.
    Udp(UdpSocket),
    /// A raw socket.
    Raw(RawSocket),
    /// A netlink socket.
    Netlink(NetlinkSocket),
    /// A packet socket.
    Packet(PacketSocket),
    /// pidfd_open(2)
    PidFd(PidFd),
    /// A POSIX message queue.
    Mqueue(MqueueId),
    /// An end of a pseudo terminal.
    Pty(PtyEnd),
    /// io_uring_setup(2)
    IoUring(Box<IoUring>),
}

/// fcntl(F_SETOWN_EX) and F_SETSIG
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// Whom.
    pub id: i32,
    /// The signal, 0 for SIGIO.
    pub signal: i32,
}

impl Kind {
    /// One word for messages.
    pub fn noun(&self) -> &'static str {
        match self {
            Kind::File(_) => "file",
            Kind::Pipe(_) => "pipe",
            Kind::EventFd(_) => "eventfd",
            Kind::TimerFd(_) => "timerfd",
            Kind::SignalFd(_) => "signalfd",
            Kind::Epoll(_) => "epoll",
            Kind::Inotify(_) => "inotify",
            Kind::Unix(_) => "unix socket",
            Kind::Inet(_) => "tcp socket",
            Kind::Terminal(_) => "terminal",
            Kind::Udp(socket) => socket.noun(),
            Kind::Raw(_) => "raw socket",
            Kind::Netlink(_) => "netlink socket",
            Kind::Packet(_) => "packet socket",
            Kind::PidFd(_) => "pidfd",
            Kind::Mqueue(_) => "message queue",
            Kind::Pty(end) if end.side == Side::Master => "pseudo-terminal master",
            Kind::Pty(_) => "pseudo terminal",
            Kind::IoUring(_) => "io_uring",
        }
    }
}
