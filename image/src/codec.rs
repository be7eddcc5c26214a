//! Compressing contents, one chunk at a time.
//!
//! Every chunk is a frame of its own, so that each can be read alone and a file of them is what `zstd -d` and `lz4 -d`
//! take: both formats are defined as sequences of frames (RFC 8878, section 3; lz4's `doc/lz4_Frame_format.md`). An lz4
//! frame is made here of one block; what does not compress is stored in it as it is, as zstd does by itself.

use std::io;

use serde::{Deserialize, Serialize};

/// How contents are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// Fast, and of moderate gain.
    Lz4,
    /// Smaller, at several times the work.
    Zstd,
}

/// The level of least work: a dump is waited for.
const LEVEL: i32 = 1;

/// An lz4 frame of independent blocks of at most 256 KiB without checksums: magic, flags, sizes, and their checksum.
const LZ4_HEADER: [u8; 7] = [0x04, 0x22, 0x4d, 0x18, 0x60, 0x50, 0xfb];
/// The bit in the length of a block that is stored as it is.
const LZ4_STORED: u32 = 1 << 31;
const LZ4_END: [u8; 4] = [0; 4];

impl Compression {
    /// What the names of such files end with.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Compression::Lz4 => ".lz4",
            Compression::Zstd => ".zst",
        }
    }
}

/// Makes frames.
pub(crate) enum Encoder {
    Stored,
    Lz4(Box<lz4_flex::block::CompressTable>),
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Encoder {
    pub(crate) fn new(compression: Option<Compression>) -> io::Result<Self> {
        Ok(match compression {
            None => Encoder::Stored,
            Some(Compression::Lz4) => Encoder::Lz4(Box::new(lz4_flex::block::CompressTable::large())),
            Some(Compression::Zstd) => Encoder::Zstd(Box::new(zstd::bulk::Compressor::new(LEVEL)?)),
        })
    }

    /// Replaces `out` by the frame of `plain`.
    pub(crate) fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        match self {
            Encoder::Stored => out.extend_from_slice(plain),
            Encoder::Zstd(compressor) => {
                out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
                compressor.compress_to_buffer(plain, out)?;
            }
            Encoder::Lz4(table) => {
                const BEFORE: usize = LZ4_HEADER.len() + 4;
                out.resize(BEFORE + lz4_flex::block::get_maximum_output_size(plain.len()), 0);
                let done = lz4_flex::block::compress_into_with_table(plain, &mut out[BEFORE..], table)
                    .map_err(io::Error::other)?;
                let mut size = done as u32;
                out.truncate(BEFORE + done);
                if done >= plain.len() {
                    out.truncate(BEFORE);
                    out.extend_from_slice(plain);
                    size = plain.len() as u32 | LZ4_STORED;
                }
                out[..LZ4_HEADER.len()].copy_from_slice(&LZ4_HEADER);
                out[LZ4_HEADER.len()..BEFORE].copy_from_slice(&size.to_le_bytes());
                out.extend_from_slice(&LZ4_END);
            }
        }
        Ok(())
    }
}

/// Reads frames.
pub(crate) enum Decoder {
    Stored,
    Lz4,
    Zstd(Box<zstd::bulk::Decompressor<'static>>),
}

impl Decoder {
    pub(crate) fn new(compression: Option<Compression>) -> io::Result<Self> {
        Ok(match compression {
            None => Decoder::Stored,
            Some(Compression::Lz4) => Decoder::Lz4,
            Some(Compression::Zstd) => Decoder::Zstd(Box::new(zstd::bulk::Decompressor::new()?)),
        })
    }

    /// Fills all of `plain` from a frame; what is wrong with it, if it does not give exactly that much.
    pub(crate) fn decode(&mut self, frame: &[u8], plain: &mut [u8]) -> Result<(), &'static str> {
        const WRONG: &str = "its frame cannot be decoded";
        const LENGTH: &str = "it has another length than the index says";
        let length = match self {
            Decoder::Stored => {
                if frame.len() == plain.len() {
                    plain.copy_from_slice(frame);
                }
                frame.len()
            }
            Decoder::Zstd(decompressor) => {
                decompressor.decompress_to_buffer(frame, &mut *plain).map_err(|_| WRONG)?
            }
            Decoder::Lz4 => {
                let rest = frame.strip_prefix(&LZ4_HEADER).ok_or(WRONG)?;
                let (size, rest) = rest.split_first_chunk::<4>().ok_or(WRONG)?;
                let block = rest.strip_suffix(&LZ4_END).ok_or(WRONG)?;
                let size = u32::from_le_bytes(*size);
                if block.len() as u32 != size & !LZ4_STORED {
                    return Err(WRONG);
                }
                if size & LZ4_STORED == 0 {
                    lz4_flex::block::decompress_into(block, plain).map_err(|_| WRONG)?
                } else {
                    if block.len() == plain.len() {
                        plain.copy_from_slice(block);
                    }
                    block.len()
                }
            }
        };
        if length == plain.len() { Ok(()) } else { Err(LENGTH) }
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Encoder")
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const ALL: [Option<Compression>; 3] = [None, Some(Compression::Lz4), Some(Compression::Zstd)];

    /// Bytes that compress, and bytes that do not.
    fn samples() -> Vec<Vec<u8>> {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        };
        let noise: Vec<u8> = (0..200_000).map(|_| next()).collect();
        let text: Vec<u8> = (0..200_000u32).flat_map(|i| (i / 7).to_le_bytes()).take(262_144).collect();
        vec![noise[..1].to_vec(), noise, text, vec![0; 4096]]
    }

    #[test]
    fn chunks_come_back_and_nothing_of_another_length_does() {
        for compression in ALL {
            let mut encoder = Encoder::new(compression).unwrap();
            let mut decoder = Decoder::new(compression).unwrap();
            for plain in samples() {
                let mut frame = Vec::new();
                encoder.encode(&plain, &mut frame).unwrap();
                assert!(frame.len() <= plain.len() + plain.len() / 64 + 64, "{compression:?}");
                let mut back = vec![1; plain.len()];
                decoder.decode(&frame, &mut back).unwrap();
                assert!(back == plain, "{compression:?}");
                let mut more = vec![0; plain.len() + 1];
                assert!(decoder.decode(&frame, &mut more).is_err(), "{compression:?}: longer");
                assert!(
                    decoder.decode(&frame, &mut more[..plain.len() - 1]).is_err(),
                    "{compression:?}: shorter"
                );
                for cut in [0, frame.len() / 2, frame.len() - 1] {
                    assert!(
                        decoder.decode(&frame[..cut], &mut back).is_err(),
                        "{compression:?}: cut at {cut}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_file_of_frames_is_what_the_formats_say() {
        let mut lz4 = Vec::new();
        let mut zstd = Vec::new();
        let mut frame = Vec::new();
        let mut all = Vec::new();
        for plain in samples() {
            Encoder::new(Some(Compression::Lz4)).unwrap().encode(&plain, &mut frame).unwrap();
            lz4.push(frame.clone());
            Encoder::new(Some(Compression::Zstd)).unwrap().encode(&plain, &mut frame).unwrap();
            zstd.extend_from_slice(&frame);
            all.extend_from_slice(&plain);
        }
        assert!(zstd::stream::decode_all(&zstd[..]).unwrap() == all);
        let mut back = Vec::new();
        for frame in lz4 {
            lz4_flex::frame::FrameDecoder::new(&frame[..]).read_to_end(&mut back).unwrap();
        }
        assert!(back == all);
    }
}
