//! Reading the kernel's own memory, by a program of ten instructions for its virtual machine (bpf(2)).
//!
//! Some state the kernel shows to nobody: how an io_uring was set up, and which requests it has. The program copies a
//! piece of kernel memory into a map of ours; it is run by this process alone, and changes nothing. Program and map
//! go with the descriptors for them, so nothing is left of them whenever we end. The kernel lets only CAP_BPF with
//! CAP_PERFMON do this, and nobody under a lockdown for confidentiality (lockdown(7)); a bad address is an error, not
//! a fault (bpf-helpers(7), `bpf_probe_read_kernel`).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Error, Result};

/// Commands, kinds and flags of linux/bpf.h.
const MAP_CREATE: i32 = 0;
const PROG_LOAD: i32 = 5;
const PROG_RUN: i32 = 10;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_SYSCALL: u32 = 31;
const SLEEPABLE: u32 = 1 << 4;
/// A 64-bit constant that is the address of a map's value.
const PSEUDO_MAP_VALUE: u8 = 2;
/// Helpers.
const GET_CURRENT_TASK: i32 = 35;
const PROBE_READ_KERNEL: i32 = 113;
/// Bytes that are read at once, and in the map.
const WINDOW: usize = 4096;

/// `struct bpf_insn`
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    constant: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, constant }
}

/// Calls of the program: its context.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Call {
    address: u64,
    length: u64,
    /// Filled in: the task that calls.
    current: u64,
}

/// The parts of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
}

/// A way to read the kernel's memory.
#[derive(Debug)]
pub struct KernelMemory {
    program: OwnedFd,
    window: *const u8,
    _map: OwnedFd,
}

fn bpf<T>(command: i32, attr: &mut T, call: &'static str) -> Result<i32> {
    // SAFETY: `attr` is a part of `union bpf_attr` of the length given; what it points to outlives the call.
    let got = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if got < 0 { Err(Error::last("bpf", call)) } else { Ok(got as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the call just returned this new descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl KernelMemory {
    /// Loads the program.
    pub fn open() -> Result<Self> {
        let mut map = MapAttr {
            map_type: MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: WINDOW as u32,
            max_entries: 1,
            map_flags: MAP_MMAPABLE,
        };
        let map = owned(bpf(MAP_CREATE, &mut map, "MAP_CREATE")?);
        let length = std::mem::offset_of!(Call, length) as i16;
        let current = std::mem::offset_of!(Call, current) as i16;
        let code = [
            // r6 = the call; call->current = the task
            instruction(0xbf, 6, 1, 0, 0),
            instruction(0x85, 0, 0, 0, GET_CURRENT_TASK),
            instruction(0x7b, 6, 0, current, 0),
            // r2 = call->length, r3 = call->address, r1 = the map's value
            instruction(0x79, 2, 6, length, 0),
            instruction(0xb7, 0, 0, 0, -libc::EINVAL),
            instruction(0x25, 2, 0, 4, WINDOW as i32),
            instruction(0x79, 3, 6, 0, 0),
            instruction(0x18, 1, PSEUDO_MAP_VALUE, 0, map.as_raw_fd()),
            instruction(0, 0, 0, 0, 0),
            instruction(0x85, 0, 0, 0, PROBE_READ_KERNEL),
            instruction(0x95, 0, 0, 0, 0),
        ];
        let mut load = LoadAttr {
            prog_type: PROG_TYPE_SYSCALL,
            insn_cnt: code.len() as u32,
            insns: code.as_ptr() as u64,
            license: c"Dual MIT/GPL".as_ptr() as u64,
            prog_flags: SLEEPABLE,
            ..LoadAttr::default()
        };
        let program = owned(bpf(PROG_LOAD, &mut load, "PROG_LOAD")?);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let window = unsafe {
            libc::mmap(std::ptr::null_mut(), WINDOW, libc::PROT_READ, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        if window == libc::MAP_FAILED {
            return Err(Error::last("mmap", "bpf map"));
        }
        Ok(KernelMemory { program, window: window.cast(), _map: map })
    }

    fn run(&self, address: u64, length: usize) -> Result<(Call, i32)> {
        let mut call = Call { address, length: length as u64, current: 0 };
        let mut run = RunAttr {
            prog_fd: self.program.as_raw_fd() as u32,
            ctx_size_in: size_of::<Call>() as u32,
            ctx_in: &raw mut call as u64,
            ..RunAttr::default()
        };
        bpf(PROG_RUN, &mut run, "PROG_TEST_RUN")?;
        Ok((call, run.retval.cast_signed()))
    }

    /// Reads `bytes.len()` bytes at an address of the kernel.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        for (i, part) in bytes.chunks_mut(WINDOW).enumerate() {
            let at = address.wrapping_add((i * WINDOW) as u64);
            let (_, result) = self.run(at, part.len())?;
            if result != 0 {
                let errno = Errno::from_raw(-result);
                return Err(Error::syscall("bpf_probe_read_kernel", format!("{at:#x}"), errno));
            }
            // SAFETY: the window is mapped for as long as we are, `part` is no longer than it, and only a run of the
            // program, which has ended, writes to it.
            unsafe { std::ptr::copy_nonoverlapping(self.window, part.as_mut_ptr(), part.len()) };
        }
        Ok(())
    }

    /// The `struct task_struct` of the thread that calls.
    pub fn current(&self) -> Result<u64> {
        Ok(self.run(0, 0)?.0.current)
    }
}

impl Drop for KernelMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody refers to any more.
        unsafe { libc::munmap(self.window.cast_mut().cast(), WINDOW) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btf::Btf;

    #[test]
    fn our_own_name() {
        let (memory, btf) = match (KernelMemory::open(), Btf::read()) {
            (Ok(memory), Ok(btf)) => (memory, btf),
            (memory, btf) => {
                eprintln!("skipped: {:?} {:?}", memory.err(), btf.err());
                return;
            }
        };
        let at = btf.member(btf.structure("task_struct").unwrap(), "comm").unwrap();
        let mut name = vec![0; at.size as usize / 8];
        memory.read(memory.current().unwrap() + u64::from(at.offset / 8), &mut name).unwrap();
        let end = name.iter().position(|b| *b == 0).unwrap();
        assert_eq!(name[..end], crate::process::comm(crate::Pid::this(), crate::Tid::this()).unwrap()[..]);
        let refused = memory.read(8, &mut name).unwrap_err().errno();
        assert!(matches!(refused, Some(Errno::EFAULT | Errno::ERANGE)), "{refused:?}");
    }
}
