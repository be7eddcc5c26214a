//! Serving the memory of a tree that runs: faults first, everything else meanwhile.
//!
//! One thread hears of faults and of what the processes do with their memory; others fill. Both have to agree on what
//! is still to come: after the event of a madvise(2) is read, its pages go, and a page that is filled after that would bring
//! back what was forgotten. The kernel fills nothing from the begin of such a call until its event is read. So nothing is
//! read while somebody fills ([`Space::uffd`] is locked for reading by who fills, for writing by who hears), what is to
//! be filled is looked up under that lock, and what the kernel then filled was right.
//!
//! For the same reason what the kernel says of a page holds only if no event waits: a page that is nowhere
//! (ENOENT) may just be moved. And it fills pages over markers of guard pages without a word, so these are looked for.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use torpor_image::Image;
use torpor_image::data::Data;
use torpor_kernel::pagemap::{PageScan, Want};
use torpor_kernel::uffd::{Message, Userfaultfd};
use torpor_kernel::{Pid, fds};

use super::guard::{Guard, end_thread};
use super::pending::{Part, Pending};
use super::{Deferred, Lazy, Touched};
use crate::error::{Error, Result};

const PAGE: u64 = 4096;
/// What is filled around a fault.
const AROUND: u64 = 64 << 10;
/// What is filled by one step in between: as long may an event wait.
const STEP: u64 = 512 << 10;
/// How long what cannot be read is tried again.
const PATIENCE: Duration = Duration::from_secs(10);
/// At first the tree has the processors for itself, and whoever serves its faults: until it has needed nothing for so long, or
/// for so long in all.
const CALM: Duration = Duration::from_millis(5);
const HEAD_START: Duration = Duration::from_millis(50);
/// How long a tree that is recorded must need nothing until the rest is filled, and how long it is waited for at most.
const SETTLED: Duration = Duration::from_secs(1);
const RECORDED: Duration = Duration::from_secs(30);
/// How often the processes are looked at when nothing happens.
const INTERVAL: u16 = 50;

/// A tree whose memory is served. Dropped before it runs, it is no longer served; afterwards, when all is there.
#[derive(Debug)]
pub struct Serving {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    sources: HashMap<u32, Data>,
    spaces: Mutex<Vec<Arc<Space>>>,
    queue: Mutex<Queue>,
    work: Condvar,
    wake: EventFd,
    tree: Vec<OwnedFd>,
    record: bool,
}

/// An address space.
#[derive(Debug)]
struct Space {
    /// Of the task; that of its ancestor of the image for those that were forked since.
    pid: i32,
    /// Nothing when it is served no more.
    uffd: RwLock<Option<Userfaultfd>>,
    pending: Mutex<Pending>,
    /// Of the task, to find guard pages; of others the number is not known.
    pages: Option<PageScan>,
}

#[derive(Debug, Default)]
struct Queue {
    faults: VecDeque<(Arc<Space>, Fault)>,
    first: VecDeque<(Arc<Space>, u64, u64)>,
    /// When the tree was let go.
    running: Option<Instant>,
    last_fault: Option<Instant>,
    touched: Vec<Touched>,
    /// How many fill, and how many may.
    filling: usize,
    fillers: usize,
    turn: usize,
    stop: bool,
    done: bool,
    failed: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    address: u64,
    write: bool,
    thread: i32,
}

/// Why filling went no further.
enum Halt {
    /// Something changes: once more when it is known what.
    Again,
    /// The address space is gone.
    Gone,
    /// It cannot be gone on with.
    Failed(String),
}

