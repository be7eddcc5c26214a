//! Copying memory of processes that run: what is read may be half of one instant and half of another, and is copied
//! again if it was written meanwhile ([`crate::track`]).

use torpor_image::extent::Record;
use torpor_image::write::DataFile;
use torpor_kernel::ids::Pid;

use super::reader::{Reader, batches};
use super::store::store_pieces;
use super::{Behind, CHUNK, Run, Watch, split, writers};
use crate::error::Result;
use crate::track::runs::Runs;
use crate::workers;

/// What of a running process is to be copied, and the code that its areas show by themselves.
pub(crate) struct Wanted {
    pub(crate) pid: Pid,
    pub(crate) runs: Runs,
    pub(crate) behind: Behind,
}

/// Copies runs of processes, as far as they can be read, by several writers; gives what was copied of each, in order.
pub(crate) fn copy_live(
    wanted: &[Wanted],
    files: &mut [DataFile],
    watch: &Watch<'_>,
) -> Result<Vec<Vec<Record>>> {
    let of = |(space, wanted): (usize, &Wanted)| {
        wanted
            .runs
            .iter()
            .map(move |(start, end)| Run { space, start: *start, end: *end })
            .collect::<Vec<_>>()
    };
    let runs: Vec<Run> = wanted.iter().enumerate().flat_map(of).collect();
    let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
    let writers = writers(bytes).min(files.len() as u64).max(1);
    let shares = split(&runs, bytes.div_ceil(writers).next_multiple_of(torpor_image::extent::PAGE));
    let mut all = vec![Vec::new(); wanted.len()];
    for copied in
        workers::all(shares.iter().zip(files), |(share, file)| copy_share(wanted, share, file, watch))
    {
        for (space, records) in copied? {
            all[space].extend(records);
        }
    }
    Ok(all)
}

fn copy_share(
    wanted: &[Wanted],
    share: &[Run],
    file: &mut DataFile,
    watch: &Watch<'_>,
) -> Result<Vec<(usize, Vec<Record>)>> {
    let mut all = Vec::new();
    let mut buffer = vec![0u8; CHUNK as usize];
    for runs in share.chunk_by(|a, b| a.space == b.space) {
        let space = runs[0].space;
        // It may have ended.
        let Ok(reader) = Reader::open(wanted[space].pid, &[]) else { continue };
        let behind = &wanted[space].behind;
        let mut records = Vec::new();
        for batch in batches(runs) {
            if let [run] = batch {
                let mut at = run.start;
                while at < run.end {
                    let length = (run.end - at).min(CHUNK);
                    let bytes = &mut buffer[..length as usize];
                    // What is not there any more is not needed either.
                    if reader.read(at, bytes).is_ok() {
                        behind.store(&mut records, at, bytes, file)?;
                    }
                    watch.copied(reader.pid, length)?;
                    at += length;
                }
                continue;
            }
            let length: u64 = batch.iter().map(|r| r.end - r.start).sum();
            let bytes = &mut buffer[..length as usize];
            let read = reader.read_runs(batch, bytes, true).is_ok();
            if read && batch.iter().any(|r| behind.is_within(r.start, r.end)) {
                let mut rest = &*bytes;
                for run in batch {
                    let (own, after) = rest.split_at((run.end - run.start) as usize);
                    behind.store(&mut records, run.start, own, file)?;
                    rest = after;
                }
            } else if read {
                store_pieces(&mut records, batch.iter().map(|r| (r.start, r.end)), bytes, file)?;
            }
            watch.copied(reader.pid, length)?;
        }
        all.push((space, records));
    }
    Ok(all)
}
