//! Sets of addresses, as sorted runs that do not touch: first address, and the one after the last.

use torpor_image::extent::Record;

use crate::memory::slice;

pub(crate) type Runs = Vec<(u64, u64)>;

/// Sorts runs and joins those that touch.
pub(crate) fn tidy(mut runs: Runs) -> Runs {
    runs.sort_unstable();
    let mut all: Runs = Vec::with_capacity(runs.len());
    for (start, end) in runs.into_iter().filter(|(start, end)| start < end) {
        match all.last_mut() {
            Some(last) if last.1 >= start => last.1 = last.1.max(end),
            _ => all.push((start, end)),
        }
    }
    all
}

/// What is in both.
pub(crate) fn both(a: &[(u64, u64)], b: &[(u64, u64)]) -> Runs {
    let mut all = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (start, end) = (x.0.max(y.0), x.1.min(y.1));
        if start < end {
            all.push((start, end));
        }
        if x.1 < y.1 { i += 1 } else { j += 1 }
    }
    all
}

/// What is in `a` and not in `b`.
pub(crate) fn without(a: &[(u64, u64)], b: &[(u64, u64)]) -> Runs {
    let mut all = Vec::new();
    let mut j = 0;
    for &(start, end) in a {
        let mut at = start;
        while j < b.len() && b[j].1 <= at {
            j += 1;
        }
        let mut k = j;
        while at < end {
            let Some(&(from, to)) = b.get(k).filter(|r| r.0 < end) else { break };
            if from > at {
                all.push((at, from));
            }
            at = at.max(to);
            k += 1;
        }
        if at < end {
            all.push((at, end));
        }
    }
    all
}

/// Where records are.
fn of(records: &[Record]) -> Runs {
    let mut all: Runs = Vec::with_capacity(records.len());
    for r in records {
        match all.last_mut() {
            Some(last) if last.1 == r.address => last.1 += r.length,
            _ => all.push((r.address, r.address + r.length)),
        }
    }
    all
}

/// What is known of a space: records, and where they are.
#[derive(Debug, Default)]
pub(crate) struct Covered {
    records: Vec<Record>,
    runs: Runs,
}

impl Covered {
    /// Of records in order of their addresses.
    pub(crate) fn new(records: Vec<Record>) -> Self {
        Covered { runs: of(&records), records }
    }

    pub(crate) fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// The records of a part.
    pub(crate) fn within(&self, runs: &[(u64, u64)]) -> Vec<Record> {
        within(&self.records, runs)
    }

    /// All but what lies in `gone`, and what is `new`, which lies nowhere else.
    pub(crate) fn renew(self, gone: &[(u64, u64)], new: Vec<Record>) -> Self {
        let mut records = outside(&self.records, gone);
        records.extend(new);
        records.sort_unstable_by_key(|r| r.address);
        Self::new(records)
    }
}

/// The parts of sorted records that lie in `runs`.
fn within(records: &[Record], runs: &[(u64, u64)]) -> Vec<Record> {
    let mut all = Vec::new();
    for (start, end) in both(&of(records), runs) {
        slice(records, start, end, &mut all);
    }
    all
}

/// The parts of sorted records that lie elsewhere.
fn outside(records: &[Record], runs: &[(u64, u64)]) -> Vec<Record> {
    let mut all = Vec::new();
    for (start, end) in without(&of(records), runs) {
        slice(records, start, end, &mut all);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(runs: &[(u64, u64)]) -> Vec<u64> {
        runs.iter().flat_map(|(a, b)| *a..*b).collect()
    }

    fn any() -> impl Strategy<Value = Runs> {
        prop::collection::vec((0u64..60, 1u64..9), 0..8)
            .prop_map(|all| tidy(all.into_iter().map(|(a, n)| (a, a + n)).collect()))
    }

    proptest! {
        #[test]
        fn they_are_sets(a in any(), b in any()) {
            let (x, y) = (set(&a), set(&b));
            let common: Vec<u64> = x.iter().copied().filter(|n| y.contains(n)).collect();
            let rest: Vec<u64> = x.iter().copied().filter(|n| !y.contains(n)).collect();
            prop_assert_eq!(set(&both(&a, &b)), common);
            prop_assert_eq!(set(&without(&a, &b)), rest);
        }
    }
}
