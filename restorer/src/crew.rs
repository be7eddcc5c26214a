//! Several hands for the memory of one big process.
//!
//! One thread reads a GiB into new pages in 400 ms, two in 200 (docs/performance.md): most of it is the kernel making
//! pages. So a process with much memory makes helpers that have the same memory (clone(2), `CLONE_VM`), each of which reads its
//! share by a script of its own, and waits for their end. They are processes and not threads, as a thread would
//! stay a member of the process until its tracer has taken note of its end.

use torpor_image::Image;
use torpor_image::extent::{Record, Where};
use torpor_image::task::Task;
use torpor_parasite::call;
use torpor_parasite::script::{OpId, Script, Value};
use torpor_parasite::wire::STACK;

use crate::birth;
use crate::memory::{self, HUGE};
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
        Crew { first, each: (processors.min(MOST) / big).max(1), ..Crew::default() }
    }
}

/// What is read, and whether by huge pages.
pub(crate) type Work = (Record, bool);

/// Plans these reads, shared out where that is worth it.
pub(crate) fn read(script: &mut Script, planner: &mut Planner<'_>, task: &Task, work: Vec<Work>) {
    let total: u64 = work.iter().map(|(r, _)| r.length).sum();
    let hands = if total >= MUCH { planner.crew.each } else { 1 };
    let Some(index) = planner.crew.task.filter(|_| hands > 1) else {
        return do_all(script, planner, &work);
    };
    let mut shares = share(work, hands).into_iter();
    let own = shares.next().unwrap_or_default();
    let mut made = Vec::new();
    for share in shares {
        let mut hand = Script::new();
        birth::die_with_parent(&mut hand, Some(task.pid.0));
        do_all(&mut hand, planner, &share);
        let through = call!(hand, "being through", libc::SYS_getpid);
        call!(hand, "ending", libc::SYS_exit_group, 0);
        let context = planner.crew.first + planner.crew.hands.len() as u32;
        planner.crew.hands.push(Hand { task: index, through });
        planner.crew.scripts.push(hand);
        let mut args = [0u64; CLONE_ARGS / 8];
        args[0] = (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS) as u64;
        let args = script.words(&args);
        made.push(script.spawn("a helper that reads memory", args, context, STACK, None));
    }
    do_all(script, planner, &own);
    for hand in made {
        let args = [Value::Result(hand), 0.into(), libc::__WALL.into(), 0.into()];
        script.call("the end of a helper that reads memory", libc::SYS_wait4, &args);
    }
}

fn do_all(script: &mut Script, planner: &mut Planner<'_>, work: &[Work]) {
    for (record, huge) in work {
        memory::read(script, planner, std::slice::from_ref(record), 0, *huge);
    }
}

/// Shares of about the same size, cut where huge pages begin.
fn share(work: Vec<Work>, hands: usize) -> Vec<Vec<Work>> {
    let total: u64 = work.iter().map(|(r, _)| r.length).sum();
    let size = total.div_ceil(hands as u64);
    let mut all = vec![Vec::new()];
    let mut room = size;
    for (mut record, huge) in work {
        while all.len() < hands && record.length >= room {
            let cut = (record.address + room).next_multiple_of(HUGE) - record.address;
            if cut >= record.length {
                break;
            }
            let last = all.len() - 1;
            all[last].push((Record { length: cut, ..record }, huge));
            let (address, offset) = (record.address + cut, record.offset + cut);
            record = Record { address, offset, length: record.length - cut, ..record };
            all.push(Vec::new());
            room = size;
        }
        room = room.saturating_sub(record.length);
        let last = all.len() - 1;
        all[last].push((record, huge));
        if room == 0 && all.len() < hands {
            all.push(Vec::new());
            room = size;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_whole() {
        let record =
            |address, length| Record { address, length, place: Where::Data, file: 1, offset: address };
        let work = vec![
            (record(0, 3 << 20), true),
            (record(HUGE * 8, 64 << 20), true),
            (record(1 << 40, 4096), false),
        ];
        let all = share(work.clone(), 4);
        assert_eq!(all.len(), 4);
        let bytes = |share: &[Work]| share.iter().map(|(r, _)| r.length).sum::<u64>();
        assert!(all.iter().all(|s| bytes(s) > 14 << 20 && bytes(s) < 19 << 20));
        assert_eq!(all.iter().map(|s| bytes(s)).sum::<u64>(), bytes(&work));
        assert!(all.iter().flatten().all(|(r, _)| r.offset == r.address));
        assert!(all[1..].iter().all(|s| s[0].0.address.is_multiple_of(HUGE)));
        assert_eq!(share(work.clone(), 1), [work]);
    }
}
