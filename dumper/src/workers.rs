//! Doing several things at once: what /proc tells of a process, and what its memory holds, is independent of the others, and
//! costs the kernel more than us.
//!
//! A thread that is made while a tree stands comes too late: it waits behind the one that has made it until a processor
//! that has nothing to do takes it over, milliseconds later. So threads are made once, before anything stands, and wait.
//! The one that has them made is one of them, and works instead of waiting.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::sched::CpuSet;
use rayon_core::{ThreadPool, ThreadPoolBuilder};

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

/// `work` for every item, each by whatever thread is free, the first by this one. The results have the order of the items.
pub(crate) fn all<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let items: Vec<T> = items.into_iter().collect();
    let pool = if items.len() > 1 { pool() } else { None };
    let Some(pool) = pool else { return items.into_iter().map(work).collect() };
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let work = &work;
    pool.in_place_scope(|scope| {
        let mut places = results.iter_mut().zip(items);
        let first = places.next();
        for (result, item) in places {
            scope.spawn(move |_| *result = Some(work(item)));
        }
        if let Some((result, item)) = first {
            *result = Some(work(item));
        }
    });
    results.into_iter().flatten().collect()
}

/// `other` in another thread, if there is one, and `own` in this one.
pub(crate) fn both<A, B: Send>(own: impl FnOnce() -> A, other: impl FnOnce() -> B + Send) -> (A, B) {
    let Some(pool) = pool() else { return (own(), other()) };
    let mut result = None;
    let a = pool.in_place_scope(|scope| {
        scope.spawn(|_| result = Some(other()));
        own()
    });
    (a, result.expect("the scope ends when it was done"))
}

fn by<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = threads.min(cpus());
    let pool = if threads > 1 { pool() } else { None };
    let Some(pool) = pool else { return items.iter().map(work).collect() };
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::with_capacity(items.len() / threads + 1);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { return done };
            done.push((i, work(item)));
        }
    };
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let take = || {
        let some = some();
        done.lock().unwrap_or_else(PoisonError::into_inner).extend(some);
    };
    pool.in_place_scope(|scope| {
        (1..threads).for_each(|_| scope.spawn(|_| take()));
        take();
    });
    let mut all = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.sort_unstable_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Makes the threads, for what begins later to find them.
pub(crate) fn prepare() {
    pool();
}

/// As many threads as there are processors, the one that asks first among them; none where there is one processor only, or
/// no threads are to be had.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let make = || {
        let here = nix::sched::sched_getcpu().unwrap_or(0);
        let pool = ThreadPoolBuilder::new().num_threads(cpus()).use_current_thread();
        let pool = pool.thread_name(|_| "torpor-worker".to_owned()).start_handler(move |i| spread(here + i));
        (cpus() > 1).then(|| pool.build().ok()).flatten()
    };
    POOL.get_or_init(make).as_ref()
}

/// Processors that we may use; beyond some there is no use.
pub(crate) fn cpus() -> usize {
    // Control groups are asked about in files.
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST)))
}

/// Begins the life of a thread. Later it is woken where it ran before: every one on a processor of its own.
fn spread(number: usize) {
    // Signals are for those who wait for them.
    let _none = nix::sys::signal::SigSet::all().thread_block();
    let own = nix::unistd::Pid::from_raw(0);
    let Ok(allowed) = nix::sched::sched_getaffinity(own) else { return };
    let all: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect();
    let mut one = CpuSet::new();
    let there = all.get(number % all.len().max(1)).is_some_and(|cpu| one.set(*cpu).is_ok());
    if there && nix::sched::sched_setaffinity(own, &one).is_ok() {
        let _as_before = nix::sched::sched_setaffinity(own, &allowed);
    }
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
