//! What it means that a script was not run to its end.

use nix::errno::Errno;
use torpor_parasite::script::{OpId, Placed, Script};
use torpor_parasite::wire::kind;

use super::Building;
use crate::arena::Arena;
use crate::error::Error;
use crate::{birth, credentials};

impl Building<'_> {
    /// Why a script has not been run to its end.
    pub(super) fn failure(
        &self,
        title: &str,
        script: &Script,
        placed: Placed,
        arena: &mut Arena,
        context: usize,
    ) -> Error {
        let failed = arena.context(context).failed;
        let result = script.outcome(placed, arena.bytes()).result(OpId(failed));
        let errno = Errno::from_raw(-result as i32);
        let step = script.steps().get(failed as usize);
        let purpose = step.map_or_else(|| "state".to_owned(), |s| s.purpose.to_string());
        if let Some(step) = step
            && step.kind == kind::SPAWN
        {
            return birth::failure(&format!("{title}: {purpose}"), step.expected as i32, errno);
        }
        if result >= 0 {
            // A read that came up short: the file is not what it was.
            return Error::Script {
                task: title.to_owned(),
                purpose: format!("{purpose}: unexpected result {result}"),
                errno: Errno::EIO,
            };
        }
        let task = self.image.tasks.iter().find(|t| t.title() == title);
        let told = task.and_then(|task| match errno {
            Errno::EPERM => credentials::denied(task, &purpose),
            Errno::EINVAL => credentials::unmapped(task, &purpose),
            _ => None,
        });
        if let Some(told) = told {
            return told;
        }
        match (purpose.as_str(), errno) {
            ("the cpu affinity", Errno::EINVAL) => Error::Unfit {
                what: title.to_owned(),
                why: "a thread may run only on cpus that are not here, or not in torpor's cpuset".into(),
                remedy:
                    "restore it where one of these cpus is (`torpor show --json` lists them as `affinity`)"
                        .into(),
            },
            // An area behind the end of its file cannot be filled.
            (of, Errno::EFAULT) if of.starts_with("contents of memory") => Error::Conflict {
                what: title.to_owned(),
                why: format!("{purpose}: {errno}: the file that is mapped there is shorter than it was"),
                remedy: "put the old file back".into(),
            },
            _ => Error::Script { task: title.to_owned(), purpose, errno },
        }
    }
}
