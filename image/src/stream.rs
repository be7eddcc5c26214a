//! An image as one stream: a tar archive of its files.
//!
//! A reader must be told the length of a file before its bytes, so data files are kept in memory until they are complete,
//! and end early: each is a piece of what one would be in a directory. The manifest comes last, so that a stream which was
//! cut off shows. What `tar -x` makes of it is the image.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::chunk::Chunk;
use crate::manifest::ImageFile;
use crate::{Error, Result};

/// Bytes after which a data file ends.
pub(crate) const PIECE: u64 = 32 << 20;
/// Of tar (POSIX pax, "ustar Interchange Format").
pub(crate) const BLOCK: usize = 512;
/// What errors call it.
const NAME: &str = "standard output";

/// Where a stream goes.
pub trait Output: Write + Send {
    /// Closes it; what had not been written yet may fail only now.
    fn close(self: Box<Self>) -> io::Result<()>;
}

/// A stream being written, by several threads.
pub(crate) struct Stream {
    state: Mutex<State>,
    next: AtomicU32,
}

struct State {
    out: Option<Box<dyn Output>>,
    files: Vec<ImageFile>,
    chunks: Vec<Chunk>,
}

impl Stream {
    pub(crate) fn new(out: Box<dyn Output>) -> Self {
        let state = State { out: Some(out), files: Vec::new(), chunks: Vec::new() };
        Stream { state: Mutex::new(state), next: AtomicU32::new(0) }
    }

    /// Notes that a data file has this number.
    pub(crate) fn reserve(&self, number: u32) {
        self.next.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// A number that no data file has.
    pub(crate) fn number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a file.
    pub(crate) fn send(&self, name: &str, content: &[u8]) -> Result<()> {
        let header = header(name, content.len() as u64);
        let padding = [0; BLOCK];
        let padding = &padding[..content.len().next_multiple_of(BLOCK) - content.len()];
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let out = state.out.as_mut().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let sent = [&header[..], content, padding].iter().try_for_each(|part| out.write_all(part));
        // Nobody shall take what follows for a part of it.
        sent.inspect_err(|_| state.out = None).map_err(failed)
    }

    /// Remembers that a data file was sent.
    pub(crate) fn note(&self, file: ImageFile, chunks: Vec<Chunk>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.files.push(file);
        state.chunks.extend(chunks);
    }

    /// The data files that were sent so far, and their chunks.
    pub(crate) fn noted(&self) -> (Vec<ImageFile>, Vec<Chunk>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.files), std::mem::take(&mut state.chunks))
    }

    /// Ends the archive and closes it.
    pub(crate) fn finish(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = state.out.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush()).and_then(|()| out.close()).map_err(failed)
    }
}

fn failed(e: io::Error) -> Error {
    Error::file("write", NAME)(e)
}

fn header(name: &str, size: u64) -> [u8; BLOCK] {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).expect("names of image files are short and plain");
    header.set_size(size);
    header.set_mode(0o600);
    header.set_mtime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()));
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    *header.as_bytes()
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stream")
    }
}
