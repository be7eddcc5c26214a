//! Images that are compressed and encrypted.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use age::secrecy::ExposeSecret;
use libtest_mimic::Trial;
use torpor_tests::{
    Outcome, PATIENCE, Victim, difference, ensure, light_picture, run, run_torpor, state, torpor,
};

const DAMAGED: i32 = 6;
const KEY: i32 = 11;

/// Names and options of a dump; `encrypt` stands for an option that takes a key.
const WAYS: &[(&str, &[&str])] = &[
    ("lz4", &["--compress", "lz4"]),
    ("zstd", &["--compress", "zstd"]),
    ("age", &["encrypt"]),
    ("zstd and age", &["--compress", "zstd", "encrypt"]),
    ("lz4 and age", &["--compress", "lz4", "encrypt"]),
];

/// Victims, and what they are.
const VICTIMS: &[(&str, &[&str], &str)] =
    &[("kitchen", &[], "a bit of everything"), ("cow", &[], "pages shared copy-on-write")];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(way, options) in WAYS {
        for &(victim, args, about) in VICTIMS {
            trials.push(Trial::test(format!("encoding: {way}: {about}"), move || {
                Ok(cycles(options, victim, args)?)
            }));
            trials.push(Trial::test(format!("encoding: {way}, left running: {about}"), move || {
                Ok(left_running(options, victim, args)?)
            }));
        }
        trials.push(Trial::test(
            format!("encoding: {way}: damage is found before anything is made"),
            move || Ok(damaged(options)?),
        ));
    }
    for (way, options) in [&[("raw", &[][..])][..], WAYS].concat() {
        for &(victim, args, about) in VICTIMS {
            trials.push(Trial::test(format!("stream: {way}: {about}"), move || {
                Ok(stream(options, victim, args)?)
            }));
        }
    }
    trials.extend([
        Trial::test("stream: a large process", || Ok(stream(&["--compress", "lz4"], "large", &["150"])?)),
        Trial::test("stream: a reader that goes away", || Ok(broken_pipe()?)),
        Trial::test("stream: what is cut off or damaged leaves nothing", || Ok(bad_streams()?)),
        Trial::test("encoding: without its key an encrypted image is nothing", || Ok(keys()?)),
        Trial::test("encoding: an image builds on one that is encoded otherwise", || Ok(chain()?)),
        Trial::test("encoding: memory without a stage is encoded as well", || Ok(unstaged()?)),
    ]);
    trials
}

/// A key, in a file and as a recipient.
struct Key {
    file: PathBuf,
    recipient: String,
}

impl Key {
    fn make(dir: &Path, name: &str) -> Outcome<Key> {
        let identity = age::x25519::Identity::generate();
        let file = dir.join(name);
        fs::write(&file, identity.to_string().expose_secret()).map_err(|e| e.to_string())?;
        Ok(Key { file, recipient: identity.to_public().to_string() })
    }
}

/// A victim that is dumped in some way.
struct Encoded {
    victim: Victim,
    key: Key,
    dump: Vec<String>,
    restore: Vec<String>,
}

impl Encoded {
    fn start(options: &[&str], name: &str, args: &[&str]) -> Outcome<Encoded> {
        let victim = Victim::start(name, args)?;
        let key = Key::make(victim.dir.path(), "key")?;
        let mut dump = Vec::new();
        let mut restore = Vec::new();
        for option in options {
            if *option == "encrypt" {
                dump.extend(["--encrypt".to_owned(), key.recipient.clone()]);
                restore.extend(["--identity".to_owned(), key.file.display().to_string()]);
            } else {
                dump.push((*option).to_owned());
            }
        }
        Ok(Encoded { victim, key, dump, restore })
    }

    fn dump(&mut self, more: &[&str]) -> Outcome<PathBuf> {
        let options: Vec<&str> = self.dump.iter().map(String::as_str).chain(more.iter().copied()).collect();
        self.victim.dump_with(&options)
    }

    fn restore(&mut self, image: &Path) -> Outcome {
        let mut options: Vec<&str> = self.restore.iter().map(String::as_str).collect();
        // Its log grew since the dump.
        options.push("--accept-changed");
        self.victim.restore_with(&options, image)
    }

    fn run(&self, command: &[&str], image: &Path) -> Outcome<torpor_tests::Said> {
        let mut args: Vec<&str> = command.to_vec();
        args.extend(self.restore.iter().map(String::as_str));
        args.push(image.to_str().ok_or("a path")?);
        run_torpor(&args)
    }
}

