//! What becomes of the tree when its memory's server is killed.
//!
//! When the last descriptor of a userfaultfd is closed, its areas become ordinary memory (fs/userfaultfd.c,
//! `userfaultfd_release`): what is missing then reads as zeros, and nobody is told. So a second process has the same table
//! of descriptors (clone(2), `CLONE_FILES`), those that a fork of the tree brings later among them. It waits for the
//! server's end. If that comes before all memory is there, it ends the processes of the tree, and stays until the last
//! address space that misses memory is gone: who needs a page waits for it meanwhile, and is killed, too.
//!
//! Only if both are killed within the same moment is there nobody left. The child is in a session of its own, with all
//! signals blocked and under another name, so that what is aimed at the server misses it; and the server makes a new one
//! when it goes. It makes system calls only, on memory that was made ready, as other threads may hold locks.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use torpor_kernel::uffd::{Message, Userfaultfd};
use torpor_kernel::{Pid, fds};

/// The child; ended on drop.
#[derive(Debug)]
pub(super) struct Guard {
    pid: i32,
    pidfd: OwnedFd,
    /// The server, as the child knows it.
    _server: OwnedFd,
    done: Done,
}

/// A word shared with the child: 1 when all memory is there.
#[derive(Debug)]
struct Done(*mut libc::c_void);

// SAFETY: an address of a mapping of its own, used as an atomic.
unsafe impl Send for Done {}
// SAFETY: likewise.
unsafe impl Sync for Done {}

impl Done {
    fn new() -> nix::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, read_write, flags, -1, 0) };
        if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(Done(at)) }
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: the start of a page that lives as long as this.
        unsafe { AtomicU32::from_ptr(self.0.cast()) }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and by nobody else.
        unsafe { libc::munmap(self.0, 4096) };
    }
}

impl Guard {
    /// Starts it for these processes; `name` is told when they are ended.
    pub(super) fn start(tree: &[OwnedFd], name: &str) -> torpor_kernel::Result<Self> {
        let fail = |errno| torpor_kernel::Error::syscall("clone", "the guard of a lazy restore", errno);
        let done = Done::new().map_err(fail)?;
        let tree: Vec<i32> = tree.iter().map(AsRawFd::as_raw_fd).collect();
        let us = torpor_kernel::fds::pidfd_open(Pid(std::process::id().cast_signed()))?;
        let said = format!(
            "torpor: what served the memory of {name} was killed before all of it was there: the tree was ended\n"
        );
        let logged = format!("<26>{said}");
        // SAFETY: an all-zero sigset_t is a valid one.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: two sets of ours.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        }
        // SAFETY: a fork(2) that tells nobody when the child ends and shares the table of descriptors. The child makes
        // system calls on memory that was made ready, and exits.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
        if pid == 0 {
            watch(us.as_fd(), &tree, said.as_bytes(), logged.as_bytes(), &done);
        }
        let errno = Errno::last();
        // SAFETY: the set that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
        if pid < 0 {
            return Err(fail(errno));
        }
        let pidfd = torpor_kernel::fds::pidfd_open(Pid(pid as i32))?;
        Ok(Guard { pid: pid as i32, pidfd, _server: us, done })
    }

    /// Readable when it has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.done.word().store(1, Ordering::SeqCst);
        // SAFETY: numbers, and no place for a status; the child is ours and not reaped.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) < 0
                && Errno::last() == Errno::EINTR
            {}
        }
    }
}

fn watch(us: BorrowedFd<'_>, tree: &[i32], said: &[u8], logged: &[u8], done: &Done) -> ! {
    let mut end = libc::pollfd { fd: us.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: calls on numbers, a string that ends with a zero, and a structure of ours.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"lazy-guard".as_ptr());
        while libc::poll(&raw mut end, 1, -1) < 1 {}
    }
    if done.word().load(Ordering::SeqCst) == 0 {
        for pidfd in tree {
            // SAFETY: a copy of what we had when the guard was made, and never closed here.
            fds::end(unsafe { BorrowedFd::borrow_raw(*pidfd) });
        }
        say(said, logged);
        while end_stragglers() {
            pause();
        }
    }
    // SAFETY: the end of this process, which must run nothing of the one it is a copy of.
    unsafe {
        libc::syscall(libc::SYS_exit_group, 0);
        libc::abort()
    }
}

