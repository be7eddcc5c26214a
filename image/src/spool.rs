//! Taking an image from a stream: the tar archive that [`crate::stream`] writes, or one that tar made of an image.
//!
//! A restore needs parts of the image in another order than they come in, so the files are written to a directory. The
//! stream may be hostile: nothing is made but regular files with plain names in that directory, none of them twice, and
//! nothing larger than there is room for. What is in them is looked at when the image is opened.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::stream::BLOCK;
use crate::{Error, Result, check};

/// What errors call it.
const NAME: &str = "standard input";
/// More files than any image has.
const MOST: u32 = 1 << 20;
/// Headers of pax tell of names and times, which do not count here.
const LONGEST_HEADER: u64 = 1 << 20;

/// Writes the files of the image that `from` gives to `dir`, where there are `room()` bytes left.
pub fn receive(from: &mut dyn Read, dir: &Path, room: &dyn Fn() -> io::Result<u64>) -> Result<()> {
    let mut files = 0;
    let mut complete = false;
    while let Some(header) = next(from)? {
        let header = tar::Header::from_byte_slice(&header);
        let size = checked(header)?;
        let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
        let name = name.strip_prefix("./").unwrap_or(&name);
        let kind = header.entry_type();
        if kind.is_pax_global_extensions() || kind.is_pax_local_extensions() {
            if size > LONGEST_HEADER {
                return Err(damaged("one of its headers is longer than any"));
            }
            skip(from, size.next_multiple_of(BLOCK as u64))?;
            continue;
        }
        // The directory itself, if tar made the archive.
        if kind.is_dir() && size == 0 && (name.is_empty() || name == ".") {
            continue;
        }
        let shown = name.escape_debug().to_string();
        if !kind.is_file() || !check::is_plain(name) {
            return Err(damaged(&format!("`{shown}` is no regular file of an image")));
        }
        files += 1;
        if files > MOST {
            return Err(damaged("it has more files than any image"));
        }
        let path = dir.join(name);
        let left = room().map_err(Error::file("find room in", dir))?;
        if size > left {
            let full = io::Error::new(
                io::ErrorKind::StorageFull,
                format!("it has {size} bytes, and there is room for {left}"),
            );
            return Err(Error::file("write", path)(full));
        }
        let to =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(|e| {
                match e.kind() {
                    io::ErrorKind::AlreadyExists => damaged(&format!("`{shown}` is there twice")),
                    _ => Error::file("create", &path)(e),
                }
            })?;
        copy(from, &to, size, &path)?;
        skip(from, size.next_multiple_of(BLOCK as u64) - size)?;
        complete |= check::is_manifest(name);
    }
    if complete {
        return Ok(());
    }
    Err(damaged(if files == 0 {
        "it has no image in it"
    } else {
        "it ends before its manifest, so that it was cut off"
    }))
}

/// The next header; `None` at the end of the archive.
fn next(from: &mut dyn Read) -> Result<Option<[u8; BLOCK]>> {
    let mut block = [0; BLOCK];
    let mut have = 0;
    while have < BLOCK {
        match from.read(&mut block[have..]) {
            // tar ends with blocks of zeros; without them, what counts is whether the manifest came.
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(damaged("it was cut off")),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::file("read", NAME)(e)),
        }
    }
    if block.iter().any(|b| *b != 0) {
        return Ok(Some(block));
    }
    // Whoever writes it shall not be told that nobody reads the rest of the padding.
    skip_all(from)?;
    Ok(None)
}

/// The size of an entry whose checksum is right.
fn checked(header: &tar::Header) -> Result<u64> {
    let bytes = header.as_bytes();
    let sum: u32 =
        bytes.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    let good = header.cksum().is_ok_and(|told| told == sum);
    match header.entry_size() {
        Ok(size) if good && size <= i64::MAX as u64 => Ok(size),
        _ => Err(damaged("it is no tar archive, or one that is broken")),
    }
}

