//! What is measured, and what is aimed at.

use crate::sample::Sample;
use crate::victim::Kind;

/// A victim that is dumped and restored by each tool.
#[derive(Debug)]
pub(crate) struct Case {
    /// [`GOALS`] names cases by this.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) size: usize,
    /// MiB that it has, and an image of it.
    pub(crate) memory: usize,
    /// Samples of each tool, unless fewer are asked for.
    pub(crate) rounds: usize,
    /// Whether dumps after which it runs on are measured too.
    pub(crate) passing: bool,
    /// Whether it is only measured when it is named.
    pub(crate) named: bool,
}

const fn case(name: &'static str, kind: Kind, size: usize, memory: usize, rounds: usize) -> Case {
    Case { name, kind, size, memory, rounds, passing: true, named: false }
}

/// Cheap ones first.
pub(crate) const CASES: &[Case] = &[
    case("4 MiB", Kind::Memory, 4, 4, 15),
    case("10 spinning threads", Kind::Spinning, 10, 4, 7),
    case("10,000 areas", Kind::Areas, 10_000, 40, 7),
    case("2,000 descriptors", Kind::Descriptors, 2000, 4, 7),
    case("1,000 sleeping threads", Kind::Sleeping, 1000, 40, 7),
    case("50 processes of 4 MiB", Kind::Processes, 50, 200, 7),
    case("100 spinning threads", Kind::Spinning, 100, 4, 3),
    case("1 GiB", Kind::Memory, 1024, 1024, 7),
    case("1 GiB, huge pages", Kind::Huge, 1024, 1024, 5),
    Case { passing: false, ..case("4 GiB", Kind::Memory, 4096, 4096, 3) },
    Case { named: true, ..case("100 sleeping threads", Kind::Sleeping, 100, 4, 7) },
    Case { named: true, ..case("50 processes of 4 MiB, no huge pages", Kind::SmallPages, 50, 200, 7) },
    Case { named: true, ..case("200 processes of 4 MiB", Kind::Processes, 200, 800, 5) },
    Case { named: true, ..case("1,000 processes of 4 MiB", Kind::Processes, 1000, 4000, 3) },
    Case { named: true, ..case("50 processes, 10,000 descriptors", Kind::Tables, 50, 20, 5) },
    Case { named: true, ..case("1,000 TCP connections", Kind::Connections, 1000, 20, 5) },
];

/// A column of the table: its name, and what of a sample is in it.
pub(crate) type Column = (&'static str, fn(&Sample) -> f64);

/// Milliseconds, but for the last two: MiB.
pub(crate) const COLUMNS: [Column; 9] = [
    ("freezing", |s| s.freezing),
    ("frozen", |s| s.frozen),
    ("freezing + frozen", |s| s.freezing + s.frozen),
    ("left running, copy", |s| s.passing[0]),
    ("left running, fork", |s| s.passing[1]),
    ("dump", |s| s.dump),
    ("restore", |s| s.restore),
    (DUMP_PEAK, |s| s.dump_memory),
    (RESTORE_PEAK, |s| s.restore_memory),
];
pub(crate) const DUMP_PEAK: &str = "dump, MiB";
pub(crate) const RESTORE_PEAK: &str = "restore, MiB";

/// Column of [`INCREMENTAL`] and of [`LAZY`] that has a goal.
pub(crate) const LATER: &str = "freezing + frozen, later";
pub(crate) const FIRST_STEP: &str = "first step";
/// Cases of chains: name, victim.
pub(crate) const INCREMENTAL: [(&str, Kind); 2] =
    [("1 GiB, 40 MB/s written", Kind::Writing40), ("1 GiB, 530 MB/s written", Kind::Writing530)];
/// The case of lazy restores.
pub(crate) const LAZY: &str = "4 GiB, lazy";
/// The most that a dump and a restore shall have, measured in MiB over all cases.
pub(crate) const PEAK: f64 = 64.0;
/// Dumps of processes of up to this many MiB may be staged in memory: their peak has no goal.
pub(crate) const STAGED: usize = 256;

/// What is aimed at.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Aim {
    /// A part of CRIU's median in the same run.
    Part(f64),
    /// At most this, whatever else there is.
    Most(f64),
}

/// Case, column, aim.
pub(crate) const GOALS: &[(&str, &str, Aim)] = &[
    ("1 GiB", "left running, copy", Aim::Part(1.0 / 6.0)),
    ("1 GiB", "left running, fork", Aim::Part(1.0 / 15.0)),
    ("1 GiB, huge pages", "left running, fork", Aim::Part(1.0 / 40.0)),
    (INCREMENTAL[0].0, LATER, Aim::Most(5.0)),
    (INCREMENTAL[1].0, LATER, Aim::Most(20.0)),
    ("4 MiB", "frozen", Aim::Part(1.0 / 10.0)),
    ("4 MiB", "dump", Aim::Part(1.0 / 25.0)),
    ("4 MiB", "restore", Aim::Part(1.0 / 25.0)),
    ("10 spinning threads", "freezing", Aim::Part(1.0 / 100.0)),
    ("100 spinning threads", "freezing", Aim::Part(1.0 / 100.0)),
    ("1,000 sleeping threads", "freezing + frozen", Aim::Part(1.0 / 15.0)),
    ("10,000 areas", "frozen", Aim::Part(1.0 / 8.0)),
    ("2,000 descriptors", "frozen", Aim::Part(1.0 / 3.0)),
    ("50 processes of 4 MiB", "frozen", Aim::Part(1.0 / 5.0)),
    ("50 processes of 4 MiB", "restore", Aim::Part(1.0 / 8.0)),
    ("1 GiB", "restore", Aim::Part(1.0 / 5.0)),
    ("4 GiB", "restore", Aim::Part(1.0 / 6.0)),
    (LAZY, FIRST_STEP, Aim::Most(10.0)),
    ("1 GiB", "dump", Aim::Part(1.0 / 2.5)),
];
