//! /proc/PID/stat: process group, session, terminal, the addresses that `PR_SET_MM` sets.
//!
//! One line of blank-separated fields (proc_pid_stat(5), fs/proc/array.c `do_task_stat`), the second of which is the
//! thread's name in parentheses, and may itself contain blanks, parentheses and newlines: the fields go on after the
//! *last* closing parenthesis. Addresses are printed as 0 (some, historically, as 1) to whoever may not ptrace the task.

use crate::text::{number, read_record, words};
use crate::{Error, Pid, Result, Tid};

/// The fields of the stat file that a dumper needs.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Stat {
    /// The thread (in the process's stat: the leader).
    pub pid: i32,
    /// Its name, as it is.
    pub comm: Vec<u8>,
    /// State letter.
    pub state: char,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal as an encoded device number; 0 for none.
    pub tty_nr: i32,
    /// Foreground process group of that terminal; -1 for none.
    pub tpgid: i32,
    /// `PF_*` of include/linux/sched.h.
    pub flags: u32,
    /// Clock ticks in user mode.
    pub utime: u64,
    /// Clock ticks in the kernel.
    pub stime: u64,
    /// Clock ticks in user mode of children waited for.
    pub cutime: i64,
    /// Clock ticks in the kernel of children waited for.
    pub cstime: i64,
    /// Priority as the kernel shows it.
    pub priority: i64,
    /// Nice value.
    pub nice: i32,
    /// Threads of the process.
    pub num_threads: u32,
    /// Clock ticks between boot and the start of the thread: with the pid, an identity.
    pub starttime: u64,
    /// Size of the address space, bytes.
    pub vsize: u64,
    /// Resident pages.
    pub rss: i64,
    /// Start of the code.
    pub start_code: u64,
    /// End of the code.
    pub end_code: u64,
    /// Bottom of the stack.
    pub start_stack: u64,
    /// Signal sent to the parent at exit; for a thread -1.
    pub exit_signal: i32,
    /// CPU it ran on last.
    pub processor: i32,
    /// Real-time priority, 0 if not real-time.
    pub rt_priority: u32,
    /// Scheduling policy.
    pub policy: u32,
    /// Start of the data.
    pub start_data: u64,
    /// End of the data.
    pub end_data: u64,
    /// Start of the brk area.
    pub start_brk: u64,
    /// Start of the arguments.
    pub arg_start: u64,
    /// End of the arguments.
    pub arg_end: u64,
    /// Start of the environment.
    pub env_start: u64,
    /// End of the environment.
    pub env_end: u64,
    /// Exit status in the form of waitpid(2), of a zombie.
    pub exit_code: i32,
}

impl Stat {
    /// Major and minor of the controlling terminal, if any.
    ///
    /// `new_encode_dev` (include/linux/kdev_t.h): minor bits 0-7 and 20-31, major bits 8-19.
    pub fn tty(&self) -> Option<(u32, u32)> {
        let device = self.tty_nr.cast_unsigned();
        (device != 0).then_some(((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00)))
    }
}

impl Stat {
    /// When it started, in nanoseconds since 1970 by the clock as it is set now; to the tick, 10 ms.
    pub fn started(&self) -> i64 {
        // SAFETY: sysconf takes a number.
        let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1);
        let boot = now(libc::CLOCK_REALTIME) - now(libc::CLOCK_BOOTTIME);
        boot.saturating_add((self.starttime as i64).saturating_mul(1_000_000_000 / hertz))
    }
}

fn now(clock: libc::clockid_t) -> i64 {
    // SAFETY: an all-zero timespec is a valid one, and clock_gettime fills it.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(clock, &raw mut time);
        time
    };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// The stat of a process.
pub fn of_process(pid: Pid) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    parse_file(&path, &read_record(&path)?)
}

/// The stat of one thread.
pub fn of_task(pid: Pid, tid: Tid) -> Result<Stat> {
    let path = format!("/proc/{pid}/task/{tid}/stat");
    parse_file(&path, &read_record(&path)?)
}

/// Parses the text of a stat file.
pub fn parse(text: &[u8]) -> Result<Stat> {
    parse_file("stat", text)
}

fn parse_file(file: &str, text: &[u8]) -> Result<Stat> {
    fields(text).ok_or_else(|| Error::parse(file, text))
}

