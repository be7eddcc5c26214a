//! System V IPC and POSIX message queues, which outlive the processes that use them.

use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use torpor_kernel::sysv;
use torpor_tests::ipc::{Objects, queue_name, remove};
use torpor_tests::{Outcome, Said, Victim, ensure, run_torpor};

const REFUSED: i32 = 5;
const CONFLICT: i32 = 8;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    let victims: [(&str, &[&str], &str); 6] = [
        ("sysv_shm", &[], "System V shared memory"),
        ("sysv_sem", &[], "System V semaphores"),
        ("sysv_sem", &["undo"], "semaphore adjustments"),
        ("sysv_msg", &[], "System V message queues"),
        ("mqueue", &[], "POSIX message queues"),
        ("ipc_tree", &[], "everything between processes of a tree"),
    ];
    for (victim, args, about) in victims {
        trials.extend([
            Trial::test(format!("ipc: {about}, still there at the restore"), move || {
                Ok(there(victim, args)?)
            }),
            Trial::test(format!("ipc: {about}, gone by the restore"), move || Ok(gone(victim, args)?)),
            Trial::test(format!("ipc: {about}, restored twice"), move || Ok(twice(victim, args)?)),
            Trial::test(format!("ipc: {about}, left running"), move || Ok(left_running(victim, args)?)),
        ]);
    }
    trials.extend([
        Trial::test("ipc: adjustments are applied when the restored process ends", || Ok(applied()?)),
        Trial::test("ipc: shared with a process outside", || Ok(shared()?)),
        Trial::test("ipc: an id or key that is taken", || Ok(taken()?)),
        Trial::test("ipc: a notification of a message queue", || Ok(notified()?)),
        Trial::test("ipc: a notification that nobody is told of", || Ok(asked()?)),
        Trial::test("ipc: a restore that fails leaves no object", || Ok(failed()?)),
    ]);
    trials
}

/// A victim, unless it found no such thing here.
fn start(name: &str, args: &[&str]) -> Outcome<Option<Victim>> {
    let victim = Victim::start(name, args)?;
    let skipped = std::fs::read_to_string(victim.log()).is_ok_and(|t| t.contains("SKIP"));
    Ok((!skipped).then_some(victim))
}

/// Waits until the children that a victim has left are gone, too; they come to this process.
fn reap(victim: &Victim) -> Outcome {
    for _ in 0..5000 {
        // SAFETY: no status is asked for; victims are groups of their own.
        match unsafe { libc::waitpid(-victim.pid, std::ptr::null_mut(), libc::WNOHANG) } {
            -1 => return Ok(()),
            0 => std::thread::sleep(std::time::Duration::from_millis(1)),
            _ => {}
        }
    }
    Err("children of the victim do not end".into())
}

fn dumped(victim: &mut Victim) -> Outcome<PathBuf> {
    let image = victim.dump()?;
    reap(victim)?;
    Ok(image)
}

fn there(name: &str, args: &[&str]) -> Outcome {
    let Some(mut victim) = start(name, args)? else { return Ok(()) };
    for _ in 0..2 {
        let image = dumped(&mut victim)?;
        victim.restore(&image)?;
        victim.ticks(6)?;
    }
    Ok(())
}

fn gone(name: &str, args: &[&str]) -> Outcome {
    let Some(mut victim) = start(name, args)? else { return Ok(()) };
    for _ in 0..2 {
        let image = dumped(&mut victim)?;
        remove(victim.pid);
        ensure!(Objects::of(victim.pid).is_empty(), "objects of the victim are left");
        victim.restore(&image)?;
        victim.ticks(4)?;
    }
    Ok(())
}

fn twice(name: &str, args: &[&str]) -> Outcome {
    let Some(mut victim) = start(name, args)? else { return Ok(()) };
    let image = dumped(&mut victim)?;
    for n in 0..3 {
        if n == 1 {
            remove(victim.pid);
        }
        // Its log grew since the dump.
        victim.restore_with(&["--accept-changed"], &image)?;
        victim.ticks(4)?;
        victim.kill();
        reap(&victim)?;
    }
    Ok(())
}

fn left_running(name: &str, args: &[&str]) -> Outcome {
    let Some(mut victim) = start(name, args)? else { return Ok(()) };
    for _ in 0..5 {
        victim.dump_with(&["--leave-running"])?;
        victim.ticks(2)?;
    }
    let image = dumped(&mut victim)?;
    victim.restore(&image)?;
    victim.ticks(2)
}

fn applied() -> Outcome {
    let Some(mut victim) = start("sysv_sem", &["undo"])? else { return Ok(()) };
    let pid = victim.pid;
    let image = victim.dump()?;
    remove(pid);
    victim.restore(&image)?;
    victim.ticks(2)?;
    victim.kill();
    let sets = Objects::of(pid).sets;
    let values: Vec<Vec<u16>> = sets.iter().filter_map(|id| sysv::values(*id, 8).ok()).collect();
    ensure!(values.iter().any(|v| v[..3] == [5, 32767, 0] && v[5..7] == [1000, 9]), "values {values:?}");
    Ok(())
}

