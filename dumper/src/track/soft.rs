//! Following writes by soft-dirty bits, where the kernel has no asynchronous write protection (before 6.7).
//!
//! The bits ([`torpor_kernel::soft_dirty`]) belong to the address space: nothing of ours lies in the process, and anybody
//! may clear them, CRIU or another torpor, without a trace. So what is known of a page must be proved:
//! - Bits are read and cleared, and what was written is copied, all while the tree stands. Nothing is copied before: a page
//!   may be moved away and back again, or be given up and read as zeros, and show in the end as it was when the bits were
//!   cleared, bit and frame, but other contents would have been copied in between.
//! - A page is what it was if its bit is clear and it is in the frame in which it was when the bits were cleared. Where any
//!   page of 2 MiB has a clear bit in another frame, none of them is: a page table that was moved there (mremap) shows no
//!   bits, and for such a page to be taken for another the kernel would have had to move a page into exactly the frame
//!   of the one that was there before, and have left all its neighbours in theirs as well. The page of zeros is no such
//!   page, and always written again, which takes no space.
//! - A *guard* tells whether somebody has cleared the bits since: a page of a read-only area that holds contents of its
//!   own (relocations, which ld.so has write-protected) is written to, the byte that is there, so that its bit is set and stays
//!   so, as the program cannot write there. If it is clear, or in another frame, everything counts as changed, and so it
//!   does when no such page is to be found. Each takes a page for it that is clear before, so that the guard of
//!   somebody else goes out with the bits that he waits for.
//! - Where pages of equal contents are made one (ksm, `MADV_MERGEABLE`) bits get lost and frames come back: such areas count as changed.
//! - Another program in the same process (execve) has other random bytes (`AT_RANDOM`, getauxval(3)).
//!
//! All that outlives a dump in `torpor-track`, as the userfaultfds do: where it was killed, everything counts as changed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use torpor_image::vma::Vma;
use torpor_kernel::ids::{Pid, RemoteAddr};
use torpor_kernel::memory::Memory;
use torpor_kernel::soft_dirty::{self, Frames, Look, SoftDirty};
use torpor_kernel::{Result, process};

use super::rounds;
use super::runs::{self, Runs};
use crate::workers;

/// What one entry of a page table's parent spans.
const TABLE: u64 = 2 << 20;
/// Addresses that one thread looks at at a time.
const PART: u64 = 256 << 20;
/// getauxval(3)
const AT_RANDOM: u64 = 25;
/// First word of what is kept.
const MAGIC: u64 = u64::from_le_bytes(*b"torpor-1");
/// Words before the frames.
const HEAD: usize = 6;
/// More than this is not taken from anybody: frames of 64 GiB without two side by side.
const MOST_BYTES: u64 = 512 << 20;

/// A private area: first address, the one after the last, and whether the program can write there.
pub(crate) type Area = (u64, u64, bool);

/// The page that tells whether somebody else has cleared the bits.
#[derive(Clone, Copy, Debug)]
struct Guard {
    address: u64,
    frame: u64,
}

/// What was there when the bits of a process were cleared.
#[derive(Debug)]
struct Known {
    program: [u64; 2],
    guard: Guard,
    frames: Vec<Frames>,
}

/// A process that is followed by its bits.
#[derive(Debug, Default)]
pub(crate) struct Soft(Mutex<Option<Known>>);

impl Soft {
    /// Finds out which pages were not written since the last time, and begins anew. The process must stand. After an error
    /// nothing is known.
    pub(crate) fn take(&self, pid: Pid, vmas: &[Vma]) -> Result<Runs> {
        let writes = |v: &Vma| v.protection & libc::PROT_WRITE as u32 != 0;
        let followed = vmas.iter().filter(|v| v.private() && !v.advice.contains(&libc::MADV_MERGEABLE));
        let areas: Vec<Area> = followed.map(|v| (v.start, v.end, writes(v))).collect();
        // Memory that is another's is looked at there.
        if areas.is_empty() {
            return Ok(Runs::new());
        }
        let mut known = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = known.take();
        let bits = SoftDirty::open(pid)?;
        let found = look(&bits, &areas)?;
        let program = program(pid)?;
        // Looked at after the bits: if they were cleared before these were read, it shows.
        let before = before.filter(|b| b.program == program && holds(&bits, b.guard));
        let unchanged = before.as_ref().map(|b| unchanged(&b.frames, &found.clean)).unwrap_or_default();
        let chosen = choose(before.map(|b| b.guard), &found, &areas);
        bits.clear()?;
        if let Some(chosen) = chosen
            && let Some(guard) = post(&bits, pid, chosen)?
        {
            *known = Some(Known { program, guard, frames: found.frames });
        }
        Ok(unchanged)
    }

