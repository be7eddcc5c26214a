//! Writing an image.
//!
//! All files are made in a hidden directory inside the image's, and moved up when they are complete, the
//! manifest last. A dump that died leaves nothing that looks like an image; what it does leave is removed
//! by the next dump into the same directory, which can tell by the lock that nobody holds any more.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::chunk::{self, Chunk};
use crate::data::Stored;
use crate::description::Objects;
use crate::encode::{Counted, Encoding, Place};
use crate::extent::{Extents, RECORD, Record, Where};
use crate::header::{self, Kind};
use crate::keys;
use crate::manifest::{ImageFile, Manifest};
use crate::parent::{self, Borrowing};
use crate::read::Image;
use crate::stream::{Output, Stream};
use crate::task::Task;
use crate::{Error, Result, check};

pub use crate::data_file::DataFile;

const PARTIAL: &str = ".torpor-partial-";

/// An image being written. Dropped before [`ImageWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct ImageWriter {
    dir: PathBuf,
    made_dir: bool,
    partial: PathBuf,
    lock: Option<File>,
    /// Keeps other dumps out of `dir`.
    alone: Option<File>,
    files: Vec<ImageFile>,
    chunks: Vec<Chunk>,
    index: Vec<u8>,
    fsync: bool,
    borrowing: Option<Borrowing>,
    encoding: Encoding,
    /// Instead of the directory.
    stream: Option<Arc<Stream>>,
}

