//! What the kernel knows of a thread and tells only the thread itself.
//!
//! sigaltstack(2) and some of prctl(2) have no counterpart for another thread, so a tracer must make each thread ask for
//! itself: a dozen calls and two switches of context. All of it is in its `struct task_struct` (include/linux/sched.h),
//! which is read from the kernel's own memory where it lets us ([`crate::bpf`]), in some three calls for each thread. Threads
//! of a process are found from its address space: its `owner` (kernel/exit.c, `mm_update_next_owner`) is one of them.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use crate::structures::Structures;
use crate::{Error, Result, Tid};

/// The structures that are looked at.
const STRUCTURES: [&str; 5] = ["mm_struct", "signal_struct", "cred", "pid", "upid"];
/// What is read of every thread: a member, and from which byte of it on.
const MEMBERS: [(&str, u64); COUNT] = [
    ("thread_node.next", 0),
    ("thread_pid", 0),
    ("cred", 0),
    ("files", 0),
    ("fs", 0),
    ("sas_ss_sp", 0),
    ("sas_ss_size", 0),
    ("sas_ss_flags", 0),
    ("clear_child_tid", 0),
    ("pdeath_signal", 0),
    ("timer_slack_ns", 0),
    ("children.next", 0),
    ("children.prev", 0),
    ("pending.signal.sig", 0),
    ("atomic_flags", 0),
    ("seccomp.mode", 0),
    ("thread.features", 0),
    ("comm", 0),
    ("comm", 8),
];
const COUNT: usize = 19;
/// Those that a kernel may not have.
const OPTIONAL: [&str; 2] = ["seccomp.mode", "thread.features"];
/// Bytes that are read at once: as many as [`crate::bpf`] has room for.
const WINDOW: u64 = 4096;
/// `PID_MAX_LIMIT` (include/linux/threads.h)
const MOST: usize = 4 << 20;
/// asm-generic/signal-defs.h and linux/signal.h
const SS_DISABLE: i32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;

/// What a thread would answer if it were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// sigaltstack(2), asked when it runs elsewhere: `ss_sp`, `ss_flags`, `ss_size`.
    pub altstack: (u64, i32, u64),
    /// prctl(2), `PR_GET_TID_ADDRESS`.
    pub clear_child_tid: u64,
    /// `PR_GET_PDEATHSIG`
    pub parent_death_signal: i32,
    /// `PR_GET_SECUREBITS`
    pub securebits: u32,
    /// `PR_GET_TIMERSLACK`, in nanoseconds.
    pub timer_slack: u64,
    /// Its name, without what follows the end of it.
    pub name: [u8; 16],
    /// Its number in its own pid namespace.
    pub own_tid: i32,
    /// Signals that are pending for it alone, bit 0 for signal 1.
    pub pending: u64,
    /// What it may have in common with others.
    pub common: Common,
    /// Whether it certainly has no children: both ends of their list are the list itself, which is true of no other place.
    pub childless: bool,
}

/// What threads have in common, as a rule, with the others of their process. Two that have the same here have the same
/// credentials, descriptors, directories and restrictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Common {
    cred: u64,
    files: u64,
    fs: u64,
    /// `no_new_privs` and the like.
    atomic_flags: u64,
    seccomp: u64,
    /// Shadow stacks.
    features: u64,
}

/// A way to look at threads.
#[derive(Debug)]
pub struct Look {
    kernel: Structures,
    /// Offset and bytes of each of [`MEMBERS`].
    members: [(u64, usize); COUNT],
    /// Where to read, and how much, for all of them.
    windows: Vec<(u64, usize)>,
    node: u64,
    children: u64,
    /// The depth of our own pid namespace.
    level: u64,
}

impl Look {
    /// Loads what is needed. An error where the kernel does not let us, or does not describe itself.
    pub fn open() -> Result<Self> {
        let kernel = Structures::open(&STRUCTURES)?;
        let mut members = [(0, 0); COUNT];
        for (place, (path, from)) in members.iter_mut().zip(MEMBERS) {
            let (offset, bits) = match kernel.array("task_struct", path, from) {
                Err(_) if OPTIONAL.contains(&path) => continue,
                found => found?,
            };
            let size = u64::from(bits / 8).saturating_sub(from);
            if size == 0 || bits % 8 != 0 || (size > 8 && path != "comm") {
                return Err(odd(format!("task_struct.{path} has {bits} bits")));
            }
            *place = (offset, size.min(8) as usize);
        }
        let mut sorted: Vec<(u64, usize)> = members.into_iter().filter(|(_, size)| *size > 0).collect();
        sorted.sort_unstable();
        let mut windows: Vec<(u64, usize)> = Vec::new();
        for (offset, size) in sorted {
            match windows.last_mut() {
                Some((start, length)) if offset + size as u64 - *start <= WINDOW => {
                    *length = (offset - *start) as usize + size;
                }
                _ => windows.push((offset, size)),
            }
        }
        let own = kernel.pointer(kernel.current()? + kernel.offset("task_struct", "thread_pid")?)?;
        let level = u64::from(kernel.pointer(own + kernel.offset("pid", "level")?)? as u32);
        let node = kernel.offset("task_struct", "thread_node")?;
        let children = kernel.offset("task_struct", "children")?;
        Ok(Look { kernel, members, windows, node, children, level })
    }

