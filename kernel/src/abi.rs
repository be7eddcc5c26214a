//! Constants and structures of the kernel ABI that libc lacks or has on some targets only.
//!
//! Each with the header it is from. Sizes are asserted at compile time: a wrong one would make the kernel write
//! past our objects. Names are the kernel's.

use std::mem::size_of;

// include/uapi/linux/ptrace.h. In libc these are of different types per libc, and the last ones are missing.

/// Continue.
pub const PTRACE_CONT: u32 = 7;
/// Detach.
pub const PTRACE_DETACH: u32 = 17;
/// Continue to the next syscall-stop.
pub const PTRACE_SYSCALL: u32 = 24;
/// Set options.
pub const PTRACE_SETOPTIONS: u32 = 0x4200;
/// Message of the last event.
pub const PTRACE_GETEVENTMSG: u32 = 0x4201;
/// Read the siginfo of the present stop.
pub const PTRACE_GETSIGINFO: u32 = 0x4202;
/// Replace the siginfo of the present stop.
pub const PTRACE_SETSIGINFO: u32 = 0x4203;
/// Read a register set.
pub const PTRACE_GETREGSET: u32 = 0x4204;
/// Write a register set.
pub const PTRACE_SETREGSET: u32 = 0x4205;
/// Attach without stopping.
pub const PTRACE_SEIZE: u32 = 0x4206;
/// Stop a seized tracee.
pub const PTRACE_INTERRUPT: u32 = 0x4207;
/// Stay in group-stop, but report.
pub const PTRACE_LISTEN: u32 = 0x4208;
/// Read queued signals.
pub const PTRACE_PEEKSIGINFO: u32 = 0x4209;
/// Read the signal mask.
pub const PTRACE_GETSIGMASK: u32 = 0x420a;
/// Write the signal mask.
pub const PTRACE_SETSIGMASK: u32 = 0x420b;
/// Read a seccomp filter.
pub const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
/// Read the rseq registration (since 5.13).
pub const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
/// Write the syscall user dispatch setting (since 6.4).
pub const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
/// Read the syscall user dispatch setting (since 6.4).
pub const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
/// The event of `PTRACE_INTERRUPT` and of group-stops.
pub const PTRACE_EVENT_STOP: i32 = 128;
/// `PTRACE_PEEKSIGINFO`: the process's queue, not the thread's.
pub const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
/// include/uapi/linux/prctl.h: syscall user dispatch is off.
pub const PR_SYS_DISPATCH_OFF: u64 = 0;

/// include/uapi/linux/ptrace.h
#[repr(C)]
pub(crate) struct ptrace_peeksiginfo_args {
    pub(crate) off: u64,
    pub(crate) flags: u32,
    pub(crate) nr: i32,
}
const _: () = assert!(size_of::<ptrace_peeksiginfo_args>() == 16);

/// include/uapi/linux/ptrace.h
#[repr(C)]
#[derive(Default)]
pub(crate) struct ptrace_rseq_configuration {
    pub(crate) rseq_abi_pointer: u64,
    pub(crate) rseq_abi_size: u32,
    pub(crate) signature: u32,
    pub(crate) flags: u32,
    pub(crate) pad: u32,
}
const _: () = assert!(size_of::<ptrace_rseq_configuration>() == 24);

/// include/uapi/linux/ptrace.h
#[repr(C)]
#[derive(Default)]
pub(crate) struct ptrace_sud_config {
    pub(crate) mode: u64,
    pub(crate) selector: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}
const _: () = assert!(size_of::<ptrace_sud_config>() == 32);

/// include/uapi/asm-generic/siginfo.h: `SI_MAX_SIZE`.
pub const SIGINFO_SIZE: usize = 128;
const _: () = assert!(size_of::<libc::siginfo_t>() == SIGINFO_SIZE);

/// include/uapi/linux/elf.h: general registers.
pub const NT_PRSTATUS: u32 = 1;

// include/uapi/linux/fs.h: PAGEMAP_SCAN (since 6.7).

