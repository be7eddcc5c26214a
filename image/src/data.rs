//! The contents of a data file, however they are stored.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use age::stream::StreamReader;

use crate::chunk::{Placed, Table};
use crate::codec::{Compression, Decoder};
use crate::keys::{Identities, Positioned};
use crate::{Error, Result};

/// How a data file is stored, as its name tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// How its chunks are compressed.
    pub compression: Option<Compression>,
    /// Whether it is an age file.
    pub encrypted: bool,
}

impl Stored {
    /// Whether the bytes of the file are the contents.
    pub fn is_raw(self) -> bool {
        self.compression.is_none() && !self.encrypted
    }
}

/// A data file, open for reading. Offsets are those of the page index.
#[derive(Clone, Debug)]
pub struct Data {
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Raw { file: Arc<File>, path: PathBuf },
    Chunked(Arc<Chunked>),
}

/// A data file in chunks.
#[derive(Debug)]
struct Chunked {
    file: Arc<File>,
    name: String,
    path: PathBuf,
    stored: Stored,
    identities: Identities,
    table: Arc<Table>,
    number: u32,
    readers: Readers,
}

/// Readers of all files of an image that nobody uses at this moment, with the numbers of their files; the last used
/// are last.
pub(crate) type Readers = Arc<Mutex<Vec<(u32, Reader)>>>;

/// How many of them are kept: about one for each thread that reads.
const KEPT: usize = 16;

impl Data {
    pub(crate) fn raw(file: File, path: PathBuf) -> Self {
        Data { kind: Kind::Raw { file: Arc::new(file), path } }
    }

    pub(crate) fn chunked(
        file: File,
        path: PathBuf,
        (number, stored): (u32, Stored),
        table: Arc<Table>,
        identities: Identities,
        readers: Readers,
    ) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = Arc::new(file);
        let chunked = Chunked { file, name, path, stored, identities, table, number, readers };
        // That the key fits is found now, and not by the first who reads.
        let first = chunked.reader()?;
        chunked.give_back(first);
        Ok(Data { kind: Kind::Chunked(Arc::new(chunked)) })
    }

    /// The file itself, if its bytes are the contents: whoever has it can read them without us.
    pub fn as_file(&self) -> Option<&File> {
        match &self.kind {
            Kind::Raw { file, .. } => Some(file),
            Kind::Chunked(_) => None,
        }
    }

    /// Fills `bytes` with what lies at `offset`. May be called by several threads at once.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::Raw { file, path } => file.read_exact_at(bytes, offset).map_err(Error::file("read", path)),
            Kind::Chunked(chunked) => chunked.read_exact_at(bytes, offset),
        }
    }

    /// Where the chunk ends that has what lies at `offset`: up to there it is read as soon as a byte of it is.
    pub fn chunk_end(&self, offset: u64) -> Option<u64> {
        match &self.kind {
            Kind::Raw { .. } => None,
            Kind::Chunked(chunked) => {
                let table = &chunked.table;
                table.get(table.find(offset)).map(|placed| placed.end)
            }
        }
    }

    /// Reads everything.
    pub(crate) fn check(&self) -> Result<()> {
        let Kind::Chunked(chunked) = &self.kind else { return Ok(()) };
        let mut reader = chunked.reader()?;
        let mut plain = Vec::new();
        for number in 0..chunked.table.len() {
            let Some(placed) = chunked.table.get(number) else { break };
            plain.resize(placed.chunk.length as usize, 0);
            chunked.decode(&mut reader, placed, &mut plain)?;
        }
        Ok(())
    }
}

/// What one thread reads with.
#[derive(Debug)]
pub(crate) struct Reader {
    source: Source,
    decoder: Decoder,
    frame: Vec<u8>,
    /// The chunk that was read last, if it was not wanted whole.
    held: Option<usize>,
    plain: Vec<u8>,
}

enum Source {
    File,
    Age(Box<StreamReader<Positioned>>),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Source")
    }
}

impl Chunked {
    fn reader(&self) -> Result<Reader> {
        let source = match self.stored.encrypted {
            false => Source::File,
            true => {
                let from = Positioned::new(self.file.clone());
                Source::Age(Box::new(self.identities.decrypt(&self.name, from)?))
            }
        };
        let decoder = Decoder::new(self.stored.compression).map_err(Error::file("decode", &self.path))?;
        Ok(Reader { source, decoder, frame: Vec::new(), held: None, plain: Vec::new() })
    }

    /// A reader that nobody uses, best the one that has this chunk.
    fn take(&self, number: usize) -> Result<Reader> {
        let mut idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |(file, r): &(u32, Reader)| *file == self.number && r.held == Some(number);
        let best = idle.iter().position(holds).or_else(|| idle.iter().rposition(|(f, _)| *f == self.number));
        match best.map(|i| idle.remove(i)) {
            Some((_, reader)) => Ok(reader),
            None => {
                drop(idle);
                self.reader()
            }
        }
    }

    fn give_back(&self, reader: Reader) {
        let mut idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push((self.number, reader));
        if idle.len() > KEPT {
            idle.remove(0);
        }
    }

    fn read_exact_at(&self, mut bytes: &mut [u8], mut offset: u64) -> Result<()> {
        let mut number = self.table.find(offset);
        // One that failed is not used again: where it stands in its file nobody knows.
        let mut reader = self.take(number)?;
        while !bytes.is_empty() {
            let Some(placed) = self.table.get(number) else {
                return Err(self.damaged(offset, "there are no contents"));
            };
            let length = placed.chunk.length as usize;
            let skip = (offset - placed.start()) as usize;
            let (part, rest) = bytes.split_at_mut(bytes.len().min(length - skip));
            if reader.held == Some(number) {
                part.copy_from_slice(&reader.plain[skip..skip + part.len()]);
            } else if part.len() == length {
                self.decode(&mut reader, placed, part)?;
            } else {
                let mut plain = std::mem::take(&mut reader.plain);
                reader.held = None;
                plain.resize(length, 0);
                self.decode(&mut reader, placed, &mut plain)?;
                part.copy_from_slice(&plain[skip..skip + part.len()]);
                (reader.plain, reader.held) = (plain, Some(number));
            }
            offset += part.len() as u64;
            number += 1;
            bytes = rest;
        }
        self.give_back(reader);
        Ok(())
    }

    /// Fills `plain`, which has the length of the chunk, with its contents.
    fn decode(&self, reader: &mut Reader, placed: &Placed, plain: &mut [u8]) -> Result<()> {
        let stored = placed.chunk.stored as usize;
        let Reader { source, decoder, frame, .. } = reader;
        frame.resize(stored, 0);
        match source {
            Source::File => {
                self.file.read_exact_at(frame, placed.at).map_err(Error::file("read", &self.path))?;
            }
            Source::Age(stream) => {
                let read = stream.seek(SeekFrom::Start(placed.at)).and_then(|_| stream.read_exact(frame));
                read.map_err(|e| match e.raw_os_error() {
                    Some(_) => Error::file("read", &self.path)(e),
                    None => self.damaged(placed.start(), &format!("it cannot be decrypted: {e}")),
                })?;
            }
        }
        decoder.decode(frame, plain).map_err(|what| self.damaged(placed.start(), what))?;
        if crc32c::crc32c(plain) != placed.chunk.crc {
            return Err(self.damaged(placed.start(), "it does not match its checksum"));
        }
        Ok(())
    }

    fn damaged(&self, offset: u64, what: &str) -> Error {
        Error::damaged(&self.name, format!("at offset {offset} of its contents: {what}"))
    }
}

#[cfg(test)]
mod tests;
