//! Pseudo terminals: pairs are made anew, under the number they had.
//!
//! A new master gets the lowest number that is free in its devpts, so masters are opened until the wanted one comes, and
//! the others closed. Slaves are opened through their master (TIOCGPTPEER), not by name. A pair is made with all of
//! its open ends at once, in the order in which they could have come about: slaves that hung up first, what locks
//! others out last.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FchmodatFlags, Mode};
use torpor_image::description::{Description, Kind};
use torpor_image::pty::{Pty, PtyEnd, Side, Slave, Stop};
use torpor_image::{DescriptionId, PtyId};
use torpor_kernel::process;
use torpor_kernel::tty::{self, Termios};
use torpor_kernel::tty_queue::{self, Ends, Queues};

use crate::description::owned;
use crate::error::{Error, Result};
use crate::open::Opener;

/// More pairs than there can be (/proc/sys/kernel/pty/max as it comes).
const MOST: usize = 1 << 16;
/// What is kept of the flags a slave was opened with.
const FLAGS: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME;

/// A pair that was made.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The slave, if it ever was open: an end of ours.
    slave: Option<OwnedFd>,
    /// The ends that were open, until they are asked for.
    ends: HashMap<DescriptionId, OwnedFd>,
}

/// An open end.
pub(crate) fn open(opener: &mut Opener<'_>, what: &str, id: DescriptionId, end: &PtyEnd) -> Result<OwnedFd> {
    let taken = pair(opener, end.pty)?.ends.remove(&id);
    taken.ok_or_else(|| Error::open(what, "open")(Errno::EBADF))
}

/// A slave for a process to make its controlling terminal.
pub(crate) fn slave(opener: &mut Opener<'_>, id: PtyId) -> Result<OwnedFd> {
    let name = name(&opener.image.objects.ptys[id.0 as usize]);
    let slave = pair(opener, id)?.slave.as_ref().ok_or_else(|| Error::open(&name, "open")(Errno::EIO))?;
    slave.try_clone().map_err(|e| crate::pipe::io(&name, "dup", &e))
}

fn pair<'o>(opener: &'o mut Opener<'_>, id: PtyId) -> Result<&'o mut Pair> {
    if !opener.ptys.contains_key(&id) {
        let image = opener.image;
        let ends = image.objects.descriptions.iter().filter_map(|d| match &d.kind {
            Kind::Pty(end) if end.pty == id => Some((d, end)),
            _ => None,
        });
        let pair = make(&image.objects.ptys[id.0 as usize], &ends.collect::<Vec<_>>())?;
        opener.ptys.insert(id, pair);
    }
    Ok(opener.ptys.entry(id).or_insert_with(|| Pair { slave: None, ends: HashMap::new() }))
}

fn name(pty: &Pty) -> String {
    format!("pseudo terminal {}", pty.path)
}

