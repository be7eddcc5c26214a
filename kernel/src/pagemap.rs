//! Which pages of a mapping hold anything: `PAGEMAP_SCAN`, or the plain pagemap file on kernels before 6.7.
//!
//! The ioctl (Documentation/admin-guide/mm/pagemap.rst) walks page tables in the kernel and answers in ranges; a sparse
//! terabyte costs nothing. The file has eight bytes for each page whether it exists or not, so it is the
//! fallback only. Differences of the two that a caller should know:
//! - The page of zeros, which a read fault on untouched memory maps, cannot be told in the file without
//!   `CAP_SYS_ADMIN`: there such pages count as content. It costs space, not correctness. Before 6.17 the same
//!   holds for the huge page of zeros in the ioctl.
//! - A guard page (`MADV_GUARD_INSTALL`) counts as *swapped*: fs/proc/task_mmu.c takes every non-empty, non-present
//!   entry for swap. Reading it fails, so it is taken out. Kernels 6.13 and 6.14 have guards but cannot show them.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::error::check;
use crate::{Error, Pid, Result, abi};

/// Which pages to look for.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Want {
    /// In memory or swapped out, and not from a file, nor shared memory: what a private mapping holds of its own.
    Anonymous,
    /// In memory or swapped out, from a file or not.
    Present,
    /// Guard pages. None if the kernel has none or cannot show them.
    Guard,
}

/// Addresses `start` up to, not including, `end`.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

