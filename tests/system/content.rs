//! What an image does not store: pages that the file behind them shows, and shared memory that the parent has.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use libtest_mimic::Trial;
use torpor_image::Image;
use torpor_image::extent::{PAGE, Record, Where};
use torpor_image::inode::{Inode, Source};
use torpor_tests::{Outcome, PATIENCE, Victim, ensure, run_torpor, torpor_command, victim};

const CONFLICT: i32 = 8;

/// Ways to dump, and MiB of other memory: a process that ends is written straight to the image if it has much.
const WAYS: &[(&str, &[&str], &str)] = &[
    ("ended", &[], "1"),
    ("ended, a large one", &[], "300"),
    ("left running", &["--leave-running"], "1"),
    ("by fork", &["--leave-running", "--freeze", "fork"], "1"),
    ("followed", &["--track"], "1"),
    ("compressed", &["--compress", "lz4"], "1"),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = WAYS
        .iter()
        .map(|&(about, options, mib)| {
            Trial::test(format!("content: pages as in the file behind them: {about}"), move || {
                Ok(behind(options, mib)?)
            })
        })
        .collect();
    trials.extend([
        Trial::test("content: pages as in the file behind them: in a chain", || Ok(chain()?)),
        Trial::test("content: pages as in the file behind them: the file is another", || Ok(changed()?)),
        Trial::test("content: pages as in the file behind them: a file of a moment ago", || Ok(fresh()?)),
        Trial::test("content: own pages of a file of data stay as they are", || Ok(insulated()?)),
    ]);
    for (about, options) in
        [("raw", [&[][..]; 3]), ("encoded", [&["--compress", "zstd"], &["--compress", "lz4"], &[]])]
    {
        trials.push(Trial::test(format!("content: shared memory of a chain, {about}"), move || {
            Ok(shared(options)?)
        }));
    }
    trials
        .push(Trial::test("content: shared memory of a parent that was not followed", || Ok(unfollowed()?)));
    trials.push(Trial::test("content: shared memory, dumped every so often", || Ok(every()?)));
    trials
}

fn io(e: std::io::Error) -> String {
    e.to_string()
}

fn path(path: &Path) -> Outcome<&str> {
    Ok(path.to_str().ok_or("a path")?)
}

fn open(dir: &Path) -> Outcome<Image> {
    Image::open(dir).map_err(|e| e.to_string())
}

/// A victim that is its own program, of an hour ago.
fn start(mib: &str) -> Outcome<Victim> {
    let mut it = Victim::prepare()?;
    let own = program(&it);
    let mut bytes = fs::read(victim("behind")?).map_err(io)?;
    // Its last page has an end.
    bytes.resize(bytes.len().next_multiple_of(PAGE as usize) + 99, b'x');
    fs::write(&own, bytes).map_err(io)?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).map_err(io)?;
    age(&own, Duration::from_secs(3600))?;
    let said = fs::File::create(it.dir.path().join("said")).map_err(io)?;
    let mut command = Command::new(&own);
    command.arg(it.log()).arg(it.home()).arg(mib).stdin(Stdio::null());
    it.spawn(command.stdout(said.try_clone().map_err(io)?).stderr(said))?;
    it.ticks(3)?;
    Ok(it)
}

fn program(victim: &Victim) -> PathBuf {
    victim.dir.path().join("behind")
}

/// Makes a file seem to be so old.
fn age(file: &Path, by: Duration) -> Outcome {
    let file = fs::File::options().read(true).open(file).map_err(io)?;
    file.set_modified(SystemTime::now() - by).map_err(io)
}

/// Where its areas are, and its child.
struct Place {
    table: u64,
    code: u64,
    data: u64,
    tail: u64,
    child: i32,
}

fn place(victim: &Victim) -> Outcome<Place> {
    let text = fs::read_to_string(victim.home().join("where")).map_err(io)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [table, code, data, tail, child] = words[..] else { return Err(format!("where: {text}")) };
    let hex = |word: &str| u64::from_str_radix(word, 16).map_err(|e| e.to_string());
    let child = child.parse().map_err(|_| text.clone())?;
    Ok(Place { table: hex(table)?, code: hex(code)?, data: hex(data)?, tail: hex(tail)?, child })
}

