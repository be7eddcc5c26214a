//! The attempts themselves: `Ok` when the interface works, the kernel's refusal else.
//!
//! Each one uses objects of its own and leaves nothing behind.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::check;
use crate::pagemap::{Ability, PageScan, page_size};
use crate::write_watch::WriteWatch;
use crate::{Error, Pid, Result, Tid, abi, fds, maps, ptrace, sock_diag, status};

fn missing(call: &'static str, errno: Errno) -> Result<()> {
    Err(Error::syscall(call, "probe", errno))
}

/// The outcome of a call whose result is 0, or a number that does not matter.
fn done(returned: impl Into<libc::c_long>, call: &'static str) -> Result<()> {
    check(returned.into(), call, "probe").map(drop)
}

/// The descriptor that a call returned.
fn owned(fd: libc::c_long, call: &'static str) -> Result<OwnedFd> {
    let fd = check(fd, call, "probe")?;
    // SAFETY: every caller passes what a call that makes descriptors has just returned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

pub(super) fn pidfd_open() -> Result<()> {
    fds::pidfd_open(Pid::this()).map(drop)
}

pub(super) fn pidfd_getfd() -> Result<()> {
    let pidfd = fds::pidfd_open(Pid::this())?;
    fds::getfd(pidfd.as_fd(), pidfd.as_raw_fd()).map(drop)
}

/// Pid 1 exists in every namespace: with the privilege, `EEXIST`; without, `EPERM` (kernel/pid.c `alloc_pid`).
pub(super) fn clone3_set_tid() -> Result<()> {
    let init: [i32; 1] = [1];
    let arguments = abi::clone_args {
        set_tid: (&raw const init).expose_provenance() as u64,
        set_tid_size: 1,
        ..abi::clone_args::default()
    };
    // SAFETY: a plain fork; should there be a child, it does nothing but exit.
    let got = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<abi::clone_args>()) };
    match (got, Errno::last()) {
        (-1, Errno::EEXIST) => Ok(()),
        (-1, errno) => missing("clone3", errno),
        // SAFETY: ends the child at once.
        (0, _) => unsafe { libc::_exit(0) },
        (child, _) => ptrace::wait(Tid(child as i32)).map(drop),
    }
}

pub(super) fn kernel_memory() -> Result<()> {
    crate::io_uring::look::Look::open().map(drop)
}

pub(super) fn user_namespace() -> Result<()> {
    Child::start(libc::CLONE_NEWUSER | libc::CLONE_NEWPID).map(drop)
}

pub(super) fn scan() -> Result<()> {
    match PageScan::open(Pid::this())?.ability() {
        Ability::File => missing("PAGEMAP_SCAN", Errno::ENOTTY),
        Ability::Scan | Ability::ScanWithGuard => Ok(()),
    }
}

pub(super) fn scan_guard() -> Result<()> {
    match PageScan::open(Pid::this())?.ability() {
        Ability::ScanWithGuard => Ok(()),
        Ability::File | Ability::Scan => missing("PAGEMAP_SCAN", Errno::EINVAL),
    }
}

/// Some anonymous memory of our own, unmapped on drop.
struct Scratch(*mut libc::c_void, usize);

