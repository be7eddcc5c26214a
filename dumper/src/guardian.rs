//! A child that puts sockets back should we be killed.
//!
//! A descriptor from pidfd_getfd(2) is the target's own socket: what is changed there for a look (repair mode, a
//! filter, the peek offset) stays changed when we are killed in the middle. So before anything is changed a child is
//! made that holds the sockets too, knows what to set to what, and waits for an order or for our death: then it sets
//! everything and exits. So the way taken after our death is the one taken every time.
//!
//! It must hear of our death before the target goes on. The kernel lets go of what a thread traces late in that
//! thread's end (kernel/exit.c, `exit_notify`), closes descriptors a moment before that if no other thread has them
//! (`exit_files`), but looks at the futexes that a thread holds first of all (`exit_mm_release`), before it takes its
//! memory apart. So the child waits for a futex of the tracing thread's robust list, at whose end the kernel wakes
//! it (Documentation/locking/robust-futex-ABI.rst), and does so with a real-time priority where it may. Another
//! processor may not be running at all just then (a virtual one, on a busy host), so what is put back in a moment is put
//! back on the very processor on which we end: the child takes it from us, with all that we still trace standing.
//!
//! Where the target is to end, one process must not end without the others, nor what they held be undone. That is decided
//! by one word, written when the image is complete: from then on nothing is put back any more, and the child, not we, ends
//! the processes; nothing but its own death keeps it from that.
//!
//! The child is a copy of us (of our memory it shares the page with the words only) that makes system calls only. It
//! is in a session of its own with all signals blocked and under another name, so that what is aimed at us misses it,
//! and ends without SIGCHLD (clone(2), exit signal 0).

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use torpor_kernel::priority::{Stay, urgent};

use crate::robust::{Held, wake};

/// How long sockets are kept for: about as long as a peer goes on asking (tcp(7), `tcp_retries2`).
const PATIENCE: libc::timespec = libc::timespec { tv_sec: 15 * 60, tv_nsec: 0 };
/// After which time one that does not answer is looked for.
const ANSWER: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What the child is to do.
mod order {
    pub(super) const UNDO: u32 = 1;
    pub(super) const END: u32 = 2;
}
/// No answer yet; else it is 0 or an errno.
const NONE: u32 = u32::MAX;

/// One option to be set.
#[derive(Debug)]
pub(crate) struct Undo {
    fd: i32,
    level: i32,
    name: i32,
    value: Vec<u8>,
}

impl Undo {
    /// setsockopt(2) with a number.
    pub(crate) fn number(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Self {
        Undo { fd: fd.as_raw_fd(), level, name, value: value.to_ne_bytes().into() }
    }

    /// The filter program as it was; none if it is empty.
    pub(crate) fn filter(fd: BorrowedFd<'_>, program: &[u8]) -> Self {
        let name = if program.is_empty() { libc::SO_DETACH_FILTER } else { libc::SO_ATTACH_FILTER };
        let value = if program.is_empty() { vec![0; 4] } else { program.to_vec() };
        Undo { fd: fd.as_raw_fd(), level: libc::SOL_SOCKET, name, value }
    }
}

/// The child. Dropped, it has put everything back.
///
/// It watches the thread that made it, so this cannot be sent to another.
#[derive(Debug)]
pub(crate) struct Guardian {
    pid: i32,
    held: Held,
    /// Whether it has been told to end the processes, and has done so.
    stays: bool,
    /// On the processor where it is as well.
    stay: Option<Stay>,
    _bound_to_thread: PhantomData<*const ()>,
}

impl Guardian {
    /// Starts it for a moment; from now on everything of `undo` happens when we end. Until it is dropped this thread
    /// stays on one processor.
    pub(crate) fn start(undo: &[Undo]) -> Result<Self, Errno> {
        Self::start_with(undo, &[], Stay::here())
    }

    /// Likewise, for processes (by their pidfds) that shall [`Guardian::end`].
    pub(crate) fn start_for(undo: &[Undo], processes: &[OwnedFd]) -> Result<Self, Errno> {
        Self::start_with(undo, processes, None)
    }

