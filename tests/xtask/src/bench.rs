//! `cargo xtask bench`: the cases, interleaved, as medians and parts of CRIU's, beside what is aimed at and what bounds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use crate::bounds::{self, Bound};
use crate::cases::{Aim, CASES, COLUMNS, Case, GOALS, INCREMENTAL, LAZY};
use crate::sample::{Sample, Tool, warm};
use crate::series::{Series, figure, part};
use crate::{chain, goals, lazy, picture, room};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Samples of each case and tool, where a case does not take fewer.
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    rounds: usize,
    /// Only cases whose name contains this, and no bounds unless asked for; may be repeated.
    #[arg(long)]
    case: Vec<String>,
    /// Only the bounds: what the mechanisms of the kernel take alone.
    #[arg(long)]
    bounds: bool,
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
    /// Draw the frozen time against memory, for each way to freeze and for criu, into FILE (SVG) as well.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

/// What one tool took for one case.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) tool: &'static str,
    pub(crate) columns: Vec<(&'static str, Series)>,
    /// Why samples are missing.
    pub(crate) failure: Option<String>,
}

impl Row {
    /// The median of a column.
    pub(crate) fn median(&self, column: &str) -> Option<f64> {
        self.columns.iter().find(|(name, _)| *name == column)?.1.median()
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    adopt();
    let mut tools = vec![Tool::Torpor(torpor(arguments.torpor.as_ref())?)];
    if let Some(criu) = arguments.criu.clone().or_else(|| on_path("criu")) {
        tools.push(Tool::Criu(criu));
    }
    let dir = directory(arguments.dir.as_deref())?;
    let machine = room::machine(&dir);
    println!("{machine}\n");
    let rows = if arguments.bounds { Vec::new() } else { measure(arguments, &tools, &dir) };
    let bounds = if arguments.bounds || arguments.case.is_empty() {
        bounds::measure(arguments.rounds.min(5), &tools[0], &dir)
    } else {
        Vec::new()
    };
    let verdicts = goals::judge(&rows);
    goals::print(&verdicts);
    tell_bounds(&bounds, &rows);
    let mut drawn = Value::Null;
    if let Some(file) = &arguments.picture {
        drawn = picture::draw(arguments.rounds.min(3), &tools, &dir, file)?;
    }
    fs::remove_dir_all(&dir)?;
    if let Some(file) = &arguments.json {
        let all = json!({
            "unit": "ms, or MiB where it says so; sorted",
            "machine": machine,
            "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
            "goals": verdicts.iter().map(goals::Verdict::json).collect::<Vec<_>>(),
            "bounds": bounds.iter().map(Bound::json).collect::<Vec<_>>(),
            "picture": drawn,
        });
        fs::write(file, serde_json::to_string_pretty(&all)? + "\n")?;
    }
    Ok(())
}

fn measure(arguments: &Arguments, tools: &[Tool], dir: &Path) -> Vec<Row> {
    // A whole name means that case alone.
    let named = |name: &str| {
        let whole = |part: &str| CASES.iter().any(|case| case.name == part);
        let fits = |part: &String| if whole(part) { name == part } else { name.contains(part.as_str()) };
        arguments.case.iter().any(fits)
    };
    let wanted = |name: &str| arguments.case.is_empty() || named(name);
    let mut rows = Vec::new();
    let columns: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    println!("| case | tool | {} |", columns.join(" | "));
    println!("|---|---|{}", "---|".repeat(columns.len()));
    for case in CASES.iter().filter(|case| if case.named { named(case.name) } else { wanted(case.name) }) {
        let memory = (case.memory as u64) << 20;
        // What it has, what an image of it takes in the page cache, and what is made warm.
        if let Err(why) = room::need(3 * memory + (64 << 20), 2 * memory + (64 << 20), dir) {
            println!("| {} | | {why} |", case.name);
            continue;
        }
        for row in case_rows(case, arguments.rounds.min(case.rounds), tools, dir) {
            row.print();
            rows.push(row);
        }
    }
    println!();
    for (name, kind) in INCREMENTAL {
        if wanted(name) {
            let chains = arguments.rounds.min(2);
            keep(&mut rows, name, chain::measure(name, kind, chains, &tools[0], dir));
        }
    }
    if wanted(LAZY) {
        keep(&mut rows, LAZY, lazy::measure(arguments.rounds.min(7), &tools[0], dir));
    }
    rows
}

/// Keeps a row with columns of its own, and prints it.
fn keep(rows: &mut Vec<Row>, name: &str, row: anyhow::Result<Row>) {
    match row {
        Ok(row) => {
            let heads: Vec<&str> = row.columns.iter().map(|(name, _)| *name).collect();
            println!("\n| case | tool | {} |\n|---|---|{}", heads.join(" | "), "---|".repeat(heads.len()));
            row.print();
            rows.push(row);
        }
        Err(e) => println!("\n{name}: {e:#}"),
    }
}

/// The tools take turns; one that has failed twice has no more of them.
fn case_rows(case: &Case, rounds: usize, tools: &[Tool], dir: &Path) -> Vec<Row> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); tools.len()];
    let mut failures: Vec<Vec<String>> = vec![Vec::new(); tools.len()];
    for _ in 0..rounds {
        for (i, tool) in tools.iter().enumerate() {
            if failures[i].len() > 1 {
                continue;
            }
            // The victim, images in the page cache, what is restored, and as much again that was given back meanwhile.
            warm(((case.memory << 20) * 4).min(12 << 30) + (64 << 20));
            match tool.sample(case.kind, case.size, case.passing, dir) {
                Ok(sample) => samples[i].push(sample),
                Err(e) => failures[i].push(format!("{e:#}")),
            }
        }
    }
    let row = |((tool, samples), failures): ((&Tool, &Vec<Sample>), &Vec<String>)| Row {
        case: case.name.to_owned(),
        tool: tool.name(),
        columns: COLUMNS.iter().map(|(name, of)| (*name, Series::of(samples.iter().map(of)))).collect(),
        failure: failures.last().cloned(),
    };
    tools.iter().zip(&samples).zip(&failures).map(row).collect()
}

