//! The fixed header before every body.
//!
//! It can be read without decoding anything, so that a reader knows which side is too old before it meets a
//! field it does not understand. Little endian throughout:
//!
//! ```text
//!  0  8  magic "TORPOR\r\n"       (the line end shows a text-mode transfer)
//!  8  8  machine, zero padded     ("x86_64")
//! 16  4  kind of body, four letters
//! 20  2  format major             readers refuse a higher one
//! 22  2  format minor             fields added; readers of the same major ignore what they do not know
//! 24  8  length of the body
//! 32  4  CRC-32C of the body
//! 36  4  CRC-32C of bytes 0..36
//! ```

use crate::{Error, Result};

/// Format version: raised when an older reader would get the meaning wrong.
pub const MAJOR: u16 = 3;
/// What is written where nothing is in the image that an older reader does not know: raised when fields are added that it may
/// ignore.
pub const PLAIN: (u16, u16) = (2, 1);
/// What is written into the manifest of an image with encoded data files, or with such as are another image's.
pub const NEWEST: (u16, u16) = (MAJOR, 0);
/// Bytes of the header.
pub const LEN: usize = 40;

const MAGIC: &[u8; 8] = b"TORPOR\r\n";

/// The kind of body that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`crate::manifest::Manifest`]
    Manifest,
    /// [`crate::description::Objects`]
    Objects,
    /// [`crate::task::Task`]
    Task,
    /// [`crate::extent::Record`]s
    Index,
    /// Where the chunks of encoded data files lie.
    Chunks,
}

impl Kind {
    const fn letters(self) -> &'static [u8; 4] {
        match self {
            Kind::Manifest => b"mani",
            Kind::Objects => b"objs",
            Kind::Task => b"task",
            Kind::Index => b"pidx",
            Kind::Chunks => b"chnk",
        }
    }
}

/// Makes the header for `body`, of a version.
pub fn encode(kind: Kind, body: &[u8], (major, minor): (u16, u16)) -> [u8; LEN] {
    let mut out = [0u8; LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..8 + arch::MACHINE.len()].copy_from_slice(arch::MACHINE.as_bytes());
    out[16..20].copy_from_slice(kind.letters());
    out[20..22].copy_from_slice(&major.to_le_bytes());
    out[22..24].copy_from_slice(&minor.to_le_bytes());
    out[24..32].copy_from_slice(&(body.len() as u64).to_le_bytes());
    out[32..36].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    let own = crc32c::crc32c(&out[..36]);
    out[36..40].copy_from_slice(&own.to_le_bytes());
    out
}

/// Checks the header at the start of `file` and gives the body behind it.
pub fn decode<'a>(name: &str, kind: Kind, file: &'a [u8]) -> Result<&'a [u8]> {
    let damaged = |what: &str| Error::damaged(name, what);
    let (header, body) =
        file.split_at_checked(LEN).ok_or_else(|| damaged("it is shorter than its header"))?;
    if &header[..8] != MAGIC {
        return Err(damaged("it does not begin with the mark of a torpor image"));
    }
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    if u32_at(36) != crc32c::crc32c(&header[..36]) {
        return Err(damaged("the checksum of its header is wrong"));
    }
    let (major, minor) = (u16_at(20), u16_at(22));
    if major > MAJOR || major == 0 {
        return Err(Error::TooNew { major, minor });
    }
    let machine = String::from_utf8_lossy(&header[8..16]).trim_end_matches('\0').to_owned();
    if machine != arch::MACHINE {
        return Err(Error::OtherMachine { image: machine, here: arch::MACHINE });
    }
    if &header[16..20] != kind.letters() {
        return Err(damaged("it is another kind of image file than its name says"));
    }
    let length = u64::from_le_bytes(header[24..32].try_into().expect("eight bytes"));
    if length != body.len() as u64 {
        return Err(damaged(&format!("it should have {length} bytes of content and has {}", body.len())));
    }
    if u32_at(32) != crc32c::crc32c(body) {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let mut file = encode(Kind::Task, b"body", PLAIN).to_vec();
        file.extend_from_slice(b"body");
        file
    }

    #[test]
    fn a_body_comes_back() {
        assert_eq!(decode("f", Kind::Task, &file()).expect("good"), b"body");
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_found() {
        let good = file();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode("f", Kind::Task, &bad).is_err(), "byte {at}");
            assert!(decode("f", Kind::Task, &good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_newer_format_and_another_machine_are_named() {
        let patch = |at: usize, bytes: &[u8]| {
            let mut file = file();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            let crc = crc32c::crc32c(&file[..36]);
            file[36..40].copy_from_slice(&crc.to_le_bytes());
            decode("f", Kind::Task, &file).expect_err("refused").to_string()
        };
        assert!(patch(20, &(MAJOR + 1).to_le_bytes()).contains("newer torpor"));
        assert!(patch(8, b"vax\0\0\0\0\0").contains("vax"));
    }
}
