//! Which data files an image has, its own and those of its ancestors: where they lie, and how they are stored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chunk::{self, Table};
use crate::data::Stored;
use crate::header::Kind;
use crate::keys::Identities;
use crate::manifest::{ImageFile, Manifest};
use crate::{Error, Result, check, read};

/// A data file of an image.
#[derive(Debug)]
pub(crate) struct Stock {
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
    pub(crate) stored: Stored,
    /// Length of the contents.
    pub(crate) size: u64,
    /// Length of the file.
    pub(crate) length: u64,
    pub(crate) crc32c: u32,
    /// Its chunks, if it is encoded.
    pub(crate) table: Arc<Table>,
}

/// The data files that a manifest lists, with their numbers.
pub(crate) fn data_files(manifest: &Manifest) -> impl Iterator<Item = (u32, &ImageFile, Stored)> {
    manifest.files.iter().filter_map(|file| {
        let (number, stored) = check::data_file(&file.name)?;
        Some((number, file, stored))
    })
}

/// Where the chunks of the encoded data files of the image in `dir` lie.
pub(crate) fn tables(
    dir: &Path,
    manifest: &Manifest,
    identities: &Identities,
) -> Result<BTreeMap<u32, Table>> {
    if data_files(manifest).all(|(.., stored)| stored.is_raw()) {
        return Ok(BTreeMap::new());
    }
    chunk::decode(&read::member(dir, manifest, identities, chunk::FILE, Kind::Chunks)?)
}

/// The data files of the image in `dir`, by number.
pub(crate) fn own(
    dir: &Path,
    manifest: &Manifest,
    mut tables: BTreeMap<u32, Table>,
) -> Result<BTreeMap<u32, Stock>> {
    let mut all = BTreeMap::new();
    for (number, file, stored) in data_files(manifest) {
        let table = tables.remove(&number).unwrap_or_default();
        let size = if stored.is_raw() { file.size } else { table.size() };
        // age adds its header, and sixteen bytes to every 64 KiB.
        let fits = match stored {
            Stored { encrypted: true, .. } => table.stored() < file.size,
            stored => stored.is_raw() || table.stored() == file.size,
        };
        if !fits {
            return Err(Error::damaged(&file.name, "its chunks are not as long together as it is"));
        }
        let (dir, name, table) = (dir.to_owned(), file.name.clone(), Arc::new(table));
        let (length, crc32c) = (file.size, file.crc32c);
        all.insert(number, Stock { dir, name, stored, size, length, crc32c, table });
    }
    Ok(all)
}

/// Adds those that are ancestors'.
pub(crate) fn borrow(
    all: &mut BTreeMap<u32, Stock>,
    manifest: &Manifest,
    ancestors: &[(PathBuf, Manifest)],
    identities: &Identities,
) -> Result<()> {
    for (i, (dir, theirs)) in ancestors.iter().enumerate() {
        let mut files = own(dir, theirs, tables(dir, theirs, identities)?)?;
        for file in manifest.borrowed.iter().filter(|b| b.ancestor as usize == i) {
            let stock = files.remove(&file.original).ok_or_else(|| {
                Error::damaged(Manifest::FILE, format!("data file {} is nobody's", file.number))
            })?;
            all.insert(file.number, stock);
        }
    }
    Ok(())
}
