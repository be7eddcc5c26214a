//! Addresses of sockets, as getsockname(2) and getpeername(2) give them.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{SockaddrLike, SockaddrStorage};

/// The address of an IPv4 or IPv6 socket.
pub(crate) fn local(fd: &OwnedFd) -> Option<SocketAddr> {
    nix::sys::socket::getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(inet)
}

/// The address an IPv4 or IPv6 socket is connected to.
pub(crate) fn peer(fd: &OwnedFd) -> Option<SocketAddr> {
    nix::sys::socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(inet)
}

/// An address of IPv4 or IPv6.
pub(crate) fn inet(storage: SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}

/// An address that a call put into `storage`.
pub(crate) fn from_raw(storage: &libc::sockaddr_storage, len: libc::socklen_t) -> Option<SocketAddr> {
    // SAFETY: the kernel filled `len` bytes of a whole sockaddr_storage.
    let storage = unsafe { SockaddrStorage::from_raw((&raw const *storage).cast(), Some(len)) };
    storage.and_then(inet)
}

/// Whether an address says anything at all.
pub(crate) fn is_some(address: &SocketAddr) -> bool {
    address.port() != 0 || !address.ip().is_unspecified()
}

/// The name of an interface.
pub(crate) fn interface(index: u32) -> Option<torpor_image::Bytes> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: if_indextoname fills at most IF_NAMESIZE bytes, with a zero.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    let end = name.iter().position(|b| *b == 0)?;
    (!found.is_null()).then(|| torpor_image::Bytes::from(&name[..end]))
}
