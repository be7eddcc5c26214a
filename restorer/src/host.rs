//! What a plan must know of the machine and of the process that restores.

use torpor_image::Bytes;
use torpor_image::credentials::Credentials;
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::{probe, process, status};

use crate::error::{Error, Result};

/// The machine and the restoring process, as plain data: tests make their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Memory of the restoring process: new tasks begin as copies of it.
    pub occupied: Vec<(u64, u64)>,
    /// The kernel's own areas among it, by name: `[vdso]`, `[vvar]`, in the order of addresses.
    pub kernel_areas: Vec<(Bytes, u64, u64)>,
    /// Bytes of the vdso.
    pub vdso: Bytes,
    /// Vector state components the kernel has enabled.
    pub xstate_features: u64,
    /// Bytes of the vector state of a thread.
    pub xstate_size: usize,
    /// Identity of the boot (/proc/sys/kernel/random/boot_id).
    pub boot: String,
    /// Limits new tasks begin with, soft and hard.
    pub limits: Vec<(u64, u64)>,
    /// Credentials new tasks begin with.
    pub credentials: Credentials,
    /// Whether limits may be raised (CAP_SYS_RESOURCE).
    pub may_raise_limits: bool,
    /// Nice value and policy new tasks begin with.
    pub scheduling: (u32, i32),
    /// Cpus new tasks may begin on.
    pub affinity: Bytes,
    /// /proc/self/oom_score_adj
    pub oom_score_adj: i32,
    /// /proc/self/coredump_filter
    pub coredump_filter: Option<u32>,
    /// Whether POSIX timers can be made with a given id (PR_TIMER_CREATE_RESTORE_IDS).
    pub timer_ids: bool,
    /// Device and inode number of the program that restores.
    pub program: (u64, u64),
    /// Highest capability the kernel knows.
    pub last_capability: u32,
    /// The restoring process, which makes the root.
    pub pid: i32,
    /// Its process group.
    pub pgid: i32,
}

/// capabilities(7)
const CAP_SYS_RESOURCE: u32 = 24;

impl Host {
    /// Looks at this machine and this process.
    pub fn probe() -> Result<Self> {
        let this = Pid::this();
        let fail = || Error::kernel("the process: looking at this machine");
        let maps = torpor_kernel::maps::maps(this).map_err(fail())?;
        let status = status::of_process(this).map_err(fail())?;
        let attr = process::scheduling(Tid::this()).map_err(fail())?;
        let kernel = |name: &[u8]| name == b"[vdso]" || name.starts_with(b"[vvar");
        let vdso = maps.iter().find(|m| m.path == b"[vdso]").map_or_else(Vec::new, |m| {
            // SAFETY: the vdso is mapped for the life of the process and never written.
            unsafe { std::slice::from_raw_parts(m.start as *const u8, (m.end - m.start) as usize) }.to_vec()
        });
        let last_capability = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
            .ok()
            .and_then(|s| s.trim().parse().ok())
            .unwrap_or(40);
        Ok(Host {
            occupied: maps.iter().map(|m| (m.start, m.end)).collect(),
            kernel_areas: maps
                .iter()
                .filter(|m| kernel(&m.path))
                .map(|m| (m.path.as_slice().into(), m.start, m.end))
                .collect(),
            vdso: vdso.into(),
            xstate_features: arch::cpu::xstate_features(),
            xstate_size: arch::cpu::xstate_size(),
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            limits: process::limits(this).map_err(fail())?.to_vec(),
            credentials: Credentials {
                uids: status.uids,
                gids: status.gids,
                groups: status.groups,
                inheritable: status.cap_inheritable,
                permitted: status.cap_permitted,
                effective: status.cap_effective,
                bounding: status.cap_bounding,
                ambient: status.cap_ambient,
                // SAFETY: PR_GET_SECUREBITS takes no pointer.
                securebits: unsafe { libc::prctl(libc::PR_GET_SECUREBITS) }.max(0) as u32,
                no_new_privileges: status.no_new_privs,
            },
            may_raise_limits: status.cap_effective & (1 << CAP_SYS_RESOURCE) != 0,
            scheduling: (attr.policy, attr.nice),
            affinity: process::affinity(Tid::this()).map_err(fail())?.into(),
            oom_score_adj: process::oom_score_adj(this).map_err(fail())?,
            coredump_filter: process::coredump_filter(this).map_err(fail())?,
            timer_ids: probe::one("PR_TIMER_CREATE_RESTORE_IDS").is_none_or(|s| s.is_present()),
            program: nix::sys::stat::stat("/proc/self/exe").map_or((0, 0), |s| (s.st_dev, s.st_ino)),
            last_capability,
            pid: this.0,
            pgid: nix::unistd::getpgrp().as_raw(),
        })
    }
}
