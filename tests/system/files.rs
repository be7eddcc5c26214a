//! Files that live as long as the program, and rules for those that do not.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use torpor_tests::{Outcome, Victim, ensure, run_torpor, state};

const USAGE: i32 = 2;
const REFUSED: i32 = 5;
const CONFLICT: i32 = 8;

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("files: ", $name), || Ok($test()?))),*] };
    }
    all![
        "scratch files that nobody touches" => untouched,
        "scratch files that are wiped" => wiped,
        "files on tmpfs that change are put back" => put_back,
        "a restore that fails leaves no file, directory or change behind" => undone,
        "a restore beside the living program does not touch its memory on tmpfs" => beside,
        "rule save: made again, and put back" => saved,
        "rule keep: nothing is made again" => kept,
        "rule truncate: a log is cut back" => truncated,
        "scratch files too large to be saved are named" => large,
        "a file on tmpfs that two processes map and none has open" => pair,
        "the last rule decides" => order,
        "rules that cannot be understood" => bad_rules,
        "a name in another directory is refused" => linked,
        "a file of /proc about another process is refused" => || refused("other", &["/proc/1/status", "not part of the dump"]),
        "leases" => leases,
        "a lease that is being broken, or on a file in memory, is refused" => leases_refused,
    ]
}

/// The victim `scratch`, and its directory on tmpfs.
struct Scratch {
    victim: Victim,
    memory: tempfile::TempDir,
}

impl Scratch {
    /// `None`, said so, where there is no tmpfs.
    fn start(what: &str) -> Outcome<Option<Scratch>> {
        let Ok(memory) = tempfile::Builder::new().prefix("torpor-test-").tempdir_in("/dev/shm") else {
            eprintln!("skipped: no /dev/shm here");
            return Ok(None);
        };
        let mut victim = Victim::prepare()?;
        fs::write(victim.home().join("given"), "given").map_err(text)?;
        let mut command = std::process::Command::new(torpor_tests::victim("scratch")?);
        command.arg(victim.log()).arg(victim.home()).arg(memory.path()).arg(what);
        let null = std::process::Stdio::null;
        command.stdin(null()).stdout(null()).stderr(null());
        victim.spawn(&mut command)?;
        victim.ticks(3)?;
        Ok(Some(Scratch { victim, memory }))
    }

    fn given(&self) -> PathBuf {
        self.victim.home().join("given")
    }

    /// What a reboot does to such files.
    fn wipe(&self) -> Outcome {
        fs::remove_dir_all(self.victim.home().join("run")).map_err(text)?;
        for entry in fs::read_dir(self.memory.path()).map_err(text)?.flatten() {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(text)?;
        }
        Ok(())
    }

    /// All there is in both directories, with kind, mode, owner and time.
    fn list(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut todo = vec![self.victim.home(), self.memory.path().to_owned()];
        while let Some(path) = todo.pop() {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            all.push(format!(
                "{} {:o} {}:{} {}",
                path.display(),
                meta.mode(),
                meta.uid(),
                meta.gid(),
                if meta.is_dir() { 0 } else { meta.size() }
            ));
            todo.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
        }
        all.sort();
        all
    }

    fn fails(&self, image: &Path, words: &[&str]) -> Outcome {
        let said = run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])?.expect(CONFLICT)?;
        for word in words {
            ensure!(said.contains(word), "it does not say `{word}`: {said}");
        }
        Ok(())
    }
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// Runs `test` with a victim, unless there is no tmpfs.
fn with(what: &str, test: impl FnOnce(&mut Scratch) -> Outcome) -> Outcome {
    Scratch::start(what)?.map_or(Ok(()), |mut scratch| test(&mut scratch))
}

fn untouched() -> Outcome {
    with("given", |s| {
        s.victim.dump_with(&["--leave-running"])?;
        s.victim.ticks(2)?;
        s.victim.cycles(4)
    })
}

fn wiped() -> Outcome {
    with("", |s| {
        for round in 1..=3 {
            let at = |e: String| format!("round {round}: {e}");
            let before = s.list();
            let image = s.victim.dump().map_err(at)?;
            // The second time they stay, so that the third dump finds files older than the process.
            if round != 2 {
                s.wipe()?;
            }
            s.victim.restore(&image).map_err(at)?;
            s.victim.ticks(6).map_err(at)?;
            let after = s.list();
            let shown = fs::read_to_string(s.memory.path().join("shown")).map_err(text)?;
            ensure!(shown == "as it was", "a file that it reads says {shown:?}");
            ensure!(before == after, "round {round}: before {before:#?}, after {after:#?}");
        }
        Ok(())
    })
}