fn make(pty: &Pty, all: &[(&Description, &PtyEnd)]) -> Result<Pair> {
    let what = name(pty);
    let fail = |call| Error::open(&what, call);
    let of = |side| all.iter().filter(move |(_, end)| end.side == side);
    let mut ends = HashMap::new();
    let master = if pty.ptmx.is_empty() { any_master(&what, pty)? } else { numbered(&what, pty)? };
    tty::set_lock(&master, false).map_err(fail("ioctl(TIOCSPTLCK)"))?;

    for (description, _) in of(Side::HungUp) {
        let flags = description.flags as i32 & FLAGS;
        let slave = peer(&what, &master, flags)?;
        ends.insert(description.id, slave);
    }
    if pty.ptmx.is_empty() {
        // The end of the master hangs them up.
        return Ok(Pair { slave: None, ends });
    }
    if let Some(slave) = ends.values().next() {
        tty::hang_up(slave).map_err(|errno| match errno {
            Errno::EPERM => Error::Permission {
                what: what.clone(),
                call: "ioctl(TIOCVHANGUP)",
                errno,
                remedy: "run torpor with CAP_SYS_ADMIN",
            },
            errno => fail("ioctl(TIOCVHANGUP)")(errno),
        })?;
    }
    node(&what, pty)?;
    let slave = match pty.slave {
        Slave::Unopened => None,
        Slave::Closed | Slave::Open => Some(peer(&what, &master, libc::O_RDWR | libc::O_NONBLOCK)?),
    };
    // Nobody has it as controlling terminal yet, who would be told of a change of the size.
    tty::set_size(&master, pty.size).map_err(fail("ioctl(TIOCSWINSZ)"))?;
    let termios = Termios::from_bytes(&pty.termios).ok_or_else(|| fail("ioctl(TCSETS2)")(Errno::EINVAL))?;
    tty::set_termios(&master, &termios).map_err(fail("ioctl(TCSETS2)"))?;
    if let Some(slave) = &slave {
        let queues = queues(pty).map_err(fail("write"))?;
        let ends = Ends { master: master.as_fd(), slave: slave.as_fd(), termios: &termios, packet: false };
        ends.put_back(&queues).map_err(fail("putting back what was on its way"))?;
    }
    for (description, end) in of(Side::Slave) {
        let flags = description.flags as i32 & FLAGS;
        let fd = match &slave {
            Some(slave) if &*end.path == b"/dev/tty" => by_dev_tty(&what, slave.as_fd(), flags)?,
            _ => peer(&what, &master, flags)?,
        };
        ends.insert(description.id, fd);
    }
    tty::set_packet_mode(&master, pty.packet).map_err(fail("ioctl(TIOCPKT)"))?;
    for (exclusive, fd) in [(pty.exclusive.0, Some(&master)), (pty.exclusive.1, slave.as_ref())] {
        if let (true, Some(fd)) = (exclusive, fd) {
            tty::set_exclusive(fd).map_err(fail("ioctl(TIOCEXCL)"))?;
        }
    }
    tty::set_lock(&master, pty.locked).map_err(fail("ioctl(TIOCSPTLCK)"))?;
    if let Some((description, _)) = of(Side::Master).next() {
        ends.insert(description.id, master);
    }
    Ok(Pair { slave, ends })
}

fn peer(what: &str, master: &OwnedFd, flags: i32) -> Result<OwnedFd> {
    tty::peer(master, flags | libc::O_NOCTTY | libc::O_CLOEXEC)
        .map_err(Error::open(what, "ioctl(TIOCGPTPEER)"))
}

fn open_ptmx(what: &str, path: &std::path::Path) -> Result<(OwnedFd, u32)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let master = nix::fcntl::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ENOSPC => Error::Conflict {
            what: what.to_owned(),
            why: "there are as many pseudo terminals as are allowed".into(),
            remedy: "raise /proc/sys/kernel/pty/max".into(),
        },
        Errno::ENOENT => Error::Conflict {
            what: what.to_owned(),
            why: format!("there is no `{}`", path.display()),
            remedy: "mount devpts where it was".into(),
        },
        errno => Error::open(what, "open")(errno),
    })?;
    let number = tty::number(&master).map_err(Error::open(what, "ioctl(TIOCGPTN)"))?;
    // Not to be waited for was only the opening.
    // SAFETY: takes numbers.
    if unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) } != 0 {
        return Err(Error::last(what, "fcntl(F_SETFL)"));
    }
    Ok((master, number))
}

/// A new master of the number of `pty`.
fn numbered(what: &str, pty: &Pty) -> Result<OwnedFd> {
    let mut lower = Vec::new();
    loop {
        let (master, number) = open_ptmx(what, pty.ptmx.path())?;
        if number == pty.number {
            return Ok(master);
        }
        if number > pty.number || lower.len() > MOST {
            return Err(taken(what, pty));
        }
        lower.push(master);
    }
}

/// A new master, of the number of `pty` if that can be had: it shows in nothing but the name and device of a
/// descriptor that leads nowhere.
fn any_master(what: &str, pty: &Pty) -> Result<OwnedFd> {
    // Beside its devpts, as /dev/ptmx is, or in it.
    let devpts = pty.path.path().parent();
    let places = [devpts.map(|dir| dir.with_file_name("ptmx")), devpts.map(|dir| dir.join("ptmx"))];
    let is_ptmx = |path: &std::path::PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| (libc::major(m.rdev()), libc::minor(m.rdev())) == tty::PTMX)
    };
    let place = places.into_iter().flatten().find(is_ptmx).unwrap_or_else(|| "/dev/ptmx".into());
    let ptmx = Pty { ptmx: place.as_os_str().as_encoded_bytes().into(), ..pty.clone() };
    match numbered(what, &ptmx) {
        Err(Error::Conflict { .. }) => Ok(open_ptmx(what, ptmx.ptmx.path())?.0),
        other => other,
    }
}

