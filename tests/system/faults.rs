//! Bad input and bad luck: a clear error, its exit code, the victim running, nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_image::header;
use torpor_tests::{
    Outcome, Said, Victim, difference, ensure, light_picture, run, run_torpor, state, torpor, torpor_command,
};

const NO_PROCESS: i32 = 3;
const PERMISSION: i32 = 4;
const REFUSED: i32 = 5;
const DAMAGED: i32 = 6;
const UNFIT: i32 = 7;
const CONFLICT: i32 = 8;
const OUTPUT: i32 = 9;

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("fault: ", $name), || Ok($test()?))),*] };
    }
    all![
        "no such process" => no_process,
        "a process of another user" => other_user,
        "a thread of the kernel" => kernel_thread,
        "torpor itself" => itself,
        "a process that is traced" => traced,
        "a zombie" => zombie,
        "a process that makes threads all the time" => || churn(&[]),
        "a process that executes itself all the time" => || churn(&["exec"]),
        "a process that ends while it is dumped" => ending,
        "a directory that cannot be made" => no_directory,
        "a directory that holds an image" => occupied,
        "a full disk" => disk_full,
        "an image that is not there" => no_image,
        "an image that was cut off" => truncated,
        "an image with a flipped bit" => flipped,
        "an image of a newer format" => || header_field(20, &(header::MAJOR + 1).to_le_bytes(), "newer"),
        "an image of another machine" => || header_field(8, b"vax\0\0\0\0\0", "vax"),
        "an image with a link in it" => linked,
        "a file that is gone" => file_gone,
        "a file that changed" => file_changed,
        "a directory that is gone" => directory_gone,
        "a port that is taken" => port_taken,
        "a udp port that is taken" => udp_port_taken,
        "a socket path that is taken" => path_taken,
        "a pid that is taken" => pid_taken,
        "wrong usage" => usage,
    ]
}

/// Runs a dump that must fail, and looks whether the victim noticed.
fn refused(
    victim: &mut Victim,
    code: i32,
    dump: impl FnOnce(&str, &Path) -> Outcome<Said>,
) -> Outcome<String> {
    let before = light_picture(victim.pid);
    let image = victim.image();
    let text = dump(&victim.pid.to_string(), &image)?.expect(code)?;
    healthy(victim, &before)?;
    ensure!(!image.exists(), "it left {}", image.display());
    one_error(&text)?;
    Ok(text)
}

/// An error is told once, in a line that says what to do.
fn one_error(text: &str) -> Outcome {
    ensure!(text.contains("error"), "it does not say `error`: {text:?}");
    Ok(())
}

fn healthy(victim: &Victim, before: &std::collections::BTreeMap<String, Vec<String>>) -> Outcome {
    let begin = Instant::now();
    while let Some(difference) = difference(before, &light_picture(victim.pid)) {
        ensure!(begin.elapsed() < Duration::from_secs(1), "the victim changed:\n{difference}");
        std::thread::sleep(Duration::from_millis(5));
    }
    victim.ticks(2)
}

fn dump(pid: &str, image: &Path) -> Outcome<Said> {
    run_torpor(&["dump", pid, image.to_str().ok_or("a path")?])
}

fn no_process() -> Outcome {
    let mut child = Command::new("true").spawn().map_err(|e| e.to_string())?;
    child.wait().map_err(|e| e.to_string())?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let image = dir.path().join("image");
    let text = dump(&child.id().to_string(), &image)?.expect(NO_PROCESS)?;
    ensure!(!image.exists(), "it left a directory");
    run_torpor(&["check", &child.id().to_string()])?.expect(NO_PROCESS)?;
    one_error(&text)
}