/// One of a [`Serving`] to be made.
pub(crate) struct Task<'p> {
    pub(crate) pid: i32,
    pub(crate) uffd: Userfaultfd,
    pub(crate) deferred: &'p Deferred,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Serving {
    /// Registers what waits of these tasks, and serves it from now on.
    pub(crate) fn start(image: &Image, tasks: Vec<Task<'_>>, lazy: &Lazy) -> Result<Self> {
        let name = image.tasks[0].title();
        let fail = |source| Error::Kernel { what: format!("{name}: serving its memory"), source };
        let mut sources = HashMap::new();
        let mut spaces = Vec::new();
        for Task { pid, uffd, deferred } in tasks {
            uffd.handshake().map_err(fail)?;
            for &(start, end) in &deferred.areas {
                uffd.register(start, end).map_err(fail)?;
            }
            for record in &deferred.records {
                if let std::collections::hash_map::Entry::Vacant(entry) = sources.entry(record.file) {
                    entry.insert(image.data(record.file)?);
                }
            }
            spaces.push(Arc::new(Space {
                pid,
                uffd: RwLock::new(Some(uffd)),
                pending: Mutex::new(Pending::new(&deferred.records)),
                pages: Some(PageScan::open(Pid(pid)).map_err(fail)?),
            }));
        }
        let tree = image.tasks.iter().map(|t| fds::pidfd_open(Pid(t.pid.0))).collect::<Result<_, _>>();
        let tree: Vec<OwnedFd> = tree.map_err(fail)?;
        let errno = |call| Error::open(&name, call);
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = wake.map_err(errno("eventfd"))?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 7) + 1;
        let of = |pid: i32| spaces.iter().find(|s| s.pid == pid).map(Arc::clone);
        let first = lazy.first.iter().filter_map(|t| Some((of(t.pid)?, t.start, t.end))).collect();
        let queue = Queue { first, fillers: workers - 1, ..Queue::default() };
        let guard = Guard::start(&tree, &name).map_err(fail)?;
        let shared = Arc::new(Shared {
            name: name.clone(),
            sources,
            spaces: Mutex::new(spaces),
            queue: Mutex::new(queue),
            work: Condvar::new(),
            wake,
            tree,
            record: lazy.record,
        });
        let mut serving = Serving { shared: Arc::clone(&shared), threads: Vec::new() };
        let listener = Arc::clone(&shared);
        serving.spawn(move || listener.hear_all(guard)).map_err(errno("clone"))?;
        for _ in 0..workers {
            let worker = Arc::clone(&shared);
            serving.spawn(move || worker.fill_all()).map_err(errno("clone"))?;
        }
        Ok(serving)
    }

    /// Signals are for the thread that started us.
    fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> nix::Result<()> {
        use nix::sys::signal::{SigSet, SigmaskHow};
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let thread = std::thread::Builder::new().name("lazy".into()).spawn(work);
        before.thread_set_mask()?;
        let io = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EAGAIN));
        self.threads.push(thread.map_err(io)?);
        Ok(())
    }

    /// The tree runs: the rest is filled soon. Nobody is woken for that: it would take our processor before we let go.
    pub(crate) fn go(&self) {
        let mut queue = lock(&self.shared.queue);
        queue.running = Some(Instant::now());
        queue.last_fault = queue.running;
    }

    /// Waits until all memory is there, or nobody needs it any more. What was needed first, in order, if that was
    /// recorded. An error: what is missing could not be read, and the tree was ended.
    pub fn wait(mut self) -> Result<Vec<Touched>> {
        self.join();
        let mut queue = lock(&self.shared.queue);
        match queue.failed.take() {
            Some(why) => Err(Error::Lost { what: self.shared.name.clone(), why }),
            None => Ok(std::mem::take(&mut queue.touched)),
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.stop |= queue.running.is_none();
        drop(queue);
        self.shared.work.notify_all();
        self.shared.ring();
        self.join();
    }
}

impl Shared {
    fn ring(&self) {
        // It can only be full, and then it rings anyway.
        let _full = self.wake.write(1);
    }

    /// What the listening thread does, to the end.
    fn hear_all(&self, guard: Guard) {
        let mut guard = Some(guard);
        loop {
            let spaces: Vec<Arc<Space>> = lock(&self.spaces).clone();
            let guard_ended = self.await_any(&spaces, guard.as_ref());
            if guard_ended {
                drop(guard.take());
            }
            if guard.is_none() {
                guard = Guard::start(&self.tree, &self.name).ok();
            }
            for space in &spaces {
                self.hear(space);
            }
            let mut left = lock(&self.spaces);
            let failed = lock(&self.queue).failed.is_some();
            left.retain(|space| {
                let mut uffd = space.uffd.write().unwrap_or_else(PoisonError::into_inner);
                let alive = uffd.as_ref().is_some_and(|uffd| !failed || uffd.alive());
                if let Some(uffd) = uffd.as_ref().filter(|_| failed) {
                    // Whose fault was being served when it failed tells of it again.
                    uffd.wake_all();
                }
                let needed = alive && (failed || !lock(&space.pending).is_empty());
                if !needed {
                    *uffd = None;
                }
                needed
            });
            let mut queue = lock(&self.queue);
            if left.is_empty() || queue.stop {
                queue.done = true;
                break;
            }
        }
        self.work.notify_all();
    }

