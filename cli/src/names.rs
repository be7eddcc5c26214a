//! Names for the kernel's numbers: signals, system calls, flags of descriptors, clocks.

use nix::sys::signal::Signal;

/// First real-time signal a program may use; glibc keeps the two below for itself (nptl).
const SIGRTMIN: i32 = 34;

/// `SIGTERM`, `SIGRTMIN+3`
pub(crate) fn signal(number: i32) -> String {
    match Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) if (SIGRTMIN..=64).contains(&number) => format!("SIGRTMIN+{}", number - SIGRTMIN),
        Err(_) => format!("signal {number}"),
    }
}

/// The signals of a mask, bit N-1 for signal N.
pub(crate) fn signals(mask: u64) -> String {
    if mask == 0 {
        return "none".to_owned();
    }
    // All that can be blocked: SIGKILL and SIGSTOP cannot, glibc's own two are left alone by sigfillset.
    const ESSENTIAL: u64 = !(1 << (9 - 1) | 1 << (19 - 1) | 1 << (32 - 1) | 1 << (33 - 1));
    if mask & ESSENTIAL == ESSENTIAL {
        return "all".to_owned();
    }
    let names: Vec<String> = (1..=64).filter(|n| mask & (1 << (n - 1)) != 0).map(signal).collect();
    names.join(" ")
}

/// `SI_*` of a signal and its number, of a raw `siginfo_t`.
pub(crate) fn siginfo(raw: &[u8]) -> String {
    let number = raw.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b));
    signal(number)
}

macro_rules! calls {
    ($($name:ident)*) => {
        &[$((libc::$name as u64, stringify!($name))),*]
    };
}

/// The calls that threads wait in; what else a thread may be stopped in is over too soon to be seen often.
const CALLS: &[(u64, &str)] = calls![
    SYS_accept SYS_accept4 SYS_clock_nanosleep SYS_close SYS_connect SYS_epoll_pwait SYS_epoll_pwait2
    SYS_fallocate SYS_fcntl SYS_fdatasync SYS_flock SYS_fsync SYS_futex SYS_futex_waitv SYS_getrandom
    SYS_io_getevents SYS_io_uring_enter SYS_ioctl SYS_mq_timedreceive SYS_mq_timedsend
    SYS_msgrcv SYS_msgsnd SYS_nanosleep SYS_openat SYS_ppoll SYS_pread64 SYS_preadv SYS_pselect6
    SYS_pwrite64 SYS_pwritev SYS_read SYS_readv SYS_recvfrom SYS_recvmmsg SYS_recvmsg
    SYS_restart_syscall SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_sched_yield SYS_semop SYS_semtimedop
    SYS_sendfile SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_splice SYS_tee SYS_vmsplice SYS_wait4
    SYS_waitid SYS_write SYS_writev
];

#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[(u64, &str)] = calls![SYS_epoll_wait SYS_open SYS_pause SYS_poll SYS_select];
/// aarch64 came after the newer forms of these.
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[(u64, &str)] = &[];

/// `futex`, or `system call 999`.
pub(crate) fn call(number: u64) -> String {
    let found = CALLS.iter().chain(OLD_CALLS).find(|(n, _)| *n == number);
    match found {
        Some((_, name)) => name.trim_start_matches("SYS_").to_owned(),
        None => format!("system call {number}"),
    }
}

/// `rw append nonblock`, of the status flags of a descriptor.
pub(crate) fn open_flags(flags: u32) -> String {
    let flags = flags as i32;
    if flags & libc::O_PATH != 0 {
        return "path".to_owned();
    }
    let mut words = vec![match flags & libc::O_ACCMODE {
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    }];
    for (bit, word) in [
        (libc::O_APPEND, "append"),
        (libc::O_NONBLOCK, "nonblock"),
        (libc::O_ASYNC, "async"),
        (libc::O_DIRECT, "direct"),
        (libc::O_NOATIME, "noatime"),
    ] {
        if flags & bit != 0 {
            words.push(word);
        }
    }
    // O_SYNC holds the bit of O_DSYNC.
    if flags & libc::O_SYNC == libc::O_SYNC {
        words.push("sync");
    } else if flags & libc::O_DSYNC != 0 {
        words.push("dsync");
    }
    words.join(" ")
}

/// `CLOCK_*`
pub(crate) fn clock(number: i32) -> String {
    let name = match number {
        libc::CLOCK_REALTIME => "realtime",
        libc::CLOCK_MONOTONIC => "monotonic",
        libc::CLOCK_PROCESS_CPUTIME_ID => "process cpu",
        libc::CLOCK_THREAD_CPUTIME_ID => "thread cpu",
        libc::CLOCK_BOOTTIME => "boottime",
        libc::CLOCK_REALTIME_ALARM => "realtime alarm",
        libc::CLOCK_BOOTTIME_ALARM => "boottime alarm",
        libc::CLOCK_TAI => "tai",
        _ => return format!("clock {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(signal(15), "SIGTERM");
        assert_eq!(signal(37), "SIGRTMIN+3");
        assert_eq!(signal(32), "signal 32");
        assert_eq!(signals(0), "none");
        assert_eq!(signals(1 << 1 | 1 << 14), "SIGINT SIGTERM");
        assert_eq!(signals(!0), "all");
        assert_eq!(call(libc::SYS_futex as u64), "futex");
        assert_eq!(call(9999), "system call 9999");
        assert_eq!(clock(libc::CLOCK_MONOTONIC), "monotonic");
    }

    #[test]
    fn flags() {
        let word = |flags: i32| open_flags(flags as u32);
        assert_eq!(word(libc::O_RDONLY), "r");
        assert_eq!(word(libc::O_WRONLY | libc::O_APPEND), "w append");
        assert_eq!(word(libc::O_RDWR | libc::O_NONBLOCK | libc::O_SYNC), "rw nonblock sync");
        assert_eq!(word(libc::O_PATH | libc::O_DIRECTORY), "path");
    }
}