    /// How many bytes of a running process are likely to be changed.
    pub(super) fn left(&self, pid: Pid) -> u64 {
        let known = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let found =
            SoftDirty::open(pid).ok().zip(areas(pid)).and_then(|(bits, areas)| look(&bits, &areas).ok());
        let Some(found) = found else { return 0 };
        let frames = known.as_ref().map_or(&[][..], |k| &k.frames);
        let unchanged: u64 = unchanged(frames, &found.clean).iter().map(|(start, end)| end - start).sum();
        found.pages.saturating_sub(unchanged)
    }

    /// Puts it into a file in memory that others can be given; none if nothing is known.
    pub(super) fn put_away(self) -> Option<OwnedFd> {
        let known = self.0.into_inner().ok()??;
        let Guard { address, frame } = known.guard;
        let head = [MAGIC, known.program[0], known.program[1], address, frame, known.frames.len() as u64];
        let words = head.into_iter().chain(known.frames.iter().flat_map(|f| [f.start, f.end, f.first]));
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        // SAFETY: takes a name and flags, gives a descriptor of ours.
        let mut file = unsafe {
            let fd = libc::memfd_create(c"torpor-track".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return None;
            }
            File::from(OwnedFd::from_raw_fd(fd))
        };
        file.write_all(&bytes).ok()?;
        Some(file.into())
    }

    /// Takes it from such a file; nothing is known if that makes no sense.
    pub(super) fn taken_up(fd: OwnedFd) -> Self {
        Soft(Mutex::new(parse(&read(fd).unwrap_or_default())))
    }
}

fn read(fd: OwnedFd) -> std::io::Result<Vec<u8>> {
    let mut file = File::from(fd);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Option<Known> {
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w)).collect();
    let (head, rest) = words.split_at_checked(HEAD)?;
    if head[0] != MAGIC || usize::try_from(head[5]).ok()?.checked_mul(3)? != rest.len() {
        return None;
    }
    let frames: Vec<Frames> = rest
        .as_chunks::<3>()
        .0
        .iter()
        .map(|[start, end, first]| Frames { start: *start, end: *end, first: *first })
        .collect();
    let ordered = frames.iter().all(|f| f.start < f.end && f.first.checked_add(f.end - f.start).is_some())
        && frames.windows(2).all(|w| w[0].end <= w[1].start);
    ordered.then_some(Known {
        program: [head[1], head[2]],
        guard: Guard { address: head[3], frame: head[4] },
        frames,
    })
}

/// The areas of a process that can be followed.
fn areas(pid: Pid) -> Option<Vec<Area>> {
    let maps = torpor_kernel::maps::maps(pid).ok()?;
    Some(maps.iter().filter(|m| rounds::watchable(m)).map(|m| (m.start, m.end, m.write)).collect())
}

fn look(bits: &SoftDirty, areas: &[Area]) -> Result<Look> {
    let mut parts = Vec::new();
    for &(start, end, _) in areas {
        let starts = (start..end).step_by(PART as usize);
        parts.extend(starts.map(|at| (at, end.min(at + PART))));
    }
    // A thread is worth more than a small space takes.
    let small = areas.iter().map(|(start, end, _)| end - start).sum::<u64>() < PART;
    let part = |(start, end): &(u64, u64)| bits.look(*start, *end);
    let looks: Vec<_> = if small { parts.iter().map(part).collect() } else { workers::each_of(&parts, part) };
    let mut all = Look::default();
    for found in looks {
        all.append(found?);
    }
    Ok(all)
}

