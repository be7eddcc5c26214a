//! Copying a running tree, over and over, until little of it is still to be copied when it stands.

use torpor_image::write::DataFile;
use torpor_kernel::ids::Pid;
use torpor_kernel::maps::{Kind, Mapping};
use torpor_kernel::pagemap::{PageScan, Range, Want};
use torpor_kernel::stat;
use torpor_kernel::write_watch::WriteWatch;

use super::runs::{self, Runs};
use super::{By, Tracking};
use crate::error::Result;
use crate::memory::{self, Watch};
use crate::survey::living;
use crate::{stage, workers};

/// What is left to the freeze without another round: about a millisecond of copying.
const LITTLE: u64 = 4 << 20;
/// A tree that writes as fast as we copy is not followed for ever.
const ROUNDS: u32 = 12;
/// What the next rounds copy is kept in memory where this one copied no more.
const SOON: u64 = 64 << 20;
/// The part of free memory that may be used for that.
const PART: u64 = 4;

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

/// Goes round until little is left. The first rounds write to the files; from when the next one will be short, or a disk
/// takes less than the tree writes, what is copied is kept in memory until the tree has gone on.
pub(super) fn run(tracking: &mut Tracking, files: &mut [DataFile], watch: &Watch<'_>) -> Result<()> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS {
        let (copied, unwatched) = round(tracking, files, watch)?;
        tracking.expected = copied + unwatched;
        let slow = copied > before / 4 * 3;
        let faster = !tracking.kept && (slow || copied <= SOON) && keep(files);
        tracking.kept |= faster;
        if copied <= LITTLE || (slow && !faster) {
            break;
        }
        // What a round finds is due to the one before it.
        before = if faster { u64::MAX } else { copied };
    }
    Ok(())
}

/// Has what is copied from now on kept in memory, if there is enough.
fn keep(files: &mut [DataFile]) -> bool {
    let room = stage::available() / PART / files.len().max(1) as u64;
    if room < SOON {
        return false;
    }
    files.iter_mut().for_each(|file| file.keep(room));
    true
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
        tracking.covered.entry(*pid).or_default().renew(&written, records);
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
        let mut written = take(&scan, start, end);
        if matches!(written, Ok(None)) {
            if watch.register(start, end).is_ok() {
                found.written.push((start, end));
                written = take(&scan, start, end);
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

/// The same as [`PageScan::take_written`], by several threads for a large area. Nothing is told if a part is not watched:
/// then all of it counts as written.
fn take(scan: &PageScan, start: u64, end: u64) -> torpor_kernel::Result<Option<Vec<Range>>> {
    // Cut where no huge page would be.
    let cuts = (start / memory::LOOK + 1..end.div_ceil(memory::LOOK)).map(|n| n * memory::LOOK);
    let edges: Vec<u64> = std::iter::once(start).chain(cuts).chain([end]).collect();
    if let [_, _] = edges[..] {
        return scan.take_written(start, end);
    }
    let parts: Vec<(u64, u64)> = edges.windows(2).map(|edge| (edge[0], edge[1])).collect();
    let mut all = Some(Vec::new());
    for part in workers::each_of(&parts, |(start, end)| scan.take_written(*start, *end)) {
        all = all.zip(part?).map(|(mut all, more)| {
            all.extend(more);
            all
        });
    }
    Ok(all)
}

/// Whether an area holds pages of its process alone.
pub(super) fn watchable(area: &Mapping) -> bool {
    !area.shared && !matches!(area.kind(), Kind::Vdso | Kind::Vvar | Kind::Vsyscall)
}
