//! Socket options.

use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::socket::SocketOption;

use crate::error::{Error, Result};

/// Sets options. Buffer sizes are doubled by the kernel when set (socket(7)), and only the privileged
/// variants go beyond the limits of /proc.
pub(crate) fn set(what: &str, fd: &OwnedFd, options: &[SocketOption]) -> Result<()> {
    // SO_BUF_LOCK last: setting the sizes sets it.
    for option in options.iter().filter(|o| !is_lock(o)).chain(options.iter().filter(|o| is_lock(o))) {
        let value = option.value.first_chunk().map_or(0, |v| i32::from_ne_bytes(*v));
        let forced = match (option.level, option.name) {
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => Some(libc::SO_SNDBUFFORCE),
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => Some(libc::SO_RCVBUFFORCE),
            _ => None,
        };
        if let Some(forced) = forced {
            let half = value / 2;
            if set_int(fd, libc::SOL_SOCKET, forced, half) || set_int(fd, option.level, option.name, half) {
                continue;
            }
            return Err(Error::last(what, "setsockopt(SO_*BUF)"));
        }
        if !set_bytes(fd, option.level, option.name, &option.value) {
            return Err(Error::last(
                &format!("{what}: option {}/{}", option.level, option.name),
                "setsockopt",
            ));
        }
    }
    Ok(())
}

/// A classic filter, instructions of eight bytes.
pub(crate) fn attach_filter(what: &str, fd: &OwnedFd, filter: &[u8]) -> Result<()> {
    // The kernel wants whole `struct sock_filter`.
    let instructions: Vec<libc::sock_filter> = filter
        .as_chunks::<8>()
        .0
        .iter()
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    let program =
        libc::sock_fprog { len: instructions.len() as u16, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: setsockopt reads the program, which names instructions that live until it returns.
    let set = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(Error::last(what, "setsockopt(SO_ATTACH_FILTER)")) }
}

/// `SO_LOCK_FILTER`: after it, the filter stays.
pub(crate) fn is_filter_lock(option: &SocketOption) -> bool {
    option.level == libc::SOL_SOCKET && option.name == 44
}

/// linux/socket.h
pub(crate) const SO_BUF_LOCK: i32 = 72;

pub(crate) fn is_lock(option: &SocketOption) -> bool {
    option.level == libc::SOL_SOCKET && option.name == SO_BUF_LOCK
}

pub(crate) fn set_int(fd: &OwnedFd, level: i32, name: i32, value: i32) -> bool {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// An int option.
pub(crate) fn int(fd: &OwnedFd, level: i32, name: i32) -> i32 {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: getsockopt fills at most `len` bytes.
    unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    value
}

pub(crate) fn set_bytes(fd: &OwnedFd, level: i32, name: i32, value: &[u8]) -> bool {
    // SAFETY: setsockopt reads `value.len()` bytes.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    set == 0
}
