//! Several hands for the memory of one big process.
//!
//! One thread reads a GiB into new pages in 400 ms, two in 200 (docs/performance.md): most of it is the kernel making
//! pages. So a process with much memory makes helpers that have the same memory (clone(2), `CLONE_VM`), each of which reads its
//! share by a script of its own, and waits for their end. They are processes and not threads, as a thread would
//! stay a member of the process until its tracer has taken note of its end.

use torpor_image::Image;
use torpor_image::extent::Where;
use torpor_image::task::Task;
use torpor_parasite::call;
use torpor_parasite::script::{OpId, Script, Value};
use torpor_parasite::wire::STACK;

use crate::birth::{self, word};
use crate::memory::Piece;
use crate::plan::Planner;
use crate::thread::CLONE_ARGS;

/// Memory that is worth helpers.
const MUCH: u64 = 32 << 20;
/// Beyond this they wait for each other in the kernel.
const MOST: usize = 8;

/// One that helps a task.
#[derive(Clone, Debug)]
pub(crate) struct Hand {
    pub(crate) task: usize,
    /// The last it does before it ends.
    pub(crate) through: OpId,
}

/// All helpers of a restore, and how many each big task may have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Crew {
    pub(crate) hands: Vec<Hand>,
    pub(crate) scripts: Vec<Script>,
    /// Context of the first.
    first: u32,
    each: usize,
    /// How many tasks have some.
    teams: u32,
    /// The task whose memory is being planned, if it may have helpers.
    pub(crate) task: Option<usize>,
}

impl Crew {
    /// As many as there are processors for, with contexts from `first` on.
    pub(crate) fn of(image: &Image, processors: usize, first: u32) -> Self {
        let much = |t: &&Task| {
            let records = image.records(t.memory.pages).iter().filter(|r| r.place == Where::Data);
            t.shares.memory.is_none() && records.map(|r| r.length).fold(0, u64::saturating_add) >= MUCH
        };
        let big = image.tasks.iter().filter(much).count().max(1);
        const { assert!(word::READ as u64 + (MOST as u64) / 2 <= crate::plan::SHARED / 4) };
        Crew { first, each: (processors.min(MOST) / big).max(1), ..Crew::default() }
    }
}

/// Plans these reads, shared out where that is worth it.
///
/// Huge pages are made by the task alone, as that takes the lock of its memory for all (mm/khugepaged.c,
/// `collapse_huge_page`): several that make them wait for each other most of the time. Helpers read behind it.
pub(crate) fn read(script: &mut Script, planner: &mut Planner<'_>, task: &Task, work: Vec<Piece>) {
    let total: u64 = work.iter().map(|p| p.stop - p.at).sum();
    // What must be decoded is fed to the task alone, in its order.
    let raw = work.iter().all(|p| planner.image.is_raw(p.file));
    let hands = if total >= MUCH && raw { planner.crew.each } else { 1 };
    let Some(index) = planner.crew.task.filter(|_| hands > 1) else {
        return do_all(script, planner, &work);
    };
    let made = word::READ + planner.crew.teams;
    planner.crew.teams += 1;
    let (whole, small): (Vec<Piece>, Vec<Piece>) = work.into_iter().partition(|p| p.whole);
    // With one helper the task has time to read some as well: making pages takes a little less than reading.
    let others = if hands == 2 { whole.len() - whole.len() / 12 } else { whole.len() };
    let mut shares = share(small, hands).into_iter();
    let own = shares.next().unwrap_or_default();
    let mut spawned = Vec::new();
    for (n, share) in shares.enumerate() {
        let mut hand = Script::new();
        birth::die_with_parent(&mut hand, Some(task.pid.0));
        for (i, piece) in whole[..others].iter().enumerate().skip(n).step_by(hands - 1) {
            hand.wait("huge pages being there", made, i as u32 + 1);
            piece.read(&mut hand, planner);
        }
        do_all(&mut hand, planner, &share);
        let through = call!(hand, "being through", libc::SYS_getpid);
        call!(hand, "ending", libc::SYS_exit_group, 0);
        let context = planner.crew.first + planner.crew.hands.len() as u32;
        planner.crew.hands.push(Hand { task: index, through });
        planner.crew.scripts.push(hand);
        let mut args = [0u64; CLONE_ARGS / 8];
        args[0] = (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS) as u64;
        let args = script.words(&args);
        spawned.push(script.spawn("a helper that reads memory", args, context, STACK, None));
    }
    for piece in &whole {
        piece.make(script);
        script.wake("huge pages being there", made);
    }
    for piece in &whole[others..] {
        piece.read(script, planner);
    }
    do_all(script, planner, &own);
    for hand in spawned {
        let args = [Value::Result(hand), 0.into(), libc::__WALL.into(), 0.into()];
        script.call("the end of a helper that reads memory", libc::SYS_wait4, &args);
    }
}

fn do_all(script: &mut Script, planner: &mut Planner<'_>, work: &[Piece]) {
    for piece in work {
        piece.make(script);
        piece.read(script, planner);
    }
}

/// As many shares of about the same size.
fn share(work: Vec<Piece>, hands: usize) -> Vec<Vec<Piece>> {
    let size = work.iter().map(|p| p.stop - p.at).sum::<u64>().div_ceil(hands as u64).max(1);
    let mut all = vec![Vec::new(); hands];
    let mut before = 0;
    for piece in work {
        all[(before / size) as usize].push(piece);
        before += piece.stop - piece.at;
    }
    all
}

#[cfg(test)]
mod tests {
    use torpor_image::extent::Record;

    use super::*;
    use crate::memory;

    #[test]
    fn pieces_are_as_many_wherever_they_are_put_first() {
        let record = Record { address: 0x7000, length: 3 << 20, place: Where::Data, file: 1, offset: 0 };
        let count = |shift| memory::pieces(&record, shift, false).len();
        assert!([0x1000, 0x7_f000, 0x1234_5000].into_iter().all(|shift| count(shift) == count(0)));
    }

    #[test]
    fn shares_are_even_and_whole() {
        let record =
            |address, length| Record { address, length, place: Where::Data, file: 1, offset: address };
        let records = [record(0x7000, 3 << 20), record(1 << 30, 64 << 20), record(1 << 40, 4096)];
        let work: Vec<Piece> = records.iter().flat_map(|r| memory::pieces(r, 0, false)).collect();
        let all = share(work.clone(), 4);
        let bytes = |share: &[Piece]| share.iter().map(|p| p.stop - p.at).sum::<u64>();
        assert!(all.iter().all(|s| bytes(s) > 16 << 20 && bytes(s) < 18 << 20));
        assert_eq!(all.concat(), work);
        assert_eq!(share(Vec::new(), 3).len(), 3);
    }
}
