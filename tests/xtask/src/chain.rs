//! Incremental dumps: how long a process stands still for each dump of a chain, while it is written to.

use std::path::Path;

use crate::cases::LATER;
use crate::sample::{Tool, empty, end, start, warm};
use crate::series::Series;
use crate::victim::Kind;
use crate::{bench::Row, room};

/// Dumps of a chain after the first.
const LENGTH: usize = 5;
/// What the process writes in between goes on for so long.
const BETWEEN: std::time::Duration = std::time::Duration::from_millis(500);

/// Measures one chain of [`LENGTH`] dumps after each other; there is nothing like it of CRIU's on a kernel without soft-dirty.
pub(crate) fn measure(
    name: &str,
    kind: Kind,
    chains: usize,
    torpor: &Tool,
    dir: &Path,
) -> anyhow::Result<Row> {
    // The victim and all images, the first of which is whole.
    let taken = LENGTH + 3;
    room::need((taken as u64) << 30, (LENGTH as u64 + 2) << 30, dir)?;
    let mut first = Vec::new();
    let mut later = Vec::new();
    let mut failure = None;
    for _ in 0..chains {
        warm(taken << 30);
        match chain(kind, 1024, LENGTH, torpor, dir) {
            Ok(mut dumps) => {
                first.push(dumps.remove(0));
                later.extend(dumps);
            }
            Err(e) => failure = Some(format!("{e:#}")),
        }
    }
    let of = |dumps: &[Link], what: fn(&Link) -> f64| Series::of(dumps.iter().map(what));
    Ok(Row {
        case: name.to_owned(),
        tool: torpor.name(),
        columns: vec![
            ("frozen, first dump", of(&first, |l| l.frozen)),
            (LATER, of(&later, |l| l.frozen)),
            ("dump, later", of(&later, |l| l.wall)),
            ("written, later, MiB", of(&later, |l| l.written)),
            ("dump, later, MiB", of(&later, |l| l.peak)),
            ("stays behind, MiB", of(&later, |l| l.behind)),
        ],
        failure,
    })
}

/// One dump of a chain.
#[derive(Debug)]
pub(crate) struct Link {
    /// All that it stood still for.
    pub(crate) frozen: f64,
    pub(crate) wall: f64,
    pub(crate) written: f64,
    peak: f64,
    behind: f64,
}

/// The first dump of a fresh victim, and so many after it.
pub(crate) fn chain(
    kind: Kind,
    size: usize,
    length: usize,
    torpor: &Tool,
    dir: &Path,
) -> anyhow::Result<Vec<Link>> {
    let chain = empty(dir, "chain")?;
    let victim = start(kind, size, dir)?;
    let dumps = links(victim.id() as i32, length, torpor, &chain);
    end(victim);
    std::fs::remove_dir_all(&chain)?;
    dumps
}

/// Dumps a process that runs, and so many times after that.
pub(crate) fn links(pid: i32, length: usize, torpor: &Tool, dir: &Path) -> anyhow::Result<Vec<Link>> {
    let mut dumps = Vec::new();
    let mut parent: Option<std::path::PathBuf> = None;
    for i in 0..=length {
        let image = dir.join(i.to_string());
        let mut options = vec!["--track"];
        if let Some(parent) = &parent {
            options.extend(["--parent", parent.to_str().unwrap_or_default()]);
        }
        let dump = torpor.dump(pid, &image, &options)?;
        dumps.push(Link {
            frozen: dump.freezing + dump.frozen,
            wall: dump.wall,
            written: size_of_files(&image, |_| true) as f64 / f64::from(1 << 20),
            peak: dump.peak,
            behind: dump.behind,
        });
        parent = Some(image);
        std::thread::sleep(BETWEEN);
    }
    Ok(dumps)
}

/// Bytes of the files of a directory with such names.
pub(crate) fn size_of_files(dir: &Path, named: fn(&str) -> bool) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let entries = entries.filter(|e| e.file_name().to_str().is_some_and(named));
    entries.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}
