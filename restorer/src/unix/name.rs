//! Giving sockets their names, and reaching them by those.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, UnixAddr};
use torpor_image::Bytes;
use torpor_image::unix::{BoundFile, PeerCredentials, UnixSocket};

use super::place::{Place, directory_of};
use super::{by_number, creator};
use crate::error::{Error, Result};
use crate::holder;
use crate::open::Opener;
use crate::pipe::io;

/// The address of a name.
pub(super) fn address(what: &str, name: &Bytes) -> Result<UnixAddr> {
    let made = match name.split_first() {
        Some((0, rest)) => UnixAddr::new_abstract(rest),
        _ => UnixAddr::new(name.path()),
    };
    made.map_err(|errno| Error::Open { what: what.to_owned(), call: "bind", errno })
}

/// Binds a socket of the image to its name: where everybody sees it if it can be reached by it.
pub(super) fn bind(
    opener: &mut Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    unix: &UnixSocket,
    seen: bool,
) -> Result<()> {
    let Some(name) = &unix.name else { return Ok(()) };
    let place = match &unix.file {
        Some(file) if seen && !file.unlinked => {
            bind_seen(opener, what, fd, name, file, unix.number)?;
            place_of(opener, unix)
        }
        file => bind_hidden(opener, what, fd, name, file.as_ref(), unix.number)?,
    };
    opener.unix.places.insert(unix.number, place);
    Ok(())
}

/// Binds a socket to a name of which nobody sees the file.
pub(super) fn bind_hidden(
    opener: &mut Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    name: &Bytes,
    file: Option<&BoundFile>,
    number: u32,
) -> Result<Place> {
    let at = address(what, name)?;
    if name.first() == Some(&0) {
        bind_at(what, fd, &at, &Place::Here)?;
        return Ok(Place::Here);
    }
    let hidden = opener.unix.hidden.place(name.path()).map_err(Error::open(what, "mkdir"))?;
    match try_bind(fd, &at, &hidden) {
        // Without the privilege to change the root it is made in its place, and removed again.
        Err(Errno::EPERM) => {
            let Some(file) = file else {
                return Err(Error::Open { what: what.to_owned(), call: "chroot", errno: Errno::EPERM });
            };
            bind_seen(opener, what, fd, name, file, number)?;
            let place = by_number(opener.image, number).map_or(Place::Here, |unix| place_of(opener, unix));
            if file.unlinked {
                opener.unix.unlink.push(file.path.path().to_owned());
            }
            Ok(place)
        }
        Err(errno) => Err(Error::Open { what: what.to_owned(), call: "bind", errno }),
        Ok(()) => Ok(hidden),
    }
}

fn bind_seen(
    opener: &mut Opener<'_>,
    what: &str,
    fd: &OwnedFd,
    name: &Bytes,
    file: &BoundFile,
    number: u32,
) -> Result<()> {
    let at = address(what, name)?;
    make_room(opener, what, file)?;
    // The file gets the mode of the socket's own inode (net/unix/af_unix.c, `unix_bind_bsd`): nothing has
    // to be changed by path afterwards, where another file could be by then.
    // SAFETY: fchmod takes numbers only.
    unsafe { libc::fchmod(fd.as_raw_fd(), file.mode & 0o7777) };
    let place = by_number(opener.image, number).map_or(Place::Here, |unix| place_of(opener, unix));
    bind_at(what, fd, &at, &place)?;
    opener.made.push(file.path.path().to_owned());
    let c_path = std::ffi::CString::new(file.path.0.clone()).map_err(|_nul| Error::Open {
        what: what.to_owned(),
        call: "bind",
        errno: Errno::EINVAL,
    })?;
    // SAFETY: the path ends with a zero. Who may not give the file away keeps it.
    unsafe { libc::lchown(c_path.as_ptr(), file.uid, file.gid) };
    Ok(())
}

fn bind_at(what: &str, fd: &OwnedFd, at: &UnixAddr, place: &Place) -> Result<()> {
    match try_bind(fd, at, place) {
        Ok(()) => Ok(()),
        Err(Errno::EADDRINUSE) => Err(Error::Conflict {
            what: what.to_owned(),
            why: format!("bind: {}: {} has this address", Errno::EADDRINUSE, holder_of(at)),
            remedy: "stop that program, or wait until it ends".into(),
        }),
        Err(errno) => Err(Error::Open { what: what.to_owned(), call: "bind", errno }),
    }
}

