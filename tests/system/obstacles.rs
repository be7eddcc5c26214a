//! What stands in the way of torpor itself: limits, missing privileges, names and numbers that are taken, a directory that is
//! in use. Each is named, with what to do, and by its exit code.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_tests::{
    Outcome, Said, Victim, difference, ensure, light_picture, run, run_torpor, state, torpor, torpor_command,
    victim,
};

const PERMISSION: i32 = 4;
const REFUSED: i32 = 5;
const CONFLICT: i32 = 8;
const OUTPUT: i32 = 9;
const LIMIT: i32 = 10;

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("obstacle: ", $name), || Ok($test()?))),*] };
    }
    all![
        "a pid that a zombie has" => zombie,
        "an abstract name that is taken" => abstract_name,
        "a peer outside with a full backlog" => backlog,
        "a program that may not be executed any more" => not_executable,
        "a user that cannot kill what it has restored" => foreign,
        "capabilities that torpor lacks" => capabilities,
        "another user's process is named with the privilege that is missing" => other_user,
        "limits of processes and open files" => limits,
        "a limit of file sizes" => file_size,
        "a standard output that takes nothing" => stdout_full,
        "two dumps into one directory" => two_dumps,
        "what is left of an image" => remains,
        "torpor below the process it dumps" => below,
        "a thread that is stuck in the kernel" => stuck,
    ]
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str().ok_or_else(|| "a path".to_owned())
}

/// Fails unless all words are said.
fn says(said: &str, words: &[&str]) -> Outcome {
    for word in words {
        ensure!(said.contains(word), "it does not say `{word}`: {said}");
    }
    Ok(())
}

/// A copy of torpor that every user may run.
fn public(victim: &Victim) -> Outcome<String> {
    let program = victim.dir.path().join("torpor");
    fs::copy(torpor(), &program).map_err(|e| e.to_string())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    text(&program).map(str::to_owned)
}

/// Torpor as user 1000 with these capabilities.
fn as_user(program: &str, capabilities: &str, args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=1000", "--regid=1000", "--clear-groups"]);
    if !capabilities.is_empty() {
        command.args([format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}")]);
    }
    command.arg(program).args(args);
    command
}

/// Sets a limit for a command.
fn limited(command: &mut Command, resource: libc::__rlimit_resource_t, value: u64) -> Outcome<Said> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: setrlimit is async-signal-safe and reads a structure of ours.
    unsafe {
        command.pre_exec(move || {
            libc::setrlimit(resource, &raw const limit);
            Ok(())
        });
    }
    run(command)
}

/// Makes the image readable for all, and what the victim writes to writable.
fn readable(victim: &Victim, image: &Path) -> Outcome {
    for path in [victim.log(), victim.dir.path().join("said")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(|e| e.to_string())?;
    }
    for path in fs::read_dir(image).map_err(|e| e.to_string())?.flatten().map(|e| e.path()) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(|e| e.to_string())?;
    }
    fs::set_permissions(image, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())
}

fn zombie() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump_with(&[])?;
    // It has ended, and this process has yet to ask.
    let said = run_torpor(&["restore", "--detach", text(&image)?])?.expect(CONFLICT)?;
    says(
        &said,
        &["which has ended and waits for its parent, pid ", &std::process::id().to_string(), "(wait)"],
    )?;
    victim.reap()?;
    victim.restore(&image)?;
    victim.ticks(2)
}

fn abstract_name() -> Outcome {
    let mut victim = Victim::start("flight", &[])?;
    let image = victim.dump()?;
    let name = format!("torpor flight {}", victim.pid);
    let address = SocketAddr::from_abstract_name(&name).map_err(|e| e.to_string())?;
    // Of the type of the victim's, by which names are told apart.
    let holder = UnixDatagram::bind_addr(&address).map_err(|e| e.to_string())?;
    let said = run_torpor(&["restore", "--detach", text(&image)?])?.expect(CONFLICT)?;
    says(&said, &[&name, &format!("pid {} (", std::process::id()), "has this address", "stop that program"])?;
    ensure!(state(victim.pid).is_none(), "a process is left");
    drop(holder);
    victim.restore(&image)?;
    victim.ticks(2)
}

fn backlog() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (stream, log) = (dir.path().join("stream"), dir.path().join("log"));
    let listener = UnixListener::bind(&stream).map_err(|e| e.to_string())?;
    let _datagrams = UnixDatagram::bind(&log).map_err(|e| e.to_string())?;
    let mut victim = Victim::start("unix_outside", &[text(&stream)?, text(&log)?])?;
    let _accepted = listener.accept().map_err(|e| e.to_string())?;
    let image = victim.dump_with(&["--external-unix", "reconnect"])?;
    victim.reap()?;
    let filled = || -> std::io::Result<Vec<UnixStream>> {
        use std::os::fd::AsRawFd;
        // SAFETY: listen takes numbers only.
        unsafe { libc::listen(listener.as_raw_fd(), 0) };
        Ok(vec![UnixStream::connect(&stream)?])
    };
    let waiting = filled().map_err(|e| e.to_string())?;
    let begin = Instant::now();
    let said = run_torpor(&["restore", "--detach", text(&image)?])?.expect(CONFLICT)?;
    says(&said, &["stream", "the backlog of who listens there is full", "try again"])?;
    ensure!(begin.elapsed() < Duration::from_secs(20), "it waits");
    ensure!(state(victim.pid).is_none(), "a process is left");
    drop((waiting, listener.accept()));
    victim.restore(&image)?;
    victim.ticks(2)
}

