//! Making, outside of the tasks, what several of them may share.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::errno::Errno;
use torpor_image::description::Kind;
use torpor_image::task::Task;
use torpor_image::vma::Mapping;
use torpor_image::{DescriptionId, Image, InodeId, PipeId, PtyId};

use crate::error::{Error, Result};
use crate::feed::Sockets;
use crate::made::Made;
use crate::pipe::{Ends, io};
use crate::plan::{Open, Options};
use crate::pty::{self, Pair};
use crate::terminal::Lent;
use crate::{description, inode};

/// What has been made so far. Dropped before [`Opener::keep`], names it gave to files are removed again.
pub(crate) struct Opener<'i> {
    pub(crate) image: &'i Image,
    /// Take files that changed since the dump as they are.
    pub(crate) accept_changed: bool,
    pub(crate) pipes: HashMap<PipeId, Ends>,
    /// Inodes whose contents were in the image.
    pub(crate) inodes: HashMap<InodeId, OwnedFd>,
    /// POSIX message queues that were made or found.
    pub(crate) mqueues: Vec<crate::mqueue::Queue>,
    /// System V IPC objects that were.
    pub(crate) sysv: crate::sysv::Made,
    /// TCP sockets that were made, by number, once one was asked for.
    pub(crate) tcp: Option<HashMap<u32, OwnedFd>>,
    /// TCP connections to the outside that say nothing until everything stands.
    pub(crate) silent: Vec<crate::kept::Silent<'i>>,
    /// What has come about differently, in words.
    pub(crate) notes: Vec<String>,
    /// What can be made only when processes are there.
    pub(crate) late: crate::late::Late,
    /// Unix sockets.
    pub(crate) unix: crate::unix::Made,
    /// Names of sockets that were made.
    pub(crate) made: Vec<PathBuf>,
    /// Left-over socket files that made room: where they were, and where they are.
    pub(crate) aside: Vec<(PathBuf, PathBuf)>,
    /// What was made and changed of files.
    pub(crate) files: Made,
    /// Seals to be set once everything is mapped.
    pub(crate) seals: BTreeMap<InodeId, u32>,
    /// Terminals of ours that the tree gets.
    pub(crate) terminals: Vec<Lent>,
    /// Rings of io_uring.
    pub(crate) rings: crate::io_uring::Rings,
    /// Pseudo terminals.
    pub(crate) ptys: HashMap<PtyId, Pair>,
    /// Our ends of what tasks receive contents from.
    pub(crate) sockets: Sockets,
    pub(crate) progress: Option<&'i (dyn Fn(u64) + Sync)>,
    /// Asked now and then whether to give up.
    cancel: Option<fn() -> bool>,
}

impl<'i> Opener<'i> {
    pub(crate) fn new(
        image: &'i Image,
        options: &Options,
        progress: Option<&'i (dyn Fn(u64) + Sync)>,
    ) -> Self {
        Opener {
            image,
            accept_changed: options.accept_changed,
            cancel: options.cancel,
            pipes: HashMap::new(),
            inodes: HashMap::new(),
            mqueues: Vec::new(),
            sysv: crate::sysv::Made::default(),
            tcp: None,
            silent: Vec::new(),
            notes: Vec::new(),
            late: crate::late::Late::default(),
            unix: crate::unix::Made::default(),
            made: Vec::new(),
            aside: Vec::new(),
            files: Made::default(),
            seals: BTreeMap::new(),
            terminals: Vec::new(),
            rings: HashMap::new(),
            ptys: HashMap::new(),
            sockets: Sockets::default(),
            progress,
        }
    }