impl ImageWriter {
    /// Prepares `dir`, which is made if missing and refused if it holds an image. With `fsync` everything
    /// is on stable storage before [`ImageWriter::finish`] returns.
    pub fn create(dir: &Path, fsync: bool) -> Result<Self> {
        let mut builder = DirBuilder::new();
        let made_dir = match builder.mode(0o700).create(dir) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::file("make directory", dir)(e)),
        };
        let result = Self::prepare(dir, made_dir, fsync);
        // One that another dump has by now is that one's.
        if result.as_ref().is_err_and(|e| !matches!(e, Error::Busy { .. })) && made_dir {
            let _best_effort = fs::remove_dir(dir);
        }
        result
    }

    /// An image that goes to a stream instead.
    pub fn to_stream(out: Box<dyn Output>) -> Self {
        ImageWriter {
            dir: PathBuf::new(),
            made_dir: false,
            partial: PathBuf::new(),
            lock: None,
            alone: None,
            files: Vec::new(),
            chunks: Vec::new(),
            index: Vec::new(),
            fsync: false,
            borrowing: None,
            encoding: Encoding::default(),
            stream: Some(Arc::new(Stream::new(out))),
        }
    }

    /// How its files are written from now on.
    pub fn encode(mut self, encoding: Encoding) -> Self {
        self.encoding = encoding;
        self
    }

    fn prepare(dir: &Path, made_dir: bool, fsync: bool) -> Result<Self> {
        let alone = alone_in(dir)?;
        if manifests(dir).iter().any(|path| path.symlink_metadata().is_ok()) {
            return Err(Error::Occupied { path: dir.to_owned() });
        }
        remove_abandoned(dir)?;
        let partial = dir.join(format!("{PARTIAL}{}-{:x}", std::process::id(), unique()));
        DirBuilder::new().mode(0o700).create(&partial).map_err(Error::file("make directory", &partial))?;
        let mut writer = ImageWriter {
            dir: dir.to_owned(),
            made_dir,
            partial,
            lock: None,
            alone,
            files: Vec::new(),
            chunks: Vec::new(),
            index: Vec::new(),
            fsync,
            borrowing: None,
            encoding: Encoding::default(),
            stream: None,
        };
        let lock = File::open(&writer.partial).map_err(Error::file("open", &writer.partial))?;
        // A failure only means that another dump could take this one for abandoned.
        let _locked = lock.try_lock();
        writer.lock = Some(lock);
        Ok(writer)
    }

    /// Opens data file number `number` for appending. Several may be written at once, each by one thread.
    pub fn data_file(&self, number: u32) -> Result<DataFile> {
        DataFile::create(number, &self.partial, self.stream.as_ref(), &self.encoding)
    }

    /// Takes a complete data file into the image; an empty one is dropped.
    pub fn add_data_file(&mut self, data: DataFile) -> Result<()> {
        if let Some((file, chunks)) = data.finish(self.fsync)? {
            self.files.push(file);
            self.chunks.extend(chunks);
        }
        Ok(())
    }

    /// Lets records name the data files of `parent`, as numbers from `first` on.
    pub fn build_on(&mut self, parent: &Image, first: u32) -> Result<&Borrowing> {
        Ok(self.borrowing.insert(Borrowing::of(parent, &self.dir, first)?))
    }

    /// Lets records name the data files of `parent` by the numbers they have there; those that are named become files of
    /// this image as well.
    pub fn link(&mut self, parent: &Image) -> &Borrowing {
        self.borrowing.insert(Borrowing::linked(parent))
    }

    /// Adds records, sorted by address, to the index.
    pub fn add_records(&mut self, records: &[Record]) -> Extents {
        let first = (self.index.len() / crate::extent::RECORD) as u64;
        for record in records {
            self.index.extend_from_slice(&record.encode());
        }
        Extents { first, count: records.len() as u64 }
    }

    /// Adds a process.
    pub fn add_task(&mut self, task: &Task) -> Result<()> {
        self.add_body(&Task::file(task.pid), Kind::Task, &encode("a task", task)?)
    }

    /// Adds the shared objects.
    pub fn add_objects(&mut self, objects: &Objects) -> Result<()> {
        self.add_body("objects.tpr", Kind::Objects, &encode("the objects", objects)?)
    }

    /// Completes the image: index and manifest are written and everything gets its name.
    pub fn finish(mut self, mut manifest: Manifest) -> Result<Manifest> {
        let index = std::mem::take(&mut self.index);
        self.add_body("pages.idx", Kind::Index, &index)?;
        if manifest.id.is_empty() {
            manifest.id = parent::new_id();
        }
        if let Some(mut borrowing) = self.borrowing.take() {
            let used = used(&index);
            for link in borrowing.take_links(|number| used.contains(&number)) {
                link.make(&self.partial.join(&link.file.name))?;
                self.files.push(link.file);
                self.chunks.extend(link.chunks);
            }
            borrowing.note(&mut manifest, |number| used.contains(&number));
        }
        let mut chunks = std::mem::take(&mut self.chunks);
        let (mut files, sent) = self.stream.as_ref().map(|s| s.noted()).unwrap_or_default();
        chunks.extend(sent);
        if !self.encoding.is_raw() || !chunks.is_empty() {
            let body: Vec<u8> = chunks.iter().flat_map(Chunk::encode).collect();
            self.add_body(chunk::FILE, Kind::Chunks, &body)?;
        }
        files.append(&mut self.files);
        manifest.files = files;
        let body = encode("the manifest", &manifest)?;
        let chunked = manifest.files.iter().any(|f| f.name.starts_with(chunk::FILE));
        let plain = manifest.borrowed.is_empty() && !chunked;
        let version = if plain { header::PLAIN } else { header::NEWEST };
        let name = self.write_as(Manifest::FILE, Kind::Manifest, &body, version)?.name;
        if let Some(stream) = &self.stream {
            stream.finish()?;
            return Ok(manifest);
        }
        let names = || manifest.files.iter().map(|f| f.name.as_str()).chain([name.as_str()]);
        for (done, name) in names().enumerate() {
            let to = self.dir.join(name);
            if let Err(e) = fs::rename(self.partial.join(name), &to) {
                for name in names().take(done) {
                    let _best_effort = fs::remove_file(self.dir.join(name));
                }
                return Err(Error::file("rename", &to)(e));
            }
        }
        if self.fsync {
            let dir = File::open(&self.dir).map_err(Error::file("open", &self.dir))?;
            dir.sync_all().map_err(Error::file("fsync", &self.dir))?;
        }
        self.made_dir = false;
        drop(self.alone.take());
        Ok(manifest)
    }

    fn add_body(&mut self, name: &str, kind: Kind, body: &[u8]) -> Result<()> {
        let file = self.write(name, kind, body)?;
        self.files.push(file);
        Ok(())
    }

    fn write(&self, name: &str, kind: Kind, body: &[u8]) -> Result<ImageFile> {
        self.write_as(name, kind, body, header::PLAIN)
    }

    fn write_as(&self, name: &str, kind: Kind, body: &[u8], version: (u16, u16)) -> Result<ImageFile> {
        let mut content = Vec::with_capacity(header::LEN + body.len());
        content.extend_from_slice(&header::encode(kind, body, version));
        content.extend_from_slice(body);
        let mut name = name.to_owned();
        if let Some(recipients) = &self.encoding.recipients {
            content = recipients.encrypt_all(&content).map_err(Error::file("encrypt", &name))?;
            name.push_str(keys::SUFFIX);
        }
        let file = ImageFile { size: content.len() as u64, crc32c: crc32c::crc32c(&content), name };
        if let Some(stream) = &self.stream {
            stream.send(&file.name, &content)?;
            return Ok(file);
        }
        let path = self.partial.join(&file.name);
        let mut to = Counted::new(Place::File(create(&path)?));
        io::Write::write_all(&mut to, &content).map_err(Error::file("write", &path))?;
        to.sync(self.fsync).map_err(Error::file("fsync", &path))?;
        Ok(file)
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if self.stream.is_some() {
            return;
        }
        let _best_effort = fs::remove_dir_all(&self.partial);
        if self.made_dir {
            let _best_effort = fs::remove_dir(&self.dir);
        }
    }
}

/// A new file of an image.
pub(crate) fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(Error::file("create", path))
}

/// The names that a manifest in `dir` may have.
fn manifests(dir: &Path) -> [PathBuf; 2] {
    [dir.join(Manifest::FILE), dir.join(format!("{}{}", Manifest::FILE, keys::SUFFIX))]
}

