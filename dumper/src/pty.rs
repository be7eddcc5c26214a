//! Pseudo terminals with their master in the tree.
//!
//! A pair is known by its devpts and its number, which a master tells by TIOCGPTN and a slave by its device. The
//! master gives most of the state, its slave's settings included (kernel: `tty`). To look at what was typed, the slave
//! is opened once more (TIOCGPTPEER), which changes nothing for a slave that is open or was. One that was never
//! opened must stay so: once it is closed again, its master reads an error instead of waiting.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use torpor_image::description::Kind;
use torpor_image::pty::{Pty, PtyEnd, Side, Slave, Stop};
use torpor_image::{Bytes, PtyId};
use torpor_kernel::ids::Pid;
use torpor_kernel::tty;
use torpor_kernel::tty_queue::{self, Ends, Queues};
use torpor_kernel::{fds, process};

use crate::collect::{Collector, stat_path};
use crate::description::Found;
use crate::error::{Error, Result};
use crate::opened::Opened;
use crate::{survey, tty_guardian as guardian};

/// Less than a line discipline holds: with fewer bytes in it, it takes more.
const HALF_FULL: usize = 2048;

/// A master that a process of the tree has open.
#[derive(Clone, Debug)]
struct Master {
    pid: Pid,
    fd: i32,
    /// The file it was opened by.
    path: Bytes,
    /// Its devpts.
    device: u64,
    /// The file of its slave.
    slave: Bytes,
    number: u32,
}

/// The pairs of the tree.
#[derive(Debug, Default)]
pub(crate) struct Ptys {
    masters: Option<Vec<Master>>,
    /// By devpts and number; `None` for what was refused.
    known: HashMap<(u64, u32), Option<PtyId>>,
}

/// Whose a slave is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Its master is in the tree.
    Tree(PtyId),
    /// So it is, and it was refused.
    Refused,
    /// Its master is somebody else's.
    Outside,
}

/// The processes whose ends count: also torpor itself, for what is in flight ([`counts`]).
fn tree(collector: &Collector) -> Vec<Pid> {
    let members = collector.members.iter().map(|pid| survey::living(Pid(*pid)));
    members.chain((!collector.sockets.flight().is_empty()).then(Pid::this)).collect()
}

/// Whether a descriptor belongs to the tree: of torpor's own, those it got from the queues of sockets.
fn counts(collector: &Collector, pid: Pid, fd: i32) -> bool {
    pid != Pid::this() || collector.sockets.flight().iter().any(|own| own.as_raw_fd() == fd)
}

/// A descriptor that leads to a master.
pub(crate) fn master(collector: &mut Collector, found: &Found, fd: &OwnedFd) -> Result<Option<Kind>> {
    let Ok(number) = tty::number(fd) else {
        collector.refuse(found.title(), "it is no master of a devpts", "close it before the dump");
        return Ok(None);
    };
    if found.info.flags & libc::O_ACCMODE as u32 != libc::O_RDWR as u32 {
        collector.refuse(
            found.title(),
            "it is open for one direction only",
            "open it for reading and writing",
        );
        return Ok(None);
    }
    let path = Bytes::from(found.link.as_slice());
    let (device, slave) = devpts(fd, &path, found.stat.st_dev, number);
    let master = Master { pid: found.pid, fd: found.fd, path: path.clone(), device, slave, number };
    let id = pair(collector, &master, Some(fd))?;
    Ok(id.map(|pty| Kind::Pty(PtyEnd { pty, side: Side::Master, path })))
}

/// The pair of a slave; without `device` the devpts is unknown, as it is for /dev/tty.
pub(crate) fn whose(collector: &mut Collector, number: u32, device: Option<u64>) -> Result<Whose> {
    let known = masters(collector).iter().filter(|m| m.number == number);
    let mut known: Vec<Master> =
        known.filter(|m| device.is_none_or(|device| m.device == device)).cloned().collect();
    known.dedup_by_key(|m| m.device);
    match known.as_slice() {
        [] => Ok(Whose::Outside),
        [master] => Ok(pair(collector, master, None)?.map_or(Whose::Refused, Whose::Tree)),
        _ => {
            collector.refuse(
                format!("pseudo terminal {number}"),
                "several devpts have one of this number, and it is not known which of them is meant",
                "close /dev/tty before the dump",
            );
            Ok(Whose::Refused)
        }
    }
}

