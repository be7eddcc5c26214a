//! What the image that a dump builds on has of shared memory and of files: what is still the same is not written again.
//!
//! Nobody follows what is written to shared memory: a store through one mapping of it may be seen (userfaultfd(2)), a
//! write(2) to its memfd is not, nor one by another process. So all of it is read when the tree stands, and compared.
//! Reading the parent must not take time then, so it is done before, while the tree runs, and what is kept of each page
//! is a hash of 128 bits (XXH3, with a seed that nobody knows before): 4 MiB for a GiB, where the pages themselves would
//! take as much memory as the object, and as long to be read again. In the freeze a page is hashed when it has just been
//! read, in the processor's cache. Two pages of one hash would have to be met by chance, 1 in 2^128, since whoever could
//! make them does not know the seed.
//!
//! A page of zeros is none to be looked up: it takes no place in either image.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use torpor_image::Image;
use torpor_image::extent::{PAGE, Record, Where};
use torpor_image::inode::{Inode, Source};
use torpor_kernel::ids::Pid;
use twox_hash::XxHash3_128;

use super::Watch;
use crate::error::Result;
use crate::workers;

/// What one thread reads of the parent at a time.
const PIECE: u64 = 4 << 20;

/// What makes two inodes of two dumps the same one: what it is, by which name, device and number. Numbers are used again, which
/// does no harm: what is compared are contents.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Identity {
    kind: u8,
    name: Vec<u8>,
    device: u64,
    number: u64,
}

impl Identity {
    fn of(inode: &Inode) -> Option<Self> {
        let (kind, name) = match &inode.source {
            Source::Path { path } => (0, path.0.clone()),
            Source::Deleted { path, .. } => (1, path.0.clone()),
            Source::Memfd { name, .. } => (2, name.0.clone()),
            Source::SharedMemory { .. } => (3, Vec::new()),
            // Whether it is attached decides of its device.
            Source::SysV { segment, .. } => {
                let name = [segment.permissions.key, segment.creator].map(i32::to_ne_bytes).concat();
                return Some(Identity { kind: 4, name, device: 0, number: segment.id as u64 });
            }
            Source::Process { .. } => return None,
        };
        Some(Identity { kind, name, device: inode.device, number: inode.number })
    }
}

/// The pages of all inodes that a parent has contents of.
#[derive(Debug, Default)]
pub(crate) struct Known {
    seed: u64,
    inodes: HashMap<Identity, Vec<Part>>,
}

/// A run of pages of an inode in the data files of the parent.
#[derive(Debug)]
struct Part {
    /// In the terms of the image that is written.
    record: Record,
    hashes: Vec<u128>,
}

impl Known {
    /// Reads what `parent` has. `borrow` gives a record in the terms of the image that is written, if it is to be used.
    pub(crate) fn of(
        parent: &Image,
        borrow: impl Fn(&Record) -> Option<Record>,
        root: Pid,
        watch: &Watch<'_>,
    ) -> Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        // Numbers of memory files begin anew.
        if parent.manifest.host.boot != boot.trim() {
            return Ok(Known::default());
        }
        let seed = RandomState::new().hash_one(());
        let mut pieces: Vec<(Identity, Record, Record)> = Vec::new();
        for inode in &parent.objects.inodes {
            let (Some(identity), Some(content)) = (Identity::of(inode), inode.content()) else { continue };
            let data = parent.records(content).iter().filter(|r| r.place == Where::Data);
            for (theirs, own) in data.filter_map(|r| Some((r, borrow(r)?))) {
                for at in (0..theirs.length).step_by(PIECE as usize) {
                    let part = |r: &Record| Record {
                        address: r.address + at,
                        length: (r.length - at).min(PIECE),
                        offset: r.offset + at,
                        ..*r
                    };
                    pieces.push((identity.clone(), part(theirs), part(&own)));
                }
            }
        }
        let hash = |(_, theirs, _): &(Identity, Record, Record)| {
            let mut bytes = vec![0; theirs.length as usize];
            parent.data(theirs.file)?.read_exact_at(&mut bytes, theirs.offset)?;
            watch.copied(root, 0)?;
            let pages = bytes.chunks_exact(PAGE as usize);
            Ok::<Vec<u128>, crate::Error>(
                pages.map(|page| XxHash3_128::oneshot_with_seed(seed, page)).collect(),
            )
        };
        let hashed = workers::each_of(&pieces, hash);
        let mut inodes: HashMap<Identity, Vec<Part>> = HashMap::new();
        for ((identity, _, record), hashes) in pieces.into_iter().zip(hashed) {
            inodes.entry(identity).or_default().push(Part { record, hashes: hashes? });
        }
        Ok(Known { seed, inodes })
    }

    /// What is known of an inode.
    pub(super) fn of_inode(&self, inode: &Inode) -> Option<Pages<'_>> {
        let parts = self.inodes.get(&Identity::of(inode)?)?;
        Some(Pages { seed: self.seed, parts })
    }
}

/// What is known of one inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pages<'a> {
    seed: u64,
    /// In order.
    parts: &'a [Part],
}

impl Pages<'_> {
    /// The record of a page at this offset with these contents, if the parent has it.
    pub(super) fn find(&self, offset: u64, page: &[u8]) -> Option<Record> {
        let i = self.parts.partition_point(|p| p.record.address + p.record.length <= offset);
        let Part { record, hashes } = self.parts.get(i).filter(|p| p.record.address <= offset)?;
        let at = offset - record.address;
        let known = *hashes.get((at / PAGE) as usize)?;
        (XxHash3_128::oneshot_with_seed(self.seed, page) == known).then_some(Record {
            address: offset,
            length: PAGE,
            offset: record.offset + at,
            ..*record
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_where_it_was_only() {
        let page = |byte| [byte; PAGE as usize];
        let hash = |byte| XxHash3_128::oneshot_with_seed(7, &page(byte));
        let part = |at: u64, offset: u64, bytes: &[u8]| Part {
            record: Record {
                address: at * PAGE,
                length: bytes.len() as u64 * PAGE,
                place: Where::Data,
                file: 3,
                offset: offset * PAGE,
            },
            hashes: bytes.iter().map(|b| hash(*b)).collect(),
        };
        let parts = [part(2, 9, &[1, 2]), part(5, 0, &[1])];
        let known = Pages { seed: 7, parts: &parts };
        let find = |at: u64, byte| known.find(at * PAGE, &page(byte)).map(|r| (r.file, r.offset / PAGE));
        assert_eq!([find(2, 1), find(3, 2), find(5, 1)], [Some((3, 9)), Some((3, 10)), Some((3, 0))]);
        assert_eq!([find(1, 1), find(2, 2), find(3, 1), find(4, 1), find(6, 1)], [None; 5]);
    }
}
