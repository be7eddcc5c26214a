//! Who makes whom: how processes come to have the parents, sessions and process groups they had.
//!
//! A new process is in the session and group of the one that makes it (fork(2)). It may make a session or
//! group of its own, or join a group of its session (setsid(2), setpgid(2)); it can never join a session. So a process in
//! a session that its parent is not in must have been made by somebody who was in it:
//!
//! - by its parent, before that made a session of its own ([`Stage::Early`]);
//! - by another child of its parent, on whose behalf `CLONE_PARENT` gives it the same parent (clone(2));
//! - by a child of such a process that ends at once, which leaves it to the nearest subreaper
//!   (PR_SET_CHILD_SUBREAPER).
//!
//! A session or group whose leader has ended exists for as long as it has members. Its number is made again by a
//! stand-in with that pid, which ends when the members are there.

use std::collections::BTreeMap;

use torpor_image::Image;

use crate::error::{Error, Result};

/// When a process makes another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Before it makes a session or group of its own.
    Early,
    /// Afterwards, while it has no memory but the executor.
    Bare,
    /// When its memory is complete, which the new one begins with.
    Filled,
}

/// What a process of the restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A task of the image.
    Task(usize),
    /// A zombie of the image.
    Zombie(usize),
    /// The leader of a session that has ended.
    Session,
    /// The leader of a process group that has ended.
    Group,
}

/// How a process comes into the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Number of the one that makes it.
    pub(crate) creator: usize,
    pub(crate) stage: Stage,
    pub(crate) way: Way,
}

/// By what call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The creator is its parent.
    Child,
    /// The creator's parent is its parent (`CLONE_PARENT`).
    Sibling,
    /// By a child of the creator's that ends at once.
    Orphan,
}

/// One process of the restore.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) role: Role,
    pub(crate) pid: i32,
    /// Number of its parent; none for the root.
    pub(crate) parent: Option<usize>,
    pub(crate) sid: i32,
    pub(crate) pgid: i32,
    pub(crate) exit_signal: i32,
    /// None for the root, which the restoring process makes.
    pub(crate) origin: Option<Origin>,
    /// Its session right after its birth.
    born_in: i32,
}

impl Node {
    pub(crate) fn leads_session(&self) -> bool {
        self.sid == self.pid
    }

    pub(crate) fn leads_group(&self) -> bool {
        self.pgid == self.pid
    }

    /// Whether it is only there for the time of the restore.
    pub(crate) fn stand_in(&self) -> bool {
        matches!(self.role, Role::Session | Role::Group)
    }
}

/// Every process of a restore, the root first.
#[derive(Clone, Debug)]
pub(crate) struct Lineage {
    pub(crate) nodes: Vec<Node>,
    /// Session of the root when it is not in the image: the restoring process's own stands for it.
    pub(crate) outside_session: Option<i32>,
    /// The same for its process group.
    pub(crate) outside_group: Option<i32>,
}

impl Lineage {
    /// Finds out who makes whom. `inherits` tells of a task whether it begins with its parent's memory.
    pub(crate) fn of(image: &Image, inherits: impl Fn(usize) -> bool) -> Result<Self> {
        let root = &image.tasks[0];
        let mut by_pid: BTreeMap<i32, usize> = BTreeMap::new();
        let mut nodes: Vec<Node> = Vec::new();
        for (i, task) in image.tasks.iter().enumerate() {
            by_pid.insert(task.pid.0, nodes.len());
            let parent = if i == 0 { None } else { by_pid.get(&task.ppid.0).copied() };
            nodes.push(node(Role::Task(i), task.pid.0, parent, (task.sid.0, task.pgid.0), task.exit_signal));
        }
        for (i, zombie) in image.manifest.zombies.iter().enumerate() {
            by_pid.insert(zombie.pid.0, nodes.len());
            let parent = by_pid.get(&zombie.ppid.0).copied();
            let ids = (zombie.sid.0, zombie.pgid.0);
            nodes.push(node(Role::Zombie(i), zombie.pid.0, parent, ids, zombie.exit_signal));
        }
        let outside = |id: i32| (!by_pid.contains_key(&id)).then_some(id);
        let mut lineage =
            Lineage { outside_session: outside(root.sid.0), outside_group: outside(root.pgid.0), nodes };
        lineage.nodes[0].born_in = lineage.outside_session.unwrap_or(0);
        // Those that need others in their session come after all that do not.
        let count = lineage.nodes.len();
        loop {
            let easy = |l: &Self, i| l.simple(i, &inherits).is_some() || l.shares(image, i);
            let (i, origin) = if let Some(i) = lineage.next(count, easy) {
                (i, lineage.sharer(image, i)?.or_else(|| lineage.simple(i, &inherits)))
            } else if let Some(i) = lineage.next(count, |_, _| true) {
                (i, Some(lineage.through_session(image, i)?))
            } else {
                break;
            };
            let Some(origin) = origin else { break };
            lineage.set(i, origin);
        }
        if let Some(i) = (1..count).find(|i| lineage.nodes[*i].origin.is_none()) {
            return Err(unfit(image, &lineage.nodes[i], "its parent is not in the image".into()));
        }
        lineage.group_leaders();
        Ok(lineage)
    }

