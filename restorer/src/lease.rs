//! Planning leases (fcntl(2), `F_SETLEASE`): whoever takes one is told when it is broken, so the task takes it itself,
//! last of all, when nobody opens files any more.

use torpor_image::Image;
use torpor_image::task::Task;
use torpor_parasite::call;
use torpor_parasite::script::Script;

const F_SETLEASE: i32 = 1024;

pub(crate) fn plan(script: &mut Script, image: &Image, task: &Task) {
    for (i, descriptor) in task.descriptors.iter().enumerate() {
        let id = descriptor.description;
        let description = &image.objects.descriptions[id.0 as usize];
        let Some(lease) = description.lease else { continue };
        let has = |task: &Task| task.descriptors.iter().any(|d| d.description == id);
        // Who took it may have handed it over.
        let mut holders = image.tasks.iter().filter(|t| has(t));
        let first = holders.next().map(|t| t.pid);
        let holder =
            image.tasks.iter().find(|t| t.pid == lease.holder && has(t)).map_or(first, |t| Some(t.pid));
        if holder != Some(task.pid) || task.descriptors[..i].iter().any(|d| d.description == id) {
            continue;
        }
        let kind = if lease.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        let purpose = format!("the lease on fd {}", descriptor.fd);
        call!(script, purpose.clone(), libc::SYS_fcntl, descriptor.fd, F_SETLEASE, kind);
        // Taking it makes the task the one to be told, if there is none.
        if description.owner.is_none_or(|owner| owner.id == 0) {
            call!(script, purpose, libc::SYS_fcntl, descriptor.fd, libc::F_SETOWN, 0);
        }
    }
}
