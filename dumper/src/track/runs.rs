//! Sets of addresses, as sorted runs that do not touch: first address, and the one after the last.

use torpor_image::extent::Record;

use crate::memory::slice;

pub(crate) type Runs = Vec<(u64, u64)>;

/// Sorts runs and joins those that touch.
pub(crate) fn tidy(mut runs: Runs) -> Runs {
    // Mostly in order, or a few lists of which each is: the stable sort only merges those.
    runs.sort();
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
///
/// A look at it adds some to hundreds of thousands, while it is written to: they are put together when it has gone on.
#[derive(Debug, Default)]
pub(crate) struct Covered {
    /// What is known of a page is what the last of these has that has it.
    layers: Vec<Layer>,
    runs: Runs,
}

/// Records that became known at a time, in order, and where they are.
#[derive(Debug)]
struct Layer {
    records: Vec<Record>,
    runs: Runs,
}

impl Covered {
    /// Of records in order of their addresses.
    pub(crate) fn new(records: Vec<Record>) -> Self {
        let mut covered = Covered::default();
        covered.renew(&[], records);
        covered
    }

    pub(crate) fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// The records of a part of what is known, in no order.
    pub(crate) fn within(&self, runs: &[(u64, u64)]) -> Vec<Record> {
        let mut all = Vec::new();
        let mut left = runs.to_vec();
        for layer in self.layers.iter().rev() {
            let own = both(&layer.runs, &left);
            for (start, end) in &own {
                slice(&layer.records, *start, *end, &mut all);
            }
            left = without(&left, &own);
        }
        all
    }

    /// Nothing is known any more of what lies in `gone`, but for what is `new`, which lies nowhere else.
    pub(crate) fn renew(&mut self, gone: &[(u64, u64)], new: Vec<Record>) {
        let runs = of(&new);
        self.runs = tidy([&without(&self.runs, gone)[..], &runs].concat());
        self.layers.push(Layer { records: new, runs });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use torpor_image::extent::{PAGE, Where};

    use super::*;

    fn set(runs: &[(u64, u64)]) -> Vec<u64> {
        runs.iter().flat_map(|(a, b)| *a..*b).collect()
    }

    /// In bytes instead of pages.
    fn bytes(runs: &[(u64, u64)]) -> Runs {
        runs.iter().map(|(a, b)| (a * PAGE, b * PAGE)).collect()
    }

    fn pages_of(runs: &[(u64, u64)]) -> Runs {
        runs.iter().map(|(a, b)| (a / PAGE, b / PAGE)).collect()
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

        #[test]
        fn what_became_known_last_counts(looks in prop::collection::vec((any(), any()), 1..6), asked in any()) {
            let mut covered = Covered::default();
            let mut pages = std::collections::BTreeMap::new();
            for (file, (written, copied)) in looks.into_iter().enumerate() {
                // Not all that was written could be copied.
                let copied = both(&written, &copied);
                let gone = set(&written);
                pages.retain(|page, _| !gone.contains(page));
                pages.extend(set(&copied).into_iter().map(|page| (page, file as u32)));
                let record = |&(start, end): &(u64, u64)| Record {
                    address: start * PAGE,
                    length: (end - start) * PAGE,
                    place: Where::Data,
                    file: file as u32,
                    offset: start * PAGE,
                };
                covered.renew(&bytes(&written), copied.iter().map(record).collect());
            }
            let known: Vec<u64> = pages.keys().copied().collect();
            prop_assert_eq!(set(&pages_of(covered.runs())), known);
            let asked = both(covered.runs(), &bytes(&asked));
            let mut found = Vec::new();
            for r in covered.within(&asked) {
                prop_assert_eq!(r.offset, r.address);
                found.extend((r.address / PAGE..(r.address + r.length) / PAGE).map(|page| (page, r.file)));
            }
            found.sort_unstable();
            let wanted: Vec<(u64, u32)> =
                set(&pages_of(&asked)).into_iter().map(|page| (page, pages[&page])).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