    /// All threads of the process behind an open /proc/PID/mem, by the numbers we know them by. Of one that runs what is
    /// told may not fit together.
    pub fn threads(&self, mem: BorrowedFd<'_>) -> Result<HashMap<Tid, Told>> {
        let kernel = &self.kernel;
        let mm = kernel.private_data(kernel.file(mem)?)?;
        let owner = kernel.pointer(mm + kernel.offset("mm_struct", "owner")?)?;
        let signal = kernel.pointer(owner + kernel.offset("task_struct", "signal")?)?;
        let head = signal + kernel.offset("signal_struct", "thread_head")?;
        let (level, numbers) = (kernel.offset("pid", "level")?, kernel.offset("pid", "numbers")?);
        let upid = kernel.size("upid")?;
        let mut bytes = vec![0; (numbers + (self.level + 1) * upid) as usize];
        let securebits = kernel.offset("cred", "securebits")?;
        let mut known: HashMap<u64, u32> = HashMap::new();
        let mut all = HashMap::new();
        let mut next = kernel.pointer(head)?;
        while next != head {
            if next == 0 || all.len() > MOST {
                return Err(odd("a list of threads has no end".into()));
            }
            let task = next.wrapping_sub(self.node);
            let values = self.values(task)?;
            let [following, pid, cred, files, fs, sp, size, flags, clear_child_tid, death, timer_slack, ..] =
                values;
            let [.., first, last, pending, atomic_flags, seccomp, features, name, rest] = values;
            let children = task + self.children;
            kernel.read(pid, &mut bytes)?;
            let number = |at: u64| {
                let word = bytes.get(at as usize..at as usize + 4).and_then(|b| b.first_chunk());
                word.map(|b| i32::from_ne_bytes(*b)).ok_or_else(|| odd("a pid is cut off".into()))
            };
            let tid = number(numbers + self.level * upid)?;
            let own_tid = match number(level)? {
                own if own as u64 == self.level => tid,
                own => kernel.pointer(pid + numbers + own as u64 * upid)? as i32,
            };
            let bits = match known.get(&cred) {
                Some(bits) => *bits,
                None => *known.entry(cred).or_insert(kernel.pointer(cred + securebits)? as u32),
            };
            // kernel/signal.c, `do_sigaltstack`
            let state = if size == 0 { SS_DISABLE } else { 0 };
            let told = Told {
                altstack: (sp, state | (flags as u32 & SS_AUTODISARM).cast_signed(), size),
                clear_child_tid,
                parent_death_signal: death as i32,
                securebits: bits,
                timer_slack,
                name: comm(name, rest),
                own_tid,
                pending,
                common: Common { cred, files, fs, atomic_flags, seccomp, features },
                childless: (first, last) == (children, children),
            };
            all.insert(Tid(tid), told);
            next = following;
        }
        Ok(all)
    }

    /// The members of the thread at an address.
    fn values(&self, task: u64) -> Result<[u64; COUNT]> {
        let mut values = [0; COUNT];
        let mut bytes = [0u8; WINDOW as usize];
        for &(start, length) in &self.windows {
            let bytes = &mut bytes[..length];
            self.kernel.read(task + start, bytes)?;
            for (value, (offset, size)) in values.iter_mut().zip(self.members) {
                if size > 0 && offset >= start && (offset - start) as usize + size <= length {
                    let at = (offset - start) as usize;
                    let mut word = [0; 8];
                    word[..size].copy_from_slice(&bytes[at..at + size]);
                    *value = u64::from_ne_bytes(word);
                }
            }
        }
        Ok(values)
    }
}

/// A name without what follows its end.
fn comm(name: u64, rest: u64) -> [u8; 16] {
    let mut all = [0; 16];
    all[..8].copy_from_slice(&name.to_ne_bytes());
    all[8..].copy_from_slice(&rest.to_ne_bytes());
    let end = all.iter().position(|b| *b == 0).unwrap_or(all.len());
    all[end..].fill(0);
    all
}

fn odd(what: String) -> Error {
    Error::Parse { file: "/sys/kernel/btf/vmlinux".into(), what }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_a_thread_is_told_itself() {
        if let Err(e) = Look::open() {
            eprintln!("skipped: {e}");
            return;
        }
        let thread = std::thread::spawn(|| {
            let look = Look::open().unwrap();
            let mem = std::fs::File::open("/proc/self/mem").unwrap();
            // SAFETY: numbers, and memory of this thread.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGWINCH);
                libc::prctl(libc::PR_SET_TIMERSLACK, 12_345);
                let mut stack: libc::stack_t = std::mem::zeroed();
                libc::sigaltstack(std::ptr::null(), &raw mut stack);
                let mut ctid = 0u64;
                libc::prctl(40, &raw mut ctid);
                let told = look.threads(mem.as_fd()).unwrap()[&Tid::this()];
                libc::prctl(libc::PR_SET_PDEATHSIG, 0);
                assert_eq!((told.parent_death_signal, told.timer_slack), (libc::SIGWINCH, 12_345));
                assert_eq!(told.altstack, (stack.ss_sp as u64, stack.ss_flags, stack.ss_size as u64));
                assert_eq!(told.clear_child_tid, ctid);
                assert_eq!(told.securebits, libc::prctl(libc::PR_GET_SECUREBITS) as u32);
                let mut name = crate::process::comm(crate::Pid::this(), Tid::this()).unwrap();
                name.resize(16, 0);
                assert_eq!((told.name.to_vec(), told.own_tid), (name, Tid::this().0));
                assert!(told.childless);
                let child = libc::fork();
                if child == 0 {
                    libc::_exit(0);
                }
                assert!(!look.threads(mem.as_fd()).unwrap()[&Tid::this()].childless);
                libc::waitpid(child, std::ptr::null_mut(), 0);
                look.threads(mem.as_fd()).unwrap().len()
            }
        });
        assert!(thread.join().unwrap() >= 2);
    }
}
