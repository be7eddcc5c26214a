//! How many messages wait in a socket.
//!
//! Nothing tells: SIOCINQ and sock_diag speak of bytes, and an empty message has none. A peek does not show one
//! that was peeked at before under SO_PEEK_OFF (net/core/datagram.c, `__skb_try_recv_from_queue`), unless it is the first.
//! So the count is read from the kernel's own memory, with CAP_BPF and CAP_PERFMON.

use std::os::fd::BorrowedFd;

use crate::Result;
use crate::structures::Structures;

/// A way to look at queues.
#[derive(Debug)]
pub struct Look {
    kernel: Structures,
}

impl Look {
    /// Loads what is needed. An error where the kernel does not let us, or does not describe itself.
    pub fn open() -> Result<Self> {
        Ok(Look { kernel: Structures::open(&["socket", "sock"])? })
    }

    /// Messages that wait in a socket, by a descriptor of ours. They may be taken out meanwhile.
    pub fn count(&self, fd: BorrowedFd<'_>) -> Result<u32> {
        let socket = self.kernel.private_data(self.kernel.file(fd)?)?;
        let sock = self.kernel.object("socket", socket)?.number("sk")?;
        self.kernel.object("sock", sock)?.small("sk_receive_queue.qlen")
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn empty_messages_count() {
        let look = match Look::open() {
            Ok(look) => look,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        let (a, b) = UnixDatagram::pair().unwrap();
        assert_eq!(look.count(b.as_fd()).unwrap(), 0);
        for message in [&b"one"[..], b"", b"three", b""] {
            a.send(message).unwrap();
        }
        assert_eq!(look.count(b.as_fd()).unwrap(), 4);
        assert_eq!(look.count(a.as_fd()).unwrap(), 0);
    }
}
