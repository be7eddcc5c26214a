//! Planning epoll sets: the set is made outside, its entries are added by the task under its own numbers.

use std::collections::BTreeMap;

use torpor_image::description::Kind;
use torpor_image::epoll::{Epoll, EpollTarget};
use torpor_image::task::Task;
use torpor_image::{DescriptionId, Image};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::description::{self, Numbers};
use crate::error::{Error, Result};

/// Index of the task that fills a set.
fn filler(image: &Image, set: DescriptionId, epoll: &Epoll) -> Option<usize> {
    let has = |task: &Task, id: DescriptionId| task.descriptors.iter().any(|d| d.description == id);
    let right = |task: &Task| {
        let at =
            |t: &EpollTarget| task.descriptors.iter().any(|d| (d.fd, d.description) == (t.fd, t.description));
        epoll.targets.iter().filter(|t| at(t)).count()
    };
    let holders =
        image.tasks.iter().enumerate().filter(|(_, t)| t.shares.descriptors.is_none() && has(t, set));
    // The first of those with the most.
    holders.max_by_key(|(i, t)| (right(t), std::cmp::Reverse(*i))).map(|(i, _)| i)
}

/// Fills the sets of a task whose descriptors have their numbers. An entry whose number means another
/// description by now is added through that number all the same: epoll remembers the number.
/// Without `numbers` those that watch what is in place only when the threads are there.
pub(crate) fn plan(
    script: &mut Script,
    image: &Image,
    index: usize,
    numbers: Option<&Numbers>,
) -> Result<()> {
    let task = &image.tasks[index];
    let mut sets: BTreeMap<DescriptionId, i32> = BTreeMap::new();
    for descriptor in &task.descriptors {
        sets.entry(descriptor.description).or_insert(descriptor.fd);
    }
    for (id, set) in &sets {
        let Kind::Epoll(epoll) = &image.objects.descriptions[id.0 as usize].kind else { continue };
        // A set that several have is filled by the one that has what it watches under the right numbers.
        if filler(image, *id, epoll) != Some(index) {
            continue;
        }
        for target in &epoll.targets {
            if description::is_late(image, target.description) == numbers.is_some() {
                continue;
            }
            // struct epoll_event is packed on x86_64 and 16 bytes with padding elsewhere (linux/eventpoll.h).
            let mut event = target.events.to_ne_bytes().to_vec();
            if !cfg!(target_arch = "x86_64") {
                event.extend_from_slice(&[0; 4]);
            }
            event.extend_from_slice(&target.data.to_ne_bytes());
            let event = script.data(&event);
            let purpose = format!("epoll fd {set} watching fd {}", target.fd);
            let now = task.descriptors.iter().find(|d| d.fd == target.fd);
            let right = now.is_some_and(|d| d.description == target.description);
            if let (None, false) = (numbers, right) {
                return Err(Error::Unfit {
                    what: format!("{}: {purpose}", task.title()),
                    why: "that number has another file by now, and what it had is a file of /proc".into(),
                    remedy: "dump it again with the file closed".into(),
                });
            }
            let (spare, source) =
                numbers.map_or((0, Value::Number(0)), |n| (n.spare, n.source(target.description)));
            let aside = (!right && now.is_some()).then(|| {
                let args = [Value::from(target.fd), libc::F_DUPFD_CLOEXEC.into(), spare.into()];
                script.call(purpose.clone(), libc::SYS_fcntl, &args)
            });
            if !right {
                call!(script, purpose.clone(), libc::SYS_dup3, source, target.fd, libc::O_CLOEXEC);
            }
            call!(script, purpose.clone(), libc::SYS_epoll_ctl, *set, libc::EPOLL_CTL_ADD, target.fd, event);
            match (aside, now) {
                (Some(aside), Some(now)) => {
                    let flags = if now.close_on_exec { libc::O_CLOEXEC } else { 0 };
                    call!(script, purpose.clone(), libc::SYS_dup3, aside, target.fd, flags);
                    call!(script, purpose, libc::SYS_close, aside);
                }
                _ if !right => {
                    call!(script, purpose, libc::SYS_close, target.fd);
                }
                _ => {}
            }
        }
    }
    Ok(())
}
