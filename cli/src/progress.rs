//! A progress bar for work that takes long, on a terminal only.
//!
//! It is drawn by whoever reports progress, not by a thread of its own: a restore counts on what is mapped in
//! this process. While a process stands frozen nothing here may block, so nothing is drawn on a
//! terminal that takes no output (Ctrl-S) or is another job's (`stty tostop`).

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::output;

/// Work that is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_millis(300);
const INTERVAL: Duration = Duration::from_millis(100);
const WIDTH: u64 = 30;

/// The bar; it is wiped when dropped.
pub(crate) struct Progress {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    begin: Instant,
    /// When to draw again, in milliseconds since the beginning; 0 before the first time.
    next: AtomicU64,
    enabled: bool,
}

impl Progress {
    /// A bar for `total` bytes of work, which may be an estimate.
    pub(crate) fn new(what: &'static str, total: u64) -> Self {
        let enabled = std::io::stderr().is_terminal();
        Progress {
            what,
            total,
            done: AtomicU64::new(0),
            begin: Instant::now(),
            next: AtomicU64::new(0),
            enabled,
        }
    }

    /// `bytes` more are done. From any thread.
    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let elapsed = self.begin.elapsed();
        if !self.enabled || elapsed < PATIENCE {
            return;
        }
        let (now, next) = (elapsed.as_millis() as u64, self.next.load(Ordering::Relaxed));
        if now < next {
            return;
        }
        // Of several threads only one draws.
        let after = now + INTERVAL.as_millis() as u64;
        let mine = self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if mine && ready() {
            let line = line(self.what, done, self.total, elapsed);
            let _unread = write!(std::io::stderr(), "\r{line}\x1b[K");
        }
    }

    /// Wipes the bar.
    pub(crate) fn finish(&self) {
        if self.next.swap(0, Ordering::Relaxed) != 0 {
            let _unread = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Whether the terminal is ours and takes output now.
fn ready() -> bool {
    let stderr = std::io::stderr();
    let ours = nix::unistd::tcgetpgrp(&stderr).is_ok_and(|group| group == nix::unistd::getpgrp());
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    ours && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let part = |of: u64| (u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1))) as u64;
    let bar: String = (0..WIDTH).map(|i| if i < part(WIDTH) { '#' } else { '.' }).collect();
    let speed = output::bytes((done as f64 / elapsed.as_secs_f64().max(0.001)) as u64);
    format!(
        "{what} [{bar}] {:3} %  {} of {}  {speed}/s",
        part(100),
        output::bytes(done),
        output::bytes(total)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let second = Duration::from_secs(1);
        let half = line("dumping", 512, 1024, second);
        assert_eq!(half, "dumping [###############...............]  50 %  512 B of 1.0 KiB  512 B/s");
        // An estimate may be too low, or nothing at all.
        assert!(line("dumping", 2048, 1024, second).contains("100 %"));
        assert!(line("dumping", 0, 0, Duration::ZERO).contains("  0 %"));
        line("dumping", u64::MAX, u64::MAX, second);
    }
}
