//! What all collectors share: the objects found so far, and what cannot be dumped.
//!
//! The same collectors serve twice: on the running process, to refuse by name before anything is stopped
//! (`survey`), and on the frozen one for the image. A collector that meets something it cannot keep
//! calls [`Collector::refuse`] and goes on, so that one run names everything.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use torpor_image::description::Objects;
use torpor_image::extent::Extents;
use torpor_image::inode::{Inode, Source};
use torpor_image::pipe::Pipe;
use torpor_image::rules::Rule;
use torpor_image::{Bytes, DescriptionId, InodeId, PipeId};
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;
use torpor_kernel::sock_diag::UnixSocket;

use crate::error::{Error, Refusal, Result};
use crate::freeze;
use crate::pty::Ptys;
use crate::scratch::Files;

/// Where the bytes of an inode that goes into the image come from.
#[derive(Debug)]
pub(crate) enum Content {
    /// A descriptor of ours, open for reading.
    File(OwnedFd),
    /// The memory of a process: `(address, offset in the inode, length)`.
    Mapped(Pid, Vec<(u64, u64, u64)>),
    /// A System V segment in our own memory.
    Attached(torpor_kernel::sysv::Attached),
}

/// A description that was met, by a descriptor for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) pid: Pid,
    pub(crate) fd: i32,
    /// Device and number of its inode.
    pub(crate) inode: (u64, u64),
    /// `None` where it was refused.
    pub(crate) id: Option<DescriptionId>,
}

/// The state of a collection.
#[derive(Debug)]
pub(crate) struct Collector {
    /// The process that is looked at now, by a thread of it that lives.
    pub(crate) pid: Pid,
    /// The processes run: contents, which may change at any moment, are left out.
    pub(crate) live: bool,
    /// Processes of the tree.
    pub(crate) members: BTreeSet<i32>,
    pub(crate) objects: Objects,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) losses: Vec<String>,
    pub(crate) contents: Vec<(InodeId, Content)>,
    /// How files with a name are used.
    pub(crate) files: Files,
    /// TCP sockets met so far.
    pub(crate) tcp: crate::tcp::Captures,
    /// What is known of sockets and their queues.
    pub(crate) sockets: crate::unix::Sockets,
    /// Descriptions met so far.
    pub(crate) known: Vec<Known>,
    /// What was found of the running tree, to be confirmed of the stopped one.
    pub(crate) order: crate::description::Order,
    pidfds: HashMap<Pid, OwnedFd>,
    /// POSIX message queues met so far.
    pub(crate) mqueues: Vec<crate::mqueue::Known>,
    /// What was seen of System V IPC.
    pub(crate) sysv: crate::sysv::State,
    pub(crate) ptys: Ptys,
    /// Processes whose writes are watched by torpor.
    pub(crate) watched: HashSet<Pid>,
    /// Rings of io_uring met so far.
    pub(crate) rings: crate::io_uring::Rings,
    inodes: HashMap<(u64, u64), InodeId>,
    pipes: HashMap<(u64, u64), PipeId>,
    unix: Option<HashMap<u32, UnixSocket>>,
    unaccepted: Vec<UnixSocket>,
}

impl Collector {
    /// A collection of a tree whose root is `pid`.
    pub(crate) fn new(pid: Pid, live: bool) -> Self {
        Collector {
            pid,
            live,
            members: BTreeSet::from([pid.0]),
            ptys: Ptys::default(),
            watched: HashSet::new(),
            rings: crate::io_uring::Rings::default(),
            tcp: crate::tcp::Captures::default(),
            sockets: crate::unix::Sockets::default(),
            known: Vec::new(),
            order: HashMap::new(),
            pidfds: HashMap::new(),
            objects: Objects::default(),
            refusals: Vec::new(),
            losses: Vec::new(),
            contents: Vec::new(),
            files: Files::default(),
            mqueues: Vec::new(),
            sysv: crate::sysv::State::default(),
            inodes: HashMap::new(),
            pipes: HashMap::new(),
            unix: None,
            unaccepted: Vec::new(),
        }
    }

    /// Looks at another process of the tree, by a thread of it that lives.
    pub(crate) fn turn_to(&mut self, pid: Pid) {
        self.pid = pid;
    }

    /// Whether a process belongs to the tree.
    pub(crate) fn is_member(&self, pid: i32) -> bool {
        self.members.contains(&pid)
    }

    /// Whether a process of the tree has a descriptor for socket `inode`, or it is on its way to one.
    pub(crate) fn owns_socket(&self, inode: u32) -> bool {
        self.sockets.owns(inode)
    }

