//! What processes share without being threads of one: memory, descriptor table, directories, signal actions
//! (clone(2)).

use std::cmp::Ordering;

use torpor_image::Pid as ImagePid;
use torpor_image::task::Shares;
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::Pid;

use crate::error::{Error, Result};
use crate::freeze::Frozen;

/// For each process what it shares with one that stands before it.
pub(crate) fn collect(processes: &[Frozen]) -> Result<Vec<Shares>> {
    let of = |kind| first_with_same(processes, kind);
    let (memory, descriptors, directories) = (of(KcmpType::Vm)?, of(KcmpType::Files)?, of(KcmpType::Fs)?);
    // Signal actions can be shared only where memory is (clone(2)).
    let any = memory.iter().any(Option::is_some);
    let actions = if any { of(KcmpType::Sighand)? } else { vec![None; processes.len()] };
    Ok((0..processes.len())
        .map(|i| Shares {
            memory: memory[i],
            descriptors: descriptors[i],
            directories: directories[i],
            signal_actions: actions[i],
        })
        .collect())
}

/// For each process the first before it with the same object. kcmp gives an order, so that each is found by
/// bisection (kcmp(2)).
fn first_with_same(processes: &[Frozen], kind: KcmpType) -> Result<Vec<Option<ImagePid>>> {
    let mut sorted: Vec<(Pid, ImagePid)> = Vec::with_capacity(processes.len());
    let mut all = Vec::with_capacity(processes.len());
    for process in processes {
        let (pid, id) = (process.living(), ImagePid(process.pid().0));
        let (mut low, mut high) = (0, sorted.len());
        let mut same = None;
        while low < high {
            let middle = (low + high) / 2;
            let order = fds::kcmp(sorted[middle].0, pid, kind, 0, 0);
            match order.map_err(Error::kernel(pid, "comparing it with others"))? {
                Ordering::Equal => {
                    same = Some(sorted[middle].1);
                    break;
                }
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        if same.is_none() {
            sorted.insert(low, (pid, id));
        }
        all.push(same);
    }
    Ok(all)
}