impl Range {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the kernel offers.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Ability {
    /// The ioctl, guard pages included (6.15).
    ScanWithGuard,
    /// The ioctl (6.7).
    Scan,
    /// The file.
    File,
}

/// An open pagemap.
#[derive(Debug)]
pub struct PageScan {
    file: File,
    path: String,
    ability: Ability,
}

impl PageScan {
    /// Opens the pagemap of a process and finds out what can be asked. Access as for attaching with ptrace.
    pub fn open(pid: Pid) -> Result<PageScan> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|error| Error::io("open", &path, &error))?;
        let mut scan = PageScan { file, path, ability: Ability::ScanWithGuard };
        // The categories are checked before the walk, and a walk over nothing is allowed. An unknown category is `EINVAL`,
        // an unknown ioctl `ENOTTY`.
        for ability in [Ability::ScanWithGuard, Ability::Scan] {
            scan.ability = ability;
            match scan.ioctl(&mut scan.argument(0, 0, Want::Anonymous), &mut []) {
                Ok(_) => return Ok(scan),
                Err(Error::Syscall { errno: Errno::EINVAL | Errno::ENOTTY, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        scan.ability = Ability::File;
        Ok(scan)
    }

    /// Which way is used.
    pub fn ability(&self) -> Ability {
        self.ability
    }

    /// Uses the plain file even if there is the ioctl.
    #[must_use]
    pub fn with_plain_file(mut self) -> PageScan {
        self.ability = Ability::File;
        self
    }

    /// The wanted pages between two addresses (multiples of the page size), as disjoint ranges in order, none adjacent to
    /// another. What is not mapped is not there.
    pub fn scan(&self, start: u64, end: u64, want: Want) -> Result<Vec<Range>> {
        match self.ability {
            Ability::Scan if want == Want::Guard => Ok(Vec::new()),
            Ability::File => self.read(start, end, want),
            _ => self.walk(self.argument(start, end, want)),
        }
    }

    /// What private mappings hold of their own, and guard pages: [`Want::Anonymous`] and [`Want::Guard`] in one walk.
    pub fn contents(&self, start: u64, end: u64) -> Result<(Vec<Range>, Vec<Range>)> {
        if self.ability != Ability::ScanWithGuard {
            return Ok((self.scan(start, end, Want::Anonymous)?, self.scan(start, end, Want::Guard)?));
        }
        let mut argument = self.argument(start, end, Want::Anonymous);
        argument.category_inverted &= !abi::PAGE_IS_GUARD;
        argument.category_mask &= !abi::PAGE_IS_GUARD;
        argument.return_mask = abi::PAGE_IS_GUARD;
        let (mut pages, mut guards) = (Vec::new(), Vec::new());
        self.walk_each(argument, |region| {
            let guard = region.categories & abi::PAGE_IS_GUARD != 0;
            push(if guard { &mut guards } else { &mut pages }, region.start, region.end);
        })?;
        Ok((pages, guards))
    }

    /// The pages that a private area holds of its own and that were written since the last time, or since it is watched
    /// ([`crate::write_watch`]); from now on they count as not written. `None` where the area, or a part of it, is not watched.
    ///
    /// Where there is no page nothing is protected: the mark that the kernel would leave there is taken for a page that
    /// is swapped out (fs/proc/task_mmu.c).
    pub fn take_written(&self, start: u64, end: u64) -> Result<Option<Vec<Range>>> {
        let mut argument = self.argument(start, end, Want::Anonymous);
        argument.flags = abi::PM_SCAN_WP_MATCHING | abi::PM_SCAN_CHECK_WPASYNC;
        argument.category_mask |= abi::PAGE_IS_WRITTEN;
        self.walk_watched(argument)
    }

    /// Where something was written since then, and where there is no page that could have been protected, if that shows
    /// ([`crate::write_watch::holes_show`]); nothing is forgotten. `None` as above.
    pub fn written(&self, start: u64, end: u64) -> Result<Option<Vec<Range>>> {
        // No category but this one: for that the kernel has a way of its own, several times as fast.
        self.walk_watched(abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            flags: abi::PM_SCAN_CHECK_WPASYNC,
            start,
            end,
            category_mask: abi::PAGE_IS_WRITTEN,
            return_mask: abi::PAGE_IS_WRITTEN,
            ..abi::pm_scan_arg::default()
        })
    }

    /// The pages that are there, of the area's own, and were not written since then. `None` as above.
    ///
    /// Where a page of a private mapping of a file was protected and given up (madvise(2), MADV_DONTNEED), its protection
    /// stays, and passes on to the page of the file that shows again (mm/memory.c, `zap_install_uffd_wp_if_needed`): neither
    /// counts as written.
    pub fn kept(&self, start: u64, end: u64) -> Result<Option<Vec<Range>>> {
        self.walk_watched(abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            flags: abi::PM_SCAN_CHECK_WPASYNC,
            start,
            end,
            category_inverted: abi::PAGE_IS_WRITTEN | abi::PAGE_IS_FILE,
            category_mask: abi::PAGE_IS_WRITTEN | abi::PAGE_IS_FILE | abi::PAGE_IS_PRESENT,
            return_mask: abi::PAGE_IS_PRESENT,
            ..abi::pm_scan_arg::default()
        })
    }

    /// Whether any part is watched, by whomever.
    pub fn is_watched(&self, start: u64, end: u64) -> Result<bool> {
        if self.ability == Ability::File {
            return Ok(false);
        }
        let argument = abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            start,
            end,
            category_mask: abi::PAGE_IS_WPALLOWED,
            return_mask: abi::PAGE_IS_WPALLOWED,
            max_pages: 1,
            ..abi::pm_scan_arg::default()
        };
        Ok(self.ioctl(&mut { argument }, &mut [abi::page_region::default()])? > 0)
    }

