//! The threads that decode and send.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socketpair, sockopt};
use torpor_image::Image;
use torpor_image::data::Data;

use super::Range;
use crate::error::{Error, Result};

/// Contents that are decoded by one thread at a time: never more than a chunk has, and less where many are fed.
const PIECE: std::ops::Range<usize> = 16 << 10..256 << 10;
/// What all feeds together may keep in the kernel, and as pieces that were not sent whole.
const ROOM: usize = 16 << 20;
/// Pieces that may wait decoded, of all tasks and of one.
const AHEAD: usize = 192;
const AHEAD_OF_ONE: usize = 32;
/// What the kernel keeps of one feed, where we may ask for it.
const BUFFER: std::ops::Range<usize> = 64 << 10..1 << 20;
/// More threads would decode faster than the tasks can take it.
const THREADS: usize = 8;
/// How long to wait, in milliseconds, for a socket that is full before looking what else there is to do.
const MOMENT: u8 = 2;
/// How often a thread is made anew because a task wants its id.
const ATTEMPTS: u32 = 100_000;

/// Our ends of the sockets of all tasks that are fed.
#[derive(Debug, Default)]
pub(crate) struct Sockets(BTreeMap<usize, OwnedFd>);

impl Sockets {
    /// Makes a pair for a task; gives the task's end.
    pub(crate) fn make(&mut self, task: usize) -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
        self.0.insert(task, ours);
        Ok(its)
    }
}

/// Parts of one chunk that a task reads one after the other.
#[derive(Debug)]
struct Piece {
    data: Data,
    parts: Vec<(u64, usize)>,
    length: usize,
}

/// What one task is fed.
#[derive(Debug)]
struct Feed {
    socket: Arc<OwnedFd>,
    pieces: Arc<Vec<Piece>>,
    /// The first piece that nobody has begun to decode.
    next: usize,
    /// The piece to be sent, and how much of it was.
    sending: usize,
    at: usize,
    decoded: BTreeMap<usize, Vec<u8>>,
    /// Somebody sends.
    busy: bool,
    /// It takes no more at this moment.
    full: bool,
}

#[derive(Debug)]
struct State {
    feeds: Vec<Feed>,
    /// Feeds that are not through.
    left: usize,
    stop: bool,
    polled: bool,
    failure: Option<Error>,
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Pieces of one feed that may wait decoded.
    ahead: usize,
}

/// Threads that feed tasks. Dropped, they end.
#[derive(Debug)]
pub(crate) struct Feeds {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Feeds {
    /// Begins to feed; `None` if nobody is to be fed. `taken` are ids that our threads must not have.
    pub(crate) fn start(
        image: &Image,
        ranges: &BTreeMap<usize, Vec<Range>>,
        sockets: &mut Sockets,
        taken: &BTreeSet<i32>,
    ) -> Result<Option<Self>> {
        let mut files: BTreeMap<u32, Data> = BTreeMap::new();
        let mut feeds = Vec::new();
        let part = ROOM / sockets.0.len().max(1);
        let (piece, buffer) =
            (part.clamp(PIECE.start, PIECE.end) as u64, part.clamp(BUFFER.start, BUFFER.end));
        for (task, socket) in std::mem::take(&mut sockets.0) {
            let ranges = ranges.get(&task).map_or(&[][..], Vec::as_slice);
            for range in ranges {
                if let std::collections::btree_map::Entry::Vacant(entry) = files.entry(range.file) {
                    entry.insert(image.data(range.file)?);
                }
            }
            if setsockopt(&socket, sockopt::SndBufForce, &buffer).is_err() {
                let _slower = setsockopt(&socket, sockopt::SndBuf, &buffer);
            }
            let pieces = pieces(ranges, &files, piece);
            if !pieces.is_empty() {
                feeds.push(Feed {
                    socket: Arc::new(socket),
                    pieces: Arc::new(pieces),
                    next: 0,
                    sending: 0,
                    at: 0,
                    decoded: BTreeMap::new(),
                    busy: false,
                    full: false,
                });
            }
        }
        if feeds.is_empty() {
            return Ok(None);
        }
        let ahead = (AHEAD / feeds.len()).clamp(1, AHEAD_OF_ONE);
        let left = feeds.len();
        let state = State { feeds, left, stop: false, polled: false, failure: None, spare: Vec::new() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), ahead });
        let mut all = Feeds { shared, threads: Vec::new() };
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)) {
            let thread = all.thread(taken)?;
            all.threads.push(thread);
        }
        Ok(Some(all))
    }

    /// A thread with an id that nobody wants: one that somebody wants ends again, and the next one has a higher id.
    fn thread(&self, taken: &BTreeSet<i32>) -> Result<JoinHandle<()>> {
        let what = || "the threads that decode its contents".to_owned();
        for _ in 0..ATTEMPTS {
            let shared = self.shared.clone();
            let (tell, told) = channel();
            let (go, gone) = channel();
            let run = move |tell: Sender<i32>| {
                let _heard = tell.send(nix::unistd::gettid().as_raw());
                drop(tell);
                if gone.recv().is_ok() {
                    shared.work();
                }
            };
            let builder = std::thread::Builder::new().name("torpor-feed".into());
            let thread = builder.spawn(move || run(tell)).map_err(|e| Error::Limit {
                what: what(),
                call: "clone",
                errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EAGAIN)),
                remedy: "raise the limit of processes (`ulimit -u`, pids.max)",
            })?;
            if told.recv().is_ok_and(|tid| !taken.contains(&tid)) && go.send(()).is_ok() {
                return Ok(thread);
            }
            drop(go);
            let _ended = thread.join();
        }
        Err(Error::Open { what: what(), call: "clone", errno: Errno::EEXIST })
    }

    /// Ends it: what receives still fails.
    pub(crate) fn stop(&self) {
        self.shared.lock().end(None);
        self.shared.changed.notify_all();
    }

    /// Ends it when all tasks are through; an error if something could not be decoded.
    pub(crate) fn finish(self) -> Result<()> {
        self.stop();
        let failure = self.shared.lock().failure.take();
        failure.map_or(Ok(()), Err)
    }
}

