//! /proc/PID/timers: the POSIX timers of a process (needs CONFIG_CHECKPOINT_RESTORE).
//!
//! Four lines per timer (fs/proc/base.c `show_timer`), the newest first. What is armed and how it runs is not there:
//! that is `timer_gettime` and `timer_getoverrun` inside the task.

use crate::text::{hex, key_value, lines, number, read};
use crate::{Error, Pid, Result};

/// How a timer notifies.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Notify {
    /// `SIGEV_SIGNAL`, with or without `SIGEV_THREAD_ID` (see `Target`).
    Signal,
    /// `SIGEV_NONE`.
    None,
    /// `SIGEV_THREAD`, which means nothing to the kernel.
    Thread,
}

/// Whom a timer notifies.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Target {
    /// The process.
    Process(i32),
    /// One thread: `SIGEV_THREAD_ID`.
    Thread(i32),
}

/// One timer.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct PosixTimer {
    /// Its id, unique in the process.
    pub id: i32,
    /// The signal.
    pub signo: i32,
    /// The signal's value.
    pub sigval: u64,
    /// How it notifies.
    pub notify: Notify,
    /// Whom, numbered in the pid namespace of this /proc.
    pub target: Target,
    /// Its clock.
    pub clockid: i32,
}

/// Reads the timers, newest first.
pub fn timers(pid: Pid) -> Result<Vec<PosixTimer>> {
    let path = format!("/proc/{pid}/timers");
    parse_file(&path, &read(&path)?)
}

/// Parses the text of a timers file.
pub fn parse(text: &[u8]) -> Result<Vec<PosixTimer>> {
    parse_file("timers", text)
}

fn parse_file(file: &str, text: &[u8]) -> Result<Vec<PosixTimer>> {
    let mut all: Vec<PosixTimer> = Vec::new();
    for line in lines(text) {
        add(&mut all, line).ok_or_else(|| Error::parse(file, line))?;
    }
    Ok(all)
}

fn add(all: &mut Vec<PosixTimer>, line: &[u8]) -> Option<()> {
    let (key, value) = key_value(line)?;
    if key == b"ID" {
        all.push(PosixTimer {
            id: number(value)?,
            signo: 0,
            sigval: 0,
            notify: Notify::None,
            target: Target::Process(0),
            clockid: 0,
        });
        return Some(());
    }
    let timer = all.last_mut()?;
    match key {
        // signal: 10/00000000007f0012
        b"signal" => {
            let (signo, sigval) = split(value, b'/')?;
            timer.signo = number(signo)?;
            timer.sigval = hex(sigval)?;
        }
        // notify: signal/tid.3973
        b"notify" => {
            let (how, whom) = split(value, b'/')?;
            timer.notify = match how {
                b"signal" => Notify::Signal,
                b"none" => Notify::None,
                b"thread" => Notify::Thread,
                _ => return None,
            };
            let (kind, id) = split(whom, b'.')?;
            timer.target = match kind {
                b"pid" => Target::Process(number(id)?),
                b"tid" => Target::Thread(number(id)?),
                _ => return None,
            };
        }
        b"ClockID" => timer.clockid = number(value)?,
        _ => {}
    }
    Some(())
}

fn split(value: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let at = value.iter().position(|byte| *byte == at)?;
    Some((&value[..at], &value[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text() {
        let all = parse(
            b"ID: 2\nsignal: 12/00000000007f0012\nnotify: signal/tid.3973\nClockID: 1\n\
              ID: 0\nsignal: 0/0000000000000000\nnotify: none/pid.3974\nClockID: -6\n",
        )
        .unwrap();
        assert_eq!(
            all,
            [
                PosixTimer {
                    id: 2,
                    signo: 12,
                    sigval: 0x7f_0012,
                    notify: Notify::Signal,
                    target: Target::Thread(3973),
                    clockid: 1
                },
                PosixTimer {
                    id: 0,
                    signo: 0,
                    sigval: 0,
                    notify: Notify::None,
                    target: Target::Process(3974),
                    clockid: -6
                },
            ]
        );
        assert!(parse(b"").unwrap().is_empty());
    }

    #[test]
    fn odd_input_is_an_error() {
        for text in [
            &b"signal: 1/2\n"[..],
            b"ID: x\n",
            b"ID: 1\nnotify: signal\n",
            b"ID: 1\nnotify: hope/pid.1\n",
            b"\xff\n",
        ] {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }
}