fn say(said: &[u8], logged: &[u8]) {
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
    for (to, from) in address.sun_path.iter_mut().zip(b"/dev/log") {
        *to = *from as libc::c_char;
    }
    let length = size_of::<libc::sockaddr_un>() as u32;
    // SAFETY: bytes and an address of ours. Where nobody listens nobody is told.
    unsafe {
        libc::write(2, said.as_ptr().cast(), said.len());
        let log = libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        libc::sendto(log, logged.as_ptr().cast(), logged.len(), 0, (&raw const address).cast(), length);
        libc::close(log);
    }
}

fn pause() {
    let moment = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    // SAFETY: a timespec of ours.
    unsafe { libc::nanosleep(&raw const moment, std::ptr::null_mut()) };
}

/// Ends who waits for memory, and closes what serves nobody any more; whether any is left.
fn end_stragglers() -> bool {
    let mut left = false;
    // SAFETY: a path that ends with a zero, and a buffer of ours.
    unsafe {
        let dir = libc::open(c"/proc/self/fd".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC);
        if dir < 0 {
            return true;
        }
        let mut entries = [0u64; 512];
        loop {
            let got = libc::syscall(libc::SYS_getdents64, dir, entries.as_mut_ptr(), size_of_val(&entries));
            if got <= 0 {
                break;
            }
            let bytes = std::slice::from_raw_parts(entries.as_ptr().cast::<u8>(), got as usize);
            let mut at = 0;
            // linux/dirent.h: inode, offset, length of the entry, type, name.
            while let Some(entry) = bytes.get(at..).filter(|rest| rest.len() > 19) {
                if let Some(fd) = number(&entry[19..])
                    && is_userfaultfd(dir, entry[19..].as_ptr().cast())
                {
                    left |= end_waiting(fd);
                }
                at += usize::from(u16::from_ne_bytes([entry[16], entry[17]])).max(20);
            }
        }
        libc::close(dir);
    }
    left
}

/// The number that these bytes begin with.
fn number(name: &[u8]) -> Option<i32> {
    let digits = name.iter().take_while(|c| c.is_ascii_digit());
    let value = digits.fold(None, |all: Option<i32>, c| {
        Some(all.unwrap_or(0).saturating_mul(10).saturating_add(i32::from(c - b'0')))
    });
    value.filter(|fd| *fd > 2)
}

/// # Safety
/// `name` ends with a zero.
unsafe fn is_userfaultfd(dir: i32, name: *const libc::c_char) -> bool {
    let mut target = [0u8; 64];
    // SAFETY: the name ends with a zero, says the caller; the buffer is ours.
    let got = unsafe { libc::readlinkat(dir, name, target.as_mut_ptr().cast(), target.len()) };
    got > 0 && target[..got as usize].windows(13).any(|w| w == b"[userfaultfd]")
}

/// Ends those who wait for this one; whether its address space is still there.
fn end_waiting(fd: i32) -> bool {
    // SAFETY: a descriptor of this table, of which nobody else takes care any more; it is not dropped here but below.
    let uffd = std::mem::ManuallyDrop::new(Userfaultfd::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }));
    // The faults that the server had read are not told of again by themselves.
    uffd.wake_all();
    let mut messages = [const { None }; 16];
    let count = uffd.read_into(&mut messages);
    for message in messages.into_iter().take(count).flatten() {
        match message {
            Message::Fault { thread, .. } => end_thread(thread),
            // The next look finds it.
            Message::Fork(child) => std::mem::forget(child),
            _ => {}
        }
    }
    if uffd.alive() {
        return true;
    }
    // SAFETY: as above; its memory is gone.
    unsafe { libc::close(fd) };
    false
}

/// Ends the process of a thread that waits for memory. Its number is that of its own pid namespace, so it is looked at
/// first whether ours of that number waits for memory.
pub(super) fn end_thread(thread: i32) {
    let mut path = *b"/proc/0000000000/wchan\0";
    let mut rest = thread;
    for digit in path[6..16].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    // /proc knows numbers without leading zeros only.
    let zeros = path[6..15].iter().take_while(|c| **c == b'0').count();
    path.copy_within(6 + zeros.., 6);
    let mut function = [0u8; 64];
    // SAFETY: a path that ends with a zero, a buffer of ours, numbers.
    unsafe {
        let file = libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        let got = libc::read(file, function.as_mut_ptr().cast(), function.len());
        libc::close(file);
        if got > 0 && function[..got as usize].starts_with(b"handle_userfault") {
            libc::kill(thread, libc::SIGKILL);
        }
    }
}
