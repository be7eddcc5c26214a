//! Doing several things at once: what /proc tells of a process, and what its memory holds, is independent of the others, and
//! costs the kernel more than us.
//!
//! A thread that is made while a tree stands comes too late: it waits behind the one that has made it until a processor
//! that has nothing to do takes it over, milliseconds later. So threads are made once, before anything stands, and wait.

use std::cell::{Cell, OnceCell};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::sched::CpuSet;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
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

/// `work` for every item, by as many threads as there are. The results have the order of the items.
pub(crate) fn all<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    // Each is taken once.
    let take = |item: &Mutex<Option<T>>| item.lock().unwrap_or_else(PoisonError::into_inner).take();
    by(items.len(), &items, |item| take(item).map(&work)).into_iter().flatten().collect()
}

/// `other` by another thread, if there is one, and `own` by this one.
pub(crate) fn both<A, B: Send>(own: impl FnOnce() -> A, other: impl FnOnce() -> B + Send) -> (A, B) {
    if !others() {
        return (own(), other());
    }
    let mut result = None;
    let a = rayon_core::in_place_scope(|scope| {
        scope.spawn(|_| result = Some(other()));
        own()
    });
    (a, result.expect("the scope ends when it was done"))
}

fn by<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = threads.min(cpus());
    if threads <= 1 || !others() {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let take = || {
        let mut some = Vec::with_capacity(items.len() / threads + 1);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { break };
            some.push((i, work(item)));
        }
        done.lock().unwrap_or_else(PoisonError::into_inner).extend(some);
    };
    rayon_core::in_place_scope(|scope| {
        (1..threads).for_each(|_| scope.spawn(|_| take()));
        take();
    });
    let mut all = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.sort_unstable_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

thread_local! {
    /// The threads that work for this one, which dumps a tree: another tree does not wait for what they do.
    static POOL: OnceCell<Option<ThreadPool>> = const { OnceCell::new() };
    /// Whether this is one of those.
    static WORKS: Cell<bool> = const { Cell::new(false) };
}

/// Makes the threads that work for this one, for what begins later to find them.
pub(crate) fn prepare() {
    others();
}

/// Whether there are threads that work with this one.
fn others() -> bool {
    WORKS.get() || POOL.with(|pool| pool.get_or_init(make).is_some())
}

/// As many threads as there are processors, this one among them: it does what others have not begun while it waits for them.
/// None with one processor only, where none are to be had, and for a thread of somebody else's pool.
fn make() -> Option<ThreadPool> {
    if cpus() == 1 || rayon_core::current_thread_index().is_some() {
        return None;
    }
    let here = nix::sched::sched_getcpu().unwrap_or(0);
    let pool = ThreadPoolBuilder::new().num_threads(cpus()).use_current_thread();
    let pool = pool.thread_name(|_| "torpor-worker".to_owned()).start_handler(move |i| start(here, i));
    // Signals are for those who wait for them.
    let mut before = SigSet::empty();
    let blocked = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before));
    let pool = pool.build().ok();
    if blocked.is_ok() {
        let _as_before = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    }
    WORKS.set(pool.is_some());
    pool
}

/// Begins the life of a thread but the first, which has made them all. Later it is woken where it ran before: every one on a
/// processor of its own.
fn start(here: usize, number: usize) {
    WORKS.set(true);
    let own = nix::unistd::Pid::from_raw(0);
    let Ok(allowed) = nix::sched::sched_getaffinity(own) else { return };
    let all: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect();
    let first = all.iter().position(|cpu| *cpu == here).unwrap_or(0);
    let mut one = CpuSet::new();
    let there = all.get((first + number) % all.len().max(1)).is_some_and(|cpu| one.set(*cpu).is_ok());
    if there && nix::sched::sched_setaffinity(own, &one).is_ok() {
        let _as_before = nix::sched::sched_setaffinity(own, &allowed);
    }
}

/// Processors that we may use; beyond some there is no use.
pub(crate) fn cpus() -> usize {
    // Control groups are asked about in files.
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST)))
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