    /// The first node that has no origin yet, whose parent has one, and of which `fits` is true.
    fn next(&self, count: usize, fits: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        (1..count).find(|&i| {
            let node = &self.nodes[i];
            let above = node.parent.is_some_and(|p| p == 0 || self.nodes[p].origin.is_some());
            node.origin.is_none() && above && fits(self, i)
        })
    }

    fn set(&mut self, i: usize, origin: Origin) {
        let creator = &self.nodes[origin.creator];
        self.nodes[i].born_in = if origin.stage == Stage::Early { creator.born_in } else { creator.sid };
        self.nodes[i].origin = Some(origin);
    }

    /// The origin of a node whose parent makes it.
    fn simple(&self, i: usize, inherits: &impl Fn(usize) -> bool) -> Option<Origin> {
        let node = &self.nodes[i];
        let parent = node.parent?;
        let above = &self.nodes[parent];
        if node.leads_session() || node.sid == above.sid {
            let stage = match node.role {
                Role::Task(task) if inherits(task) => Stage::Filled,
                _ => Stage::Bare,
            };
            return Some(Origin { creator: parent, stage, way: Way::Child });
        }
        (above.leads_session() && node.sid == above.born_in).then_some(Origin {
            creator: parent,
            stage: Stage::Early,
            way: Way::Child,
        })
    }

    fn shares(&self, image: &Image, i: usize) -> bool {
        let Role::Task(task) = self.nodes[i].role else { return false };
        image.tasks[task].shares != torpor_image::task::Shares::default()
    }

    /// The origin of a task that shares something with another one (clone(2)), which must make it.
    fn sharer(&self, image: &Image, i: usize) -> Result<Option<Origin>> {
        let Role::Task(task) = self.nodes[i].role else { return Ok(None) };
        let shares = image.tasks[task].shares;
        let owners: Vec<_> = [shares.memory, shares.descriptors, shares.directories, shares.signal_actions]
            .into_iter()
            .flatten()
            .collect();
        let Some(first) = owners.first() else { return Ok(None) };
        let owner = self.nodes[..i].iter().position(|n| n.pid == first.0);
        let (Some(owner), true) = (owner, owners.iter().all(|o| o == first)) else {
            let why = format!("it shares memory or descriptors with several processes: {owners:?}");
            return Err(unfit(image, &self.nodes[i], why));
        };
        let way = if self.nodes[i].parent == Some(owner) {
            Way::Child
        } else if self.nodes[i].parent == self.nodes[owner].parent {
            Way::Sibling
        } else {
            let why = format!("it shares memory or descriptors with pid {first}, which is no parent of it");
            return Err(unfit(image, &self.nodes[i], why));
        };
        let stage = if shares.memory.is_some() { Stage::Filled } else { Stage::Bare };
        Ok(Some(Origin { creator: owner, stage, way }))
    }

