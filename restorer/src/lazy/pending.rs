//! What is yet to come into an address space, and from where; follows what the process does with its memory.
//!
//! The kernel tells of munmap(2) and mremap(2) after they were done, each by the thread that made the call, so that
//! two of them may be told in the other order than they happened: one thread unmaps, another moves memory to
//! the place that is free now, and is told of first. No thread can unmap what another has not yet been
//! given, so of what is told while the first call is still under way, memory that was moved stays.

use std::collections::BTreeMap;

use torpor_image::extent::Record;

/// Where bytes lie in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) file: u32,
    pub(super) offset: u64,
}

impl Source {
    fn after(self, bytes: u64) -> Self {
        Source { offset: self.offset + bytes, ..self }
    }
}

/// A run of pages that are yet to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) source: Source,
}

impl Part {
    fn cut(self, start: u64, end: u64) -> Option<Part> {
        let (from, to) = (self.start.max(start), self.end.min(end));
        (from < to).then(|| Part { start: from, end: to, source: self.source.after(from - self.start) })
    }
}

/// All of them, by address.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    parts: BTreeMap<u64, Part>,
    /// What was moved since the process was last known to change nothing.
    moved: Vec<(u64, u64)>,
    /// Up to where the memory was filled in order.
    cursor: u64,
}

