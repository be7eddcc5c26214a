//! Reading kernel text: whole files in few system calls, numbers out of bytes.
//!
//! /proc prints paths and names that the process under inspection chose, so nothing here assumes UTF-8. A
//! seq_file hands out at most its internal buffer per `read` (fs/seq_file.c: a page, unless one record is
//! larger), so reading goes on until a read returns 0, never until a short read.

use std::cell::RefCell;
use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

use crate::{Error, Result};

/// What most files fit in, and one record of any.
const BUFFER: usize = 64 << 10;

/// So little is asked for at a time where records are costly: the kernel stops adding records once it has as much, and a
/// record of up to a KiB more has room in its page. One that has none is thrown away, and made again for the next read.
const PIECE: usize = 3 << 10;

/// How a file is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Until its end.
    Whole,
    /// Its one record.
    Record,
    /// Until its end, in pieces.
    Pieces,
}

thread_local! {
    /// Memory that is there already: of a new buffer each page would be a fault.
    static TEXT: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// The whole file.
pub(crate) fn read(path: &str) -> Result<Vec<u8>> {
    with(path, <[u8]>::to_vec)
}

/// The whole of a file that is one record (fs/seq_file.c, `single_open`) or shorter than a page: it comes with the first
/// read that has room for it.
pub(crate) fn read_record(path: &str) -> Result<Vec<u8>> {
    take(path, How::Record, <[u8]>::to_vec)
}

/// What `look` says of the whole file.
pub(crate) fn with<T>(path: &str, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    take(path, How::Whole, look)
}

/// The same of a file whose records cost the kernel much: it makes each of them once.
pub(crate) fn with_costly<T>(path: &str, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    take(path, How::Pieces, look)
}

/// The same of a file of one record that is open.
pub(crate) fn with_record<T>(file: File, path: &str, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    take_open(file, path, How::Record, look)
}

fn take<T>(path: &str, how: How, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let file = File::open(path).map_err(|error| Error::io("open", path, &error))?;
    take_open(file, path, how, look)
}

fn take_open<T>(mut file: File, path: &str, how: How, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    TEXT.with_borrow_mut(|text| {
        let mut length = 0;
        loop {
            if text.len() - length < BUFFER / 2 {
                text.resize(2 * text.len(), 0);
            }
            let most = if how == How::Pieces { PIECE } else { text.len() };
            let end = text.len().min(length + most);
            match file.read(&mut text[length..end]) {
                Ok(0) => break,
                Ok(got) => length += got,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io("read", path, &error)),
            }
            if how == How::Record && end > length {
                break;
            }
        }
        let seen = look(&text[..length]);
        // One large file shall not cost its memory for ever.
        if text.len() > 16 * BUFFER {
            text.truncate(BUFFER);
            text.shrink_to_fit();
        }
        Ok(seen)
    })
}

/// The target of a symbolic link.
pub(crate) fn readlink(path: &str) -> Result<Vec<u8>> {
    let target = std::fs::read_link(path).map_err(|error| Error::io("readlink", path, &error))?;
    Ok(OsString::from(target).into_vec())
}

/// The same of a link in a directory that is open; `name` has no more than `PATH_MAX` bytes behind it.
pub(crate) fn readlink_at(dir: BorrowedFd<'_>, name: &CStr) -> std::io::Result<Vec<u8>> {
    TEXT.with_borrow_mut(|text| {
        // SAFETY: a name that ends, and a buffer of this length.
        let got =
            unsafe { libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
        usize::try_from(got).map(|got| text[..got].to_vec()).map_err(|_| std::io::Error::last_os_error())
    })
}

/// Names of a directory's entries.
pub(crate) fn list(path: &str) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| Error::io("open", path, &error))? {
        let entry = entry.map_err(|error| Error::io("getdents", path, &error))?;
        names.push(entry.file_name().into_vec());
    }
    Ok(names)
}

/// Names of a directory's entries that are numbers, in order.
pub(crate) fn list_numbers(path: &str) -> Result<Vec<i32>> {
    let mut numbers: Vec<i32> = list(path)?.iter().filter_map(|name| number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Lines without their newline; the empty piece after the last newline is no line.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    text.split(|byte| *byte == b'\n').filter(move |_| !text.is_empty())
}

/// Words between runs of blanks.
pub(crate) fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty())
}

/// `key: value` at the first colon, both trimmed.
pub(crate) fn key_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    Some((line[..colon].trim_ascii(), line[colon + 1..].trim_ascii()))
}

/// A decimal number, blanks around it allowed, of any integer type.
pub(crate) fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    std::str::from_utf8(word.trim_ascii()).ok()?.parse().ok()
}

/// A number in base 16, with or without `0x`.
pub(crate) fn hex(word: &[u8]) -> Option<u64> {
    let word = word.trim_ascii();
    radix(word.strip_prefix(b"0x").unwrap_or(word), 16)
}

/// A number in base 8; leading zeros are how the kernel marks it.
pub(crate) fn octal(word: &[u8]) -> Option<u64> {
    radix(word.trim_ascii(), 8)
}

fn radix(digits: &[u8], base: u32) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let mut value = 0u64;
    for byte in digits {
        let digit = char::from(*byte).to_digit(base)?;
        value = value.checked_mul(u64::from(base))?.checked_add(u64::from(digit))?;
    }
    Some(value)
}

/// `major:minor`, both in the given base.
pub(crate) fn device(word: &[u8], base: u32) -> Option<(u32, u32)> {
    let colon = word.iter().position(|byte| *byte == b':')?;
    let part = |digits: &[u8]| radix(digits, base).and_then(|value| u32::try_from(value).ok());
    Some((part(&word[..colon])?, part(&word[colon + 1..])?))
}

/// Undoes `mangle_path` (fs/seq_file.c): a byte out of `escaped` stands as a backslash and three octal digits.
///
/// Only the bytes that the file at hand escapes are undone: where the backslash itself is not among them (maps), a
/// name that contains the four characters `\040` is printed as it is and must stay so.
pub(crate) fn unescape(name: &[u8], escaped: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\'
            && let Some(digits) = tail.get(..3)
            && let Some(value) = radix(digits, 8).and_then(|value| u8::try_from(value).ok())
            && escaped.contains(&value)
        {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number::<i32>(b" -7 "), Some(-7));
        assert_eq!(number::<u32>(b"-7"), None);
        assert_eq!(number::<u32>(b"\xff"), None);
        assert_eq!(hex(b"0x1F"), Some(31));
        assert_eq!(hex(b"10000000000000000"), None);
        assert_eq!(hex(b""), None);
        assert_eq!(octal(b"02000002"), Some(0o2_000_002));
        assert_eq!(octal(b"8"), None);
        assert_eq!(device(b"fe:01", 16), Some((254, 1)));
        assert_eq!(device(b"254", 10), None);
    }

    #[test]
    fn unescapes_only_what_the_file_escapes() {
        assert_eq!(unescape(br"/a\012b\040\z\", b"\n"), b"/a\nb\\040\\z\\");
        assert_eq!(unescape(br"/a\040b\134\777\01", b" \t\n\\"), b"/a b\\\\777\\01");
    }

    #[test]
    fn splits() {
        assert_eq!(lines(b"").count(), 0);
        assert_eq!(lines(b"a\n\nb\n").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
        assert_eq!(words(b" a \t b").collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(key_value(b"Uid:\t0 1 "), Some((&b"Uid"[..], &b"0 1"[..])));
    }
}
