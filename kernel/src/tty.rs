//! Terminals: the ioctls of tty devices that nix and libc do not wrap (ioctl_tty(2)).
//!
//! Most requests made of a pseudo-terminal master are about its slave: settings, window size, foreground group and the
//! device number (drivers/tty/tty_ioctl.c and tty_io.c take the other end of the pair for them). Reading, unread
//! bytes, exclusive mode and flow are of the end that is asked.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use crate::text::{list_numbers, read, readlink};
use crate::{Pid, fds};

/// Major number of pseudo-terminal slaves of devpts, and all majors devices.txt keeps for them.
pub const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// Device of /dev/tty.
pub const TTY: (u32, u32) = (5, 0);
/// Device of /dev/console.
pub const CONSOLE: (u32, u32) = (5, 1);
/// Device of /dev/ptmx.
pub const PTMX: (u32, u32) = (5, 2);
/// The usual line discipline (linux/tty.h).
pub const N_TTY: i32 = 0;
/// Input is processed elsewhere (asm-generic/termbits.h).
pub const EXTPROC: u32 = 0o200_000;
/// linux/magic.h
const DEVPTS_SUPER_MAGIC: libc::__fsword_t = 0x1cd1;

/// `struct termios2` (asm-generic/termbits.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Termios {
    /// Input modes.
    pub iflag: u32,
    /// Output modes.
    pub oflag: u32,
    /// Control modes.
    pub cflag: u32,
    /// Local modes.
    pub lflag: u32,
    /// Line discipline.
    pub line: u8,
    /// Special characters.
    pub cc: [u8; 19],
    /// Input speed.
    pub ispeed: u32,
    /// Output speed.
    pub ospeed: u32,
}

const _: () = assert!(size_of::<Termios>() == Termios::SIZE);

impl Termios {
    /// Its size in bytes.
    pub const SIZE: usize = 44;

    /// Its memory.
    pub fn bytes(&self) -> [u8; Self::SIZE] {
        // SAFETY: repr(C) of integers, without padding as the asserted size shows.
        unsafe { std::mem::transmute(*self) }
    }

    /// The structure that these bytes are the memory of.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; Self::SIZE] = bytes.try_into().ok()?;
        // SAFETY: any bytes are valid integers, and the sizes are equal.
        Some(unsafe { std::mem::transmute::<[u8; Self::SIZE], Self>(bytes) })
    }

    /// Whether input is read line by line. With `EXTPROC` it is not, whatever `ICANON` says (drivers/tty/n_tty.c).
    pub fn by_lines(&self) -> bool {
        self.lflag & libc::ICANON != 0 && self.lflag & EXTPROC == 0
    }
}

/// The settings; of a master, its slave's (TCGETS2).
pub fn termios(fd: impl AsFd) -> nix::Result<Termios> {
    let mut bytes = [0u8; Termios::SIZE];
    // SAFETY: TCGETS2 fills a struct termios2, whose size this is.
    Errno::result(unsafe { libc::ioctl(raw(&fd), libc::TCGETS2, bytes.as_mut_ptr()) })?;
    Termios::from_bytes(&bytes).ok_or(Errno::EINVAL)
}

/// Sets them at once, without waiting for anything or flushing (TCSETS2).
pub fn set_termios(fd: impl AsFd, termios: &Termios) -> nix::Result<()> {
    // SAFETY: `termios` is a struct termios2.
    let set = unsafe { libc::ioctl(raw(&fd), TCSETS2, std::ptr::from_ref(termios)) };
    Errno::result(set).map(drop)
}

const TCSETS2: libc::Ioctl = 0x402c_542b;
const TIOCSPTLCK: libc::Ioctl = 0x4004_5431;
const TIOCGPTN: libc::Ioctl = 0x8004_5430_u32 as libc::Ioctl;

/// Whether any of the settings is locked (TIOCGLCKTRMIOS).
pub fn is_locked(fd: impl AsFd) -> nix::Result<bool> {
    // The request fills a `struct termios`, which is shorter than a termios2.
    let mut bytes = [0u8; Termios::SIZE];
    // SAFETY: there is room for more than it fills.
    Errno::result(unsafe { libc::ioctl(raw(&fd), libc::TIOCGLCKTRMIOS, bytes.as_mut_ptr()) })?;
    Ok(bytes.iter().any(|b| *b != 0))
}

/// Rows, columns, and both in pixels.
pub fn size(fd: impl AsFd) -> nix::Result<[u16; 4]> {
    let mut size = [0u16; 4];
    // SAFETY: TIOCGWINSZ fills a struct winsize, four such numbers.
    Errno::result(unsafe { libc::ioctl(raw(&fd), libc::TIOCGWINSZ, size.as_mut_ptr()) })?;
    Ok(size)
}

/// Sets the size. The foreground group gets SIGWINCH if it differs.
pub fn set_size(fd: impl AsFd, size: [u16; 4]) -> nix::Result<()> {
    // SAFETY: TIOCSWINSZ reads a struct winsize.
    Errno::result(unsafe { libc::ioctl(raw(&fd), libc::TIOCSWINSZ, size.as_ptr()) }).map(drop)
}

/// A request that fills an int: TIOCGPKT, TIOCGPTLCK, TIOCGEXCL, TIOCGETD.
pub fn get(fd: impl AsFd, request: libc::Ioctl) -> nix::Result<i32> {
    let mut value = 0i32;
    // SAFETY: the requests named fill an int.
    Errno::result(unsafe { libc::ioctl(raw(&fd), request, &raw mut value) })?;
    Ok(value)
}