impl Pending {
    pub(super) fn new(records: &[Record]) -> Self {
        let part = |r: &Record| {
            let source = Source { file: r.file, offset: r.offset };
            (r.address, Part { start: r.address, end: r.address + r.length, source })
        };
        Pending { parts: records.iter().map(part).collect(), moved: Vec::new(), cursor: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// First and last address.
    pub(super) fn span(&self) -> Option<(u64, u64)> {
        let first = self.parts.values().next()?.start;
        Some((first, self.parts.values().next_back()?.end))
    }

    /// What is to come between two addresses.
    pub(super) fn within(&self, start: u64, end: u64) -> Vec<Part> {
        let before = self.parts.range(..start).next_back().map(|(_, part)| *part);
        let inside = self.parts.range(start..end).map(|(_, part)| *part);
        before.into_iter().chain(inside).filter_map(|part| part.cut(start, end)).collect()
    }

    /// What of `part` is still to come, to where it was and from where it was.
    pub(super) fn still(&self, part: Part) -> Vec<Part> {
        let same = |now: &Part| now.source == part.source.after(now.start - part.start);
        self.within(part.start, part.end).into_iter().filter(same).collect()
    }

    /// The next to be filled, about `bytes` of it.
    pub(super) fn next(&mut self, bytes: u64) -> Vec<Part> {
        let mut all = self.from(self.cursor, bytes);
        if all.is_empty() {
            all = self.from(0, bytes);
        }
        self.cursor = all.last().map_or(0, |part| part.end);
        all
    }

    fn from(&self, start: u64, bytes: u64) -> Vec<Part> {
        const MOST: usize = 256;
        let (mut all, mut rest, mut at) = (Vec::new(), bytes, start);
        let before = self.parts.range(..start).next_back().map(|(_, part)| *part);
        for part in before.into_iter().chain(self.parts.range(start..).map(|(_, part)| *part)).take(MOST) {
            let Some(part) = part.cut(at, u64::MAX).and_then(|p| p.cut(at, p.start + rest)) else { continue };
            rest -= part.end - part.start;
            at = part.end;
            all.push(part);
            if rest == 0 {
                break;
            }
        }
        all
    }

    /// Takes out what lies between two addresses.
    pub(super) fn take(&mut self, start: u64, end: u64) -> Vec<Part> {
        let taken = self.within(start, end);
        for part in &taken {
            // The one that begins at or before it holds it whole.
            let Some((&key, &whole)) = self.parts.range(..=part.start).next_back() else { continue };
            self.parts.remove(&key);
            for rest in [whole.cut(0, part.start), whole.cut(part.end, u64::MAX)].into_iter().flatten() {
                self.parts.insert(rest.start, rest);
            }
        }
        taken
    }

    /// Memory was moved; nothing is left of what was there.
    pub(super) fn remap(&mut self, from: u64, to: u64, length: u64) {
        let moving = self.take(from, from.saturating_add(length));
        self.take(to, to.saturating_add(length));
        for part in moving {
            let start = part.start - from + to;
            let moved = Part { start, end: start + (part.end - part.start), ..part };
            self.parts.insert(start, moved);
        }
        self.moved.push((to, to.saturating_add(length)));
        self.cursor = self.cursor.min(to);
    }

    /// Memory was unmapped, but for what others have moved there meanwhile.
    pub(super) fn unmap(&mut self, start: u64, end: u64) {
        let mut at = start;
        let mut kept: Vec<_> = self.moved.iter().copied().filter(|(s, e)| *s < end && *e > start).collect();
        kept.sort_unstable();
        for (first, last) in kept {
            if first > at {
                self.take(at, first);
            }
            at = at.max(last);
        }
        if at < end {
            self.take(at, end);
        }
    }

    /// No call that changes the memory is under way: what comes from here on happens after all that was told.
    pub(super) fn quiet(&mut self) {
        self.moved.clear();
    }
}

#[cfg(test)]
mod tests {
    use torpor_image::extent::Where;

    use super::*;

    fn pending() -> Pending {
        let record =
            |address, length, offset| Record { address, length, place: Where::Data, file: 1, offset };
        Pending::new(&[record(0x1000, 0x4000, 0), record(0x8000, 0x2000, 0x4000)])
    }

    fn part(start: u64, end: u64, offset: u64) -> Part {
        Part { start, end, source: Source { file: 1, offset } }
    }

    #[test]
    fn what_is_taken_is_gone_and_the_rest_stays() {
        let mut all = pending();
        assert_eq!(all.take(0x2000, 0x9000), [part(0x2000, 0x5000, 0x1000), part(0x8000, 0x9000, 0x4000)]);
        assert_eq!(all.within(0, u64::MAX), [part(0x1000, 0x2000, 0), part(0x9000, 0xa000, 0x5000)]);
        assert_eq!(all.take(0, u64::MAX).len(), 2);
        assert!(all.is_empty());
    }

    #[test]
    fn memory_that_moves_keeps_its_source() {
        let mut all = pending();
        all.remap(0x2000, 0x8000, 0x2000);
        let expected = [part(0x1000, 0x2000, 0), part(0x4000, 0x5000, 0x3000), part(0x8000, 0xa000, 0x1000)];
        assert_eq!(all.within(0, u64::MAX), expected);
        assert!(all.still(part(0x2000, 0x3000, 0x1000)).is_empty());
        assert!(all.still(part(0x8000, 0xa000, 0x4000)).is_empty());
        assert_eq!(all.still(part(0x7000, 0x9000, 0)), [part(0x8000, 0x9000, 0x1000)]);
    }

    #[test]
    fn an_unmapping_told_late_does_not_take_what_was_moved_there() {
        let mut all = pending();
        all.remap(0x1000, 0x8000, 0x1000);
        all.unmap(0x7000, 0xa000);
        assert_eq!(all.within(0x7000, 0xa000), [part(0x8000, 0x9000, 0)]);
        all.quiet();
        all.unmap(0x7000, 0xa000);
        assert!(all.within(0x7000, 0xa000).is_empty());
    }

    #[test]
    fn filling_goes_round() {
        let mut all = pending();
        assert_eq!(all.next(0x3000), [part(0x1000, 0x4000, 0)]);
        assert_eq!(all.next(0x2000), [part(0x4000, 0x5000, 0x3000), part(0x8000, 0x9000, 0x4000)]);
        assert_eq!(all.next(0x8000), [part(0x9000, 0xa000, 0x5000)]);
        assert_eq!(all.next(0x1000), [part(0x1000, 0x2000, 0)]);
    }
}