impl Scratch {
    fn new(len: usize) -> Result<Scratch> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping where nothing is.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        if at == libc::MAP_FAILED { Err(Error::last("mmap", "probe")) } else { Ok(Scratch(at, len)) }
    }

    fn advise(&self, offset: usize, len: usize, advice: i32) -> Result<()> {
        // SAFETY: callers stay inside the mapping, into which there are no references.
        done(unsafe { libc::madvise(self.0.byte_add(offset), len, advice) }, "madvise")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: our own mapping, into which there are no references.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

pub(super) fn guard_install() -> Result<()> {
    let page = page_size() as usize;
    Scratch::new(page)?.advise(0, page, abi::MADV_GUARD_INSTALL)
}

pub(super) fn collapse() -> Result<()> {
    // 2 MiB on x86_64 and on aarch64 with 4K pages; other page sizes have larger ones, and are told `EINVAL`.
    const HUGE: usize = 2 << 20;
    let scratch = Scratch::new(2 * HUGE)?;
    let offset = scratch.0.addr().next_multiple_of(HUGE) - scratch.0.addr();
    // SAFETY: aligned up by less than HUGE, so inside. There must be a page to collapse.
    unsafe { scratch.0.byte_add(offset).cast::<u8>().write_volatile(1) };
    scratch.advise(offset, HUGE, abi::MADV_COLLAPSE)
}

fn open_userfaultfd(flags: i32) -> Result<OwnedFd> {
    // SAFETY: takes a number.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) }, "userfaultfd")
}

pub(super) fn userfaultfd() -> Result<()> {
    open_userfaultfd(0).map(drop)
}

pub(super) fn userfaultfd_user_mode() -> Result<()> {
    open_userfaultfd(abi::UFFD_USER_MODE_ONLY).map(drop)
}

pub(super) fn wp_async() -> Result<()> {
    WriteWatch::of_this_process().map(drop)
}

/// A child that waits to be killed, and is when this is dropped.
struct Child(Tid);

impl Child {
    fn start(flags: i32) -> Result<Child> {
        // SAFETY: as fork, without exit signal. All other arguments are 0, so their order, which differs by architecture,
        // does not matter. The child makes system calls only.
        let got = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
        if got == 0 {
            // SAFETY: plain system calls. Should the parent die first, the child goes with it.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                loop {
                    libc::pause();
                }
            }
        }
        Ok(Child(Tid(check(got, "clone", "probe")? as i32)))
    }

    /// A child under ptrace, stopped.
    fn stopped() -> Result<Child> {
        let child = Child::start(0)?;
        ptrace::seize(child.0, ptrace::OPTION_EXITKILL)?;
        ptrace::interrupt(child.0)?;
        ptrace::wait(child.0)?;
        Ok(child)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a pid of our own child, which is not reaped yet, so the number is still its own.
        unsafe { libc::kill(self.0.0, libc::SIGKILL) };
        while !matches!(ptrace::wait(self.0), Err(_) | Ok(ptrace::Stop::Killed(_) | ptrace::Stop::Exited(_)))
        {
        }
    }
}

pub(super) fn ptrace_child() -> Result<()> {
    let child = Child::stopped()?;
    ptrace::registers(child.0).map(drop)
}

pub(super) fn ptrace_rseq() -> Result<()> {
    let child = Child::stopped()?;
    let mut raw = abi::ptrace_rseq_configuration::default();
    let (size, address) = (size_of::<abi::ptrace_rseq_configuration>(), (&raw mut raw).expose_provenance());
    let call = "PTRACE_GET_RSEQ_CONFIGURATION";
    ptrace::request(call, abi::PTRACE_GET_RSEQ_CONFIGURATION, child.0, size, address).map(drop)
}

pub(super) fn ptrace_sud() -> Result<()> {
    let child = Child::stopped()?;
    let known = ptrace::syscall_user_dispatch(child.0)?.is_some();
    if known { Ok(()) } else { missing("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", Errno::EIO) }
}

/// A task without filter is `EINVAL`, after the permission (`EACCES`); a kernel without the request says `EIO`.
pub(super) fn ptrace_seccomp() -> Result<()> {
    let child = Child::stopped()?;
    ptrace::seccomp_filter(child.0, 0).map(drop)
}

pub(super) fn kcmp() -> Result<()> {
    fds::kcmp(Pid::this(), Pid::this(), fds::KcmpType::Vm, 0, 0).map(drop)
}

/// Asking for the size needs the code but no privilege; setting needs none either since 4.10 (kernel/sys.c).
pub(super) fn set_mm_map() -> Result<()> {
    let mut size = 0u32;
    // SAFETY: the kernel writes an unsigned int.
    let got = unsafe { libc::prctl(libc::PR_SET_MM, abi::PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0) };
    done(got, "prctl")
}