fn dump(victim: &mut Victim) -> Outcome<Said> {
    let image = victim.image();
    run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])
}

fn expect(text: &str, words: &[&str]) -> Outcome {
    for word in words {
        ensure!(text.contains(word), "it does not say `{word}`:\n{text}");
    }
    Ok(())
}

/// This process takes part in what the victim has.
fn shared() -> Outcome {
    let this = format!("pid {}", std::process::id());
    if let Some(mut victim) = start("sysv_shm", &[])? {
        let objects = Objects::of(victim.pid);
        // One that the victim does not count the attachments of.
        let small = |s: &&sysv::Segment| s.size == 4096 && objects.segments.contains(&s.id);
        let all = sysv::segments().map_err(|e| e.to_string())?;
        let id = all.iter().find(small).ok_or("no segment")?.id;
        let attached = sysv::Attached::new(id, 1, false).map_err(|e| e.to_string())?;
        expect(&dump(&mut victim)?.expect(REFUSED)?, &["System V segment", "also attached by", &this])?;
        drop(attached);
        victim.cycles(1)?;
    }
    if let Some(mut victim) = start("sysv_sem", &[])? {
        let objects = Objects::of(victim.pid);
        // SAFETY: sets a value that nobody looks at.
        let set = objects.sets.iter().any(|id| unsafe { libc::semctl(*id, 7, libc::SETVAL, 1) } == 0);
        ensure!(set, "no set of eight");
        expect(&dump(&mut victim)?.expect(REFUSED)?, &["System V semaphore set", "also used by", &this])?;
        victim.ticks(2)?;
    }
    if let Some(mut victim) = start("mqueue", &[])? {
        let name = queue_name(victim.pid);
        // SAFETY: the name ends with a zero.
        let fd = unsafe { libc::mq_open(name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        ensure!(fd >= 0, "mq_open");
        let said = dump(&mut victim)?;
        // SAFETY: a descriptor of our own.
        unsafe { libc::close(fd) };
        expect(&said.expect(REFUSED)?, &["it is also open in", &this])?;
        victim.cycles(1)?;
    }
    Ok(())
}

fn taken() -> Outcome {
    let Some(mut victim) = start("sysv_shm", &[])? else { return Ok(()) };
    let pid = victim.pid;
    let image = victim.dump()?;
    remove(pid);
    let key = 0x7000_0000 + pid;
    // SAFETY: a segment of our own.
    let id = unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) };
    ensure!(id >= 0, "shmget");
    let said = restore(&image);
    // SAFETY: as above.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    let this = format!("pid {}", std::process::id());
    expect(&said?.expect(CONFLICT)?, &["System V segment", "its key is that of another object", &this])?;
    ensure!(Objects::of(pid).is_empty(), "the failed restore left objects");
    victim.restore(&image)?;
    victim.ticks(2)
}

fn restore(image: &Path) -> Outcome<Said> {
    run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])
}

fn notified() -> Outcome {
    let Some(mut victim) = start("mqueue", &["notify"])? else { return Ok(()) };
    expect(&dump(&mut victim)?.expect(REFUSED)?, &["-empty", "mq_notify", "with which value"])?;
    victim.ticks(2)
}

/// Nobody is told, so nothing is lost.
fn asked() -> Outcome {
    let Some(mut victim) = start("mqnotify", &[])? else { return Ok(()) };
    for _ in 0..3 {
        victim.dump_with(&["--leave-running"])?;
        victim.ticks(2)?;
    }
    victim.cycles(3)?;
    let Some(mut victim) = start("mqnotify", &["full"])? else { return Ok(()) };
    expect(&dump(&mut victim)?.expect(REFUSED)?, &["mq_notify", "messages are in it"])?;
    victim.ticks(2)
}

/// The log grew, which is found out when everything of IPC stands already.
fn failed() -> Outcome {
    for (name, args) in [("sysv_shm", &[][..]), ("sysv_sem", &["undo"]), ("sysv_msg", &[]), ("mqueue", &[])] {
        let Some(mut victim) = start(name, args)? else { continue };
        let pid = victim.pid;
        let image = victim.dump()?;
        remove(pid);
        std::fs::write(victim.log(), "tick\n").map_err(|e| e.to_string())?;
        restore(&image)?.expect(CONFLICT)?;
        ensure!(Objects::of(pid).is_empty(), "{name}: the failed restore left objects");
        let name = queue_name(pid);
        // SAFETY: the name ends with a zero.
        let left = unsafe { libc::mq_open(name.as_ptr(), libc::O_RDONLY) };
        ensure!(left < 0, "the failed restore left a queue");
    }
    Ok(())
}
