//! Who makes whom: how processes come to have the parents, sessions and process groups they had.
//!
//! A new process is in the session and group of the one that makes it (fork(2)). It may make a session or
//! group of its own, or join a group of its session (setsid(2), setpgid(2)); it can never join a session. So a
//! *stray*, a process in a session that is neither its parent's nor its own, must have been made by somebody
//! who was in it:
//!
//! - by its parent, before that made a session of its own ([`Stage::Early`]);
//! - by another child of its parent, on whose behalf `CLONE_PARENT` gives it the same parent (clone(2));
//! - by a child of such a process that ends, which leaves it to the nearest subreaper
//!   (PR_SET_CHILD_SUBREAPER): its parent is that for a moment, whatever it is later.
//!
//! [`place`] finds out where leaders and parents of strays are born, so that all of this is possible.
//!
//! A session or group whose leader has ended exists for as long as it has members. Its number is made again by a
//! stand-in with that pid, which ends when the members are there. A group whose leader lives in another one by
//! now is kept by a process of no particular pid for as long.

mod place;

use std::collections::{BTreeMap, BTreeSet};

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
    /// Those that are made as orphans, in the order in which they come to their parents.
    pub(crate) turns: Vec<usize>,
    /// Leaders of groups who are in other ones by now.
    deserters: BTreeSet<usize>,
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
        let mut lineage = Lineage {
            outside_session: outside(root.sid.0),
            outside_group: outside(root.pgid.0),
            turns: Vec::new(),
            deserters: BTreeSet::new(),
            nodes,
        };
        if let Some(i) = (1..lineage.nodes.len()).find(|i| lineage.nodes[*i].parent.is_none()) {
            return Err(unfit(image, &lineage.nodes[i], "its parent is not in the image".into()));
        }
        if lineage.outside_session.is_none() && root.sid != root.pid {
            let why = format!("its session {} is that of a process below it", root.sid);
            return Err(unfit(image, &lineage.nodes[0], why));
        }
        lineage.nodes[0].born_in = lineage.outside_session.unwrap_or(0);
        place::strays(&mut lineage, image)?;
        for i in 1..lineage.nodes.len() {
            if lineage.nodes[i].origin.is_none() {
                let origin = lineage.origin(image, i)?;
                lineage.set(i, origin);
            }
            lineage.begin_filled(i, &inherits);
        }
        lineage.turns = lineage.order_of_turns();
        lineage.group_leaders();
        Ok(lineage)
    }

    fn set(&mut self, i: usize, origin: Origin) {
        self.nodes[i].born_in = self.session_at(origin.creator, origin.stage);
        self.nodes[i].origin = Some(origin);
    }

    /// The session that a process is in at a stage.
    fn session_at(&self, i: usize, stage: Stage) -> i32 {
        let node = &self.nodes[i];
        if stage == Stage::Early { node.born_in } else { node.sid }
    }

    /// Whether a process is in a session that is neither its parent's nor its own.
    fn is_stray(&self, i: usize) -> bool {
        let node = &self.nodes[i];
        !node.leads_session() && node.parent.is_some_and(|p| self.nodes[p].sid != node.sid)
    }

    /// The origin of a node that nobody else depends on; leaders and parents of strays have theirs.
    fn origin(&self, image: &Image, i: usize) -> Result<Origin> {
        let node = &self.nodes[i];
        let above = node.parent.unwrap_or(0);
        if let Some(origin) = self.sharer(image, i)? {
            return Ok(origin);
        }
        let child = |stage| Origin { creator: above, stage, way: Way::Child };
        if !self.is_stray(i) {
            return Ok(child(Stage::Bare));
        }
        if self.nodes[above].leads_session() && self.nodes[above].born_in == node.sid {
            return Ok(child(Stage::Early));
        }
        if let Some(creator) = (0..self.nodes.len()).find(|&c| self.may_make_sibling(c, i)) {
            return Ok(Origin { creator, stage: Stage::Bare, way: Way::Sibling });
        }
        let leads = |n: &Node| n.pid == node.sid || n.parent.is_none() && n.sid == node.sid;
        let creator = self.nodes.iter().position(leads).filter(|&c| self.descends(c, above));
        match creator {
            // Who changes parents sends SIGCHLD (kernel/exit.c, `reparent_leader`).
            Some(creator) if node.exit_signal == libc::SIGCHLD => {
                Ok(Origin { creator, stage: Stage::Bare, way: Way::Orphan })
            }
            _ => Err(self.homeless(image, i)),
        }
    }

    /// Whether `creator`, in its last session, can give `i` their common parent and its own exit signal.
    fn may_make_sibling(&self, creator: usize, i: usize) -> bool {
        let (creator, node) = (&self.nodes[creator], &self.nodes[i]);
        creator.sid == node.sid
            && creator.parent == node.parent
            && creator.exit_signal == node.exit_signal
            && creator.origin.is_some_and(|o| o.way != Way::Orphan)
    }

    /// The one that a process is a child of until the turns.
    fn above(&self, i: usize) -> Option<usize> {
        let origin = self.nodes[i].origin?;
        if origin.way == Way::Sibling { self.nodes[i].parent } else { Some(origin.creator) }
    }

    /// The pid of the one that a process is born as a child of; of an orphan, whose parent has no particular pid, none.
    pub(crate) fn born_below(&self, i: usize) -> Option<i32> {
        let orphan = self.nodes[i].origin.is_none_or(|o| o.way == Way::Orphan);
        self.above(i).filter(|_| !orphan).map(|above| self.nodes[above].pid)
    }

    /// Whether `i` is `ancestor` or below it, before the turns.
    fn descends(&self, i: usize, ancestor: usize) -> bool {
        let mut at = Some(i);
        while let Some(here) = at {
            if here == ancestor {
                return true;
            }
            at = self.above(here);
        }
        false
    }

    fn depth(&self, i: usize) -> usize {
        std::iter::successors(Some(i), |&at| self.above(at)).count()
    }

    /// Those below come first: until its turn everybody has all above it where they were born.
    fn order_of_turns(&self) -> Vec<usize> {
        let orphan = |i: &usize| self.nodes[*i].origin.is_some_and(|o| o.way == Way::Orphan);
        let mut turns: Vec<usize> = (0..self.nodes.len()).filter(orphan).collect();
        turns.sort_by_key(|&i| std::cmp::Reverse(self.depth(i)));
        turns
    }

    /// A child that has pages in common with its parent begins with the parent's memory.
    fn begin_filled(&mut self, i: usize, inherits: &impl Fn(usize) -> bool) {
        let Node { role: Role::Task(task), parent, origin: Some(origin), .. } = &mut self.nodes[i] else {
            return;
        };
        if origin.way == Way::Child
            && origin.stage == Stage::Bare
            && Some(origin.creator) == *parent
            && inherits(*task)
        {
            origin.stage = Stage::Filled;
        }
    }

    /// The origin of a task that shares something with another one (clone(2)), which must make it.
    fn sharer(&self, image: &Image, i: usize) -> Result<Option<Origin>> {
        let node = &self.nodes[i];
        let Role::Task(task) = node.role else { return Ok(None) };
        let shares = image.tasks[task].shares;
        let owners: Vec<_> = [shares.memory, shares.descriptors, shares.directories, shares.signal_actions]
            .into_iter()
            .flatten()
            .collect();
        let Some(first) = owners.first() else { return Ok(None) };
        let owner = self.nodes[..i].iter().position(|n| n.pid == first.0);
        let (Some(owner), true) = (owner, owners.iter().all(|o| o == first)) else {
            let why = format!("it shares memory or descriptors with several processes: {owners:?}");
            return Err(unfit(image, node, why));
        };
        let stage = if shares.memory.is_some() { Stage::Filled } else { Stage::Bare };
        let made = |way| Ok(Some(Origin { creator: owner, stage, way }));
        if !node.leads_session() && node.sid != self.nodes[owner].sid {
            return Err(self.homeless(image, i));
        }
        if node.parent == Some(owner) {
            made(Way::Child)
        } else if node.parent == self.nodes[owner].parent && node.exit_signal == self.nodes[owner].exit_signal
        {
            made(Way::Sibling)
        } else {
            let why = format!("it shares memory or descriptors with pid {first}, which is no parent of it");
            Err(unfit(image, node, why))
        }
    }

    fn homeless(&self, image: &Image, i: usize) -> Error {
        let node = &self.nodes[i];
        let parent = node.parent.map(|p| &self.nodes[p]);
        let parent =
            parent.map_or_else(String::new, |p| format!(": its parent {} is in session {}", p.pid, p.sid));
        unfit(image, node, format!("it is in session {}, which it cannot be born in{parent}", node.sid))
    }

    /// Finds leaders who left their groups, and adds stand-ins for those who are not there.
    fn group_leaders(&mut self) {
        let by_pid: BTreeMap<i32, usize> = self.nodes.iter().enumerate().map(|(i, n)| (n.pid, i)).collect();
        let mut wanted: BTreeMap<i32, usize> = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            match by_pid.get(&node.pgid) {
                Some(&leader) if !self.nodes[leader].leads_group() => {
                    self.deserters.insert(leader);
                }
                Some(_) => {}
                None if self.outside_group == Some(node.pgid) => {}
                None => {
                    wanted.entry(node.pgid).or_insert(i);
                }
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

    /// Whether the leader of a group is in another one by now.
    pub(crate) fn left_own_group(&self, i: usize) -> bool {
        self.deserters.contains(&i)
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

fn unfit(image: &Image, node: &Node, why: String) -> Error {
    let what = match node.role {
        Role::Task(task) => image.tasks[task].title(),
        _ => format!("pid {}", node.pid),
    };
    Error::Unfit { what, why, remedy: "this tree cannot be restored; please report it".into() }
}