fn put_back() -> Outcome {
    with("", |s| {
        let segment = s.memory.path().join("a/b/segment");
        let held = s.memory.path().join("held");
        let open = |p: &Path| fs::File::options().write(true).open(p).map_err(text);
        for round in 1..=3 {
            let at = |e: String| format!("round {round}: {e}");
            let image = s.victim.dump().map_err(at)?;
            // What it only reads is others' to write.
            fs::write(s.memory.path().join("shown"), format!("news no {round}")).map_err(text)?;
            match round {
                1 => open(&segment)?.write_all_at(b"something else", 8192).map_err(text)?,
                2 => {
                    open(&segment)?.set_len(100).map_err(text)?;
                    open(&held)?.write_all_at(&[7; 3000], (48 << 20) - 1000).map_err(text)?;
                }
                _ => {
                    open(&segment)?.write_all_at(b"behind its end", 1 << 20).map_err(text)?;
                    open(&held)?.set_len(0).map_err(text)?;
                }
            }
            s.victim.restore(&image).map_err(at)?;
            s.victim.ticks(4).map_err(at)?;
            let shown = fs::read_to_string(s.memory.path().join("shown")).map_err(text)?;
            ensure!(shown == format!("news no {round}"), "what others wrote was taken back: {shown}");
        }
        Ok(())
    })
}

fn undone() -> Outcome {
    with("given", |s| {
        let rules = s.victim.dir.path().join("rules");
        fs::write(&rules, "keep **/given\n").map_err(text)?;
        let image = s.victim.dump_with(&["--files", rules.to_str().ok_or("a path")?])?;
        s.victim.reap()?;
        let aside = s.victim.dir.path().join("aside");
        fs::rename(s.given(), &aside).map_err(text)?;
        for wipe in [false, true] {
            if wipe {
                s.wipe()?;
            }
            let segment = s.memory.path().join("a/b/segment");
            if !wipe {
                fs::write(&segment, "spoilt").map_err(text)?;
            }
            let before = s.list();
            s.fails(&image, &["given", "gone"])?;
            ensure!(before == s.list(), "before {before:#?}, after {:#?}", s.list());
            ensure!(wipe || fs::read(&segment).is_ok_and(|t| t == b"spoilt"), "it was put back");
        }
        fs::rename(&aside, s.given()).map_err(text)?;
        // Later, when the files were made already: the pid is taken.
        let holder = Holder::take(s.victim.pid)?;
        let before = s.list();
        s.fails(&image, &[&s.victim.pid.to_string()])?;
        ensure!(before == s.list(), "pid taken: before {before:#?}, after {:#?}", s.list());
        drop(holder);
        s.victim.restore(&image)?;
        s.victim.ticks(4)
    })
}

/// A process that has a certain pid.
struct Holder(i32);

