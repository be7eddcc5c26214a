//! `cargo xtask bench`: the cases, interleaved, as medians and ratios.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;

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
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const CASES: &[(&str, Kind, usize, usize)] = &[
    ("4 MiB", Kind::Memory, 4, 64 << 20),
    ("1 GiB", Kind::Memory, 1024, 4 << 30),
    ("1 GiB, huge pages", Kind::Huge, 1024, 4 << 30),
    ("1,000 sleeping threads", Kind::Sleeping, 1000, 256 << 20),
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
    let mut tools = vec![Tool::Torpor(match &arguments.torpor {
        Some(path) => path.clone(),
        None => build()?,
    })];
    if let Some(criu) = arguments.criu.clone().or_else(|| on_path("criu")) {
        tools.push(Tool::Criu(criu));
    }
    let parent = arguments.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = parent.join(format!("torpor-bench-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    let result = measure(arguments, &tools, &dir);
    fs::remove_dir_all(&dir)?;
    result
}

fn measure(arguments: &Arguments, tools: &[Tool], dir: &std::path::Path) -> anyhow::Result<()> {
    let mut json = Vec::new();
    if !arguments.json {
        println!("| case | tool | freezing | frozen | left running | dump | restore |");
        println!("|---|---|---|---|---|---|---|");
    }
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
        for ((tool, samples), failure) in tools.iter().zip(&samples).zip(&failures) {
            let column = |f: fn(&Sample) -> f64| {
                let mut values: Vec<f64> = samples.iter().map(f).collect();
                values.sort_by(f64::total_cmp);
                values
            };
            let columns: [fn(&Sample) -> f64; 5] =
                [|s| s.freezing, |s| s.frozen, |s| s.passing, |s| s.dump, |s| s.restore];
            if arguments.json {
                json.push(serde_json::json!({
                    "case": name, "tool": tool.name(), "unit": "ms", "failure": failure,
                    "freezing": column(columns[0]), "frozen": column(columns[1]),
                    "left_running": column(columns[2]),
                    "dump": column(columns[3]), "restore": column(columns[4]),
                }));
                continue;
            }
            let cells: Vec<String> = columns.iter().map(|c| cell(&column(*c))).collect();
            println!("| {name} | {} | {} |", tool.name(), cells.join(" | "));
            if let Some(failure) = failure {
                eprintln!("{} failed on {name}: {failure}", tool.name());
            }
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&json)?);
    }
    Ok(())
}

/// Median, and best to worst, in milliseconds.
fn cell(sorted: &[f64]) -> String {
    let (Some(best), Some(worst)) = (sorted.first(), sorted.last()) else { return "failed".into() };
    format!("{:.1} ({best:.1}–{worst:.1})", sorted[sorted.len() / 2])
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
