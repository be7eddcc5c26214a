//! Records and the bytes that they are of, on their way into a data file.

use torpor_image::extent::{PAGE, Record, Where};
use torpor_image::write::DataFile;

use crate::error::Result;

/// Appends `bytes`, which belong at `address`, to the file, leaving out pages of zeros.
pub(super) fn store(
    records: &mut Vec<Record>,
    address: u64,
    bytes: &[u8],
    file: &mut DataFile,
) -> Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let zero = is_zero(&bytes[at..bytes.len().min(at + PAGE as usize)]);
        let mut end = at;
        while end < bytes.len() && is_zero(&bytes[end..bytes.len().min(end + PAGE as usize)]) == zero {
            end += PAGE as usize;
        }
        let end = end.min(bytes.len());
        let offset = if zero { 0 } else { file.append(&bytes[at..end])? };
        let record = Record {
            address: address + at as u64,
            length: ((end - at) as u64).next_multiple_of(PAGE),
            place: if zero { Where::Zero } else { Where::Data },
            file: if zero { 0 } else { file.number() },
            offset,
        };
        push(records, record);
        at = end;
    }
    Ok(())
}

/// The same for pieces of whole pages, `bytes` being one behind the other: what lies side by side is written at once.
pub(super) fn store_pieces(
    records: &mut Vec<Record>,
    pieces: impl Iterator<Item = (u64, u64)>,
    bytes: &[u8],
    file: &mut DataFile,
) -> Result<()> {
    let page = PAGE as usize;
    let mut addresses = pieces.flat_map(|(start, end)| (start..end).step_by(page));
    let mut at = 0;
    while at < bytes.len() {
        let zero = is_zero(&bytes[at..at + page]);
        let mut end = at + page;
        while end < bytes.len() && is_zero(&bytes[end..end + page]) == zero {
            end += page;
        }
        let offset = if zero { 0 } else { file.append(&bytes[at..end])? };
        for (i, address) in addresses.by_ref().take((end - at) / page).enumerate() {
            push(
                records,
                Record {
                    address,
                    length: PAGE,
                    place: if zero { Where::Zero } else { Where::Data },
                    file: if zero { 0 } else { file.number() },
                    offset: if zero { 0 } else { offset + i as u64 * PAGE },
                },
            );
        }
        at = end;
    }
    Ok(())
}

/// Adds a record, or lengthens the last one that it continues.
pub(super) fn push(records: &mut Vec<Record>, record: Record) {
    if let Some(last) = records.last_mut() {
        let follows = last.address + last.length == record.address && last.place == record.place;
        let beside = last.file == record.file && last.offset + last.length == record.offset;
        if follows && (record.place != Where::Data || beside) {
            last.length += record.length;
            return;
        }
    }
    records.push(record);
}

/// Whether a page is all zeros; on other pages the answer comes with the first words.
fn is_zero(page: &[u8]) -> bool {
    let (head, words, tail) = {
        // SAFETY: every bit pattern is a valid u128.
        unsafe { page.align_to::<u128>() }
    };
    words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0)
}

/// Adds the parts of sorted `records` that lie in a range.
pub(crate) fn slice(records: &[Record], start: u64, end: u64, to: &mut Vec<Record>) {
    let first = records.partition_point(|r| r.address + r.length <= start);
    for record in records[first..].iter().take_while(|r| r.address < end) {
        let address = record.address.max(start);
        let length = (record.address + record.length).min(end) - address;
        let offset = if record.place == Where::Data {
            record.offset + (address - record.address)
        } else {
            record.offset
        };
        to.push(Record { address, length, offset, ..*record });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_seen_wherever_they_end() {
        let mut page = vec![0u8; PAGE as usize];
        assert!(is_zero(&page));
        page[4095] = 1;
        assert!(!is_zero(&page));
        assert!(is_zero(&page[..100]));
    }
}
