//! userfaultfd(2): missing pages of another process served from here.
//!
//! The descriptor belongs to the address space of whoever made the call; everything else can be done by whoever holds
//! it. While a call that changes the memory is under way (fork, mremap, munmap, madvise) and its event is not read,
//! the kernel fills nothing and says EAGAIN (fs/userfaultfd.c, `mmap_changing`), before it looks at any argument:
//! so an empty copy tells whether there is such a call.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Error, Result, abi};

/// include/uapi/linux/userfaultfd.h
const FEATURE_EVENTS: u64 = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 6);
const FEATURE_THREAD_ID: u64 = 1 << 8;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;
/// Messages taken by one read.
const MESSAGES: usize = 16;

const fn request(number: u32, size: usize, read: bool) -> libc::c_ulong {
    let direction = if read { 0x8000_0000 } else { 0xc000_0000u32 };
    (direction | (size as u32) << 16 | 0xaa << 8 | number) as libc::c_ulong
}
const UFFDIO_WAKE: libc::c_ulong = request(0x02, 16, true);
const UFFDIO_COPY: libc::c_ulong = request(0x03, 40, false);
const UFFDIO_ZEROPAGE: libc::c_ulong = request(0x04, 32, false);

/// A descriptor of userfaultfd(2). Dropped, its areas are ordinary memory again, and what is missing is zero.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

