//! Where the leaders of sessions with strays are born, and the parents of those strays.
//!
//! Whatever happens to it, a process is always a child of one from which it descends by birth: it is left to
//! somebody above its parent (kernel/exit.c, `find_new_reaper`). So of a stray its parent must have been above
//! the one that made it, in its session; and as sessions are only entered by birth, that parent was
//!
//! - above the leader of the session, too, or
//! - itself born in that session, and made one of its own later.
//!
//! The leader must hence be born below the parents of all strays of its session, which are one below the other
//! then. Where they are in the end does not matter, since whoever is born too deep can be left to any process
//! above it. The parents in turn are in sessions. So each of these processes is given a place below those that it
//! needs, in a session it can be born in: at first as high up as that allows, and where this leads nowhere, as
//! deep as it allows, below as many as possible, with all choices there are.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use torpor_image::Image;

use super::{Lineage, Origin, Role, Stage, Way, node};
use crate::error::Result;

/// How many choices are tried before a tree counts as impossible. Trees that came about need few.
const CHOICES: u32 = 20_000;
/// More than this are not tried in all ways: each is a call of a function within the last one.
const MOST: usize = 2_000;

/// Gives an origin to all that strays depend on.
pub(super) fn strays(lineage: &mut Lineage, image: &Image) -> Result<()> {
    let strays: Vec<usize> = (1..lineage.nodes.len()).filter(|i| lineage.is_stray(*i)).collect();
    let Some(first) = strays.first() else { return Ok(()) };
    let mut needs = Needs::default();
    let leads = lineage.nodes.iter().enumerate().filter(|(_, n)| n.leads_session());
    needs.leaders.extend(leads.map(|(i, n)| (n.sid, i)));
    needs.leaders.extend(lineage.outside_session.map(|sid| (sid, 0)));
    for &i in &strays {
        let (sid, parent, signal) =
            (lineage.nodes[i].sid, lineage.nodes[i].parent, lineage.nodes[i].exit_signal);
        let leader = *needs.leaders.entry(sid).or_insert_with(|| {
            lineage.nodes.push(node(Role::Session, sid, None, (sid, sid), libc::SIGCHLD));
            lineage.nodes.len() - 1
        });
        needs.parents.entry(leader).or_default().extend(parent);
        if signal != libc::SIGCHLD {
            needs.signals.entry(leader).or_default().extend(parent.map(|p| (p, signal)));
        }
    }
    let left = needs.all(lineage, image, &strays)?;
    for deep in [false, true] {
        let mut search = Search::new(lineage.clone(), &needs, left.clone(), deep);
        if search.run() {
            *lineage = search.lineage;
            return Ok(());
        }
    }
    Err(lineage.homeless(image, *first))
}

/// Who must be there for the strays.
#[derive(Default)]
struct Needs {
    /// The leader of each session; the root, if that is in a session from outside.
    leaders: BTreeMap<i32, usize>,
    /// The parents of the strays of a leader's session.
    parents: BTreeMap<usize, BTreeSet<usize>>,
    /// Those of them with strays that send another signal than SIGCHLD, and that signal. Such a stray never changed
    /// parents (kernel/exit.c, `reparent_leader`): it was made by its parent, or for that by a child with the same
    /// signal (clone(2), `CLONE_PARENT`), the first of which was the leader.
    signals: BTreeMap<usize, BTreeSet<(usize, i32)>>,
    /// Those that share something with another one, which must make them.
    sharers: BTreeMap<usize, Origin>,
}

impl Needs {
    /// All that must be placed with care: leaders and parents of strays, and whom those need.
    fn all(&mut self, lineage: &Lineage, image: &Image, strays: &[usize]) -> Result<BTreeSet<usize>> {
        let mut all = BTreeSet::new();
        let mut new: Vec<usize> = strays.iter().map(|i| self.leaders[&lineage.nodes[*i].sid]).collect();
        while let Some(i) = new.pop() {
            if !all.insert(i) {
                continue;
            }
            let node = &lineage.nodes[i];
            new.extend(node.parent);
            new.extend(self.parents.get(&i).into_iter().flatten());
            new.extend(self.leaders.get(&node.sid).filter(|_| !node.leads_session()));
            if let Some(origin) = lineage.sharer(image, i)? {
                new.push(origin.creator);
                self.sharers.insert(i, origin);
            }
        }
        all.remove(&0);
        Ok(all)
    }
}

