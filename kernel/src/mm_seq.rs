//! Whether the memory map of a process has changed since it was last looked at.
//!
//! smaps tells the flags of areas, but walks all page tables for its counts: milliseconds for each GiB, which a stopped
//! process has to stand for. The kernel counts every change to the areas of an address space (include/linux/mmap_lock.h,
//! `mm_lock_seq`, with CONFIG_PER_VMA_LOCK): the count moves with each release of the lock that such a change takes, so
//! that readers without the lock may notice. Where it has not moved, what was read before still holds, but for the paths
//! of files, which change without it. The count is read from the kernel's own memory, with CAP_BPF and CAP_PERFMON.

use std::os::fd::BorrowedFd;

use crate::structures::Structures;
use crate::{Error, Result};

/// Where the count is: since 6.14 inside a seqcount_t.
const PATHS: [&str; 2] = ["mm_lock_seq.sequence", "mm_lock_seq"];

/// A way to look at the count.
#[derive(Debug)]
pub struct Look {
    kernel: Structures,
    offset: u64,
    areas: u64,
}

/// An address space at a moment. Equal to another one only if nothing has changed in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    mm: u64,
    count: u32,
    /// How many areas there are (`map_count`).
    areas: u32,
}

impl Look {
    /// Loads what is needed. An error where the kernel does not let us, does not describe itself, or does not count.
    pub fn open() -> Result<Self> {
        let kernel = Structures::open(&["mm_struct"])?;
        let offset = PATHS.iter().find_map(|path| kernel.offset("mm_struct", path).ok());
        let offset = offset.ok_or_else(|| Error::Parse {
            file: "/sys/kernel/btf/vmlinux".into(),
            what: "there is no mm_struct.mm_lock_seq".into(),
        })?;
        let areas = kernel.offset("mm_struct", "map_count")?;
        Ok(Look { kernel, offset, areas })
    }

    /// The address space behind an open /proc/PID/mem.
    pub fn state(&self, mem: BorrowedFd<'_>) -> Result<State> {
        // fs/proc/base.c, `__mem_open`
        let mm = self.kernel.private_data(self.kernel.file(mem)?)?;
        let number = |at: u64| Ok::<_, Error>(self.kernel.pointer(mm + at)? as u32);
        Ok(State { mm, count: number(self.offset)?, areas: number(self.areas)? })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn changes_of_areas_count_and_faults_do_not() {
        let look = match Look::open() {
            Ok(look) => look,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        // A process of its own: threads of this one map memory all the time.
        let (mut go, mut done) = (std::os::unix::net::UnixStream::pair().unwrap(), [0u8; 1]);
        use std::io::{Read, Write};
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above; memory of this process alone.
            unsafe {
                let fd = std::os::fd::AsRawFd::as_raw_fd(&go.1);
                let area = libc::mmap(
                    std::ptr::null_mut(),
                    1 << 20,
                    3,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                let mut byte = 0u8;
                loop {
                    libc::write(fd, (&raw const byte).cast(), 1);
                    if libc::read(fd, (&raw mut byte).cast(), 1) != 1 {
                        libc::_exit(0);
                    }
                    match byte {
                        b'w' => area.cast::<u8>().byte_add(8192).write_volatile(1),
                        b'f' => drop(libc::madvise(area, 4096, libc::MADV_DONTFORK)),
                        _ => drop(libc::mmap(std::ptr::null_mut(), 4096, 3, 0x22, -1, 0)),
                    }
                }
            }
        }
        go.0.read_exact(&mut done).unwrap();
        let mem = std::fs::File::open(format!("/proc/{child}/mem")).unwrap();
        let state = || look.state(mem.as_fd()).unwrap();
        let mut before = state();
        for (order, same) in [(b'w', true), (b'f', false), (b'w', true), (b'm', false)] {
            go.0.write_all(&[order]).unwrap();
            go.0.read_exact(&mut done).unwrap();
            let after = state();
            assert_eq!(after == before, same, "{}", order as char);
            before = after;
        }
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
    }
}