/// `_IOWR('f', 16, struct pm_scan_arg)`
pub const PAGEMAP_SCAN: libc::c_ulong =
    0xc000_0000 | ((size_of::<pm_scan_arg>() as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 16;
/// include/uapi/linux/fs.h: the page is in an area whose pages can be write-protected, and take that away by themselves.
pub const PAGE_IS_WPALLOWED: u64 = 1 << 0;
/// Written since it was write-protected.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Write-protect what matches.
pub const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// Fail with `EPERM` where writes are not watched.
pub const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// The page belongs to a file, or to shared memory.
pub const PAGE_IS_FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The page is in swap. Set for every non-present entry that is not empty, so for guard pages too.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The page is the shared page of zeros.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// The page was written since the bits were cleared.
pub const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
/// The page is a guard of `MADV_GUARD_INSTALL` (since 6.15).
pub const PAGE_IS_GUARD: u64 = 1 << 8;

/// include/uapi/linux/fs.h
#[repr(C)]
#[derive(Default)]
pub(crate) struct pm_scan_arg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}
const _: () = assert!(size_of::<pm_scan_arg>() == 96);

/// include/uapi/linux/fs.h
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub(crate) struct page_region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}
const _: () = assert!(size_of::<page_region>() == 24);

// include/uapi/asm-generic/mman-common.h

/// Back a range with huge pages now (since 6.1).
pub const MADV_COLLAPSE: i32 = 25;
/// Make a range fault, without a mapping of its own (since 6.13).
pub const MADV_GUARD_INSTALL: i32 = 102;
/// Undo it.
pub const MADV_GUARD_REMOVE: i32 = 103;

/// include/uapi/linux/timerfd.h: `_IOW('T', 0, __u64)`, needs CONFIG_CHECKPOINT_RESTORE.
pub const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
/// include/uapi/linux/inotify.h: `_IOW('I', 0, __s32)`, needs CONFIG_CHECKPOINT_RESTORE.
pub const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;

// include/uapi/linux/prctl.h

/// Set all of `struct prctl_mm_map` at once.
pub const PR_SET_MM_MAP: i32 = 14;
/// Ask for the size of `struct prctl_mm_map`.
pub const PR_SET_MM_MAP_SIZE: i32 = 15;
/// Attributes of mappings (since 5.17): needs CONFIG_ANON_VMA_NAME.
pub const PR_SET_VMA: i32 = 0x5356_4d41;
/// Attribute: the name.
pub const PR_SET_VMA_ANON_NAME: libc::c_ulong = 0;
/// Have timer_create(2) take the id from the caller (since 6.16).
pub const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// Argument: off.
pub const PR_TIMER_CREATE_RESTORE_IDS_OFF: i32 = 0;
/// Argument: on.
pub const PR_TIMER_CREATE_RESTORE_IDS_ON: i32 = 1;
/// Argument: ask.
pub const PR_TIMER_CREATE_RESTORE_IDS_GET: i32 = 2;

/// include/uapi/linux/membarrier.h: which commands the process registered for (since 6.3).
pub const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;

/// include/uapi/linux/userfaultfd.h: serve faults of user mode only, which needs no privilege.
pub const UFFD_USER_MODE_ONLY: i32 = 1;
/// include/uapi/linux/userfaultfd.h: version of the interface.
pub const UFFD_API: u64 = 0xaa;
/// include/uapi/linux/userfaultfd.h: write-protect faults resolve themselves (since 6.7).
pub const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
/// include/uapi/linux/userfaultfd.h: `_IOWR(0xAA, 0x3F, struct uffdio_api)`
pub const UFFDIO_API: libc::c_ulong =
    0xc000_0000 | ((size_of::<uffdio_api>() as libc::c_ulong) << 16) | (0xaa << 8) | 0x3f;

/// include/uapi/linux/userfaultfd.h
#[repr(C)]
pub(crate) struct uffdio_api {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}
const _: () = assert!(size_of::<uffdio_api>() == 24);

/// include/uapi/linux/userfaultfd.h: areas without pages can be write-protected, too (since 6.4).
pub const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// include/uapi/linux/userfaultfd.h: watch writes.
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// include/uapi/linux/userfaultfd.h: `_IOWR(0xAA, 0x00, struct uffdio_register)`
pub const UFFDIO_REGISTER: libc::c_ulong =
    0xc000_0000 | ((size_of::<uffdio_register>() as libc::c_ulong) << 16) | (0xaa << 8);

/// include/uapi/linux/userfaultfd.h
#[repr(C)]
pub(crate) struct uffdio_register {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}
const _: () = assert!(size_of::<uffdio_register>() == 32);

/// include/uapi/linux/userfaultfd.h: `_IOR(0xAA, 0x01, struct uffdio_range)`
pub const UFFDIO_UNREGISTER: libc::c_ulong =
    0x8000_0000 | ((size_of::<uffdio_range>() as libc::c_ulong) << 16) | (0xaa << 8) | 0x01;