/// One image, restored twice, and another round.
fn cycles(options: &[&str], name: &str, args: &[&str]) -> Outcome {
    let mut it = Encoded::start(options, name, args)?;
    for round in 1..=2 {
        let at = |e: String| format!("round {round}: {e}");
        let before = torpor_tests::members(it.victim.pid);
        let image = it.dump(&[]).map_err(at)?;
        it.victim.gone(before).map_err(at)?;
        plain_names(&image, options)?;
        it.run(&["verify"], &image)?.expect(0).map_err(at)?;
        it.run(&["show"], &image)?.expect(0).map_err(at)?;
        it.restore(&image).map_err(at)?;
        it.victim.ticks(4).map_err(at)?;
        it.victim.kill();
        it.restore(&image).map_err(at)?;
        it.victim.ticks(4).map_err(at)?;
    }
    Ok(())
}

/// An image that is to be encrypted has no file in it that is not.
fn plain_names(image: &Path, options: &[&str]) -> Outcome {
    let encrypted = options.contains(&"encrypt");
    for entry in fs::read_dir(image).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        ensure!(name.ends_with(".age") == encrypted, "{name}");
        let bytes = fs::read(entry.path()).map_err(|e| e.to_string())?;
        let readable = bytes.windows(6).any(|w| w == b"TORPOR");
        ensure!(!(readable && encrypted), "{name} can be read");
        ensure!(
            entry.metadata().is_ok_and(|m| m.permissions().mode() & 0o77 == 0),
            "{name} is open to others"
        );
    }
    Ok(())
}

fn left_running(options: &[&str], name: &str, args: &[&str]) -> Outcome {
    let mut it = Encoded::start(options, name, args)?;
    let mut last = PathBuf::new();
    for round in 1..=3 {
        last = it.dump(&["--leave-running"]).map_err(|e| format!("round {round}: {e}"))?;
        it.victim.ticks(2).map_err(|e| format!("after dump {round}: {e}"))?;
    }
    it.run(&["verify"], &last)?.expect(0)?;
    ensure!(
        fs::read_dir(&last)
            .is_ok_and(|d| d.flatten().all(|e| !e.file_name().to_string_lossy().starts_with('.'))),
        "it left something"
    );
    Ok(())
}

/// Every file of an image, flipped and cut off, here and there.
fn damaged(options: &[&str]) -> Outcome {
    let mut it = Encoded::start(options, "memory", &[])?;
    let image = it.dump(&["--leave-running"])?;
    it.victim.kill();
    let names: Vec<PathBuf> =
        fs::read_dir(&image).map_err(|e| e.to_string())?.flatten().map(|e| e.path()).collect();
    for path in names {
        let good = fs::read(&path).map_err(|e| e.to_string())?;
        let data = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pages-"));
        let places = [0, good.len() / 3, good.len() / 2, good.len() - 1];
        for at in places {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let name = path.display();
            fs::write(&path, &bad).map_err(|e| e.to_string())?;
            it.run(&["verify"], &image)?
                .expect(DAMAGED)
                .map_err(|e| format!("{name} flipped at {at}: {e}"))?;
            // What nobody reads is not missed: a restore reads what it needs.
            let said = it.run(&["restore", "--detach", "--accept-changed"], &image)?;
            ensure!(
                said.code() == DAMAGED || data && said.code() == 0,
                "{name} flipped at {at}: {} {}",
                said.code(),
                said.text
            );
            if said.code() == 0 {
                it.victim.restored();
                it.victim.kill();
            }
            ensure!(state(it.victim.pid).is_none(), "something of it is there");
            fs::write(&path, &good[..at]).map_err(|e| e.to_string())?;
            it.run(&["restore", "--detach"], &image)?
                .expect(DAMAGED)
                .map_err(|e| format!("{name} cut at {at}: {e}"))?;
        }
        fs::write(&path, &good).map_err(|e| e.to_string())?;
    }
    it.restore(&image)?;
    it.victim.ticks(3)
}