impl Holder {
    fn take(pid: i32) -> Outcome<Holder> {
        // SAFETY: clone3 with these arguments is a fork; the child only waits to be killed.
        let got = unsafe {
            let tids = [pid];
            let mut args: libc::clone_args = std::mem::zeroed();
            args.exit_signal = libc::SIGCHLD as u64;
            args.set_tid = tids.as_ptr() as u64;
            args.set_tid_size = 1;
            let got = libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>());
            if got == 0 {
                loop {
                    libc::pause();
                }
            }
            got
        };
        ensure!(got == i64::from(pid), "clone3: {}", std::io::Error::last_os_error());
        Ok(Holder(pid))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: both take numbers; the process is a child of ours.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

fn beside() -> Outcome {
    with("", |s| {
        let image = s.victim.dump_with(&["--leave-running"])?;
        for _ in 0..5 {
            s.victim.ticks(1)?;
            s.fails(&image, &[&s.victim.pid.to_string()])?;
        }
        s.victim.ticks(2)
    })
}

fn saved() -> Outcome {
    with("given", |s| {
        for content in [None, Some("taken"), Some("something longer"), Some("")] {
            let image = s.victim.dump_with(&["--save-files", "**/given"])?;
            s.victim.reap()?;
            match content {
                None => fs::remove_file(s.given()).map_err(text)?,
                Some(content) => fs::write(s.given(), content).map_err(text)?,
            }
            s.victim.restore(&image).map_err(|e| format!("{content:?}: {e}"))?;
            s.victim.ticks(4).map_err(|e| format!("{content:?}: {e}"))?;
        }
        Ok(())
    })
}

fn kept() -> Outcome {
    with("", |s| {
        let rules = s.victim.dir.path().join("rules");
        fs::write(&rules, "# all of it\nkeep **").map_err(text)?;
        let image = s.victim.dump_with(&["--files", rules.to_str().ok_or("a path")?])?;
        s.victim.reap()?;
        for (what, path) in [
            ("held", s.memory.path().join("held")),
            ("small", s.victim.home().join("run/small")),
            ("fifo", s.victim.home().join("run/fifo")),
            ("open", s.victim.home().join("run/open")),
        ] {
            let aside = s.victim.dir.path().join("aside");
            let back = fs::rename(&path, &aside).is_ok();
            let bytes = if back { None } else { Some(fs::read(&path).map_err(text)?) };
            if !back {
                // Another file system.
                fs::remove_file(&path).map_err(text)?;
            }
            s.fails(&image, &[what, "gone"])?;
            ensure!(!path.exists(), "{what} was made again");
            match bytes {
                None => fs::rename(&aside, &path).map_err(text)?,
                Some(bytes) => fs::write(&path, bytes).map_err(text)?,
            }
        }
        Ok(())
    })
}

fn truncated() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump_with(&["--leave-running", "--truncate-files", "**/log"])?;
    let restore = |victim: &mut Victim| {
        let size = fs::metadata(victim.log()).map_err(text)?.len();
        victim.restore_with(&["--stopped"], &image)?;
        let cut = fs::metadata(victim.log()).map_err(text)?.len();
        ensure!(cut < size, "the log had {size} bytes and has {cut}");
        let log = fs::read_to_string(victim.log()).map_err(text)?;
        // SAFETY: kill takes numbers; the process is a child of ours.
        unsafe { libc::kill(victim.pid, libc::SIGCONT) };
        victim.ticks(5)?;
        let ticks = |text: &str| text.lines().filter_map(|l| l.strip_prefix("tick ")?.parse().ok()).collect();
        let all: Vec<u64> = ticks(&fs::read_to_string(victim.log()).map_err(text)?);
        ensure!(all.windows(2).all(|w| w[1] == w[0] + 1), "ticks {all:?}");
        Ok(log.len() as u64)
    };
    victim.ticks(5)?;
    victim.kill();
    let cut = restore(&mut victim)?;
    victim.kill();
    ensure!(restore(&mut victim)? == cut, "the second time it was cut elsewhere");
    victim.kill();
    // A restore that fails cuts nothing.
    let size = |victim: &Victim| fs::metadata(victim.log()).map(|m| m.len()).map_err(text);
    let before = size(&victim)?;
    let holder = Holder::take(victim.pid)?;
    run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])?.expect(CONFLICT)?;
    drop(holder);
    ensure!(size(&victim)? == before, "it was cut");
    fs::File::options().write(true).open(victim.log()).and_then(|f| f.set_len(cut - 1)).map_err(text)?;
    let said = run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])?.expect(CONFLICT)?;
    ensure!(said.contains(&format!("had {cut} bytes")), "a log that is too short: {said}");
    ensure!(state(victim.pid).is_none(), "a process is left");
    Ok(())
}

fn large() -> Outcome {
    with("large", |s| {
        let image = s.victim.dump()?;
        let said = run_torpor(&["restore", "--plan", image.to_str().ok_or("a path")?])?.expect(0)?;
        ensure!(said.contains("not in the image") && said.contains("home/large"), "it says: {said}");
        let large = s.victim.home().join("large");
        let aside = s.victim.dir.path().join("aside");
        fs::rename(&large, &aside).map_err(text)?;
        s.wipe()?;
        s.fails(&image, &["large", "gone"])?;
        fs::rename(&aside, &large).map_err(text)?;
        s.victim.restore(&image)?;
        s.victim.ticks(2)
    })
}

fn pair() -> Outcome {
    with("pair", |s| {
        let log = fs::read_to_string(s.victim.log()).map_err(text)?;
        let child = log.lines().find_map(|l| l.strip_prefix("child ")).and_then(|p| p.parse::<i32>().ok());
        let child = child.ok_or("no child")?;
        for round in 1..=2 {
            let at = |e: String| format!("round {round}: {e}");
            let image = s.victim.dump().map_err(at)?;
            // SAFETY: no status is asked for. The child is ours by now, as its parent is gone.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            s.wipe()?;
            s.victim.restore(&image).map_err(at)?;
            s.victim.ticks(6).map_err(at)?;
        }
        s.victim.kill();
        // SAFETY: as above; it dies with its parent.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        Ok(())
    })
}