/// include/uapi/linux/userfaultfd.h
#[repr(C)]
pub(crate) struct uffdio_range {
    pub(crate) start: u64,
    pub(crate) len: u64,
}
const _: () = assert!(size_of::<uffdio_range>() == 16);

/// include/uapi/linux/userfaultfd.h: `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`
pub const UFFDIO_WRITEPROTECT: libc::c_ulong =
    0xc000_0000 | ((size_of::<uffdio_writeprotect>() as libc::c_ulong) << 16) | (0xaa << 8) | 0x06;

/// include/uapi/linux/userfaultfd.h; `mode` 0 takes protection away.
#[repr(C)]
pub(crate) struct uffdio_writeprotect {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
}
const _: () = assert!(size_of::<uffdio_writeprotect>() == 24);

/// `stat` flag of a task that is on its way out, long before it is a zombie. include/linux/sched.h
pub const PF_EXITING: u32 = 0x0000_0004;
/// include/linux/sched.h (shown in /proc/PID/stat): a kernel thread.
pub const PF_KTHREAD: u32 = 0x0020_0000;
/// A thread that the kernel made for a ring of io_uring.
pub const PF_IO_WORKER: u32 = 0x0000_0010;

// include/uapi/linux/ioprio.h

/// `ioprio_get`: one task.
pub const IOPRIO_WHO_PROCESS: i32 = 1;

/// include/uapi/linux/sched/types.h, as of 5.3 (`SCHED_ATTR_SIZE_VER1`).
#[repr(C)]
#[derive(Default)]
pub(crate) struct sched_attr {
    pub(crate) size: u32,
    pub(crate) sched_policy: u32,
    pub(crate) sched_flags: u64,
    pub(crate) sched_nice: i32,
    pub(crate) sched_priority: u32,
    pub(crate) sched_runtime: u64,
    pub(crate) sched_deadline: u64,
    pub(crate) sched_period: u64,
    pub(crate) sched_util_min: u32,
    pub(crate) sched_util_max: u32,
}
const _: () = assert!(size_of::<sched_attr>() == 56);

/// include/uapi/linux/sched.h, up to `cgroup` (`CLONE_ARGS_SIZE_VER2`, 5.7).
#[repr(C)]
#[derive(Default)]
pub(crate) struct clone_args {
    pub(crate) flags: u64,
    pub(crate) pidfd: u64,
    pub(crate) child_tid: u64,
    pub(crate) parent_tid: u64,
    pub(crate) exit_signal: u64,
    pub(crate) stack: u64,
    pub(crate) stack_size: u64,
    pub(crate) tls: u64,
    pub(crate) set_tid: u64,
    pub(crate) set_tid_size: u64,
    pub(crate) cgroup: u64,
}
const _: () = assert!(size_of::<clone_args>() == 88);

// include/uapi/linux/netlink.h, sock_diag.h, unix_diag.h, inet_diag.h

/// Protocol of the netlink socket.
pub const NETLINK_SOCK_DIAG: i32 = 4;
/// Message type of requests and answers.
pub const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Message type: ends a socket.
pub const SOCK_DESTROY: u16 = 21;
/// An answer is wanted, also if all went well.
pub const NLM_F_ACK: u16 = 4;
/// A request.
pub const NLM_F_REQUEST: u16 = 1;
/// The objects changed while being dumped.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// All objects (`NLM_F_ROOT | NLM_F_MATCH`).
pub const NLM_F_DUMP: u16 = 0x300;
/// No operation.
pub const NLMSG_NOOP: u16 = 1;
/// An errno.
pub const NLMSG_ERROR: u16 = 2;
/// End of a dump.
pub const NLMSG_DONE: u16 = 3;
/// All that unix_diag can show, but memory accounting: name, vfs, peer, icons, queue lengths.
pub const UDIAG_SHOW: u32 = 0x1f;
/// Attribute: the name, abstract or path, as given to bind(2).
pub const UNIX_DIAG_NAME: u16 = 0;
/// Attribute: inode and device of the bound file.
pub const UNIX_DIAG_VFS: u16 = 1;
/// Attribute: inode of the peer.
pub const UNIX_DIAG_PEER: u16 = 2;
/// Attribute: inodes of the peers of connections not yet accepted.
pub const UNIX_DIAG_ICONS: u16 = 3;
/// Attribute: queue lengths.
pub const UNIX_DIAG_RQLEN: u16 = 4;
/// Attribute: directions shut down.
pub const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Attribute of inet sockets: directions shut down.
pub const INET_DIAG_SHUTDOWN: u16 = 8;
/// Extension: `struct tcp_info`, and with it what a protocol adds of its own.
pub const INET_DIAG_INFO: u16 = 2;
/// Attribute of IPv6 sockets: `IPV6_V6ONLY`.
pub const INET_DIAG_SKV6ONLY: u16 = 11;
/// Attribute: keys of TCP-MD5.
pub const INET_DIAG_MD5SIG: u16 = 18;

