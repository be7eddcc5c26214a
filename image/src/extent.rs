//! Where bytes lie: the page index.
//!
//! One index serves the whole image; every address space and every inode with content names its range of
//! records. Records of one range are sorted by address and do not overlap.

use serde::{Deserialize, Serialize};

/// Granularity of everything in the index and the data files, in bytes.
pub const PAGE: u64 = 4096;
/// Bytes of a record.
pub const RECORD: usize = 32;

/// What a record says of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Where {
    /// The bytes lie in data file `file` at `offset`.
    Data = 1,
    /// The bytes are zero.
    Zero = 2,
    /// Guard pages (`MADV_GUARD_INSTALL`): no content, any access is a fault.
    Guard = 5,
}

/// A run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Address in the task, or offset in the inode.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
    /// What is there.
    pub place: Where,
    /// Number of the data file.
    pub file: u32,
    /// Offset in the data file.
    pub offset: u64,
}

impl Record {
    /// The record as it lies in the index, little endian.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        out[..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..16].copy_from_slice(&self.length.to_le_bytes());
        out[16..20].copy_from_slice(&(self.place as u32).to_le_bytes());
        out[20..24].copy_from_slice(&self.file.to_le_bytes());
        out[24..].copy_from_slice(&self.offset.to_le_bytes());
        out
    }

    /// Reads a record; `None` where its kind is unknown.
    pub fn decode(bytes: &[u8; RECORD]) -> Option<Self> {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let place = match u32_at(16) {
            1 => Where::Data,
            2 => Where::Zero,
            5 => Where::Guard,
            _ => return None,
        };
        Some(Record { address: u64_at(0), length: u64_at(8), place, file: u32_at(20), offset: u64_at(24) })
    }
}

/// A range of records of the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extents {
    /// Number of the first record.
    pub first: u64,
    /// How many.
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back() {
        let record = Record { address: 0x7000, length: 8192, place: Where::Data, file: 3, offset: 4096 };
        assert_eq!(Record::decode(&record.encode()), Some(record));
    }
}
