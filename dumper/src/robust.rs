//! A futex that tells another process of the end of a thread, before all else that comes with it.
//!
//! A thread tells the kernel of a list of futexes it holds (set_robust_list(2)); at its end the kernel walks that list,
//! sets `FUTEX_OWNER_DIED` in each word that has its id, and wakes one who waits for it (kernel/futex/core.c,
//! `exit_robust_list`). This happens while the thread still has its memory, descriptors and tracees. libc has set up
//! such a list, with an offset between the links of it and the words; one more entry is linked in beside libc's.

use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use nix::errno::Errno;

const PAGE: usize = 4096;
/// Where the link lies in the page: there is room for an offset in both directions.
const LINK: usize = PAGE / 2;
/// linux/futex.h
const FUTEX_WAITERS: u32 = 0x8000_0000;
const FUTEX_TID_MASK: u32 = 0x3fff_ffff;

/// `struct robust_list_head` (linux/futex.h).
#[repr(C)]
struct Head {
    /// The first link; the last one leads back here.
    next: AtomicUsize,
    offset: isize,
    pending: usize,
}

/// A futex held by this thread, in a page that is shared with children. Must be dropped in the thread that made it.
#[derive(Debug)]
pub(crate) struct Held {
    page: NonNull<u8>,
    head: NonNull<Head>,
    offset: isize,
    tid: u32,
}

impl Held {
    /// A page of zeros but for the futex, which is held.
    pub(crate) fn new() -> Result<Self, Errno> {
        let head = head()?;
        // SAFETY: the head is that of this thread, for as long as it lives.
        let offset = unsafe { head.as_ref() }.offset;
        // Neither on the link, nor on the one backwards that libc keeps before it.
        if offset.unsigned_abs() >= LINK || offset % 4 != 0 || (-12..8).contains(&offset) {
            return Err(Errno::EINVAL);
        }
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: new memory; gettid takes nothing.
        let (page, tid) = unsafe {
            (libc::mmap(null_mut(), PAGE, protection, flags, -1, 0), libc::gettid().cast_unsigned())
        };
        if page == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let page = NonNull::new(page.cast::<u8>()).ok_or(Errno::ENOMEM)?;
        let held = Held { page, head, offset, tid };
        held.futex().store(tid | FUTEX_WAITERS, Ordering::SeqCst);
        // SAFETY: the head is that of this thread, and nobody else changes the list.
        let first = &unsafe { head.as_ref() }.next;
        held.link().store(first.load(Ordering::SeqCst), Ordering::SeqCst);
        first.store(held.link().as_ptr() as usize, Ordering::SeqCst);
        Ok(held)
    }

    /// One of the words at the beginning of the page, which are for any use.
    pub(crate) fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < 16);
        // SAFETY: the page is mapped for as long as `self` lives, and its words are atomic to all who have it.
        unsafe { self.page.cast::<AtomicU32>().add(index).as_ref() }
    }

    fn link(&self) -> &AtomicUsize {
        // SAFETY: as above; the link is aligned.
        unsafe { self.page.byte_add(LINK).cast().as_ref() }
    }

    fn futex(&self) -> &AtomicU32 {
        // SAFETY: as above; the offset was checked to lead into the page, to an aligned word.
        unsafe { self.page.byte_add(LINK).byte_offset(self.offset).cast().as_ref() }
    }

    /// Lets whoever waits go on, as at the end of the thread.
    pub(crate) fn let_go(&self) {
        self.futex().store(0, Ordering::SeqCst);
        wake(self.futex());
    }

    /// Waits, in a child, until the futex is let go or the thread has ended.
    pub(crate) fn wait(&self) {
        let futex = self.futex();
        loop {
            let now = futex.load(Ordering::SeqCst);
            if now & FUTEX_TID_MASK != self.tid {
                return;
            }
            // SAFETY: FUTEX_WAIT on a word that is there, without a timeout.
            unsafe { libc::syscall(libc::SYS_futex, futex.as_ptr(), libc::FUTEX_WAIT, now, 0, 0, 0) };
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the list is that of this thread, and well-formed: each link leads to another, the last to the head.
        unsafe {
            let mut at = &self.head.as_ref().next;
            while at.load(Ordering::SeqCst) != self.head.as_ptr() as usize {
                let next = at.load(Ordering::SeqCst);
                if next == self.link().as_ptr() as usize {
                    at.store(self.link().load(Ordering::SeqCst), Ordering::SeqCst);
                    break;
                }
                // The lowest bit is a flag.
                at = &*((next & !1) as *const AtomicUsize);
            }
            libc::munmap(self.page.as_ptr().cast(), PAGE);
        }
    }
}

/// Wakes all who wait for a word.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE reads nothing.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
}

/// The list of this thread; a libc that has not set one up yet gets one.
fn head() -> Result<NonNull<Head>, Errno> {
    let (mut head, mut length) = (null_mut::<Head>(), 0usize);
    // SAFETY: get_robust_list fills a pointer and a length.
    Errno::result(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) })?;
    if let Some(head) = NonNull::new(head) {
        return Ok(head);
    }
    let new = Box::into_raw(Box::new(Head { next: AtomicUsize::new(0), offset: -32, pending: 0 }));
    // SAFETY: the head lives as long as the process; an empty list leads back to it.
    unsafe {
        (*new).next.store(new as usize, Ordering::SeqCst);
        Errno::result(libc::syscall(libc::SYS_set_robust_list, new, size_of::<Head>()))?;
        Ok(NonNull::new_unchecked(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that waits and then ends.
    fn waiting(held: &Held) -> i32 {
        // SAFETY: the child makes system calls only.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            held.wait();
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        pid
    }

    fn ended(pid: i32, flags: i32) -> bool {
        // SAFETY: takes numbers, and no place for a status.
        unsafe { libc::waitpid(pid, null_mut(), flags) == pid }
    }

    #[test]
    fn a_child_hears_of_the_end_of_a_thread() {
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let held = Held::new().unwrap();
            let child = waiting(&held);
            std::thread::sleep(std::time::Duration::from_millis(20));
            let early = ended(child, libc::WNOHANG);
            // Its page must outlive the thread that does not let go of it.
            std::mem::forget(held);
            tell.send((child, early)).unwrap();
        });
        thread.join().unwrap();
        let (child, early) = told.recv().unwrap();
        assert!(!early);
        assert!(ended(child, 0));
    }

    #[test]
    fn a_child_is_let_go() {
        let (first, second) = (Held::new().unwrap(), Held::new().unwrap());
        let children = [waiting(&first), waiting(&second)];
        first.let_go();
        assert!(ended(children[0], 0));
        drop(first);
        assert!(!ended(children[1], libc::WNOHANG));
        second.let_go();
        assert!(ended(children[1], 0));
    }
}