    fn walk_watched(&self, argument: abi::pm_scan_arg) -> Result<Option<Vec<Range>>> {
        if self.ability == Ability::File {
            return Ok(None);
        }
        match self.walk(argument) {
            Ok(ranges) => Ok(Some(ranges)),
            Err(e) if e.errno() == Some(Errno::EPERM) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn argument(&self, start: u64, end: u64, want: Want) -> abi::pm_scan_arg {
        // A page matches if all of `category_mask` are set, those of `category_inverted` counting as set when they are not,
        // and at least one of `category_anyof_mask`.
        let guard = if self.ability == Ability::ScanWithGuard { abi::PAGE_IS_GUARD } else { 0 };
        let (without, all, any) = match want {
            Want::Anonymous => (
                abi::PAGE_IS_FILE | abi::PAGE_IS_PFNZERO | guard,
                0,
                abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED,
            ),
            Want::Present => (abi::PAGE_IS_PFNZERO | guard, 0, abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED),
            Want::Guard => (0, guard, 0),
        };
        abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            start,
            end,
            category_inverted: without,
            category_mask: without | all,
            category_anyof_mask: any,
            // Nothing is returned per range, so that ranges are split only where the match ends.
            return_mask: 0,
            ..abi::pm_scan_arg::default()
        }
    }

    fn ioctl(&self, argument: &mut abi::pm_scan_arg, regions: &mut [abi::page_region]) -> Result<usize> {
        if !regions.is_empty() {
            argument.vec = regions.as_mut_ptr().expose_provenance() as u64;
            argument.vec_len = regions.len() as u64;
        }
        // SAFETY: `argument` is the structure of this ioctl, and its vector is `regions`, with its length.
        let got = unsafe { libc::ioctl(self.file.as_raw_fd(), abi::PAGEMAP_SCAN as _, &raw mut *argument) };
        let got = check(libc::c_long::from(got), "PAGEMAP_SCAN", &self.path)?;
        Ok(usize::try_from(got).unwrap_or(0).min(regions.len()))
    }

    fn walk(&self, whole: abi::pm_scan_arg) -> Result<Vec<Range>> {
        let mut all = Vec::new();
        self.walk_each(whole, |region| push(&mut all, region.start, region.end))?;
        Ok(all)
    }

    fn walk_each(&self, whole: abi::pm_scan_arg, mut found: impl FnMut(&abi::page_region)) -> Result<()> {
        let mut regions = vec![abi::page_region::default(); 1024];
        let (mut start, end) = (whole.start, whole.end);
        while start < end {
            let mut argument = abi::pm_scan_arg { start, ..whole };
            let got = self.ioctl(&mut argument, &mut regions)?;
            regions[..got].iter().for_each(&mut found);
            // The walk ends early when the vector is full, and `walk_end` tells where. It cannot be trusted to: the kernel
            // works in batches of 512 ranges and, when the last batch reaches the end of the walk, leaves in `walk_end`
            // where the batch before had stopped (seen on 6.18). So never back behind what was reported.
            let reported = regions[..got].last().map_or(0, |region| region.end);
            let next = argument.walk_end.max(reported);
            if next <= start {
                return Err(Error::Parse {
                    file: self.path.clone(),
                    what: "no progress of PAGEMAP_SCAN".into(),
                });
            }
            start = next;
        }
        Ok(())
    }

    fn read(&self, start: u64, end: u64, want: Want) -> Result<Vec<Range>> {
        const ENTRY: u64 = 8;
        let page = page_size();
        let mut buffer = vec![0u8; 128 * 1024];
        let mut all = Vec::new();
        let mut at = start;
        while at < end {
            let pages = ((end - at).div_ceil(page)).min(buffer.len() as u64 / ENTRY);
            let part = &mut buffer[..(pages * ENTRY) as usize];
            let got = match self.file.read_at(part, at / page * ENTRY) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                got => got.map_err(|error| Error::io("pread", &self.path, &error))?,
            };
            let (entries, _) = part[..got].as_chunks::<8>();
            if entries.is_empty() {
                // Past the end of user space.
                break;
            }
            for entry in entries {
                if matches(u64::from_ne_bytes(*entry), want) {
                    push(&mut all, at, at + page);
                }
                at += page;
            }
        }
        Ok(all)
    }
}

/// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst).
fn matches(entry: u64, want: Want) -> bool {
    let bit = |number: u32| entry & (1 << number) != 0;
    let (guard, file, swapped, present) = (bit(58), bit(61), bit(62), bit(63));
    match want {
        Want::Anonymous => (present || swapped) && !file && !guard,
        Want::Present => (present || swapped) && !guard,
        Want::Guard => guard,
    }
}

fn push(all: &mut Vec<Range>, start: u64, end: u64) {
    match all.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => all.push(Range { start, end }),
    }
}