fn order() -> Outcome {
    with("given", |s| {
        let rules = s.victim.dir.path().join("rules");
        let given = s.given().display().to_string();
        fs::write(&rules, format!("save **\n\n  keep {given}\n# save {given}\n")).map_err(text)?;
        let rules = rules.to_str().ok_or("a path")?.to_owned();
        let image = s.victim.dump_with(&["--files", &rules])?;
        s.victim.reap()?;
        fs::remove_file(s.given()).map_err(text)?;
        s.fails(&image, &["given", "gone"])?;
        fs::write(s.given(), "given").map_err(text)?;
        s.victim.restore(&image)?;
        s.victim.ticks(2)?;
        // A flag goes before the file.
        let image = s.victim.dump_with(&["--files", &rules, "--save-files", &given])?;
        s.victim.reap()?;
        fs::remove_file(s.given()).map_err(text)?;
        s.victim.restore(&image)?;
        s.victim.ticks(2)
    })
}

fn bad_rules() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let rules = victim.dir.path().join("rules");
    let rules = rules.to_str().ok_or("a path")?.to_owned();
    let (pid, image) = (victim.pid.to_string(), victim.image());
    let image = image.to_str().ok_or("a path")?;
    for (content, word) in [
        (Some("keep /a\nloose /b"), "line 2: `loose` is not one of keep, save, truncate"),
        (Some("save"), "line 1: `save` has no path"),
        (Some("# x\n\nsave here"), "line 3: `here` is no absolute path"),
        (Some("save /a[b"), "line 1: `/a[b` has a `[` without its `]`"),
        (None, "cannot read the rules"),
    ] {
        match content {
            Some(content) => fs::write(&rules, content).map_err(text)?,
            None => fs::remove_file(&rules).map_err(text)?,
        }
        let said = run_torpor(&["dump", "--files", &rules, &pid, image])?.expect(USAGE)?;
        ensure!(said.contains(word) && said.contains(&rules), "it does not say `{word}`: {said}");
    }
    for flag in ["--save-files", "--truncate-files"] {
        let said = run_torpor(&["dump", flag, "here", &pid, image])?.expect(USAGE)?;
        ensure!(said.contains("`here` is no absolute path") && said.contains(flag), "{flag}: {said}");
    }
    ensure!(!Path::new(image).exists(), "it left a directory");
    victim.ticks(2)
}

fn refused(what: &str, words: &[&str]) -> Outcome {
    with(what, |s| {
        let (pid, image) = (s.victim.pid.to_string(), s.victim.image());
        let image = image.to_str().ok_or("a path")?;
        let said = run_torpor(&["dump", &pid, image])?.expect(REFUSED)?;
        for word in words {
            ensure!(said.contains(word), "it does not say `{word}`: {said}");
        }
        ensure!(!Path::new(image).exists(), "it left a directory");
        s.victim.ticks(2)
    })
}

fn linked() -> Outcome {
    with("linked", |s| {
        let (pid, image) = (s.victim.pid.to_string(), s.victim.image());
        let said = run_torpor(&["dump", &pid, image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
        ensure!(said.contains("not in the same directory") && said.contains("here"), "it says: {said}");
        s.victim.ticks(2)?;
        // As it advises.
        fs::rename(s.victim.home().join("run/there"), s.victim.home().join("here-again")).map_err(text)?;
        s.victim.cycles(2)
    })
}

fn leases() -> Outcome {
    let mut victim = Victim::start("lease", &[])?;
    let stat = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(victim.home()).output();
    if stat.is_ok_and(|said| said.stdout.starts_with(b"tmpfs")) {
        eprintln!("skipped: the files of tests are in memory here");
        return Ok(());
    }
    for _ in 0..3 {
        victim.dump_with(&["--leave-running"])?;
        victim.ticks(1)?;
    }
    victim.cycles(3)?;
    // Whoever wants the file now is kept waiting, and the victim is told.
    fs::write(victim.home().join("break"), "").map_err(text)?;
    victim.ticks(5)?;
    let log = fs::read_to_string(victim.log()).map_err(text)?;
    ensure!(log.contains("broken"), "nobody broke its lease");
    Ok(())
}

fn leases_refused() -> Outcome {
    for (what, why) in [("breaking", "being broken"), ("memory", "in memory only")] {
        let mut victim = Victim::start("lease", &[what])?;
        let image = victim.image();
        let said = run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?;
        let _cleared_away = fs::remove_file(format!("/dev/shm/torpor-lease-{}", victim.pid));
        let said = said.expect(REFUSED)?;
        ensure!(said.contains(why) && said.contains("F_UNLCK"), "it says: {said}");
        victim.ticks(2)?;
    }
    Ok(())
}
