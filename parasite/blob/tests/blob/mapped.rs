//! A blob with its arena and stack in shared memory, which a forked child finds at the same addresses.

use std::ptr;

use torpor_blob::{BLOB, ENTRY};
use torpor_parasite::script::{Outcome, Placed, Script, Surroundings};
use torpor_parasite::wire::{Context, Heal};

const CODE: usize = 0x1000;
const ARENA: usize = 0x4000;
const STACK: usize = 0x4000;

/// One mapping: a page of code, the arena (its context first), the stack.
pub(crate) struct Mapped {
    base: *mut u8,
    script: Script,
    placed: Placed,
}

impl Mapped {
    /// Maps the blob with a script to run.
    pub(crate) fn new(script: Script) -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), Self::LEN, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base.cast::<u8>();
        // SAFETY: the blob fits into the first page, which then is never written again.
        unsafe {
            ptr::copy_nonoverlapping(BLOB.as_ptr(), base, BLOB.len());
            assert_eq!(libc::mprotect(base.cast(), CODE, libc::PROT_READ | libc::PROT_EXEC), 0);
        }
        let placed = script.place(size_of::<Context>() as u64);
        let mapped = Self { base, script, placed };
        let around = Surroundings {
            base: 0,
            shared: 0,
            contexts: 0,
            stacks: 0,
            stack_size: 0,
            descriptor: &|slot| slot as i32,
        };
        let mut arena = vec![0; ARENA];
        mapped.script.encode(placed, &around, &mut arena);
        // SAFETY: the arena's own length, right behind the code.
        unsafe { ptr::copy_nonoverlapping(arena.as_ptr(), base.add(CODE), ARENA) };
        mapped
    }

    pub(crate) const LEN: usize = CODE + ARENA + STACK;

    /// Address of all of it.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn start(&self) -> u64 {
        self.base as u64
    }

    /// Address of the entry.
    pub(crate) fn entry(&self) -> u64 {
        self.base as u64 + ENTRY
    }

    /// Address of the context, the entry's argument.
    pub(crate) fn context(&self) -> *mut Context {
        self.base.wrapping_add(CODE).cast()
    }

    /// Top of the stack.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn stack_top(&self) -> u64 {
        self.base as u64 + Self::LEN as u64
    }

    /// Fills in the context for a task of one thread.
    pub(crate) fn prepare(&self, pid: i32, heal: Heal) {
        let context = Context {
            base: self.context() as u64,
            ops: self.placed.ops,
            count: self.script.steps().len() as u32,
            tgid: pid,
            tid: pid,
            // Ignored by default: untraced, the trap falls through and the thread heals itself.
            signal: libc::SIGURG,
            heal,
            ..Context::default()
        };
        // SAFETY: inside the arena; the child does not run yet.
        unsafe { self.context().write(context) };
    }

    /// The context and the results as the child has left them.
    pub(crate) fn outcome(&self) -> (Context, Outcome) {
        // SAFETY: inside the mapping; the child has come to its end.
        unsafe {
            let arena = std::slice::from_raw_parts(self.base.add(CODE), ARENA);
            (self.context().read(), self.script.outcome(self.placed, arena))
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody uses it any more.
        unsafe { libc::munmap(self.base.cast(), Self::LEN) };
    }
}

/// Waits for a change of `pid` and returns its status.
pub(crate) fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: waitpid writes one int.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) }, pid);
    status
}