    /// The origin of a node whose session is not one that its parent ever was in.
    fn through_session(&mut self, image: &Image, i: usize) -> Result<Origin> {
        let sid = self.nodes[i].sid;
        let Some(parent) = self.nodes[i].parent else {
            return Err(unfit(image, &self.nodes[i], "its parent is not in the image".into()));
        };
        let member = |n: &Node| n.sid == sid && n.origin.is_some();
        let near = self.nodes.iter().position(|n| member(n) && n.parent == Some(parent));
        let far = || self.nodes.iter().position(|n| member(n) || n.parent.is_none() && n.sid == sid);
        if let Some(creator) = near {
            return Ok(Origin { creator, stage: Stage::Bare, way: Way::Sibling });
        }
        let creator = match far() {
            Some(creator) => creator,
            None if self.outside_session == Some(sid) || self.nodes.iter().any(|n| n.pid == sid) => {
                let why = format!("it is in session {sid}, which it cannot be born in: {}", self.tell(i));
                return Err(unfit(image, &self.nodes[i], why));
            }
            None => {
                let mut leader = node(Role::Session, sid, Some(parent), (sid, sid), libc::SIGCHLD);
                leader.origin = Some(Origin { creator: parent, stage: Stage::Bare, way: Way::Child });
                leader.born_in = self.nodes[parent].sid;
                self.nodes.push(leader);
                let creator = self.nodes.len() - 1;
                return Ok(Origin { creator, stage: Stage::Bare, way: Way::Sibling });
            }
        };
        // The orphan goes to the nearest subreaper above its creator.
        let mut above = self.nodes[creator].parent;
        if is_subreaper(image, &self.nodes[creator]) {
            above = Some(creator);
        }
        while let Some(at) = above {
            if is_subreaper(image, &self.nodes[at]) {
                break;
            }
            above = self.nodes[at].parent;
        }
        if above != Some(parent) {
            let why = format!("it is in session {sid}, which it cannot be born in: {}", self.tell(i));
            return Err(unfit(image, &self.nodes[i], why));
        }
        Ok(Origin { creator, stage: Stage::Bare, way: Way::Orphan })
    }

    fn tell(&self, i: usize) -> String {
        let parent = self.nodes[i].parent.map(|p| &self.nodes[p]);
        parent.map_or_else(String::new, |p| format!("its parent {} is in session {}", p.pid, p.sid))
    }

    /// Adds stand-ins for the leaders of groups that have none.
    fn group_leaders(&mut self) {
        let mut wanted: BTreeMap<i32, usize> = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let there = self.nodes.iter().any(|n| n.pid == node.pgid);
            if !there && self.outside_group != Some(node.pgid) {
                wanted.entry(node.pgid).or_insert(i);
            }
        }
        for (pgid, member) in wanted {
            let sid = self.nodes[member].sid;
            let mut leader = node(Role::Group, pgid, Some(member), (sid, pgid), libc::SIGCHLD);
            leader.origin = Some(Origin { creator: member, stage: Stage::Bare, way: Way::Child });
            leader.born_in = sid;
            self.nodes.push(leader);
        }
    }

    /// Nodes that `creator` makes at a stage, in order.
    pub(crate) fn made_by(&self, creator: usize, stage: Stage) -> impl Iterator<Item = (usize, Way)> {
        self.nodes.iter().enumerate().filter_map(move |(i, node)| {
            let origin = node.origin.filter(|o| o.creator == creator && o.stage == stage)?;
            Some((i, origin.way))
        })
    }

    /// How many processes there are in all, those that only help to make others not counted.
    pub(crate) fn born(&self) -> u32 {
        self.nodes.len() as u32
    }

    /// How many there are that stay.
    pub(crate) fn staying(&self) -> u32 {
        self.nodes.iter().filter(|n| !n.stand_in()).count() as u32
    }
}

fn node(role: Role, pid: i32, parent: Option<usize>, (sid, pgid): (i32, i32), exit_signal: i32) -> Node {
    Node { role, pid, parent, sid, pgid, exit_signal, origin: None, born_in: 0 }
}

fn is_subreaper(image: &Image, node: &Node) -> bool {
    matches!(node.role, Role::Task(task) if image.tasks[task].child_subreaper)
}

fn unfit(image: &Image, node: &Node, why: String) -> Error {
    let what = match node.role {
        Role::Task(task) => image.tasks[task].title(),
        _ => format!("pid {}", node.pid),
    };
    Error::Unfit { what, why, remedy: "this tree cannot be restored; please report it".into() }
}