impl Drop for Feeds {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

impl State {
    fn end(&mut self, failure: Option<Error>) {
        if failure.is_some() && !self.stop {
            self.failure = failure;
        }
        self.stop = true;
        for feed in &self.feeds {
            // Others have copies of our end: only this makes an end of it for all.
            let _gone = nix::sys::socket::shutdown(feed.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does: it sends what is decoded, or decodes what comes next, or waits for room.
    fn work(&self) {
        let mut state = self.lock();
        while !state.stop && state.left > 0 {
            if let Some(i) = state.feeds.iter().position(Feed::can_send) {
                state = self.send(state, i);
            } else if let Some(i) = state.feeds.iter().position(|f| f.can_decode(self.ahead)) {
                state = self.decode(state, i);
            } else if !state.polled && state.feeds.iter().any(|f| f.full) {
                state = self.poll(state);
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            self.changed.notify_all();
        }
    }

    fn send<'a>(&'a self, mut state: MutexGuard<'a, State>, i: usize) -> MutexGuard<'a, State> {
        let feed = &mut state.feeds[i];
        let (socket, number, at) = (feed.socket.clone(), feed.sending, feed.at);
        let Some(bytes) = feed.decoded.remove(&number) else { return state };
        feed.busy = true;
        drop(state);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = send(socket.as_raw_fd(), &bytes[at..], flags);
        let mut state = self.lock();
        let feed = &mut state.feeds[i];
        feed.busy = false;
        match sent {
            Ok(n) if at + n == bytes.len() => {
                (feed.sending, feed.at) = (number + 1, 0);
                let through = feed.sending == feed.pieces.len();
                state.left -= usize::from(through);
                state.spare.push(bytes);
            }
            Ok(n) => {
                (feed.at, feed.full) = (at + n, true);
                feed.decoded.insert(number, bytes);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {
                feed.full = true;
                feed.decoded.insert(number, bytes);
            }
            Err(errno) => {
                let what = "the contents of its memory".into();
                state.end(Some(Error::Open { what, call: "send", errno }));
            }
        }
        state
    }

    fn decode<'a>(&'a self, mut state: MutexGuard<'a, State>, i: usize) -> MutexGuard<'a, State> {
        let feed = &mut state.feeds[i];
        let (pieces, number) = (feed.pieces.clone(), feed.next);
        feed.next += 1;
        let mut bytes = state.spare.pop().unwrap_or_default();
        drop(state);
        let done = pieces[number].read(&mut bytes);
        let mut state = self.lock();
        match done {
            Ok(()) => {
                state.feeds[i].decoded.insert(number, bytes);
            }
            Err(e) => state.end(Some(e.into())),
        }
        state
    }

    fn poll<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.polled = true;
        let full = |(_, f): &(usize, &Feed)| f.full;
        let all: Vec<(usize, Arc<OwnedFd>)> =
            state.feeds.iter().enumerate().filter(full).map(|(i, f)| (i, f.socket.clone())).collect();
        drop(state);
        let mut fds: Vec<PollFd<'_>> =
            all.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT)).collect();
        let polled = poll(&mut fds, PollTimeout::from(MOMENT));
        let mut state = self.lock();
        state.polled = false;
        if polled.is_ok_and(|n| n > 0) {
            for ((i, _), fd) in all.iter().zip(&fds) {
                if fd.any() == Some(true) {
                    state.feeds[*i].full = false;
                }
            }
        }
        state
    }
}

impl Feed {
    fn can_send(&self) -> bool {
        !self.busy && !self.full && self.decoded.contains_key(&self.sending)
    }

    fn can_decode(&self, ahead: usize) -> bool {
        self.next < self.pieces.len() && self.next - self.sending < ahead
    }
}

impl Piece {
    fn read(&self, bytes: &mut Vec<u8>) -> torpor_image::Result<()> {
        bytes.resize(self.length, 0);
        let mut rest = &mut bytes[..];
        for &(offset, length) in &self.parts {
            let (part, after) = rest.split_at_mut(length);
            self.data.read_exact_at(part, offset)?;
            rest = after;
        }
        Ok(())
    }
}

/// Cuts ranges where chunks end, so that each is decoded once.
fn pieces(ranges: &[Range], files: &BTreeMap<u32, Data>, most: u64) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    // File and end of the chunk that the last piece is of.
    let mut last = None;
    for range in ranges {
        let Some(data) = files.get(&range.file) else { continue };
        let (mut at, end) = (range.offset, range.offset + range.length);
        while at < end {
            let chunk = data.chunk_end(at).unwrap_or(end);
            let stop = end.min(chunk).min(at + most);
            let length = (stop - at) as usize;
            match all.last_mut() {
                Some(piece)
                    if last == Some((range.file, chunk)) && piece.length + length <= most as usize =>
                {
                    piece.parts.push((at, length));
                    piece.length += length;
                }
                _ => all.push(Piece { data: data.clone(), parts: vec![(at, length)], length }),
            }
            last = Some((range.file, chunk));
            at = stop;
        }
    }
    all
}
