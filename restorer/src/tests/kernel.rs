//! A little kernel: processes with nothing but relations, and the calls that change these, with the rules of
//! fork(2), setsid(2), setpgid(2), wait(2) and of what becomes of the children of those who end
//! (kernel/exit.c, `forget_original_parent`).

use std::collections::BTreeMap;

use nix::errno::Errno;

/// Adopts whom nobody else adopts.
pub(super) const INIT: i32 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: i32,
    pub(super) pgid: i32,
    pub(super) sid: i32,
    pub(super) exit_signal: i32,
    pub(super) subreaper: bool,
    /// The signal it gets when its parent ends.
    pub(super) death_signal: i32,
    /// Status in the form of waitpid(2), if it has ended.
    pub(super) ended: Option<i32>,
}

#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) processes: BTreeMap<i32, Process>,
    next: i32,
}

impl Kernel {
    /// A machine where pids begin at `next` and only init runs.
    pub(super) fn new(next: i32) -> Self {
        let mut kernel = Kernel { processes: BTreeMap::new(), next };
        kernel.put(INIT, 0, INIT, INIT);
        kernel
    }

    /// A process that was always there.
    pub(super) fn put(&mut self, pid: i32, parent: i32, pgid: i32, sid: i32) {
        let process = Process {
            parent,
            pgid,
            sid,
            exit_signal: libc::SIGCHLD,
            subreaper: false,
            death_signal: 0,
            ended: None,
        };
        self.processes.insert(pid, process);
    }

    pub(super) fn lives(&self, pid: i32) -> bool {
        self.processes.get(&pid).is_some_and(|p| p.ended.is_none())
    }

    /// Children, those that have ended too.
    pub(super) fn children(&self, pid: i32) -> Vec<i32> {
        self.processes.iter().filter(|(_, p)| p.parent == pid).map(|(pid, _)| *pid).collect()
    }

    /// Whether a number is a pid or that of a group or session.
    pub(super) fn taken(&self, id: i32) -> bool {
        self.processes.iter().any(|(pid, p)| *pid == id || p.pgid == id || p.sid == id)
    }

    /// clone3: `sibling` is CLONE_PARENT.
    pub(super) fn fork(
        &mut self,
        by: i32,
        sibling: bool,
        exit_signal: i32,
        wanted: Option<i32>,
    ) -> Result<i32, Errno> {
        let pid = match wanted {
            Some(pid) if self.taken(pid) => return Err(Errno::EEXIST),
            Some(pid) => pid,
            None => {
                while self.taken(self.next) {
                    self.next += 1;
                }
                self.next += 1;
                self.next - 1
            }
        };
        let maker = &self.processes[&by];
        if sibling && by == INIT {
            return Err(Errno::EINVAL);
        }
        let child = Process {
            parent: if sibling { maker.parent } else { by },
            exit_signal: if sibling { maker.exit_signal } else { exit_signal },
            subreaper: false,
            death_signal: 0,
            ..maker.clone()
        };
        self.processes.insert(pid, child);
        Ok(pid)
    }

    pub(super) fn setsid(&mut self, pid: i32) -> Result<i32, Errno> {
        if self.processes.values().any(|p| p.pgid == pid) {
            return Err(Errno::EPERM);
        }
        let process = self.processes.get_mut(&pid).expect("it calls");
        (process.sid, process.pgid) = (pid, pid);
        Ok(pid)
    }

    pub(super) fn setpgid(&mut self, pid: i32, pgid: i32) -> Result<i32, Errno> {
        let pgid = if pgid == 0 { pid } else { pgid };
        let sid = self.processes[&pid].sid;
        let there = pgid == pid || self.processes.values().any(|p| p.pgid == pgid && p.sid == sid);
        if sid == pid || !there {
            return Err(Errno::EPERM);
        }
        self.processes.get_mut(&pid).expect("it calls").pgid = pgid;
        Ok(0)
    }

    /// Ends a process; its parent has yet to ask for its status.
    pub(super) fn end(&mut self, pid: i32, status: i32) {
        let mut reaper = self.processes[&pid].parent;
        while reaper != INIT && !(self.processes[&reaper].subreaper && self.lives(reaper)) {
            reaper = self.processes[&reaper].parent;
        }
        self.processes.get_mut(&pid).expect("it ends").ended = Some(status);
        let mut killed = Vec::new();
        for child in self.children(pid) {
            let process = self.processes.get_mut(&child).expect("a child");
            process.parent = reaper;
            process.exit_signal = libc::SIGCHLD;
            if process.death_signal != 0 && process.ended.is_none() {
                killed.push((child, process.death_signal));
            }
        }
        for (child, signal) in killed {
            self.end(child, signal);
        }
        // Init collects whatever comes.
        self.processes.retain(|_, p| p.parent != INIT || p.ended.is_none());
    }

    /// Collects a child; None while it lives.
    pub(super) fn wait(&mut self, by: i32, child: i32) -> Result<Option<i32>, Errno> {
        match self.processes.get(&child) {
            Some(p) if p.parent == by && p.ended.is_some() => {
                self.processes.remove(&child);
                Ok(Some(child))
            }
            Some(p) if p.parent == by => Ok(None),
            _ => Err(Errno::ECHILD),
        }
    }

    /// `root` and all below it, parents first.
    pub(super) fn tree(&self, root: i32) -> Vec<i32> {
        let mut all = vec![root];
        let mut at = 0;
        while at < all.len() {
            all.extend(self.children(all[at]));
            at += 1;
        }
        all
    }
}