    fn start_with(undo: &[Undo], processes: &[OwnedFd], stay: Option<Stay>) -> Result<Self, Errno> {
        let programs = programs(undo);
        let calls = calls(undo, &programs);
        let processes: Vec<i32> = processes.iter().map(AsRawFd::as_raw_fd).collect();
        let mut keep: Vec<i32> = undo.iter().map(|u| u.fd).collect();
        keep.extend(&processes);
        keep.sort_unstable();
        keep.dedup();
        let held = Held::new()?;
        held.word(ANSWERED).store(NONE, Ordering::SeqCst);
        let work =
            Work { keep: &keep, undo: &calls, processes: &processes, held: &held, stay: stay.as_ref() };
        // SAFETY: an all-zero sigset_t is a valid one.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: two sets of ours.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        }
        // SAFETY: without flags a fork(2) that tells nobody when the child ends. The child makes system calls on
        // memory that was made ready, and exits.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: this is the child.
            unsafe { work.run() }
        }
        let errno = Errno::last();
        // SAFETY: the set that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
        if pid < 0 {
            return Err(errno);
        }
        let mut guardian =
            Guardian { pid: pid as i32, held, stays: false, stay, _bound_to_thread: PhantomData };
        // On a busy machine it may be long until it has its first turn, and with that its priority.
        if guardian.await_word(READY, 0)? != FIRST {
            guardian.stay = None;
        }
        Ok(guardian)
    }

    /// The image is complete: ends the processes, whatever becomes of us from here on.
    /// The child keeps the sockets, as they are then, until somebody takes over their addresses or [`PATIENCE`] is over.
    /// On error everything has been put back.
    ///
    /// Were we killed now, threads might run on before the child gets its turn: `bind` lets the kernel end the
    /// processes with us.
    pub(crate) fn end(mut self, bind: impl FnOnce()) -> Result<(), Errno> {
        self.held.word(ORDER).store(order::END, Ordering::SeqCst);
        bind();
        self.held.let_go();
        match self.await_word(ANSWERED, NONE)? {
            0 => {
                self.stays = true;
                Ok(())
            }
            errno => Err(Errno::from_raw(errno.cast_signed())),
        }
    }

    /// Waits until the child has written something else than `before`.
    fn await_word(&self, index: usize, before: u32) -> Result<u32, Errno> {
        let word = self.held.word(index);
        let patience = ANSWER;
        loop {
            let now = word.load(Ordering::SeqCst);
            if now != before {
                return Ok(now);
            }
            // SAFETY: FUTEX_WAIT on a word of ours, with a timeout; waitpid without a place for a status.
            unsafe {
                let patience = &raw const patience;
                libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, before, patience, 0, 0);
                if word.load(Ordering::SeqCst) == before
                    && libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) != 0
                {
                    return Err(Errno::ECHILD);
                }
            }
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if self.held.word(ORDER).load(Ordering::SeqCst) == 0 {
            self.held.word(ORDER).store(order::UNDO, Ordering::SeqCst);
            self.held.let_go();
        }
        loop {
            // SAFETY: waitpid takes numbers and no place for a status; the child is ours and not reaped.
            let got = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) };
            if got >= 0 || Errno::last() != Errno::EINTR {
                return;
            }
        }
    }
}

/// Words of the shared page: what the child is to do, what came of it, and whether it stands ready.
const ORDER: usize = 0;
const ANSWERED: usize = 1;
const READY: usize = 2;
/// In [`READY`]: it comes before whatever else wants its processor, or when the kernel thinks best.
const FIRST: u32 = 2;
const SOMETIME: u32 = 1;

fn programs(options: &[Undo]) -> Vec<libc::sock_fprog> {
    options
        .iter()
        .map(|u| libc::sock_fprog {
            len: (u.value.len() / 8) as u16,
            filter: u.value.as_ptr().cast_mut().cast(),
        })
        .collect()
}

