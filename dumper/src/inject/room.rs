//! Where a stopped process has room: for our pages, and for signal frames below a stack.

use torpor_kernel::ids::RemoteAddr;
use torpor_kernel::maps::Mapping;
use torpor_kernel::memory::Memory;

const PAGE: u64 = 4096;

/// A place for `length` bytes with a free page on either side, so that no area of the target merges with
/// ours; not in the way of a stack or heap that grows.
pub(super) fn hole(maps: &[Mapping], length: u64) -> Option<u64> {
    let mut best: Option<u64> = None;
    for pair in maps.windows(2) {
        let (low, high) = (&pair[0], &pair[1]);
        let grows = high.flags.has("gd") || high.path == b"[stack]";
        if low.path == b"[heap]" || grows || high.start > arch::TASK_SIZE || low.end < 1 << 16 {
            continue;
        }
        if high.start.saturating_sub(low.end) >= length + 2 * PAGE {
            best = Some(high.start - PAGE - length);
        }
    }
    // All areas side by side, or only growing ones: right below the first, if that leaves the lowest 64 KiB.
    best.or_else(|| {
        let first = maps.first()?;
        first.start.checked_sub(length + PAGE).filter(|start| *start >= 1 << 16)
    })
}

/// Memory of the target that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) at: u64,
    /// Bytes to be zero again afterwards.
    pub(super) was_zero: Option<(u64, u64)>,
}

/// Finds room for `size` bytes: below the leader's stack pointer where that lies on the process stack, which
/// the kernel grows as for a signal frame of its own. Else (the leader runs on an alternate stack, or on one
/// of its language's making) the low end of that stack, as long as nothing but zeros is there.
pub(super) fn room_on_stack(
    maps: &[Mapping],
    regs: &arch::Registers,
    size: u64,
    memory: &Memory,
) -> Option<Room> {
    let stack = maps.iter().find(|m| m.path == b"[stack]" && m.write)?;
    let top = regs.frame_top();
    if top > stack.start && top <= stack.end {
        return top.checked_sub(size).map(|at| Room { at: at & !63, was_zero: None });
    }
    let mut low = vec![0u8; size as usize];
    memory.read_exact_at(RemoteAddr(stack.start), &mut low).ok()?;
    let zero = low.iter().all(|b| *b == 0);
    zero.then_some(Room { at: stack.start, was_zero: Some((stack.start, size)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(text: &str) -> Vec<Mapping> {
        torpor_kernel::maps::parse_maps(text.as_bytes()).expect("parses")
    }

    #[test]
    fn the_hole_keeps_clear_of_heap_and_stack() {
        let maps = maps(
            "00400000-00401000 r-xp 00000000 08:01 1 /bin/x\n\
             00500000-00600000 rw-p 00000000 00:00 0 [heap]\n\
             7f0000000000-7f0000001000 r--p 00000000 08:01 2 /lib/a\n\
             7f0000100000-7f0000101000 r--p 00000000 08:01 2 /lib/b\n\
             7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 [stack]\n",
        );
        assert_eq!(hole(&maps, 0x4000), Some(0x7f00_0010_0000 - 0x5000));
        assert_eq!(hole(&maps, 1 << 30), None);
    }
}
