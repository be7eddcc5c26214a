//! What the whole-system tests share: victims, the `torpor` program, and what /proc says of a process.

pub mod ipc;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// What a test gives: nothing, or what went wrong.
pub type Outcome<T = ()> = Result<T, String>;

/// How long anything may take before it counts as hanging.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Fails with a message unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition { return Err(format!($($message)+)); }
    };
}

/// Restored processes become children of this one, so that nobody else can reap them.
pub fn become_subreaper() {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes no pointer.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
}

/// Whether the tests run as root.
pub fn is_root() -> bool {
    // SAFETY: geteuid cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    dir.parent().map_or(dir.clone(), Path::to_path_buf)
}

/// Where cargo puts what it builds, for this profile.
fn target() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its program");
    let dir = exe.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") { dir.parent().expect("deps has a parent").to_owned() } else { dir.to_owned() }
}

/// The `torpor` program: `$TORPOR`, or built now as these tests were.
pub fn torpor() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("TORPOR") {
            return fs::canonicalize(&path).unwrap_or_else(|e| panic!("TORPOR={}: {e}", path.display()));
        }
        let target = target();
        let profile = match target.file_name().and_then(|n| n.to_str()) {
            Some("debug") | None => "dev",
            Some(other) => other,
        };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args([
                "build",
                "--quiet",
                "-p",
                "torpor",
                "--bin",
                "torpor",
                "--profile",
                profile,
                "--target-dir",
            ])
            .arg(target.parent().expect("a profile lies in the target directory"))
            .current_dir(workspace())
            .status()
            .expect("cargo runs");
        assert!(status.success(), "cargo build -p torpor: {status}");
        target.join("torpor")
    })
}

/// Builds a victim, or any C program, once.
pub fn build(source: &Path) -> Outcome<PathBuf> {
    static DONE: Mutex<Option<HashMap<PathBuf, PathBuf>>> = Mutex::new(None);
    let mut done = DONE.lock().map_err(|e| e.to_string())?;
    let done = done.get_or_insert_default();
    if let Some(path) = done.get(source) {
        return Ok(path.clone());
    }
    let dir = target().join("victims");
    fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let name = source.file_stem().ok_or("no name")?.to_string_lossy().into_owned();
    let set = source.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    let program = dir.join(format!("{set}-{name}"));
    let modified = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    let newest = modified(source).max(modified(&source.with_file_name("check.h")));
    if modified(&program) < newest {
        let fresh = dir.join(format!("{name}.{}", std::process::id()));
        let output = Command::new("gcc")
            .args(["-O1", "-g", "-Wall", "-Wextra", "-pthread"])
            .arg(source)
            .arg("-o")
            .arg(&fresh)
            .arg("-lrt")
            .output()
            .map_err(|e| format!("gcc: {e}; apt-get install gcc libc6-dev"))?;
        ensure!(output.status.success(), "gcc {name}.c:\n{}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&fresh, &program).map_err(|e| e.to_string())?;
    }
    done.insert(source.to_owned(), program.clone());
    Ok(program)
}

/// Every process below `pid`, as far as it stands still.
pub fn members(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    let mut todo = vec![pid];
    while let Some(pid) = todo.pop() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let children: Vec<i32> = text.split_ascii_whitespace().filter_map(|c| c.parse().ok()).collect();
            todo.extend(&children);
            all.extend(children);
        }
    }
    all
}

/// The victim program `name`.
pub fn victim(name: &str) -> Outcome<PathBuf> {
    build(&workspace().join("tests/victims").join(format!("{name}.c")))
}

/// What a program said.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output and error.
    pub text: String,
}

impl Said {
    /// The exit code; 128 + N for signal N.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails unless it ended with `code`, and never for a panic.
    pub fn expect(self, code: i32) -> Outcome<String> {
        ensure!(!self.text.contains("panicked at"), "it panicked:\n{}", self.text);
        ensure!(self.code() == code, "exit code {} instead of {code}:\n{}", self.code(), self.text);
        Ok(self.text)
    }
}

