//! Copying a running tree, over and over, until little of it is still to be copied when it stands.

use torpor_image::write::DataFile;
use torpor_kernel::ids::Pid;
use torpor_kernel::maps::{Kind, Mapping};
use torpor_kernel::pagemap::{PageScan, Want};
use torpor_kernel::stat;
use torpor_kernel::write_watch::WriteWatch;

use super::runs::{self, Runs};
use super::{By, Tracking};
use crate::error::Result;
use crate::memory::{self, Watch};
use crate::survey::living;
use crate::workers;

/// What is left to the freeze without another round: about a millisecond of copying.
const LITTLE: u64 = 4 << 20;
/// A tree that writes as fast as we copy is not followed for ever.
const ROUNDS: u32 = 6;

/// What a look at one process has found.
#[derive(Default)]
struct Look {
    /// What is not known any more: it was written, or is watched only now.
    written: Runs,
    /// What is to be copied.
    wanted: Runs,
    /// Bytes in areas that cannot be watched.
    unwatched: u64,
    /// The watch tells what is not so.
    lost: bool,
    behind: memory::Behind,
}

/// Goes round.
pub(super) fn run(tracking: &mut Tracking, files: &mut [DataFile], watch: &Watch<'_>) -> Result<()> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS {
        let (copied, unwatched) = round(tracking, files, watch)?;
        tracking.expected = copied + unwatched;
        if copied <= LITTLE || copied > before / 2 {
            break;
        }
        before = copied;
    }
    Ok(())
}

/// Goes round once.
pub(super) fn once(tracking: &mut Tracking, files: &mut [DataFile], watch: &Watch<'_>) -> Result<()> {
    if tracking.trackers.values().all(|t| matches!(t.by, By::SoftDirty(_))) {
        return Ok(());
    }
    round(tracking, files, watch).map(drop)
}

/// One look at all processes; gives the bytes that were copied, and those in areas that cannot be watched.
fn round(tracking: &mut Tracking, files: &mut [DataFile], watch: &Watch<'_>) -> Result<(u64, u64)> {
    let pids: Vec<Pid> = tracking.watched().collect();
    let looks = workers::each(&pids, |pid| {
        let parent = stat::of_process(*pid).map(|s| Pid(s.ppid)).ok().filter(|p| tracking.watches(*p));
        match &tracking.trackers[pid].by {
            By::WriteProtection(watch) => look(*pid, watch, parent),
            // All of it is copied when the tree stands.
            By::SoftDirty(soft) => Look { unwatched: soft.left(living(*pid)), ..Look::default() },
        }
    });
    let mut wanted = Vec::new();
    let (mut bytes, mut unwatched) = (0, 0);
    let mut written = Vec::new();
    for (pid, look) in pids.iter().zip(looks) {
        if look.lost {
            tracking.trackers.remove(pid);
        }
        bytes += look.wanted.iter().map(|(start, end)| end - start).sum::<u64>();
        unwatched += look.unwatched;
        wanted.push(memory::Wanted { pid: living(*pid), runs: look.wanted, behind: look.behind });
        written.push(look.written);
    }
    let copied = memory::copy_live(&wanted, files, watch)?;
    for ((pid, written), records) in pids.iter().zip(written).zip(copied) {
        let covered = tracking.covered.entry(*pid).or_default();
        *covered = std::mem::take(covered).renew(&written, records);
    }
    Ok((bytes, unwatched))
}

/// Finds out what of a running process has been written, watching areas that are not watched yet. What goes wrong is left
/// out, so that it counts as changed when the process stands.
fn look(own: Pid, watch: &WriteWatch, parent: Option<Pid>) -> Look {
    let pid = living(own);
    let (Ok(maps), Ok(scan)) = (torpor_kernel::maps::maps(pid), PageScan::open(pid)) else {
        return Look { written: vec![(0, u64::MAX)], ..Look::default() };
    };
    let mut found = Look { behind: memory::Behind::of_running(&maps), ..Look::default() };
    for area in maps.iter().filter(|m| watchable(m)) {
        let (start, end) = (area.start, area.end);
        let mut written = scan.take_written(start, end);
        if matches!(written, Ok(None)) {
            if watch.register(start, end).is_ok() {
                found.written.push((start, end));
                written = scan.take_written(start, end);
            } else if scan.is_watched(start, end).unwrap_or(true) {
                // It was changed just now.
                return Look { lost: true, written: vec![(0, u64::MAX)], ..Look::default() };
            }
        }
        match written {
            Ok(Some(ranges)) => found.wanted.extend(ranges.into_iter().map(|r| (r.start, r.end))),
            Ok(None) | Err(_) => {
                found.written.push((start, end));
                let there = scan.scan(start, end, Want::Anonymous).unwrap_or_default();
                found.unwatched += there.iter().map(|r| r.len()).sum::<u64>();
            }
        }
    }
    found.wanted = runs::tidy(found.wanted);
    found.written = runs::tidy([found.written, found.wanted.clone()].concat());
    // What it has in common with its parent is in the image once, and which pages that are shows when both stand.
    if let Some(parent) = parent
        && let Ok((_, others)) = memory::shared_pages(pid, living(parent), &found.wanted)
    {
        found.wanted = others;
    }
    found
}

/// Whether an area holds pages of its process alone.
pub(super) fn watchable(area: &Mapping) -> bool {
    !area.shared && !matches!(area.kind(), Kind::Vdso | Kind::Vvar | Kind::Vsyscall)
}