/// Size of a page.
pub fn page_size() -> u64 {
    // SAFETY: a number in, a number out.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX lets it fail, Linux takes it from the auxiliary vector.
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Area(*mut u8, usize);
    impl Area {
        fn new(pages: usize) -> Area {
            let len = pages * page_size() as usize;
            // SAFETY: a new mapping, owned by the value returned. No huge pages, which would fill it all at one touch.
            let at = unsafe {
                let at = libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                assert_ne!(at, libc::MAP_FAILED);
                libc::madvise(at, len, libc::MADV_NOHUGEPAGE);
                at
            };
            Area(at.cast(), len)
        }
        fn start(&self) -> u64 {
            self.0.expose_provenance() as u64
        }
        fn page(&self, number: usize) -> *mut u8 {
            assert!(number * (page_size() as usize) < self.1);
            // SAFETY: asserted to be inside.
            unsafe { self.0.add(number * page_size() as usize) }
        }
        fn write(&self, number: usize) {
            // SAFETY: inside the mapping, which is writable.
            unsafe { self.page(number).write_volatile(1) };
        }
        fn scan(&self, scan: &PageScan, want: Want) -> Vec<(u64, u64)> {
            let ranges = scan.scan(self.start(), self.start() + self.1 as u64, want).unwrap();
            let page = |address: u64| (address - self.start()) / page_size();
            ranges.iter().map(|range| (page(range.start), page(range.end))).collect()
        }
    }
    impl Drop for Area {
        fn drop(&mut self) {
            // SAFETY: our own mapping, no reference into it exists.
            unsafe { libc::munmap(self.0.cast(), self.1) };
        }
    }

    fn both() -> [PageScan; 2] {
        let open = || PageScan::open(Pid::this()).unwrap();
        [open(), open().with_plain_file()]
    }

    #[test]
    fn touched_pages_are_found_and_merged() {
        let area = Area::new(64);
        for page in [3, 4, 5, 10, 63] {
            area.write(page);
        }
        for scan in both() {
            assert_eq!(
                area.scan(&scan, Want::Anonymous),
                [(3, 6), (10, 11), (63, 64)],
                "{:?}",
                scan.ability()
            );
            assert_eq!(area.scan(&scan, Want::Present), [(3, 6), (10, 11), (63, 64)]);
            assert!(area.scan(&scan, Want::Guard).is_empty());
        }
    }

    #[test]
    fn the_page_of_zeros_is_no_content() {
        let area = Area::new(8);
        // SAFETY: inside the mapping.
        unsafe { area.page(2).read_volatile() };
        area.write(3);
        let [scan, _] = both();
        if scan.ability() != Ability::File {
            assert_eq!(area.scan(&scan, Want::Anonymous), [(3, 4)]);
            assert_eq!(area.scan(&scan, Want::Present), [(3, 4)]);
        }
    }

    #[test]
    fn more_ranges_than_fit_in_one_answer() {
        let area = Area::new(6000);
        (0..6000).step_by(2).for_each(|page| area.write(page));
        for scan in both() {
            let found = area.scan(&scan, Want::Anonymous);
            assert_eq!(found.len(), 3000);
            assert_eq!(found[2999], (5998, 5999));
        }
    }

    #[test]
    fn guards_are_not_content() {
        let area = Area::new(8);
        (0..8).for_each(|page| area.write(page));
        // SAFETY: inside the mapping; nothing touches these two pages afterwards.
        let got =
            unsafe { libc::madvise(area.page(4).cast(), 2 * page_size() as usize, abi::MADV_GUARD_INSTALL) };
        if got != 0 {
            eprintln!("skipped: no MADV_GUARD_INSTALL");
            return;
        }
        for scan in both() {
            if scan.ability() == Ability::Scan {
                eprintln!("skipped: PAGEMAP_SCAN does not show guards");
                continue;
            }
            assert_eq!(area.scan(&scan, Want::Guard), [(4, 6)], "{:?}", scan.ability());
            assert_eq!(area.scan(&scan, Want::Anonymous), [(0, 4), (6, 8)]);
            let (pages, guards) = scan.contents(area.start(), area.start() + area.1 as u64).unwrap();
            assert_eq!((pages.len(), guards.len()), (2, 1));
            assert_eq!(guards[0].len(), 2 * page_size());
        }
    }

    #[test]
    fn bits() {
        let (guard, file, swapped, present) = (1u64 << 58, 1u64 << 61, 1u64 << 62, 1u64 << 63);
        assert!(matches(present | 77, Want::Anonymous) && matches(swapped, Want::Anonymous));
        assert!(!matches(present | file, Want::Anonymous) && matches(present | file, Want::Present));
        assert!(!matches(swapped | guard, Want::Present) && matches(swapped | guard, Want::Guard));
        assert!(!matches(0, Want::Present));
    }

    #[test]
    fn file_pages_are_present_not_anonymous() {
        // Our own code, which is running.
        let code = file_pages_are_present_not_anonymous as *const () as u64 / page_size() * page_size();
        for scan in both() {
            assert!(scan.scan(code, code + page_size(), Want::Anonymous).unwrap().is_empty());
            assert_eq!(scan.scan(code, code + page_size(), Want::Present).unwrap().len(), 1);
        }
    }
}
