//! Threads that need not be entered, as the kernel's own memory says what only they could tell.
//!
//! To enter a thread takes some sixty microseconds, two switches of context among them, for five values
//! ([`torpor_kernel::task_struct`]). Where there are many threads, all but the leader of each process are left alone. The
//! leader is asked all the same, and what it answers has to be what was read of it; else all are asked.

use std::collections::HashMap;
use std::os::fd::AsFd;

use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::memory::Memory;
use torpor_kernel::task_struct::{Look, Told};

use crate::survey::Survey;

/// From how many threads on the way to the kernel's memory, ten milliseconds before the freeze, is worth it.
const MANY: u32 = 64;

/// A way to do without asking.
#[derive(Debug, Default)]
pub(crate) struct Unasked(Option<Look>);

impl Unasked {
    /// Looks for it where it is worth while.
    pub(crate) fn prepare(survey: &Survey) -> Self {
        let threads: u32 = survey.processes.iter().map(|p| p.threads.saturating_sub(1)).sum();
        Unasked(if threads >= MANY { Look::open().ok() } else { None })
    }

    /// What is known of the threads of a stopped process; nothing unless it is of all of these.
    pub(crate) fn of(&self, pid: Pid, threads: impl Iterator<Item = Tid>) -> HashMap<Tid, Told> {
        let Some(look) = &self.0 else { return HashMap::new() };
        let Ok(memory) = Memory::open(pid, false) else { return HashMap::new() };
        let mut known = look.threads(memory.as_fd()).unwrap_or_default();
        let mut found = HashMap::new();
        for tid in threads {
            match known.remove(&tid) {
                Some(told) => drop(found.insert(tid, told)),
                None => return HashMap::new(),
            }
        }
        found
    }
}
