//! Images that build on others: what did not change since lies in the data files of an earlier dump.
//!
//! The index of such an image is complete; only data files are left where they are. So a restore reads each page from
//! one place however long the chain is, and an image needs of its ancestors nothing but the files that it still
//! names. Ancestors are found by paths relative to the image, so that they may be moved together, and known by
//! identity, size and checksum.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::chunk::Chunk;
use crate::manifest::{ImageFile, Manifest};
use crate::read::Image;
use crate::write::data_file_name;
use crate::{Bytes, Error, Identities, Result, stock};

/// An image that some data files are those of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// Its identity.
    pub id: String,
    /// Its directory, relative to that of the image, or absolute.
    pub path: Bytes,
}

/// A data file of an ancestor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrowed {
    /// Its number in the index of this image.
    pub number: u32,
    /// Whose it is: index into the ancestors.
    pub ancestor: u32,
    /// Its number there.
    pub original: u32,
    /// Length in bytes.
    pub size: u64,
    /// CRC-32C of all of it.
    pub crc32c: u32,
}

/// A new identity for an image.
pub(crate) fn new_id() -> String {
    let random = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    random.trim().to_owned()
}

/// The data files of a parent, as an image that builds on it names them.
#[derive(Debug)]
pub struct Borrowing {
    ancestors: Vec<Ancestor>,
    borrowed: Vec<Borrowed>,
    /// By number in the parent: number in the new image.
    numbers: Vec<(u32, u32)>,
    /// Files that become the new image's own, under their numbers in the parent.
    links: Vec<Link>,
}

/// A data file that two images have.
#[derive(Debug)]
pub(crate) struct Link {
    number: u32,
    from: PathBuf,
    pub(crate) file: ImageFile,
    pub(crate) chunks: Vec<Chunk>,
}

impl Link {
    /// Gives it another name, or copies it where a file cannot have two.
    pub(crate) fn make(&self, to: &Path) -> Result<()> {
        if std::fs::hard_link(&self.from, to).is_ok() {
            return Ok(());
        }
        std::fs::copy(&self.from, to).map(drop).map_err(Error::file("copy", &self.from))
    }
}

impl Borrowing {
    /// All data files of `parent`, for an image in `dir`, numbered from `first` on.
    pub fn of(parent: &Image, dir: &Path, first: u32) -> Result<Self> {
        if parent.manifest.id.is_empty() {
            return Err(Error::NoParent {
                path: parent.dir.clone(),
                why: "it was written by a torpor that did not give images an identity".into(),
            });
        }
        let own = parent.manifest.id.clone();
        let mut ancestors = vec![Ancestor { id: own, path: between(dir, &parent.dir)? }];
        for ancestor in &parent.manifest.ancestors {
            let there = parent.dir.join(ancestor.path.path());
            ancestors.push(Ancestor { id: ancestor.id.clone(), path: between(dir, &there)? });
        }
        let mut borrowing =
            Borrowing { ancestors, borrowed: Vec::new(), numbers: Vec::new(), links: Vec::new() };
        for (number, file) in parent.data_files() {
            borrowing.add(
                first,
                number,
                Borrowed { number: 0, ancestor: 0, original: number, size: file.size, crc32c: file.crc32c },
            );
        }
        for theirs in &parent.manifest.borrowed {
            borrowing.add(first, theirs.number, Borrowed { ancestor: theirs.ancestor + 1, ..theirs.clone() });
        }
        Ok(borrowing)
    }

    /// All data files of `parent`, to be the new image's own as well.
    pub fn linked(parent: &Image) -> Self {
        let mut borrowing =
            Borrowing { ancestors: Vec::new(), borrowed: Vec::new(), numbers: Vec::new(), links: Vec::new() };
        for (number, stock) in parent.stock() {
            borrowing.numbers.push((number, number));
            let name = data_file_name(number, stock.stored);
            borrowing.links.push(Link {
                number,
                from: stock.dir.join(&stock.name),
                file: ImageFile { name, size: stock.length, crc32c: stock.crc32c },
                chunks: stock.table.chunks().map(|c| Chunk { file: number, ..*c }).collect(),
            });
        }
        borrowing
    }

    /// The files among them that are linked and `used` by the index.
    pub(crate) fn take_links(&mut self, used: impl Fn(u32) -> bool) -> Vec<Link> {
        let mut links = std::mem::take(&mut self.links);
        links.retain(|link| used(link.number));
        links
    }