/// Name of data file `number`.
pub fn data_file_name(number: u32, stored: Stored) -> String {
    let compression = stored.compression.map_or("", |c| c.suffix());
    let encrypted = if stored.encrypted { keys::SUFFIX } else { "" };
    format!("pages-{number}.dat{compression}{encrypted}")
}

fn encode<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(value).map_err(|e| Error::Encode { what, why: e.to_string() })
}

/// Keeps other dumps out of `dir` as long as what it gives is open; where a file system has no locks, nothing does.
fn alone_in(dir: &Path) -> Result<Option<File>> {
    // Only a directory: to open anything else may block.
    drop(fs::read_dir(dir).map_err(Error::file("list", dir))?);
    let file = File::open(dir).map_err(Error::file("list", dir))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::Busy { path: dir.to_owned() }),
        locked => Ok(locked.is_ok().then_some(file)),
    }
}

/// Whether this is the name of a file of an image, which must not be overwritten: an image without its manifest may be
/// all that is left of a process.
fn is_of_image(name: &str) -> bool {
    let inner = name.strip_suffix(keys::SUFFIX).unwrap_or(name);
    inner == "pages.idx"
        || inner == chunk::FILE
        || inner.ends_with(".tpr")
        || check::data_file(name).is_some()
}

/// Removes what dumps that died have left in `dir`.
fn remove_abandoned(dir: &Path) -> Result<()> {
    let (mut abandoned, mut of_image) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir).map_err(Error::file("list", dir))? {
        let entry = entry.map_err(Error::file("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_of_image(&name) {
            of_image.push(name);
        } else if name.starts_with(PARTIAL)
            && let Ok(lock) = File::open(entry.path())
            && lock.try_lock().is_ok()
        {
            abandoned.push(entry.path());
        }
    }
    // Its manifest is written when all else is, and moved up last: one that still has it was moving the others.
    let moving = abandoned.iter().any(|partial| manifests(partial).iter().any(|m| m.exists()));
    if let (Some(name), false) = (of_image.first(), moving) {
        return Err(Error::Remains { path: dir.to_owned(), name: name.clone() });
    }
    for name in of_image {
        let path = dir.join(name);
        fs::remove_file(&path).map_err(Error::file("remove", &path))?;
    }
    for partial in abandoned {
        fs::remove_dir_all(&partial).map_err(Error::file("remove", &partial))?;
    }
    Ok(())
}

/// Numbers of the data files that an index names.
fn used(index: &[u8]) -> BTreeSet<u32> {
    let records = index.as_chunks::<RECORD>().0.iter().filter_map(Record::decode);
    records.filter(|r| r.place == Where::Data).map(|r| r.file).collect()
}

/// A number that two dumps of one process into one directory do not share.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest { root: crate::Pid(1), ..Manifest::default() }
    }

    #[test]
    fn a_directory_is_for_one_image() {
        let dir = std::env::temp_dir().join(format!("torpor-write-{}", std::process::id()));
        let first = ImageWriter::create(&dir, false).unwrap();
        assert!(matches!(ImageWriter::create(&dir, false), Err(Error::Busy { .. })));
        drop(first);
        assert!(!dir.exists(), "it left a directory");
        fs::create_dir(&dir).unwrap();
        for name in ["pages-0.dat", "pages.idx", "task-7.tpr"] {
            fs::write(dir.join(name), "all that is left").unwrap();
            assert!(matches!(ImageWriter::create(&dir, false), Err(Error::Remains { .. })), "{name}");
            fs::remove_file(dir.join(name)).unwrap();
        }
        fs::write(dir.join("pages-x.dat"), "mine").unwrap();
        ImageWriter::create(&dir, false).unwrap().finish(manifest()).unwrap();
        assert!(matches!(ImageWriter::create(&dir, false), Err(Error::Occupied { .. })));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_was_killed_between_its_files_goes() {
        let dir = std::env::temp_dir().join(format!("torpor-killed-{}", std::process::id()));
        let partial = dir.join(format!("{PARTIAL}1-0"));
        fs::create_dir_all(&partial).unwrap();
        fs::write(dir.join("pages-0.dat"), "moved").unwrap();
        fs::write(partial.join("pages.idx"), "not yet").unwrap();
        assert!(
            matches!(ImageWriter::create(&dir, false), Err(Error::Remains { .. })),
            "whose it is nobody knows"
        );
        fs::write(partial.join(Manifest::FILE), "last").unwrap();
        ImageWriter::create(&dir, false).unwrap().finish(manifest()).unwrap();
        assert!(!dir.join("pages-0.dat").exists() && !partial.exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let dir = std::env::temp_dir().join(format!("torpor-rename-{}", std::process::id()));
        let writer = ImageWriter::create(&dir, false).unwrap();
        // A directory cannot be replaced by a file.
        fs::create_dir(dir.join(Manifest::FILE)).unwrap();
        assert!(writer.finish(manifest()).is_err());
        fs::remove_dir(dir.join(Manifest::FILE)).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        fs::remove_dir(&dir).unwrap();
    }
}
