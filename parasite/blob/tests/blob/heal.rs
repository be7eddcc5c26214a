//! A thread that was sent elsewhere and then left by its tracer finds back by itself, unharmed.

use std::arch::asm;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mapped::{Mapped, wait};
use arch::{Registers, SignalFrame};
use torpor_parasite::script::Script;
use torpor_parasite::wire::{Heal, heal, state};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const VECTOR: [u64; 4] = [0x1111_2222, 0x3333_4444, 0x5555_6666, 0x7777_8888];

/// What victim and test both see.
#[repr(C)]
struct Shared {
    /// Rounds the victim has made.
    rounds: AtomicU64,
    /// Set by the test: the victim is to come to its end.
    stop: AtomicU64,
    vector: [u64; 4],
}

/// What the victim does in every round besides checking its registers.
#[derive(Clone, Copy, PartialEq)]
enum Habit {
    Compute,
    /// Read a byte from a pipe: the call must be made again.
    Read,
}

/// Checks its registers round after round; exit status 0 means that all is well.
///
/// Runs after fork in a process with threads, so it makes system calls only.
fn victim(shared: *mut Shared, habit: Habit, pipe: i32) -> ! {
    let stack = [0u8; 8192];
    let mine = libc::stack_t { ss_sp: stack.as_ptr().cast_mut().cast(), ss_flags: 0, ss_size: stack.len() };
    let mut wrong: u64;
    // SAFETY: ordinary calls on memory of this function. The assembly keeps rbx and rbp, writes below its
    // stack pointer only, and touches `shared` and one byte on the stack besides.
    unsafe {
        libc::sigaltstack(&raw const mine, ptr::null_mut());
        let mut mask = 1u64 << (libc::SIGUSR2 - 1);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0, 8);
        asm!(
            "push rbx",
            "push rbp",
            "mov rbx, 0x1bbb",
            "mov rbp, 0x2bbb",
            "mov r12, 0x3bbb",
            "mov r14, 0x5bbb",
            "vmovdqu ymm0, [r13 + 16]",
            "vmovdqu ymm7, [r13 + 16]",
            "vmovdqu ymm15, [r13 + 16]",
            "mov qword ptr [rsp - 128], 0x6bbb",
            "2:",
            "lock inc qword ptr [r13]",
            "test r9, r9",
            "jz 3f",
            // read(pipe, red zone, 1) must return 1.
            "mov rdi, r8",
            "lea rsi, [rsp - 64]",
            "mov edx, 1",
            "xor eax, eax",
            "syscall",
            "cmp rax, 1",
            "jne 9f",
            "3:",
            "cmp rbx, 0x1bbb",
            "jne 9f",
            "cmp rbp, 0x2bbb",
            "jne 9f",
            "cmp r12, 0x3bbb",
            "jne 9f",
            "cmp r14, 0x5bbb",
            "jne 9f",
            "cmp qword ptr [rsp - 128], 0x6bbb",
            "jne 9f",
            "vpcmpeqb ymm1, ymm0, [r13 + 16]",
            "vpcmpeqb ymm2, ymm7, [r13 + 16]",
            "vpand ymm1, ymm1, ymm2",
            "vpcmpeqb ymm2, ymm15, [r13 + 16]",
            "vpand ymm1, ymm1, ymm2",
            "vpmovmskb eax, ymm1",
            "cmp eax, -1",
            "jne 9f",
            "cmp qword ptr [r13 + 8], 0",
            "je 2b",
            "xor eax, eax",
            "jmp 8f",
            "9:",
            "mov eax, 1",
            "8:",
            "pop rbp",
            "pop rbx",
            in("r13") shared,
            in("r8") i64::from(pipe),
            in("r9") u64::from(habit == Habit::Read),
            out("rax") wrong,
            out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r11") _, out("r12") _, out("r14") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm7") _, out("xmm15") _,
        );
        let mut now: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(ptr::null(), &raw mut now);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8);
        if now.ss_sp != mine.ss_sp || now.ss_size != mine.ss_size || now.ss_flags != 0 {
            wrong |= 2;
        }
        if mask != 1 << (libc::SIGUSR2 - 1) {
            wrong |= 4;
        }
        libc::_exit(wrong as i32)
    }
}