/// Numbers of the pages of an area that a task has in the image, in a certain way.
fn pages(image: &Image, pid: i32, start: u64, count: u64, how: Where) -> Outcome<Vec<u64>> {
    let task = image.tasks.iter().find(|t| t.pid.0 == pid).ok_or("a task")?;
    let records = image.records(task.memory.pages).iter().filter(|r| r.place == how);
    let pages = records.flat_map(|r: &Record| (r.address..r.address + r.length).step_by(PAGE as usize));
    let area = start..start + count * PAGE;
    Ok(pages.filter(|a| area.contains(a)).map(|a| (a - start) / PAGE).collect())
}

/// What an image of this victim must have, and no more.
fn frugal(victim: &Victim, dir: &Path) -> Outcome {
    let (image, at) = (open(dir)?, place(victim)?);
    let expect = |pid, start, count, how, wanted: &[u64], what: &str| -> Outcome {
        let found = pages(&image, pid, start, count, how)?;
        ensure!(found == wanted, "{what} of pid {pid}: {found:?} are there as {how:?} instead of {wanted:?}");
        Ok(())
    };
    let written: Vec<u64> = (0..16).collect();
    for (pid, differs) in [(victim.pid, 17), (at.child, 3)] {
        expect(pid, at.table, 64, Where::Data, &[differs], "the table")?;
        expect(pid, at.table, 64, Where::Zero, &[30], "the table")?;
        expect(pid, at.code, 16, Where::Data, &[5], "the code")?;
        expect(pid, at.data, 32, Where::Data, &written, "the data")?;
        expect(pid, at.tail, 1, Where::Data, &[], "the tail")?;
    }
    Ok(())
}

/// Restores an image, twice, and lets it look at all it has; the second is left running.
fn twice(victim: &mut Victim, image: &Path) -> Outcome {
    for _ in 0..2 {
        victim.kill();
        // Its log has grown.
        victim.restore_with(&["--accept-changed"], image)?;
        victim.ticks(4)?;
    }
    Ok(())
}

fn behind(options: &[&str], mib: &str) -> Outcome {
    let mut victim = start(mib)?;
    let image = if options.iter().any(|o| ["--leave-running", "--track"].contains(o)) {
        victim.dump_with(options)?
    } else {
        let image = victim.dump_with(options)?;
        victim.reap_all(&image)?;
        image
    };
    frugal(&victim, &image)?;
    twice(&mut victim, &image)?;
    // What was left out is the file's own page by now, and still as it was.
    let again = victim.dump_with(&["--leave-running"])?;
    frugal(&victim, &again)?;
    twice(&mut victim, &again)?;
    victim.kill();
    victim.restore_with(&["--accept-changed", "--lazy"], &again)?;
    victim.ticks(4)
}

fn chain() -> Outcome {
    let mut victim = start("1")?;
    let mut images = vec![victim.dump_with(&["--track"])?];
    let at = place(&victim)?;
    let differ = |image: &Path, pid| pages(&open(image)?, pid, at.table, 64, Where::Data);
    for (i, options) in [&["--track"][..], &["--track"], &[]].into_iter().enumerate() {
        if i == 1 {
            // What differs in the parent is as in the file again.
            fs::write(victim.home().join("back"), "").map_err(io)?;
        }
        victim.ticks(2)?;
        let parent = images.last().map(|p| path(p)).ok_or("a parent")??.to_owned();
        let options = [options, &["--parent", &parent]].concat();
        images.push(victim.dump_with(&options)?);
    }
    victim.reap_all(&images[3])?;
    for (i, image) in images.iter().enumerate() {
        run_torpor(&["verify", path(image)?])?.expect(0)?;
        let own: &[u64] = if i < 2 { &[17] } else { &[] };
        let (found, childs) = (differ(image, victim.pid)?, differ(image, at.child)?);
        ensure!(found == own && childs == [3], "image {i} has pages {found:?}, and {childs:?} of the child");
        twice(&mut victim, image)?;
    }
    Ok(())
}

