//! `cargo xtask report`: what is measured and told, without a goal: large memory, growing trees, and real programs under load.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use crate::bench::{adopt, directory, torpor};
use crate::chain::{links, size_of_files};
use crate::sample::{Tool, empty, end, start, warm};
use crate::series::figure;
use crate::victim::Kind;
use crate::{jvm, redis, room};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only these: tree, redis, jvm, large; may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// The torpor to measure; built from this tree when not given.
    #[arg(long)]
    torpor: Option<PathBuf>,
    /// Where images are written.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// MiB of the large process.
    #[arg(long, default_value_t = 16384)]
    large: usize,
    /// Write everything that was measured to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A table of the report, as it is printed and kept.
#[derive(Debug)]
pub(crate) struct Table {
    name: &'static str,
    columns: Vec<&'static str>,
    rows: Vec<(String, Vec<f64>)>,
}

impl Table {
    pub(crate) fn new(name: &'static str, columns: &[&'static str]) -> Self {
        println!("\n| {name} | {} |\n|---|{}", columns.join(" | "), "---|".repeat(columns.len()));
        Self { name, columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row and prints it. What is not a number was not measured.
    pub(crate) fn row(&mut self, name: impl Into<String>, values: Vec<f64>) {
        let name = name.into();
        let cell = |value: &f64| if value.is_nan() { "–".to_owned() } else { figure(*value) };
        println!("| {name} | {} |", values.iter().map(cell).collect::<Vec<_>>().join(" | "));
        self.rows.push((name, values));
    }

    fn json(&self) -> Value {
        let row = |(name, values): &(String, Vec<f64>)| {
            let cells =
                self.columns.iter().zip(values).map(|(name, value)| ((*name).to_owned(), json!(value)));
            json!({ "name": name, "values": cells.collect::<serde_json::Map<_, _>>() })
        };
        json!({ "name": self.name, "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    adopt();
    let tool = Tool::Torpor(torpor(arguments.torpor.as_ref())?);
    let dir = directory(arguments.dir.as_deref())?;
    let machine = room::machine(&dir);
    println!("{machine}");
    let mut tables = Vec::new();
    let mut skipped = serde_json::Map::new();
    let parts: [(&str, &dyn Fn() -> anyhow::Result<Table>); 4] = [
        ("tree", &|| tree(&tool, &dir)),
        ("redis", &|| redis::report(&tool, &dir)),
        ("jvm", &|| jvm::report(&tool, &dir)),
        ("large", &|| large(arguments.large, &tool, &dir)),
    ];
    for (name, part) in parts {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
            continue;
        }
        match part() {
            Ok(table) => tables.push(table.json()),
            Err(why) => {
                println!("{name}: {why:#}");
                skipped.insert(name.to_owned(), json!(format!("{why:#}")));
            }
        }
    }
    fs::remove_dir_all(&dir)?;
    if let Some(file) = &arguments.json {
        let all = json!({ "machine": machine, "tables": tables, "not measured": skipped });
        fs::write(file, serde_json::to_string_pretty(&all)? + "\n")?;
    }
    Ok(())
}

/// What a process more costs as the tree grows: little memory in each.
fn tree(tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    let columns =
        ["freezing + frozen, ms", "dump, ms", "restore, ms", "frozen/process, ms", "restore/process, ms"];
    let mut table = Table::new("processes", &columns);
    for count in [1usize, 10, 100, 1000] {
        room::need((count as u64) << 22, 1 << 30, dir)?;
        warm((count << 21) + (64 << 20));
        let s = tool.sample(Kind::Crowd, count, false, dir).with_context(|| format!("{count} processes"))?;
        let (frozen, each) = (s.freezing + s.frozen, count as f64);
        table.row(count.to_string(), vec![frozen, s.dump, s.restore, frozen / each, s.restore / each]);
    }
    Ok(table)
}

/// A process that takes most of the machine: nothing of it fits twice.
fn large(size: usize, tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    let bytes = (size as u64) << 20;
    room::need(bytes + bytes / 16 + (1 << 30), bytes + bytes / 16 + (1 << 30), dir)?;
    let mut table = Table::new("large", &DUMPS);
    let mut victim = start(Kind::Memory, size, dir)?;
    let pid = victim.id() as i32;
    let mut all = || {
        // Where there is no room for copies of it, it is copied to its files while it stands.
        dump(&mut table, "left running, fork", pid, &["--leave-running", "--freeze", "fork"], tool, dir)?;
        track(&mut table, pid, tool, dir)?;
        let image = empty(dir, "image")?;
        let dumped = tool.dump(pid, &image, &[])?;
        table.row("ended", vec![dumped.freezing + dumped.frozen, dumped.wall, mib(&image), f64::NAN]);
        victim.wait()?;
        restore(&mut table, &image, tool)
    };
    let result = all();
    end(victim);
    result.map(|()| table)
}

/// Columns of [`dump`], [`track`] and [`restore`].
pub(crate) const DUMPS: [&str; 4] = ["freezing + frozen, ms", "dump, ms", "image, MiB", "restore, ms"];

pub(crate) fn mib(image: &Path) -> f64 {
    size_of_files(image, |_| true) as f64 / f64::from(1 << 20)
}

/// A row of a dump that is not kept.
pub(crate) fn dump(
    table: &mut Table,
    name: &str,
    pid: i32,
    options: &[&str],
    tool: &Tool,
    dir: &Path,
) -> anyhow::Result<()> {
    let image = empty(dir, "image")?;
    let dumped = tool.dump(pid, &image, options)?;
    table.row(name, vec![dumped.freezing + dumped.frozen, dumped.wall, mib(&image), f64::NAN]);
    Ok(fs::remove_dir_all(image)?)
}

/// Rows of a dump that follows writes from then on, and of the next one.
pub(crate) fn track(table: &mut Table, pid: i32, tool: &Tool, dir: &Path) -> anyhow::Result<()> {
    let chain = empty(dir, "chain")?;
    for (link, name) in links(pid, 1, tool, &chain)?.iter().zip(["left running, track", "the next, track"]) {
        table.row(name, vec![link.frozen, link.wall, link.written, f64::NAN]);
    }
    Ok(fs::remove_dir_all(chain)?)
}

/// Rows of restores.
pub(crate) fn restore(table: &mut Table, image: &Path, tool: &Tool) -> anyhow::Result<()> {
    let Tool::Torpor(path) = tool else { return Ok(()) };
    let ran = crate::command::run(std::process::Command::new(path).args(["restore", "--detach"]).arg(image))?;
    table.row("restored", vec![f64::NAN, f64::NAN, f64::NAN, ran.wall]);
    Ok(())
}
