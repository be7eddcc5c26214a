//! Taking over the memory that comes later, as soon as everything else of the memory is there.
//!
//! From then on whoever touches it waits until it is served, the kernel on behalf of a task that is still being built
//! among them; so what is written into it by that is not lost.

use std::os::fd::AsFd;

use torpor_kernel::fds;
use torpor_kernel::ids::Pid;
use torpor_kernel::uffd::Userfaultfd;
use torpor_parasite::wire::state;

use super::Building;
use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::lazy::{Served, Serving};
use crate::plan::{Layout, Plan};

impl Building<'_> {
    /// Whether those that helped to read memory did all of their work; they have ended by now.
    pub(super) fn check_crew(&self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        let first = plan.helpers.len() - plan.crew.len();
        for (hand, i) in plan.crew.iter().zip(first..) {
            let (script, placed) = (&plan.helpers[i], layout.helpers[i]);
            let (context, title) = (plan.first_helper() + i, self.image.tasks[hand.task].title());
            if arena.context(context).state == state::FAILED {
                return Err(self.failure(&title, script, placed, arena, context));
            }
            if script.outcome(placed, arena.bytes()).result(hand.through) <= 0 {
                return Err(self.died(hand.task, "one that helped it was killed"));
            }
        }
        Ok(())
    }

    /// Takes the descriptors that the tasks have made, and serves what waits.
    pub(super) fn serve(&mut self, plan: &Plan, layout: &Layout, arena: &mut Arena) -> Result<()> {
        let Some(lazy) = &plan.options.lazy else { return Ok(()) };
        let mut all = Vec::new();
        for (task, (placed, ..)) in plan.tasks.iter().zip(&layout.tasks) {
            let Some(deferred) = &task.deferred else { continue };
            let image = &self.image.tasks[task.index];
            let fail = |source| Error::Kernel { what: image.title(), source };
            let outcome = task.phases[0].script.outcome(placed[0], arena.bytes());
            let number = outcome.result(deferred.made) as i32;
            let pidfd = fds::pidfd_open(Pid(image.pid.0)).map_err(fail)?;
            let uffd = fds::getfd(pidfd.as_fd(), number).map_err(fail)?;
            all.push(Served { pid: image.pid.0, uffd: Userfaultfd::from_fd(uffd), deferred });
        }
        if !all.is_empty() {
            self.serving = Some(Serving::start(self.image, all, lazy)?);
        }
        Ok(())
    }
}
