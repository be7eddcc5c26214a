//! Where scripts lie: a place that is free in every task, and the order in which they have it.

use std::collections::BTreeMap;

use torpor_image::task::Task;
use torpor_image::{Image, InodeId};
use torpor_parasite::script::{Placed, Script};
use torpor_parasite::wire::{Context, STACK};

use super::{Options, PAGE, Phase, Planner, SHARED, Scripts, TaskPlan, scripts};
use crate::error::Result;
use crate::lineage::Lineage;
use crate::{sysv_shm, vma};

/// Where the executor and its arena lie, in this process and in every new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// From here on: the parking place of the kernel's areas comes first.
    pub(crate) park: u64,
    pub(crate) blob: u64,
    pub(crate) arena: u64,
    pub(crate) arena_length: u64,
    /// Where System V segments are attached of which a task has but parts.
    pub(crate) segments: u64,
}

/// Makes all scripts, and finds a place for them that is free in every task; none if there is no such place.
///
/// Scripts know where they lie, and so must be made for a place that has room for them, but their length does not depend
/// on the addresses in them. The place is chosen for what they take as a rule, and anew where they took more.
pub(super) fn placed(
    planner: &mut Planner<'_>,
    lineage: &Lineage,
    options: &Options,
) -> Result<Option<(Place, Scripts)>> {
    let (image, host) = (planner.image, planner.host);
    let shared: Vec<_> = image.objects.inodes.iter().filter(|i| i.is_shared_memory()).collect();
    let blob_length = (torpor_blob::BLOB.len() as u64).next_multiple_of(PAGE);
    let parking = vma::parking(host).next_multiple_of(PAGE);
    let segments_length = sysv_shm::scratch(image);
    let find = |arena_length: u64| {
        let mut lengths: Vec<u64> = shared.iter().map(|i| i.size.next_multiple_of(PAGE)).collect();
        lengths.extend((segments_length > 0).then_some(segments_length));
        lengths.push(parking + blob_length + arena_length);
        let mut places = vma::free_ranges(host, image, &lengths)?;
        let park = places.pop()?;
        let segments = if segments_length > 0 { places.pop()? } else { 0 };
        let (blob, arena) = (park + parking, park + parking + blob_length);
        let scratch: BTreeMap<InodeId, u64> = shared.iter().map(|i| i.id).zip(places).collect();
        Some((Place { park, blob, arena, arena_length, segments }, scratch))
    };
    let mut found = find(room(image)).or_else(|| find(PAGE));
    while let Some((place, scratch)) = found {
        planner.opens.clear();
        planner.feeds.clear();
        let scripts = scripts(planner, lineage, place, &scratch, options)?;
        let needed = scripts.layout().end.next_multiple_of(PAGE);
        if needed <= place.arena_length {
            return Ok(Some((place, scripts)));
        }
        found = find(needed);
    }
    Ok(None)
}

/// What the scripts of an image take as a rule, and up to twice as much: their steps are counted by what they are for.
fn room(image: &Image) -> u64 {
    let of = |task: &Task| {
        let pages = image.records(task.memory.pages);
        let bytes: u64 = pages.iter().fold(0, |sum, r| sum.saturating_add(r.length));
        let counts = [
            (1, 24 << 10),
            (task.threads.len(), 8 << 10),
            (task.memory.vmas.len() + pages.len() + task.descriptors.len(), 400),
            ((bytes >> 20) as usize, 128),
        ];
        counts.iter().fold(0u64, |sum, (count, each)| sum.saturating_add(*count as u64 * each))
    };
    let all = image.tasks.iter().map(of).fold(64 << 10, u64::saturating_add);
    all.min(1 << 30).next_multiple_of(PAGE)
}

/// Where everything lies in the arena: contexts, stacks, scripts.
pub(crate) struct Layout {
    pub(crate) stacks: u64,
    pub(crate) begin: Vec<Placed>,
    pub(crate) births: Vec<Placed>,
    pub(crate) helpers: Vec<Placed>,
    /// By task: of the phases, of the other threads, of what is done about stopped children.
    pub(crate) tasks: Vec<(Vec<Placed>, Vec<Placed>, Placed)>,
    pub(crate) end: u64,
}

/// Lays out the arena.
pub(crate) fn layout(begin: &[Phase], births: &[Script], helpers: &[Script], tasks: &[TaskPlan]) -> Layout {
    let threads: usize = tasks.iter().map(|t| t.threads.len()).sum();
    let contexts = births.len() + helpers.len() + threads;
    let stacks = SHARED + (contexts * size_of::<Context>()) as u64;
    let stacks = stacks.next_multiple_of(64);
    let mut end = stacks + contexts as u64 * STACK;
    let mut place = |script: &Script| {
        let placed = script.place(end);
        end = placed.end;
        placed
    };
    let begin = begin.iter().map(|p| place(&p.script)).collect();
    let births = births.iter().map(&mut place).collect();
    let helpers = helpers.iter().map(&mut place).collect();
    let tasks = tasks
        .iter()
        .map(|task| {
            let phases = task.phases.iter().map(|p| place(&p.script)).collect();
            let threads = task.threads.iter().map(&mut place).collect();
            (phases, threads, place(&task.stops))
        })
        .collect();
    Layout { stacks, begin, births, helpers, tasks, end }
}
