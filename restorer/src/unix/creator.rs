//! Calls made by another process, for what the kernel keeps of their caller.
//!
//! connect(2), listen(2) and socketpair(2) leave the credentials of the calling process with the sockets, where
//! SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD show them (net/unix/af_unix.c, `init_peercred`). Nobody can set
//! them. So these calls are made by a short-lived process that shares our descriptors, is given the pid of the
//! one that made them before the dump (clone3 with `set_tid`, as the restored processes are), and takes on
//! its user and groups. It is gone before the restored process of that pid is born: the number remains, while
//! SO_PEERPIDFD tells of a process that has ended.

use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;
use torpor_image::unix::PeerCredentials;
use torpor_kernel::process;

use super::place::Place;
use crate::open::Opener;

/// `struct clone_args` up to `set_tid_size`.
const CLONE_ARGS: usize = 80;
/// SECBIT_NO_SETUID_FIXUP: capabilities stay when the user changes, so that paths can be reached.
const KEEP_CAPABILITIES: u64 = 1 << 2;

/// Something to be called in another process: it must not allocate, lock or panic.
pub(crate) type Call<'c> = &'c (dyn Fn() -> nix::Result<()> + Sync);

/// Makes a call for `what` at a place, as another process if it matters which one does.
pub(crate) fn call_for(
    opener: &mut Opener<'_>,
    what: &str,
    creator: Option<&PeerCredentials>,
    place: &Place,
    call: Call<'_>,
) -> nix::Result<()> {
    let as_wanted = self::call(creator, place, call)?;
    // A task whose pid is taken cannot be restored at all, and says so.
    let task = |pid| opener.image.tasks.iter().any(|t| t.pid.0 == pid);
    if let Some(PeerCredentials { pid, .. }) = creator.filter(|c| !as_wanted && !task(c.pid)) {
        let by = process::who_holds(*pid).map_or_else(String::new, |name| format!(" by `{name}`"));
        opener.note(format!(
            "{what}: SO_PEERCRED tells another process that has ended than pid {pid}, which is taken{by}"
        ));
    }
    Ok(())
}

/// The same. False if it was made under another pid than that of its creator.
fn call(creator: Option<&PeerCredentials>, place: &Place, call: Call<'_>) -> nix::Result<bool> {
    let Some(creator) = creator else { return place.run(call).map(|()| true) };
    let result = Words::new()?;
    // One that was killed has done nothing that counts.
    result.set(0, libc::ECHILD);
    let (pid, as_wanted) = match spawn(Some(creator.pid)) {
        // Somebody else has the pid by now, or may not be asked for: the rest is still right.
        Err(Errno::EEXIST | Errno::EPERM | Errno::EINVAL) => (spawn(None)?, false),
        made => (made?, true),
    };
    if pid == 0 {
        let done = place.enter().and_then(|()| {
            become_(creator);
            call()
        });
        result.set(0, done.err().map_or(0, |errno| errno as i32));
        exit();
    }
    reap(pid);
    match result.get(0) {
        0 => Ok(as_wanted),
        errno => Err(Errno::from_raw(errno)),
    }
}

/// Makes sure that there is something with this pid, be it a process that has ended, while `call` runs.
pub(crate) fn with_pid<T>(pid: i32, call: impl FnOnce() -> T) -> T {
    // SAFETY: with no signal, kill takes numbers only and does nothing.
    let exists = unsafe { libc::kill(pid, 0) } == 0 || Errno::last() == Errno::EPERM;
    let stand_in = if exists { None } else { spawn(Some(pid)).ok() };
    if stand_in == Some(0) {
        exit();
    }
    let result = call();
    if let Some(pid) = stand_in {
        reap(pid);
    }
    result
}

/// A copy of this process that shares its descriptors; 0 in the copy.
fn spawn(pid: Option<i32>) -> nix::Result<i32> {
    let wanted = pid.unwrap_or(0);
    let mut args = [0u64; CLONE_ARGS / 8];
    args[0] = libc::CLONE_FILES as u64;
    if pid.is_some() {
        args[8] = (&raw const wanted) as u64;
        args[9] = 1;
    }
    // SAFETY: arguments as clone3(2) has them, without a new stack: as fork(2), whose rules the callers keep.
    let got = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), CLONE_ARGS) };
    Errno::result(got).map(|pid| pid as i32)
}

/// Takes on user and groups. Without the privilege it stays what it is.
fn become_(creator: &PeerCredentials) {
    let (uid, gid) = (creator.uid, creator.gid);
    // SAFETY: numbers, and a list of groups with its length. These are calls of this process's only thread.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_SECUREBITS, KEEP_CAPABILITIES, 0, 0, 0);
        libc::syscall(libc::SYS_setgroups, creator.groups.len(), creator.groups.as_ptr());
        libc::syscall(libc::SYS_setresgid, gid, gid, gid);
        libc::syscall(libc::SYS_setresuid, uid, uid, uid);
    }
}

fn exit() -> ! {
    loop {
        // SAFETY: ends this copy without running anything that belongs to the original.
        unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    }
}

fn reap(pid: i32) {
    // It ends without a signal, so that __WALL is needed.
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) } < 0
        && Errno::last() == Errno::EINTR
    {}
}

/// Numbers that the other process can write and we can read.
pub(crate) struct Words(std::ptr::NonNull<libc::c_void>);

// SAFETY: its words are atomic.
unsafe impl Sync for Words {}

impl Words {
    const LENGTH: std::num::NonZeroUsize = std::num::NonZeroUsize::new(4096).expect("not zero");

    /// All zero.
    pub(crate) fn new() -> nix::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new memory.
        unsafe { mmap_anonymous(None, Self::LENGTH, protection, MapFlags::MAP_SHARED) }.map(Words)
    }

    fn words(&self) -> &[AtomicI32; 2] {
        // SAFETY: mapped for as long as `self` lives, aligned, and long enough.
        unsafe { self.0.cast().as_ref() }
    }

    pub(crate) fn set(&self, index: usize, value: i32) {
        self.words()[index].store(value, Ordering::SeqCst);
    }

    pub(crate) fn get(&self, index: usize) -> i32 {
        self.words()[index].load(Ordering::SeqCst)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and borrowed by nobody any more.
        let _unmapped = unsafe { nix::sys::mman::munmap(self.0, Self::LENGTH.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_fails_with_its_own_error() {
        let nobody = PeerCredentials { pid: i32::MAX, uid: 0, gid: 0, groups: Vec::new() };
        for creator in [None, Some(&nobody)] {
            assert_eq!(call(creator, &Place::Here, &|| Ok(())), Ok(creator.is_none()));
            assert_eq!(call(creator, &Place::Here, &|| Err(Errno::EDOM)), Err(Errno::EDOM));
        }
    }

    #[test]
    fn a_stand_in_has_the_pid_while_it_is_needed() {
        // SAFETY: with no signal, kill takes numbers only and does nothing.
        let exists = |pid| unsafe { libc::kill(pid, 0) == 0 };
        let pid = (300..30_000).rev().find(|pid| !exists(*pid)).unwrap();
        if with_pid(pid, || exists(pid)) {
            assert!(!exists(pid));
        } else {
            eprintln!("skipped: no privilege to choose a pid");
        }
        let this = std::process::id() as i32;
        assert!(with_pid(this, || exists(this)));
    }
}
