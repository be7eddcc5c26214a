//! The program that the demo freezes: it counts, and notices if anything of it is lost.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::args::DemoProgramArgs;
use crate::exit::Exit;

/// Name of the file with its numbers.
pub(super) const NUMBERS: &str = "numbers";
/// The line it writes when something was lost.
pub(super) const BAD: &str = "BAD";
const INTERVAL: Duration = Duration::from_millis(100);
/// It ends by itself, should the demo be killed.
const LIFE: u64 = 600;
const SECRET: usize = 64 << 10;

pub(crate) fn run(args: &DemoProgramArgs) -> anyhow::Result<Exit> {
    // Away from the shell of the demo, and from whatever that has open: a program of its own, as a service
    // is.
    let _leader_already = nix::unistd::setsid();
    // SAFETY: nothing in this program has opened a descriptor yet, so that nobody owns one above 2.
    unsafe { libc::close_range(3, u32::MAX, 0) };

    let secret = secret(&args.dir).context("cannot make a temporary file")?;
    let mut numbers = OpenOptions::new().create(true).append(true).open(args.dir.join(NUMBERS))?;
    let pid = std::process::id();
    let whole = &AtomicBool::new(true);
    thread::scope(|scope| {
        thread::Builder::new().name("watcher".into()).spawn_scoped(scope, move || {
            while whole.load(Ordering::Relaxed) {
                whole.store(intact(&secret), Ordering::Relaxed);
                thread::sleep(INTERVAL);
            }
        })?;
        for number in 1..=LIFE {
            if !whole.load(Ordering::Relaxed) || std::process::id() != pid {
                break;
            }
            writeln!(numbers, "{number}")?;
            thread::sleep(INTERVAL);
        }
        if !whole.swap(false, Ordering::Relaxed) {
            writeln!(numbers, "{BAD}")?;
        }
        Ok(Exit::Ok)
    })
}

/// A file without a name: it exists for as long as somebody has it open.
fn secret(dir: &Path) -> std::io::Result<File> {
    let path = dir.join("secret");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    file.write_all_at(&content(), 0)?;
    Ok(file)
}

fn content() -> Vec<u8> {
    (0..SECRET).map(|i| (i % 251) as u8).collect()
}

fn intact(file: &File) -> bool {
    let mut found = vec![0; SECRET];
    file.read_exact_at(&mut found, 0).is_ok() && found == content()
}
