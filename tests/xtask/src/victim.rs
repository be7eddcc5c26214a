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
    /// The same in areas that want no huge pages.
    SmallPages,
    /// The same without memory, each with 200 descriptors: files of its own, and pipes it has from its parent.
    Tables,
    /// `size` TCP connections between two processes, some with data on the way.
    Connections,
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    kind: Kind,
    size: usize,
    /// Made once everything is there.
    ready: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let size = arguments.size;
    match arguments.kind {
        Kind::Memory => memory(size << 20, libc::MADV_NORMAL)?,
        Kind::Huge => memory(size << 20, libc::MADV_HUGEPAGE)?,
        Kind::Sleeping => threads(size, || std::thread::sleep(Duration::from_secs(3600)))?,
        Kind::Spinning => threads(size, std::hint::spin_loop)?,
        Kind::Areas => areas(size)?,
        Kind::Descriptors => descriptors(size)?,
        Kind::Processes => children(size, || memory(4 << 20, libc::MADV_NORMAL))?,
        Kind::SmallPages => children(size, || memory(4 << 20, libc::MADV_NOHUGEPAGE))?,
        Kind::Tables => {
            descriptors(100)?;
            children(size, || descriptors(100))?;
        }
        Kind::Connections => connections(size)?,
    }
    File::create(&arguments.ready).context("cannot say that everything is there")?;
    loop {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn memory(length: usize, advice: i32) -> anyhow::Result<()> {
    let start = map(length, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: the mapping was just made, is of that length and never unmapped.
    let words = unsafe {
        libc::madvise(start, length, advice);
        std::slice::from_raw_parts_mut(start.cast::<u64>(), length / 8)
    };
    let mut x = 88_172_645_463_325_252u64;
    for word in words {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *word = x;
    }
    Ok(())
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
                std::thread::sleep(Duration::from_secs(1));
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

fn map(length: usize, protection: i32) -> anyhow::Result<*mut libc::c_void> {
    // SAFETY: a new mapping wherever the kernel likes.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    anyhow::ensure!(start != libc::MAP_FAILED, "no memory");
    Ok(start)
}
