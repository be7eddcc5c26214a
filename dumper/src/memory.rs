//! Copying memory out: which pages, by how many writers, into which files.
//!
//! Pages are read by process_vm_readv where they belong to the process alone. It pins what it reads, which
//! makes a copy of every page that is still shared copy-on-write with a relative; those are read through
//! /proc/PID/mem, at half the speed, and so are areas without access, which only that way shows. Every
//! writer has a data file of its own, so that none waits for another's inode lock.

mod ahead;
mod behind;
mod content;
mod known;
mod live;
mod reader;
mod settled;
mod share;
mod store;

use std::fs::File;
use std::os::unix::fs::FileExt;

use torpor_image::extent::{PAGE, Record, Where};
use torpor_image::vma::Vma;
use torpor_image::write::DataFile;
use torpor_kernel::ids::Pid;
use torpor_kernel::pagemap::PageScan;
use torpor_kernel::write_watch;

use crate::areas::MANY;
use crate::error::{Error, Result};
use crate::stage::Stage;
use crate::track::runs::{self, Covered, Runs};
use crate::track::soft::Soft;
use crate::workers;

pub(crate) use self::ahead::Ahead;
pub(crate) use self::behind::Behind;
pub(crate) use self::content::copy_inodes;
pub(crate) use self::known::Known;
pub(crate) use self::live::{Wanted, copy_live};
use self::reader::Reader;
pub(crate) use self::share::most_files;
use self::share::{LONGEST, PIECES, SHARE, Shares, split, writers};
pub(crate) use self::store::slice;

/// Bytes copied at a time: fits into the second-level cache, so that the zero test and the checksum read
/// what is there already.
const CHUNK: u64 = 1 << 20;
/// Addresses that one thread looks at at a time: a dense GiB takes 3 ms.
pub(crate) const LOOK: u64 = 256 << 20;

/// Runs that are taken to be written in the freeze, a microsecond each: where there are more, it is better to copy them again
/// the next time.
const TAKEN: usize = 1000;

/// Who looks on: is told of bytes copied, and may want it to end.
pub(crate) struct Watch<'a> {
    pub(crate) progress: Option<&'a (dyn Fn(u64) + Sync)>,
    pub(crate) cancel: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl Watch<'_> {
    fn copied(&self, pid: Pid, bytes: u64) -> Result<()> {
        if let Some(progress) = self.progress {
            progress(bytes);
        }
        if self.cancel.is_some_and(|cancel| cancel()) { Err(Error::Cancelled { pid }) } else { Ok(()) }
    }
}

/// An address space to be copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space<'a> {
    pub(crate) pid: Pid,
    pub(crate) vmas: &'a [Vma],
    /// The space it may have been forked from, which stands before it.
    pub(crate) parent: Option<usize>,
    /// What was copied of it before, if its writes are followed ([`crate::track`]): still right where nothing was written.
    pub(crate) covered: Option<&'a Covered>,
    /// The code that its areas show by themselves.
    pub(crate) behind: &'a Behind,
    /// By which that shows, where it is not by write protection.
    pub(crate) soft: Option<&'a Soft>,
    /// Areas whose pages are of it alone, as far as that is known.
    pub(crate) unshared: &'a [(u64, u64)],
    /// Where it was looked for pages already.
    pub(crate) ahead: Option<&'a Ahead>,
}

/// A run of memory to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Number of the space.
    space: usize,
    start: u64,
    end: u64,
}

/// Private pages of all spaces: copied, and perhaps on disk.
#[derive(Debug)]
pub(crate) struct Copied {
    pages: Pages,
    spaces: Vec<Rest>,
}

#[derive(Debug)]
enum Pages {
    /// In the stage: for each run where it begins.
    Staged(Vec<(Run, usize)>),
    /// In the data files, by space.
    Written(Vec<Vec<Record>>),
}

/// What is known of a space besides the pages that were copied from it.
#[derive(Debug, Default)]
struct Rest {
    guards: Vec<Record>,
    /// Where pages are that were copied before.
    known: Runs,
    parent: Option<usize>,
    /// Runs whose pages it still shares with its parent.
    inherited: Vec<(u64, u64)>,
}