pub(super) fn anon_name() -> Result<()> {
    let len = page_size() as usize;
    let scratch = Scratch::new(len)?;
    let name = c"torpor";
    // SAFETY: names our own mapping, which is gone in a moment.
    let got =
        unsafe { libc::prctl(abi::PR_SET_VMA, abi::PR_SET_VMA_ANON_NAME, scratch.0, len, name.as_ptr()) };
    done(got, "prctl")
}

/// Following a link in map_files wants `CAP_CHECKPOINT_RESTORE` in the initial user namespace (fs/proc/base.c).
pub(super) fn map_files() -> Result<()> {
    let all = maps::maps(Pid::this())?;
    let Some(mapping) = all.iter().find(|mapping| mapping.kind() == maps::Kind::File && mapping.inode != 0)
    else {
        return missing("map_files", Errno::ENOENT);
    };
    let path = format!("/proc/self/map_files/{:x}-{:x}", mapping.start, mapping.end);
    File::open(&path).map(drop).map_err(|error| Error::io("open", path, &error))
}

pub(super) fn exists(path: String) -> Result<()> {
    File::open(&path).map(drop).map_err(|error| Error::io("open", path, &error))
}

pub(super) fn children() -> Result<()> {
    exists(format!("/proc/self/task/{}/children", Tid::this()))
}

pub(super) fn timers() -> Result<()> {
    exists("/proc/self/timers".into())
}

pub(super) fn timer_ids() -> Result<()> {
    // SAFETY: asks only.
    let got = unsafe {
        libc::prctl(abi::PR_TIMER_CREATE_RESTORE_IDS, abi::PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0)
    };
    done(got, "prctl")
}

pub(super) fn timerfd_ticks() -> Result<()> {
    // SAFETY: takes two numbers.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    let fd = owned(fd.into(), "timerfd_create")?;
    let ticks = 1u64;
    // SAFETY: this ioctl reads a u64.
    done(
        unsafe { libc::ioctl(fd.as_raw_fd(), abi::TFD_IOC_SET_TICKS as _, &raw const ticks) },
        "TFD_IOC_SET_TICKS",
    )
}

pub(super) fn inotify_wd() -> Result<()> {
    // SAFETY: takes a number.
    let fd = owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) }.into(), "inotify_init1")?;
    let next: libc::c_long = 1;
    // SAFETY: this ioctl takes its number by value.
    done(
        unsafe { libc::ioctl(fd.as_raw_fd(), abi::INOTIFY_IOC_SETNEXTWD as _, next) },
        "INOTIFY_IOC_SETNEXTWD",
    )
}

pub(super) fn memfd() -> Result<()> {
    // SAFETY: a NUL-terminated name.
    let fd = unsafe { libc::memfd_create(c"torpor-probe".as_ptr(), libc::MFD_CLOEXEC) };
    owned(fd.into(), "memfd_create").map(drop)
}

pub(super) fn unix_diag() -> Result<()> {
    sock_diag::unix_sockets().map(drop)
}

pub(super) fn tcp_diag() -> Result<()> {
    sock_diag::inet_sockets(libc::AF_INET, libc::IPPROTO_TCP).map(drop)
}

pub(super) fn tcp_repair() -> Result<()> {
    // SAFETY: takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    let fd = owned(fd.into(), "socket")?;
    let on = 1i32;
    // SAFETY: an int, with its length.
    let got = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    done(got, "TCP_REPAIR")
}

pub(super) fn membarrier() -> Result<()> {
    // SAFETY: takes three numbers; asks only.
    let got = unsafe { libc::syscall(libc::SYS_membarrier, abi::MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0) };
    done(got, "membarrier")
}

pub(super) fn capability(number: u32) -> Result<()> {
    // Capabilities belong to the thread.
    let status = status::of_task(Pid::this(), Tid::this())?;
    if status.cap_effective & (1 << number) == 0 { missing("capability", Errno::EPERM) } else { Ok(()) }
}
