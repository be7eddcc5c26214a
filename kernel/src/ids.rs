//! Numbers that must not be mixed up: processes, threads, addresses in another task.
//!
//! All three are plain integers to the kernel, and a pid is also the tid of its leader, so the compiler cannot
//! help without own types. There is no `Deref` and no arithmetic on ids; `RemoteAddr` is never a pointer,
//! because dereferencing it here would read *our* memory.

use std::fmt;

/// A process (thread group), as numbered in our own pid namespace.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Pid(pub i32);

/// A thread, as numbered in our own pid namespace.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Tid(pub i32);

/// An address in another task's address space.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct RemoteAddr(pub u64);

impl Pid {
    /// Our own process.
    pub fn this() -> Pid {
        Pid(std::process::id().cast_signed())
    }

    /// The thread group leader: the thread whose tid is the pid.
    pub fn leader(self) -> Tid {
        Tid(self.0)
    }
}

impl Tid {
    /// The calling thread.
    pub fn this() -> Tid {
        Tid(nix::unistd::gettid().as_raw())
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl RemoteAddr {
    /// The address `bytes` further on; wraps like the hardware does.
    pub fn offset(self, bytes: u64) -> RemoteAddr {
        RemoteAddr(self.0.wrapping_add(bytes))
    }
}

impl fmt::LowerHex for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::Display for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteAddr({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn print() {
        assert_eq!(format!("{:>5}", Pid(42)), "   42");
        assert_eq!(Pid(42).leader(), Tid(42));
        assert_eq!(format!("{:x}", RemoteAddr(0x7f00)), "7f00");
        assert_eq!(format!("{:?}", RemoteAddr(0x7f00)), "RemoteAddr(0x7f00)");
        assert_eq!(RemoteAddr(u64::MAX).offset(1), RemoteAddr(0));
    }
}