/// Copies the private pages of all spaces into the stage, if it has room, or else into the files. A page that a
/// space shares copy-on-write with its parent's is copied once.
pub(crate) fn copy(
    spaces: &[Space<'_>],
    stage: Option<&mut Stage>,
    files: &mut [DataFile],
    watch: &Watch<'_>,
) -> Result<Copied> {
    let mut runs = Vec::new();
    let mut rests = Vec::with_capacity(spaces.len());
    let numbered: Vec<(usize, &Space<'_>)> = spaces.iter().enumerate().collect();
    for found in workers::each(&numbered, |(number, space)| find(*number, space, spaces)) {
        let (own, rest) = found?;
        runs.extend(own);
        rests.push(rest);
    }
    let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
    let writers = writers(bytes).min(files.len() as u64).max(1);
    let share = bytes.div_ceil(writers * PIECES).next_multiple_of(PAGE).max(SHARE);
    if let Some(stage) = stage
        && let Some(first) = stage.take(bytes)
    {
        let staged = read_shares(spaces, &split(&runs, share), &mut stage.bytes_mut()[first..], first)?;
        return Ok(Copied { pages: Pages::Staged(staged), spaces: rests });
    }
    let shares = Shares::new(split(&runs, share.min(LONGEST)));
    let mut pages = vec![Vec::new(); spaces.len()];
    let files = files.iter_mut().take(writers as usize);
    let copy = |file| copy_runs(spaces, &shares, file, watch).inspect_err(|_| shares.end());
    for copied in workers::all(files, copy) {
        for (space, records) in copied? {
            pages[space].extend(records);
        }
    }
    Ok(Copied { pages: Pages::Written(pages), spaces: rests })
}

/// The runs of a space that must be copied, and what need not.
fn find(number: usize, space: &Space<'_>, spaces: &[Space<'_>]) -> Result<(Vec<Run>, Rest)> {
    let pid = space.pid;
    let scan = PageScan::open(pid).map_err(Error::kernel(pid, "opening its pagemap"))?;
    let mut rest = Rest { parent: space.parent, ..Rest::default() };
    let mut areas = joined(space.vmas);
    // Where that fails everything counts as written. It is the begin for the next dump whatever is known for this one.
    let by_bits = space.soft.map(|soft| soft.take(pid, space.vmas).unwrap_or_default());
    if let Some(covered) = space.covered {
        rest.known = match by_bits {
            Some(unchanged) => runs::both(&unchanged, covered.runs()),
            None => settled::settled(&scan, space.vmas, covered, write_watch::holes_show()),
        };
        areas = settled::unsettled(&areas, &rest.known);
    }
    let ahead = space.ahead.and_then(|ahead| ahead.of(pid, &areas));
    let many = ahead.is_none() && space.vmas.len() >= MANY;
    let (pages, guards, areas) = ahead.unwrap_or_else(|| (Runs::new(), Runs::new(), areas));
    let (more_pages, more_guards) = contents(&scan, pid, &areas, many)?;
    let mut runs = runs::tidy([pages, more_pages].concat());
    let guards = [guards, more_guards].concat();
    let guard = |(start, end): (u64, u64)| {
        let length = end - start;
        Record { address: start, length, place: Where::Guard, file: 0, offset: 0 }
    };
    rest.guards = guards.into_iter().map(guard).collect();
    if space.covered.is_some() {
        runs = runs::without(&runs, &rest.known);
        // What is not taken counts as written the next time.
        if space.soft.is_none() && runs.len() <= TAKEN {
            for (start, end) in &runs {
                let _best_effort = scan.take_written(*start, *end);
            }
        }
    }
    if let Some(parent) = space.parent {
        let (shared, others) = shared_pages(pid, spaces[parent].pid, &runs)?;
        // What may be left out of the parent's must show here as well.
        let apart = spaces[parent].behind.apart(space.behind);
        rest.inherited = runs::without(&shared, &apart);
        runs = runs::tidy([others, runs::both(&shared, &apart)].concat());
    }
    Ok((runs.into_iter().map(|(start, end)| Run { space: number, start, end }).collect(), rest))
}

/// The pages that areas hold, and their guards. `many`: it takes longer than their size tells.
fn contents(scan: &PageScan, pid: Pid, areas: &[(u64, u64)], many: bool) -> Result<(Runs, Runs)> {
    let total: u64 = areas.iter().map(|(start, end)| end - start).sum();
    let parts = parts(areas, if many { (total / 8).next_multiple_of(PAGE).clamp(PAGE, LOOK) } else { LOOK });
    let look = |(start, end): &(u64, u64)| {
        scan.contents(*start, *end).map_err(Error::kernel(pid, "finding its pages"))
    };
    // A thread is worth more than a small space takes.
    let small = total < LOOK && !many;
    let looks: Vec<_> = if small { parts.iter().map(look).collect() } else { workers::each_of(&parts, look) };
    let (mut runs, mut guards) = (Runs::new(), Runs::new());
    for look in looks {
        let (pages, its_guards) = look?;
        runs.extend(pages.into_iter().map(|r| (r.start, r.end)));
        guards.extend(its_guards.into_iter().map(|r| (r.start, r.end)));
    }
    Ok((runs::tidy(runs), runs::tidy(guards)))
}

/// Splits `runs` of a process into those whose pages its parent has at the same address as well, and the
/// others. Without the privilege to see page frames (Documentation/admin-guide/mm/pagemap.rst) there are only others.
pub(crate) fn shared_pages(pid: Pid, parent: Pid, runs: &[(u64, u64)]) -> Result<(Runs, Runs)> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FRAME: u64 = (1 << 55) - 1;
    let open = |pid: Pid| {
        File::open(format!("/proc/{pid}/pagemap")).map_err(|e| {
            Error::kernel(pid, "opening its pagemap")(torpor_kernel::Error::io("open", "pagemap", &e))
        })
    };
    let (own, its) = (open(pid)?, open(parent)?);
    let (mut shared, mut others) = (Vec::new(), Vec::new());
    let add = |list: &mut Vec<(u64, u64)>, start: u64, end: u64| match list.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => list.push((start, end)),
    };
    let (mut mine, mut theirs) = (vec![0u8; 8 * 4096], vec![0u8; 8 * 4096]);
    for &(start, end) in runs {
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE).min(4096) as usize;
            let (mine, theirs) = (&mut mine[..8 * pages], &mut theirs[..8 * pages]);
            let read = own.read_exact_at(mine, at / PAGE * 8).is_ok()
                && its.read_exact_at(theirs, at / PAGE * 8).is_ok();
            if !read {
                add(&mut others, at, at + pages as u64 * PAGE);
            } else {
                for (a, b) in mine.as_chunks::<8>().0.iter().zip(theirs.as_chunks::<8>().0) {
                    let (a, b) = (u64::from_ne_bytes(*a), u64::from_ne_bytes(*b));
                    let kind = PRESENT | SWAPPED;
                    let same = a & (kind | FRAME) == b & (kind | FRAME) && a & kind != 0 && a & FRAME != 0;
                    add(if same { &mut shared } else { &mut others }, at, at + PAGE);
                    at += PAGE;
                }
                continue;
            }
            at += pages as u64 * PAGE;
        }
    }
    Ok((shared, others))
}

