//! Files: found again by their path and compared with what they were, or made again from the image.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use torpor_image::extent::{Extents, Where};
use torpor_image::inode::{Inode, Source};
use torpor_image::rules::Rule;
use torpor_image::{Bytes, InodeId};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;
use crate::pipe::{io, reopen};
use crate::rules;

/// Seals that do not stand in the way of filling and mapping; the others are set last.
const F_SEAL_SEAL: u32 = 1;
/// linux/memfd.h
const MFD_NOEXEC_SEAL: u32 = 8;

/// A descriptor for an inode, with open flags of its own.
pub(crate) fn open(opener: &mut Opener<'_>, what: &str, id: InodeId, flags: u32) -> Result<OwnedFd> {
    let image = opener.image;
    let inode = &image.objects.inodes[id.0 as usize];
    let content = match &inode.source {
        Source::Path { path } => {
            rules::apply(opener, what, inode, path)?;
            return by_path(opener, what, inode, path, flags);
        }
        // Never opened here: by the task itself.
        Source::Process { .. } => return Err(Error::open(what, "open")(Errno::ESRCH)),
        // Never opened: mapped by the task itself.
        Source::SharedMemory { content }
        | Source::SysV { content, .. }
        | Source::Deleted { content, .. }
        | Source::Memfd { content, .. } => *content,
    };
    if !opener.inodes.contains_key(&id) {
        let made = make(opener, what, inode)?;
        fill(opener, what, &made, inode, content)?;
        // Kept open for reading only: a program file must not be open for writing. Seals want it to be.
        let kept = match inode.source {
            Source::Deleted { .. } => reopen(what, &made, libc::O_RDONLY as u32)?,
            _ => made,
        };
        opener.inodes.insert(id, kept);
    }
    reopen(what, &opener.inodes[&id], flags)
}

/// Opens a program file, which the kernel takes as such only if it may be executed (kernel/sys.c,
/// `validate_prctl_map_addr` and `prctl_set_mm_exe_file`).
pub(crate) fn program(opener: &mut Opener<'_>, what: &str, id: InodeId) -> Result<OwnedFd> {
    let fd = open(opener, what, id, libc::O_RDONLY as u32)?;
    let now = nix::sys::stat::fstat(&fd).map_err(Error::open(what, "fstat"))?;
    if now.st_mode & 0o111 == 0 {
        return Err(Error::Conflict {
            what: what.to_owned(),
            why: "it may not be executed any more".into(),
            remedy: "give it the permission again (`chmod +x`)".into(),
        });
    }
    Ok(fd)
}

fn by_path(opener: &Opener<'_>, what: &str, inode: &Inode, path: &Bytes, flags: u32) -> Result<OwnedFd> {
    let conflict =
        |why: String, remedy: &str| Error::Conflict { what: what.to_owned(), why, remedy: remedy.to_owned() };
    let name = CString::new(path.0.clone())
        .map_err(|_nul| conflict("its path has a zero byte in it".into(), "the image is damaged"))?;
    let now = nix::sys::stat::stat(path.path())
        .map_err(|errno| conflict(format!("`{path}` is gone ({errno})"), "put the file back where it was"))?;
    if now.st_mode & libc::S_IFMT != inode.mode & libc::S_IFMT {
        return Err(conflict(format!("`{path}` is a file of another type now"), "put the file back"));
    }
    let regular = now.st_mode & libc::S_IFMT == libc::S_IFREG;
    let size = now.st_size as u64;
    // Those are put right later.
    let settled = inode.rule == Rule::Save || inode.rule == Rule::Truncate && size > inode.size;
    if regular && !opener.accept_changed && size != inode.size && !settled {
        return Err(conflict(
            format!("`{path}` had {} bytes at the dump and has {} now", inode.size, now.st_size),
            "put the old file back, or accept the new one with --accept-changed",
        ));
    }
    if regular && !opener.accept_changed && inode.rule != Rule::Save && is_code(opener, inode.id) {
        let modified = now.st_mtime * 1_000_000_000 + now.st_mtime_nsec;
        if modified != inode.modified {
            return Err(conflict(
                format!(
                    "`{path}`, which the program runs code or keeps pages of, was modified since the dump"
                ),
                "put the old file back, or accept the new one with --accept-changed",
            ));
        }
    }
    let flags =
        flags as i32 & !(libc::O_ASYNC | libc::O_NOFOLLOW | libc::O_CREAT | libc::O_TRUNC | libc::O_EXCL);
    // Nothing here may wait for another process; the flag is set right afterwards.
    let wait = if regular || flags & libc::O_PATH != 0 { 0 } else { libc::O_NONBLOCK };
    // SAFETY: the path ends with a zero.
    let fd = unsafe { libc::open(name.as_ptr(), flags | wait | libc::O_CLOEXEC | libc::O_NOCTTY) };
    if fd < 0 {
        return Err(match Errno::last() {
            errno @ (Errno::EACCES | Errno::EPERM) => Error::Permission {
                what: what.to_owned(),
                call: "open",
                errno,
                remedy: "run torpor as a user who may open it",
            },
            errno => Error::Open { what: what.to_owned(), call: "open", errno },
        });
    }
    owned(what, "open", fd)
}

/// Whether pages of the file are part of a private mapping: then its contents must be what they were.
fn is_code(opener: &Opener<'_>, id: InodeId) -> bool {
    use torpor_image::vma::Mapping;
    let vmas = opener.image.tasks.iter().flat_map(|t| &t.memory.vmas);
    vmas.into_iter().any(|v| matches!(v.mapping, Mapping::Private { inode, .. } if inode == id))
}

