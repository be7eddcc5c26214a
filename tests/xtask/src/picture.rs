//! The frozen time against memory, as a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::chain::links;
use crate::room;
use crate::sample::{MODES, Tool, empty, end, start, warm};
use crate::series::Series;
use crate::victim::Kind;

/// Memory of the victims, in MiB.
const SIZES: [usize; 4] = [64, 256, 1024, 4096];
/// Of the lines: distinguishable without colour by their names, and on light and on dark ground.
const COLOURS: [(&str, &str); 4] =
    [("copy", "#3b82f6"), ("fork", "#16a34a"), ("track", "#d97706"), ("criu", "#e11d48")];
const LEFT: f64 = 90.0;
const TOP: f64 = 50.0;
const WIDTH: f64 = 540.0;
const HEIGHT: f64 = 340.0;
/// Powers of ten of milliseconds.
const DECADES: (i32, i32) = (0, 4);

/// One line of the picture: its name, and samples in milliseconds for each of [`SIZES`].
type Line = (&'static str, Vec<Series>);

/// Measures victims of several sizes that are written to, each in each way to freeze and by CRIU, and draws.
pub(crate) fn draw(rounds: usize, tools: &[Tool], dir: &Path, file: &Path) -> anyhow::Result<Value> {
    let mut lines: Vec<Line> = COLOURS.map(|(name, _)| (name, Vec::new())).into();
    println!(
        "\n| picture: frozen, ms | {} |\n|---|---|---|---|---|",
        COLOURS.map(|(name, _)| name).join(" | ")
    );
    for size in SIZES {
        let bytes = (size as u64) << 20;
        let mut samples = vec![Vec::new(); lines.len()];
        for _ in 0..rounds {
            let round = room::need(3 * bytes, 3 * bytes, dir).and_then(|()| round(size, tools, dir));
            match round {
                Ok(round) => samples.iter_mut().zip(round).for_each(|(samples, sample)| samples.push(sample)),
                Err(e) => println!("{size} MiB: {e:#}"),
            }
        }
        for ((_, points), samples) in lines.iter_mut().zip(samples) {
            points.push(Series::of(samples));
        }
        let cells: Vec<String> =
            lines.iter().filter_map(|(_, points)| points.last()).map(Series::cell).collect();
        println!("| {size} MiB | {} |", cells.join(" | "));
    }
    fs::write(file, svg(&lines)?)?;
    let line = |(name, points): &Line| {
        let points: Vec<Value> = SIZES
            .iter()
            .zip(points)
            .map(|(mib, series)| json!({ "MiB": mib, "ms": series.sorted() }))
            .collect();
        json!({ "name": name, "points": points })
    };
    Ok(json!(lines.iter().map(line).collect::<Vec<_>>()))
}

/// One victim, dumped in each way in the order of [`COLOURS`], but for CRIU before its writes are followed.
fn round(size: usize, tools: &[Tool], dir: &Path) -> anyhow::Result<[f64; 4]> {
    let mut frozen = [f64::NAN; 4];
    warm((size << 20) * 2 + (64 << 20));
    let victim = start(Kind::Writing40, size, dir)?;
    let pid = victim.id() as i32;
    let mut all = || {
        for (i, mode) in MODES.iter().enumerate() {
            let dump = tools[0].dump(pid, &empty(dir, "image")?, &["--leave-running", "--freeze", mode])?;
            frozen[i] = dump.freezing + dump.frozen;
        }
        if let Some(criu) = tools.get(1) {
            match criu.dump(pid, &empty(dir, "image")?, &["--leave-running"]) {
                Ok(dump) => frozen[3] = dump.freezing + dump.frozen,
                Err(e) => println!("criu failed on {size} MiB: {e:#}"),
            }
        }
        let _none = fs::remove_dir_all(dir.join("image"));
        let chain = links(pid, 1, &tools[0], &empty(dir, "chain")?)?;
        frozen[2] = chain.last().map_or(f64::NAN, |last| last.frozen);
        anyhow::Ok(())
    };
    let result = all();
    end(victim);
    let _none = fs::remove_dir_all(dir.join("chain"));
    result.map(|()| frozen)
}

/// Both axes are logarithmic: powers of two of memory, powers of ten of milliseconds.
fn svg(lines: &[Line]) -> Result<String, std::fmt::Error> {
    let (first, last) = (SIZES[0] as f64, SIZES[SIZES.len() - 1] as f64);
    let x = |size: f64| LEFT + WIDTH * (size / first).log2() / (last / first).log2();
    let (low, high) = (f64::from(DECADES.0), f64::from(DECADES.1));
    let y = |ms: f64| TOP + HEIGHT * (1.0 - (ms.log10().clamp(low, high) - low) / (high - low));
    let mut out = String::new();
    let (width, height) = (LEFT + WIDTH + 80.0, TOP + HEIGHT + 60.0);
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#808080\">"
    )?;
    let (right, bottom, middle) = (LEFT + WIDTH, TOP + HEIGHT, LEFT + WIDTH / 2.0);
    writeln!(
        out,
        "<text x=\"{middle}\" y=\"24\" text-anchor=\"middle\" font-size=\"15\">How long a process that runs on \
         stands still for a dump</text>"
    )?;
    for decade in DECADES.0..=DECADES.1 {
        let ms = 10f64.powi(decade);
        let (at, label) = (y(ms), if ms < 1e3 { format!("{ms} ms") } else { format!("{} s", ms / 1e3) });
        writeln!(out, "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#808080\" stroke-opacity=\"0.4\"/>")?;
        writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 8.0, at + 4.5)?;
    }
    for size in SIZES {
        let at = x(size as f64);
        let label = if size < 1024 { format!("{size} MiB") } else { format!("{} GiB", size / 1024) };
        writeln!(out, "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#808080\" stroke-opacity=\"0.2\"/>")?;
        writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 20.0)?;
    }
    let caption = bottom + 44.0;
    writeln!(
        out,
        "<text x=\"{middle}\" y=\"{caption}\" text-anchor=\"middle\">memory of the process, in pages of 4 KiB, \
         40 MB/s of them written to</text>"
    )?;
    writeln!(
        out,
        "<text transform=\"translate(20 {}) rotate(-90)\" text-anchor=\"middle\">time it stands still</text>",
        TOP + HEIGHT / 2.0
    )?;
    for ((name, points), (_, colour)) in lines.iter().zip(COLOURS) {
        let point = |(size, series): (&usize, &Series)| Some((x(*size as f64), y(series.median()?)));
        let all: Vec<(f64, f64)> = SIZES.iter().zip(points).filter_map(point).collect();
        let path: Vec<String> = all.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        writeln!(
            out,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>"
        )?;
        for (x, y) in &all {
            writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>")?;
        }
        if let Some((x, y)) = all.last() {
            let (x, y) = (x + 10.0, y + 4.5);
            writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\" font-weight=\"bold\">{name}</text>"
            )?;
        }
    }
    writeln!(out, "</svg>")?;
    Ok(out)
}
