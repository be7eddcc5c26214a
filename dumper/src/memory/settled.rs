//! What was copied before, is followed since ([`crate::track`]), and still is as it was.
//!
//! To look at every page costs three milliseconds for each GiB inside the freeze; to be told which were written, for which
//! the kernel has a way of its own, a fourth of that. What was not written is protected, so it is there and needs no look:
//! pages are looked at only where something was written, or nothing is known. Kernels that say so of pages that are not there,
//! too ([`torpor_kernel::write_watch::holes_show`]), have to be asked in the longer way.

use torpor_image::vma::{Mapping, Vma};
use torpor_kernel::pagemap::PageScan;

use crate::track::runs::{self, Covered, Runs};

/// A gap that costs less to be looked at than another call does.
const GAP: u64 = 1 << 20;

/// The part of what was copied before that holds. `holes`: whether pages that are not there any more show as written; if
/// not, it must be asked for those that are.
pub(super) fn settled(scan: &PageScan, vmas: &[Vma], covered: &Covered, holes: bool) -> Runs {
    let mut all = Runs::new();
    for vma in vmas.iter().filter(|v| v.private()) {
        let whole = (vma.start, vma.end);
        let ranges = |found: Vec<torpor_kernel::pagemap::Range>| -> Runs {
            runs::tidy(found.into_iter().map(|r| (r.start, r.end)).collect())
        };
        if !holes || matches!(vma.mapping, Mapping::Private { .. }) {
            if let Ok(Some(kept)) = scan.kept(vma.start, vma.end) {
                all.extend(ranges(kept));
            }
        } else if let Ok(Some(written)) = scan.written(vma.start, vma.end) {
            all.extend(runs::without(&[whole], &ranges(written)));
        }
        // Nobody has followed what was written elsewhere.
    }
    runs::both(covered.runs(), &runs::tidy(all))
}

/// Where pages must be looked at, besides what is known of `areas`.
pub(super) fn unsettled(areas: &[(u64, u64)], known: &[(u64, u64)]) -> Runs {
    runs::both(areas, &joined(runs::without(areas, known)))
}

/// Joins what small gaps lie between.
fn joined(all: Runs) -> Runs {
    let mut joined: Runs = Vec::with_capacity(all.len());
    for (start, end) in all {
        match joined.last_mut() {
            Some(last) if start - last.1 <= GAP => last.1 = end,
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gaps_are_looked_at_too() {
        let areas = [(0, 8 << 20), (16 << 20, 32 << 20)];
        let known = [(4096, 8192), (1 << 20, 8 << 20), (20 << 20, 24 << 20)];
        let look = [(0, 1 << 20), (16 << 20, 20 << 20), (24 << 20, 32 << 20)];
        assert_eq!(unsettled(&areas, &known), look);
        assert_eq!(unsettled(&areas, &[]), areas);
        assert_eq!(unsettled(&areas, &areas), []);
    }
}
