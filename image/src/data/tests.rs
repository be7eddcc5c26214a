//! Encoded data files: written, read anywhere by anyone, and damaged.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use age::secrecy::ExposeSecret;

use super::*;
use crate::chunk::{self, CHUNK, Chunk};
use crate::data_file::DataFile;
use crate::encode::Encoding;
use crate::keys::Recipients;
use crate::write::data_file_name;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit.max(1)
    }
}

/// Contents of several chunks: some compress, some do not; the last chunk is not full.
fn contents() -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let length = 5 * CHUNK + 3 * 4096;
    (0..length)
        .map(|i| if (i / CHUNK).is_multiple_of(2) { random.below(256) as u8 } else { (i / 100) as u8 })
        .collect()
}

/// A file in some encoding, and what it needs to be read.
struct Written {
    dir: tempfile::TempDir,
    stored: Stored,
    chunks: Vec<Chunk>,
    identities: Identities,
}

impl Written {
    fn new(compression: Option<Compression>, encrypted: bool, aside: bool) -> Written {
        let dir = tempfile::tempdir().unwrap();
        let identity = age::x25519::Identity::generate();
        let key = dir.path().join("key");
        fs::write(&key, identity.to_string().expose_secret()).unwrap();
        let recipients = Recipients::parse(&[identity.to_public().to_string()]).unwrap();
        let encoding = Encoding { compression, recipients: encrypted.then_some(recipients) };
        let mut file = DataFile::create(0, dir.path(), None, &encoding).unwrap();
        let contents = contents();
        let mut at = 0;
        for (i, part) in contents.chunks(31 * 4096).enumerate() {
            if aside && (i == 1 || i == 4) {
                // In memory, but for what there is no room for.
                file.keep(if i == 1 { 45 } else { 1000 } * 4096 + 7);
                file.put_aside();
            }
            assert_eq!(file.append(part).unwrap(), at);
            at += part.len() as u64;
            if i == 2 {
                file.catch_up().unwrap();
            }
        }
        let (listed, chunks) = file.finish(false).unwrap().unwrap();
        let stored = encoding.stored();
        assert_eq!(listed.name, data_file_name(0, stored));
        let bytes = fs::read(dir.path().join(&listed.name)).unwrap();
        assert_eq!((listed.size, listed.crc32c), (bytes.len() as u64, crc32c::crc32c(&bytes)));
        Written { identities: Identities::read(&[key]).unwrap(), dir, stored, chunks }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join(data_file_name(0, self.stored))
    }

    /// Opens it with a table of these bytes.
    fn open(&self, table: &[u8]) -> Result<Data> {
        let table = chunk::decode(table)?.remove(&0).unwrap_or_default();
        let (file, identities) = (File::open(self.path()).unwrap(), self.identities.clone());
        Data::chunked(file, self.path(), (0, self.stored), Arc::new(table), identities, Readers::default())
    }

    fn table(&self) -> Vec<u8> {
        self.chunks.iter().flat_map(Chunk::encode).collect()
    }
}

fn all() -> Vec<Written> {
    let codecs = [None, Some(Compression::Lz4), Some(Compression::Zstd)];
    let kinds = codecs.into_iter().flat_map(|c| [(c, false), (c, true)]).filter(|k| *k != (None, false));
    kinds.flat_map(|(c, e)| [Written::new(c, e, false), Written::new(c, e, true)]).collect()
}

#[test]
fn any_part_is_read_by_any_thread() {
    let contents = contents();
    for written in all() {
        let data = written.open(&written.table()).unwrap();
        assert!(data.as_file().is_none());
        std::thread::scope(|scope| {
            for seed in 1..5 {
                let (data, contents) = (&data, &contents);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..100 {
                        let at = random.below(contents.len());
                        let length = random.below((contents.len() - at).min(3 * CHUNK)) + 1;
                        let mut bytes = vec![0; length.min(contents.len() - at)];
                        data.read_exact_at(&mut bytes, at as u64).unwrap();
                        assert!(bytes == contents[at..at + bytes.len()], "{length} bytes at {at}");
                    }
                });
            }
        });
        let end = contents.len() as u64;
        assert_eq!(data.chunk_end(end - 1), Some(end));
        assert!(data.read_exact_at(&mut [0; 2], end - 1).is_err() && data.chunk_end(end).is_none());
        data.read_exact_at(&mut [0; 2], 0).unwrap();
    }
}

#[test]
fn damage_is_found_wherever_it_is() {
    let rounds: usize = std::env::var("FUZZ_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(10_000) / 50;
    let contents = contents();
    let mut random = Random(7);
    for written in all() {
        let good = fs::read(written.path()).unwrap();
        let table = written.table();
        for _ in 0..rounds.min(good.len()) {
            let (mut bad, mut table) = (good.clone(), table.clone());
            match random.below(4) {
                0 => bad.truncate(random.below(good.len())),
                1 => {
                    let at = random.below(good.len());
                    let end = (at + random.below(5000)).min(good.len());
                    bad[at..end].fill([0, 0xff, 0x55][random.below(3)]);
                }
                2 => bad[random.below(good.len())] ^= 1 << random.below(8),
                _ => {
                    let at = random.below(table.len());
                    table[at] ^= 1 << random.below(8);
                }
            }
            rewrite(&written.path(), &bad);
            let mut bytes = vec![0; contents.len()];
            // Either it is refused, or it was not changed where it counts.
            let read = written.open(&table).and_then(|data| data.read_exact_at(&mut bytes, 0));
            assert!(read.is_err() || bytes == contents);
        }
        rewrite(&written.path(), &good);
        written.open(&table).unwrap().check().unwrap();
    }
}

#[test]
fn what_is_kept_in_memory_is_written_when_there_is_no_more_room() {
    let contents = contents();
    for room in [0, 1, 40 * 4096, 1 << 30] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(data_file_name(0, Stored::default()));
        let mut file = DataFile::create(0, dir.path(), None, &Encoding::default()).unwrap();
        file.keep(room);
        let mut at = 0;
        for part in contents.chunks(31 * 4096) {
            assert_eq!(file.append(part).unwrap(), at);
            at += part.len() as u64;
        }
        let all = room > at;
        assert_eq!(fs::metadata(&path).unwrap().len(), if all { 0 } else { at }, "with room for {room}");
        let (listed, _) = file.finish(false).unwrap().unwrap();
        let bytes = fs::read(path).unwrap();
        assert!(bytes == contents);
        assert_eq!((listed.size, listed.crc32c), (at, crc32c::crc32c(&bytes)));
    }
}

#[test]
fn another_key_is_told_from_damage() {
    let written = Written::new(Some(Compression::Zstd), true, false);
    let other = Written::new(Some(Compression::Zstd), true, false);
    let open = |identities: &Identities| {
        let table = chunk::decode(&written.table()).unwrap().remove(&0).unwrap_or_default();
        let file = File::open(written.path()).unwrap();
        let (kind, readers) = ((0, written.stored), Readers::default());
        Data::chunked(file, written.path(), kind, Arc::new(table), identities.clone(), readers)
    };
    assert!(matches!(open(&other.identities), Err(Error::OtherKey { .. })));
    assert!(matches!(open(&Identities::default()), Err(Error::Encrypted { .. })));
    assert!(open(&written.identities).is_ok());
}

fn rewrite(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
}