impl Row {
    fn print(&self) {
        let cells: Vec<String> = self.columns.iter().map(|(_, series)| series.cell()).collect();
        println!("| {} | {} | {} |", self.case, self.tool, cells.join(" | "));
        if let Some(failure) = &self.failure {
            eprintln!("{} failed on {}: {failure}", self.tool, self.case);
        }
    }

    fn json(&self) -> Value {
        let columns: serde_json::Map<String, Value> =
            self.columns.iter().map(|(name, series)| ((*name).to_owned(), json!(series.sorted()))).collect();
        json!({ "case": self.case, "tool": self.tool, "failure": self.failure, "columns": columns })
    }
}

/// The bounds, beside CRIU's median of what they bound, and what is aimed at.
fn tell_bounds(bounds: &[Bound], rows: &[Row]) {
    if bounds.is_empty() {
        return;
    }
    println!(
        "\n| the mechanism alone | ms | bounds | of CRIU's | goal | Torpor |\n|---|---|---|---|---|---|"
    );
    for bound in bounds {
        let (case, column) = bound.of;
        let find = |tool: &str| rows.iter().find(|r| r.case == case && r.tool == tool)?.median(column);
        let median = bound.samples.median();
        let of = median.zip(find("criu")).map_or("–".into(), |(own, its)| part(own / its));
        let goal = GOALS.iter().find(|goal| (goal.0, goal.1) == bound.of).map(|goal| goal.2);
        let goal = match goal {
            _ if !bound.goal.is_empty() => bound.goal.to_owned(),
            Some(Aim::Part(aim)) => part(aim),
            Some(Aim::Most(most)) => format!("{most} ms"),
            None => "–".to_owned(),
        };
        let own = find("torpor").map_or("–".into(), figure);
        let what = bound.samples.cell();
        let why = bound.failure.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        println!("| {} | {what}{why} | {case}: {column} | {of} | {goal} | {own} |", bound.what);
    }
}

/// Restored victims become our children, to be ended and waited for.
pub(crate) fn adopt() {
    // SAFETY: prctl with numbers only.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

/// A directory for images and the like.
pub(crate) fn directory(parent: Option<&Path>) -> anyhow::Result<PathBuf> {
    let dir = parent.map_or_else(std::env::temp_dir, Path::to_owned);
    let dir = dir.join(format!("torpor-bench-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    Ok(dir)
}

/// The torpor that was named, or else one built from this tree, as this program was.
pub(crate) fn torpor(named: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    named.map_or_else(build, |path| Ok(fs::canonicalize(path)?))
}

fn build() -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "torpor"]).args((!cfg!(debug_assertions)).then_some("--release"));
    anyhow::ensure!(command.status()?.success(), "torpor does not build");
    // The task itself was built into the same directory.
    Ok(std::env::current_exe()?.with_file_name("torpor"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|p| p.is_file())
}
