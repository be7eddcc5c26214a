//! Another process's memory, by file and by call.
//!
//! /proc/PID/mem ignores page protection (`FOLL_FORCE`: a read-only or execute-only private mapping can be read and
//! written), does not need the address space to be ours, and stays bound to the address space it was opened on, even
//! after execve. It cannot reach the vvar pages or guard pages (`EIO`). process_vm_readv(2) honours protection, and breaks
//! copy-on-write sharing page by page: for small pieces only.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::error::check;
use crate::{Error, Pid, RemoteAddr, Result};

/// The memory of a process, as a file.
#[derive(Debug)]
pub struct Memory {
    pid: Pid,
    file: File,
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Memory {
    /// Opens /proc/PID/mem. Access is checked here, once: same as for attaching with ptrace.
    pub fn open(pid: Pid, write: bool) -> Result<Memory> {
        let path = format!("/proc/{pid}/mem");
        let file = File::options().read(true).write(write).open(&path);
        Ok(Memory { pid, file: file.map_err(|error| Error::io("open", path, &error))? })
    }

    /// Whose memory.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The open file, for callers with their own way of reading.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills the buffer. `EIO` where nothing is mapped, also when only the tail is missing; then `buffer` is half filled.
    pub fn read_exact_at(&self, address: RemoteAddr, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = address.offset(done as u64);
            let got = match self.file.read_at(&mut buffer[done..], at.0) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                got => got.map_err(|error| Error::io("pread", self.object(at), &error))?,
            };
            if got == 0 {
                // End of file: the process has let go of its address space (fs/proc/base.c `mem_rw`).
                return Err(Error::syscall("pread", self.object(at), Errno::ESRCH));
            }
            done += got;
        }
        Ok(())
    }

    /// Writes all bytes, whatever the protection of the pages.
    pub fn write_all_at(&self, address: RemoteAddr, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.offset(done as u64);
            let got = match self.file.write_at(&bytes[done..], at.0) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                got => got.map_err(|error| Error::io("pwrite", self.object(at), &error))?,
            };
            if got == 0 {
                return Err(Error::syscall("pwrite", self.object(at), Errno::ESRCH));
            }
            done += got;
        }
        Ok(())
    }

    /// A word.
    pub fn read_u64(&self, address: RemoteAddr) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read_exact_at(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Writes a word.
    pub fn write_u64(&self, address: RemoteAddr, value: u64) -> Result<()> {
        self.write_all_at(address, &value.to_ne_bytes())
    }

    fn object(&self, at: RemoteAddr) -> String {
        format!("/proc/{}/mem at {at}", self.pid)
    }
}

/// Reads scattered pieces, one behind the other, with one process_vm_readv(2) for at most 1,024 of them; how many bytes,
/// which is fewer than asked where one is not mapped.
pub fn process_vm_read_pieces(pid: Pid, pieces: &[(RemoteAddr, usize)], buffer: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote: Vec<libc::iovec> = pieces
        .iter()
        .map(|(at, len)| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(at.0 as usize),
            iov_len: *len,
        })
        .collect();
    // SAFETY: `local` is our own buffer, exclusively borrowed; the remote addresses are checked by the kernel.
    let got = unsafe {
        let count = remote.len() as libc::c_ulong;
        libc::process_vm_readv(pid.0, &raw const local, 1, remote.as_ptr(), count, 0)
    };
    let got = check(got as libc::c_long, "process_vm_readv", pid)?;
    Ok(usize::try_from(got).unwrap_or(0))
}

/// Reads with process_vm_readv(2); how many bytes, which is fewer than asked where the mapping ends.
pub fn process_vm_read(pid: Pid, address: RemoteAddr, buffer: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote =
        libc::iovec { iov_base: std::ptr::without_provenance_mut(address.0 as usize), iov_len: buffer.len() };
    // SAFETY: `local` is our own buffer, exclusively borrowed; the remote address is checked by the kernel.
    let got = unsafe { libc::process_vm_readv(pid.0, &raw const local, 1, &raw const remote, 1, 0) };
    let got = check(got as libc::c_long, "process_vm_readv", format!("{pid} at {address}"))?;
    Ok(usize::try_from(got).unwrap_or(0))
}

/// Writes with process_vm_writev(2); how many bytes, which is fewer than asked where the mapping ends.
pub fn process_vm_write(pid: Pid, address: RemoteAddr, bytes: &[u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote =
        libc::iovec { iov_base: std::ptr::without_provenance_mut(address.0 as usize), iov_len: bytes.len() };
    // SAFETY: `local` is only read by this call; the remote address is checked by the kernel.
    let got = unsafe { libc::process_vm_writev(pid.0, &raw const local, 1, &raw const remote, 1, 0) };
    let got = check(got as libc::c_long, "process_vm_writev", format!("{pid} at {address}"))?;
    Ok(usize::try_from(got).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own() {
        let word = Box::new(std::sync::atomic::AtomicU64::new(0x1234));
        let address = RemoteAddr(word.as_ptr().expose_provenance() as u64);
        let memory = Memory::open(Pid::this(), true).unwrap();
        assert_eq!(memory.read_u64(address).unwrap(), 0x1234);
        memory.write_u64(address, 0x5678).unwrap();
        assert_eq!(word.load(std::sync::atomic::Ordering::SeqCst), 0x5678);

        let mut bytes = [0; 8];
        assert_eq!(process_vm_read(Pid::this(), address, &mut bytes).unwrap(), 8);
        assert_eq!(u64::from_ne_bytes(bytes), 0x5678);
        assert_eq!(process_vm_write(Pid::this(), address, &9u64.to_ne_bytes()).unwrap(), 8);
        assert_eq!(word.load(std::sync::atomic::Ordering::SeqCst), 9);

        assert_eq!(memory.read_u64(RemoteAddr(8)).unwrap_err().errno(), Some(Errno::EIO));
        let error = process_vm_read(Pid::this(), RemoteAddr(8), &mut bytes).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EFAULT));
    }
}