fn fields(text: &[u8]) -> Option<Stat> {
    let open = text.iter().position(|byte| *byte == b'(')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let comm = text.get(open + 1..close)?;
    let rest: Vec<&[u8]> = words(text[close + 1..].trim_ascii()).collect();
    // Fields are numbered from 1 in the manual; `rest` begins with the third.
    let field = |at: usize| rest.get(at - 3).copied();
    fn read<T: std::str::FromStr>(word: Option<&[u8]>) -> Option<T> {
        number(word?)
    }
    Some(Stat {
        pid: number(&text[..open])?,
        comm: comm.to_vec(),
        state: char::from(*field(3)?.first()?),
        ppid: read(field(4))?,
        pgrp: read(field(5))?,
        session: read(field(6))?,
        tty_nr: read(field(7))?,
        tpgid: read(field(8))?,
        flags: read(field(9))?,
        utime: read(field(14))?,
        stime: read(field(15))?,
        cutime: read(field(16))?,
        cstime: read(field(17))?,
        priority: read(field(18))?,
        nice: read(field(19))?,
        num_threads: read(field(20))?,
        starttime: read(field(22))?,
        vsize: read(field(23))?,
        rss: read(field(24))?,
        start_code: read(field(26))?,
        end_code: read(field(27))?,
        start_stack: read(field(28))?,
        exit_signal: read(field(38))?,
        processor: read(field(39))?,
        rt_priority: read(field(40))?,
        policy: read(field(41))?,
        start_data: read(field(45))?,
        end_data: read(field(46))?,
        start_brk: read(field(47))?,
        arg_start: read(field(48))?,
        arg_end: read(field(49))?,
        env_start: read(field(50))?,
        env_end: read(field(51))?,
        exit_code: read(field(52))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: &str = "R 3970 3971 3429 34818 3972 4194560 3115 6583 24 2 3 1 4 5 20 -5 2 0 119414 19025920 3676 \
18446744073709551615 94419649449984 94419649450325 140732078930608 0 0 0 0 16781312 2 0 0 0 17 1 9 1 0 0 0 \
94419649461680 94419649462296 94419843215360 140732078938161 140732078938213 140732078938213 140732078940111 256\n";

    #[test]
    fn a_process_has_started_by_now() {
        let before = now(libc::CLOCK_REALTIME);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let started = of_process(Pid(child.id() as i32)).unwrap().started();
        child.kill().and_then(|()| child.wait()).unwrap();
        let tick = 20_000_000;
        assert!((before - tick..=now(libc::CLOCK_REALTIME) + tick).contains(&started), "{before} {started}");
    }

    #[test]
    fn text() {
        let stat = parse([b"3973 (a) R 1 (\n\xff) ", TAIL.as_bytes()].concat().as_slice()).unwrap();
        assert_eq!((stat.pid, stat.comm.as_slice(), stat.state), (3973, &b"a) R 1 (\n\xff"[..], 'R'));
        assert_eq!((stat.ppid, stat.pgrp, stat.session, stat.tpgid), (3970, 3971, 3429, 3972));
        assert_eq!(stat.tty(), Some((136, 2)));
        assert_eq!(stat.flags, 4_194_560);
        assert_eq!((stat.utime, stat.stime, stat.cutime, stat.cstime), (3, 1, 4, 5));
        assert_eq!((stat.nice, stat.num_threads, stat.starttime), (-5, 2, 119_414));
        assert_eq!((stat.start_code, stat.start_stack), (94_419_649_449_984, 140_732_078_930_608));
        assert_eq!((stat.exit_signal, stat.processor, stat.rt_priority, stat.policy), (17, 1, 9, 1));
        assert_eq!(
            (stat.start_brk, stat.env_end, stat.exit_code),
            (94_419_843_215_360, 140_732_078_940_111, 256)
        );
    }

    #[test]
    fn odd_input_is_an_error() {
        for text in [&b""[..], b"1 (x", b"1 )x( R", b"1 (x)", b"1 (x) R 1 2", b"\xff (x) R 1 2"] {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn our_own() {
        let stat = of_process(Pid::this()).unwrap();
        assert_eq!(stat.pid, Pid::this().0);
        assert!(stat.start_stack != 0 && stat.num_threads >= 1);
        let stat = of_task(Pid::this(), Tid::this()).unwrap();
        assert_eq!(stat.pid, Tid::this().0);
    }
}
