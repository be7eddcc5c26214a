//! System V IPC objects: made before any task, under the ids that programs remember.
//!
//! The next object of a kind gets a chosen id through /proc/sys/kernel/{shm,sem,msg}_next_id (ipc/util.c,
//! `ipc_idr_alloc`), if that id's index is free. Creator, and the pids that the kernel notes of who used an object
//! last, cannot be set; but they are those of whoever makes the call, so the calls are made by children that have the
//! wanted pid (of a process of the image, which does not exist yet) and the creator's user and group.
//!
//! Objects outlive processes: after a dump on the same machine they are still there. Such a one is used as it is found
//! and given the contents of the image, if nobody else can have begun to use it in between (`Found::same`).

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use torpor_image::sysv::Permissions;
use torpor_image::{Image, Pid};
use torpor_kernel::{child, sysv};

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::{sysv_msg, sysv_sem, sysv_shm};

/// What has been made or changed; undone on drop unless kept.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) segments: Vec<i32>,
    pub(crate) sets: Vec<i32>,
    pub(crate) queues: Vec<i32>,
    /// Segments to be filled once all else stands: what they hold cannot be brought back.
    pub(crate) stale_segments: Vec<(torpor_image::InodeId, Option<std::fs::File>)>,
    /// The same of queues, by index.
    pub(crate) stale_queues: Vec<usize>,
    /// Values that sets had which were found.
    pub(crate) old_values: Vec<(i32, Vec<u16>)>,
    /// Keeps segments that are marked removed until the tasks have attached them.
    pub(crate) attached: Vec<sysv::Attached>,
}

impl Made {
    /// Everything stands.
    pub(crate) fn forget(&mut self) {
        self.segments.clear();
        self.sets.clear();
        self.queues.clear();
        self.old_values.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // SAFETY: these remove by id what was made here; what is gone already fails with EINVAL.
        unsafe {
            for id in self.segments.drain(..) {
                libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
            }
            for id in self.sets.drain(..) {
                libc::semctl(id, 0, libc::IPC_RMID);
            }
            for id in self.queues.drain(..) {
                libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut());
            }
        }
        for (id, values) in self.old_values.drain(..) {
            let _best_effort = sysv::set_values(id, &values);
        }
    }
}

/// Makes or finds every object of the image.
pub(crate) fn make(opener: &mut Opener<'_>) -> Result<()> {
    let image = opener.image;
    for inode in &image.objects.inodes {
        sysv_shm::make(opener, inode)?;
    }
    for set in &image.objects.sysv_sem {
        sysv_sem::make(opener, set)?;
    }
    for (index, queue) in image.objects.sysv_msg.iter().enumerate() {
        sysv_msg::make(opener, index, queue)?;
    }
    Ok(())
}

/// Gives objects that were found the contents of the image: the last that may fail of a restore.
pub(crate) fn settle(opener: &mut Opener<'_>) -> Result<()> {
    for (id, file) in std::mem::take(&mut opener.sysv.stale_segments) {
        sysv_shm::refill(opener, id, file)?;
    }
    for index in std::mem::take(&mut opener.sysv.stale_queues) {
        sysv_msg::refill(opener, index)?;
    }
    Ok(())
}

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Segment,
    Set,
    Queue,
}

impl Class {
    fn next_id(self) -> &'static str {
        match self {
            Class::Segment => "/proc/sys/kernel/shm_next_id",
            Class::Set => "/proc/sys/kernel/sem_next_id",
            Class::Queue => "/proc/sys/kernel/msg_next_id",
        }
    }

    fn create(self) -> &'static str {
        match self {
            Class::Segment => "shmget",
            Class::Set => "semget",
            Class::Queue => "msgget",
        }
    }
}

/// An object that is there at the restore, as far as it matters whether it is that of the image.
pub(crate) struct Found {
    pub(crate) id: i32,
    pub(crate) key: i32,
    /// Creator and its group.
    pub(crate) creator: (u32, u32),
    /// Its size, in whatever unit, is that of the image.
    pub(crate) fits: bool,
    /// Processes noted in it.
    pub(crate) pids: Vec<i32>,
    /// When it was made or changed, in seconds since 1970.
    pub(crate) changed: u64,
}

impl Found {
    /// Whether it is the object of the image: it was last used by a process of the image, or not changed since
    /// the dump in the same run of the machine. After a reboot ids are given anew.
    fn same(&self, image: &Image, boot: &str, permissions: &Permissions) -> bool {
        self.fits
            && self.key == permissions.key
            && self.creator == (permissions.cuid, permissions.cgid)
            && (self.pids.iter().any(|pid| is_member(image, *pid))
                || image.manifest.host.boot == boot
                    && self.changed <= image.manifest.taken_at / 1_000_000_000)
    }

    fn title(&self) -> String {
        let who: Vec<String> = self
            .pids
            .iter()
            .filter(|pid| **pid > 0)
            .map(|&pid| match torpor_kernel::process::who_holds(pid) {
                Some(name) => format!("pid {pid} ({name})"),
                None => format!("pid {pid}, which has ended"),
            })
            .collect();
        let by = if who.is_empty() { String::new() } else { format!(", used by {}", who.join(" and ")) };
        format!("{}{by}", Permissions { key: self.key, ..Permissions::default() }.title(self.id))
    }
}

