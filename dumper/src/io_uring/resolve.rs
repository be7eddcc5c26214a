//! What is registered with rings: files and eventfds, which the kernel has by their addresses, and so do we by descriptors
//! of our own for the same.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use torpor_image::description::Kind;
use torpor_image::io_uring::{Buffer, File, Registered, Told};
use torpor_image::task::Task;
use torpor_image::{DescriptionId, Pid as ImagePid};
use torpor_kernel::fdinfo::Detail;
use torpor_kernel::fds;
use torpor_kernel::ids::Pid;
use torpor_kernel::io_uring::look::Ring;

use super::{Known, MOMENTS, WITHOUT};
use crate::collect::Collector;
use crate::description::Found;

/// Descriptions by the addresses of what they are in the kernel.
#[derive(Default)]
struct Addresses {
    files: HashMap<u64, DescriptionId>,
    eventfds: HashMap<u64, DescriptionId>,
}

/// Finds out what is registered with the rings. `all` are the descriptors of the tree with their
/// descriptions.
pub(crate) fn resolve(
    collector: &mut Collector,
    rings: &[(DescriptionId, &Found)],
    all: &[(&Found, DescriptionId)],
) {
    let key = |found: &Found| (found.stat.st_dev, found.stat.st_ino);
    for (id, found) in rings {
        if let Some(Some(known)) = collector.rings.known.get_mut(&key(found)) {
            known.id = Some(*id);
        }
    }
    let registered = |k: &Known| {
        !k.found.files.is_empty()
            || k.found.eventfd.is_some()
            || k.found.users.iter().any(|u| !u.registered.is_empty())
    };
    let any = collector.rings.known.values().flatten().any(registered);
    let addresses = if any { addresses(collector, all) } else { Addresses::default() };
    for (id, found) in rings {
        collector.turn_to(found.pid);
        let Some(Some(known)) = collector.rings.known.get(&key(found)) else { continue };
        let (mut ring, title) = (known.found.clone(), known.title.clone());
        let mut outcome = registered_with(collector, *id, &ring, &addresses);
        // A running program may be between opening and registering, or closing.
        let mut moments = if collector.live { MOMENTS } else { 0 };
        while outcome.is_err() && moments > 0 {
            std::thread::sleep(Duration::from_millis(1 << (MOMENTS - moments)));
            moments -= 1;
            let Some((now, there)) = once_more(collector, *id, found, all) else { break };
            ring = now;
            outcome = registered_with(collector, *id, &ring, &there);
        }
        if let Err((why, remedy)) = outcome {
            collector.refuse(title, format!("an io_uring: {why}"), remedy);
        }
    }
}

/// A ring of a running process, and where files are, as of now; which description each is makes no difference yet.
fn once_more(
    collector: &mut Collector,
    id: DescriptionId,
    found: &Found,
    all: &[(&Found, DescriptionId)],
) -> Option<(Ring, Addresses)> {
    let look = collector.rings.look().ok()?;
    let ring = look.ring(found.get(collector).ok()?.as_fd()).ok()?;
    let mut pids: Vec<Pid> = all.iter().map(|(f, _)| f.pid).collect();
    pids.dedup();
    let mut addresses = Addresses::default();
    for pid in pids {
        for fd in fds::list(pid).unwrap_or_default() {
            let Ok(fd) = collector.getfd(pid, fd) else { continue };
            let Ok(file) = look.file(fd.as_fd()) else { continue };
            addresses.files.insert(file, id);
            // Of what is no eventfd, nobody asks for it.
            addresses.eventfds.extend(look.private_data(file).map(|data| (data, id)));
        }
    }
    Some((ring, addresses))
}

/// Where files and eventfds are.
fn addresses(collector: &mut Collector, all: &[(&Found, DescriptionId)]) -> Addresses {
    let mut addresses = Addresses::default();
    let mut done = Vec::new();
    for (found, id) in all {
        if done.contains(id) {
            continue;
        }
        // Of those that a running process has closed since nothing is known.
        let Ok(fd) = found.get(collector) else { continue };
        let Ok(look) = collector.rings.look() else { return addresses };
        let Ok(file) = look.file(fd.as_fd()) else { continue };
        done.push(*id);
        addresses.files.insert(file, *id);
        if matches!(found.info.detail, Detail::Eventfd { .. })
            && let Ok(eventfd) = look.private_data(file)
        {
            addresses.eventfds.insert(eventfd, *id);
        }
    }
    addresses
}