/// Reads every share into its part of `room`, by several threads.
fn read_shares(
    spaces: &[Space<'_>],
    shares: &[Vec<Run>],
    room: &mut [u8],
    first: usize,
) -> Result<Vec<(Run, usize)>> {
    let mut staged = Vec::new();
    let mut parts = Vec::with_capacity(shares.len());
    let mut rest = room;
    let mut at = first;
    for share in shares {
        let length: u64 = share.iter().map(|r| r.end - r.start).sum();
        let (part, after) = rest.split_at_mut(length as usize);
        rest = after;
        for run in share {
            staged.push((*run, at));
            at += (run.end - run.start) as usize;
        }
        parts.push((share, part));
    }
    workers::all(parts, |(share, part)| read_runs(spaces, share, part))
        .into_iter()
        .collect::<Result<()>>()?;
    Ok(staged)
}

fn read_runs(spaces: &[Space<'_>], runs: &[Run], mut room: &mut [u8]) -> Result<()> {
    let mut readers = Readers::new(spaces);
    for runs in runs.chunk_by(|a, b| a.space == b.space) {
        let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
        let (part, rest) = room.split_at_mut(bytes as usize);
        let scattered = spaces[runs[0].space].covered.is_some();
        readers.of(runs[0].space)?.read_runs(runs, part, scattered)?;
        room = rest;
    }
    Ok(())
}

/// The reader of the space that is being read: runs of one space follow each other.
struct Readers<'a> {
    spaces: &'a [Space<'a>],
    now: Option<(usize, Reader<'a>)>,
}

impl<'a> Readers<'a> {
    fn new(spaces: &'a [Space<'a>]) -> Self {
        Readers { spaces, now: None }
    }

    fn of(&mut self, space: usize) -> Result<&Reader<'a>> {
        let reader = match self.now.take() {
            Some((of, reader)) if of == space => reader,
            _ => Reader::open(self.spaces[space].pid, self.spaces[space].unshared)?,
        };
        Ok(&self.now.insert((space, reader)).1)
    }
}

