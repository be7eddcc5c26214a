//! Reading an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::de::DeserializeOwned;

use crate::data::{Data, Readers};
use crate::description::Objects;
use crate::extent::{Extents, RECORD, Record, Where};
use crate::header::{self, Kind};
use crate::keys::{self, Identities};
use crate::manifest::{ImageFile, Manifest};
use crate::stock::{self, Stock};
use crate::task::Task;
use crate::{Error, Result, check, parent};

/// No body is ever this large: metadata is kilobytes, an index 32 bytes for each run of pages.
const MAX_BODY: u64 = 1 << 30;
const O_NOFOLLOW: i32 = libc_o_nofollow();
/// `O_NONBLOCK` of all architectures of Linux that Torpor knows (asm-generic/fcntl.h).
const O_NONBLOCK: i32 = 0o4000;

/// An image that was read and whose cross references hold. Contents of data files are not read yet.
#[derive(Debug)]
pub struct Image {
    /// Where it lies.
    pub dir: PathBuf,
    /// The manifest.
    pub manifest: Manifest,
    /// Processes, the root first.
    pub tasks: Vec<Task>,
    /// Shared objects.
    pub objects: Objects,
    records: Vec<Record>,
    /// Its data files, those of ancestors included, by number.
    files: BTreeMap<u32, Stock>,
    identities: Identities,
    /// Encoded data files that were opened.
    open: Mutex<BTreeMap<u32, Data>>,
    readers: Readers,
}

impl Image {
    /// Reads the image in `dir` and checks everything but the contents of data files.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, &Identities::default())
    }

    /// The same; an encrypted one with the key it was encrypted for.
    pub fn open_with(dir: &Path, identities: &Identities) -> Result<Self> {
        let manifest = manifest(dir, identities)?;
        for file in &manifest.files {
            let path = dir.join(&file.name);
            let found = path.symlink_metadata().map_err(Error::file("find", &path))?;
            if !found.is_file() || found.len() != file.size {
                let what = format!("it should have {} bytes and has {}", file.size, found.len());
                return Err(Error::damaged(&file.name, what));
            }
        }
        let named = |name: &str, kind| member(dir, &manifest, identities, name, kind);
        let objects = decode("objects.tpr", &named("objects.tpr", Kind::Objects)?)?;
        let tasks = manifest
            .tasks
            .iter()
            .map(|&pid| {
                let name = Task::file(pid);
                decode(&name, &named(&name, Kind::Task)?)
            })
            .collect::<Result<Vec<Task>>>()?;
        let index = named("pages.idx", Kind::Index)?;
        let (chunks, rest) = index.as_chunks::<RECORD>();
        if !rest.is_empty() {
            return Err(Error::damaged("pages.idx", "its last record is cut off"));
        }
        let records = chunks
            .iter()
            .map(|c| Record::decode(c).ok_or_else(|| Error::damaged("pages.idx", "unknown kind of record")))
            .collect::<Result<Vec<_>>>()?;
        let mut files = stock::own(dir, &manifest, stock::tables(dir, &manifest, identities)?)?;
        let ancestors = parent::find(dir, &manifest, identities)?;
        stock::borrow(&mut files, &manifest, &ancestors, identities)?;
        let (dir, identities) = (dir.to_owned(), identities.clone());
        let (open, readers) = Default::default();
        let image = Image { dir, manifest, tasks, objects, records, files, identities, open, readers };
        check::references(&image)?;
        Ok(image)
    }

    /// Makes an image of parts, for tests and tools; its references are checked.
    pub fn from_parts(
        dir: PathBuf,
        manifest: Manifest,
        tasks: Vec<Task>,
        objects: Objects,
        records: Vec<Record>,
    ) -> Result<Self> {
        let files = stock::own(&dir, &manifest, BTreeMap::new())?;
        let (identities, open, readers) = Default::default();
        let image = Image { dir, manifest, tasks, objects, records, files, identities, open, readers };
        check::references(&image)?;
        Ok(image)
    }

    /// All records of the index.
    pub fn all_records(&self) -> &[Record] {
        &self.records
    }

    /// The records of a range that [`check::references`] found valid.
    pub fn records(&self, extents: Extents) -> &[Record] {
        &self.records[extents.first as usize..(extents.first + extents.count) as usize]
    }

    /// Opens data file `number`.
    pub fn data(&self, number: u32) -> Result<Data> {
        let stock = self
            .files
            .get(&number)
            .ok_or_else(|| Error::damaged(Manifest::FILE, format!("it has no data file {number}")))?;
        let path = stock.dir.join(&stock.name);
        if stock.stored.is_raw() {
            return Ok(Data::raw(open(&stock.dir, &stock.name)?, path));
        }
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(data) = all.get(&number) {
            return Ok(data.clone());
        }
        let (file, table) = (open(&stock.dir, &stock.name)?, stock.table.clone());
        let (identities, readers) = (self.identities.clone(), self.readers.clone());
        let data = Data::chunked(file, path, (number, stock.stored), table, identities, readers)?;
        all.insert(number, data.clone());
        Ok(data)
    }

    /// Whether whoever has data file `number` open can read its contents ([`Data::as_file`]).
    pub fn is_raw(&self, number: u32) -> bool {
        self.files.get(&number).is_none_or(|stock| stock.stored.is_raw())
    }

    /// Length of the contents of data file `number`, if there is one.
    pub fn data_size(&self, number: u32) -> Option<u64> {
        self.files.get(&number).map(|stock| stock.size)
    }

    /// All data files with their numbers.
    pub(crate) fn stock(&self) -> impl Iterator<Item = (u32, &Stock)> {
        self.files.iter().map(|(number, stock)| (*number, stock))
    }

    /// Whether its files are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.manifest.files.iter().any(|f| f.name.ends_with(keys::SUFFIX))
    }

    /// A number that none of its data files has, nor any after it.
    pub fn next_data_file(&self) -> u32 {
        self.files.keys().next_back().map_or(0, |last| last + 1)
    }

    /// Bytes that the records of the image name, by data file.
    pub fn used_bytes(&self) -> BTreeMap<u32, u64> {
        let mut all = BTreeMap::new();
        for record in self.records.iter().filter(|r| r.place == Where::Data) {
            *all.entry(record.file).or_default() += record.length;
        }
        all
    }

    /// Length of all data files as they are stored, those of ancestors included.
    pub fn data_bytes(&self) -> u64 {
        self.files.values().fold(0, |all, stock| all.saturating_add(stock.length))
    }

    /// Numbers of the data files that are this image's own.
    pub fn data_files(&self) -> impl Iterator<Item = (u32, &ImageFile)> {
        stock::data_files(&self.manifest).map(|(number, file, _)| (number, file))
    }

    /// Reads all data files and compares their checksums; `progress` is told of bytes read.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut buffer = vec![0u8; 1 << 20];
        for (number, stock) in &self.files {
            let path = stock.dir.join(&stock.name);
            let file = open(&stock.dir, &stock.name)?;
            let (mut crc, mut at) = (0, 0);
            loop {
                let n = file.read_at(&mut buffer, at).map_err(Error::file("read", &path))?;
                if n == 0 {
                    break;
                }
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                at += n as u64;
                progress(n as u64);
            }
            check_sum(&path.display().to_string(), stock.crc32c, crc)?;
            if !stock.stored.is_raw() {
                self.data(*number)?.check()?;
            }
        }
        Ok(())
    }
}