fn other_user() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    // The program may lie where only root may look.
    let program = victim.dir.path().join("torpor");
    fs::copy(torpor(), &program).map_err(|e| e.to_string())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    let as_user = |args: &[&str]| {
        run(Command::new("setpriv")
            .args(["--reuid=1000", "--regid=1000", "--clear-groups"])
            .arg(&program)
            .args(args))
    };
    refused(&mut victim, PERMISSION, |pid, image| as_user(&["dump", pid, image.to_str().ok_or("a path")?]))?;
    let image = victim.dump()?;
    // Nor may that user read the image, or bring it back.
    as_user(&["restore", "--detach", image.to_str().ok_or("a path")?])?.expect(PERMISSION)?;
    ensure!(state(victim.pid).is_none(), "it was restored");
    Ok(())
}

fn kernel_thread() -> Outcome {
    if fs::read_to_string("/proc/2/comm").is_ok_and(|c| c.trim() == "kthreadd") {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let image = dir.path().join("image");
        dump("2", &image)?.expect(REFUSED)?;
        ensure!(!image.exists(), "it left a directory");
    }
    Ok(())
}

fn itself() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let image = dir.path().join("image");
    let script = r#"exec "$0" dump $$ "$1""#;
    run(Command::new("sh").args(["-c", script]).arg(torpor()).arg(&image))?.expect(REFUSED)?;
    ensure!(!image.exists(), "it left a directory");
    Ok(())
}

fn traced() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let tracer = Victim::start("tracer", &[&victim.pid.to_string()])?;
    let text = refused(&mut victim, REFUSED, dump)?;
    ensure!(text.contains(&tracer.pid.to_string()), "it does not name the tracer: {text}");
    drop(tracer);
    victim.cycles(3)
}

fn zombie() -> Outcome {
    let mut child = Command::new("true").spawn().map_err(|e| e.to_string())?;
    let pid = child.id().to_string();
    while state(child.id() as i32) != Some('Z') {
        std::thread::sleep(Duration::from_millis(1));
    }
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let image = dir.path().join("image");
    let result = dump(&pid, &image).and_then(|s| s.expect(REFUSED));
    child.wait().map_err(|e| e.to_string())?;
    result?;
    ensure!(!image.exists(), "it left a directory");
    Ok(())
}

fn churn(args: &[&str]) -> Outcome {
    let mut victim = Victim::start("churn", args)?;
    let mut good = 0;
    for round in 0..25 {
        let image = victim.image();
        let said = run_torpor(&[
            "dump",
            "--leave-running",
            &victim.pid.to_string(),
            image.to_str().ok_or("a path")?,
        ])?;
        let at = |e: String| format!("dump {round}: {e}");
        match said.code() {
            0 => good += 1,
            _ => {
                ensure!(!image.exists(), "dump {round} left {}", image.display());
                // Refused for what it was for a moment, or it changed under our hands.
                said.expect(REFUSED).map_err(at)?;
            }
        }
        victim.ticks(1).map_err(at)?;
    }
    ensure!(good >= 5, "only {good} of 25 dumps worked");
    let text = fs::read_to_string(format!("/proc/{}/status", victim.pid)).unwrap_or_default();
    ensure!(text.contains("TracerPid:\t0"), "still traced");
    if args.is_empty() { victim.cycles(3) } else { Ok(()) }
}

fn ending() -> Outcome {
    for n in 0..40u64 {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let image = dir.path().join("image");
        let mut child = Command::new("sleep")
            .arg(format!("0.{:03}", 1 + n))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        let said = run_torpor(&[
            "dump",
            "--leave-running",
            &child.id().to_string(),
            image.to_str().ok_or("a path")?,
        ])?;
        child.wait().map_err(|e| e.to_string())?;
        let code = said.code();
        ensure!(matches!(code, 0 | NO_PROCESS | REFUSED), "after {n} ms: exit code {code}: {}", said.text);
        said.expect(code)?;
        ensure!(code == 0 || !image.exists(), "after {n} ms: it left a directory");
    }
    Ok(())
}

fn no_directory() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let file = victim.dir.path().join("file");
    fs::write(&file, "kept").map_err(|e| e.to_string())?;
    let missing = victim.dir.path().join("missing/image");
    for dir in [&file, &missing, Path::new("/proc/torpor-test")] {
        refused(&mut victim, OUTPUT, |pid, _| dump(pid, dir))
            .map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    ensure!(fs::read_to_string(&file).is_ok_and(|t| t == "kept"), "the file changed");
    Ok(())
}