/// A slave after its terminal hung up.
pub(crate) fn hung_up(collector: &mut Collector, found: &Found) -> Result<Option<Kind>> {
    let number = libc::minor(found.stat.st_rdev);
    let key = (found.stat.st_dev, number);
    let id = match whose(collector, number, Some(key.0))? {
        Whose::Refused => return Ok(None),
        Whose::Tree(id) => id,
        Whose::Outside => match collector.ptys.known.get(&key) {
            Some(Some(id)) => *id,
            _ => {
                let path = crate::description::without_deleted(&found.link);
                add(collector, key, Pty { number, path, ..empty() })
            }
        },
    };
    let path = crate::description::without_deleted(&found.link);
    Ok(Some(Kind::Pty(PtyEnd { pty: id, side: Side::HungUp, path })))
}

/// Whether something is on its way through pairs of these processes: programs read at once, as a rule.
pub(crate) fn unread(all: &[Opened]) -> bool {
    // There is nothing without a master.
    if !all.iter().any(|o| o.fds.iter().any(|(_, link)| link.ends_with(b"/ptmx"))) {
        return false;
    }
    let pids: Vec<Pid> = all.iter().map(|o| o.pid).collect();
    let pids = &pids[..];
    let waits = |fd: &OwnedFd| {
        let _carried_on = tty::poll(fd, libc::POLLIN);
        tty::unread(fd).is_ok_and(|n| n > 0) || tty::poll(fd, libc::POLLPRI) & libc::POLLPRI != 0
    };
    let open = |pid: Pid, fd: i32| fds::getfd(fds::pidfd_open(pid).ok()?.as_fd(), fd).ok();
    let masters = find_masters(pids);
    masters.iter().any(|master| {
        let held = tty::holders(pids, master.number, master.device);
        held.into_iter().any(|end| open(end.pid, end.fd).is_some_and(|fd| waits(&fd)))
    })
}

fn masters(collector: &mut Collector) -> &[Master] {
    if collector.ptys.masters.is_none() {
        let mut all = find_masters(&tree(collector));
        all.retain(|master| counts(collector, master.pid, master.fd));
        collector.ptys.masters = Some(all);
    }
    collector.ptys.masters.as_deref().unwrap_or_default()
}

fn find_masters(pids: &[Pid]) -> Vec<Master> {
    let mut all = Vec::new();
    for &pid in pids {
        let mut pidfd = None;
        for fd in fds::list(pid).unwrap_or_default() {
            let Ok(path) = fds::readlink(pid, fd).map(Bytes) else { continue };
            if !path.ends_with(b"/ptmx") {
                continue;
            }
            let opened = pidfd.get_or_insert_with(|| fds::pidfd_open(pid));
            let (Ok(pidfd), Ok(stat)) = (opened, fds::stat(pid, fd)) else { continue };
            let Ok(ours) = fds::getfd(pidfd.as_fd(), fd) else { continue };
            let Ok(number) = tty::number(&ours) else { continue };
            let (device, slave) = devpts(&ours, &path, stat.st_dev, number);
            all.push(Master { pid, fd, path, device, slave, number });
        }
    }
    all
}

/// The devpts of a master, and the file of its slave: in the one it is in, or in `pts` beside it
/// (fs/devpts/inode.c, `devpts_mntget`).
fn devpts(master: &OwnedFd, path: &Bytes, device: u64, number: u32) -> (u64, Bytes) {
    let parent = path.path().parent().unwrap_or(path.path());
    let name = number.to_string();
    if tty::is_on_devpts(master) {
        return (device, parent.join(name).as_os_str().as_encoded_bytes().into());
    }
    let slave = parent.join("pts").join(name);
    (tty::pts_beside(path).unwrap_or(0), slave.as_os_str().as_encoded_bytes().into())
}

