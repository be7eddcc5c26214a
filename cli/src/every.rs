//! `torpor dump --every`: images of a process that runs, one after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use torpor_dumper::Error as DumpError;
use torpor_image::Image;
use torpor_image::manifest::Manifest;

use crate::args::DumpArgs;
use crate::dump::{self, Afterwards, Choices, Watched};
use crate::exit::{self, Exit};
use crate::output;

/// Digits of the names of the directories.
const DIGITS: usize = 6;

/// Reads `500ms`, `30s`, `5m`, `1h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().map_err(|_| "say it like 30s, 5m or 1h".to_owned())?;
    let milliseconds = match &text[at..] {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        unit => return Err(format!("`{unit}` is none of ms, s, m, h")),
    };
    match number.checked_mul(milliseconds) {
        Some(0) | None => Err("it must be more than nothing, and less than for ever".to_owned()),
        Some(all) => Ok(Duration::from_millis(all)),
    }
}

pub(crate) fn run(args: &DumpArgs, choices: &Choices, every: Duration) -> anyhow::Result<Exit> {
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("cannot make directory `{}`", args.dir.display()))?;
    let mut images = images(&args.dir);
    let mut number = images.last().map_or(1, |(number, _)| number + 1);
    let mut watched = Watched { parent: None, tracking: None, link: true };
    let mut done = 0;
    loop {
        let begin = Instant::now();
        let dir = args.dir.join(format!("{number:0DIGITS$}"));
        let before = std::mem::take(&mut watched);
        match dump::followed(args.pid, &dir, Afterwards::Running, args.fsync, choices.clone(), before) {
            Ok((summary, held, tracking)) => {
                if !args.quiet {
                    dump::tell(&summary, args, Afterwards::Running);
                }
                done += 1;
                let parent = Image::open_with(&dir, &choices.identities)?;
                watched = Watched { parent: Some(parent), tracking, link: true };
                images.push((number, dir));
                if let Some(keep) = args.keep {
                    prune(&mut images, keep as usize);
                }
                // A signal that asks us to end does so now.
                drop(held);
            }
            Err(e) if done > 0 && has_ended(&e) => {
                output::note(&format!("pid {} has ended; {done} dumps were made", args.pid));
                return Ok(Exit::Ok);
            }
            Err(e) if done == 0 => return Err(e),
            // It may go better the next time.
            Err(e) => {
                output::complain(&exit::message(&e));
                watched = Watched { parent: None, tracking: None, link: true };
            }
        }
        number += 1;
        std::thread::sleep(every.saturating_sub(begin.elapsed()));
    }
}

fn has_ended(e: &anyhow::Error) -> bool {
    matches!(e.downcast_ref(), Some(DumpError::NoProcess(_) | DumpError::Died { .. }))
}

/// The images that are there, by number.
fn images(dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let digits = name.len() >= DIGITS && name.bytes().all(|b| b.is_ascii_digit());
        Some((digits.then(|| name.parse().ok())??, entry.path()))
    });
    let mut all: Vec<(u64, PathBuf)> = numbered.collect();
    all.sort();
    all
}

/// Removes the oldest. Its manifest goes first: what is left of it is no image then.
fn prune(images: &mut Vec<(u64, PathBuf)>, keep: usize) {
    while images.len() > keep {
        let (_, dir) = images.remove(0);
        let manifests = [Manifest::FILE.to_owned(), format!("{}.age", Manifest::FILE)];
        let removed = manifests.iter().filter(|name| std::fs::remove_file(dir.join(name)).is_ok()).count();
        if removed == 0 {
            continue;
        }
        if let Err(e) = std::fs::remove_dir_all(&dir) {
            output::note(&format!("cannot remove `{}`: {e}", dir.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "s", "0s", "5 s", "-1s", "5d", "99999999999999999999h", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
