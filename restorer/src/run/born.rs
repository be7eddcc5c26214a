//! Bringing the processes of a tree into being, and seeing to it that each is whose child it is to be.

use std::collections::BTreeSet;
use std::time::Instant;

use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::ptrace::{self, Stop};
use torpor_parasite::wire::state;

use super::{Building, PATIENCE, Seat};
use crate::arena::Arena;
use crate::birth::{self, word};
use crate::error::{Error, Result};
use crate::feed::Feeds;
use crate::plan::{Layout, Plan};

impl Building<'_> {
    /// Makes the root and, through it, all others, and attaches to each.
    pub(super) fn give_birth(&mut self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        let root = &self.image.tasks[0];
        birth::spawn_root(
            &plan.place,
            root,
            plan.trap,
            arena.context_address(0),
            plan.place.arena + layout.stacks,
        )?;
        self.born = true;
        self.trace(0, root.pid.0)?;
        // Not before the root is made: our memory would have to be copied wherever they write to it.
        let taken = self.wanted_ids(plan);
        self.feeds = Feeds::start(self.image, &plan.feeds, &mut self.opener.sockets, &taken)?;
        arena.go(word::ROOT);
        let tid = Tid(root.pid.0);
        let mut seats: Vec<Seat<'_>> = Vec::new();
        for (phase, placed) in plan.begin.iter().zip(&layout.begin) {
            seats.push(Seat { tid, context: 0, task: 0, script: &phase.script, placed: *placed });
        }
        let born = Seat { tid, context: 0, task: 0, script: &plan.births[0], placed: layout.births[0] };
        seats.push(born);
        for (i, seat) in seats.iter().enumerate() {
            if i > 0 {
                self.start(*seat, arena)?;
            }
            if i + 1 < seats.len() {
                self.finish(*seat, plan, arena)?;
            }
        }
        self.await_birth(plan, layout, arena)?;
        for task in 1..plan.tasks.len() {
            self.trace(task, self.image.tasks[task].pid.0)?;
        }
        arena.go(word::TRACED);
        for task in 0..plan.tasks.len() {
            let (script, placed) = (&plan.births[task], layout.births[task]);
            let seat = Seat { tid: self.traced[task][0], context: task, task, script, placed };
            self.finish(seat, plan, arena)?;
        }
        self.check_relations(plan)
    }

    /// Every id that somebody is to have.
    fn wanted_ids(&self, plan: &Plan) -> BTreeSet<i32> {
        let threads = self.image.tasks.iter().flat_map(|t| &t.threads).map(|t| t.tid.0);
        plan.lineage.nodes.iter().map(|node| node.pid).chain(threads).collect()
    }

    /// Waits until all are born and in their groups; an error when one of them has failed.
    fn await_birth(&mut self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !arena.wait(word::JOINED, plan.lineage.staying()) {
            self.opener.wanted()?;
            for (i, (script, placed)) in plan.births.iter().zip(&layout.births).enumerate() {
                if arena.context(i).state == state::FAILED {
                    return Err(self.failure(&plan.titles[i], script, *placed, arena, i));
                }
            }
            for (i, (script, placed)) in plan.helpers.iter().zip(&layout.helpers).enumerate() {
                let context = plan.first_helper() + i;
                if arena.context(context).state == state::FAILED {
                    return Err(self.failure("a process that helps others", script, *placed, arena, context));
                }
            }
            let root = self.traced[0][0];
            match ptrace::try_wait(root).map_err(Error::kernel(self.image.tasks[0].title()))? {
                Some(Stop::Exited(code)) => return Err(self.died(0, &format!("exit code {code}"))),
                Some(Stop::Killed(signal)) => return Err(self.died(0, &format!("signal {signal}"))),
                // Its script has failed, which is found above.
                Some(Stop::Signal(signal))
                    if signal == plan.trap && arena.context(0).state != state::RUNNING => {}
                Some(Stop::Signal(signal)) if ptrace::is_fault(signal) => {
                    return Err(self.died(0, &format!("signal {signal} in the executor")));
                }
                Some(_) => self.cont(root, 0)?,
                None => {}
            }
            if Instant::now() > deadline {
                return Err(self.died(0, "its children are not born in time"));
            }
        }
        Ok(())
    }

    /// Whether every process has the parent, session and group it is to have.
    fn check_relations(&self, plan: &Plan) -> Result<()> {
        for (node, title) in plan.lineage.nodes.iter().zip(&plan.titles).skip(1) {
            let Some(parent) = node.parent.filter(|_| !node.stand_in()) else { continue };
            let stat =
                torpor_kernel::stat::of_process(Pid(node.pid)).map_err(Error::kernel(title.clone()))?;
            let parent = plan.lineage.nodes[parent].pid;
            let outside = plan.lineage.outside_session == Some(node.sid);
            let right = stat.ppid == parent
                && (stat.session == node.sid || outside)
                && (stat.pgrp == node.pgid || plan.lineage.outside_group == Some(node.pgid));
            if !right {
                let (ppid, sid, pgid) = (stat.ppid, stat.session, stat.pgrp);
                return Err(Error::Unfit {
                    what: title.clone(),
                    why: format!(
                        "it came to have parent {ppid}, session {sid} and group {pgid} instead of {parent}, {} \
                         and {}",
                        node.sid, node.pgid
                    ),
                    remedy: "please report it".into(),
                });
            }
        }
        Ok(())
    }
}
