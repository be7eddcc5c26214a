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

/// linux/socket.h: `SO_BUF_LOCK`
fn is_lock(option: &SocketOption) -> bool {
    option.level == libc::SOL_SOCKET && option.name == 72
}

pub(crate) fn set_int(fd: &OwnedFd, level: i32, name: i32, value: i32) -> bool {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

fn set_bytes(fd: &OwnedFd, level: i32, name: i32, value: &[u8]) -> bool {
    // SAFETY: setsockopt reads `value.len()` bytes.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    set == 0
}