fn taken(what: &str, pty: &Pty) -> Error {
    let device = std::fs::symlink_metadata(pty.path.path()).map_or(0, |m| m.dev());
    let mut held = tty::holders(&tty::everybody(), pty.number, device);
    // The one that made it tells more than those that use it.
    held.sort_by_key(|held| !held.master);
    let why = match held.first() {
        Some(held) => {
            let name = process::who_holds(held.pid.0).unwrap_or_else(|| "?".into());
            format!("{} is taken by pid {} ({name})", pty.path, held.pid)
        }
        None => format!("{} is taken", pty.path),
    };
    Error::Conflict {
        what: what.to_owned(),
        why,
        remedy: "close that terminal, or wait until it ends".into(),
    }
}

/// Mode and owner of the slave's file, without opening the slave.
fn node(what: &str, pty: &Pty) -> Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(pty.path.path(), flags, Mode::empty()).map_err(Error::open(what, "open"))?;
    let stat = nix::sys::stat::fstat(&file).map_err(Error::open(what, "fstat"))?;
    let (mode, uid, gid) = pty.node;
    if !tty::is_on_devpts(&file) || (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == pty.node {
        return Ok(());
    }
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::chown(link.as_str(), Some(uid.into()), Some(gid.into()))
        .map_err(Error::open(what, "chown"))?;
    let mode = Mode::from_bits_truncate(mode);
    nix::sys::stat::fchmodat(nix::fcntl::AT_FDCWD, link.as_str(), mode, FchmodatFlags::FollowSymlink)
        .map_err(Error::open(what, "chmod"))
}

fn queues(pty: &Pty) -> nix::Result<Box<Queues>> {
    let mut queues = Queues::new();
    queues.output.add(&pty.output)?;
    for line in &pty.lines {
        queues.add_line(line)?;
    }
    queues.unfinished.add(&pty.unfinished)?;
    queues.set_stop(match pty.stop {
        Stop::No => tty_queue::Stop::No,
        Stop::Typed => tty_queue::Stop::Typed,
        Stop::Flow => tty_queue::Stop::Flow,
    });
    Ok(queues)
}

/// What the process that opens /dev/tty works on.
struct ByDevTty {
    slave: i32,
    flags: i32,
    result: i32,
    /// Its errno.
    errno: i32,
}

/// Opens a slave by the name /dev/tty. Only a process whose controlling terminal it is can: one that
/// shares our descriptors is made for that, and gives the terminal up before it ends.
fn by_dev_tty(what: &str, slave: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
    extern "C" fn run(argument: *mut libc::c_void) -> i32 {
        // SAFETY: the argument of the clone below, whose caller waits. All calls take numbers, or a name that ends
        // with a zero; a terminal that is given up sends SIGHUP to its foreground group, which is blocked.
        unsafe {
            let work = &mut *argument.cast::<ByDevTty>();
            work.result = -1;
            if libc::setsid() >= 0 && libc::ioctl(work.slave, libc::TIOCSCTTY, 0) == 0 {
                work.result = libc::open(c"/dev/tty".as_ptr(), work.flags | libc::O_NOCTTY | libc::O_CLOEXEC);
                work.errno = *libc::__errno_location();
                libc::ioctl(work.slave, libc::TIOCNOTTY);
            } else {
                work.errno = *libc::__errno_location();
            }
            libc::_exit(0)
        }
    }
    let mut work = ByDevTty { slave: slave.as_raw_fd(), flags, result: -1, errno: libc::ECHILD };
    let mut stack = vec![0u128; 4096];
    let all = !0u64;
    let mut before = 0u64;
    let share = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: rt_sigprocmask reads and fills masks of eight bytes. The child has a stack of its own, and we go on
    // when it has ended.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
        let top = stack.as_mut_ptr().add(stack.len());
        let child = libc::clone(run, top.cast(), share, (&raw mut work).cast());
        let errno = Errno::last();
        if child > 0 {
            libc::waitpid(child, std::ptr::null_mut(), 0);
        } else {
            work.errno = errno as i32;
        }
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
    }
    if work.result < 0 {
        return Err(Error::open(what, "opening it as /dev/tty")(Errno::from_raw(work.errno)));
    }
    owned(what, "open", work.result)
}
