//! A process that takes out what is on its way through a pseudo terminal, and puts it back.
//!
//! Terminals have no peek: to know what is on its way is to take it out. Were we killed in between, it would be
//! lost, and the terminal be left with other settings. So a process is forked off that does both without a pause,
//! and we only wait for it and read its notes. It has a session of its own and no signal but SIGKILL reaches it: it
//! ends its work, of some microseconds, whatever becomes of us. (Were we killed in just these, the program runs while
//! a part of its terminal's data is missing for as long.)
//!
//! A slave that all have closed is opened for that, which its master sees as long as it lasts; so the guardian opens
//! it, and not we.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_kernel::ids::Pid;
use torpor_kernel::tty::{self, Termios};
use torpor_kernel::tty_queue::{Ends, Queues};

use crate::error::{Error, Result};

/// How long it may take; each of its steps gives up after two seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a slave is opened that changes nothing.
pub(crate) const SLAVE: i32 = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;

/// What the guardian leaves.
#[repr(C)]
struct Notes {
    queues: Queues,
    /// Errno of taking out, then of putting back.
    errors: [i32; 2],
    /// TIOCGETD and TIOCGEXCL of the slave.
    discipline: i32,
    exclusive: i32,
    /// Set last.
    done: bool,
}

/// Memory that both have. Unmapped on drop.
pub(crate) struct Shared {
    notes: *mut Notes,
}

impl Shared {
    fn map() -> nix::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping wherever the kernel likes.
        let notes = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Notes>(), protection, flags, -1, 0) };
        if notes == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Shared { notes: notes.cast() })
    }

    /// What was on its way.
    pub(crate) fn queues(&self) -> &Queues {
        // SAFETY: the mapping is as large, all zeros are valid notes, and the guardian has ended.
        unsafe { &(*self.notes).queues }
    }

    /// The line discipline of the slave, and whether it is exclusive. With another discipline than `N_TTY` nothing was
    /// looked at.
    pub(crate) fn slave(&self) -> (i32, bool) {
        // SAFETY: as above.
        unsafe { ((*self.notes).discipline, (*self.notes).exclusive != 0) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.notes.cast(), size_of::<Notes>()) };
    }
}

/// Looks at what is on its way through the pair `name`, which nobody uses meanwhile. `slave` must not block; without it
/// the slave is opened.
pub(crate) fn look(
    pid: Pid,
    name: &str,
    (master, slave): (BorrowedFd<'_>, Option<BorrowedFd<'_>>),
    termios: &Termios,
    packet: bool,
) -> Result<Shared> {
    let doing = || format!("looking at what is on its way through {name}");
    let fail = |call| move |errno| torpor_kernel::Error::syscall(call, name, errno);
    let shared = Shared::map().map_err(fail("mmap")).map_err(Error::kernel(pid, doing()))?;
    let all = !0u64;
    let mut before = 0u64;
    // SAFETY: rt_sigprocmask reads and fills masks of eight bytes. The child calls nothing that allocates or locks,
    // and never returns.
    let child = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
        let child = libc::fork();
        if child == 0 {
            work((master, slave), termios, packet, &mut *shared.notes);
        }
        let errno = Errno::last();
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
        if child < 0 { Err(errno) } else { Ok(child) }
    };
    let child = child.map_err(fail("fork")).map_err(Error::kernel(pid, doing()))?;
    let broken = |what: &str| Error::Inconsistent { pid, what: format!("{}: {what}", doing()) };
    wait(child);
    // SAFETY: as in `queues`.
    if !unsafe { (*shared.notes).done } {
        return Err(broken("the process for that did not end as it should; some of it may be lost"));
    }
    // SAFETY: as in `queues`.
    match unsafe { (*shared.notes).errors } {
        [0, 0] => Ok(shared),
        [errno, 0] => Err(broken(&format!("it cannot be taken out: {}", Errno::from_raw(errno)))),
        [_, errno] => {
            Err(broken(&format!("it cannot be put back: {}; some of it is lost", Errno::from_raw(errno))))
        }
    }
}

fn work(
    (master, slave): (BorrowedFd<'_>, Option<BorrowedFd<'_>>),
    termios: &Termios,
    packet: bool,
    notes: &mut Notes,
) -> ! {
    // SAFETY: these take numbers, or a name that ends with a zero.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"tty-guardian".as_ptr());
        // No signal to our group or session shall meet it, and no terminal stop it.
        libc::setsid();
    }
    torpor_kernel::priority::urgent();
    let number = |result: nix::Result<()>| result.err().map_or(0, |errno| errno as i32);
    let opened = if slave.is_none() { Some(tty::peer(master, SLAVE)) } else { None };
    let slave = match &opened {
        Some(Ok(opened)) => Ok(opened.as_fd()),
        Some(Err(errno)) => Err(*errno),
        None => slave.ok_or(Errno::EBADF),
    };
    match slave {
        Ok(slave) => {
            notes.discipline = tty::get(slave, libc::TIOCGETD).unwrap_or(-1);
            notes.exclusive = tty::get(slave, libc::TIOCGEXCL).unwrap_or(0);
            let ends = Ends { master, slave, termios, packet };
            if notes.discipline == tty::N_TTY && ends.may_hold_something() {
                let taken = ends.take_out(&mut notes.queues);
                let put = ends.put_back(&notes.queues);
                notes.errors = [number(taken), number(put)];
            }
        }
        Err(errno) => notes.errors[0] = errno as i32,
    }
    notes.done = true;
    // SAFETY: takes a number; nothing of the parent's is run.
    unsafe { libc::_exit(0) }
}

/// Waits until the child has ended. Where SIGCHLD is ignored, nobody tells of it but ECHILD.
fn wait(child: i32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: no status is asked for.
        match unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) } {
            0 if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(20)),
            -1 if Errno::last() == Errno::EINTR => {}
            _ => return,
        }
    }
}