/// One of the things that can be done.
struct Choice {
    node: usize,
    origin: Origin,
    exit_signal: i32,
    /// Who must be born in its session for that.
    early: Vec<usize>,
}

struct Search<'a> {
    lineage: Lineage,
    needs: &'a Needs,
    /// Those without a place.
    left: BTreeSet<usize>,
    /// Those with one.
    placed: Vec<usize>,
    depths: Vec<usize>,
    /// Leaders that must be born in a session.
    born_in: BTreeMap<usize, i32>,
    deep: bool,
    choices: u32,
}

impl<'a> Search<'a> {
    fn new(lineage: Lineage, needs: &'a Needs, left: BTreeSet<usize>, deep: bool) -> Self {
        let depths = vec![0; lineage.nodes.len()];
        let (placed, born_in) = (vec![0], BTreeMap::new());
        Search { lineage, needs, left, placed, depths, born_in, deep, choices: CHOICES }
    }

    fn run(&mut self) -> bool {
        // The root is there already: whoever has strays of its session from outside must have been born in that.
        let Some(early) = self.early(0, 0, 0) else { return false };
        let sid = self.lineage.nodes[0].sid;
        self.born_in.extend(early.into_iter().map(|leader| (leader, sid)));
        if self.deep {
            return self.left.len() <= MOST && self.place();
        }
        while !self.left.is_empty() {
            let Some(choice) = self.choices().into_iter().next() else { return false };
            self.set(&choice);
        }
        true
    }

    /// Places all that are left, in one way or another.
    fn place(&mut self) -> bool {
        if self.left.is_empty() {
            return true;
        }
        for choice in self.choices() {
            if self.choices == 0 {
                return false;
            }
            self.choices -= 1;
            let before = self.born_in.clone();
            self.set(&choice);
            if self.place() {
                return true;
            }
            self.placed.pop();
            self.left.insert(choice.node);
            let node = &mut self.lineage.nodes[choice.node];
            node.origin = None;
            if node.stand_in() {
                (node.parent, node.exit_signal) = (None, libc::SIGCHLD);
            }
            self.born_in = before;
        }
        false
    }

    fn set(&mut self, choice: &Choice) {
        let i = choice.node;
        self.lineage.set(i, choice.origin);
        let node = &mut self.lineage.nodes[i];
        if node.stand_in() {
            (node.parent, node.exit_signal) = (Some(choice.origin.creator), choice.exit_signal);
        }
        self.left.remove(&i);
        self.placed.push(i);
        self.depths[i] = self.lineage.above(i).map_or(0, |above| self.depths[above] + 1);
        let sid = self.lineage.nodes[i].sid;
        self.born_in.extend(choice.early.iter().map(|leader| (*leader, sid)));
    }

    /// What can be done next, the best first. A session has all members that it can have before leaders of others
    /// are born in it, who are below those then; and before a parent of strays is to be born in it, it is tried
    /// whether that one can be above its leader.
    fn choices(&self) -> Vec<Choice> {
        let (leaders, others): (Vec<usize>, Vec<usize>) =
            self.left.iter().partition(|i| self.lineage.nodes[**i].leads_session());
        if let Some(choices) = others.into_iter().map(|i| self.of(i)).find(|c| !c.is_empty()) {
            return choices;
        }
        let mut all = Vec::new();
        for leader in leaders {
            all.extend(self.of(leader));
            if !self.deep && all.first().is_some_and(|c: &Choice| c.early.is_empty()) {
                break;
            }
        }
        all.sort_by_key(|c| c.early.len());
        all
    }

