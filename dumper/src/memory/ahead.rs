//! The pages of processes of very many areas, looked for while other things are found out about them.
//!
//! Each area costs the kernel a third of a microsecond or more, whatever is in it, and describing it costs us as much. In a
//! tree that stands neither waits for the other: one thread looks for pages where areas were known to be before,
//! and what is found holds for those that turn out to be there.

use std::collections::HashMap;

use torpor_kernel::ids::Pid;
use torpor_kernel::pagemap::PageScan;

use super::contents;
use crate::track::runs::{self, Runs};

/// What was found in address spaces.
#[derive(Debug, Default)]
pub(crate) struct Ahead(HashMap<Pid, Found>);

/// What was found in one.
#[derive(Debug)]
struct Found {
    /// Where it was looked for.
    areas: Runs,
    pages: Runs,
    guards: Runs,
}

impl Ahead {
    /// Looks where areas are said to be. Nothing is known of a process where that fails.
    pub(crate) fn look(all: &[(Pid, Runs)]) -> Self {
        let look = |(pid, areas): &(Pid, Runs)| {
            let (pages, guards) = contents(&PageScan::open(*pid).ok()?, *pid, areas, true).ok()?;
            Some((*pid, Found { areas: areas.clone(), pages, guards }))
        };
        Ahead(all.iter().filter_map(look).collect())
    }

    /// Pages and guards within areas of a process, and those of the areas that it was not looked at.
    pub(super) fn of(&self, pid: Pid, areas: &[(u64, u64)]) -> Option<(Runs, Runs, Runs)> {
        let found = self.0.get(&pid)?;
        let within = |runs: &Runs| runs::both(runs, areas);
        Some((within(&found.pages), within(&found.guards), runs::without(areas, &found.areas)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_holds_where_it_was_looked() {
        let found =
            Found { areas: vec![(0, 8), (10, 20)], pages: vec![(1, 3), (12, 20)], guards: vec![(5, 6)] };
        let ahead = Ahead(HashMap::from([(Pid(7), found)]));
        assert_eq!(
            ahead.of(Pid(7), &[(2, 6), (10, 14)]),
            Some((vec![(2, 3), (12, 14)], vec![(5, 6)], vec![]))
        );
        assert_eq!(ahead.of(Pid(7), &[(2, 9)]), Some((vec![(2, 3)], vec![(5, 6)], vec![(8, 9)])));
        assert_eq!(ahead.of(Pid(8), &[(2, 6)]), None);
    }
}
