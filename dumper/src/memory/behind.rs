//! Pages of private file mappings that equal the file: a restored mapping shows them by itself.
//!
//! What a process wrote into a private mapping is a page of its own (mmap(2), `MAP_PRIVATE`), also where it wrote what
//! was there before: relocations that came to nothing, code that was patched and patched back, all of what is locked
//! (mm/mlock.c writes to it). Such a page differs from the file's in one thing: later writes to the file do not show in
//! it. A program may rely on that (write to each page of a data file to have it for itself), so not every page that
//! equals its file can be left out. It is where nobody can rely on it:
//!
//! - The file is one that the tree runs code of: it is mapped executable. Its clean pages show every write to it as it
//!   is, so whoever writes to it breaks the program with or without us.
//! - No member has it open for writing, or maps it so.
//! - It is found again by its path, and stays as it is (`Keep`), or has a spare copy. A restore takes it only with the size
//!   and the modification time that are in the image, as it must for the clean pages; so what is compared here, whenever
//!   that is, is what the restore finds, or the restore says that the file was modified. A time that is younger than the
//!   steps in which file systems count is none to rely on ([`SETTLED`]).
//!
//! Contents are compared where records are made: after the thaw, unless memory goes straight to the files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use torpor_image::Bytes;
use torpor_image::extent::{PAGE, Record};
use torpor_image::inode::{Inode, Source};
use torpor_image::rules::Rule;
use torpor_image::vma::{Mapping, Vma};
use torpor_image::write::DataFile;
use torpor_kernel::maps::{self, Kind};

use super::store::store;
use crate::collect::Collector;
use crate::error::Result;
use crate::track::runs::{self, Runs};
use crate::{lease, scratch};

/// How long ago a file must have been modified: FAT counts in steps of two seconds.
const SETTLED: i64 = 3_000_000_000;

/// The code behind the areas of a space.
#[derive(Clone, Debug, Default)]
pub(crate) struct Behind {
    /// In order.
    areas: Vec<Area>,
    files: Arc<BTreeMap<u64, Code>>,
}

/// An area that maps code.
#[derive(Clone, Copy, Debug)]
struct Area {
    start: u64,
    end: u64,
    /// Which file.
    file: u64,
    /// Where in the file it begins.
    offset: u64,
}

/// A file with code.
#[derive(Debug)]
struct Code {
    path: Bytes,
    device: u64,
    number: u64,
    /// Size and modification time, if they must be these.
    state: Option<(u64, i64)>,
    /// The file and its size, as soon as it is needed; `None` if it is not what it was, or cannot be read.
    open: OnceLock<Option<(File, u64)>>,
}

impl Code {
    fn get(&self) -> Option<&(File, u64)> {
        self.open.get_or_init(|| self.find()).as_ref()
    }

    fn find(&self) -> Option<(File, u64)> {
        let open = |flags| File::options().read(true).custom_flags(flags).open(self.path.path());
        // To read without a trace is for the owner only.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = open(flags | libc::O_NOATIME).or_else(|_| open(flags)).ok()?;
        let stat = nix::sys::stat::fstat(&file).ok()?;
        let state = (stat.st_size as u64, modified(&stat));
        let same = (stat.st_dev, stat.st_ino) == (self.device, self.number)
            && stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && self.state.is_none_or(|wanted| wanted == state);
        same.then_some((file, state.0))
    }
}

fn modified(stat: &libc::stat) -> i64 {
    stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec
}

impl Behind {
    /// Of every space of a tree that stands, all of which were collected; `now` in nanoseconds since 1970.
    pub(crate) fn of_tree(collector: &Collector, spaces: &[Vec<Vma>], now: u64) -> Vec<Behind> {
        let private = |v: &Vma| match v.mapping {
            Mapping::Private { inode, offset } => Some((inode, offset)),
            _ => None,
        };
        let runs_code = |v: &&Vma| v.protection & libc::PROT_EXEC as u32 != 0;
        let code: BTreeSet<_> =
            spaces.iter().flatten().filter(runs_code).filter_map(private).map(|(inode, _)| inode).collect();
        let exclusive = lease::exclusive(collector);
        let lasting = |inode: &&Inode| {
            !scratch::is_written(collector, inode.id)
                && !exclusive.contains(&inode.id)
                && matches!(inode.rule, Rule::Keep | Rule::Spare)
                && inode.modified.saturating_add(SETTLED) < now as i64
        };
        let file = |inode: &Inode| match &inode.source {
            Source::Path { path } => Some(Code {
                path: path.clone(),
                device: inode.device,
                number: inode.number,
                state: Some((inode.size, inode.modified)),
                open: OnceLock::new(),
            }),
            _ => None,
        };
        let code = code.iter().map(|id| &collector.objects.inodes[id.0 as usize]).filter(lasting);
        let files: BTreeMap<u64, Code> =
            code.filter_map(|inode| Some((u64::from(inode.id.0), file(inode)?))).collect();
        let files = Arc::new(files);
        let area = |v: &Vma| {
            let (inode, offset) = private(v)?;
            let file = u64::from(inode.0);
            files.contains_key(&file).then_some(Area { start: v.start, end: v.end, file, offset })
        };
        let of =
            |vmas: &Vec<Vma>| Behind { areas: vmas.iter().filter_map(area).collect(), files: files.clone() };
        spaces.iter().map(of).collect()
    }

