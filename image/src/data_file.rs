//! A data file being written: raw, encoded, or kept aside to be written later.
//!
//! While a tree stands, or writes faster than a disk takes it, nothing may take longer than it must. What is written
//! meanwhile can be put aside as it is: in memory as far as there is room ([`DataFile::keep`]), and in a file that has no name
//! and goes when we do; [`DataFile::catch_up`] makes of it what it is to be.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chunk::Chunk;
use crate::encode::{Counted, Encoded, Encoding, Place};
use crate::extent::PAGE;
use crate::manifest::ImageFile;
use crate::stream::{PIECE, Stream};
use crate::write::{create, data_file_name};
use crate::{Error, Result};

/// A data file being written.
#[derive(Debug)]
pub struct DataFile {
    number: u32,
    /// Length of its contents so far.
    size: u64,
    body: Body,
    home: Home,
    encoding: Encoding,
    aside: Option<Aside>,
}

/// Where it goes.
#[derive(Clone, Debug)]
enum Home {
    Directory(PathBuf),
    Stream(Arc<Stream>),
}

#[derive(Debug)]
enum Body {
    Raw(Counted),
    Encoded(Box<Encoded>),
}

/// What is put aside: first in memory, then in a file.
#[derive(Debug, Default)]
struct Aside {
    /// Whether it goes to a file where there is no more room in memory, instead of to where it belongs.
    whole: bool,
    memory: Memory,
    file: Option<File>,
    /// Length of the contents of the data file before it.
    begin: u64,
    /// Length of all of it.
    length: u64,
    /// Data files that it will be: number and length of the contents.
    pieces: Vec<(u32, u64)>,
}

impl DataFile {
    pub(crate) fn create(
        number: u32,
        dir: &Path,
        stream: Option<&Arc<Stream>>,
        encoding: &Encoding,
    ) -> Result<Self> {
        let home = match stream {
            Some(stream) => {
                stream.reserve(number);
                Home::Stream(stream.clone())
            }
            None => Home::Directory(dir.to_owned()),
        };
        let body = Body::new(number, &home, encoding)?;
        Ok(DataFile { number, size: 0, body, home, encoding: encoding.clone(), aside: None })
    }

    /// Its number, for [`crate::extent::Record::file`]: of the file that has what was appended last.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Where the next bytes will lie, as far as the file does not end before.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Keeps in memory what is written from now on, up to `room` bytes: to make pages of a file may take long, and a disk that
    /// takes less than is written to it makes its writers wait.
    pub fn keep(&mut self, room: u64) {
        let begin = self.size;
        let aside = self.aside.get_or_insert_with(|| Aside { begin, ..Aside::default() });
        if aside.file.is_none() {
            aside.memory.room = room;
        }
    }

    /// Puts aside what is written from now on, if it is not soon done with.
    pub fn put_aside(&mut self) {
        if !self.encoding.is_raw() || matches!(self.home, Home::Stream(_)) {
            let begin = self.size;
            self.aside.get_or_insert_with(|| Aside { begin, ..Aside::default() }).whole = true;
        }
    }

    /// Appends `bytes`, filled up with zeros to a whole page, and says where they begin.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        self.make_room()?;
        let at = self.size;
        self.put(bytes)?;
        let rest = bytes.len() as u64 % PAGE;
        if rest != 0 {
            self.put(&[0u8; PAGE as usize][rest as usize..])?;
        }
        Ok(at)
    }

    /// Writes what was put aside.
    pub fn catch_up(&mut self) -> Result<()> {
        let Some(mut aside) = self.aside.take().filter(|aside| aside.length > 0) else { return Ok(()) };
        let mut pieces = std::mem::take(&mut aside.pieces);
        let last = (self.number, self.size);
        let mut at = 0;
        let mut buffer = vec![0; 1 << 20];
        pieces.push(last);
        for (i, (number, size)) in pieces.into_iter().enumerate() {
            if i == 0 {
                (self.number, self.size) = (number, aside.begin);
            } else {
                self.turn_to(number)?;
            }
            let end = at + size - self.size;
            while at < end {
                let part = &mut buffer[..(end - at).min(1 << 20) as usize];
                aside.get(part, at).map_err(Error::file("read", self.path()))?;
                self.put(part)?;
                at += part.len() as u64;
            }
        }
        debug_assert_eq!((at, self.number, self.size), (aside.length, last.0, last.1));
        Ok(())
    }

    /// Completes it; nothing if it is empty, or was sent.
    pub(crate) fn finish(mut self, fsync: bool) -> Result<Option<(ImageFile, Vec<Chunk>)>> {
        self.catch_up()?;
        let path = self.path();
        let Home::Stream(stream) = &self.home else {
            if self.size == 0 {
                return fs::remove_file(&path).map_err(Error::file("remove", &path)).map(|()| None);
            }
            let (out, chunks) = self.body.finish().map_err(Error::file("write", &path))?;
            out.sync(fsync).map_err(Error::file("fsync", &path))?;
            let name = data_file_name(self.number, self.encoding.stored());
            return Ok(Some((ImageFile { name, size: out.size, crc32c: out.crc }, chunks)));
        };
        send(self.body, self.number, self.size, &self.encoding, stream)?;
        Ok(None)
    }

    /// Begins another file where this one would become too long to be kept.
    fn make_room(&mut self) -> Result<()> {
        let Home::Stream(stream) = &self.home else { return Ok(()) };
        let full = match (&self.aside, &self.body) {
            (Some(_), _) => self.size >= PIECE,
            (None, Body::Raw(out)) => out.size >= PIECE,
            (None, Body::Encoded(encoded)) => encoded.stored() >= PIECE,
        };
        if !full {
            return Ok(());
        }
        let number = stream.number();
        match &mut self.aside {
            Some(aside) => {
                aside.pieces.push((self.number, self.size));
                (self.number, self.size) = (number, 0);
                Ok(())
            }
            None => self.turn_to(number),
        }
    }

    /// Sends this file and begins another.
    fn turn_to(&mut self, number: u32) -> Result<()> {
        let body = Body::new(number, &self.home, &self.encoding)?;
        let done = std::mem::replace(&mut self.body, body);
        if let Home::Stream(stream) = &self.home {
            send(done, self.number, self.size, &self.encoding, stream)?;
        }
        (self.number, self.size) = (number, 0);
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if self.aside.as_ref().is_some_and(|aside| !aside.whole && !aside.memory.has_room(bytes.len())) {
            self.catch_up()?;
        }
        let result = match (&mut self.aside, &mut self.body) {
            (Some(aside), _) => aside.put(bytes, &self.home),
            (None, Body::Raw(out)) => out.write_all(bytes),
            (None, Body::Encoded(encoded)) => encoded.put(bytes),
        };
        result.map_err(|e| Error::file("write", self.path())(e))?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// For messages, and where it is in a directory.
    fn path(&self) -> PathBuf {
        self.home.path(self.number, &self.encoding)
    }
}