fn copy(from: &mut dyn Read, to: &File, size: u64, path: &Path) -> Result<()> {
    let mut buffer = vec![0; size.min(1 << 20) as usize];
    let mut left = size;
    while left > 0 {
        let part = &mut buffer[..left.min(1 << 20) as usize];
        read(from, part)?;
        io::Write::write_all(&mut &*to, part).map_err(Error::file("write", path))?;
        left -= part.len() as u64;
    }
    Ok(())
}

fn skip(from: &mut dyn Read, length: u64) -> Result<()> {
    let mut left = length;
    let mut buffer = [0; BLOCK];
    while left > 0 {
        let part = &mut buffer[..left.min(BLOCK as u64) as usize];
        read(from, part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

/// Reads up to the end, as far as there is no more than tar pads with.
fn skip_all(from: &mut dyn Read) -> Result<()> {
    const PADDING: u64 = 1 << 20;
    io::copy(&mut from.take(PADDING), &mut io::sink()).map_err(Error::file("read", NAME))?;
    Ok(())
}

fn read(from: &mut dyn Read, bytes: &mut [u8]) -> Result<()> {
    from.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => damaged("it was cut off"),
        _ => Error::file("read", NAME)(e),
    })
}

fn damaged(what: &str) -> Error {
    Error::damaged(NAME, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, kind: tar::EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_ustar();
        let bytes = header.as_mut_bytes();
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_entry_type(kind);
        header.set_cksum();
        let mut all = [header.as_bytes(), content].concat();
        all.resize(all.len().next_multiple_of(BLOCK), 0);
        all
    }

    fn receive(archive: &[u8], room: u64) -> (Result<()>, Vec<String>) {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("torpor-spool-{}-{next}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let result = super::receive(&mut &archive[..], &dir, &|| Ok(room));
        let mut names: Vec<String> =
            std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        std::fs::remove_dir_all(&dir).unwrap();
        (result, names)
    }

    #[test]
    fn an_archive_becomes_files() {
        use tar::EntryType as Kind;
        let pages = entry("./pages-0.dat", Kind::Regular, &[7; 700]);
        let manifest = entry("manifest.tpr", Kind::Regular, b"x");
        let head = [entry("./", Kind::Directory, b""), entry("pax", Kind::XHeader, b"11 path=no\n")].concat();
        let whole = [head, pages, manifest, vec![0; 10240]].concat();
        let (result, names) = receive(&whole, 1 << 20);
        result.unwrap();
        assert_eq!(names, ["manifest.tpr", "pages-0.dat"]);
        for cut in [1, 600, 2000, whole.len() - 10240 - BLOCK] {
            assert!(receive(&whole[..cut], 1 << 20).0.is_err(), "cut at {cut}");
        }
        let full = receive(&whole, 699).0.unwrap_err();
        assert!(full.to_string().contains("room for 699"), "{full}");
    }

    #[test]
    fn nothing_is_made_but_files_of_an_image() {
        use tar::EntryType as Kind;
        let manifest = entry("manifest.tpr", Kind::Regular, b"x");
        for name in ["/etc/x", "../x", "a/b", ".x", "", "x\ny", "."] {
            let (result, names) = receive(&[entry(name, Kind::Regular, b"x"), manifest.clone()].concat(), 99);
            assert!(result.is_err() && names.is_empty(), "{name}: {names:?}");
        }
        for kind in [Kind::Link, Kind::Symlink, Kind::Char, Kind::Fifo, Kind::Directory, Kind::GNULongName] {
            let (result, names) = receive(&[entry("x", kind, b""), manifest.clone()].concat(), 99);
            assert!(result.is_err() && names.is_empty(), "{kind:?}: {names:?}");
        }
        assert!(receive(&[manifest.clone(), manifest.clone()].concat(), 99).0.is_err(), "twice");
        let mut wrong = manifest.clone();
        wrong[0] ^= 1;
        assert!(receive(&wrong, 99).0.is_err(), "checksum");
        assert!(receive(b"", 99).0.is_err() && receive(&[0; 1024], 99).0.is_err(), "empty");
    }
}