/// A victim under ptrace, as the dumper stops one.
struct Stopped {
    pid: i32,
    pipe: [i32; 2],
    shared: *mut Shared,
    regs: Registers,
    /// Where its signal frame lies.
    frame: u64,
    gadget: u64,
    /// Code that calls rt_sigreturn.
    pretcode: u64,
}

impl Stopped {
    /// Starts a victim, stops it and puts up its way back.
    fn new(habit: Habit) -> Self {
        let mut pipe = [0; 2];
        // SAFETY: a new mapping for `Shared`, a pipe, and a child that runs `victim`.
        let (shared, pid) = unsafe {
            assert_eq!(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let shared = libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0).cast::<Shared>();
            (*shared).vector = VECTOR;
            match libc::fork() {
                0 => victim(shared, habit, pipe[0]),
                pid => (shared, pid),
            }
        };
        let mut this = Self {
            pid,
            pipe,
            shared,
            regs: Registers::default(),
            frame: 0,
            gadget: find(arch::SYSCALL_PATTERNS),
            pretcode: find(arch::SIGRETURN_PATTERNS),
        };
        this.progress();
        this.seize();
        this
    }

    /// Waits until the victim has made more rounds, feeding it bytes.
    fn progress(&self) {
        // SAFETY: `shared` stays mapped while `self` lives.
        let rounds = unsafe { &(*self.shared).rounds };
        let target = rounds.load(Ordering::Acquire) + 3;
        for _ in 0..5000 {
            if rounds.load(Ordering::Acquire) >= target {
                // Once more into the call that blocks.
                std::thread::sleep(Duration::from_millis(5));
                return;
            }
            self.feed();
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the victim does not go on");
    }

    fn feed(&self) {
        // SAFETY: one byte of a constant.
        assert_eq!(unsafe { libc::write(self.pipe[1], b"x".as_ptr().cast(), 1) }, 1);
    }

    fn seize(&mut self) {
        assert_eq!(self.ptrace(libc::PTRACE_SEIZE, 0, 0), 0);
        assert_eq!(self.ptrace(libc::PTRACE_INTERRUPT, 0, 0), 0);
        let status = wait(self.pid);
        assert!(libc::WIFSTOPPED(status), "status {status:#x}");

        let mut regs = [0u8; size_of::<Registers>()];
        assert_eq!(self.regset(libc::PTRACE_GETREGSET, libc::NT_PRSTATUS, &mut regs), regs.len());
        // SAFETY: repr(C) of integers, filled by the kernel.
        self.regs = unsafe { regs.as_ptr().cast::<Registers>().read_unaligned() };
        let mut xstate = vec![0; 1 << 16];
        let len = self.regset(libc::PTRACE_GETREGSET, arch::NT_FPSTATE, &mut xstate);
        xstate.truncate(len);
        let mut mask = 0u64;
        assert_eq!(self.ptrace(PTRACE_GETSIGMASK, 8, &raw mut mask as u64), 0);

        let mut buffer = vec![0u8; SignalFrame::size(xstate.len())];
        self.frame = (self.regs.frame_top() - buffer.len() as u64) & !15;
        SignalFrame::write(&mut buffer, self.frame, self.pretcode, &self.regs.restarted(), mask, &xstate);
        let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let remote = libc::iovec { iov_base: self.frame as *mut _, iov_len: buffer.len() };
        // SAFETY: below the stopped victim's stack pointer and red zone.
        let written =
            unsafe { libc::process_vm_writev(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        assert_eq!(written, buffer.len() as isize);
    }

    /// Sends the victim to `regs` with all but the trap's signal blocked.
    fn send(&self, regs: &Registers) {
        let mask = !(1u64 << (libc::SIGURG - 1));
        assert_eq!(self.ptrace(PTRACE_SETSIGMASK, 8, &raw const mask as u64), 0);
        let mut bytes = [0u8; size_of::<Registers>()];
        // SAFETY: repr(C) of integers without padding.
        unsafe { bytes.as_mut_ptr().cast::<Registers>().write_unaligned(*regs) };
        self.regset(libc::PTRACE_SETREGSET, libc::NT_PRSTATUS, &mut bytes);
    }

    /// The tracer dies: nothing is put back.
    fn abandon(&self) {
        assert_eq!(self.ptrace(libc::PTRACE_DETACH, 0, 0), 0);
    }

    fn finish(self) {
        self.progress();
        // SAFETY: `shared` is mapped until here.
        unsafe { (*self.shared).stop.store(1, Ordering::Release) };
        self.feed();
        let status = wait(self.pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status:#x}");
    }

    fn ptrace(&self, request: u32, address: u64, data: u64) -> i64 {
        // SAFETY: requests of this file, with data that they are made for.
        unsafe { libc::ptrace(request, self.pid, address, data) }
    }

    fn regset(&self, request: u32, note: i32, buffer: &mut [u8]) -> usize {
        let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        assert_eq!(self.ptrace(request, note as u64, &raw mut vector as u64), 0);
        vector.iov_len
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: our child (reaped or not: no other process can have its id before the wait), our
        // descriptors and our mapping.
        unsafe {
            if std::thread::panicking() {
                libc::kill(self.pid, libc::SIGKILL);
            }
            libc::close(self.pipe[0]);
            libc::close(self.pipe[1]);
            libc::munmap(self.shared.cast(), 4096);
        }
    }
}

/// Address of one of `patterns` in code of libc, which a forked child has at the same place.
fn find(patterns: &[&[u8]]) -> u64 {
    for line in std::fs::read_to_string("/proc/self/maps").expect("own maps").lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields[1] != "r-xp" || !line.contains("/libc") {
            continue;
        }
        let (start, end) = fields[0].split_once('-').expect("a range");
        let start = usize::from_str_radix(start, 16).expect("hex");
        let len = usize::from_str_radix(end, 16).expect("hex") - start;
        // SAFETY: a readable mapping of a library that stays loaded.
        let code = unsafe { std::slice::from_raw_parts(start as *const u8, len) };
        for pattern in patterns {
            if let Some(at) = code.windows(pattern.len()).position(|w| w == *pattern) {
                return (start + at) as u64;
            }
        }
    }
    panic!("libc has none of {patterns:x?}");
}

#[test]
fn the_first_call_returns_into_the_frame() {
    for habit in [Habit::Compute, Habit::Read] {
        let mut victim = Stopped::new(habit);
        for _ in 0..20 {
            let call = victim.regs.with_call(victim.gadget, victim.frame, libc::SYS_getpid as u64, [0; 6]);
            victim.send(&call.returning_to(victim.pretcode));
            victim.abandon();
            victim.progress();
            victim.seize();
        }
        // Here nobody interfered: the registers are still the victim's own.
        victim.abandon();
        victim.finish();
    }
}

#[test]
fn the_executor_unmaps_itself_and_returns() {
    for habit in [Habit::Compute, Habit::Read] {
        let mut script = Script::new();
        let pid = script.call("own pid", libc::SYS_getpid, &[]);
        // Before the fork, lest the child be without it.
        let mapped = Mapped::new(script);
        let victim = Stopped::new(habit);
        let way = Heal {
            kind: heal::LAST,
            frame: victim.frame,
            gadget: victim.gadget,
            start: mapped.start(),
            length: Mapped::LEN as u64,
            // A word of the arena that is zero: behind the script.
            guests: 0x3000,
            ..Heal::default()
        };
        mapped.prepare(victim.pid, way);
        assert!(has_mapping(victim.pid, mapped.start()));
        victim.send(&victim.regs.with_entry(mapped.entry(), mapped.stack_top(), mapped.context() as u64));
        victim.abandon();
        victim.progress();

        let (context, outcome) = mapped.outcome();
        assert_eq!((context.state, outcome.result(pid)), (state::DONE, i64::from(victim.pid)));
        assert!(!has_mapping(victim.pid, mapped.start()));
        victim.finish();
    }
}

/// Whether `pid` has a mapping that begins at `start`.
fn has_mapping(pid: i32, start: u64) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    maps.lines().any(|line| line.starts_with(&format!("{start:x}-")))
}
