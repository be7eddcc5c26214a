//! What is aimed at, beside what was measured.

use serde_json::{Value, json};

use crate::bench::Row;
use crate::cases::{Aim, CASES, DUMP_PEAK, GOALS, PEAK, RESTORE_PEAK, STAGED};
use crate::series::{figure, part};

/// A goal, and whether it is met.
#[derive(Debug)]
pub(crate) struct Verdict {
    case: String,
    what: String,
    own: Option<f64>,
    /// CRIU's, where it is compared with that.
    its: Option<f64>,
    aim: Aim,
    outcome: &'static str,
}

/// All goals whose cases were measured.
pub(crate) fn judge(rows: &[Row]) -> Vec<Verdict> {
    let row = |case: &str, tool: &str| rows.iter().find(|r| r.case == case && r.tool == tool);
    let mut verdicts = Vec::new();
    for (case, column, aim) in GOALS {
        let Some(torpor) = row(case, "torpor") else { continue };
        let own = torpor.median(column);
        let criu = row(case, "criu");
        let its = criu.and_then(|row| row.median(column)).filter(|_| matches!(aim, Aim::Part(_)));
        let outcome = match (aim, own, its) {
            (_, None, _) => "failed",
            (Aim::Most(most), Some(own), _) => met(own <= *most),
            (Aim::Part(part), Some(own), Some(its)) => met(own / its <= *part),
            // What is aimed at is that it never fails.
            (Aim::Part(_), Some(_), None) if criu.is_some_and(|row| row.failure.is_some()) => {
                "met: CRIU failed"
            }
            (Aim::Part(_), Some(_), None) => "no CRIU",
        };
        let outcome = if torpor.failure.is_some() { "failed at times" } else { outcome };
        verdicts.push(Verdict { case: (*case).into(), what: (*column).into(), own, its, aim: *aim, outcome });
    }
    let staged = |case: &str| CASES.iter().any(|c| c.name == case && c.memory <= STAGED);
    let unstaged: Vec<&Row> = rows.iter().filter(|row| !staged(&row.case)).collect();
    verdicts.extend(peak("dumps without staging", DUMP_PEAK, &unstaged));
    verdicts.extend(peak("restores", RESTORE_PEAK, &rows.iter().collect::<Vec<_>>()));
    verdicts
}

/// The most memory of any case.
fn peak(what: &str, column: &str, rows: &[&Row]) -> Option<Verdict> {
    let own = rows.iter().filter(|row| row.tool == "torpor");
    let (most, case) = own
        .filter_map(|row| Some((row.median(column)?, row.case.as_str())))
        .max_by(|a, b| f64::total_cmp(&a.0, &b.0))?;
    let what = format!("peak memory of {what}, MiB");
    let outcome = met(most <= PEAK);
    let case = format!("the worst: {case}");
    Some(Verdict { case, what, own: Some(most), its: None, aim: Aim::Most(PEAK), outcome })
}

fn met(is: bool) -> &'static str {
    if is { "met" } else { "missed" }
}

/// The table.
pub(crate) fn print(verdicts: &[Verdict]) {
    if verdicts.is_empty() {
        return;
    }
    println!("\n| case | what | torpor | criu | part | goal | |\n|---|---|---|---|---|---|---|");
    for verdict in verdicts {
        let cell = |value: Option<f64>| value.map_or("–".into(), figure);
        let ratio = verdict.own.zip(verdict.its).map_or("–".into(), |(own, its)| part(own / its));
        let aim = match verdict.aim {
            Aim::Part(aim) => part(aim),
            Aim::Most(most) => format!("≤ {most}"),
        };
        let (own, its) = (cell(verdict.own), cell(verdict.its));
        println!(
            "| {} | {} | {own} | {its} | {ratio} | {aim} | {} |",
            verdict.case, verdict.what, verdict.outcome
        );
    }
}

impl Verdict {
    pub(crate) fn json(&self) -> Value {
        let (kind, aim) = match self.aim {
            Aim::Part(part) => ("part of CRIU's median", part),
            Aim::Most(most) => ("at most", most),
        };
        json!({
            "case": self.case, "what": self.what, "torpor": self.own, "criu": self.its,
            "goal": { "kind": kind, "value": aim }, "outcome": self.outcome,
        })
    }
}
