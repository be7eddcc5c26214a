//! Tasks of Torpor's own development: `cargo xtask bench`, `counts`, `report`.

mod bench;
mod bounds;
mod cases;
mod chain;
mod command;
mod copying;
mod count;
mod goals;
mod inquiry;
mod jvm;
mod lazy;
mod picture;
mod raw;
mod redis;
mod report;
mod room;
mod sample;
mod series;
mod small;
mod victim;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Tasks of Torpor's own development")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures dumps and restores, interleaved with `criu` when one is on PATH.
    Bench(bench::Arguments),
    /// Counts what a dump costs in calls, stops, bytes and faults, and compares with tests/counts.json.
    Counts(count::Arguments),
    /// Measures what has no goal: 16 GiB, redis and a JVM, growing trees.
    Report(report::Arguments),
    /// A program to be measured: owns what its kind says, and sleeps.
    #[command(hide = true)]
    Victim(victim::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Counts(arguments) => count::run(&arguments),
        Task::Report(arguments) => report::run(&arguments),
        Task::Victim(arguments) => victim::run(&arguments),
    }
}