/// Notes what is registered with one ring, in its description.
fn registered_with(
    collector: &mut Collector,
    id: DescriptionId,
    found: &Ring,
    addresses: &Addresses,
) -> std::result::Result<(), (String, &'static str)> {
    const OPEN: &str = "keep it open while it is registered, or unregister it before the dump";
    let told = match found.eventfd {
        None => None,
        Some((at, asynchronous)) => match addresses.eventfds.get(&at) {
            Some(description) => Some(Told { description: *description, asynchronous }),
            None => return Err(("no process of the dump has its registered eventfd open".into(), OPEN)),
        },
    };
    let mut files = Vec::with_capacity(found.files.len());
    for (slot, file) in found.files.iter().enumerate() {
        files.push(match file {
            None => None,
            Some((at, tag)) => match addresses.files.get(at) {
                Some(description) => Some(File { description: *description, tag: *tag }),
                None => {
                    let why = format!("no process of the dump has its registered file {slot} open");
                    return Err((why, OPEN));
                }
            },
        });
    }
    let buffers =
        found.buffers.iter().map(|b| b.map(|b| Buffer { address: b.address, length: b.length, tag: b.tag }));
    let buffers = buffers.collect();
    // Indexes are a thread's own, whichever ring it was found by.
    let mut registered = Vec::new();
    for user in &found.users {
        for (index, file) in &user.registered {
            match addresses.files.get(file) {
                Some(of) if *of == id => {
                    registered.push(Registered { tid: ImagePid(user.tid), index: *index })
                }
                Some(_) => {}
                None => {
                    let why =
                        format!("index {index} of thread {} is a ring that no process has open", user.tid);
                    return Err((why, "unregister it before the dump (IORING_UNREGISTER_RING_FDS)"));
                }
            }
        }
    }
    if let Kind::IoUring(ring) = &mut collector.objects.descriptions[id.0 as usize].kind {
        (ring.eventfd, ring.files, ring.buffers, ring.registered) = (told, files, buffers, registered);
    }
    Ok(())
}

/// Refuses rings that nobody could put back to their positions: the one that does must have their queues mapped.
pub(crate) fn refuse_unreachable(collector: &mut Collector, tasks: &[Task]) {
    let mut refusals = Vec::new();
    for known in collector.rings.known.values().flatten() {
        let Some(id) = known.id else { continue };
        let Kind::IoUring(ring) = &collector.objects.descriptions[id.0 as usize].kind else { continue };
        let refuse = |why: String| (known.title.clone(), format!("an io_uring: {why}"));
        let memory = |t: &Task| t.shares.memory.unwrap_or(t.pid);
        let has = |t: &&Task| t.descriptors.iter().any(|d| d.description == id);
        let mut holders: Vec<ImagePid> = tasks.iter().filter(has).map(memory).collect();
        holders.dedup();
        let threads = || tasks.iter().flat_map(|t| &t.threads);
        match ring.driver(id, tasks) {
            None => refusals.push(refuse("the only thread that may use it does not have it open".into())),
            Some(driver) if ring.count() > 0 && driver.queues.is_none() => {
                refusals.push(refuse("no process that may use it has its queues mapped".into()));
            }
            Some(_) => {}
        }
        if ring.buffers.iter().flatten().count() > 0 && holders.len() > 1 {
            refusals.push(refuse("it has registered buffers, and several processes have it open".into()));
        }
        for user in known.found.users.iter().filter(|u| u.tid != 0) {
            if !threads().any(|t| t.tid.0 == user.tid) {
                let name = crate::freeze::name_of(user.tid);
                let why = format!("thread {} ({name}) uses it, too, which is not part of the dump", user.tid);
                refusals.push(refuse(why));
            }
        }
    }
    for (object, why) in refusals {
        collector.refuse(object, why, WITHOUT);
    }
}