    fn add(&mut self, first: u32, number: u32, file: Borrowed) {
        let new = first + self.borrowed.len() as u32;
        self.numbers.push((number, new));
        self.borrowed.push(Borrowed { number: new, ..file });
    }

    /// The number in the new image of data file `number` of the parent.
    pub fn number(&self, number: u32) -> Option<u32> {
        self.numbers.iter().find(|(theirs, _)| *theirs == number).map(|(_, own)| *own)
    }

    /// Into the manifest, what of it is `used` by the index.
    pub(crate) fn note(self, manifest: &mut Manifest, used: impl Fn(u32) -> bool) {
        let Borrowing { ancestors, mut borrowed, .. } = self;
        borrowed.retain(|b| used(b.number));
        let mut kept: Vec<u32> = borrowed.iter().map(|b| b.ancestor).collect();
        kept.sort_unstable();
        kept.dedup();
        for file in &mut borrowed {
            file.ancestor = kept.partition_point(|k| *k < file.ancestor) as u32;
        }
        manifest.ancestors = kept.iter().map(|k| ancestors[*k as usize].clone()).collect();
        manifest.borrowed = borrowed;
    }
}

/// The way from one directory to another.
fn between(from: &Path, to: &Path) -> Result<Bytes> {
    let real = |path: &Path| path.canonicalize().map_err(Error::file("find", path));
    let (from, to) = (real(from)?, real(to)?);
    let (mut a, mut b) = (from.components().peekable(), to.components().peekable());
    while a.peek().is_some() && a.peek() == b.peek() {
        a.next();
        b.next();
    }
    let mut way: PathBuf = a.map(|_| Component::ParentDir).collect();
    way.extend(b);
    if way.as_os_str().is_empty() {
        way.push(".");
    }
    Ok(Bytes::from(way.as_os_str().as_encoded_bytes().to_vec()))
}

/// The end of a way from a directory.
fn there(dir: &Path, way: &Path) -> PathBuf {
    let mut path = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    for part in way.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    path
}

/// The directories of an image's ancestors, each found to be the image it shall be, with the files it shall have.
pub(crate) fn find(
    dir: &Path,
    manifest: &Manifest,
    identities: &Identities,
) -> Result<Vec<(PathBuf, Manifest)>> {
    let mut found = Vec::with_capacity(manifest.ancestors.len());
    for ancestor in &manifest.ancestors {
        let path = there(dir, ancestor.path.path());
        let lost = |why: String| Error::Parent { image: dir.to_owned(), path: path.clone(), why };
        let theirs = match crate::read::manifest(&path, identities) {
            Ok(theirs) => theirs,
            Err(Error::NoImage { .. }) => return Err(lost("there is no image".into())),
            Err(e @ (Error::Encrypted { .. } | Error::OtherKey { .. })) => return Err(e),
            Err(e) => return Err(lost(e.to_string())),
        };
        if theirs.id != ancestor.id {
            return Err(lost(format!("it is another image ({} instead of {})", theirs.id, ancestor.id)));
        }
        found.push((path, theirs));
    }
    for file in &manifest.borrowed {
        let (path, theirs) = &found[file.ancestor as usize];
        let lost = |why: String| Error::Parent { image: dir.to_owned(), path: path.clone(), why };
        let named = stock::data_files(theirs).find(|(number, ..)| *number == file.original);
        let same = |found: &ImageFile| (found.size, found.crc32c) == (file.size, file.crc32c);
        let Some(name) = named.filter(|(_, found, _)| same(found)).map(|(_, found, _)| found.name.clone())
        else {
            return Err(lost(format!("its data file {} is another one by now", file.original)));
        };
        match path.join(&name).symlink_metadata() {
            Ok(found) if found.is_file() && found.len() == file.size => {}
            Ok(_) => return Err(lost(format!("its `{name}` is not of {} bytes any more", file.size))),
            Err(e) => return Err(lost(format!("its `{name}` is not there: {e}"))),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_between_directories() {
        let base = std::env::temp_dir().join(format!("torpor-between-{}", std::process::id()));
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        std::fs::create_dir_all(base.join("c")).unwrap();
        let way = |from: &str, to: &str| between(&base.join(from), &base.join(to)).unwrap().0;
        assert_eq!(way("a/b", "c"), b"../../c");
        assert_eq!(way("c", "a/b"), b"../a/b");
        assert_eq!(way("a", "a/b"), b"b");
        assert_eq!(way("a", "a"), b".");
        std::fs::remove_dir_all(&base).unwrap();
    }
}