    /// Of a space that runs: a guess, which holds if [`Behind::of_tree`] says the same when it stands. What is left out
    /// by it has no record, and is looked at again then.
    pub(crate) fn of_running(all: &[maps::Mapping]) -> Behind {
        let mapped = |m: &&maps::Mapping| !m.shared && !m.deleted && m.kind() == Kind::File;
        let of_file = |m: &maps::Mapping| (libc::makedev(m.dev.0, m.dev.1), m.inode);
        let code: BTreeSet<(u64, u64)> = all.iter().filter(mapped).filter(|m| m.exec).map(of_file).collect();
        let (mut files, mut areas) = (BTreeMap::new(), Vec::new());
        for mapping in all.iter().filter(mapped).filter(|m| code.contains(&of_file(m))) {
            let (device, number) = of_file(mapping);
            let file = code.range(..(device, number)).count() as u64;
            areas.push(Area { start: mapping.start, end: mapping.end, file, offset: mapping.offset });
            files.entry(file).or_insert_with(|| Code {
                path: mapping.path.as_slice().into(),
                device,
                number,
                state: None,
                open: OnceLock::new(),
            });
        }
        Behind { areas, files: Arc::new(files) }
    }

    /// Where this space has code that `other` has not from the same place. A page that is found to be in both all the same
    /// (ksm(5) joins equal ones) must not be left out as this one's.
    pub(crate) fn apart(&self, other: &Behind) -> Runs {
        let mut all = Runs::new();
        for area in &self.areas {
            let same = |o: &&Area| {
                (o.file, o.offset.wrapping_sub(o.start)) == (area.file, area.offset.wrapping_sub(area.start))
            };
            let there: Runs =
                other.within(area.start, area.end).filter(same).map(|o| (o.start, o.end)).collect();
            all.extend(runs::without(&[(area.start, area.end)], &there));
        }
        all
    }

    /// Whether there is code in a range.
    pub(super) fn is_within(&self, start: u64, end: u64) -> bool {
        self.within(start, end).next().is_some()
    }

    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = &Area> {
        let first = self.areas.partition_point(|a| a.end <= start);
        self.areas[first..].iter().take_while(move |a| a.start < end)
    }

    /// Appends `bytes`, which belong at `address`, to the file, leaving out pages of zeros, and those that the files behind
    /// them show.
    pub(super) fn store(
        &self,
        records: &mut Vec<Record>,
        address: u64,
        bytes: &[u8],
        file: &mut DataFile,
    ) -> Result<()> {
        let end = address + bytes.len() as u64;
        // Up to here all is done.
        let mut done = 0;
        let mut theirs = Vec::new();
        for area in self.within(address, end) {
            let (first, last) = (area.start.max(address), area.end.min(end));
            self.show(area, first, last, &mut theirs);
            let at = (first - address) as usize;
            let pages = bytes[at..].chunks_exact(PAGE as usize).zip(theirs.chunks_exact(PAGE as usize));
            for (i, _) in pages.enumerate().filter(|(_, (own, shown))| own == shown) {
                let page = at + i * PAGE as usize;
                if done < page {
                    store(records, address + done as u64, &bytes[done..page], file)?;
                }
                done = page + PAGE as usize;
            }
        }
        if done < bytes.len() {
            store(records, address + done as u64, &bytes[done..], file)?;
        }
        Ok(())
    }

    /// What an area shows by itself from `first` to `last`; less if the file ends before, or nothing if it cannot be read.
    fn show(&self, area: &Area, first: u64, last: u64, into: &mut Vec<u8>) {
        into.clear();
        let Some((file, size)) = self.files.get(&area.file).and_then(Code::get) else { return };
        let from = area.offset + (first - area.start);
        let length = (last - first).min(size.saturating_sub(from));
        into.resize(length as usize, 0);
        match file.read_exact_at(into, from) {
            // Behind the end of a file its last page is zero (mmap(2)).
            Ok(()) => into.resize(length.next_multiple_of(PAGE) as usize, 0),
            Err(_) => into.clear(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_from_the_same_place() {
        let area = |start: u64, end: u64, file, offset: u64| Area {
            start: start * PAGE,
            end: end * PAGE,
            file,
            offset: offset * PAGE,
        };
        let of = |areas: &[Area]| Behind { areas: areas.to_vec(), ..Behind::default() };
        let own = of(&[area(10, 20, 1, 0), area(20, 30, 1, 10), area(40, 50, 2, 7)]);
        let runs =
            |other: &Behind| own.apart(other).iter().map(|(a, b)| (a / PAGE, b / PAGE)).collect::<Vec<_>>();
        assert_eq!(runs(&own), []);
        // Split in another way, and without the end.
        assert_eq!(runs(&of(&[area(10, 25, 1, 0), area(40, 50, 2, 7)])), [(25, 30)]);
        // From elsewhere in the file, and from another file.
        assert_eq!(runs(&of(&[area(10, 30, 1, 1), area(40, 50, 3, 7)])), [(10, 20), (20, 30), (40, 50)]);
        assert_eq!(runs(&Behind::default()), [(10, 20), (20, 30), (40, 50)]);
    }
}
