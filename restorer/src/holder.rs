//! Who holds what stands in the way.

use std::net::SocketAddr;

use torpor_kernel::ids::Pid;
use torpor_kernel::{fds, process, sock_diag, stat, status};

/// Who has a number that is wanted as a pid, and what can be done.
pub(crate) fn of_pid(id: i32) -> Option<(String, &'static str)> {
    const STOP_IT: &str = "wait until it ends, or stop it";
    let named = |pid: i32| format!("pid {pid} ({})", process::who_holds(pid).unwrap_or_default());
    // /proc opens by any tid.
    if let (Some(name), Ok(status)) = (process::who_holds(id), status::of_process(Pid(id))) {
        return Some(match status.tgid {
            tgid if tgid != id => (format!("pid {id} is taken by a thread of {}", named(tgid)), STOP_IT),
            _ if status.state == 'Z' => (
                format!(
                    "pid {id} is taken by `{name}`, which has ended and waits for its parent, {}, to collect its status",
                    named(status.ppid)
                ),
                "let that parent collect it (wait), or end the parent",
            ),
            _ => (format!("pid {id} is taken by `{name}`"), STOP_IT),
        });
    }
    let all = std::fs::read_dir("/proc").into_iter().flatten();
    let pids = all.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let member = pids.map(Pid).find_map(|pid| {
        let stat = stat::of_process(pid).ok()?;
        let what = match id {
            id if stat.session == id => "session",
            id if stat.pgrp == id => "process group",
            _ => return None,
        };
        Some(format!("pid {id} is the {what} of {}", named(pid.0)))
    });
    Some((member?, "wait until all of that end, or stop them"))
}

/// The process that listens on an address, as "pid 901 (nginx)".
pub(crate) fn of_port(address: SocketAddr) -> String {
    of_address(address, libc::IPPROTO_TCP)
}

/// The process with a socket of `protocol` on an address.
pub(crate) fn of_address(address: SocketAddr, protocol: i32) -> String {
    let sockets = [libc::AF_INET, libc::AF_INET6]
        .into_iter()
        .flat_map(|family| sock_diag::inet_sockets(family, protocol).unwrap_or_default());
    let mut on_port =
        sockets.filter(|s| s.local.port() == address.port()).map(|s| s.inode).filter(|i| *i != 0);
    on_port.find_map(of_socket).unwrap_or_else(|| "another socket".to_owned())
}

/// The process with a descriptor for socket `inode`, as "pid 901 (nginx)".
pub(crate) fn of_socket(inode: u32) -> Option<String> {
    let pid = pid_of_socket(inode)?;
    Some(format!("pid {pid} ({})", process::who_holds(pid.0).unwrap_or_default()))
}

/// The process with a descriptor for socket `inode`.
pub(crate) fn pid_of_socket(inode: u32) -> Option<Pid> {
    Some(descriptor_of_socket(inode)?.0)
}

/// The same, and the descriptor.
pub(crate) fn descriptor_of_socket(inode: u32) -> Option<(Pid, i32)> {
    let link = format!("socket:[{inode}]").into_bytes();
    let pids = std::fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.map(Pid).find_map(|pid| {
        let mut all = fds::list(pid).unwrap_or_default().into_iter();
        Some((pid, all.find(|fd| fds::readlink(pid, *fd).is_ok_and(|l| l == link))?))
    })
}
