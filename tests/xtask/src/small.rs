//! Bounds of what is done with a small process: what the kernel is asked for at the least, one call after the other.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::bounds::{Ground, MADV_POPULATE_WRITE, in_child, succeeds, version};
use crate::command::ms;
use crate::inquiry::on;
use crate::raw;
use crate::victim::{Kind, map};

const SIZE: usize = 4 << 20;
/// How often code is run in it: to map what is run, to run it, to unmap it.
const ENTRIES: usize = 3;
/// Files beside the contents: of the process, of what it has open, of where pages are, and one that names them all.
const FILES: usize = 4;

/// It is stopped, its map is read with the flags of areas, it runs and stops again for as often as it is entered, and its
/// memory is copied; then it runs on. From the first stop until then.
pub(crate) fn frozen(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let mut room = vec![1u8; SIZE];
    on(Kind::Memory, SIZE >> 20, ground, |pid| stand(pid, &mut room).map(|(_, frozen)| frozen))
}

/// A program is started that does nothing; the same, and the contents are written to a new directory.
pub(crate) fn dump(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let mut room = vec![1u8; SIZE];
    on(Kind::Memory, SIZE >> 20, ground, |pid| {
        let (partial, dir) = (ground.dir.join("partial"), ground.dir.join("small"));
        for left in [&partial, &dir] {
            let _absent = fs::remove_dir_all(left);
        }
        let begin = Instant::now();
        succeeds(&mut version(ground))?;
        let started = ms(begin.elapsed());
        let (stood, _) = stand(pid, &mut room)?;
        let begin = Instant::now();
        fs::create_dir(&partial)?;
        File::create(partial.join("pages"))?.write_all_at(&room, 0)?;
        for i in 0..FILES {
            File::create(partial.join(i.to_string()))?.write_all_at(&room[..4096], 0)?;
        }
        fs::rename(&partial, &dir)?;
        let took = started + stood + ms(begin.elapsed());
        fs::remove_dir_all(&dir)?;
        Ok(took)
    })
}

/// A program is started that does nothing; a process is forked, traced, makes its memory, and reads it from a file.
pub(crate) fn restore(ground: &Ground<'_>) -> anyhow::Result<Vec<f64>> {
    let path = ground.dir.join("small");
    fs::write(&path, vec![7; SIZE])?;
    let contents = File::open(&path)?;
    let samples = (0..ground.rounds)
        .map(|_| {
            let begin = Instant::now();
            succeeds(&mut version(ground))?;
            let started = ms(begin.elapsed());
            Ok(started + in_child(|| make(&contents))?)
        })
        .collect();
    fs::remove_file(&path)?;
    samples
}

/// How long all of it takes, and how long the process stands.
fn stand(pid: i32, room: &mut [u8]) -> anyhow::Result<(f64, f64)> {
    let mut text = vec![0; 64 << 10];
    let start = largest(pid)?;
    let begin = Instant::now();
    // SAFETY: requests with numbers; no status is asked for.
    let stop = || unsafe {
        libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0);
        libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
    };
    // SAFETY: as above.
    ensure!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } == 0, "PTRACE_SEIZE has failed");
    stop();
    let frozen = Instant::now();
    let mut maps = File::open(format!("/proc/{pid}/smaps"))?;
    while maps.read(&mut text)? > 0 {}
    for _ in 0..ENTRIES {
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, 0) };
        stop();
    }
    let got = raw::read_memory(pid, start, room);
    let frozen = ms(frozen.elapsed());
    // SAFETY: as above.
    unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0) };
    ensure!(got == room.len() as isize, "process_vm_readv: {got}");
    Ok((ms(begin.elapsed()), frozen))
}

/// Where the largest area of a process that can be written begins.
fn largest(pid: i32) -> anyhow::Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let areas = maps.lines().filter(|l| l.contains(" rw-p ")).filter_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    });
    areas.max_by_key(|(start, end)| end - start).map(|(start, _)| start).context("no memory")
}

/// A child makes its memory, and says so.
fn make(contents: &File) -> anyhow::Result<f64> {
    let mut ends = [0i32; 2];
    let begin = Instant::now();
    // SAFETY: pipe fills two ints; this process has one thread; the memory is made and used by the child only.
    unsafe {
        libc::pipe(ends.as_mut_ptr());
        let child = libc::fork();
        if child == 0 {
            let Ok(area) = map(SIZE, libc::PROT_READ | libc::PROT_WRITE) else { libc::_exit(1) };
            libc::madvise(area, SIZE, MADV_POPULATE_WRITE);
            if libc::pread(contents.as_raw_fd(), area, SIZE, 0) != SIZE as isize {
                libc::_exit(1);
            }
            libc::write(ends[1], c"x".as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        libc::close(ends[1]);
        libc::ptrace(libc::PTRACE_SEIZE, child, 0, libc::PTRACE_O_EXITKILL);
        let mut byte = 0u8;
        ensure!(libc::read(ends[0], (&raw mut byte).cast(), 1) == 1, "a process has failed");
        libc::ptrace(libc::PTRACE_INTERRUPT, child, 0, 0);
        libc::waitpid(child, std::ptr::null_mut(), libc::__WALL);
        libc::ptrace(libc::PTRACE_DETACH, child, 0, 0);
        let took = ms(begin.elapsed());
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
        Ok(took)
    }
}