/// Whether a process of the image has that pid, or a thread that id.
pub(crate) fn is_member(image: &Image, pid: i32) -> bool {
    image.tasks.iter().any(|t| t.pid == Pid(pid) || t.threads.iter().any(|t| t.tid == Pid(pid)))
}

/// Whether the object is there already. One that stands in its way is an error that names it.
pub(crate) fn find(
    opener: &Opener<'_>,
    what: &str,
    id: i32,
    permissions: &Permissions,
    all: &[Found],
) -> Result<bool> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let conflict = |found: &Found, of: &str| {
        Err(Error::Conflict {
            what: what.to_owned(),
            why: format!("its {of} is that of another object by now: {}", found.title()),
            remedy: "remove that one if nobody needs it (`ipcs -a`, `ipcrm`)".into(),
        })
    };
    if let Some(found) = all.iter().find(|f| f.id == id) {
        let same = found.same(opener.image, boot.trim(), permissions);
        return if same { Ok(true) } else { conflict(found, "id") };
    }
    if permissions.key != 0
        && let Some(found) = all.iter().find(|f| f.key == permissions.key)
    {
        return conflict(found, "key");
    }
    if let Some(found) = all.iter().find(|f| f.id % sysv::INDEXES == id % sysv::INDEXES) {
        return conflict(found, "index");
    }
    Ok(false)
}

/// Makes an object with an id: by a child with the creator's pid, if that is one of the image's, user and group. `get`
/// is the call, on memory that exists already.
pub(crate) fn create(
    opener: &Opener<'_>,
    what: &str,
    class: Class,
    (id, pid): (i32, i32),
    permissions: &Permissions,
    get: impl Fn() -> i32,
) -> Result<()> {
    /// For how long others may take the numbers that were meant for us.
    const PATIENCE: Duration = Duration::from_secs(5);
    let denied = |errno| Error::Permission {
        what: what.to_owned(),
        call: "choosing its id",
        errno,
        remedy: "run torpor as root or with CAP_CHECKPOINT_RESTORE",
    };
    let next = OpenOptions::new()
        .write(true)
        .open(class.next_id())
        .map_err(|e| denied(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))?;
    let next = OwnedFd::from(next);
    let number = id.to_string();
    let (cuid, cgid) = (permissions.cuid, permissions.cgid);
    let begin = Instant::now();
    for attempt in 1u32.. {
        let made = act(opener.image, what, pid, || {
            let keep = u32::MAX;
            // SAFETY: plain system calls; raw ones change the one thread of the child. A user who may not be
            // another stays who he is.
            unsafe {
                let fd = next.as_raw_fd();
                if libc::write(fd, number.as_ptr().cast(), number.len()) < 0 {
                    return -i64::from(Errno::last() as i32);
                }
                libc::syscall(libc::SYS_setresgid, keep, cgid, keep);
                libc::syscall(libc::SYS_setresuid, keep, cuid, keep);
            }
            child::result(get())
        })?;
        match made {
            got if got == i64::from(id) => return Ok(()),
            got if got >= 0 => {
                // Somebody else's call came in between and has taken the number. What was made instead goes again.
                // SAFETY: removes by id what was made a moment ago.
                unsafe {
                    let (got, rmid) = (got as i32, libc::IPC_RMID);
                    match class {
                        Class::Segment => libc::shmctl(got, rmid, std::ptr::null_mut()),
                        Class::Set => libc::semctl(got, 0, rmid),
                        Class::Queue => libc::msgctl(got, rmid, std::ptr::null_mut()),
                    };
                }
                if begin.elapsed() > PATIENCE {
                    break;
                }
                // Two that do the same had better not keep step.
                std::thread::sleep(Duration::from_micros(u64::from(
                    std::process::id().wrapping_mul(attempt) % 2000,
                )));
            }
            e => {
                return Err(match Errno::from_raw(-e as i32) {
                    errno @ (Errno::EPERM | Errno::EACCES) => denied(errno),
                    errno @ (Errno::ENOSPC | Errno::ENOMEM | Errno::EINVAL) => Error::Conflict {
                        what: what.to_owned(),
                        why: format!("{}: {errno}", class.create()),
                        remedy: "raise the limits in /proc/sys/kernel (`ipcs -l`), or remove objects nobody \
                                 needs (`ipcrm`)"
                            .into(),
                    },
                    errno => Error::Open { what: what.to_owned(), call: class.create(), errno },
                });
            }
        }
    }
    Err(Error::Conflict {
        what: what.to_owned(),
        why: "others make objects so often that its id could not be had".into(),
        remedy: "try again".into(),
    })
}

/// Makes calls in a child that has the pid `pid`, if that is of a process of the image and free.
pub(crate) fn act(image: &Image, what: &str, pid: i32, calls: impl Fn() -> i64) -> Result<i64> {
    if is_member(image, pid) {
        // SAFETY: the callers make nothing but system calls.
        match unsafe { child::run(Some(pid), &calls) } {
            // Without the privilege, or if the pid is taken, the task cannot be made either: that will be told
            // when it is.
            Err(e) if matches!(e.errno(), Some(Errno::EPERM | Errno::EEXIST | Errno::EINVAL)) => {}
            other => return other.map_err(Error::kernel(what)),
        }
    }
    // SAFETY: as above.
    unsafe { child::run(None, &calls) }.map_err(Error::kernel(what))
}
