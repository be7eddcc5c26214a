//! Many threads, of which most are not entered: what is read of them is what they would say.

use std::path::Path;
use std::process::Command;

use libtest_mimic::Trial;
use torpor_image::Image;
use torpor_image::thread::Thread;
use torpor_tests::{Outcome, Victim, ensure, run, torpor};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("threads: ninety that differ", || Ok(Victim::start("troop", &[])?.cycles(3)?)),
        Trial::test("threads: read and asked, they say the same", || Ok(read_and_asked()?)),
    ]
}

/// All of a thread but what changes as it runs.
fn threads(image: &Path) -> Outcome<Vec<Thread>> {
    let mut image = Image::open(image).map_err(|e| e.to_string())?;
    let mut all = std::mem::take(&mut image.tasks[0].threads);
    for thread in &mut all {
        thread.registers = Default::default();
        thread.xstate = Default::default();
    }
    Ok(all)
}

fn read_and_asked() -> Outcome {
    let mut victim = Victim::start("troop", &[])?;
    victim.ticks(1)?;
    let options = ["--leave-running", "--truncate-files", "**/log"];
    let read = victim.dump_with(&options)?;
    let asked = victim.image();
    // Without these nobody reads the kernel's memory.
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-sys_admin,-bpf,-perfmon").arg(torpor()).arg("dump").args(options);
    run(command.arg(victim.pid.to_string()).arg(&asked))?.expect(0)?;
    let (read, asked) = (threads(&read)?, threads(&asked)?);
    ensure!(read.len() == 91, "{} threads", read.len());
    for (read, asked) in read.iter().zip(&asked) {
        ensure!(read == asked, "read:\n{read:?}\nasked:\n{asked:?}");
    }
    victim.ticks(2)
}
