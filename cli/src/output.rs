//! Printing, and how numbers, times, names and tables look.
//!
//! `println!` panics when the reader has gone away; here that is an error of its own, which [`crate::main`]
//! takes for success: `torpor show image | head` has done what was asked.

use std::fmt::{self, Write as _};
use std::io::{self, BufWriter, Write as _};
use std::time::Duration;

use serde::Serialize;

use crate::exit::Failure;

/// Nobody reads our output any more.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the output has gone away")
    }
}

impl std::error::Error for Closed {}

/// Whether an error means only that nobody reads our output any more.
pub(crate) fn is_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Closed>())
}

/// Prints `text` to stdout as it is.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    write(|out| out.write_all(text.as_bytes()))
}

/// Prints `value` as JSON, one line.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    write(|out| {
        serde_json::to_writer(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Prints `value` as JSON, for reading.
pub(crate) fn json_pretty(value: &impl Serialize) -> anyhow::Result<()> {
    write(|out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

fn write(body: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match body(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) => {
            // What is left of the buffer would be tried again on drop.
            let (_stdout, _rest) = out.into_parts();
            if e.kind() == io::ErrorKind::BrokenPipe {
                return Err(Closed.into());
            }
            Err(Failure::output("cannot write to standard output")(e).into())
        }
    }
}

/// Prints something that is worth knowing to stderr.
pub(crate) fn note(text: &str) {
    let _unread = writeln!(io::stderr(), "note: {}", safe(text));
}

/// Prints `text` to stderr as it is: where stdout is another's.
pub(crate) fn aside(text: &str) {
    let _unread = io::stderr().write_all(text.as_bytes());
}

/// Prints why the program fails to stderr; `text` is fit for a terminal already.
pub(crate) fn complain(text: &str) {
    let _unread = writeln!(io::stderr(), "error: {text}");
}

/// `text` without anything that a terminal would obey: names come from other programs and from images.
pub(crate) fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// A name for one line: [`safe`], and no line breaks either.
pub(crate) fn name(text: &str) -> String {
    safe(text).replace('\n', "\\n")
}

/// `12.3 MiB`
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        // Before it would be rounded to 1024.0.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

/// `3.21 ms`
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 59.95 {
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    } else if seconds >= 0.9995 {
        format!("{seconds:.2} s")
    } else if seconds >= 0.000_999_5 {
        format!("{:.2} ms", seconds * 1e3)
    } else {
        format!("{:.0} µs", seconds * 1e6)
    }
}

/// [`duration`] of a number of nanoseconds.
pub(crate) fn nanoseconds(count: u64) -> String {
    duration(Duration::from_nanos(count))
}

/// `2026-11-21 04:31:07 UTC`, of nanoseconds since 1970.
pub(crate) fn instant(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Year, month and day of a number of days since 1970 (Hinnant, "chrono-compatible low-level date
/// algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    // Eras of 400 years that begin on the first of March, so that the leap day is the last of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

/// `one`, or `n` of `many`.
pub(crate) fn count(n: usize, one: &str, many: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {many}") }
}

/// Rows under a head, aligned; the last column is as long as it is.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [usize],
}

impl Table {
    /// A table with a head; columns in `right` are numbers.
    pub(crate) fn new(head: &[&str], right: &'static [usize]) -> Self {
        Table { rows: vec![head.iter().map(|s| (*s).to_owned()).collect()], right }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|c| name(&c)).collect());
    }

    /// Whether it has a head only.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| {
            self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                line.push_str("  ");
                if self.right.contains(&c) {
                    write!(line, "{cell:>0$}", widths[c])?;
                } else {
                    write!(line, "{cell:<0$}", widths[c])?;
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn times() {
        for (nanos, text) in [
            (0, "0 µs"),
            (1_499, "1 µs"),
            (999_400, "999 µs"),
            (999_600, "1.00 ms"),
            (3_210_000, "3.21 ms"),
            (999_600_000, "1.00 s"),
            (2_500_000_000, "2.50 s"),
            (59_960_000_000, "1 min 0 s"),
            (125_000_000_000, "2 min 5 s"),
        ] {
            assert_eq!(nanoseconds(nanos), text);
        }
    }

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(instant(seconds * 1_000_000_000), text);
        }
        instant(u64::MAX);
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(safe("a\x1b[2Jb\u{9b}\nc"), "a\\u{1b}[2Jb\\u{9b}\nc");
        assert_eq!(name("a\nb é"), "a\\nb é");
    }

    #[test]
    fn tables() {
        let mut table = Table::new(&["N", "WHAT", "WHY"], &[0]);
        assert!(table.is_empty());
        table.row(["1".into(), "µ".into(), "x".into()]);
        table.row(["100".into(), "longer".into(), String::new()]);
        assert_eq!(table.to_string(), "    N  WHAT    WHY\n    1  µ       x\n  100  longer\n");
    }

    #[test]
    fn closed_is_told_from_failed() {
        assert!(is_closed(&anyhow::Error::from(Closed).context("printing")));
        assert!(!is_closed(&anyhow::anyhow!("full")));
    }
}
