//! Planning POSIX locks: they belong to the process, so it takes them itself.

use torpor_image::Image;
use torpor_image::task::Task;
use torpor_parasite::call;
use torpor_parasite::script::Script;

use crate::description;

/// `late`: those on descriptions that are in place when the threads are there, else the others.
pub(crate) fn plan(script: &mut Script, image: &Image, task: &Task, late: bool) {
    for lock in &task.locks {
        let descriptor = task.descriptors.iter().find(|d| d.fd == lock.fd);
        if late != descriptor.is_some_and(|d| description::is_late(image, d.description)) {
            continue;
        }
        let flock = script.data(&flock(lock.exclusive, lock.start, lock.end));
        let purpose = format!("the lock on bytes {}.. of fd {}", lock.start, lock.fd);
        call!(script, purpose, libc::SYS_fcntl, lock.fd, libc::F_SETLK, flock);
    }
}

/// `struct flock`: type and whence (two 16-bit words), start, length, pid (asm-generic/fcntl.h).
pub(crate) fn flock(exclusive: bool, start: u64, end: Option<u64>) -> [u8; 32] {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let length = end.map_or(0, |end| end - start + 1);
    let mut flock = [0u8; 32];
    flock[..2].copy_from_slice(&(kind as i16).to_ne_bytes());
    flock[2..4].copy_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    flock[8..16].copy_from_slice(&start.to_ne_bytes());
    flock[16..24].copy_from_slice(&length.to_ne_bytes());
    flock
}