/// Pages that are what they were.
fn unchanged(before: &[Frames], clean: &[Frames]) -> Runs {
    let same = soft_dirty::same(before, clean);
    let clean = runs::tidy(clean.iter().map(|f| (f.start, f.end)).collect());
    let strange = runs::without(&clean, &same);
    let tables = strange.iter().map(|(start, end)| (start / TABLE * TABLE, end.next_multiple_of(TABLE)));
    runs::without(&same, &runs::tidy(tables.collect()))
}

/// What tells one program from the next in the same process.
fn program(pid: Pid) -> Result<[u64; 2]> {
    let auxv = process::auxv(pid)?;
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |w| u64::from_ne_bytes(*w));
    let at = auxv.chunks_exact(16).find(|pair| word(pair) == AT_RANDOM).map_or(0, |pair| word(&pair[8..]));
    let memory = Memory::open(pid, false)?;
    Ok([memory.read_u64(RemoteAddr(at))?, memory.read_u64(RemoteAddr(at + 8))?])
}

fn holds(bits: &SoftDirty, guard: Guard) -> bool {
    bits.entry(guard.address).is_ok_and(|e| e.soft_dirty() && e.frame() == Some(guard.frame))
}

/// A page to stand guard: the one that did, or one that is not the guard of somebody else, as it would be dirty. Unless
/// everything is: then nobody has cleared anything yet.
fn choose(own: Option<Guard>, found: &Look, areas: &[Area]) -> Option<u64> {
    if let Some(own) = own {
        return Some(own.address);
    }
    let closed = areas.iter().filter(|(_, _, writes)| !writes).map(|(start, end, _)| (*start, *end));
    let of = if found.clean.is_empty() { &found.frames } else { &found.clean };
    let pages = runs::tidy(of.iter().map(|f| (f.start, f.end)).collect());
    let page = torpor_kernel::pagemap::page_size();
    let all: Vec<u64> = runs::both(&pages, &runs::tidy(closed.collect()))
        .into_iter()
        .flat_map(|(start, end)| (start..end).step_by(page as usize))
        .collect();
    // Any of them: two that follow a process without knowing of each other had better not choose the same.
    let some = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos() as usize / 100);
    all.get(some.checked_rem(all.len())?).copied()
}

/// Sets the bit of a page by writing the byte that is there; none if that does not do it.
fn post(bits: &SoftDirty, pid: Pid, address: u64) -> Result<Option<Guard>> {
    let memory = Memory::open(pid, true)?;
    let mut byte = [0];
    memory.read_exact_at(RemoteAddr(address), &mut byte)?;
    memory.write_all_at(RemoteAddr(address), &byte)?;
    let entry = bits.entry(address)?;
    Ok(entry.frame().filter(|_| entry.soft_dirty()).map(|frame| Guard { address, frame }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strange_page_spoils_its_table() {
        let frames = |start, end, first| Frames { start, end, first };
        let before = [frames(0, TABLE, 1000), frames(TABLE, 2 * TABLE, 5000)];
        // One page of the first table is in another frame; a part of the second was written.
        let clean = [
            frames(0, 8192, 1000),
            frames(8192, 12288, 77),
            frames(12288, TABLE, 1003),
            frames(TABLE, TABLE + 4096, 5000),
        ];
        assert_eq!(unchanged(&before, &clean), [(TABLE, TABLE + 4096)]);
    }

    #[test]
    fn what_was_put_away_is_taken_up() {
        let frames = vec![Frames { start: 4096, end: 8192, first: 9 }];
        let known = Known { program: [1, 2], guard: Guard { address: 3, frame: 4 }, frames };
        let fd = Soft(Mutex::new(Some(known))).put_away().unwrap();
        let known = Soft::taken_up(fd).0.into_inner().unwrap().unwrap();
        assert_eq!((known.program, known.guard.address, known.guard.frame), ([1, 2], 3, 4));
        assert_eq!(known.frames, [Frames { start: 4096, end: 8192, first: 9 }]);
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        for wrong in [vec![], words(&[MAGIC, 0, 0, 0, 0, 1]), words(&[MAGIC, 0, 0, 0, 0, 1, 8, 4, 0])] {
            assert!(parse(&wrong).is_none());
        }
    }
}
