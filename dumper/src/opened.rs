//! Which descriptors processes have, and what their links say: read once of a stopped tree, and asked often.

use std::ops::Range;

use torpor_kernel::fds::{self, Shown};
use torpor_kernel::ids::Pid;

use crate::error::{Error, Result};
use crate::workers;

/// The descriptors of a process.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) pid: Pid,
    /// Number and link of each (proc_pid_fd(5)).
    pub(crate) fds: Vec<(i32, Vec<u8>)>,
    pub(crate) shown: Shown,
}

impl Opened {
    /// Lists them. What a running process closes meanwhile is left out.
    pub(crate) fn read(pid: Pid) -> Result<Self> {
        Self::read_all(&[pid])?.pop().ok_or(Error::NoProcess(pid))
    }

    /// The same of many.
    pub(crate) fn read_all(pids: &[Pid]) -> Result<Vec<Self>> {
        let list = |pid: &Pid| {
            let all = fds::list(*pid).map_err(Error::looking(*pid, "listing its descriptors"))?;
            Ok((*pid, Shown::of(*pid, all.len()), all))
        };
        let tables = workers::each(pids, list).into_iter().collect::<Result<Vec<_>>>()?;
        let of = |(pid, shown, all): &(Pid, Shown, Vec<i32>), range: Range<usize>| {
            let mut fds = Vec::with_capacity(range.len());
            for &fd in &all[range] {
                match shown.readlink(fd) {
                    Ok(link) => fds.push((fd, link)),
                    Err(e) if e.is_gone() => {}
                    Err(e) => return Err(Error::kernel(*pid, format!("reading fd {fd}"))(e)),
                }
            }
            Ok(fds)
        };
        let fds = workers::parts(&tables, |(_, _, all)| all.len(), of)?;
        let all = tables.into_iter().zip(fds);
        Ok(all.map(|((pid, shown, _), fds)| Opened { pid, fds, shown }).collect())
    }

    /// Inode numbers of its sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = u32> {
        self.fds.iter().filter_map(|(_, link)| {
            let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
            std::str::from_utf8(number).ok()?.parse().ok()
        })
    }
}
