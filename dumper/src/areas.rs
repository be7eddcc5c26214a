//! Memory maps that are read before the freeze and, where nothing has changed, hold in it.
//!
//! What smaps tells of a large process takes milliseconds ([`torpor_kernel::mm_seq`]). Where that is so, it is read while
//! the process still runs, with the count of changes before it; in the freeze the count is looked at again and, if it
//! is the same, only the names of files are, of which there are few.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use torpor_kernel::ids::Pid;
use torpor_kernel::maps::{Kind, Mapping};
use torpor_kernel::memory::Memory;
use torpor_kernel::mm_seq::{Look, State};
use torpor_kernel::procmap::Procmap;

use crate::error::{Error, Result};
use crate::survey::living;
use crate::track::runs::{self, Runs};
use crate::{vma, workers};

/// Reading all maps may take this long before it is worth being done twice.
const SLOW: Duration = Duration::from_millis(2);
/// Of so many areas, or so much memory, it can take long; else only the machine was busy.
const SEVERAL: usize = 500;
const LARGE: u64 = 128 << 20;

/// Areas of one process that take time whatever is in them: each costs the kernel 0.4 microseconds, or more.
pub(crate) const MANY: usize = 2000;

/// Whether it is worth being done twice, if it took so long for so many areas and bytes.
pub(crate) fn worth_it(took: Duration, areas: usize, bytes: u64) -> bool {
    took >= SLOW && (areas >= SEVERAL || bytes >= LARGE)
}

/// Maps of running processes, by the threads they were read by.
#[derive(Debug, Default)]
pub(crate) struct Areas {
    look: Option<Look>,
    known: HashMap<Pid, (State, Arc<[Mapping]>)>,
    /// The private ones of processes that have very many, those that touch put together.
    pub(crate) many: Vec<(Pid, Runs)>,
}

impl Areas {
    /// Reads those of running processes; none where it cannot be told whether they change.
    pub(crate) fn read(pids: impl Iterator<Item = Pid>) -> Self {
        let Ok(look) = Look::open() else { return Areas::default() };
        let mut areas = Areas { look: Some(look), ..Areas::default() };
        let pids: Vec<(Pid, State)> =
            pids.map(living).filter_map(|pid| Some((pid, areas.state(pid)?))).collect();
        let maps = workers::each(&pids, |(pid, _)| vma::read(*pid));
        let all = pids.into_iter().zip(maps);
        areas.known =
            all.filter_map(|((pid, state), maps)| Some((pid, (state, maps.ok()?.into())))).collect();
        let all = areas.known.iter().filter(|(_, (_, maps))| maps.len() >= MANY);
        areas.many = all.map(|(pid, (_, maps))| (*pid, private(maps))).collect();
        areas
    }

    fn state(&self, pid: Pid) -> Option<State> {
        let mem = Memory::open(pid, false).ok()?;
        self.look.as_ref()?.state(mem.as_fd()).ok()
    }

    /// Those of stopped processes that still hold.
    pub(crate) fn confirmed(&self, pids: impl Iterator<Item = Pid>) -> HashMap<Pid, &Arc<[Mapping]>> {
        let holds = |pid: Pid| {
            let (before, maps) = self.known.get(&pid)?;
            (self.state(pid)? == *before).then_some((pid, maps))
        };
        pids.filter_map(holds).collect()
    }
}

/// What is private in a map. The kernel's own areas hold nothing of the process, and one lies beyond what can be asked about.
fn private(maps: &[Mapping]) -> Runs {
    let own = |m: &&Mapping| !m.shared && !matches!(m.kind(), Kind::Vdso | Kind::Vvar | Kind::Vsyscall);
    runs::tidy(maps.iter().filter(own).map(|m| (m.start, m.end)).collect())
}

/// Areas of which no page is another's as well; one that was swapped out may be. This holds as long as the areas do, for a fork
/// changes the count ([`torpor_kernel::mm_seq`]). Pages that the kernel finds to be the same (KSM) are not seen; to read
/// one only costs the memory of a copy.
pub(crate) fn unshared(maps: &[Mapping]) -> Runs {
    let own = maps.iter().filter(|m| !m.shared && m.shared_kb == 0 && m.swap_kb == 0);
    runs::tidy(own.map(|m| (m.start, m.end)).collect())
}

/// The map of a stopped process, of which `known` may still hold.
pub(crate) fn of(pid: Pid, known: Option<&Arc<[Mapping]>>) -> Result<Arc<[Mapping]>> {
    let Some(known) = known else { return Ok(vma::read(pid)?.into()) };
    if still_named(pid, known) {
        return Ok(known.clone());
    }
    let mut maps = torpor_kernel::maps::maps(pid).map_err(Error::kernel(pid, "reading its memory map"))?;
    let same = |a: &Mapping, b: &Mapping| (a.start, a.end) == (b.start, b.end);
    if maps.len() != known.len() || !maps.iter().zip(&known[..]).all(|(a, b)| same(a, b)) {
        return Ok(vma::read(pid)?.into());
    }
    for (map, known) in maps.iter_mut().zip(&known[..]) {
        map.flags = known.flags.clone();
        (map.pkey, map.page_kb) = (known.pkey, known.page_kb);
        (map.shared_kb, map.swap_kb) = (known.shared_kb, known.swap_kb);
    }
    Ok(maps.into())
}

/// Whether the files of areas that are the same have the names that they had. One area is asked about for each file.
fn still_named(pid: Pid, known: &[Mapping]) -> bool {
    let Ok(procmap) = Procmap::open(pid) else { return false };
    let mut asked = HashSet::new();
    known.iter().filter(|m| m.inode != 0 && asked.insert((m.dev, m.inode, &m.path, m.deleted))).all(|m| {
        let suffix: &[u8] = if m.deleted { b" (deleted)" } else { b"" };
        procmap.at(m.start).is_ok_and(|now| {
            now.range == (m.start, m.end)
                && now.inode == (m.inode, m.dev)
                && now.name.strip_suffix(suffix).is_some_and(|name| name == m.path)
        })
    })
}