fn not_executable() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let program = dir.path().join("copy");
    fs::copy(victim("ticker")?, &program).map_err(|e| e.to_string())?;
    let mut victim = Victim::start_program(&program, &[])?;
    let image = victim.dump()?;
    let mode =
        |mode| fs::set_permissions(&program, fs::Permissions::from_mode(mode)).map_err(|e| e.to_string());
    mode(0o644)?;
    let said = run_torpor(&["restore", "--detach", text(&image)?])?.expect(CONFLICT)?;
    says(&said, &[&victim.pid.to_string(), "program ", "may not be executed any more", "chmod +x"])?;
    mode(0o755)?;
    victim.restore(&image)?;
    victim.ticks(2)
}

/// A process of root's, restored by a user who may become root and then has no right to kill it.
fn foreign() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump()?;
    readable(&victim, &image)?;
    let program = public(&victim)?;
    let args = ["restore", "--detach", text(&image)?];
    let said =
        run(&mut as_user(&program, "+checkpoint_restore,+setuid,+setgid", &args))?.expect(PERMISSION)?;
    says(&said, &["capset: EPERM", "CAP_SYS_ADMIN", "torpor has not"])?;
    ensure!(state(victim.pid).is_none(), "a process is left: {:?}", state(victim.pid));
    for (capabilities, word) in [
        ("", "CAP_CHECKPOINT_RESTORE"),
        ("+checkpoint_restore", "CAP_SETGID"),
        ("+checkpoint_restore,+setgid", "CAP_SETUID"),
    ] {
        let said = run(&mut as_user(&program, capabilities, &args))?.expect(PERMISSION)?;
        says(&said, &[&victim.pid.to_string(), "EPERM", word])?;
        ensure!(state(victim.pid).is_none(), "{capabilities}: a process is left");
    }
    victim.restore(&image)?;
    victim.ticks(2)
}

fn capabilities() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump()?;
    let args = ["--bounding-set=-net_admin", "--inh-caps=-all"];
    let mut command = Command::new("setpriv");
    command.args(args).arg(torpor()).args(["restore", "--detach", text(&image)?]);
    let said = run(&mut command)?.expect(PERMISSION)?;
    says(&said, &["which has CAP_NET_ADMIN and torpor has not", "with all capabilities of the process"])?;
    victim.restore(&image)?;
    victim.ticks(2)
}

fn other_user() -> Outcome {
    let victim = Victim::start("ticker", &[])?;
    let (program, pid) = (public(&victim)?, victim.pid.to_string());
    let image = victim.dir.path().join("image");
    for args in [&["check", pid.as_str()][..], &["dump", pid.as_str(), text(&image)?]] {
        let said = run(&mut as_user(&program, "", args))?.expect(PERMISSION)?;
        says(&said, &[&pid, "ticker", "EACCES", "as the user of that process, or with CAP_SYS_PTRACE"])?;
    }
    victim.ticks(2)
}

fn limits() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump()?;
    readable(&victim, &image)?;
    let program = public(&victim)?;
    let args = ["restore", "--detach", text(&image)?];
    let mut command = as_user(&program, "+checkpoint_restore", &args);
    let said = limited(&mut command, libc::RLIMIT_NPROC, 1)?.expect(LIMIT)?;
    says(&said, &[&victim.pid.to_string(), "clone3: EAGAIN", "ulimit -u"])?;
    for files in [4, 6, 8, 10, 12] {
        let said = limited(&mut torpor_command(&args), libc::RLIMIT_NOFILE, files)?.expect(LIMIT)?;
        says(&said, &["Too many open files", "ulimit -n"])?;
        ensure!(state(victim.pid).is_none(), "a process is left");
    }
    victim.restore(&image)?;
    let pid = victim.pid.to_string();
    for files in [4, 5, 6, 7, 8] {
        let image = victim.image();
        let mut command = torpor_command(&["dump", "--leave-running", &pid, text(&image)?]);
        let said = limited(&mut command, libc::RLIMIT_NOFILE, files)?.expect(LIMIT)?;
        says(&said, &["Too many open files", "ulimit -n"])?;
    }
    victim.ticks(2)
}