/// The manifest of the image in `dir`, checked by itself.
pub(crate) fn manifest(dir: &Path, identities: &Identities) -> Result<Manifest> {
    let missing =
        |e: &Error| matches!(e, Error::File { source, .. } if source.kind() == io::ErrorKind::NotFound);
    let sealed = format!("{}{}", Manifest::FILE, keys::SUFFIX);
    let manifest: Manifest = match read_file(dir, Manifest::FILE) {
        Ok(bytes) => body(Manifest::FILE, Kind::Manifest, &bytes)?,
        Err(e) if missing(&e) => match read_file(dir, &sealed) {
            Ok(bytes) => body(&sealed, Kind::Manifest, &identities.decrypt_all(&sealed, &bytes, MAX_BODY)?)?,
            Err(e) if missing(&e) => return Err(Error::NoImage { path: dir.to_owned() }),
            Err(e) => return Err(e),
        },
        Err(e) => return Err(e),
    };
    check::manifest(&manifest)?;
    Ok(manifest)
}

/// The body of a file of the image in `dir`.
pub(crate) fn member(
    dir: &Path,
    manifest: &Manifest,
    identities: &Identities,
    name: &str,
    kind: Kind,
) -> Result<Vec<u8>> {
    let file = manifest
        .files
        .iter()
        .find(|f| f.name.strip_suffix(keys::SUFFIX).unwrap_or(&f.name) == name)
        .ok_or_else(|| Error::damaged(Manifest::FILE, format!("it does not list `{name}`")))?;
    let mut bytes = read_file(dir, &file.name)?;
    check_sum(&file.name, file.crc32c, crc32c::crc32c(&bytes))?;
    if file.name != name {
        bytes = identities.decrypt_all(&file.name, &bytes, MAX_BODY)?;
    }
    header::decode(&file.name, kind, &bytes).map(<[u8]>::to_vec)
}

fn check_sum(name: &str, expected: u32, crc: u32) -> Result<()> {
    if crc != expected {
        return Err(Error::damaged(name, "its content does not match the checksum in the manifest"));
    }
    Ok(())
}

fn open(dir: &Path, name: &str) -> Result<File> {
    let path = dir.join(name);
    // An image may be hostile: a link in it must not make a privileged reader open something else, nor a FIFO
    // make it wait.
    File::options()
        .read(true)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK)
        .open(&path)
        .map_err(Error::file("open", path))
}

fn read_file(dir: &Path, name: &str) -> Result<Vec<u8>> {
    let mut file = open(dir, name)?;
    let size = file.metadata().map_err(Error::file("stat", dir.join(name)))?.len();
    if size > MAX_BODY {
        return Err(Error::damaged(name, format!("{size} bytes are more than any such file has")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.by_ref().take(MAX_BODY).read_to_end(&mut bytes).map_err(Error::file("read", dir.join(name)))?;
    Ok(bytes)
}

fn body<T: DeserializeOwned>(name: &str, kind: Kind, bytes: &[u8]) -> Result<T> {
    decode(name, header::decode(name, kind, bytes)?)
}

fn decode<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T> {
    rmp_serde::from_slice(body).map_err(|e| Error::damaged(name, format!("it cannot be decoded: {e}")))
}

/// `O_NOFOLLOW` of this architecture (asm/fcntl.h); std has no name for it.
const fn libc_o_nofollow() -> i32 {
    if cfg!(target_arch = "aarch64") { 0o100000 } else { 0o400000 }
}
