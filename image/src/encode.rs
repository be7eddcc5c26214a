//! Writing encoded data files: contents in chunks, compressed, encrypted, and counted.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use age::stream::StreamWriter;

use crate::chunk::{CHUNK, Chunk};
use crate::codec::{Compression, Encoder};
use crate::data::Stored;
use crate::extent::PAGE;
use crate::keys::Recipients;

/// How the files of an image are written.
#[derive(Clone, Debug, Default)]
pub struct Encoding {
    /// How contents are compressed.
    pub compression: Option<Compression>,
    /// Who may read the image; everyone without.
    pub recipients: Option<Recipients>,
}

impl Encoding {
    /// Whether files are written as they are.
    pub fn is_raw(&self) -> bool {
        self.stored().is_raw()
    }

    pub(crate) fn stored(&self) -> Stored {
        Stored { compression: self.compression, encrypted: self.recipients.is_some() }
    }
}

/// Where bytes of a file go in the end. Counts them.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) place: Place,
    pub(crate) size: u64,
    pub(crate) crc: u32,
}

#[derive(Debug)]
pub(crate) enum Place {
    File(File),
    /// Until the file is complete and can be sent.
    Memory(Vec<u8>),
}

impl Counted {
    pub(crate) fn new(place: Place) -> Self {
        Counted { place, size: 0, crc: 0 }
    }

    /// Puts it on stable storage if it is to be.
    pub(crate) fn sync(&self, fsync: bool) -> io::Result<()> {
        match &self.place {
            Place::File(file) if fsync => file.sync_all(),
            _ => Ok(()),
        }
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.place {
            Place::File(file) => file.write_all_at(bytes, self.size)?,
            Place::Memory(memory) => memory.extend_from_slice(bytes),
        }
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Out {
    Plain(Counted),
    Age(Box<StreamWriter<Counted>>),
}

/// A data file being encoded.
pub(crate) struct Encoded {
    number: u32,
    out: Out,
    encoder: Encoder,
    /// Contents of the chunk that is not full yet.
    pending: Vec<u8>,
    frame: Vec<u8>,
    chunks: Vec<Chunk>,
    stored: u64,
}

impl Encoded {
    pub(crate) fn new(number: u32, to: Counted, encoding: &Encoding) -> io::Result<Self> {
        let out = match &encoding.recipients {
            None => Out::Plain(to),
            Some(recipients) => Out::Age(Box::new(recipients.encrypt(to)?)),
        };
        Ok(Encoded {
            number,
            out,
            encoder: Encoder::new(encoding.compression)?,
            pending: Vec::with_capacity(CHUNK),
            frame: Vec::new(),
            chunks: Vec::new(),
            stored: 0,
        })
    }

    /// Bytes stored so far.
    pub(crate) fn stored(&self) -> u64 {
        self.stored
    }

    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.pending.is_empty() && bytes.len() >= CHUNK {
                let (chunk, rest) = bytes.split_at(CHUNK);
                self.chunk(chunk)?;
                bytes = rest;
                continue;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(CHUNK - self.pending.len()));
            self.pending.extend_from_slice(part);
            bytes = rest;
            if self.pending.len() == CHUNK {
                self.complete()?;
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> io::Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        let result = self.chunk(&pending);
        pending.clear();
        self.pending = pending;
        result
    }

    fn chunk(&mut self, plain: &[u8]) -> io::Result<()> {
        self.encoder.encode(plain, &mut self.frame)?;
        match &mut self.out {
            Out::Plain(out) => out.write_all(&self.frame)?,
            Out::Age(out) => out.write_all(&self.frame)?,
        }
        self.stored += self.frame.len() as u64;
        self.chunks.push(Chunk {
            file: self.number,
            length: plain.len() as u32,
            stored: self.frame.len() as u32,
            crc: crc32c::crc32c(plain),
        });
        Ok(())
    }

    /// Completes the file; its chunks are told as well.
    pub(crate) fn finish(mut self) -> io::Result<(Counted, Vec<Chunk>)> {
        if !self.pending.is_empty() {
            debug_assert!((self.pending.len() as u64).is_multiple_of(PAGE), "contents are whole pages");
            self.complete()?;
        }
        let out = match self.out {
            Out::Plain(out) => out,
            Out::Age(out) => out.finish()?,
        };
        Ok((out, self.chunks))
    }
}

impl std::fmt::Debug for Encoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoded({})", self.number)
    }
}