fn file_size() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let before = light_picture(victim.pid);
    let (pid, image) = (victim.pid.to_string(), victim.image());
    let mut command = torpor_command(&["dump", &pid, text(&image)?]);
    let said = limited(&mut command, libc::RLIMIT_FSIZE, 4096)?.expect(OUTPUT)?;
    says(&said, &["pages-0.dat", "ulimit -f", "the process goes on as before"])?;
    ensure!(!image.exists(), "it left {}", image.display());
    victim.ticks(2)?;
    match difference(&before, &light_picture(victim.pid)) {
        Some(difference) => Err(format!("the victim changed:\n{difference}")),
        None => Ok(()),
    }
}

/// The image is complete and the process gone: that nobody was told is no failure.
fn stdout_full() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let (pid, image) = (victim.pid.to_string(), victim.image());
    let full = fs::OpenOptions::new().write(true).open("/dev/full").map_err(|e| e.to_string())?;
    let output = torpor_command(&["dump", &pid, text(&image)?])
        .stdin(Stdio::null())
        .stdout(full)
        .output()
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {said}", output.status);
    says(&said, &["note: the dump is complete, but cannot write to standard output"])?;
    victim.reap()?;
    victim.restore(&image)?;
    victim.ticks(2)
}

fn two_dumps() -> Outcome {
    let mut first = Victim::start("kitchen", &[])?;
    let second = Victim::start("ticker", &[])?;
    for _ in 0..10 {
        let image = first.image();
        let start = |victim: &Victim| -> Outcome<std::process::Child> {
            torpor_command(&["dump", "--leave-running", &victim.pid.to_string(), text(&image)?])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map_err(|e| e.to_string())
        };
        let (mut a, mut b) = (start(&first)?, start(&second)?);
        let code = |child: &mut std::process::Child| torpor_tests::ended(child).map(|s| s.code());
        let codes = (code(&mut a)?, code(&mut b)?);
        ensure!(
            matches!(codes, (Some(0), Some(OUTPUT)) | (Some(OUTPUT), Some(0))),
            "one of them must make room: {codes:?}"
        );
        run_torpor(&["verify", text(&image)?])?.expect(0)?;
    }
    first.ticks(1)?;
    second.ticks(1)
}

fn remains() -> Outcome {
    let mut victim = Victim::start("ticker", &[])?;
    let image = victim.dump_with(&["--leave-running"])?;
    fs::remove_file(image.join("manifest.tpr")).map_err(|e| e.to_string())?;
    let pages = fs::read(image.join("pages-0.dat")).map_err(|e| e.to_string())?;
    let said = run_torpor(&["dump", &victim.pid.to_string(), text(&image)?])?.expect(OUTPUT)?;
    says(&said, &["an image that has lost its manifest", "name another directory"])?;
    ensure!(fs::read(image.join("pages-0.dat")).is_ok_and(|now| now == pages), "it was written over");
    victim.ticks(2)
}

fn below() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let script = r#""$1" dump $$ "$2"; echo "code $?"; kill -0 $$ && echo alive"#;
    let image = dir.path().join("image");
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(torpor()).arg(&image);
    let said = run(&mut shell)?.expect(0)?;
    says(&said, &["(sh): torpor itself, pid ", "is below it", "from another terminal", "code 5", "alive"])?;
    ensure!(!image.exists(), "it left a directory");
    Ok(())
}

/// A file system whose server never answers.
struct Silent {
    _device: fs::File,
    at: std::ffi::CString,
}

impl Silent {
    fn mount(at: &Path) -> Outcome<Option<Self>> {
        use std::os::fd::AsRawFd;
        let Ok(device) = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
            return Ok(None);
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let c = |text: &str| std::ffi::CString::new(text).map_err(|e| e.to_string());
        let (options, at, name, kind) = (c(&options)?, c(text(at)?)?, c("torpor-test")?, c("fuse")?);
        // SAFETY: strings that end with a zero.
        let mounted =
            unsafe { libc::mount(name.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
        Ok((mounted == 0).then_some(Silent { _device: device, at }))
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // SAFETY: a string that ends with a zero.
        unsafe { libc::umount2(self.at.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
    }
}

fn stuck() -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let Some(silent) = Silent::mount(dir.path())? else {
        eprintln!("skipped: no fuse here");
        return Ok(());
    };
    let mut victim = Victim::start("stuck", &[text(&dir.path().join("file"))?])?;
    let (pid, image) = (victim.pid.to_string(), victim.image());
    let begin = Instant::now();
    let before = victim.count()?;
    for args in [&["check", pid.as_str()][..], &["dump", pid.as_str(), text(&image)?]] {
        let said = run_torpor(args)?.expect(REFUSED)?;
        says(&said, &["thread ", "inside the kernel", "(state D)", "try again when that call has returned"])?;
    }
    // It never stood.
    let expected = begin.elapsed().as_millis() as usize / 40;
    let ticks = victim.count()? - before;
    ensure!(ticks > expected, "it ticked {ticks} times in {:?}", begin.elapsed());
    // Its end frees the thread.
    drop(silent);
    victim.ticks(2)
}