/// Who is bound to an address, as "pid 901 (nginx)".
fn holder_of(at: &UnixAddr) -> String {
    let name = match (at.as_abstract(), at.path()) {
        (Some(name), _) => [b"\0", name].concat(),
        (None, path) => path.map(|p| p.as_os_str().as_encoded_bytes().to_vec()).unwrap_or_default(),
    };
    let all = torpor_kernel::sock_diag::unix_sockets().unwrap_or_default();
    let mut bound = all.into_iter().filter(|s| s.inode != 0 && s.name.as_ref() == Some(&name));
    bound.find_map(|s| holder::of_socket(s.inode)).unwrap_or_else(|| "another socket".to_owned())
}

fn try_bind(fd: &OwnedFd, at: &UnixAddr, place: &Place) -> nix::Result<()> {
    // SAFETY: a socket address with its length.
    place
        .run(&|| unsafe { Errno::result(libc::bind(fd.as_raw_fd(), at.as_ptr().cast(), at.len())).map(drop) })
}

/// Connects to an address, as the process that is told to the other end.
pub(super) fn connect(
    opener: &mut Opener<'_>,
    what: &str,
    (fd, at, place): (&OwnedFd, &UnixAddr, &Place),
    creator: Option<&PeerCredentials>,
) -> nix::Result<()> {
    creator::call_for(opener, what, creator, place, &|| call_connect(fd, at))
}

/// The same, where nobody is told.
pub(super) fn try_connect(fd: &OwnedFd, at: &UnixAddr, place: &Place) -> nix::Result<()> {
    place.run(&|| call_connect(fd, at))
}

fn call_connect(fd: &OwnedFd, at: &UnixAddr) -> nix::Result<()> {
    // SAFETY: a socket address with its length.
    unsafe { Errno::result(libc::connect(fd.as_raw_fd(), at.as_ptr().cast(), at.len())).map(drop) }
}

/// Where the name of a socket leads to its file.
pub(super) fn place_of(opener: &Opener<'_>, unix: &UnixSocket) -> Place {
    let (Some(name), Some(file)) = (&unix.name, &unix.file) else { return Place::Here };
    let name = name.path();
    let is = |id: torpor_image::DescriptionId| {
        matches!(&opener.image.objects.descriptions[id.0 as usize].kind,
            torpor_image::description::Kind::Unix(u) if u.number == unix.number)
    };
    let mut tasks = opener.image.tasks.iter();
    let owner = tasks.find(|t| t.descriptors.iter().any(|d| is(d.description)));
    let root = owner.map_or(Path::new("/"), |t| t.root.path());
    if name.is_absolute() {
        Place::At { root: (root != Path::new("/")).then(|| root.to_owned()), dir: None }
    } else {
        Place::At { root: None, dir: directory_of(file.path.path(), name) }
    }
}

/// Removes the file a dumped socket left behind; refuses to touch one that is somebody else's.
fn make_room(opener: &mut Opener<'_>, what: &str, file: &BoundFile) -> Result<()> {
    let path = file.path.path();
    let taken =
        |why: String, remedy: &str| Error::Conflict { what: what.to_owned(), why, remedy: remedy.into() };
    let Ok(now) = nix::sys::stat::lstat(path) else { return Ok(()) };
    if now.st_mode & libc::S_IFMT != libc::S_IFSOCK {
        return Err(taken(format!("`{}` exists and is no socket", file.path), "move it away"));
    }
    let sockets = torpor_kernel::sock_diag::unix_sockets().map_err(|e| {
        let why = format!("`{}` exists, and whether it is in use cannot be told ({e})", file.path);
        taken(why, "remove it if no program uses it")
    })?;
    let in_use = sockets.into_iter().find(|s| s.vfs.is_some_and(|(_, inode)| u64::from(inode) == now.st_ino));
    if let Some(socket) = in_use {
        let who = holder::of_socket(socket.inode).unwrap_or_else(|| "another process".to_owned());
        let why = format!("{who} is bound to `{}`", file.path);
        return Err(taken(why, "stop that program, or move the file away"));
    }
    // Aside, for the case that the restore fails.
    let aside = path.with_file_name(format!(".torpor-{}-{}", std::process::id(), now.st_ino));
    std::fs::rename(path, &aside).map_err(|e| io(what, "rename", &e))?;
    opener.aside.push((path.to_owned(), aside));
    Ok(())
}