fn changed() -> Outcome {
    let mut victim = start("1")?;
    let image = victim.dump_with(&[])?;
    victim.reap_all(&image)?;
    let restore = |victim: &mut Victim| victim.restore_with(&[], &image);
    let own = program(&victim);
    let modified = fs::metadata(&own).and_then(|m| m.modified()).map_err(io)?;
    age(&own, Duration::from_secs(7200))?;
    let said = run_torpor(&["restore", "--detach", path(&image)?])?.expect(CONFLICT)?;
    ensure!(said.contains("was modified since the dump"), "it says: {said}");
    fs::File::open(&own).and_then(|f| f.set_modified(modified)).map_err(io)?;
    restore(&mut victim)?;
    victim.ticks(4)?;
    victim.kill();
    // The log of the one that was restored is longer; the program is made again from its spare copy.
    fs::remove_file(&own).map_err(io)?;
    victim.restore_with(&["--accept-changed"], &image)?;
    victim.ticks(4)
}

/// A program that is too young for its time to tell whether it was changed.
fn fresh() -> Outcome {
    let mut victim = start("1")?;
    age(&program(&victim), Duration::ZERO)?;
    let image = victim.dump_with(&[])?;
    victim.reap_all(&image)?;
    let at = place(&victim)?;
    let stored = pages(&open(&image)?, victim.pid, at.table, 64, Where::Data)?.len();
    ensure!(stored == 63, "{stored} of 63 pages are stored");
    twice(&mut victim, &image)
}

fn insulated() -> Outcome {
    let mut victim = start("1")?;
    let image = victim.dump_with(&[])?;
    victim.reap_all(&image)?;
    let data = fs::read(victim.home().join("data")).map_err(io)?;
    for round in 0..2 {
        if round == 1 {
            // As it was, for the image.
            victim.kill();
            let modified = open(&image)?.objects.inodes.iter().find_map(data_time).ok_or("its time")?;
            fs::write(victim.home().join("data"), &data).map_err(io)?;
            let file = fs::File::open(victim.home().join("data")).map_err(io)?;
            file.set_modified(modified).map_err(io)?;
            fs::remove_file(victim.home().join("overwrite")).map_err(io)?;
        }
        victim.restore_with(&["--accept-changed"], &image)?;
        victim.ticks(2)?;
        fs::write(victim.home().join("overwrite"), "").map_err(io)?;
        victim.ticks(4)?;
        let now = fs::read(victim.home().join("data")).map_err(io)?;
        ensure!(now != data, "it has not written");
    }
    Ok(())
}

fn data_time(inode: &Inode) -> Option<SystemTime> {
    inode
        .name()
        .ends_with("/data")
        .then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(inode.modified as u64))
}

/// Pages of shared memory that an image has in data files of its own: of the memfd, the segment, without a name, on tmpfs.
fn own_pages(dir: &Path) -> Outcome<[u64; 4]> {
    pages_in(dir, |_| true)
}

/// The same, in those of these names.
fn pages_in(dir: &Path, named: impl Fn(&str) -> bool) -> Outcome<[u64; 4]> {
    let image = open(dir)?;
    let own = image.data_files().filter(|(_, file)| named(&file.name));
    let own: Vec<u32> = own.map(|(number, _)| number).collect();
    let mut all = [0; 4];
    for inode in &image.objects.inodes {
        let kind = match &inode.source {
            Source::Memfd { .. } => 0,
            Source::SysV { .. } => 1,
            Source::SharedMemory { .. } => 2,
            Source::Path { path } if path.path().ends_with("named") => 3,
            _ => continue,
        };
        let records = image.records(inode.content().ok_or("contents")?).iter();
        let data = records.filter(|r| r.place == Where::Data && own.contains(&r.file));
        all[kind] += data.map(|r| r.length / PAGE).sum::<u64>();
    }
    Ok(all)
}

/// A victim with shared memory, and what there is of it on tmpfs.
struct Pool {
    victim: Victim,
    _tmpfs: tempfile::TempDir,
}

impl Pool {
    fn start() -> Outcome<Pool> {
        let tmpfs = tempfile::Builder::new().prefix("torpor-test-").tempdir_in("/dev/shm").map_err(io)?;
        let named = tmpfs.path().join("named");
        Ok(Pool { victim: Victim::start("pool", &[path(&named)?])?, _tmpfs: tmpfs })
    }