fn empty() -> Pty {
    Pty {
        id: PtyId(0),
        number: 0,
        path: Bytes::default(),
        ptmx: Bytes::default(),
        node: (0, 0, 0),
        termios: Bytes::default(),
        size: [0; 4],
        packet: false,
        locked: false,
        exclusive: (false, false),
        slave: Slave::Open,
        stop: Stop::No,
        output: Bytes::default(),
        lines: Vec::new(),
        unfinished: Bytes::default(),
    }
}

fn add(collector: &mut Collector, key: (u64, u32), pty: Pty) -> PtyId {
    let id = PtyId(collector.objects.ptys.len() as u32);
    collector.ptys.known.insert(key, Some(id));
    collector.objects.ptys.push(Pty { id, ..pty });
    id
}

/// The pair of a master, collected when it is new; `None` when it was refused.
fn pair(collector: &mut Collector, master: &Master, fd: Option<&OwnedFd>) -> Result<Option<PtyId>> {
    let key = (master.device, master.number);
    if let Some(known) = collector.ptys.known.get(&key) {
        return Ok(*known);
    }
    let ours;
    let fd = match fd {
        Some(fd) => fd,
        None => {
            ours = match collector.getfd(master.pid, master.fd) {
                // Closed meanwhile.
                Err(_) if collector.live => return Ok(None),
                got => got.map_err(Error::kernel(master.pid, format!("reaching fd {}", master.fd)))?,
            };
            &ours
        }
    };
    match describe(collector, master, fd)? {
        Ok(pty) => Ok(Some(add(collector, key, pty))),
        Err((why, remedy)) => {
            collector.refuse(name(master), why, remedy);
            collector.ptys.known.insert(key, None);
            Ok(None)
        }
    }
}

fn name(master: &Master) -> String {
    if master.pid == Pid::this() {
        return format!("{} (master: in flight)", master.slave);
    }
    format!("{} (master: fd {} of pid {})", master.slave, master.fd, master.pid)
}

/// Why a pair cannot be kept, and what to do.
type Refused = (String, &'static str);

fn describe(
    collector: &Collector,
    master: &Master,
    fd: &OwnedFd,
) -> Result<std::result::Result<Pty, Refused>> {
    let refused = |why: &str, remedy| Ok(Err((why.to_owned(), remedy)));
    let fail = |call| {
        let name = name(master);
        move |errno: Errno| {
            Error::kernel(master.pid, format!("reading {name}"))(torpor_kernel::Error::syscall(
                call, &name, errno,
            ))
        }
    };
    let slave = match state_of_slave(collector, master, fd) {
        Ok(slave) => slave,
        Err(refused) => return Ok(Err(refused)),
    };
    if tty::get(fd, libc::TIOCGETD).map_err(fail("TIOCGETD"))? != tty::N_TTY {
        return refused("its master has a line discipline other than N_TTY", "set N_TTY (TIOCSETD)");
    }
    let termios = tty::termios(fd).map_err(fail("TCGETS2"))?;
    if tty::is_locked(fd).unwrap_or(false) {
        return refused("some of its settings are locked (TIOCSLCKTRMIOS)", "unlock them");
    }
    let flag = |request| tty::get(fd, request).is_ok_and(|value| value != 0);
    let mut pty = Pty {
        number: master.number,
        path: master.slave.clone(),
        ptmx: master.path.clone(),
        termios: Bytes(termios.bytes().to_vec()),
        size: tty::size(fd).map_err(fail("TIOCGWINSZ"))?,
        packet: flag(libc::TIOCGPKT),
        locked: flag(libc::TIOCGPTLCK),
        exclusive: (flag(libc::TIOCGEXCL), false),
        slave,
        ..empty()
    };
    match stat_path(&master.slave) {
        Some(stat) => pty.node = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid),
        None => return refused("the file of its slave cannot be found", "mount its devpts where it was"),
    }
    if pty.locked && slave != Slave::Unopened {
        return refused("its slave was opened and then locked again (TIOCSPTLCK)", "unlock it");
    }
    if collector.live {
        return Ok(Ok(pty));
    }
    if tty::poll(fd, libc::POLLPRI) & libc::POLLPRI != 0 {
        return refused("its master has not read the last status of packet mode yet", "try again");
    }
    if slave == Slave::Unopened {
        return match tty::unread(fd) {
            Ok(0) => Ok(Ok(pty)),
            _ => refused("something was echoed to its master before its slave was ever opened", "read it"),
        };
    }
    let full = tty::poll(fd, libc::POLLOUT) & libc::POLLOUT == 0;
    let peer = match slave {
        Slave::Open => match tty::peer(fd, guardian::SLAVE) {
            Ok(peer) => Some(peer),
            Err(Errno::EBUSY) => return refused("its slave is exclusive (TIOCEXCL)", "run torpor as root"),
            Err(errno) => return Err(fail("TIOCGPTPEER")(errno)),
        },
        _ => None,
    };
    if let Some(peer) = &peer {
        if full && tty::unread(peer).is_ok_and(|typed| typed < HALF_FULL) {
            return refused("the output of its master is stopped (tcflow)", "start it (TCOON)");
        }
        let ends = Ends { master: fd.as_fd(), slave: peer.as_fd(), termios: &termios, packet: pty.packet };
        let discipline = tty::get(peer, libc::TIOCGETD).map_err(fail("TIOCGETD"))?;
        if discipline == tty::N_TTY && !ends.may_hold_something() {
            pty.exclusive.1 = tty::get(peer, libc::TIOCGEXCL).is_ok_and(|value| value != 0);
            return Ok(Ok(pty));
        }
    }
    let both = (fd.as_fd(), peer.as_ref().map(AsFd::as_fd));
    let found = guardian::look(master.pid, &name(master), both, &termios, pty.packet)?;
    let discipline;
    (discipline, pty.exclusive.1) = found.slave();
    if discipline != tty::N_TTY {
        return refused("its slave has a line discipline other than N_TTY", "set N_TTY (TIOCSETD)");
    }
    note(found.queues(), &mut pty);
    Ok(Ok(pty))
}

