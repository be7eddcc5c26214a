//! The frozen time against memory, as a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::bench::median;
use crate::sample::{MODES, Tool, warm};
use crate::victim::Kind;

/// Memory of the victims, in MiB.
const SIZES: [usize; 5] = [16, 64, 256, 1024, 2048];
const COLOURS: [&str; 4] = ["#1f6feb", "#2da44e", "#bf8700", "#cf222e"];
const LEFT: f64 = 70.0;
const TOP: f64 = 20.0;
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;

/// One line of the picture: its name, and the milliseconds for each of [`SIZES`].
type Line = (String, Vec<Option<f64>>);

/// Measures victims of several sizes, each in each way to freeze and by CRIU, and draws.
pub(crate) fn draw(rounds: usize, tools: &[Tool], dir: &Path, file: &Path) -> anyhow::Result<()> {
    let mut lines: Vec<(String, &Tool, &str)> = Vec::new();
    for tool in tools {
        match tool {
            Tool::Torpor(_) => lines.extend(MODES.map(|mode| (mode.to_owned(), tool, mode))),
            Tool::Criu(_) => lines.push(("criu".to_owned(), tool, "")),
        }
    }
    let mut all: Vec<Line> = lines.iter().map(|(name, ..)| (name.clone(), Vec::new())).collect();
    for size in SIZES {
        let mut samples = vec![Vec::new(); lines.len()];
        for _ in 0..rounds {
            for ((name, tool, mode), samples) in lines.iter().zip(&mut samples) {
                warm((size << 20) * 3);
                match tool.passing(mode, Kind::Memory, size, dir) {
                    Ok(frozen) => samples.push(frozen),
                    Err(e) => eprintln!("{name} failed on {size} MiB: {e:#}"),
                }
            }
        }
        for ((name, points), mut samples) in all.iter_mut().zip(samples) {
            samples.sort_by(f64::total_cmp);
            points.push(median(&samples));
            println!(
                "{name}, {size} MiB: {}",
                median(&samples).map_or("-".into(), |ms| format!("{ms:.1} ms"))
            );
        }
    }
    Ok(fs::write(file, svg(&all)?)?)
}

/// Both axes are logarithmic: powers of two of memory, powers of ten of milliseconds.
fn svg(lines: &[Line]) -> Result<String, std::fmt::Error> {
    let (first, last) = (SIZES[0] as f64, SIZES[SIZES.len() - 1] as f64);
    let x = |size: f64| LEFT + WIDTH * (size / first).log2() / (last / first).log2();
    // From 1 ms to 10 s.
    let y = |ms: f64| TOP + HEIGHT * (1.0 - ms.clamp(1.0, 1e4).log10() / 4.0);
    let mut out = String::new();
    let (width, height) = (LEFT + WIDTH + 90.0, TOP + HEIGHT + 50.0);
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    )?;
    let right = LEFT + WIDTH;
    for ms in [1.0, 10.0, 100.0, 1e3, 1e4] {
        let at = y(ms);
        writeln!(out, "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#d0d7de\"/>")?;
        writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{ms} ms</text>", LEFT - 6.0, at + 4.0)?;
    }
    for size in SIZES {
        let (at, below) = (x(size as f64), TOP + HEIGHT + 18.0);
        writeln!(out, "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{size} MiB</text>")?;
    }
    let caption = TOP + HEIGHT + 40.0;
    let middle = LEFT + WIDTH / 2.0;
    writeln!(
        out,
        "<text x=\"{middle}\" y=\"{caption}\" text-anchor=\"middle\">memory in small pages; time for which a process \
         that runs on stands still</text>"
    )?;
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        let all: Vec<(f64, f64)> =
            SIZES.iter().zip(points).filter_map(|(size, ms)| Some((x(*size as f64), y((*ms)?)))).collect();
        let path: Vec<String> = all.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        )?;
        for (x, y) in &all {
            writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>")?;
        }
        if let Some((x, y)) = all.last() {
            writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>", x + 8.0, y + 4.0)?;
        }
    }
    writeln!(out, "</svg>")?;
    Ok(out)
}
