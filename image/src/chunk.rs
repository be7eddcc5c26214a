//! Where the chunks of encoded data files lie: `chunks.idx`.
//!
//! Offsets in the page index are those of the contents. An encoded data file has them in chunks, each encoded by itself;
//! this table tells how long each is, as contents and as stored, so that any part can be read without what is before it.

use crate::extent::PAGE;
use crate::{Error, Result};

/// Contents in one chunk, as they are written: whoever needs a page has to decode a chunk, which shall fit into the
/// second-level cache twice.
pub(crate) const CHUNK: usize = 128 << 10;
/// The largest that a reader takes.
pub(crate) const LARGEST: u32 = 256 << 10;
/// By how much a chunk that cannot be compressed may grow: no format needs more.
const GROWTH: u32 = 1 << 10;
/// Bytes of a record.
pub(crate) const RECORD: usize = 16;
/// Name of the file.
pub(crate) const FILE: &str = "chunks.idx";

/// One chunk of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Number of the data file.
    pub(crate) file: u32,
    /// Length of its contents.
    pub(crate) length: u32,
    /// Length as stored.
    pub(crate) stored: u32,
    /// CRC-32C of its contents.
    pub(crate) crc: u32,
}

impl Chunk {
    pub(crate) fn encode(&self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        for (part, value) in out.chunks_mut(4).zip([self.file, self.length, self.stored, self.crc]) {
            part.copy_from_slice(&value.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8; RECORD]) -> Self {
        let at = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().expect("four bytes"));
        Chunk { file: at(0), length: at(4), stored: at(8), crc: at(12) }
    }
}

/// A chunk and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Where its contents end, in the contents of the file.
    pub(crate) end: u64,
    /// Where it is stored.
    pub(crate) at: u64,
    pub(crate) chunk: Chunk,
}

impl Placed {
    /// Where its contents begin.
    pub(crate) fn start(&self) -> u64 {
        self.end - u64::from(self.chunk.length)
    }
}

/// The chunks of one data file, in order.
#[derive(Debug, Default)]
pub(crate) struct Table {
    chunks: Vec<Placed>,
}

impl Table {
    /// Length of the contents.
    pub(crate) fn size(&self) -> u64 {
        self.chunks.last().map_or(0, |c| c.end)
    }

    /// Length as stored.
    pub(crate) fn stored(&self) -> u64 {
        self.chunks.last().map_or(0, |c| c.at + u64::from(c.chunk.stored))
    }

    /// Number of the chunk that has the contents at `offset`, or of none.
    pub(crate) fn find(&self, offset: u64) -> usize {
        self.chunks.partition_point(|c| c.end <= offset)
    }

    pub(crate) fn get(&self, number: usize) -> Option<&Placed> {
        self.chunks.get(number)
    }

    pub(crate) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// All of them.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().map(|placed| &placed.chunk)
    }

    fn push(&mut self, chunk: Chunk) {
        self.chunks.push(Placed { end: self.size() + u64::from(chunk.length), at: self.stored(), chunk });
    }
}

/// Reads the tables of all data files.
pub(crate) fn decode(body: &[u8]) -> Result<std::collections::BTreeMap<u32, Table>> {
    let bad = |what| Err(Error::damaged(FILE, what));
    let (records, rest) = body.as_chunks::<RECORD>();
    if !rest.is_empty() {
        return bad("its last record is cut off");
    }
    let mut all: std::collections::BTreeMap<u32, Table> = Default::default();
    for record in records {
        let chunk = Chunk::decode(record);
        if chunk.length == 0 || chunk.length > LARGEST || u64::from(chunk.length) % PAGE != 0 {
            return bad("a chunk has an impossible length");
        }
        if chunk.stored == 0 || chunk.stored > chunk.length + GROWTH {
            return bad("a chunk is stored in an impossible length");
        }
        all.entry(chunk.file).or_default().push(chunk);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(file: u32, length: u32, stored: u32) -> Chunk {
        Chunk { file, length, stored, crc: 7 }
    }

    #[test]
    fn chunks_are_found_by_offset() {
        let chunks = [chunk(3, 8192, 10), chunk(9, 4096, 5000), chunk(3, 4096, 20)];
        let body: Vec<u8> = chunks.iter().flat_map(Chunk::encode).collect();
        let tables = decode(&body).unwrap();
        assert_eq!(tables.len(), 2);
        let table = &tables[&3];
        assert_eq!((table.size(), table.stored(), table.len()), (12288, 30, 2));
        assert_eq!([0, 8191, 8192, 12287, 12288].map(|at| table.find(at)), [0, 0, 1, 1, 2]);
        assert_eq!(table.get(1).map(|p| (p.start(), p.at)), Some((8192, 10)));
        assert!(table.get(2).is_none());
    }

    #[test]
    fn impossible_chunks_are_refused() {
        for wrong in [chunk(0, 0, 1), chunk(0, 4096, 0), chunk(0, 4097, 9), chunk(0, LARGEST + 4096, 9)] {
            assert!(decode(&wrong.encode()).is_err(), "{wrong:?}");
        }
        assert!(decode(&chunk(0, 4096, 4096 + GROWTH + 1).encode()).is_err());
        assert!(decode(&chunk(0, 4096, 4096).encode()[1..]).is_err());
    }
}