fn keys() -> Outcome {
    let mut it = Encoded::start(&["encrypt"], "ticker", &[])?;
    let before = light_picture(it.victim.pid);
    let wrong = run_torpor(&["dump", "--encrypt", "age1wrong", &it.victim.pid.to_string(), "/nowhere"])?;
    wrong.expect(2)?;
    let image = it.dump(&["--leave-running"])?;
    if let Some(difference) = difference(&before, &light_picture(it.victim.pid)) {
        return Err(difference);
    }
    it.victim.kill();
    let dir = image.to_str().ok_or("a path")?;
    let other = Key::make(it.victim.dir.path(), "other")?;
    let other = other.file.to_str().ok_or("a path")?.to_owned();
    for command in [&["restore", "--detach"][..], &["show"], &["verify"]] {
        let text = run_torpor(&[command, &[dir]].concat())?.expect(KEY)?;
        ensure!(text.contains("--identity"), "it does not say how: {text}");
        let text = run_torpor(&[command, &["--identity", &other, dir]].concat())?.expect(KEY)?;
        ensure!(text.contains("another key"), "it does not say why: {text}");
        run_torpor(&[command, &["--identity", "/nowhere", dir]].concat())?.expect(2)?;
    }
    let own = it.key.file.to_str().ok_or("a path")?.to_owned();
    it.victim.restore_with(&["--accept-changed", "--identity", &other, "--identity", &own], &image)?;
    it.victim.ticks(3)
}

/// A process too large for the stage that ends with the dump, and one that runs on where no stage can be had.
fn unstaged() -> Outcome {
    for compress in ["lz4", "zstd"] {
        let mut it = Encoded::start(&["--compress", compress], "large", &["300"])?;
        let image = it.victim.image();
        let mut command = Command::new("prlimit");
        command.arg("--as=314572800").arg(torpor()).args(["dump", "--leave-running", "--compress", compress]);
        run(command.arg(it.victim.pid.to_string()).arg(&image))?.expect(0)?;
        it.victim.ticks(2)?;
        let ended = it.dump(&[])?;
        it.victim.gone(Vec::new())?;
        for image in [&image, &ended] {
            let names = fs::read_dir(image).map_err(|e| e.to_string())?.flatten();
            let hidden = names.filter(|e| e.file_name().to_string_lossy().starts_with('.')).count();
            ensure!(hidden == 0, "it left something");
            it.restore(image)?;
            it.victim.ticks(8)?;
            it.victim.kill();
        }
    }
    Ok(())
}

/// An encrypted image, a raw one and a compressed one, each of which has only what changed since the one before.
fn chain() -> Outcome {
    let mut it = Encoded::start(&["encrypt"], "large", &["24"])?;
    let key = it.key.file.to_str().ok_or("a path")?.to_owned();
    let first = it.dump(&["--track"])?;
    it.victim.ticks(1)?;
    let first = first.to_str().ok_or("a path")?;
    let second = it.victim.dump_with(&["--track", "--parent", first, "--identity", &key])?;
    it.victim.ticks(1)?;
    let second = second.to_str().ok_or("a path")?;
    let options = ["--parent", second, "--identity", &key, "--compress", "zstd"];
    let last = it.victim.dump_with(&options)?;
    it.victim.gone(Vec::new())?;
    run_torpor(&["verify", last.to_str().ok_or("a path")?])?.expect(KEY)?;
    it.run(&["verify"], &last)?.expect(0)?;
    for _ in 0..2 {
        it.restore(&last)?;
        it.victim.ticks(8)?;
        it.victim.kill();
    }
    Ok(())
}

/// Through a pipe: `torpor dump PID - | torpor restore -`, in effect.
fn stream(options: &[&str], name: &str, args: &[&str]) -> Outcome {
    let mut it = Encoded::start(options, name, args)?;
    let archive = it.victim.dir.path().join("archive");
    for round in 1..=2 {
        let at = |e: String| format!("round {round}: {e}");
        let before = torpor_tests::members(it.victim.pid);
        it.send(&[], "cat", &archive)?.expect(0).map_err(at)?;
        it.victim.gone(before).map_err(at)?;
        it.restore_stream(&archive).map_err(at)?;
        it.victim.ticks(4).map_err(at)?;
        it.victim.kill();
        it.restore_stream(&archive).map_err(at)?;
        it.victim.ticks(4).map_err(at)?;
        // What tar makes of it is the image.
        let dir = it.victim.image();
        fs::create_dir(&dir).map_err(|e| e.to_string())?;
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&dir))?.expect(0).map_err(at)?;
        it.run(&["verify"], &dir)?.expect(0).map_err(at)?;
        plain_names(&dir, options)?;
        it.send(&["--leave-running"], "cat", &archive)?.expect(0).map_err(at)?;
        it.victim.ticks(2).map_err(at)?;
        it.run_stream(&["verify"], &archive)?.expect(0).map_err(at)?;
        it.run_stream(&["show"], &archive)?.expect(0).map_err(at)?;
    }
    Ok(())
}

