//! The kernel, as Torpor sees it: thin, typed wrappers and parsers, no policy.
//!
//! What nix and libc have, callers take from there. Here stands what they lack, or what existing crates get
//! wrong for a dumper: /proc parsers that work on bytes and lose nothing, ptrace requests beyond the common
//! ones, `PAGEMAP_SCAN`, `sock_diag`, `kcmp`, and probes of what the running kernel grants us.
//!
//! Two rules hold everywhere: nothing panics on odd input (what /proc prints can be influenced by the process
//! under inspection), and an error names the call, the object and the errno.

pub mod abi;
pub mod bpf;
pub mod btf;
pub mod cgroup;
pub mod child;
mod error;
pub mod fdinfo;
pub mod fds;
pub mod ids;
pub mod igmp;
pub mod io_uring;
pub mod maps;
pub mod memory;
pub mod mm_seq;
pub mod mountinfo;
pub mod mqueue;
pub mod netlink;
pub mod pagemap;
pub mod priority;
pub mod probe;
pub mod process;
pub mod procmap;
pub mod ptrace;
pub mod raw;
pub mod shared;
pub mod sock_diag;
pub mod sock_queue;
pub mod soft_dirty;
pub mod stat;
pub mod status;
mod structures;
pub mod sysv;
pub mod task_struct;
pub mod tcp;
mod text;
pub mod timers;
pub mod tty;
pub mod tty_queue;
pub mod uffd;
pub mod write_watch;

pub use error::{Error, Result, advice};
pub use ids::{Pid, RemoteAddr, Tid};
