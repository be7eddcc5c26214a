//! Samples of one figure: median, best and worst.

/// Sorted samples. What was not measured (NaN) is left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().filter(|sample| !sample.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        Self(sorted)
    }

    /// The middle one, the upper of two.
    pub(crate) fn median(&self) -> Option<f64> {
        self.0.get(self.0.len() / 2).copied()
    }

    pub(crate) fn sorted(&self) -> &[f64] {
        &self.0
    }

    /// Median, and best to worst.
    pub(crate) fn cell(&self) -> String {
        let (Some(median), Some(best), Some(worst)) = (self.median(), self.0.first(), self.0.last()) else {
            return "–".into();
        };
        format!("{} ({}–{})", figure(median), figure(*best), figure(*worst))
    }
}

/// A figure with as many digits as mean something.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        0.0..1.0 => format!("{value:.3}"),
        1.0..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A part of something, as people write it: `1/12.5`.
pub(crate) fn part(value: f64) -> String {
    format!("1/{:.1}", 1.0 / value)
}