impl Home {
    fn path(&self, number: u32, encoding: &Encoding) -> PathBuf {
        let name = data_file_name(number, encoding.stored());
        match self {
            Home::Directory(dir) => dir.join(name),
            Home::Stream(_) => name.into(),
        }
    }
}

impl Body {
    fn new(number: u32, home: &Home, encoding: &Encoding) -> Result<Self> {
        let path = home.path(number, encoding);
        let out = Counted::new(match home {
            Home::Directory(_) => Place::File(create(&path)?),
            Home::Stream(_) => Place::Memory(Vec::new()),
        });
        if encoding.is_raw() {
            return Ok(Body::Raw(out));
        }
        let encoded = Encoded::new(number, out, encoding).map_err(Error::file("write", &path))?;
        Ok(Body::Encoded(Box::new(encoded)))
    }

    fn finish(self) -> io::Result<(Counted, Vec<Chunk>)> {
        match self {
            Body::Raw(out) => Ok((out, Vec::new())),
            Body::Encoded(encoded) => encoded.finish(),
        }
    }
}

fn send(body: Body, number: u32, size: u64, encoding: &Encoding, stream: &Stream) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    let name = data_file_name(number, encoding.stored());
    let (out, chunks) = body.finish().map_err(Error::file("write", &name))?;
    if let Place::Memory(content) = &out.place {
        stream.send(&name, content)?;
        stream.note(ImageFile { name, size: out.size, crc32c: out.crc }, chunks);
    }
    Ok(())
}

impl Aside {
    fn put(&mut self, mut bytes: &[u8], home: &Home) -> io::Result<()> {
        self.length += bytes.len() as u64;
        if self.file.is_none() {
            bytes = self.memory.put(bytes);
        }
        if !bytes.is_empty() {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(nameless(home)?),
            };
            file.write_all_at(bytes, self.length - bytes.len() as u64 - self.memory.length)?;
        }
        Ok(())
    }

    /// Takes out what lies at `at`, up to which all was taken before.
    fn get(&mut self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let inside = self.memory.length.saturating_sub(at).min(bytes.len() as u64);
        let (first, rest) = bytes.split_at_mut(inside as usize);
        self.memory.get(first);
        match &self.file {
            _ if rest.is_empty() => Ok(()),
            Some(file) => file.read_exact_at(rest, at + inside - self.memory.length),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// What lies in memory, and goes piece by piece.
#[derive(Debug, Default)]
struct Memory {
    room: u64,
    /// All that was ever put into it.
    length: u64,
    parts: VecDeque<Vec<u8>>,
    /// What was taken out of the first part.
    taken: usize,
}

impl Memory {
    const PART: usize = 1 << 20;

    fn has_room(&self, bytes: usize) -> bool {
        self.length + bytes as u64 <= self.room
    }

    /// Gives what there is no room for.
    fn put<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while !bytes.is_empty() && self.length < self.room {
            if self.parts.back().is_none_or(|part| part.len() == Self::PART) {
                self.parts.push_back(Vec::with_capacity(Self::PART));
            }
            let Some(part) = self.parts.back_mut() else { break };
            let fits = (Self::PART - part.len()).min(bytes.len()) as u64;
            let (own, rest) = bytes.split_at(fits.min(self.room - self.length) as usize);
            part.extend_from_slice(own);
            self.length += own.len() as u64;
            bytes = rest;
        }
        bytes
    }

    fn get(&mut self, mut bytes: &mut [u8]) {
        while let Some(part) = self.parts.front().filter(|_| !bytes.is_empty()) {
            let length = (part.len() - self.taken).min(bytes.len());
            let (own, rest) = bytes.split_at_mut(length);
            own.copy_from_slice(&part[self.taken..self.taken + length]);
            self.taken += length;
            if self.taken == part.len() {
                self.parts.pop_front();
                self.taken = 0;
            }
            bytes = rest;
        }
    }
}

/// A file that only we have.
fn nameless(home: &Home) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!(".torpor-aside-{}-{number}", std::process::id());
    let path = match home {
        Home::Directory(dir) => dir.join(name),
        Home::Stream(_) => std::env::temp_dir().join(name),
    };
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}