/// Waits until a child ends; one that does not is ended.
pub fn ended(child: &mut std::process::Child) -> Outcome<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => return Ok(status),
            None if Instant::now() > deadline => {
                let where_ = threads_of(child.id() as i32);
                let _gone = child.kill();
                let _reaped = child.wait();
                return Err(format!("hangs:\n{where_}"));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Runs a program to its end, with nothing on its input.
pub fn run(command: &mut Command) -> Outcome<Said> {
    let mut out = tempfile::tempfile().map_err(|e| e.to_string())?;
    let both = || out.try_clone().map(Stdio::from).map_err(|e| e.to_string());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(both()?)
        .stderr(both()?)
        .spawn()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    let status = ended(&mut child).map_err(|e| format!("{command:?} {e}"))?;
    let mut text = String::new();
    use std::io::{Read, Seek};
    out.rewind().map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    out.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    text.push_str(&String::from_utf8_lossy(&bytes));
    Ok(Said { status, text })
}

/// A command line of torpor.
pub fn torpor_command(args: &[&str]) -> Command {
    let mut command = Command::new(torpor());
    command.args(args);
    command
}

/// Runs torpor to its end.
pub fn run_torpor(args: &[&str]) -> Outcome<Said> {
    run(&mut torpor_command(args))
}

/// A victim, from its start over any number of dumps and restores. Dropped, it is killed.
pub struct Victim {
    /// Its directory, its log and the images.
    pub dir: TempDir,
    /// Its pid.
    pub pid: i32,
    child: Option<Child>,
    alive: bool,
    images: u32,
    /// Processes below it that the last dump has ended.
    ended: Vec<i32>,
}

impl Victim {
    /// Starts victim `name` with more arguments and waits until it ticks.
    pub fn start(name: &str, args: &[&str]) -> Outcome<Victim> {
        Self::start_program(&victim(name)?, args)
    }

    /// Starts any program that takes a log and a directory.
    pub fn start_program(program: &Path, args: &[&str]) -> Outcome<Victim> {
        let mut victim = Self::prepare()?;
        let mut command = Command::new(program);
        command.arg(victim.log()).arg(victim.home()).args(args);
        let said = fs::File::create(victim.dir.path().join("said")).map_err(|e| e.to_string())?;
        command.stdin(Stdio::null()).stdout(said.try_clone().map_err(|e| e.to_string())?).stderr(said);
        victim.spawn(&mut command)?;
        victim.ticks(3)?;
        Ok(victim)
    }

    /// A victim that does not run yet.
    pub fn prepare() -> Outcome<Victim> {
        let dir = tempfile::Builder::new().prefix("torpor-test-").tempdir().map_err(|e| e.to_string())?;
        let victim = Victim { dir, pid: 0, child: None, alive: false, images: 0, ended: Vec::new() };
        fs::create_dir(victim.home()).map_err(|e| e.to_string())?;
        // Victims may drop to another user.
        use std::os::unix::fs::PermissionsExt;
        for path in [victim.dir.path(), &victim.home()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).map_err(|e| e.to_string())?;
        }
        Ok(victim)
    }

    /// Starts the process: in a session of its own, with no descriptor but the three.
    pub fn spawn(&mut self, command: &mut Command) -> Outcome {
        // SAFETY: both are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
                Ok(())
            });
        }
        let child = command.spawn().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
        self.pid = child.id() as i32;
        self.child = Some(child);
        self.alive = true;
        Ok(())
    }

    /// The directory the victim works in.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// How often it has ticked; an error if it found something wrong.
    pub fn count(&self) -> Outcome<usize> {
        let text = fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if let Some(line) = text.lines().find(|l| l.starts_with("BAD")) {
            return Err(format!("the victim says: {line}"));
        }
        Ok(text.lines().filter(|l| l.starts_with("tick")).count())
    }

    /// Calls that came back with EINTR without a handler, of those that must not: epoll_wait and sigtimedwait
    /// do so after any stop (signal(7)).
    pub fn interrupted(&self) -> Vec<String> {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let mut all: Vec<String> =
            text.lines().filter_map(|l| l.strip_prefix("EINTR ")).map(str::to_owned).collect();
        all.sort();
        all.dedup();
        all
    }

    /// Waits for `more` ticks.
    pub fn ticks(&self, more: usize) -> Outcome {
        let alive = || {
            ensure!(
                state(self.pid).is_some_and(|s| s != 'Z'),
                "the victim is gone: {}{}",
                self.last_words(),
                fs::read_to_string(self.dir.path().join("said")).unwrap_or_default()
            );
            Ok(())
        };
        self.wait(self.count()? + more, alive)
    }

    /// Waits until there are `more` ticks than `before`; the process may not be there yet.
    pub fn ticks_from(&self, before: usize, more: usize) -> Outcome {
        self.wait(before + more, || Ok(()))
    }

    fn wait(&self, wanted: usize, alive: impl Fn() -> Outcome) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.count()? >= wanted {
                return Ok(());
            }
            alive()?;
            ensure!(Instant::now() < deadline, "the victim does not tick:\n{}", threads_of(self.pid));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn last_words(&self) -> String {
        let mut status = 0;
        // SAFETY: `status` is a valid place; with WNOWAIT nothing is reaped that drop would miss.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            if libc::waitid(
                libc::P_PID,
                self.pid as u32,
                &raw mut info,
                libc::WEXITED | libc::WNOHANG | libc::WNOWAIT,
            ) == 0
            {
                status = info.si_status();
                return format!("si_code {} status {status} ", info.si_code);
            }
        }
        format!("status {status} ")
    }

    /// A new place for an image.
    pub fn image(&mut self) -> PathBuf {
        self.images += 1;
        self.dir.path().join(format!("image-{}", self.images))
    }

    /// Dumps with options; the victim runs on or stays stopped.
    pub fn dump_with(&mut self, options: &[&str]) -> Outcome<PathBuf> {
        let image = self.image();
        let mut args = vec!["dump"];
        args.extend(options);
        let pid = self.pid.to_string();
        args.extend([pid.as_str(), image.to_str().ok_or("a path")?]);
        let mut tries = 0;
        loop {
            let said = run_torpor(&args)?;
            // What a victim does to look at itself may be refused; it does so for a moment only.
            let passing = ["files of /proc", "tcp socket", "is connected to", "its registered file"]
                .iter()
                .any(|w| said.text.contains(w));
            if said.code() == 5 && passing && tries < 10 {
                tries += 1;
                self.ticks(1)?;
                continue;
            }
            said.expect(0).map_err(|e| format!("dump: {e}"))?;
            return Ok(image);
        }
    }

    /// Dumps it, after which it is gone.
    pub fn dump(&mut self) -> Outcome<PathBuf> {
        let before = members(self.pid);
        let image = self.dump_with(&[])?;
        self.expect_end(&image, before)?;
        self.reap()?;
        Ok(image)
    }

    /// Waits until all processes of an image are gone.
    pub fn reap_all(&mut self, image: &Path) -> Outcome {
        self.expect_end(image, Vec::new())?;
        self.reap()
    }

    /// Waits until it and `members` are gone, after a dump that has ended them.
    pub fn gone(&mut self, members: Vec<i32>) -> Outcome {
        self.ended = members;
        self.ended.retain(|pid| *pid != self.pid);
        self.reap()
    }

    fn expect_end(&mut self, image: &Path, before: Vec<i32>) -> Outcome {
        let manifest = torpor_image::Image::open(image).map_err(|e| e.to_string())?.manifest;
        let zombies = manifest.zombies.iter().map(|z| z.pid.0);
        self.ended = manifest.tasks.iter().map(|p| p.0).chain(zombies).chain(before).collect();
        self.ended.retain(|pid| *pid != self.pid);
        Ok(())
    }

    /// Waits until the process is gone.
    pub fn reap(&mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let gone = match &mut self.child {
                Some(child) => child.try_wait().map_err(|e| e.to_string())?.is_some(),
                // SAFETY: no status is asked for.
                None => unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG) != 0 },
            };
            // Its children have become ours; what is left of them has its process group.
            // SAFETY: no status is asked for.
            if gone && unsafe { libc::waitpid(-self.pid, std::ptr::null_mut(), libc::WNOHANG) } < 0 {
                self.child = None;
                self.alive = false;
                return self.reap_members(deadline);
            }
            ensure!(
                Instant::now() < deadline,
                "pid {} is still there after its dump:\n{}",
                self.pid,
                threads_of(self.pid)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until nobody of the tree is left: they have become children of this process.
    fn reap_members(&mut self, deadline: Instant) -> Outcome {
        for pid in std::mem::take(&mut self.ended) {
            // SAFETY: no status is asked for.
            while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) } != pid
                && Path::new(&format!("/proc/{pid}")).exists()
            {
                ensure!(Instant::now() < deadline, "pid {pid} is still there: {}", threads_of(pid));
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// Restores it in the background.
    pub fn restore_with(&mut self, options: &[&str], image: &Path) -> Outcome {
        let pidfile = self.dir.path().join("pidfile");
        let _old = fs::remove_file(&pidfile);
        let mut args = vec!["restore", "--detach", "--pidfile", pidfile.to_str().ok_or("a path")?];
        args.extend(options);
        args.push(image.to_str().ok_or("a path")?);
        run_torpor(&args)?.expect(0).map_err(|e| format!("restore: {e}"))?;
        let pid = fs::read_to_string(&pidfile).map_err(|e| format!("pidfile: {e}"))?;
        ensure!(pid.trim() == self.pid.to_string(), "the pidfile says {pid:?} instead of {}", self.pid);
        self.alive = true;
        Ok(())
    }

    /// Restores it.
    pub fn restore(&mut self, image: &Path) -> Outcome {
        self.restore_with(&[], image)
    }

    /// Two rounds of dump, death and restore, with checks after each; the first image is restored twice.
    pub fn cycles(&mut self, ticks: usize) -> Outcome {
        for round in 1..=2 {
            let at = |e: String| format!("round {round}: {e}");
            let image = self.dump().map_err(at)?;
            self.restore(&image).map_err(at)?;
            self.ticks(ticks).map_err(at)?;
        }
        Ok(())
    }

    /// It was restored by other means than [`Victim::restore`].
    pub fn restored(&mut self) {
        self.alive = true;
    }

    /// Ends it.
    pub fn kill(&mut self) {
        if !self.alive {
            return;
        }
        // Children of a stopped process can be listed; below a dead one nobody is found any more.
        let mut all = vec![self.pid];
        let mut next = 0;
        while next < all.len() {
            // SAFETY: kill takes numbers; all are below an unreaped child of ours.
            unsafe { libc::kill(all[next], libc::SIGSTOP) };
            for pid in members(all[next]) {
                if !all.contains(&pid) {
                    all.push(pid);
                }
            }
            next += 1;
        }
        for pid in &all {
            // SAFETY: as above.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        for pid in &all {
            // SAFETY: waitpid takes numbers; those that are not ours are somebody else's to collect.
            unsafe {
                libc::waitpid(*pid, std::ptr::null_mut(), if *pid == self.pid { 0 } else { libc::__WALL })
            };
        }
        self.child = None;
        self.alive = false;
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
        if self.pid > 0 {
            ipc::remove(self.pid);
        }
        if std::env::var_os("KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("kept: {}", self.dir.path().display());
        }
    }
}

/// A process that only has a pid. Dropped, it is gone.
pub struct Holder {
    pid: i32,
}

impl Holder {
    /// One of this pid, which must be free.
    pub fn of(pid: i32) -> Outcome<Holder> {
        let set = [pid];
        let mut args = [0u64; 11];
        args[4] = libc::SIGCHLD as u64;
        args[8] = set.as_ptr() as u64;
        args[9] = 1;
        // SAFETY: clone3 reads `struct clone_args`; the child only waits to be killed.
        let made = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), 80) };
        if made == 0 {
            loop {
                // SAFETY: pause takes nothing.
                unsafe { libc::pause() };
            }
        }
        ensure!(made == i64::from(pid), "clone3 gives {made}");
        Ok(Holder { pid })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: kill and waitpid take numbers; the process is a child of ours.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// The state letter of a process.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// State and system call of every thread, for messages.