fn occupied() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let first = victim.dump_with(&["--leave-running"])?;
    let before = fs::read(first.join("manifest.tpr")).map_err(|e| e.to_string())?;
    refused(&mut victim, OUTPUT, |pid, _| dump(pid, &first))?;
    ensure!(fs::read(first.join("manifest.tpr")).is_ok_and(|b| b == before), "the first image changed");
    // A directory with other things in it is none of its business.
    let other = victim.image();
    fs::create_dir(&other).and_then(|()| fs::write(other.join("mine"), "x")).map_err(|e| e.to_string())?;
    dump(&victim.pid.to_string(), &other)?.expect(0)?;
    victim.reap()?;
    ensure!(other.join("mine").exists(), "it removed a file");
    victim.restore(&other)?;
    victim.ticks(2)
}

fn disk_full() -> Outcome {
    let mut victim = Victim::start("kitchen", &[])?;
    let disk = victim.dir.path().join("disk");
    fs::create_dir(&disk).map_err(|e| e.to_string())?;
    let mount = |args: &[&str]| run(Command::new(args[0]).args(&args[1..]).arg(&disk));
    if mount(&["mount", "-t", "tmpfs", "-o", "size=8m", "none"])?.code() != 0 {
        eprintln!("skipped: no tmpfs can be mounted here");
        return Ok(());
    }
    let result = (|| {
        for dir in [disk.join("image"), disk.clone()] {
            refused(&mut victim, OUTPUT, |pid, _| dump(pid, &dir))?;
            let left: Vec<_> =
                fs::read_dir(&disk).map_err(|e| e.to_string())?.flatten().map(|e| e.path()).collect();
            ensure!(left.is_empty(), "it left {left:?}");
        }
        Ok(())
    })();
    mount(&["umount"])?.expect(0)?;
    result
}

fn no_image() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = dir.path().to_str().ok_or("a path")?;
    for dir in [path, "/nonexistent/image"] {
        for command in ["restore", "show", "verify"] {
            let said = run_torpor(&[command, dir])?;
            let code = said.code();
            let text = said.expect(code)?;
            ensure!(matches!(code, DAMAGED | CONFLICT), "{command} {dir}: exit code {code}: {text}");
            one_error(&text)?;
        }
    }
    Ok(())
}

/// A small image, and copies of it to be spoilt.
fn image() -> Outcome<(Victim, PathBuf)> {
    let mut victim = Victim::start("still", &[])?;
    let image = victim.dump()?;
    Ok((victim, image))
}

