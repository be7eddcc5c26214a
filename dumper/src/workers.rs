//! Looking at many processes at once: what /proc tells of each is independent of the others, and costs the kernel
//! more than us.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads beyond this wait for each other in the kernel.
const MOST: usize = 8;
/// Items that are worth a thread.
const WORTH: usize = 4;

/// `work` for every item, by as many threads as are worth it and there are processors for, this one among them. The
/// results have the order of the items.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    by(items.len() / WORTH, items, work)
}

/// The same for items of which each is worth a thread.
pub(crate) fn each_of<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    by(items.len(), items, work)
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
        }
    }
}
