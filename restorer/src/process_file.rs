//! Files of /proc about the processes of the image: opened by the task that has them, when the processes are there.
//!
//! Such a file belongs to one process, not to its number: opened before, /proc/42/maps would be about whoever has
//! that number then, or about nobody. So it has no slot. The task opens it with the threads there, since it may be about
//! one of them, and with torpor's credentials, limit of descriptors and, but for its own root directory, view of the
//! file system.

use torpor_image::description::{Description, Kind};
use torpor_image::inode::Source;
use torpor_image::task::Task;
use torpor_image::{DescriptionId, Image};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::error::{Error, Result};

/// The path of a description's file, if it is one about a process of the image.
pub(crate) fn of(image: &Image, id: DescriptionId) -> Option<Vec<u8>> {
    let Kind::File(inode) = image.objects.descriptions[id.0 as usize].kind else { return None };
    match &image.objects.inodes[inode.0 as usize].source {
        Source::Process { pid, rest } => Some([format!("/proc/{pid}/").as_bytes(), rest].concat()),
        _ => None,
    }
}

/// Opens those of a task, and gives them their numbers; all other descriptors have theirs.
pub(crate) fn plan(script: &mut Script, image: &Image, task: &Task) -> Result<()> {
    let mut done = Vec::new();
    for descriptor in &task.descriptors {
        let id = descriptor.description;
        let Some(path) = of(image, id).filter(|_| !done.contains(&id)) else { continue };
        done.push(id);
        let holders = image.tasks.iter().filter(|t| t.descriptors.iter().any(|d| d.description == id));
        let name = format!("{}: fd {}, {}", task.title(), descriptor.fd, String::from_utf8_lossy(&path));
        let unfit = |why: &str| Error::Unfit {
            what: name.clone(),
            why: why.to_owned(),
            remedy: "dump it again with the file closed".into(),
        };
        if holders.count() > 1 {
            return Err(unfit("several processes share it"));
        }
        if &*task.root != b"/" {
            return Err(unfit("the process has a root directory of its own"));
        }
        let description = &image.objects.descriptions[id.0 as usize];
        if description.owner.is_some() || description.flock.is_some() {
            return Err(unfit("it has an owner or a lock, which files of /proc are not given again"));
        }
        open(script, task, description, &path, &name);
    }
    Ok(())
}

fn open(script: &mut Script, task: &Task, description: &Description, path: &[u8], name: &str) {
    let spare = task.descriptors.last().map_or(0, |d| d.fd + 1);
    let no = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_NOFOLLOW;
    let flags = description.flags as i32 & !no | libc::O_CLOEXEC;
    let path = script.c_string(path);
    let args = [Value::from(libc::AT_FDCWD), path.into(), flags.into()];
    let first = script.call(name.to_owned(), libc::SYS_openat, &args);
    // The lowest free number may be one that another of them will have.
    let args = [first.into(), libc::F_DUPFD_CLOEXEC.into(), spare.into()];
    let aside = script.call(name.to_owned(), libc::SYS_fcntl, &args);
    call!(script, name.to_owned(), libc::SYS_close, first);
    if description.position != 0 {
        call!(script, name.to_owned(), libc::SYS_lseek, aside, description.position, libc::SEEK_SET);
    }
    for descriptor in task.descriptors.iter().filter(|d| d.description == description.id) {
        let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
        let args = [aside.into(), descriptor.fd.into(), flags.into()];
        script.call_for(name.to_owned(), libc::SYS_dup3, &args, i64::from(descriptor.fd));
    }
    call!(script, name.to_owned(), libc::SYS_close, aside);
}