fn files(image: &Path) -> Outcome<Vec<String>> {
    let entries = fs::read_dir(image).map_err(|e| e.to_string())?;
    Ok(entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
}

/// Copies `image` with one file changed.
fn spoilt(image: &Path, name: &str, change: impl Fn(&mut Vec<u8>)) -> Outcome<tempfile::TempDir> {
    let copy = tempfile::tempdir().map_err(|e| e.to_string())?;
    for file in files(image)? {
        let mut bytes = fs::read(image.join(&file)).map_err(|e| e.to_string())?;
        if file == name {
            change(&mut bytes);
        }
        fs::write(copy.path().join(&file), bytes).map_err(|e| e.to_string())?;
    }
    Ok(copy)
}

/// Every command must refuse the image with `code`; nothing may come of it.
fn unreadable(victim: &Victim, dir: &Path, commands: &[&str], code: i32) -> Outcome<String> {
    let dir = dir.to_str().ok_or("a path")?;
    let mut text = String::new();
    for command in commands {
        let args: Vec<&str> = command.split(' ').chain([dir]).collect();
        text = run_torpor(&args)?.expect(code).map_err(|e| format!("{command}: {e}"))?;
        one_error(&text)?;
        ensure!(state(victim.pid).is_none(), "{command} made a process");
    }
    Ok(text)
}

const ALL: &[&str] = &["verify", "show", "show --json", "restore --plan", "restore --detach"];

fn truncated() -> Outcome {
    let (victim, image) = image()?;
    for name in files(&image)? {
        for keep in [0, 10, 39, 50, 4096, usize::MAX] {
            let copy = spoilt(&image, &name, |b| b.truncate(keep.min(b.len() - 1)))?;
            unreadable(&victim, copy.path(), ALL, DAMAGED)
                .map_err(|e| format!("{name} cut to {keep}: {e}"))?;
        }
        let copy = spoilt(&image, &name, |b| b.push(0))?;
        unreadable(&victim, copy.path(), ALL, DAMAGED)
            .map_err(|e| format!("{name} with a byte more: {e}"))?;
        let copy = spoilt(&image, &name, |_| ())?;
        fs::remove_file(copy.path().join(&name)).map_err(|e| e.to_string())?;
        unreadable(&victim, copy.path(), ALL, DAMAGED).map_err(|e| format!("without {name}: {e}"))?;
    }
    Ok(())
}

fn flipped() -> Outcome {
    let (victim, image) = image()?;
    for name in files(&image)? {
        let size = fs::metadata(image.join(&name)).map_err(|e| e.to_string())?.len() as usize;
        for part in 0..6 {
            let at = (size - 1) * part / 5;
            let copy = spoilt(&image, &name, |b| b[at] ^= 1 << (part % 8))?;
            // What is in data files is checked by `verify` only.
            let commands = if name.ends_with(".dat") { &ALL[..1] } else { ALL };
            unreadable(&victim, copy.path(), commands, DAMAGED)
                .map_err(|e| format!("{name} at {at}: {e}"))?;
        }
    }
    Ok(())
}

fn header_field(at: usize, value: &[u8], word: &str) -> Outcome {
    let (victim, image) = image()?;
    let copy = spoilt(&image, "manifest.tpr", |b| {
        b[at..at + value.len()].copy_from_slice(value);
        let crc = crc32c::crc32c(&b[..36]);
        b[36..40].copy_from_slice(&crc.to_le_bytes());
    })?;
    let text = unreadable(&victim, copy.path(), ALL, UNFIT)?;
    ensure!(text.contains(word), "it does not say {word}: {text}");
    Ok(())
}

fn linked() -> Outcome {
    let (victim, image) = image()?;
    for name in files(&image)? {
        let copy = spoilt(&image, &name, |_| ())?;
        fs::remove_file(copy.path().join(&name)).map_err(|e| e.to_string())?;
        std::os::unix::fs::symlink(image.join(&name), copy.path().join(&name)).map_err(|e| e.to_string())?;
        let dir = copy.path().to_str().ok_or("a path")?;
        let said = run_torpor(&["restore", "--detach", dir])?;
        let code = said.code();
        let text = said.expect(code)?;
        ensure!(code != 0, "{name}: it followed a link: {text}");
        ensure!(state(victim.pid).is_none(), "{name}: a process came of it");
    }
    Ok(())
}

/// A restore that must fail, and works once what is in the way is gone.
fn conflict(
    victim: &mut Victim,
    image: &Path,
    word: &str,
    spoil: impl FnOnce() -> Outcome<Box<dyn FnOnce() -> Outcome>>,
) -> Outcome {
    let repair = spoil()?;
    let said = run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])?;
    let text = said.expect(CONFLICT)?;
    ensure!(text.contains(word), "it does not say {word}: {text}");
    one_error(&text)?;
    ensure!(state(victim.pid).is_none(), "a process is left");
    repair()?;
    victim.restore(image)?;
    victim.ticks(3)
}

fn rename(from: &Path, to: &Path) -> Outcome {
    fs::rename(from, to).map_err(|e| e.to_string())
}

/// Dumps a victim by the rule that everything must be found again, also what it made itself.
fn dump_keeping(victim: &mut Victim) -> Outcome<PathBuf> {
    let rules = victim.dir.path().join("rules");
    fs::write(&rules, "keep **").map_err(|e| e.to_string())?;
    let image = victim.dump_with(&["--files", rules.to_str().ok_or("a path")?])?;
    victim.reap()?;
    Ok(image)
}