    fn turn(&self, n: u32) -> Outcome {
        fs::write(self.victim.home().join(format!("turn-{n}")), "").map_err(io)?;
        let begin = Instant::now();
        while !self.victim.home().join(format!("turned-{n}")).exists() {
            self.victim.count()?;
            ensure!(begin.elapsed() < PATIENCE, "it makes no turn");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.victim.ticks(1)
    }

    fn expect(&self, image: &Path, wanted: [u64; 4]) -> Outcome {
        let found = own_pages(image)?;
        ensure!(found == wanted, "{found:?} pages are written instead of {wanted:?}");
        run_torpor(&["verify", path(image)?])?.expect(0).map(drop)
    }
}

/// All that was ever written to: all but every 64th page.
const WHOLE: [u64; 4] = [1008, 504, 504, 504];
/// What the turns of tests/victims/pool.c change, pages of zeros left out.
const FIRST: [u64; 4] = [10, 3, 4, 1];
const SECOND: [u64; 4] = [12, 1, 1, 0];

fn shared(options: [&[&str]; 3]) -> Outcome {
    let mut pool = Pool::start()?;
    let first = pool.victim.dump_with(&[&["--track"], options[0]].concat())?;
    pool.expect(&first, WHOLE)?;
    pool.turn(1)?;
    let parent = ["--parent", path(&first)?];
    let second = pool.victim.dump_with(&[&["--track"], options[1], &parent].concat())?;
    pool.expect(&second, FIRST)?;
    // Nothing has changed, and there is nothing to be written.
    let parent = ["--parent", path(&second)?];
    let same = pool.victim.dump_with(&[&["--track"], options[1], &parent].concat())?;
    pool.expect(&same, [0; 4])?;
    pool.turn(2)?;
    let last = pool.victim.dump_with(&[options[2], &parent].concat())?;
    pool.victim.reap_all(&last)?;
    pool.expect(&last, SECOND)?;
    let squashed = pool.victim.image();
    run_torpor(&["squash", path(&last)?, path(&squashed)?])?.expect(0)?;
    for image in [&last, &first, &second, &same, &last, &squashed] {
        // Turns that the image does not have are not made again.
        twice(&mut pool.victim, image)?;
    }
    Ok(())
}

/// Contents are compared whether or not anybody has followed what was written.
fn unfollowed() -> Outcome {
    let mut pool = Pool::start()?;
    let first = pool.victim.dump_with(&["--leave-running"])?;
    pool.turn(1)?;
    let second = pool.victim.dump_with(&["--parent", path(&first)?])?;
    pool.victim.reap_all(&second)?;
    pool.expect(&second, FIRST)?;
    twice(&mut pool.victim, &second)?;
    // What was restored has other memory: nothing of it is the parent's.
    let third = pool.victim.dump_with(&["--leave-running", "--parent", path(&second)?])?;
    let found = own_pages(&third)?;
    ensure!(found[0] > 900 && found[2] > 400, "{found:?} pages are written");
    twice(&mut pool.victim, &third)
}

fn every() -> Outcome {
    let mut pool = Pool::start()?;
    let dir = pool.victim.image();
    let pid = pool.victim.pid.to_string();
    let mut dumps =
        torpor_command(&["dump", "--every", "150ms", "--keep", "2", "--quiet", &pid, path(&dir)?])
            .stdout(Stdio::null())
            .spawn()
            .map_err(io)?;
    let complete = || {
        let all = fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path());
        let mut all: Vec<PathBuf> = all.filter(|n| n.join("manifest.tpr").exists()).collect();
        all.sort();
        all
    };
    let reach = |n: u32| -> Outcome {
        let begin = Instant::now();
        while complete().last().is_none_or(|last| *last < dir.join(format!("{n:06}"))) {
            ensure!(begin.elapsed() < PATIENCE, "there are {:?} only", complete());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    reach(3)?;
    pool.turn(1)?;
    reach(8)?;
    // SAFETY: a child of ours that was not collected yet.
    unsafe { libc::kill(dumps.id() as i32, libc::SIGINT) };
    torpor_tests::ended(&mut dumps)?;
    let images = complete();
    // The last has what did not change from a file of the one before.
    let [.., before, last] = &images[..] else { return Err(format!("there are {images:?} only")) };
    let files = fs::read_dir(before).map_err(io)?.flatten().filter_map(|e| e.metadata().ok());
    let files: Vec<u64> = files.map(|m| m.ino()).collect();
    let common = |name: &str| fs::metadata(last.join(name)).is_ok_and(|m| files.contains(&m.ino()));
    let common = pages_in(last, common)?;
    // The turn has given back some, and one page is new.
    ensure!(common == [1000, 504, 504, 504], "{common:?} pages are in common");
    for image in images {
        twice(&mut pool.victim, &image)?;
    }
    Ok(())
}