pub fn threads_of(pid: i32) -> String {
    let mut out = String::new();
    for tid in tids(pid) {
        let read = |f: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{f}")).unwrap_or_default();
        let status = read("status");
        let fields: Vec<_> = status
            .lines()
            .filter(|l| {
                ["Name", "State", "TracerPid", "SigPnd", "ShdPnd", "SigBlk"].iter().any(|k| l.starts_with(k))
            })
            .collect();
        let _ = writeln!(
            out,
            "  {tid}: {} | syscall {} | {}",
            fields.join(" "),
            read("syscall").trim(),
            read("wchan")
        );
    }
    out
}

/// The threads of a process.
pub fn tids(pid: i32) -> Vec<i32> {
    let mut all: Vec<i32> = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    all.sort_unstable();
    all
}

/// Lines of a file in /proc/PID whose key is one of `keys`; all without keys.
fn lines(pid: i32, file: &str, keys: &[&str]) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .lines()
        .filter(|l| keys.is_empty() || keys.iter().any(|k| l.split(':').next() == Some(k)))
        .map(str::to_owned)
        .collect()
}

/// What must be as before in a process that does nothing.
pub fn picture(pid: i32) -> BTreeMap<String, Vec<String>> {
    let mut all = light_picture(pid);
    let areas: Vec<String> = lines(pid, "smaps", &[])
        .into_iter()
        .filter(|l| l.starts_with("VmFlags") || l.split(' ').next().is_some_and(|w| w.contains('-')))
        .collect();
    all.insert("smaps".into(), areas);
    for fd in descriptors(pid).keys() {
        // The time that is left runs.
        let info = lines(pid, &format!("fdinfo/{fd}"), &[]);
        let info = info.into_iter().filter(|l| !l.starts_with("it_value")).collect();
        all.insert(format!("fdinfo/{fd}"), info);
    }
    all.insert("timers".into(), lines(pid, "timers", &[]));
    for file in ["limits", "cgroup", "oom_score_adj", "coredump_filter", "personality"] {
        all.insert(file.into(), lines(pid, file, &[]));
    }
    all.insert("cwd".into(), vec![format!("{:?}", fs::read_link(format!("/proc/{pid}/cwd")))]);
    all
}

