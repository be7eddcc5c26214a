//! Looking at many processes at once: what /proc tells of each is independent of the others, and costs the kernel
//! more than us.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads beyond this wait for each other in the kernel.
const MOST: usize = 8;
/// Items that are worth a thread.
const WORTH: usize = 4;
/// Small items, of which several thousand may belong to one process, that are.
const PART: usize = 64;

/// `work` for every item, by as many threads as are worth it and there are processors for, this one among them. The
/// results have the order of the items.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    by(items.len() / WORTH, items, work)
}

/// The same for items of which each is worth a thread.
pub(crate) fn each_of<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    by(items.len(), items, work)
}

/// Looks at what each of `owners` has several of, part by part: the parts of one may go to several threads. `count` tells
/// how many there are; the results of one owner are put together in order.
pub(crate) fn parts<T: Sync, R: Send, E: Send>(
    owners: &[T],
    count: impl Fn(&T) -> usize,
    work: impl Fn(&T, Range<usize>) -> Result<Vec<R>, E> + Sync,
) -> Result<Vec<Vec<R>>, E> {
    let mut all: Vec<(usize, Range<usize>)> = Vec::with_capacity(owners.len());
    for (i, owner) in owners.iter().enumerate() {
        let end = count(owner);
        all.extend((0..end).step_by(PART).map(|at| (i, at..(at + PART).min(end))));
    }
    let mut results: Vec<Vec<R>> = owners.iter().map(|_| Vec::new()).collect();
    // A part that is not full may be quickly done with.
    let total: usize = all.iter().map(|(_, range)| range.len()).sum();
    for (part, (owner, _)) in
        by(total / PART * 2, &all, |(i, range)| work(&owners[*i], range.clone())).into_iter().zip(&all)
    {
        results[*owner].extend(part?);
    }
    Ok(results)
}

fn by<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = threads.min(MOST);
    let threads = match threads {
        0 | 1 => 1,
        _ => std::thread::available_parallelism().map_or(1, |n| n.get().min(threads)),
    };
    if threads == 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::with_capacity(items.len() / threads + 1);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { return done };
            done.push((i, work(item)));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(some)).collect();
        let mut all = some();
        for other in others {
            all.extend(other.join().expect("what looks at a process does not panic"));
        }
        all
    });
    all.sort_unstable_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn results_keep_the_order_of_the_items() {
        for n in [0, 1, 7, 100, 1001] {
            let items: Vec<usize> = (0..n).collect();
            assert_eq!(super::each(&items, |i| i * 3), (0..n).map(|i| i * 3).collect::<Vec<_>>());
            let parts = super::parts(&items, |i| *i, |_, range| Ok::<_, ()>(range.collect())).unwrap();
            assert_eq!(parts, items.iter().map(|i| (0..*i).collect::<Vec<_>>()).collect::<Vec<_>>());
        }
    }
}