    /// A descriptor of ours for the same description as `fd` of process `pid`, which may be this one.
    pub(crate) fn getfd(&mut self, pid: Pid, fd: i32) -> torpor_kernel::Result<OwnedFd> {
        let pidfd = match self.pidfds.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(fds::pidfd_open(pid)?),
        };
        fds::getfd(pidfd.as_fd(), fd)
    }

    /// Notes something that a dump would lose.
    pub(crate) fn refuse(&mut self, object: impl Into<String>, why: impl Into<String>, remedy: &str) {
        let object = self.named(object.into());
        self.refusals.push(Refusal { object, why: why.into(), remedy: remedy.into() });
    }

    /// Notes something that the image goes without.
    pub(crate) fn lose(&mut self, what: impl Into<String>) {
        let what = self.named(what.into());
        self.losses.push(what);
    }

    /// With the process in front, where there are several.
    pub(crate) fn named(&self, object: String) -> String {
        if let Some(socket) = self.sockets.carrier() {
            format!("{object}, on its way through {socket}")
        } else if self.members.len() > 1 {
            format!("pid {} ({}): {object}", self.pid, freeze::name_of(self.pid.0))
        } else {
            object
        }
    }

    /// The number of an inode, if it was met before.
    pub(crate) fn known_inode(&self, device: u64, number: u64) -> Option<InodeId> {
        self.inodes.get(&(device, number)).copied()
    }

    /// Whether a regular file that was met is to be found again by this path: it was seen to lead there.
    pub(crate) fn leads_to(&self, id: InodeId, path: &Bytes) -> bool {
        let inode = &self.objects.inodes[id.0 as usize];
        let regular = inode.mode & libc::S_IFMT == libc::S_IFREG;
        regular && matches!(&inode.source, Source::Path { path: known } if known == path)
    }

    /// Adds an inode that was not met before.
    pub(crate) fn add_inode(&mut self, stat: &libc::stat, source: Source) -> InodeId {
        let id = InodeId(self.objects.inodes.len() as u32);
        self.inodes.insert((stat.st_dev, stat.st_ino), id);
        self.objects.inodes.push(Inode {
            id,
            source,
            device: stat.st_dev,
            number: stat.st_ino,
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            modified: stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec,
            rule: Rule::default(),
            saved: Extents::default(),
        });
        id
    }

    /// Sets where the contents of an inode lie.
    pub(crate) fn set_extents(&mut self, id: InodeId, extents: Extents) {
        match &mut self.objects.inodes[id.0 as usize].source {
            Source::Deleted { content, .. }
            | Source::Memfd { content, .. }
            | Source::SharedMemory { content }
            | Source::SysV { content, .. } => *content = extents,
            Source::Process { .. } => {}
            Source::Path { .. } => self.objects.inodes[id.0 as usize].saved = extents,
        }
    }

    /// A pipe that was collected by another of its descriptors.
    pub(crate) fn known_pipe(&self, key: (u64, u64)) -> Option<PipeId> {
        self.pipes.get(&key).copied()
    }

    /// The number of a pipe, made by `make` when it is new. `key` is its device and inode number.
    pub(crate) fn pipe(&mut self, key: (u64, u64), make: impl FnOnce(PipeId) -> Pipe) -> PipeId {
        if let Some(id) = self.pipes.get(&key) {
            return *id;
        }
        let id = PipeId(self.objects.pipes.len() as u32);
        self.pipes.insert(key, id);
        self.objects.pipes.push(make(id));
        id
    }

    /// What the kernel says of a Unix socket.
    pub(crate) fn unix_socket(&mut self, inode: u32) -> Result<Option<UnixSocket>> {
        // A running process makes new ones all the time.
        let newer =
            self.live && inode != 0 && self.unix.as_ref().is_some_and(|all| !all.contains_key(&inode));
        if self.unix.is_none() || newer {
            let all = torpor_kernel::sock_diag::unix_sockets()
                .map_err(Error::kernel(self.pid, "listing unix sockets"))?;
            let (accepted, unaccepted) = all.into_iter().partition(|s| s.inode != 0);
            self.unaccepted = unaccepted;
            self.unix = Some(<Vec<UnixSocket>>::into_iter(accepted).map(|s| (s.inode, s)).collect());
        }
        Ok(self.unix.as_ref().and_then(|all| all.get(&inode)).cloned())
    }

    /// The listening Unix socket that `client` is connected to without having been accepted.
    pub(crate) fn unix_listener_of(&mut self, client: u32) -> Result<Option<UnixSocket>> {
        self.unix_socket(client)?;
        let all = self.unix.as_ref().map(HashMap::values).into_iter().flatten();
        Ok(all.into_iter().find(|s| s.pending.contains(&client)).cloned())
    }

    /// The ends that were not accepted yet of connections to the name of a listening Unix socket.
    pub(crate) fn unaccepted(&mut self, name: &[u8]) -> Result<Vec<UnixSocket>> {
        self.unix_socket(0)?;
        Ok(self.unaccepted.iter().filter(|s| s.name.as_deref() == Some(name)).cloned().collect())
    }

    /// Whether a Unix socket listens at this address.
    pub(crate) fn listens(&mut self, name: &[u8]) -> Result<bool> {
        const LISTEN: u8 = 10;
        self.unix_socket(0)?;
        let mut all = self.unix.as_ref().map(HashMap::values).into_iter().flatten();
        Ok(all.any(|s| s.state == LISTEN && s.name.as_deref() == Some(name)))
    }
}

/// stat(2) of a path that need not be UTF-8.
pub(crate) fn stat_path(path: &Bytes) -> Option<libc::stat> {
    nix::sys::stat::stat(path.path()).ok()
}