/// What must be as before in a process that works, but changes none of this.
pub fn light_picture(pid: i32) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    all.insert("maps".to_owned(), lines(pid, "maps", &[]));
    all.insert(
        "fds".to_owned(),
        descriptors(pid).into_iter().map(|(fd, link)| format!("{fd} {link}")).collect(),
    );
    let keys = [
        "Name",
        "Umask",
        "Tgid",
        "PPid",
        "TracerPid",
        "Uid",
        "Gid",
        "FDSize",
        "Groups",
        "VmLck",
        "VmPin",
        "VmData",
        "VmStk",
        "VmExe",
        "VmLib",
        "CoreDumping",
        "Threads",
        "SigQ",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Cpus_allowed",
    ];
    // Pending signals of a process that works come and go.
    let keys: Vec<&str> = keys.into_iter().filter(|k| *k != "SigQ").collect();
    all.insert("status".into(), lines(pid, "status", &keys));
    for tid in tids(pid) {
        all.insert(
            format!("task/{tid}"),
            lines(pid, &format!("task/{tid}/status"), &["Name", "TracerPid", "SigBlk", "Cpus_allowed"]),
        );
    }
    all
}

/// Open descriptors and what they are.
pub fn descriptors(pid: i32) -> BTreeMap<i32, String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let link = fs::read_link(e.path()).map_or_else(|e| e.to_string(), |l| l.display().to_string());
            Some((e.file_name().to_str()?.parse().ok()?, link))
        })
        .collect()
}

/// What differs between two pictures, in words.
pub fn difference(
    before: &BTreeMap<String, Vec<String>>,
    after: &BTreeMap<String, Vec<String>>,
) -> Option<String> {
    let mut out = String::new();
    for key in before.keys().chain(after.keys().filter(|k| !before.contains_key(*k))) {
        let empty = Vec::new();
        let (a, b) = (before.get(key).unwrap_or(&empty), after.get(key).unwrap_or(&empty));
        if a == b {
            continue;
        }
        for line in a.iter().filter(|l| !b.contains(l)) {
            let _ = writeln!(out, "  {key}: - {line}");
        }
        for line in b.iter().filter(|l| !a.contains(l)) {
            let _ = writeln!(out, "  {key}: + {line}");
        }
        if out.is_empty() {
            let _ = writeln!(out, "  {key}: other order");
        }
    }
    (!out.is_empty()).then_some(out)
}
