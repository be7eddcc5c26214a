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

fn map(length: usize, protection: i32) -> anyhow::Result<*mut libc::c_void> {
    // SAFETY: a new mapping wherever the kernel likes.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    anyhow::ensure!(start != libc::MAP_FAILED, "no memory");
    Ok(start)
}