    /// Makes or opens one thing of the plan.
    pub(crate) fn open(&mut self, what: &Open) -> Result<OwnedFd> {
        self.wanted()?;
        match what {
            Open::Description(id) => description::open(self, *id),
            Open::Mapped { inode, write } => {
                let maps = |t: &&Task| t.memory.vmas.iter().any(|v| is_of(&v.mapping, *inode));
                let name =
                    self.user(maps, "mapping of ", &self.image.objects.inodes[inode.0 as usize].name());
                let access = if *write { libc::O_RDWR } else { libc::O_RDONLY };
                inode::open(self, &name, *inode, access as u32)
            }
            Open::Program { inode } => {
                let runs = |t: &&Task| t.memory.exe == *inode;
                let name = self.user(runs, "program ", &self.image.objects.inodes[inode.0 as usize].name());
                inode::program(self, &name, *inode)
            }
            Open::Data { file } => {
                let data = self.image.data(*file)?;
                let file = data.as_file().expect("contents that a task reads itself are stored as they are");
                Ok(file.try_clone().map_err(|e| io("a data file", "dup", &e))?.into())
            }
            Open::Feed { task } => self.sockets.make(*task).map_err(|errno| {
                let what = format!("{}: what it is given", self.image.tasks[*task].title());
                Error::Open { what, call: "socketpair", errno }
            }),
            Open::Slave { pty } => pty::slave(self, *pty),
            Open::Zero => File::open("/dev/zero").map(OwnedFd::from).map_err(|e| io("/dev/zero", "open", &e)),
            Open::Directory { path } => nix::fcntl::open(
                path.path(),
                nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC,
                nix::sys::stat::Mode::empty(),
            )
            .map_err(|errno| {
                let what = self.user(|t| t.cwd == *path || t.root == *path, "directory ", &path.to_string());
                match errno {
                    Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => Error::Conflict {
                        what,
                        why: errno.to_string(),
                        remedy: "put it back where it was".into(),
                    },
                    errno => Error::Open { what, call: "open", errno },
                }
            }),
        }
    }

    /// An error if the caller no longer wants the restore.
    pub(crate) fn wanted(&self) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel() => Err(Error::Cancelled { what: self.image.tasks[0].title() }),
            _ => Ok(()),
        }
    }

    /// "pid 42 (redis-server): program /usr/bin/redis-server"
    fn user(&self, is: impl FnMut(&&Task) -> bool, what: &str, name: &str) -> String {
        match self.image.tasks.iter().find(is) {
            Some(task) => format!("{}: {what}{name}", task.title()),
            None => format!("{what}{name}"),
        }
    }

    /// "pid 42 (redis-server): fd 7, tcp socket"
    pub(crate) fn name(&self, id: DescriptionId) -> String {
        let kind = &self.image.objects.descriptions[id.0 as usize].kind;
        let detail = match kind {
            Kind::File(inode) => self.image.objects.inodes[inode.0 as usize].name(),
            Kind::Unix(socket) => match &socket.name {
                Some(name) => format!("unix socket `{}`", name.text().replace('\0', "@")),
                None => "unix socket".to_owned(),
            },
            Kind::Inet(socket) => match (socket.local, socket.connection.as_ref().and_then(|c| c.remote)) {
                (Some(local), Some(remote)) => format!("tcp socket {local} (to {remote})"),
                (Some(local), None) => format!("tcp socket {local}"),
                (None, _) => "tcp socket".to_owned(),
            },
            Kind::Udp(socket) => match socket.local {
                Some(local) => format!("{} {local}", socket.noun()),
                None => socket.noun().to_owned(),
            },
            Kind::Mqueue(id) => format!("message queue `{}`", self.image.objects.mqueues[id.0 as usize].name),
            Kind::Pty(end) => {
                format!("{} of {}", kind.noun(), self.image.objects.ptys[end.pty.0 as usize].path)
            }
            _ => kind.noun().to_owned(),
        };
        for task in &self.image.tasks {
            if let Some(d) = task.descriptors.iter().find(|d| d.description == id) {
                return format!("{}: fd {}, {detail}", task.title(), d.fd);
            }
        }
        detail
    }

    /// Says, once, what has come about differently than planned.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Closes what the tasks have descriptors of their own for.
    pub(crate) fn let_go(&mut self) {
        self.pipes.clear();
        self.inodes.clear();
        self.mqueues.clear();
        self.sysv.attached.clear();
        self.tcp = None;
        self.ptys.clear();
        self.rings.clear();
        self.late = crate::late::Late::default();
        self.unix = crate::unix::Made::default();
    }

    /// Everything stands: what was made stays.
    pub(crate) fn keep(&mut self) {
        self.made.clear();
        for (_, aside) in self.aside.drain(..) {
            let _best_effort = std::fs::remove_file(aside);
        }
        self.files.keep();
        self.sysv.forget();
        self.mqueues.iter_mut().for_each(crate::mqueue::Queue::keep);
        self.silent.drain(..).for_each(crate::kept::Silent::speak);
    }
}

/// Whether an area maps this inode.
fn is_of(mapping: &Mapping, wanted: InodeId) -> bool {
    matches!(mapping, Mapping::Private { inode, .. } | Mapping::Shared { inode, .. } if *inode == wanted)
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        for path in self.made.drain(..) {
            let _best_effort = std::fs::remove_file(path);
        }
        for (path, aside) in self.aside.drain(..) {
            let _best_effort = std::fs::rename(aside, path);
        }
    }
}