/// A request that reads an int: TIOCPKT, TIOCSPTLCK.
fn set(fd: BorrowedFd<'_>, request: libc::Ioctl, value: i32) -> nix::Result<()> {
    // SAFETY: the requests named read an int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) }).map(drop)
}

/// Sets the packet mode of a master (TIOCPKT). Switching it on forgets status that was not read.
pub fn set_packet_mode(master: impl AsFd, on: bool) -> nix::Result<()> {
    set(master.as_fd(), libc::TIOCPKT, on.into())
}

/// Sets the lock of a master, with which its slave cannot be opened (TIOCSPTLCK).
pub fn set_lock(master: impl AsFd, locked: bool) -> nix::Result<()> {
    set(master.as_fd(), TIOCSPTLCK, locked.into())
}

/// Makes an end exclusive (TIOCEXCL).
pub fn set_exclusive(fd: impl AsFd) -> nix::Result<()> {
    request(fd, libc::TIOCEXCL, 0)
}

/// Hangs a terminal up, as seen by all who have it open (TIOCVHANGUP).
pub fn hang_up(fd: impl AsFd) -> nix::Result<()> {
    request(fd, libc::TIOCVHANGUP, 0)
}

/// Stops or starts the output of an end (TCXONC).
pub fn flow(fd: impl AsFd, action: i32) -> nix::Result<()> {
    request(fd, libc::TCXONC, action)
}

fn request(fd: impl AsFd, request: libc::Ioctl, value: i32) -> nix::Result<()> {
    // SAFETY: the callers' requests take a number or nothing.
    Errno::result(unsafe { libc::ioctl(raw(&fd), request, value) }).map(drop)
}

/// N of the slave /dev/pts/N of a master (TIOCGPTN).
pub fn number(master: impl AsFd) -> nix::Result<u32> {
    get(master, TIOCGPTN).map(i32::cast_unsigned)
}

/// Opens the slave of a master, through no path (TIOCGPTPEER).
pub fn peer(master: impl AsFd, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes a number.
    let fd = Errno::result(unsafe { libc::ioctl(raw(&master), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the descriptor was just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Major and minor of the terminal that a descriptor leads to: of /dev/tty the real one, of a master its slave's.
pub fn device(fd: impl AsFd) -> nix::Result<(u32, u32)> {
    let encoded = get(fd, libc::TIOCGDEV)?.cast_unsigned();
    // `new_encode_dev` (include/linux/kdev_t.h).
    Ok(((encoded >> 8) & 0xfff, (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00)))
}

/// Bytes that can be read. Of a terminal read by lines, those of finished ones.
pub fn unread(fd: impl AsFd) -> nix::Result<usize> {
    get(fd, libc::FIONREAD).map(|n| n.max(0) as usize)
}

/// What poll(2) says at once. It also carries on what was written to the other end and is on its way.
pub fn poll(fd: impl AsFd, events: i16) -> i16 {
    let mut poll = libc::pollfd { fd: raw(&fd), events, revents: 0 };
    // SAFETY: one structure.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents
}

/// Whether a file lies on a devpts file system.
pub fn is_on_devpts(fd: impl AsFd) -> bool {
    // SAFETY: an all-zero statfs is valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatfs fills the structure.
    unsafe { libc::fstatfs(raw(&fd), &raw mut found) == 0 && found.f_type == DEVPTS_SUPER_MAGIC }
}

fn raw(fd: &impl AsFd) -> i32 {
    fd.as_fd().as_raw_fd()
}

/// An end of a pseudo terminal that a process has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The process.
    pub pid: Pid,
    /// Its descriptor.
    pub fd: i32,
    /// Whether that is the master.
    pub master: bool,
}

/// The ends of the pseudo terminal with this number that processes have open, as far as they may be looked at.
/// `device` is that of its devpts.
pub fn holders(pids: &[Pid], number: u32, device: u64) -> Vec<Held> {
    let mut held = Vec::new();
    for &pid in pids {
        for fd in fds::list(pid).unwrap_or_default() {
            let Ok(link) = readlink(&format!("/proc/{pid}/fd/{fd}")) else { continue };
            // Other files are left alone: to look at them may take long.
            let name = link.rsplit(|b| *b == b'/').next().unwrap_or_default();
            if name != b"ptmx" && !name.iter().all(u8::is_ascii_digit) {
                continue;
            }
            let Ok(stat) = fds::stat(pid, fd) else { continue };
            if stat.st_mode & libc::S_IFMT != libc::S_IFCHR {
                continue;
            }
            let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
            let master = (major, minor) == PTMX
                && index(pid, fd) == Some(number)
                && (stat.st_dev == device || pts_beside(&link) == Some(device));
            let slave = SLAVE_MAJORS.contains(&major) && minor == number && stat.st_dev == device;
            if master || slave {
                held.push(Held { pid, fd, master });
            }
        }
    }
    held
}

/// The device of the devpts that /dev/ptmx, or another file like it, leads to (fs/devpts/inode.c, `devpts_mntget`).
pub fn pts_beside(ptmx: &[u8]) -> Option<u64> {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(ptmx));
    nix::sys::stat::stat(&path.parent()?.join("pts")).ok().map(|stat| stat.st_dev)
}

/// Every process there is.
pub fn everybody() -> Vec<Pid> {
    list_numbers("/proc").unwrap_or_default().into_iter().map(Pid).collect()
}

/// The number that fdinfo tells of a master (`tty-index`).
pub fn index(pid: Pid, fd: i32) -> Option<u32> {
    let text = read(&format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find_map(|l| l.strip_prefix("tty-index:")).and_then(|n| n.trim().parse().ok())
}
