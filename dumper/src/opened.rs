//! Which descriptors processes have, and what their links say: read once of a stopped tree, and asked often.

use torpor_kernel::fds;
use torpor_kernel::ids::Pid;

use crate::error::{Error, Result};
use crate::workers;

/// The descriptors of a process.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) pid: Pid,
    /// Number and link of each (proc_pid_fd(5)).
    pub(crate) fds: Vec<(i32, Vec<u8>)>,
}

impl Opened {
    /// Lists them. What a running process closes meanwhile is left out.
    pub(crate) fn read(pid: Pid) -> Result<Self> {
        let all = fds::list(pid).map_err(Error::looking(pid, "listing its descriptors"))?;
        let mut fds = Vec::with_capacity(all.len());
        for fd in all {
            match fds::readlink(pid, fd) {
                Ok(link) => fds.push((fd, link)),
                Err(e) if e.is_gone() => {}
                Err(e) => return Err(Error::kernel(pid, format!("reading fd {fd}"))(e)),
            }
        }
        Ok(Opened { pid, fds })
    }

    /// The same of many.
    pub(crate) fn read_all(pids: &[Pid]) -> Result<Vec<Self>> {
        workers::each(pids, |pid| Self::read(*pid)).into_iter().collect()
    }

    /// Inode numbers of its sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = u32> {
        self.fds.iter().filter_map(|(_, link)| {
            let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
            std::str::from_utf8(number).ok()?.parse().ok()
        })
    }
}