/// Makes a file without a name again.
fn make(opener: &mut Opener<'_>, what: &str, inode: &Inode) -> Result<OwnedFd> {
    let fd = match &inode.source {
        Source::Memfd { name, seals, .. } => memfd(opener, what, inode.id, name, *seals)?,
        Source::Deleted { path, .. } => deleted(what, path, inode)?,
        Source::Path { .. } | Source::Process { .. } | Source::SharedMemory { .. } | Source::SysV { .. } => {
            return Err(Error::Open { what: what.to_owned(), call: "open", errno: Errno::EINVAL });
        }
    };
    size_and_owner(what, &fd, inode)?;
    Ok(fd)
}

/// Gives a file that was made size, owner and mode.
pub(crate) fn size_and_owner(what: &str, fd: &OwnedFd, inode: &Inode) -> Result<()> {
    nix::unistd::ftruncate(fd, inode.size as i64).map_err(Error::open(what, "ftruncate"))?;
    // SAFETY: fchown and fchmod take numbers only. A file that the user may not give away stays his.
    unsafe {
        libc::fchown(fd.as_raw_fd(), inode.uid, inode.gid);
        if libc::fchmod(fd.as_raw_fd(), inode.mode & 0o7777) != 0 {
            return Err(Error::last(what, "fchmod"));
        }
    }
    Ok(())
}

fn memfd(opener: &mut Opener<'_>, what: &str, id: InodeId, name: &Bytes, seals: u32) -> Result<OwnedFd> {
    let name = CString::new(name.0.clone()).map_err(|_nul| Error::Open {
        what: what.to_owned(),
        call: "memfd_create",
        errno: Errno::EINVAL,
    })?;
    let mut flags = libc::MFD_CLOEXEC;
    // A memfd that was made without the flag has this seal and no other.
    if seals != F_SEAL_SEAL {
        flags |= libc::MFD_ALLOW_SEALING;
    }
    let exec_sealed = seals & libc::F_SEAL_EXEC as u32 != 0;
    if exec_sealed {
        flags |= MFD_NOEXEC_SEAL;
    }
    // SAFETY: the name ends with a zero.
    let fd = owned(what, "memfd_create", unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    if seals != F_SEAL_SEAL && seals != 0 {
        opener.seals.insert(id, seals);
    }
    Ok(fd)
}

/// A file of the old name that is removed at once; where that name is taken by now, one that never had
/// any.
fn deleted(what: &str, path: &Bytes, inode: &Inode) -> Result<OwnedFd> {
    let path = path.path();
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mode = 0o600;
    let fail = |errno: Errno| Error::Conflict {
        what: what.to_owned(),
        why: format!("no file can be made in `{}` ({errno})", dir.display()),
        remedy: "put that directory back, with room for the file".into(),
    };
    let c_path = |p: &Path| CString::new(p.as_os_str().as_bytes()).map_err(|_nul| fail(Errno::EINVAL));
    let name = c_path(path)?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    // SAFETY: the path ends with a zero.
    let fd = unsafe { libc::open(name.as_ptr(), flags, mode) };
    if fd >= 0 {
        // SAFETY: as above. The file is ours, made a moment ago.
        unsafe { libc::unlink(name.as_ptr()) };
        return owned(what, "open", fd);
    }
    let errno = Errno::last();
    if errno != Errno::EEXIST {
        return Err(fail(errno));
    }
    let dir_name = c_path(dir)?;
    // SAFETY: as above.
    let fd = unsafe { libc::open(dir_name.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, mode) };
    if fd >= 0 {
        return owned(what, "open", fd);
    }
    // File systems without O_TMPFILE: a name nobody uses.
    let unused = dir.join(format!(".torpor-{}-{}", std::process::id(), inode.id));
    let name = c_path(&unused)?;
    // SAFETY: as above.
    let fd = unsafe { libc::open(name.as_ptr(), flags, mode) };
    if fd < 0 {
        return Err(fail(Errno::last()));
    }
    // SAFETY: as above.
    unsafe { libc::unlink(name.as_ptr()) };
    owned(what, "open", fd)
}

/// Writes the contents the image has.
pub(crate) fn fill(
    opener: &Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    inode: &Inode,
    content: Extents,
) -> Result<()> {
    let to = File::from(fd.try_clone().map_err(|e| io(what, "dup", &e))?);
    let mut buffer = vec![0u8; 1 << 20];
    for record in opener.image.records(content).iter().filter(|r| r.place == Where::Data) {
        let from = opener.image.data(record.file)?;
        // The last page is whole in the image and may be less in the file.
        let length = record.length.min(inode.size.saturating_sub(record.address));
        let mut done = 0;
        while done < length {
            opener.wanted()?;
            let part = &mut buffer[..(length - done).min(1 << 20) as usize];
            from.read_exact_at(part, record.offset + done)?;
            to.write_all_at(part, record.address + done).map_err(|e| io(what, "write", &e))?;
            done += part.len() as u64;
            if let Some(progress) = opener.progress {
                progress(part.len() as u64);
            }
        }
    }
    Ok(())
}

/// Sets the seals of memfds: after all mappings were made, since a seal against writing refuses them.
pub(crate) fn seal(opener: &Opener<'_>) -> Result<()> {
    for (id, seals) in &opener.seals {
        let what = opener.image.objects.inodes[id.0 as usize].name();
        // SAFETY: F_ADD_SEALS takes a number.
        let set = unsafe { libc::fcntl(opener.inodes[id].as_raw_fd(), libc::F_ADD_SEALS, *seals) };
        if set != 0 {
            return Err(Error::last(&what, "fcntl(F_ADD_SEALS)"));
        }
    }
    Ok(())
}
