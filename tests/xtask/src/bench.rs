//! `cargo xtask bench`: the cases, interleaved, as medians and ratios.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;

use crate::picture;
use crate::sample::{Sample, Tool, warm};
use crate::victim::Kind;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Samples of each case and tool.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Only cases whose name contains this.
    #[arg(long)]
    case: Option<String>,
    /// The torpor to measure; built from this tree when not given.
    #[arg(long)]
    torpor: Option<PathBuf>,
    /// The criu to measure beside it; the one on PATH when not given.
    #[arg(long)]
    criu: Option<PathBuf>,
    /// Where images are written.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write everything that was measured to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the frozen time against memory, for each way to freeze and for criu, into FILE (SVG).
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

/// Name, what it is, memory to be made warm. `GOALS` names cases by these.
const CASES: &[(&str, Kind, usize, usize)] = &[
    ("4 MiB", Kind::Memory, 4, 64 << 20),
    ("1 GiB", Kind::Memory, 1024, 4 << 30),
    ("4 GiB", Kind::Memory, 4096, 12 << 30),
    ("1 GiB, huge pages", Kind::Huge, 1024, 4 << 30),
    ("1,000 sleeping threads", Kind::Sleeping, 1000, 256 << 20),
    ("10 spinning threads", Kind::Spinning, 10, 64 << 20),
    ("100 sleeping threads", Kind::Sleeping, 100, 64 << 20),
    ("100 spinning threads", Kind::Spinning, 100, 64 << 20),
    ("10,000 areas", Kind::Areas, 10_000, 256 << 20),
    ("2,000 descriptors", Kind::Descriptors, 2000, 64 << 20),
    ("50 processes of 4 MiB", Kind::Processes, 50, 1 << 30),
    ("50 processes of 4 MiB, no huge pages", Kind::SmallPages, 50, 1 << 30),
    ("200 processes of 4 MiB", Kind::Processes, 200, 3 << 30),
    ("1,000 processes of 4 MiB", Kind::Processes, 1000, 12 << 30),
    ("50 processes, 10,000 descriptors", Kind::Tables, 50, 256 << 20),
    ("1,000 TCP connections", Kind::Connections, 1000, 256 << 20),
];

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // SAFETY: prctl with numbers only. Restored victims become our children, to be ended and waited for.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    let mut tools = vec![Tool::Torpor(torpor(arguments.torpor.as_ref())?)];
    if let Some(criu) = arguments.criu.clone().or_else(|| on_path("criu")) {
        tools.push(Tool::Criu(criu));
    }
    let parent = arguments.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = parent.join(format!("torpor-bench-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    let result = match &arguments.picture {
        Some(file) => picture::draw(arguments.rounds, &tools, &dir, file),
        None => measure(arguments, &tools, &dir),
    };
    fs::remove_dir_all(&dir)?;
    result
}

