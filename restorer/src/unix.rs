//! unix(7)
//!
//! Connections whose accepted end has its listener's address are made by really connecting to it; others by
//! socketpair(2). What waits in a queue is sent through the other end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, UnixAddr};
use torpor_image::description::Kind;
use torpor_image::unix::{BoundFile, State, UnixSocket};
use torpor_image::{Bytes, Image};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;
use crate::pipe::io;
use crate::{holder, socket};

/// Room for what waits in a queue while it is put back; the real size is set afterwards.
const AMPLE: i32 = 64 << 20;

pub(crate) fn open(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket) -> Result<OwnedFd> {
    // Made before, together with its peer.
    let fd = match opener.sockets.remove(&unix.number) {
        Some(fd) => return Ok(fd),
        None => match unix.state {
            State::Idle => new(opener, what, unix)?,
            State::Listening { backlog } => listen(opener, what, unix, backlog)?,
            State::Connected { peer } => return connected(opener, what, unix, peer),
            State::Waiting { listener } => {
                let fd = new(opener, what, unix)?;
                connect(opener, what, &fd, listener)?;
                fd
            }
            State::Orphaned => {
                let (fd, peer) = pair(what, unix.kind)?;
                deliver(what, &peer, unix)?;
                drop(peer);
                fd
            }
        },
    };
    settle(what, &fd, unix)?;
    Ok(fd)
}

/// A new socket, bound if it was.
fn new(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket) -> Result<OwnedFd> {
    // SAFETY: socket takes numbers only.
    let fd =
        owned(what, "socket", unsafe { libc::socket(libc::AF_UNIX, unix.kind | libc::SOCK_CLOEXEC, 0) })?;
    bind(opener, what, &fd, unix)?;
    Ok(fd)
}

fn listen(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket, backlog: u32) -> Result<OwnedFd> {
    let fd = new(opener, what, unix)?;
    // SAFETY: listen takes numbers only.
    if unsafe { libc::listen(fd.as_raw_fd(), backlog as i32) } != 0 {
        return Err(Error::last(what, "listen"));
    }
    opener.listeners.insert(unix.number, fd.try_clone().map_err(|e| io(what, "dup", &e))?);
    Ok(fd)
}

fn connected(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket, peer: u32) -> Result<OwnedFd> {
    let Some(other) = by_number(opener.image, peer) else {
        return Err(Error::Open { what: what.to_owned(), call: "connect", errno: Errno::ENOTCONN });
    };
    let other = other.clone();
    let listener = |name: &Option<Bytes>| name.as_ref().and_then(|n| listener_named(opener.image, n));
    // The accepted end has the name of the listener, which is bound by now; the other may have its own.
    let (mine, its) = (listener(&unix.name), listener(&other.name));
    let (fd, peer_fd) = match (mine, its) {
        (Some(number), _) => {
            let (client, server) = through(opener, what, &other, number)?;
            (server, client)
        }
        (None, Some(number)) => through(opener, what, unix, number)?,
        (None, None) => {
            let (fd, peer_fd) = pair(what, unix.kind)?;
            bind(opener, what, &fd, unix)?;
            bind(opener, what, &peer_fd, &other)?;
            (fd, peer_fd)
        }
    };
    deliver(what, &peer_fd, unix)?;
    deliver(what, &fd, &other)?;
    settle(what, &fd, unix)?;
    settle(what, &peer_fd, &other)?;
    opener.sockets.insert(peer, peer_fd);
    Ok(fd)
}

