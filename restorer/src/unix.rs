//! unix(7)
//!
//! All sockets are made when the first of them is wanted, since they refer to one another (`make`): listening
//! ones, then connections, by really connecting to a listener where the accepted end has a name, else by
//! socketpair(2); then those that wait to be accepted, in their order; then datagram sockets. What waits in
//! queues is sent when every description of the plan exists, since descriptors may be among it (`queue`);
//! options and directions that are shut down come last, lest they change what is sent.

mod creator;
mod make;
mod name;
mod place;
mod queue;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use torpor_image::Image;
use torpor_image::description::Kind;
use torpor_image::unix::UnixSocket;

use crate::error::{Error, Result};
use crate::late::Moment;
use crate::open::Opener;
use crate::pipe::io;
use crate::socket;
use place::{Hidden, Place};

pub(crate) use queue::{Slots, deliver_all, deliver_late};

/// The sockets of an image, while they are being made.
#[derive(Debug, Default)]
pub(crate) struct Made {
    begun: bool,
    /// By number.
    sockets: HashMap<u32, OwnedFd>,
    /// What stands in for a peer that is gone, by the number of the socket whose peer it was. Closed at the end.
    ghosts: HashMap<u32, OwnedFd>,
    /// Where the names of sockets were made.
    places: HashMap<u32, Place>,
    /// Those that have their peer already.
    connected: HashSet<u32>,
    /// Those whose queue waits for processes or their threads.
    late: Vec<(u32, Moment)>,
    /// Files of sockets whose names were gone.
    unlink: Vec<PathBuf>,
    hidden: Hidden,
}

impl Made {
    fn insert(&mut self, number: u32, fd: OwnedFd) {
        self.sockets.insert(number, fd);
    }

    fn place(&self, number: u32) -> Place {
        self.places.get(&number).cloned().unwrap_or(Place::Here)
    }

    fn fd(&self, number: u32) -> Option<&OwnedFd> {
        self.sockets.get(&number)
    }
}

/// A descriptor for a socket of the image.
pub(crate) fn open(opener: &mut Opener<'_>, what: &str, unix: &UnixSocket) -> Result<OwnedFd> {
    if !opener.unix.begun {
        opener.unix.begun = true;
        make::all(opener)?;
    }
    match opener.unix.fd(unix.number) {
        Some(fd) => fd.try_clone().map_err(|e| io(what, "dup", &e)),
        None => {
            Err(Error::Open { what: what.to_owned(), call: "socket", errno: nix::errno::Errno::ENOTCONN })
        }
    }
}

/// All sockets of an image, each once.
fn all(image: &Image) -> Vec<&UnixSocket> {
    let mut seen = HashSet::new();
    let sockets = image.objects.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Unix(unix) => Some(unix),
        _ => None,
    });
    sockets.filter(|s| seen.insert(s.number)).collect()
}

fn by_number(image: &Image, number: u32) -> Option<&UnixSocket> {
    image.objects.descriptions.iter().find_map(|d| match &d.kind {
        Kind::Unix(unix) if unix.number == number => Some(unix),
        _ => None,
    })
}

/// What a socket is, for messages.
fn title(opener: &Opener<'_>, unix: &UnixSocket) -> String {
    let mut all = opener.image.objects.descriptions.iter();
    let is = |kind: &Kind| matches!(kind, Kind::Unix(u) if u.number == unix.number);
    all.find(|d| is(&d.kind)).map_or_else(|| "a unix socket".to_owned(), |d| opener.name(d.id))
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
