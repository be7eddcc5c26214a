//! Anonymous memory shared with children.

use nix::errno::Errno;

use crate::{Error, Result};

/// Zeroed memory that a child of ours shares with us. Only what is touched takes room.
#[derive(Debug)]
pub struct Shared {
    start: *mut u8,
    length: usize,
}

// SAFETY: the memory belongs to this value alone, like that of a Box.
unsafe impl Send for Shared {}

impl Shared {
    /// Maps `length` bytes, at least one.
    pub fn new(length: usize) -> Result<Self> {
        let length = length.max(1);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::syscall("mmap", length, Errno::last()));
        }
        Ok(Shared { start: start.cast(), length })
    }

    /// All of it. While a child runs, it is the child's.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped, initialized with zeros, and borrowed like the value itself.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody refers to any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}