/// A column of the table: its name, and what of a sample is in it.
type Column = (&'static str, fn(&Sample) -> f64);

/// A column for each of [`MODES`], and the others.
const COLUMNS: [Column; 8] = [
    ("freezing", |s| s.freezing),
    ("frozen", |s| s.frozen),
    ("left running, copy", |s| s.passing[0]),
    ("left running, fork", |s| s.passing[1]),
    ("dump", |s| s.dump),
    ("restore", |s| s.restore),
    ("dump, KiB", |s| s.dump_memory),
    ("restore, KiB", |s| s.restore_memory),
];

/// Case, column, and the part of CRIU's median that is aimed at.
const GOALS: &[(&str, &str, f64)] = &[
    ("4 MiB", "frozen", 1.0 / 10.0),
    ("4 MiB", "dump", 1.0 / 25.0),
    ("4 MiB", "restore", 1.0 / 25.0),
    ("1 GiB", "left running, copy", 1.0 / 6.0),
    ("1 GiB", "left running, fork", 1.0 / 15.0),
    ("1 GiB, huge pages", "left running, fork", 1.0 / 40.0),
    ("1 GiB", "dump", 1.0 / 2.5),
    ("1 GiB", "restore", 1.0 / 5.0),
    ("4 GiB", "restore", 1.0 / 6.0),
    ("10 spinning threads", "freezing", 1.0 / 100.0),
    ("100 spinning threads", "freezing", 1.0 / 100.0),
    ("1,000 sleeping threads", "frozen", 1.0 / 15.0),
    ("10,000 areas", "frozen", 1.0 / 8.0),
    ("2,000 descriptors", "frozen", 1.0 / 3.0),
    ("50 processes of 4 MiB", "frozen", 1.0 / 5.0),
    ("50 processes of 4 MiB", "restore", 1.0 / 8.0),
];

fn measure(arguments: &Arguments, tools: &[Tool], dir: &std::path::Path) -> anyhow::Result<()> {
    let mut json = Vec::new();
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    println!("| case | tool | {} |", names.join(" | "));
    println!("|---|---|{}", "---|".repeat(names.len()));
    let mut ratios = Vec::new();
    for (name, kind, size, memory) in CASES {
        if arguments.case.as_ref().is_some_and(|c| !name.contains(c.as_str())) {
            continue;
        }
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); tools.len()];
        let mut failures = vec![None; tools.len()];
        for _ in 0..arguments.rounds {
            for (i, tool) in tools.iter().enumerate() {
                warm(*memory);
                match tool.sample(*kind, *size, dir) {
                    Ok(sample) => samples[i].push(sample),
                    Err(e) => failures[i] = Some(format!("{e:#}")),
                }
            }
        }
        let sorted = |samples: &[Sample], of: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        for ((tool, samples), failure) in tools.iter().zip(&samples).zip(&failures) {
            let columns: Vec<Vec<f64>> = COLUMNS.iter().map(|(_, of)| sorted(samples, *of)).collect();
            let mut row = serde_json::json!({ "case": name, "tool": tool.name(), "failure": failure });
            for (name, values) in names.iter().zip(&columns) {
                row[*name] = serde_json::json!(values);
            }
            json.push(row);
            let cells: Vec<String> = columns.iter().map(|c| cell(c)).collect();
            println!("| {name} | {} | {} |", tool.name(), cells.join(" | "));
            if let Some(failure) = failure {
                eprintln!("{} failed on {name}: {failure}", tool.name());
            }
        }
        for (_, column, goal) in GOALS.iter().filter(|(case, ..)| case == name) {
            let of = COLUMNS.iter().find(|(name, _)| name == column).context("a column")?.1;
            let medians: Vec<Option<f64>> = samples.iter().map(|s| median(&sorted(s, of))).collect();
            if let [Some(own), Some(its)] = medians[..] {
                ratios.push((name, *column, own, its, *goal));
            }
        }
    }
    if !ratios.is_empty() {
        println!("\n| case | what | torpor | criu | ratio | goal | |\n|---|---|---|---|---|---|---|");
        for (case, what, own, its, goal) in ratios {
            let (ratio, wanted) = (its / own, 1.0 / goal);
            let met = if ratio >= wanted { "met" } else { "missed" };
            println!("| {case} | {what} | {own:.1} | {its:.1} | 1/{ratio:.1} | 1/{wanted:.1} | {met} |");
        }
    }
    if let Some(file) = &arguments.json {
        let all = serde_json::json!({ "unit": "ms, sorted", "rounds": arguments.rounds, "rows": json });
        fs::write(file, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

/// The middle one of sorted values.
pub(crate) fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

/// Median, and best to worst, in milliseconds.
fn cell(sorted: &[f64]) -> String {
    let (Some(best), Some(worst)) = (sorted.first(), sorted.last()) else { return "failed".into() };
    format!("{:.1} ({best:.1}–{worst:.1})", sorted[sorted.len() / 2])
}

/// The torpor that was named, or else one built from this tree.
pub(crate) fn torpor(named: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    named.map_or_else(build, |path| Ok(fs::canonicalize(path)?))
}

fn build() -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(["build", "--quiet", "--release", "-p", "torpor"]).status()?;
    anyhow::ensure!(status.success(), "torpor does not build");
    // The task itself was built into the same directory.
    Ok(std::env::current_exe()?.with_file_name("torpor"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|p| p.is_file())
}
