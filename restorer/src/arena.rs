//! The executor and its arena in our own memory: a new task begins as a copy of us, so they are in its
//! memory at the same addresses, the arena shared.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use torpor_blob::BLOB;
use torpor_parasite::wire::Context;

use crate::description::owned;
use crate::error::{Error, Result};
use crate::plan::{Place, SHARED};

/// The mapping; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Arena {
    start: u64,
    length: u64,
    arena: u64,
    arena_length: u64,
}

impl Arena {
    /// Maps parking place, executor and arena where the plan wants them. `None` when that place has been
    /// taken since the plan was made.
    pub(crate) fn map(plan: Place, what: &str) -> Result<Option<Self>> {
        let length = plan.arena + plan.arena_length - plan.park;
        let reserve =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: NOREPLACE touches nothing that exists.
        let got = unsafe {
            libc::mmap(plan.park as *mut libc::c_void, length as usize, libc::PROT_NONE, reserve, -1, 0)
        };
        if got == libc::MAP_FAILED {
            return match Errno::last() {
                Errno::EEXIST => Ok(None),
                errno => Err(Error::Open { what: what.to_owned(), call: "mmap", errno }),
            };
        }
        let arena = Arena { start: plan.park, length, arena: plan.arena, arena_length: plan.arena_length };
        let blob_length = (plan.arena - plan.blob) as usize;
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: all within the range just reserved. The code is written before it becomes executable.
        unsafe {
            let blob = plan.blob as *mut libc::c_void;
            if libc::mprotect(blob, blob_length, read_write) != 0 {
                return Err(Error::last(what, "mprotect"));
            }
            std::ptr::copy_nonoverlapping(BLOB.as_ptr(), blob.cast::<u8>(), BLOB.len());
            if libc::mprotect(blob, blob_length, libc::PROT_READ | libc::PROT_EXEC) != 0 {
                return Err(Error::last(what, "mprotect"));
            }
        }
        // SAFETY: the name ends with a zero.
        let memfd = owned(what, "memfd_create", unsafe {
            libc::memfd_create(c"torpor-arena".as_ptr(), libc::MFD_CLOEXEC)
        })?;
        nix::unistd::ftruncate(&memfd, plan.arena_length as i64).map_err(Error::open(what, "ftruncate"))?;
        // SAFETY: replaces a part of the range reserved above.
        let got = unsafe {
            libc::mmap(
                plan.arena as *mut libc::c_void,
                plan.arena_length as usize,
                read_write,
                libc::MAP_SHARED | libc::MAP_FIXED,
                memfd.as_raw_fd(),
                0,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(Error::last(what, "mmap"));
        }
        Ok(Some(arena))
    }

    /// The arena's bytes, while no task runs in it.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped for reading and writing for as long as `self` lives; tasks that share it are
        // stopped or wait on a word that is only touched by `go`.
        unsafe { std::slice::from_raw_parts_mut(self.arena as *mut u8, self.arena_length as usize) }
    }

    /// Address of context `number`.
    pub(crate) fn context_address(&self, number: usize) -> u64 {
        self.arena + SHARED + (number * size_of::<Context>()) as u64
    }

    /// Context `number`.
    pub(crate) fn context(&mut self, number: usize) -> Context {
        let at = SHARED as usize + number * size_of::<Context>();
        Context::from_bytes(&self.bytes()[at..])
    }

    /// Replaces context `number`, whose thread is stopped.
    pub(crate) fn set_context(&mut self, number: usize, context: &Context) {
        let at = SHARED as usize + number * size_of::<Context>();
        self.bytes()[at..at + size_of::<Context>()].copy_from_slice(context.bytes());
    }

    /// Sets a shared word to 1 and wakes those who wait for it.
    pub(crate) fn go(&self, word: u32) {
        self.set(word, 1);
    }

    /// Sets a shared word so high that nobody waits for it any more.
    pub(crate) fn release(&self, word: u32) {
        self.set(word, u32::MAX / 2);
    }

    fn set(&self, word: u32, value: u32) {
        let address = (self.arena + 4 * u64::from(word)) as *mut u32;
        // SAFETY: an aligned word of the arena, used as an atomic by everybody.
        let atomic = unsafe { AtomicU32::from_ptr(address) };
        atomic.store(value, Ordering::Release);
        // SAFETY: FUTEX_WAKE only uses the address.
        unsafe { libc::syscall(libc::SYS_futex, address, libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Waits a moment until a shared word is at least `value`; whether it is.
    pub(crate) fn wait(&self, word: u32, value: u32) -> bool {
        let address = (self.arena + 4 * u64::from(word)) as *mut u32;
        // SAFETY: an aligned word of the arena, used as an atomic by everybody.
        let atomic = unsafe { AtomicU32::from_ptr(address) };
        let now = atomic.load(Ordering::Acquire);
        if now >= value {
            return true;
        }
        let moment = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        // SAFETY: FUTEX_WAIT reads the word and the timespec.
        unsafe { libc::syscall(libc::SYS_futex, address, libc::FUTEX_WAIT, now, &raw const moment) };
        atomic.load(Ordering::Acquire) >= value
    }

    /// Start and length of all of it.
    pub(crate) fn range(&self) -> (u64, u64) {
        (self.start, self.length)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` and by nobody else.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.length as usize) };
    }
}
