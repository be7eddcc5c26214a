//! Lazy restore: from the start of the command until the program runs, and until the command says so.
//!
//! The victim looks at the clock all the time, and remembers when it went on after a pause. The time between the start of
//! the command and the first pause's end after it holds everything: the start of the command, the restore, the first
//! instructions, and the pages they need, which come through userfaultfd(2) like all others.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::bench::Row;
use crate::cases::{FIRST_STEP, LAZY, RESTORE_PEAK};
use crate::command::run;
use crate::room;
use crate::sample::{Tool, empty, end, reap_session, start, warm};
use crate::series::Series;
use crate::victim::{GAPS, Kind, now};

/// Dumps a clock with 4 GiB once, and restores it so many times.
pub(crate) fn measure(rounds: usize, torpor: &Tool, dir: &Path) -> anyhow::Result<Row> {
    room::need(10 << 30, 5 << 30, dir)?;
    let Tool::Torpor(path) = torpor else { anyhow::bail!("only Torpor is measured here") };
    let image = empty(dir, "image")?;
    let mut victim = start(Kind::Clock, 4096, dir)?;
    let pid = victim.id() as i32;
    let gaps =
        fs::read_to_string(dir.join("ready"))?.trim().parse::<usize>().context("where the clock is")?;
    if let Err(e) = torpor.dump(pid, &image, &[]) {
        end(victim);
        return Err(e);
    }
    victim.wait()?;
    let names = [FIRST_STEP, "command returns", RESTORE_PEAK, "serves on, MiB"];
    let mut columns = names.map(|name| (name, Vec::new()));
    let mut failure = None;
    for _ in 0..rounds {
        // What is filled until it is ended. Where the host has much to do with what was just given up, each system call takes a
        // millisecond at times.
        warm(512 << 20);
        let begin = now();
        let ran = run(Command::new(path).args(["restore", "--detach", "--lazy"]).arg(&image));
        let step = ran.and_then(|ran| Ok((step_after(begin, pid, gaps)?, ran)));
        // SAFETY: kill takes numbers only; the process was restored by us.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        reap_session(pid);
        match step {
            Ok((step, ran)) => {
                let values = [step, ran.wall, ran.peak, ran.behind];
                columns.iter_mut().zip(values).for_each(|((_, samples), value)| samples.push(value));
            }
            Err(e) => failure = Some(format!("{e:#}")),
        }
    }
    let columns = columns.map(|(name, samples)| (name, Series::of(samples))).into();
    Ok(Row { case: LAZY.to_owned(), tool: torpor.name(), columns, failure })
}

/// Milliseconds from `begin` until the clock went on first.
fn step_after(begin: u64, pid: i32, gaps: usize) -> anyhow::Result<f64> {
    // It runs before the command returns, but may not have seen that it stood.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let mut seen = [0u64; GAPS];
    let into = libc::iovec { iov_base: seen.as_mut_ptr().cast(), iov_len: size_of_val(&seen) };
    let from = libc::iovec { iov_base: gaps as *mut libc::c_void, iov_len: size_of_val(&seen) };
    // SAFETY: as many bytes as there is room for.
    let got = unsafe { libc::process_vm_readv(pid, &raw const into, 1, &raw const from, 1, 0) };
    ensure!(got == size_of_val(&seen).cast_signed(), "the clock cannot be read");
    let first = seen.into_iter().filter(|time| *time >= begin).min().context("the clock has not gone on")?;
    Ok((first - begin) as f64 / 1e6)
}
