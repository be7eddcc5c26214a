//! Programs to be measured.

use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;

/// What a victim owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// `size` MiB of anonymous memory in small pages, none of them zero.
    Memory,
    /// The same in huge pages.
    Huge,
    /// `size` threads that sleep.
    Sleeping,
    /// `size` threads that spin.
    Spinning,
    /// `size` memory areas.
    Areas,
    /// `size` descriptors, files and pipes.
    Descriptors,
    /// A process with `size - 1` children, each with 4 MiB of its own.
    Processes,
    /// The same with 64 KiB each.
    Crowd,
    /// As [`Kind::Processes`], in areas that want no huge pages.
    SmallPages,
    /// The same without memory, each with 200 descriptors: files of its own, and pipes it has from its parent.
    Tables,
    /// `size` TCP connections between two processes, some with data on the way.
    Connections,
    /// `size` MiB in small pages, random ones of which are written to: 10 in each millisecond, 40 MB/s.
    Writing40,
    /// The same, 130 in each millisecond: 530 MB/s.
    Writing530,
    /// `size` MiB in small pages, and a thread that looks at the clock all the time ([`GAPS`]).
    Clock,
}

/// How many pauses a clock remembers: when it went on after each that was longer than [`GAP`], by CLOCK_MONOTONIC in
/// nanoseconds. Where it does is in the file that says it is ready.
pub(crate) const GAPS: usize = 64;
const GAP: u64 = 20_000_000;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    kind: Kind,
    size: usize,
    /// Made once everything is there.
    ready: PathBuf,
    /// Sleep for ever then, rather than to wake up now and then.
    #[arg(long)]
    still: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let size = arguments.size;
    match arguments.kind {
        Kind::Memory => drop(memory(size << 20, libc::MADV_NORMAL)?),
        Kind::Huge => drop(memory(size << 20, libc::MADV_HUGEPAGE)?),
        Kind::Sleeping => threads(size, || std::thread::sleep(Duration::from_secs(3600)))?,
        Kind::Spinning => threads(size, std::hint::spin_loop)?,
        Kind::Areas => areas(size)?,
        Kind::Descriptors => descriptors(size)?,
        Kind::Processes => children(size, || memory(4 << 20, libc::MADV_NORMAL).map(drop))?,
        Kind::Crowd => children(size, || memory(64 << 10, libc::MADV_NORMAL).map(drop))?,
        Kind::SmallPages => children(size, || memory(4 << 20, libc::MADV_NOHUGEPAGE).map(drop))?,
        Kind::Tables => {
            descriptors(100)?;
            children(size, || descriptors(100))?;
        }
        Kind::Connections => connections(size)?,
        Kind::Writing40 => writing(size << 20, 10)?,
        Kind::Writing530 => writing(size << 20, 130)?,
        Kind::Clock => {
            memory(size << 20, libc::MADV_NORMAL)?;
            clock(&arguments.ready)?;
        }
    }
    File::create(&arguments.ready).context("cannot say that everything is there")?;
    loop {
        std::thread::sleep(if arguments.still {
            Duration::from_secs(3600)
        } else {
            Duration::from_millis(20)
        });
    }
}