/// Whether the slave is open, and by whom.
fn state_of_slave(
    collector: &Collector,
    master: &Master,
    fd: &OwnedFd,
) -> std::result::Result<Slave, Refused> {
    // Told of a slave that all have closed; a read would give EIO.
    if tty::poll(fd, libc::POLLIN) & libc::POLLHUP != 0 {
        return Ok(Slave::Closed);
    }
    let tree = tree(collector);
    let slave = |held: &tty::Held| !held.master && counts(collector, held.pid, held.fd);
    let open = |pids: &[Pid]| tty::holders(pids, master.number, master.device).into_iter().find(slave);
    if open(&tree).is_some() || tree.iter().any(|pid| has_by_dev_tty(collector, *pid, master.number)) {
        return Ok(Slave::Open);
    }
    let others: Vec<Pid> =
        tty::everybody().into_iter().filter(|pid| !tree.contains(pid) && *pid != Pid::this()).collect();
    match open(&others) {
        None => Ok(Slave::Unopened),
        Some(held) => Err((
            format!(
                "only pid {} ({}), which is not part of the dump, has its slave open",
                held.pid,
                process::who_holds(held.pid.0).unwrap_or_else(|| "?".into())
            ),
            "dump a tree with both ends, or end that process",
        )),
    }
}

fn has_by_dev_tty(collector: &Collector, pid: Pid, number: u32) -> bool {
    let Ok(pidfd) = fds::pidfd_open(pid) else { return false };
    fds::list(pid).unwrap_or_default().into_iter().any(|fd| {
        counts(collector, pid, fd)
            && fds::readlink(pid, fd).is_ok_and(|link| link == b"/dev/tty")
            && fds::getfd(pidfd.as_fd(), fd).is_ok_and(|fd| {
                tty::device(&fd).is_ok_and(|d| tty::SLAVE_MAJORS.contains(&d.0) && d.1 == number)
            })
    })
}

/// What is on its way.
fn note(queues: &Queues, pty: &mut Pty) {
    pty.output = queues.output.filled().into();
    pty.lines = queues.lines().map(Bytes::from).collect();
    pty.unfinished = queues.unfinished.filled().into();
    pty.stop = match queues.stop() {
        tty_queue::Stop::No => Stop::No,
        tty_queue::Stop::Typed => Stop::Typed,
        tty_queue::Stop::Flow => Stop::Flow,
    };
}
