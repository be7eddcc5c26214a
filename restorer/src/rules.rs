//! Rules of files with a name: made again, put back, or cut off, before they are opened like any other.
//!
//! Nothing that is there is ever replaced by another file: others may have it open or mapped, and so may what is
//! being restored. Contents are compared first, as a rule they are what they were, and only what differs is written;
//! this is for the time when the processes have been born: until then the ones that were dumped may still run, with
//! the file for their memory. What is cut off cannot be put back, and waits until nothing can fail any more.

use std::fs::{File, FileTimes};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use torpor_image::Bytes;
use torpor_image::extent::{PAGE, Record, Where};
use torpor_image::inode::{Inode, Source};
use torpor_image::rules::Rule;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::inode;
use crate::made::Changed;
use crate::open::Opener;
use crate::pipe::io;

const CHUNK: u64 = 1 << 20;

/// Brings a file to where its rule wants it, once. What is wrong with it otherwise shows when it is opened.
pub(crate) fn apply(opener: &mut Opener<'_>, what: &str, inode: &Inode, path: &Bytes) -> Result<()> {
    if inode.rule == Rule::Keep || !opener.files.settled.insert(inode.id) {
        return Ok(());
    }
    let now = match nix::sys::stat::stat(path.path()) {
        Ok(now) => now,
        Err(Errno::ENOENT) if inode.rule.has_content() => return again(opener, what, inode, path),
        Err(_) => return Ok(()),
    };
    if now.st_mode & libc::S_IFMT != libc::S_IFREG || inode.mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(());
    }
    match inode.rule {
        Rule::Save => {
            opener.files.to_put_back.push((inode.id, what.to_owned()));
            Ok(())
        }
        Rule::Truncate if now.st_size as u64 > inode.size => {
            let file = File::options().write(true).open(path.path()).map_err(|e| denied(what, &e))?;
            opener.files.cut(file, inode.size);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Puts contents back: the processes were born, and none of them runs yet.
pub(crate) fn put_all_back(opener: &mut Opener<'_>) -> Result<()> {
    let image = opener.image;
    for (id, what) in std::mem::take(&mut opener.files.to_put_back) {
        let inode = &image.objects.inodes[id.0 as usize];
        if let Source::Path { path } = &inode.source {
            put_back(opener, &what, inode, path)?;
        }
    }
    Ok(())
}

/// Makes a file or FIFO that is missing.
fn again(opener: &mut Opener<'_>, what: &str, inode: &Inode, path: &Bytes) -> Result<()> {
    let fail = |e: std::io::Error| Error::Conflict {
        what: what.to_owned(),
        why: format!("it is gone and cannot be made again ({e})"),
        remedy: "put its directory back, with room for the file".into(),
    };
    match inode.mode & libc::S_IFMT {
        libc::S_IFIFO => {
            nix::unistd::mkfifo(path.path(), nix::sys::stat::Mode::S_IRUSR).map_err(|e| fail(e.into()))?;
            opener.files.file(path.path().to_owned());
            let mode = nix::sys::stat::Mode::from_bits_truncate(inode.mode & 0o7777);
            let _stays = std::os::unix::fs::lchown(path.path(), Some(inode.uid), Some(inode.gid));
            let follow = nix::sys::stat::FchmodatFlags::FollowSymlink;
            nix::sys::stat::fchmodat(nix::fcntl::AT_FDCWD, path.path(), mode, follow)
                .map_err(Error::open(what, "fchmodat"))
        }
        libc::S_IFREG => {
            let mut options = File::options();
            let file = options.read(true).write(true).create_new(true).mode(0o600);
            let file = file.open(path.path()).map_err(fail)?;
            opener.files.file(path.path().to_owned());
            let fd = OwnedFd::from(file);
            inode::size_and_owner(what, &fd, inode)?;
            inode::fill(opener, what, &fd, inode, inode.saved)?;
            set_time(what, &fd.into(), inode)
        }
        _ => Ok(()),
    }
}

/// Writes what differs from the image.
fn put_back(opener: &mut Opener<'_>, what: &str, inode: &Inode, path: &Bytes) -> Result<()> {
    let fail = |call: &'static str| move |e: std::io::Error| io(what, call, &e);
    let open = |write| {
        let mut options = File::options();
        options.read(true).write(write).custom_flags(libc::O_NONBLOCK);
        options.open(path.path()).map_err(|e| denied(what, &e))
    };
    let file = open(false)?;
    let size = file.metadata().map_err(fail("fstat"))?.len();
    let change = || Ok::<_, Error>(Changed::new(open(true)?, size, memory(what)?));
    let mut changed = None;
    let (mut wanted, mut actual) = (vec![0u8; CHUNK as usize], vec![0u8; CHUNK as usize]);
    if size != inode.size {
        let changed = changed.insert(change()?);
        let mut at = inode.size;
        while at < size {
            let part = &mut actual[..(size - at).min(CHUNK) as usize];
            file.read_exact_at(part, at).map_err(fail("read"))?;
            changed.save(at, part).map_err(fail("write"))?;
            at += part.len() as u64;
        }
        changed.file.set_len(inode.size).map_err(fail("ftruncate"))?;
    }
    let mut at = 0;
    while let Some(from) = next_data(opener.image.records(inode.saved), &file, at).filter(|f| *f < inode.size)
    {
        let length = (inode.size - from).min(CHUNK) as usize;
        let (wanted, actual) = (&mut wanted[..length], &mut actual[..length]);
        saved(opener, inode, from, wanted)?;
        file.read_exact_at(actual, from).map_err(fail("read"))?;
        let pages = wanted.chunks(PAGE as usize).zip(actual.chunks(PAGE as usize)).enumerate();
        // What does not differ may be a hole, and stays one.
        for (n, (wanted, actual)) in pages.filter(|(_, (wanted, actual))| wanted != actual) {
            let changed = match &mut changed {
                Some(changed) => changed,
                none => none.insert(change()?),
            };
            changed.replace(from + n as u64 * PAGE, wanted, actual).map_err(fail("write"))?;
        }
        at = from + length as u64;
    }
    if let Some(changed) = changed {
        set_time(what, &changed.file, inode)?;
        opener.files.change(changed);
    }
    Ok(())
}

/// Where the next bytes lie, in the image or in the file, that may not be zero; all else is holes in both.
fn next_data(records: &[Record], file: &File, at: u64) -> Option<u64> {
    let record = records.iter().find(|r| r.place == Where::Data && r.address + r.length > at);
    // SAFETY: lseek takes numbers only.
    let data = unsafe { libc::lseek(file.as_raw_fd(), at as i64, libc::SEEK_DATA) };
    let data = match Errno::result(data) {
        Ok(data) => Some(data as u64),
        Err(Errno::ENXIO) => None,
        // A file system without this notion: all of it is data.
        Err(_) => Some(at),
    };
    [record.map(|r| r.address.max(at)), data].into_iter().flatten().min()
}

/// What the image has of a file from `from` on.
fn saved(opener: &Opener<'_>, inode: &Inode, from: u64, into: &mut [u8]) -> Result<()> {
    into.fill(0);
    let end = from + into.len() as u64;
    let records = opener.image.records(inode.saved).iter().filter(|r| r.place == Where::Data);
    for record in records.filter(|r| r.address < end && r.address + r.length > from) {
        let (first, last) = (record.address.max(from), (record.address + record.length).min(end));
        let part = &mut into[(first - from) as usize..(last - from) as usize];
        let data = opener.image.data(record.file)?;
        data.read_exact_at(part, record.offset + (first - record.address))?;
        if let Some(progress) = opener.progress {
            progress(part.len() as u64);
        }
    }
    Ok(())
}

fn set_time(what: &str, file: &File, inode: &Inode) -> Result<()> {
    let since = Duration::from_nanos(inode.modified.unsigned_abs());
    let time =
        if inode.modified < 0 { SystemTime::UNIX_EPOCH - since } else { SystemTime::UNIX_EPOCH + since };
    file.set_times(FileTimes::new().set_modified(time)).map_err(|e| io(what, "futimens", &e))
}

/// Memory for what is overwritten.
fn memory(what: &str) -> Result<File> {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"torpor-undo".as_ptr(), libc::MFD_CLOEXEC) };
    Ok(owned(what, "memfd_create", fd)?.into())
}

fn denied(what: &str, error: &std::io::Error) -> Error {
    match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
        errno @ (Errno::EACCES | Errno::EPERM) => Error::Permission {
            what: what.to_owned(),
            call: "open",
            errno,
            remedy: "run torpor as a user who may read and write it",
        },
        Errno::ETXTBSY => Error::Conflict {
            what: what.to_owned(),
            why: "it is not what it was, and cannot be put back while it is executed".into(),
            remedy: "end the processes that run it".into(),
        },
        errno => Error::Open { what: what.to_owned(), call: "open", errno },
    }
}