/// Writes to so many random pages in each millisecond, from a thread of its own.
fn writing(length: usize, pages: usize) -> anyhow::Result<()> {
    let start = memory(length, libc::MADV_NOHUGEPAGE)? as usize;
    std::thread::spawn(move || {
        let mut x = 88_172_645_463_325_252u64;
        let begin = std::time::Instant::now();
        let mut written = 0;
        loop {
            let due = begin.elapsed().as_millis() as usize * pages;
            // What was missed while it stood is not made up for.
            written = written.max(due.saturating_sub(10 * pages));
            while written < due {
                x = next(x);
                let at = start + (x as usize % (length / 4096)) * 4096;
                // SAFETY: in the mapping, which is never unmapped and which nobody else looks at.
                unsafe { (at as *mut u64).write_volatile(x) };
                written += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    Ok(())
}

/// Looks at the clock for ever.
fn clock(ready: &std::path::Path) -> anyhow::Result<()> {
    let gaps = map(GAPS * 8, libc::PROT_READ | libc::PROT_WRITE)?.cast::<u64>();
    let unfinished = ready.with_extension("unfinished");
    std::fs::write(&unfinished, format!("{}", gaps as usize))?;
    std::fs::rename(&unfinished, ready)?;
    let (mut last, mut n) = (now(), 0);
    loop {
        let time = now();
        if time - last > GAP {
            // SAFETY: within the mapping just made, which is never unmapped.
            unsafe { gaps.add(n % GAPS).write_volatile(time) };
            n += 1;
        }
        last = time;
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for one time.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Random numbers (xorshift).
pub(crate) fn next(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// Memory with nothing in it that is zero.
pub(crate) fn memory(length: usize, advice: i32) -> anyhow::Result<*mut libc::c_void> {
    let start = map(length, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: the mapping was just made, is of that length and never unmapped.
    let words = unsafe {
        libc::madvise(start, length, advice);
        std::slice::from_raw_parts_mut(start.cast::<u64>(), length / 8)
    };
    let mut x = 88_172_645_463_325_252u64;
    for word in words {
        x = next(x);
        *word = x;
    }
    Ok(start)
}

fn threads(count: usize, work: fn()) -> anyhow::Result<()> {
    for _ in 0..count {
        std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            loop {
                work();
            }
        })?;
    }
    Ok(())
}

fn areas(count: usize) -> anyhow::Result<()> {
    let page = 4096;
    let start = map(count * page, libc::PROT_READ | libc::PROT_WRITE)?;
    for i in 0..count {
        // SAFETY: within the mapping just made. Every other page read-only makes as many areas.
        unsafe {
            let at = start.cast::<u8>().add(i * page);
            at.write(1);
            if i % 2 == 1 {
                libc::mprotect(at.cast(), page, libc::PROT_READ);
            }
        }
    }
    Ok(())
}

fn descriptors(count: usize) -> anyhow::Result<()> {
    for _ in 0..count / 4 {
        let file = File::open("/proc/version").or_else(|_| File::open("/etc/passwd"))?;
        let own = File::open(std::env::current_exe()?)?;
        drop(file);
        let _kept = (own.as_raw_fd(), own.into_raw_fd());
        let _kept = File::open("/dev/null")?.into_raw_fd();
        let mut ends = [0i32; 2];
        // SAFETY: pipe fills two ints.
        anyhow::ensure!(unsafe { libc::pipe(ends.as_mut_ptr()) } == 0, "no more pipes");
    }
    Ok(())
}

/// Makes `size - 1` children; every one of the processes does `work` for itself.
fn children(size: usize, work: fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut ready = [0i32; 2];
    // SAFETY: pipe fills two ints.
    anyhow::ensure!(unsafe { libc::pipe(ready.as_mut_ptr()) } == 0, "no pipe");
    for _ in 1..size {
        // SAFETY: this process has one thread.
        if unsafe { libc::fork() } == 0 {
            let done = work().is_ok();
            // SAFETY: one byte of ours goes into the pipe.
            unsafe { libc::write(ready[1], [u8::from(done)].as_ptr().cast(), 1) };
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
    }
    work()?;
    for _ in 1..size {
        let mut done = [0u8];
        // SAFETY: one byte of ours is filled.
        let got = unsafe { libc::read(ready[0], done.as_mut_ptr().cast(), 1) };
        anyhow::ensure!(got == 1 && done[0] == 1, "a child has failed");
    }
    Ok(())
}

fn connections(count: usize) -> anyhow::Result<()> {
    use std::io::Write;
    // SAFETY: takes numbers only.
    unsafe {
        let most = libc::rlimit { rlim_cur: 8192, rlim_max: 8192 };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const most);
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut ready = [0i32; 2];
    // SAFETY: pipe fills two ints; this process has one thread.
    let child = unsafe {
        anyhow::ensure!(libc::pipe(ready.as_mut_ptr()) == 0, "no pipe");
        libc::fork()
    };
    if child == 0 {
        let mut all = Vec::new();
        for _ in 0..count {
            let mut stream = std::net::TcpStream::connect(address)?;
            if all.len() % 10 == 0 {
                stream.write_all(&[7; 1000])?;
            }
            all.push(stream);
        }
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(listener.accept()?.0);
    }
    std::mem::forget((all, listener));
    std::thread::sleep(Duration::from_millis(200));
    Ok(())
}

pub(crate) fn map(length: usize, protection: i32) -> anyhow::Result<*mut libc::c_void> {
    // SAFETY: a new mapping wherever the kernel likes.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    anyhow::ensure!(start != libc::MAP_FAILED, "no memory");
    Ok(start)
}