    /// The ways in which one can be born, the best first.
    fn of(&self, i: usize) -> Vec<Choice> {
        let node = &self.lineage.nodes[i];
        if node.parent.is_some_and(|parent| !self.placed(parent)) {
            return Vec::new();
        }
        let exit_signal = node.exit_signal;
        if let Some(&origin) = self.needs.sharers.get(&i) {
            let fits = self.placed(origin.creator) && self.fits(i, origin.creator, origin.stage);
            let above = if origin.way == Way::Sibling { node.parent.unwrap_or(0) } else { origin.creator };
            let early = if fits { self.early(i, above, exit_signal) } else { None };
            return early.map(|early| Choice { node: i, origin, exit_signal, early }).into_iter().collect();
        }
        let mut all: Vec<Choice> = Vec::new();
        for &creator in &self.placed {
            let maker = &self.lineage.nodes[creator];
            let early =
                maker.leads_session() && maker.origin.is_some() && matches!(maker.role, Role::Task(_));
            let stages = [Some(Stage::Bare), early.then_some(Stage::Early)];
            for stage in stages.into_iter().flatten().filter(|stage| self.fits(i, creator, *stage)) {
                let Some(way) = self.way(i, creator, stage) else { continue };
                let origin = Origin { creator, stage, way };
                let above = if way == Way::Sibling { node.parent.unwrap_or(0) } else { creator };
                // A leader that has ended may have had any signal.
                let others = self.needs.signals.get(&i).into_iter().flatten().filter(|_| node.stand_in());
                let others = others.filter(|(parent, _)| *parent == creator).map(|(_, signal)| *signal);
                for exit_signal in std::iter::once(exit_signal).chain(others) {
                    let early = self.early(i, above, exit_signal);
                    all.extend(early.map(|early| Choice { node: i, origin, exit_signal, early }));
                }
            }
        }
        let depth = |c: &Choice| self.depths[c.origin.creator];
        if self.deep {
            all.sort_by_key(|c| (Reverse(depth(c)), Reverse(c.origin.stage)));
        } else {
            all.sort_by_key(|c| (c.origin.way != Way::Child, depth(c), Reverse(c.origin.stage)));
        }
        all
    }

    fn placed(&self, i: usize) -> bool {
        i == 0 || self.lineage.nodes[i].origin.is_some()
    }

    /// Whether `creator` is in the right session.
    fn fits(&self, i: usize, creator: usize, stage: Stage) -> bool {
        let node = &self.lineage.nodes[i];
        let wanted = if node.leads_session() { self.born_in.get(&i).copied() } else { Some(node.sid) };
        wanted.is_none_or(|sid| self.lineage.session_at(creator, stage) == sid)
    }

    /// How `creator` can make `i` so that it comes to its parent with its exit signal.
    fn way(&self, i: usize, creator: usize, stage: Stage) -> Option<Way> {
        let (node, maker) = (&self.lineage.nodes[i], &self.lineage.nodes[creator]);
        match node.parent {
            None => Some(Way::Child),
            Some(parent) if parent == creator => Some(Way::Child),
            // Who changes parents sends SIGCHLD (kernel/exit.c, `reparent_leader`).
            Some(parent) if node.exit_signal == libc::SIGCHLD => {
                self.lineage.descends(creator, parent).then_some(Way::Orphan)
            }
            parent => {
                let sibling = stage == Stage::Bare
                    && parent == maker.parent
                    && maker.exit_signal == node.exit_signal
                    && maker.origin.is_some_and(|o| o.way != Way::Orphan);
                sibling.then_some(Way::Sibling)
            }
        }
    }

    /// Which parents of strays must be born in the session of leader `i`, if that is born below `above`. None if
    /// one cannot.
    fn early(&self, i: usize, above: usize, exit_signal: i32) -> Option<Vec<usize>> {
        let sid = self.lineage.nodes[i].sid;
        let mut all = Vec::new();
        for &parent in self.needs.parents.get(&i).into_iter().flatten() {
            let signals = self.needs.signals.get(&i).into_iter().flatten();
            // As siblings of the leader.
            let sibling = |signal| above == parent && i != 0 && signal == exit_signal;
            let made = signals.filter(|(p, _)| *p == parent).any(|(_, signal)| !sibling(*signal));
            if !made && self.placed(parent) && self.lineage.descends(above, parent) {
                continue;
            }
            let free = self.born_in.get(&parent).is_none_or(|other| *other == sid);
            if self.placed(parent) || !self.lineage.nodes[parent].leads_session() || !free {
                return None;
            }
            all.push(parent);
        }
        Some(all)
    }
}