    /// Waits until somebody has something to say; whether the guard has ended.
    fn await_any(&self, spaces: &[Arc<Space>], guard: Option<&Guard>) -> bool {
        // The numbers stay what they are: only this thread closes them.
        let held: Vec<_> =
            spaces.iter().map(|s| s.uffd.read().unwrap_or_else(PoisonError::into_inner)).collect();
        let raw: Vec<i32> = held.iter().flat_map(|u| u.as_ref()).map(|u| u.as_fd().as_raw_fd()).collect();
        drop(held);
        let ended = guard.map(Guard::pidfd);
        let mut all: Vec<PollFd<'_>> = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        // SAFETY: open for as long as this thread does not close them.
        let uffds = raw.iter().map(|fd| unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) });
        all.extend(uffds.chain(ended).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let _again = poll(&mut all, PollTimeout::from(INTERVAL));
        let ended = guard.is_some() && all.last().and_then(PollFd::any) == Some(true);
        let _nothing = self.wake.read();
        ended
    }

    /// Reads what one says.
    fn hear(&self, space: &Arc<Space>) {
        let mut faults = Vec::new();
        loop {
            let held = space.uffd.write().unwrap_or_else(PoisonError::into_inner);
            let Some(uffd) = held.as_ref() else { return };
            let Ok(messages) = uffd.read() else { break };
            if messages.is_empty() {
                break;
            }
            let mut pending = lock(&space.pending);
            for message in messages {
                match message {
                    Message::Fault { address, write, thread } => {
                        faults.push(Fault { address, write, thread });
                    }
                    Message::Fork(uffd) => {
                        // Guard pages are passed on, and nobody knows the child's number.
                        if let Some((start, end)) = pending.span() {
                            space.leave_guards(&mut pending, start, end);
                        }
                        let child = Space {
                            pid: space.pid,
                            uffd: RwLock::new(Some(uffd)),
                            pending: Mutex::new(pending.clone()),
                            pages: None,
                        };
                        lock(&self.spaces).push(Arc::new(child));
                    }
                    Message::Remap { from, to, length } => pending.remap(from, to, length),
                    Message::Remove { start, end } => drop(pending.take(start, end)),
                    Message::Unmap { start, end } => pending.unmap(start, end),
                }
            }
            if uffd.quiet() {
                pending.quiet();
            }
        }
        if faults.is_empty() {
            return;
        }
        let mut queue = lock(&self.queue);
        if queue.failed.is_some() {
            faults.iter().for_each(|f| end_thread(f.thread));
        }
        queue.last_fault = Some(Instant::now());
        queue.faults.extend(faults.into_iter().map(|fault| (Arc::clone(space), fault)));
        drop(queue);
        self.work.notify_all();
    }

    /// What each of the other threads does, to the end.
    fn fill_all(&self) {
        let mut buffer = Vec::new();
        loop {
            let mut queue = lock(&self.queue);
            if queue.done || queue.stop {
                return;
            }
            if queue.failed.is_some() {
                queue.faults.clear();
                drop(self.wait_a_moment(queue));
                continue;
            }
            if let Some((space, fault)) = queue.faults.pop_front() {
                if self.record && queue.running.is_some() {
                    let start = fault.address / AROUND * AROUND;
                    let touched = Touched { pid: space.pid, start, end: start + AROUND };
                    queue.touched.push(touched);
                }
                drop(queue);
                match self.serve(&space, fault, &mut buffer) {
                    Err(Halt::Again) => {
                        self.ring();
                        std::thread::yield_now();
                        lock(&self.queue).faults.push_back((space, fault));
                    }
                    done => self.settle(&space, done),
                }
                continue;
            }
            if !self.may_fill(&queue) {
                drop(self.wait_a_moment(queue));
                continue;
            }
            queue.filling += 1;
            let first = queue.first.pop_front();
            queue.turn = queue.turn.wrapping_add(1);
            let turn = queue.turn;
            drop(queue);
            let found = match first {
                Some((space, start, end)) => {
                    let parts = lock(&space.pending).within(start, end.min(start.saturating_add(STEP)));
                    Some((space, parts))
                }
                None => self.choose(turn),
            };
            let mut slow = found.is_none();
            if let Some((space, parts)) = found {
                let done = self.fill(&space, &parts, &mut buffer);
                slow = matches!(done, Err(Halt::Again));
                self.settle(&space, done);
            }
            let mut queue = lock(&self.queue);
            queue.filling -= 1;
            if slow {
                drop(self.wait_a_moment(queue));
            }
        }
    }

    fn wait_a_moment<'q>(&self, queue: MutexGuard<'q, Queue>) -> MutexGuard<'q, Queue> {
        let waited = self.work.wait_timeout(queue, Duration::from_millis(1 + u64::from(INTERVAL) / 10));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn may_fill(&self, queue: &Queue) -> bool {
        let Some(running) = queue.running else { return false };
        if queue.filling >= queue.fillers {
            return false;
        }
        // It may not have had a processor yet.
        let calm = queue.last_fault.unwrap_or(running).elapsed();
        let (settled, most) = if self.record { (SETTLED, RECORDED) } else { (CALM, HEAD_START) };
        calm > settled || running.elapsed() > most
    }

    /// What to fill next: of all address spaces in turn.
    fn choose(&self, turn: usize) -> Option<(Arc<Space>, Vec<Part>)> {
        let spaces = lock(&self.spaces).clone();
        for i in 0..spaces.len() {
            let space = &spaces[(turn + i) % spaces.len()];
            let parts = lock(&space.pending).next(STEP);
            if !parts.is_empty() {
                return Some((Arc::clone(space), parts));
            }
        }
        None
    }

    fn settle(&self, space: &Space, done: Result<(), Halt>) {
        match done {
            Ok(()) => {
                if lock(&space.pending).is_empty() {
                    self.ring();
                }
            }
            Err(Halt::Again) => self.ring(),
            Err(Halt::Gone) => {
                *lock(&space.pending) = Pending::default();
                self.ring();
            }
            Err(Halt::Failed(why)) => self.fail(why),
        }
    }

    /// What is missing will never be there: nobody must go on without it. They wait for it until they are gone.
    fn fail(&self, why: String) {
        let mut queue = lock(&self.queue);
        if queue.failed.is_none() && !queue.stop {
            queue.failed = Some(why);
            for pidfd in &self.tree {
                fds::end(pidfd.as_fd());
            }
        }
        for (_, fault) in queue.faults.drain(..) {
            end_thread(fault.thread);
        }
        drop(queue);
        self.ring();
    }

    fn serve(&self, space: &Space, fault: Fault, buffer: &mut Vec<u8>) -> Result<(), Halt> {
        let page = fault.address;
        let start = page / AROUND * AROUND;
        // Who waits is served first.
        let own = lock(&space.pending).within(page, page + PAGE);
        self.fill(space, &own, buffer)?;
        {
            let held = space.uffd.read().unwrap_or_else(PoisonError::into_inner);
            let Some(uffd) = held.as_ref() else { return Ok(()) };
            if !lock(&space.pending).within(page, page + PAGE).is_empty() {
                return Err(Halt::Again);
            }
            if own.is_empty() {
                // Nothing is to come there: it is zero, or there already.
                let outcome =
                    if fault.write { uffd.copy(page, &[0; PAGE as usize]).1 } else { uffd.zero(page) };
                match outcome {
                    None => {}
                    Some(Errno::EAGAIN) => return Err(Halt::Again),
                    Some(Errno::ESRCH | Errno::ENOSPC) => return Err(Halt::Gone),
                    Some(Errno::ENOENT) if !uffd.quiet() => return Err(Halt::Again),
                    Some(Errno::EEXIST | Errno::ENOENT) => uffd.wake(page),
                    Some(Errno::ENOMEM) => return Err(Halt::Again),
                    Some(errno) => {
                        return Err(Halt::Failed(format!("page {page:x}: UFFDIO_ZEROPAGE: {errno}")));
                    }
                }
            } else {
                uffd.wake(page);
            }
        }
        let around = lock(&space.pending).within(start, start + AROUND);
        match self.fill(space, &around, buffer) {
            Err(Halt::Again) => Ok(()),
            done => done,
        }
    }

    /// Fills these, as far as they are still to come.
    fn fill(&self, space: &Space, parts: &[Part], buffer: &mut Vec<u8>) -> Result<(), Halt> {
        if parts.is_empty() {
            return Ok(());
        }
        let total: u64 = parts.iter().map(|p| p.end - p.start).sum();
        buffer.resize(buffer.len().max(total as usize), 0);
        let mut rest = &mut buffer[..];
        let mut read = Vec::with_capacity(parts.len());
        for part in parts {
            let (bytes, after) = rest.split_at_mut((part.end - part.start) as usize);
            self.load(part, bytes)?;
            read.push((*part, &*bytes));
            rest = after;
        }
        let held = space.uffd.read().unwrap_or_else(PoisonError::into_inner);
        let Some(uffd) = held.as_ref() else { return Ok(()) };
        let (first, last) = (parts[0].start, parts[parts.len() - 1].end);
        space.leave_guards(&mut lock(&space.pending), first.min(last), last.max(first));
        for (part, bytes) in read {
            let now = lock(&space.pending).still(part);
            for piece in now {
                let skip = (piece.start - part.start) as usize;
                let length = (piece.end - piece.start) as usize;
                space.put(uffd, piece.start, &bytes[skip..skip + length])?;
            }
        }
        Ok(())
    }

    /// Reads from the image; what fails for a while is tried again.
    fn load(&self, part: &Part, bytes: &mut [u8]) -> Result<(), Halt> {
        let failed = |why: String| Err(Halt::Failed(why));
        let Some(data) = self.sources.get(&part.source.file) else {
            return failed(format!("data file {} is not open", part.source.file));
        };
        let begin = Instant::now();
        let mut pause = Duration::from_millis(10);
        loop {
            let Err(error) = data.read_exact_at(bytes, part.source.offset) else { return Ok(()) };
            let transient =
                matches!(&error, torpor_image::Error::File { source, .. } if source.raw_os_error().is_some());
            if !transient || begin.elapsed() > PATIENCE || lock(&self.queue).stop {
                return failed(error.to_string());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}

impl Space {
    /// Pages that were made guard pages since have no contents any more; no event tells.
    fn leave_guards(&self, pending: &mut Pending, start: u64, end: u64) {
        let Some(pages) = &self.pages else { return };
        for guard in pages.scan(start, end, Want::Guard).unwrap_or_default() {
            pending.take(guard.start, guard.end);
        }
    }

    /// Puts contents to their place, while nothing is heard.
    fn put(&self, uffd: &Userfaultfd, start: u64, bytes: &[u8]) -> Result<(), Halt> {
        let (mut at, end) = (start, start + bytes.len() as u64);
        let mut most = end - at;
        while at < end {
            let length = most.min(end - at);
            let from = (at - start) as usize;
            let (taken, errno) = uffd.copy(at, &bytes[from..from + length as usize]);
            if taken > 0 {
                let mut pending = lock(&self.pending);
                pending.take(at, at + taken);
                // What the kernel took it took because nothing was under way.
                pending.quiet();
                at += taken;
                most = end - start;
                continue;
            }
            match errno {
                None => {}
                Some(Errno::EEXIST) => {
                    lock(&self.pending).take(at, at + PAGE);
                    uffd.wake(at);
                    at += PAGE;
                }
                // It may be of two areas by now.
                Some(Errno::ENOENT) if length > PAGE => most = (length / 2 / PAGE * PAGE).max(PAGE),
                Some(Errno::ENOENT) if uffd.quiet() => {
                    lock(&self.pending).take(at, at + PAGE);
                    at += PAGE;
                }
                Some(Errno::ENOENT | Errno::EAGAIN) => return Err(Halt::Again),
                // It may go on when others have given back some.
                Some(Errno::ENOMEM) => {
                    std::thread::sleep(Duration::from_millis(10));
                    return Err(Halt::Again);
                }
                Some(Errno::ESRCH | Errno::ENOSPC) => return Err(Halt::Gone),
                Some(errno) => return Err(Halt::Failed(format!("page {at:x}: UFFDIO_COPY: {errno}"))),
            }
        }
        Ok(())
    }
}