fn calls(options: &[Undo], programs: &[libc::sock_fprog]) -> Vec<Call> {
    options
        .iter()
        .zip(programs)
        .map(|(u, program)| {
            let attach = u.level == libc::SOL_SOCKET && u.name == libc::SO_ATTACH_FILTER;
            let (value, length) = if attach {
                (std::ptr::from_ref(program).cast(), size_of::<libc::sock_fprog>())
            } else {
                (u.value.as_ptr().cast::<libc::c_void>(), u.value.len())
            };
            Call { fd: u.fd, level: u.level, name: u.name, value, length }
        })
        .collect()
}

struct Call {
    fd: i32,
    level: i32,
    name: i32,
    value: *const libc::c_void,
    length: usize,
}

impl Call {
    /// setsockopt(2); 0 or an errno.
    ///
    /// # Safety
    /// The value must be as long as it says.
    unsafe fn make(&self) -> u32 {
        // SAFETY: as the caller promises.
        unsafe {
            let done =
                libc::syscall(libc::SYS_setsockopt, self.fd, self.level, self.name, self.value, self.length);
            if done == 0 { 0 } else { (*libc::__errno_location()).cast_unsigned() }
        }
    }
}

/// All that the child needs.
struct Work<'w> {
    keep: &'w [i32],
    undo: &'w [Call],
    processes: &'w [i32],
    held: &'w Held,
    stay: Option<&'w Stay>,
}

impl Work<'_> {
    /// # Safety
    /// Must be called in a child made for it, whose descriptors nobody else uses.
    unsafe fn run(&self) -> ! {
        // SAFETY: system calls on numbers, and on memory that this process has to itself.
        unsafe {
            libc::syscall(libc::SYS_setsid);
            libc::syscall(libc::SYS_chdir, c"/".as_ptr());
            libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, c"tcp-guardian".as_ptr(), 0, 0, 0);
            let ready = if urgent() { FIRST } else { SOMETIME };
            if let Some(stay) = self.stay.filter(|_| ready != FIRST) {
                // There it would wait until we are gone for good.
                stay.leave();
            }
            let mut from = 0u32;
            for fd in self.keep {
                let fd = fd.cast_unsigned();
                if fd > from {
                    libc::syscall(libc::SYS_close_range, from, fd - 1, 0);
                }
                from = fd + 1;
            }
            libc::syscall(libc::SYS_close_range, from, u32::MAX, 0);
            self.held.word(READY).store(ready, Ordering::SeqCst);
            wake(self.held.word(READY));
            self.held.wait();
            if self.held.word(ORDER).load(Ordering::SeqCst) == order::END && self.end() {
                let patience = PATIENCE;
                libc::syscall(libc::SYS_ppoll, 0, 0, &raw const patience, 0, 0);
            } else {
                for call in self.undo {
                    call.make();
                }
            }
            loop {
                libc::syscall(libc::SYS_exit_group, 0);
            }
        }
    }

    /// Ends the processes. False, with nothing ended, when that is not possible.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn end(&self) -> bool {
        // SAFETY: system calls on numbers, and the calls that were made ready.
        unsafe {
            let signal = |fd: &i32, signal: i32| {
                let sent = libc::syscall(libc::SYS_pidfd_send_signal, *fd, signal, 0, 0);
                // One that is gone already has ended.
                if sent == 0 || *libc::__errno_location() != libc::EPERM { 0 } else { Errno::EPERM as u32 }
            };
            let mut failed = 0;
            for fd in self.processes {
                failed = if failed == 0 { signal(fd, 0) } else { failed };
            }
            if failed == 0 {
                for fd in self.processes {
                    signal(fd, libc::SIGKILL);
                }
            } else {
                for call in self.undo {
                    call.make();
                }
            }
            let answer: &AtomicU32 = self.held.word(ANSWERED);
            answer.store(failed, Ordering::SeqCst);
            wake(answer);
            failed == 0
        }
    }
}