impl Copied {
    /// The records of every space. Writes what was staged to the files.
    pub(crate) fn finish(
        self,
        root: Pid,
        stage: Option<&Stage>,
        files: &mut [DataFile],
        watch: &Watch<'_>,
        covered: &[Option<&Covered>],
        behind: &[Behind],
    ) -> Result<Vec<Vec<Record>>> {
        let own = match (self.pages, stage) {
            (Pages::Written(records), _) => records,
            (Pages::Staged(runs), Some(stage)) => write_staged(behind, &runs, stage, files, root, watch)?,
            (Pages::Staged(_), None) => {
                return Err(Error::Inconsistent { pid: root, what: "the stage is gone".into() });
            }
        };
        let mut all: Vec<Vec<Record>> = Vec::with_capacity(own.len());
        for ((mut records, rest), covered) in own.into_iter().zip(self.spaces).zip(covered) {
            records.extend(rest.guards);
            records.extend(covered.map(|c| c.within(&rest.known)).unwrap_or_default());
            if let Some(parent) = rest.parent {
                for (start, end) in rest.inherited {
                    slice(&all[parent], start, end, &mut records);
                }
            }
            records.sort_by_key(|r| r.address);
            all.push(records);
        }
        Ok(all)
    }
}

/// Writes staged runs, by as many threads as they are worth, each to a file of its own. Gives records by space.
fn write_staged(
    spaces: &[Behind],
    runs: &[(Run, usize)],
    stage: &Stage,
    files: &mut [DataFile],
    root: Pid,
    watch: &Watch<'_>,
) -> Result<Vec<Vec<Record>>> {
    let bytes: u64 = runs.iter().map(|(r, _)| r.end - r.start).sum();
    let writers = writers(bytes).min(files.len() as u64).max(1);
    let share = bytes.div_ceil(writers);
    let mut done = 0;
    let parts = runs.chunk_by(|(before, _), _| {
        let part = done / share.max(1);
        done += before.end - before.start;
        done / share.max(1) == part
    });
    let write = |part: &[(Run, usize)], file: &mut DataFile| -> Result<Vec<(usize, Vec<Record>)>> {
        let mut all: Vec<(usize, Vec<Record>)> = Vec::new();
        for (run, at) in part {
            if all.last().is_none_or(|(space, _)| *space != run.space) {
                all.push((run.space, Vec::new()));
            }
            let (_, records) = all.last_mut().expect("pushed above");
            let bytes = &stage.bytes()[*at..*at + (run.end - run.start) as usize];
            for (i, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
                spaces[run.space].store(records, run.start + i as u64 * CHUNK, chunk, file)?;
                watch.copied(root, chunk.len() as u64)?;
            }
        }
        Ok(all)
    };
    let mut all = vec![Vec::new(); spaces.len()];
    for written in workers::all(parts.zip(files), |(part, file)| write(part, file)) {
        written?.into_iter().for_each(|(space, records)| all[space].extend(records));
    }
    Ok(all)
}

/// Encodes what was put aside, several files at a time.
pub(crate) fn catch_up(files: &mut [DataFile]) -> Result<()> {
    for caught_up in workers::all(files, DataFile::catch_up) {
        caught_up?;
    }
    Ok(())
}

/// Private areas that lie side by side, as one.
fn joined(vmas: &[Vma]) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for vma in vmas.iter().filter(|v| v.private()) {
        match all.last_mut() {
            Some(last) if last.1 == vma.start => last.1 = vma.end,
            _ => all.push((vma.start, vma.end)),
        }
    }
    all
}

/// Cuts areas that are longer than `look`, so that several threads can look at them.
fn parts(areas: &[(u64, u64)], look: u64) -> Runs {
    let mut all = Runs::new();
    let total: u64 = areas.iter().map(|(start, end)| end - start).sum();
    let length = look.max(total / 64).next_multiple_of(look);
    for &(start, end) in areas {
        let mut at = start;
        while at < end {
            let next = end.min(at + length);
            all.push((at, next));
            at = next;
        }
    }
    all
}

fn copy_runs(
    spaces: &[Space<'_>],
    shares: &Shares,
    file: &mut DataFile,
    watch: &Watch<'_>,
) -> Result<Vec<(usize, Vec<Record>)>> {
    let mut readers = Readers::new(spaces);
    let mut all: Vec<(usize, Vec<Record>)> = Vec::new();
    let mut buffer = vec![0u8; CHUNK as usize];
    for run in std::iter::from_fn(|| shares.take()).flatten() {
        let reader = readers.of(run.space)?;
        if all.last().is_none_or(|(space, _)| *space != run.space) {
            all.push((run.space, Vec::new()));
        }
        let (_, records) = all.last_mut().expect("pushed above");
        let mut at = run.start;
        while at < run.end {
            let length = (run.end - at).min(CHUNK);
            let bytes = &mut buffer[..length as usize];
            reader.read(at, bytes)?;
            spaces[run.space].behind.store(records, at, bytes, file)?;
            watch.copied(reader.pid, length)?;
            at += length;
        }
    }
    Ok(all)
}
