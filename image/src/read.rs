//! Reading an image.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::data::Data;
use crate::description::Objects;
use crate::extent::{Extents, RECORD, Record};
use crate::header::{self, Kind};
use crate::manifest::{ImageFile, Manifest};
use crate::parent;
use crate::task::Task;
use crate::write::data_file_name;
use crate::{Error, Result, check};

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
    /// Directories of its ancestors.
    ancestors: Vec<PathBuf>,
    /// Length of every data file, by number.
    sizes: HashMap<u32, u64>,
}

impl Image {
    /// Reads the image in `dir` and checks everything but the contents of data files.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = manifest(dir)?;
        for file in &manifest.files {
            let path = dir.join(&file.name);
            let found = path.symlink_metadata().map_err(Error::file("find", &path))?;
            if !found.is_file() || found.len() != file.size {
                let what = format!("it should have {} bytes and has {}", file.size, found.len());
                return Err(Error::damaged(&file.name, what));
            }
        }
        let named = |name: &str, kind| -> Result<Vec<u8>> {
            let file = manifest
                .files
                .iter()
                .find(|f| f.name == name)
                .ok_or_else(|| Error::damaged(Manifest::FILE, format!("it does not list `{name}`")))?;
            let bytes = read_file(dir, name)?;
            check_sum(name, file.crc32c, crc32c::crc32c(&bytes))?;
            header::decode(name, kind, &bytes).map(<[u8]>::to_vec)
        };
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
        let ancestors = parent::find(dir, &manifest)?.into_iter().map(|(path, _)| path).collect();
        let sizes = sizes(&manifest);
        let image = Image { dir: dir.to_owned(), manifest, tasks, objects, records, ancestors, sizes };
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
        let sizes = sizes(&manifest);
        let image = Image { dir, manifest, tasks, objects, records, ancestors: Vec::new(), sizes };
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
        let (dir, name) = self.place(number);
        Ok(Data::raw(open(dir, &name)?, dir.join(name)))
    }

    /// Where data file `number` lies: in which directory, and its name there.
    fn place(&self, number: u32) -> (&Path, String) {
        let borrowed = self.manifest.borrowed.iter().find(|b| b.number == number);
        match borrowed.and_then(|b| Some((self.ancestors.get(b.ancestor as usize)?, b.original))) {
            Some((dir, original)) => (dir, data_file_name(original)),
            None => (&self.dir, data_file_name(number)),
        }
    }

    /// Length of data file `number`, if there is one.
    pub fn data_size(&self, number: u32) -> Option<u64> {
        self.sizes.get(&number).copied()
    }

    /// Length of all data files, those of ancestors included.
    pub fn data_bytes(&self) -> u64 {
        self.sizes.values().fold(0, |all, size| all.saturating_add(*size))
    }

    /// Numbers of the data files that are this image's own.
    pub fn data_files(&self) -> impl Iterator<Item = (u32, &ImageFile)> {
        self.manifest.files.iter().filter_map(|f| Some((check::data_file_number(&f.name)?, f)))
    }

    /// Reads all data files and compares their checksums; `progress` is told of bytes read.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut buffer = vec![0u8; 1 << 20];
        let own = self.data_files().map(|(number, file)| (number, file.crc32c));
        for (number, expected) in own.chain(self.manifest.borrowed.iter().map(|b| (b.number, b.crc32c))) {
            let (dir, name) = self.place(number);
            let file = open(dir, &name)?;
            let (mut crc, mut at) = (0, 0);
            loop {
                let n = file.read_at(&mut buffer, at).map_err(Error::file("read", dir.join(&name)))?;
                if n == 0 {
                    break;
                }
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                at += n as u64;
                progress(n as u64);
            }
            check_sum(&dir.join(name).display().to_string(), expected, crc)?;
        }
        Ok(())
    }
}

/// The manifest of the image in `dir`, checked by itself.
pub(crate) fn manifest(dir: &Path) -> Result<Manifest> {
    let manifest: Manifest = match read_file(dir, Manifest::FILE) {
        Ok(bytes) => body(Manifest::FILE, Kind::Manifest, &bytes)?,
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NoImage { path: dir.to_owned() });
        }
        Err(e) => return Err(e),
    };
    check::manifest(&manifest)?;
    Ok(manifest)
}

fn sizes(manifest: &Manifest) -> HashMap<u32, u64> {
    let own = manifest.files.iter().filter_map(|f| Some((check::data_file_number(&f.name)?, f.size)));
    own.chain(manifest.borrowed.iter().map(|b| (b.number, b.size))).collect()
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