/// include/uapi/linux/netlink.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct nlmsghdr {
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    pub(crate) pid: u32,
}
const _: () = assert!(size_of::<nlmsghdr>() == 16);

/// include/uapi/linux/unix_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct unix_diag_req {
    pub(crate) family: u8,
    pub(crate) protocol: u8,
    pub(crate) pad: u16,
    pub(crate) states: u32,
    pub(crate) ino: u32,
    pub(crate) show: u32,
    pub(crate) cookie: [u32; 2],
}
const _: () = assert!(size_of::<unix_diag_req>() == 24);

/// include/uapi/linux/unix_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct unix_diag_msg {
    pub(crate) family: u8,
    pub(crate) kind: u8,
    pub(crate) state: u8,
    pub(crate) pad: u8,
    pub(crate) ino: u32,
    pub(crate) cookie: [u32; 2],
}
const _: () = assert!(size_of::<unix_diag_msg>() == 16);

/// include/uapi/linux/inet_diag.h; ports and addresses in network order.
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct inet_diag_sockid {
    pub(crate) sport: [u8; 2],
    pub(crate) dport: [u8; 2],
    pub(crate) src: [u8; 16],
    pub(crate) dst: [u8; 16],
    pub(crate) interface: u32,
    pub(crate) cookie: [u32; 2],
}
const _: () = assert!(size_of::<inet_diag_sockid>() == 48);

/// include/uapi/linux/inet_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct inet_diag_req_v2 {
    pub(crate) family: u8,
    pub(crate) protocol: u8,
    pub(crate) ext: u8,
    pub(crate) pad: u8,
    pub(crate) states: u32,
    pub(crate) id: inet_diag_sockid,
}
const _: () = assert!(size_of::<inet_diag_req_v2>() == 56);

/// include/uapi/linux/inet_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct inet_diag_msg {
    pub(crate) family: u8,
    pub(crate) state: u8,
    pub(crate) timer: u8,
    pub(crate) retrans: u8,
    pub(crate) id: inet_diag_sockid,
    pub(crate) expires: u32,
    pub(crate) rqueue: u32,
    pub(crate) wqueue: u32,
    pub(crate) uid: u32,
    pub(crate) inode: u32,
}
const _: () = assert!(size_of::<inet_diag_msg>() == 72);

/// All of packet_diag that is asked for: info, memberships, rings, fanout, memory.
pub(crate) const PACKET_SHOW: u32 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4;
/// include/uapi/linux/packet_diag.h: attributes of an answer.
pub(crate) const PACKET_DIAG_INFO: u16 = 0;
pub(crate) const PACKET_DIAG_MCLIST: u16 = 1;
pub(crate) const PACKET_DIAG_RX_RING: u16 = 2;
pub(crate) const PACKET_DIAG_TX_RING: u16 = 3;
pub(crate) const PACKET_DIAG_FANOUT: u16 = 4;
pub(crate) const PACKET_DIAG_MEMINFO: u16 = 6;

/// include/uapi/linux/packet_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct packet_diag_req {
    pub(crate) family: u8,
    pub(crate) protocol: u8,
    pub(crate) pad: u16,
    pub(crate) ino: u32,
    pub(crate) show: u32,
    pub(crate) cookie: [u32; 2],
}
const _: () = assert!(size_of::<packet_diag_req>() == 20);

/// include/uapi/linux/packet_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct packet_diag_msg {
    pub(crate) family: u8,
    pub(crate) kind: u8,
    /// The protocol.
    pub(crate) num: u16,
    pub(crate) ino: u32,
    pub(crate) cookie: [u32; 2],
}
const _: () = assert!(size_of::<packet_diag_msg>() == 16);

/// include/uapi/linux/packet_diag.h
#[repr(C)]
#[derive(Copy, Clone)]
pub(crate) struct packet_diag_mclist {
    pub(crate) index: u32,
    pub(crate) count: u32,
    pub(crate) kind: u16,
    pub(crate) length: u16,
    pub(crate) address: [u8; 32],
}
const _: () = assert!(size_of::<packet_diag_mclist>() == 44);