/// Its descriptors, but for what it looks at for a moment now and then.
fn descriptors(it: &Encoded) -> Outcome<BTreeMap<i32, String>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let all = torpor_tests::descriptors(it.victim.pid);
        if !all.values().any(|link| link.starts_with("/proc/")) {
            return Ok(all);
        }
        ensure!(Instant::now() < deadline, "it does not look away: {all:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A reader that goes away leaves the target as it was; so does one that never reads, once we are asked to end.
fn broken_pipe() -> Outcome {
    for options in [&[][..], &["--compress", "lz4"], &["encrypt"]] {
        let it = Encoded::start(options, "memory", &[])?;
        let before = descriptors(&it)?;
        let archive = it.victim.dir.path().join("archive");
        for more in [&[][..], &["--leave-running"]] {
            let text = it.send(more, "head -c 100000", &archive)?.expect(9)?;
            ensure!(text.contains("standard output"), "{text}");
            it.victim.ticks(2)?;
            let now = descriptors(&it)?;
            ensure!(before == now, "its descriptors changed: {before:?}, now {now:?}");
        }
        let mut child = it
            .command(&["dump"])
            .args(&it.dump)
            .arg(it.victim.pid.to_string())
            .arg("-")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_millis(700));
        // SAFETY: kill takes numbers; it is a child of ours.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        let begin = std::time::Instant::now();
        torpor_tests::ended(&mut child)?;
        ensure!(begin.elapsed().as_secs() < 5, "it waits for a reader that does not read");
        it.victim.ticks(2)?;
    }
    Ok(())
}

/// Streams that were cut off, or are none, leave nothing: no process, no spool.
fn bad_streams() -> Outcome {
    let mut it = Encoded::start(&["--compress", "zstd"], "ticker", &[])?;
    let archive = it.victim.dir.path().join("archive");
    it.send(&["--leave-running"], "cat", &archive)?.expect(0)?;
    it.victim.kill();
    let good = fs::read(&archive).map_err(|e| e.to_string())?;
    for cut in [0, 100, 512, 3000, good.len() / 2, good.len() - 1024 - 512] {
        fs::write(&archive, &good[..cut]).map_err(|e| e.to_string())?;
        it.run_stream(&["restore", "--detach"], &archive)?
            .expect(DAMAGED)
            .map_err(|e| format!("{cut}: {e}"))?;
    }
    for at in (0..good.len()).step_by(good.len() / 40) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        fs::write(&archive, &bad).map_err(|e| e.to_string())?;
        let said = it.run_stream(&["verify"], &archive)?;
        // Times and modes do not count.
        ensure!(said.code() == DAMAGED || said.code() == 0, "{at}: {} {}", said.code(), said.text);
    }
    ensure!(state(it.victim.pid).is_none(), "something of it is there");
    fs::write(&archive, &good).map_err(|e| e.to_string())?;
    it.restore_stream(&archive)?;
    it.victim.ticks(2)
}

impl Encoded {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(torpor());
        command.args(args).env("TMPDIR", self.victim.dir.path().join("spool"));
        let _there = fs::create_dir(self.victim.dir.path().join("spool"));
        command
    }

    /// Dumps through a pipe to what `reader` makes of it.
    fn send(&self, more: &[&str], reader: &str, to: &Path) -> Outcome<torpor_tests::Said> {
        let script =
            format!("set -o pipefail; \"$@\" | {reader} > {}; exit ${{PIPESTATUS[0]}}", to.display());
        let mut tries = 0;
        loop {
            let mut command = Command::new("bash");
            command.args(["-c", &script, "bash"]).arg(torpor()).arg("dump").args(&self.dump).args(more);
            let said = run(command.arg(self.victim.pid.to_string()).arg("-"))?;
            // As in `Victim::dump_with`.
            if said.code() != 5 || tries == 10 {
                return Ok(said);
            }
            tries += 1;
            self.victim.ticks(1)?;
        }
    }

    fn run_stream(&self, args: &[&str], from: &Path) -> Outcome<torpor_tests::Said> {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("cat {} | \"$@\"", from.display()), "bash"]).arg(torpor()).args(args);
        let spool = self.victim.dir.path().join("spool");
        let _there = fs::create_dir(&spool);
        let said = run(command.args(&self.restore).arg("--spool").arg(&spool).arg("-"))?;
        ensure!(fs::read_dir(&spool).is_ok_and(|mut d| d.next().is_none()), "something is left of the spool");
        Ok(said)
    }

    fn restore_stream(&mut self, from: &Path) -> Outcome {
        self.run_stream(&["restore", "--detach", "--accept-changed"], from)?.expect(0)?;
        self.victim.restored();
        Ok(())
    }
}