/// What happened in the process.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for the page at `address`.
    Fault {
        /// Where, to the page.
        address: u64,
        /// Whether it writes.
        write: bool,
        /// The thread, by its number in its own pid namespace.
        thread: i32,
    },
    /// It was forked; this serves the child.
    Fork(Userfaultfd),
    /// Memory was moved.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// Bytes.
        length: u64,
    },
    /// Pages are about to be forgotten: from now on they are zero.
    Remove {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// Memory was unmapped.
    Unmap {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

impl Userfaultfd {
    /// The flags of the call that makes one to be served from outside.
    pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

    /// One for this process. EPERM: without CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd` faults of the kernel itself
    /// are not served.
    pub fn new() -> Result<Self> {
        // SAFETY: takes a number.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, Self::FLAGS) };
        let fd = crate::error::check(fd, "userfaultfd", "this process")?;
        // SAFETY: a descriptor that was just made.
        Ok(Userfaultfd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// One that another process has made.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Userfaultfd(fd)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, call: &'static str, argument: &mut T) -> Result<()> {
        // SAFETY: `argument` is the structure of this ioctl.
        let got = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
        if got == 0 { Ok(()) } else { Err(Error::last(call, "userfaultfd")) }
    }

    /// The first of all: agrees on being told of forks and of moved, forgotten and unmapped memory.
    pub fn handshake(&self) -> Result<()> {
        let features = FEATURE_EVENTS | FEATURE_THREAD_ID;
        let mut api = abi::uffdio_api { api: abi::UFFD_API, features, ioctls: 0 };
        self.ioctl(abi::UFFDIO_API, "UFFDIO_API", &mut api)
    }

    /// From now on faults of missing pages from `start` to `end` wait for us.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        let mut argument = [start, end - start, REGISTER_MODE_MISSING, 0];
        self.ioctl(abi::UFFDIO_REGISTER, "UFFDIO_REGISTER", &mut argument)
    }

    /// Makes the pages at `to` of `bytes`, and wakes who waits for them. How many bytes were taken, and what stopped it.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> (u64, Option<Errno>) {
        let mut argument = [to, bytes.as_ptr().addr() as u64, bytes.len() as u64, 0, 0];
        // SAFETY: the structure of this ioctl; the kernel reads `bytes`.
        let got = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY as _, argument.as_mut_ptr()) };
        outcome(got, argument[4], bytes.len() as u64)
    }

    /// Makes a page of zeros, and wakes who waits for it.
    pub fn zero(&self, page: u64) -> Option<Errno> {
        let mut argument = [page, 4096, 0, 0];
        // SAFETY: the structure of this ioctl.
        let got = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE as _, argument.as_mut_ptr()) };
        outcome(got, argument[3], 4096).1
    }

    /// Wakes who waits for this page, to look again.
    pub fn wake(&self, page: u64) {
        let mut argument = [page, 4096];
        // What is not registered any more has nobody who waits.
        let _none = self.ioctl(UFFDIO_WAKE, "UFFDIO_WAKE", &mut argument);
    }

    /// Wakes all who wait for a page: those whose fault was read by somebody who is gone tell of it again.
    pub fn wake_all(&self) {
        let start = 1 << 16;
        let mut argument = [start, arch::TASK_SIZE - start];
        let _none = self.ioctl(UFFDIO_WAKE, "UFFDIO_WAKE", &mut argument);
    }

    /// Whether no call that changes the memory is under way whose event was not read.
    pub fn quiet(&self) -> bool {
        self.copy(0, &[]).1 != Some(Errno::EAGAIN)
    }

    /// Whether the address space is still there: a page that no process has is refused in another way than one of a process
    /// that is gone. Only for those that are to end.
    pub fn alive(&self) -> bool {
        self.zero(1 << 16) != Some(Errno::ESRCH)
    }

    /// What has happened, as far as one read tells; nothing if nothing has.
    pub fn read(&self) -> Result<Vec<Message>> {
        let mut messages = [const { None }; MESSAGES];
        match self.read_into(&mut messages) {
            0 if !matches!(Errno::last(), Errno::EAGAIN | Errno::EINTR) => {
                Err(Error::last("read", "userfaultfd"))
            }
            count => Ok(messages.into_iter().take(count).flatten().collect()),
        }
    }

    /// The same without memory of its own; how many there are, none after an error.
    pub fn read_into(&self, messages: &mut [Option<Message>; MESSAGES]) -> usize {
        let mut bytes = [0u8; MESSAGE * MESSAGES];
        // SAFETY: the buffer is ours.
        let got = unsafe { libc::read(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        let count = usize::try_from(got).unwrap_or(0) / MESSAGE;
        for (message, bytes) in messages.iter_mut().zip(bytes.chunks_exact(MESSAGE)).take(count) {
            *message = decode(bytes);
        }
        count
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel writes how many bytes it took, or the error if it took none.
fn outcome(got: i32, taken: u64, wanted: u64) -> (u64, Option<Errno>) {
    if got == 0 {
        return (wanted, None);
    }
    let errno = Errno::last();
    let taken = taken.cast_signed();
    if taken > 0 { (taken.cast_unsigned().min(wanted), Some(errno)) } else { (0, Some(errno)) }
}

fn decode(message: &[u8]) -> Option<Message> {
    let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    match message[0] {
        EVENT_PAGEFAULT => {
            let (flags, address) = (word(8), word(16) & !4095);
            let thread = u32::from_ne_bytes(message[24..28].try_into().expect("four bytes")).cast_signed();
            Some(Message::Fault { address, write: flags & PAGEFAULT_FLAG_WRITE != 0, thread })
        }
        EVENT_FORK => {
            let fd = u32::from_ne_bytes(message[8..12].try_into().expect("four bytes"));
            // SAFETY: the kernel has just made it for us.
            Some(Message::Fork(Userfaultfd(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) })))
        }
        EVENT_REMAP => Some(Message::Remap { from: word(8), to: word(16), length: word(24) }),
        EVENT_REMOVE => Some(Message::Remove { start: word(8), end: word(16) }),
        EVENT_UNMAP => Some(Message::Unmap { start: word(8), end: word(16) }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_our_own_is_served() {
        let Ok(uffd) = Userfaultfd::new() else {
            eprintln!("skipped: no userfaultfd that serves the kernel's faults");
            return;
        };
        if let Err(e) = uffd.handshake() {
            eprintln!("skipped: {e}");
            return;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let start = at.addr() as u64;
        uffd.register(start, start + 8192).unwrap();
        assert!(uffd.quiet());
        assert_eq!(uffd.copy(start, &[7; 4096]), (4096, None));
        assert_eq!(uffd.copy(start, &[8; 8192]), (0, Some(Errno::EEXIST)));
        assert_eq!(uffd.zero(start + 4096), None);
        assert!(uffd.read().unwrap().is_empty());
        // SAFETY: both pages are there.
        unsafe {
            assert_eq!(at.cast::<u8>().read(), 7);
            assert_eq!(at.cast::<u8>().add(4096).read(), 0);
            libc::munmap(at, 0);
        }
    }
}