fn file_gone() -> Outcome {
    let mut victim = Victim::start("files", &[])?;
    let image = dump_keeping(&mut victim)?;
    let (file, aside) = (victim.home().join("append"), victim.dir.path().join("aside"));
    conflict(&mut victim, &image, "append", || {
        rename(&file, &aside)?;
        Ok(Box::new(move || rename(&aside, &file)))
    })
}

fn file_changed() -> Outcome {
    let mut victim = Victim::start("files", &[])?;
    let image = victim.dump()?;
    let (file, aside) = (victim.home().join("plain"), victim.dir.path().join("aside"));
    conflict(&mut victim, &image, "plain", || {
        rename(&file, &aside)?;
        fs::write(&file, "something else altogether").map_err(|e| e.to_string())?;
        Ok(Box::new(move || rename(&aside, &file)))
    })
}

fn directory_gone() -> Outcome {
    let mut victim = Victim::start("process", &[])?;
    let image = dump_keeping(&mut victim)?;
    let (cwd, aside) = (victim.home().join("cwd"), victim.dir.path().join("aside"));
    conflict(&mut victim, &image, "cwd", || {
        rename(&cwd, &aside)?;
        Ok(Box::new(move || rename(&aside, &cwd)))
    })
}

fn port_taken() -> Outcome {
    port_of("tcp", |port| Ok(Box::new(std::net::TcpListener::bind(("127.0.0.1", port))?)))
}

fn udp_port_taken() -> Outcome {
    port_of("udp", |port| Ok(Box::new(std::net::UdpSocket::bind(("127.0.0.1", port))?)))
}

/// A victim tells its port, which somebody else has when it is restored.
fn port_of(name: &str, take: impl Fn(u16) -> std::io::Result<Box<dyn std::any::Any>>) -> Outcome {
    let mut victim = Victim::start(name, &[])?;
    let log = fs::read_to_string(victim.log()).map_err(|e| e.to_string())?;
    let port: u16 =
        log.lines().find_map(|l| l.strip_prefix("port ")).and_then(|p| p.parse().ok()).ok_or("no port")?;
    let image = victim.dump()?;
    conflict(&mut victim, &image, &port.to_string(), || {
        let holder = take(port).map_err(|e| e.to_string())?;
        Ok(Box::new(move || {
            drop(holder);
            Ok(())
        }))
    })
}

fn path_taken() -> Outcome {
    let mut victim = Victim::start("unix", &[])?;
    let image = victim.dump()?;
    let path = victim.home().join("by-path");
    conflict(&mut victim, &image, "by-path", || {
        // The dumped process's own socket file is still there: that is no conflict; somebody else's is.
        fs::remove_file(&path).map_err(|e| e.to_string())?;
        let holder = std::os::unix::net::UnixListener::bind(&path).map_err(|e| e.to_string())?;
        Ok(Box::new(move || {
            drop(holder);
            fs::remove_file(&path).map_err(|e| e.to_string())
        }))
    })
}

fn pid_taken() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump_with(&["--leave-running"])?;
    let before = light_picture(victim.pid);
    let text = run_torpor(&["restore", "--detach", image.to_str().ok_or("a path")?])?.expect(CONFLICT)?;
    ensure!(
        text.contains(&victim.pid.to_string()) && text.contains("ticker"),
        "it does not name the holder: {text}"
    );
    healthy(&victim, &before)
}

fn usage() -> Outcome {
    for args in [
        &[][..],
        &["dump"],
        &["dump", "x", "y"],
        &["dump", "--leave-running", "--leave-stopped", "1", "y"],
        &["nonsense"],
    ] {
        let said = run(&mut torpor_command(args))?;
        let code = said.code();
        ensure!(code == 2, "{args:?}: exit code {code}: {}", said.text);
    }
    Ok(())
}