/// A connection made by connecting to a listener of the image: the client's and the accepted end.
fn through(
    opener: &mut Opener<'_>,
    what: &str,
    client: &UnixSocket,
    listener: u32,
) -> Result<(OwnedFd, OwnedFd)> {
    let fd = new(opener, what, client)?;
    connect(opener, what, &fd, listener)?;
    let from = opener.listeners[&listener].as_raw_fd();
    // SAFETY: accept4 may be given no address.
    let accepted =
        unsafe { libc::accept4(from, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    Ok((fd, owned(what, "accept4", accepted)?))
}

fn connect(opener: &Opener<'_>, what: &str, fd: &OwnedFd, listener: u32) -> Result<()> {
    let Some(to) = opener.listeners.get(&listener) else {
        return Err(Error::Open { what: what.to_owned(), call: "connect", errno: Errno::ECONNREFUSED });
    };
    let address: UnixAddr =
        nix::sys::socket::getsockname(to.as_raw_fd()).map_err(Error::open(what, "getsockname"))?;
    in_directory(opener.image, listener, || nix::sys::socket::connect(fd.as_raw_fd(), &address))
        .map_err(Error::open(what, "connect"))
}

fn pair(what: &str, kind: i32) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: socketpair fills two ints.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if made != 0 {
        return Err(Error::last(what, "socketpair"));
    }
    Ok((owned(what, "socketpair", fds[0])?, owned(what, "socketpair", fds[1])?))
}

/// Sends what waits in the queue of `to` through its other end.
fn deliver(what: &str, from: &OwnedFd, to: &UnixSocket) -> Result<()> {
    if to.queue.is_empty() {
        return Ok(());
    }
    let mut before = 0i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: SO_SNDBUF fills an int.
    unsafe {
        libc::getsockopt(
            from.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw mut before).cast(),
            &raw mut length,
        );
    }
    let set = |value| {
        socket::set_int(from, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value)
            || socket::set_int(from, libc::SOL_SOCKET, libc::SO_SNDBUF, value)
    };
    set(AMPLE / 2);
    for message in &to.queue {
        let mut rest: &[u8] = message;
        loop {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: send reads `rest`.
            let sent = unsafe { libc::send(from.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
            if sent < 0 {
                return Err(Error::last(what, "send"));
            }
            rest = &rest[sent as usize..];
            if rest.is_empty() {
                break;
            }
        }
    }
    set(before / 2);
    Ok(())
}

/// What is set last: options, and directions that are shut down.
fn settle(what: &str, fd: &OwnedFd, unix: &UnixSocket) -> Result<()> {
    socket::set(what, fd, &unix.options)?;
    let how = match unix.shutdown & 3 {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return Ok(()),
    };
    // SAFETY: shutdown takes numbers only. It fails on a socket whose peer has closed, which is shut anyway.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
    Ok(())
}

fn bind(opener: &mut Opener<'_>, what: &str, fd: &OwnedFd, unix: &UnixSocket) -> Result<()> {
    let Some(name) = &unix.name else { return Ok(()) };
    let invalid = |errno| Error::Open { what: what.to_owned(), call: "bind", errno };
    let address = match name.split_first() {
        Some((0, rest)) => UnixAddr::new_abstract(rest).map_err(invalid)?,
        _ => UnixAddr::new(name.path()).map_err(invalid)?,
    };
    if let Some(file) = &unix.file {
        make_room(what, file)?;
    }
    if let Some(file) = &unix.file {
        // The file gets the mode of the socket's own inode (net/unix/af_unix.c, `unix_bind_bsd`): nothing has
        // to be changed by path afterwards, where another file could be by then.
        // SAFETY: fchmod takes numbers only.
        unsafe { libc::fchmod(fd.as_raw_fd(), file.mode & 0o7777) };
    }
    // SAFETY: a socket address with its length.
    let bound = in_directory(opener.image, unix.number, || unsafe {
        Errno::result(libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len())).map(drop)
    });
    if let Err(errno) = bound {
        return Err(match errno {
            Errno::EADDRINUSE => Error::Conflict {
                what: what.to_owned(),
                why: format!("bind: {errno}: another socket has this address"),
                remedy: "stop the program that holds it".into(),
            },
            errno => Error::Open { what: what.to_owned(), call: "bind", errno },
        });
    }
    if let Some(file) = &unix.file {
        let path = file.path.path();
        opener.made.push(path.to_owned());
        let c_path = std::ffi::CString::new(file.path.0.clone()).map_err(|_nul| invalid(Errno::EINVAL))?;
        // SAFETY: the path ends with a zero. Who may not give the file away keeps it.
        unsafe { libc::lchown(c_path.as_ptr(), file.uid, file.gid) };
    }
    Ok(())
}

/// Removes the file a dumped socket left behind; refuses to touch one that is somebody else's.
fn make_room(what: &str, file: &BoundFile) -> Result<()> {
    let path = file.path.path();
    let taken = |why: String| Error::Conflict {
        what: what.to_owned(),
        why,
        remedy: "stop that program, or move the file away".into(),
    };
    let Ok(now) = nix::sys::stat::lstat(path) else { return Ok(()) };
    if now.st_mode & libc::S_IFMT != libc::S_IFSOCK {
        return Err(taken(format!("`{}` exists and is no socket", file.path)));
    }
    let sockets = torpor_kernel::sock_diag::unix_sockets().map_err(|e| {
        taken(format!("`{}` exists, and whether it is in use cannot be told ({e})", file.path))
    })?;
    let in_use = sockets.into_iter().find(|s| s.vfs.is_some_and(|(_, inode)| u64::from(inode) == now.st_ino));
    if let Some(socket) = in_use {
        let who = holder::of_socket(socket.inode).unwrap_or_else(|| "another process".to_owned());
        return Err(taken(format!("{who} is bound to `{}`", file.path)));
    }
    std::fs::remove_file(path).map_err(|e| io(what, "unlink", &e))
}

fn by_number(image: &Image, number: u32) -> Option<&UnixSocket> {
    image.objects.descriptions.iter().find_map(|d| match &d.kind {
        Kind::Unix(unix) if unix.number == number => Some(unix),
        _ => None,
    })
}

/// The listening socket of this name.
fn listener_named(image: &Image, name: &Bytes) -> Option<u32> {
    image.objects.descriptions.iter().find_map(|d| match &d.kind {
        Kind::Unix(unix)
            if matches!(unix.state, State::Listening { .. }) && unix.name.as_ref() == Some(name) =>
        {
            Some(unix.number)
        }
        _ => None,
    })
}

/// Runs a call that resolves or makes the name of socket `number`: for a path in a thread whose working
/// directory and umask are its own, so that a relative name leads to its file and a file gets its mode.
fn in_directory<T: Send>(
    image: &Image,
    number: u32,
    call: impl FnOnce() -> nix::Result<T> + Send,
) -> nix::Result<T> {
    let socket = by_number(image, number);
    let Some((name, file)) = socket.and_then(|s| Some((s.name.as_ref()?, s.file.as_ref()?))) else {
        return call();
    };
    let name = name.path();
    let root = image.tasks.first().map_or(Path::new("/"), |t| t.root.path());
    let dir = if name.is_absolute() { None } else { directory_of(file.path.path(), name) };
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
            if name.is_absolute() && root != Path::new("/") {
                nix::unistd::chroot(root)?;
            }
            if let Some(dir) = dir {
                nix::unistd::chdir(&dir)?;
            }
            call()
        });
        worker.join().expect("the call does not panic")
    })
}

/// The directory from which relative `name` leads to `path`.
fn directory_of(path: &Path, name: &Path) -> Option<PathBuf> {
    let mut dir = path;
    for part in name.components().rev() {
        match part {
            std::path::Component::Normal(part) if dir.file_name() == Some(part) => dir = dir.parent()?,
            std::path::Component::CurDir => {}
            _ => return None,
        }
    }
    Some(dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_is_resolved_from_its_directory() {
        let dir = |path, name| directory_of(Path::new(path), Path::new(name));
        assert_eq!(dir("/run/x/sock", "./sock"), Some("/run/x".into()));
        assert_eq!(dir("/run/x/sock", "x/sock"), Some("/run".into()));
        assert_eq!(dir("/run/x/sock", "../sock"), None);
    }
}
