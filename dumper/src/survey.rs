//! What a dump of a running process would take, lose or refuse, without stopping it.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use torpor_image::Bytes;
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::maps::Mapping;
use torpor_kernel::{process, status};

use crate::collect::{Collector, stat_path};
use crate::error::{Error, Refusal, Result};
use crate::opened::Opened;
use crate::unix::ExternalUnix;
use crate::{description, freeze, mqueue, sysv, task, tcp, thread, timer, vma, workers};

/// What a dump of a tree would find.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its processes, the root first and every other after its parent.
    pub processes: Vec<Process>,
    /// Processes that have ended and wait for their parents: pid, parent, name.
    pub zombies: Vec<(Pid, Pid, String)>,
    /// System V IPC objects that count as theirs.
    pub ipc: Vec<String>,
    /// What a dump refuses, by name.
    pub refusals: Vec<Refusal>,
    /// What a dump would leave out and say so in the manifest.
    pub losses: Vec<String>,
}

/// One process of a tree.
#[derive(Clone, Debug)]
pub struct Process {
    /// The process.
    pub pid: Pid,
    /// Its parent.
    pub ppid: Pid,
    /// Its name.
    pub name: String,
    /// How many threads it has.
    pub threads: u32,
    /// Resident memory in bytes.
    pub resident: u64,
    /// How many areas its memory has.
    pub areas: usize,
    /// Its descriptors.
    pub descriptors: Vec<Descriptor>,
}

/// A descriptor of a process.
#[derive(Clone, Debug)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// What it is, in a word or two.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Number of the description behind it: the same for all that share it.
    pub description: u32,
}

impl Survey {
    /// The root of the tree.
    pub fn root(&self) -> &Process {
        &self.processes[0]
    }

    /// Threads of all processes.
    pub fn threads(&self) -> u32 {
        self.processes.iter().map(|p| p.threads).sum()
    }

    /// Resident memory of all processes in bytes; what they share counts for each.
    pub fn resident(&self) -> u64 {
        self.processes.iter().map(|p| p.resident).sum()
    }
}

/// The memory map of every process.
#[derive(Debug)]
pub(crate) struct Maps {
    pub(crate) all: Vec<(Pid, Vec<Mapping>)>,
    /// How long it took to read them.
    pub(crate) took: Duration,
    /// In which order descriptions were found.
    pub(crate) order: description::Order,
}

/// How often a running tree is looked at before a refusal is believed: what is seen of processes that come and
/// go need not fit together.
const LOOKS: u32 = 3;

/// How long a watch over what is written may take to end, all in all, when its dump has.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at whether it has.
const PAUSE: Duration = Duration::from_millis(10);

/// Looks at a tree that runs. Gives the memory maps of its processes, too.
pub(crate) fn survey(
    root: Pid,
    policy: tcp::TcpPolicy,
    external_unix: &[ExternalUnix],
    watched: &HashSet<Pid>,
) -> Result<(Survey, Maps)> {
    let patience = Instant::now() + PATIENCE;
    let (mut survey, mut maps) = look(root, policy, external_unix, watched, patience)?;
    for _ in 1..LOOKS {
        if survey.refusals.is_empty() || survey.processes.len() == 1 {
            break;
        }
        let before = std::mem::take(&mut survey.refusals);
        (survey, maps) = look(root, policy, external_unix, watched, patience)?;
        survey.refusals.retain(|r| before.contains(r));
    }
    Ok((survey, maps))
}

/// How long a thread may wait for a vfork child before a dump is not even tried: such a thread can be attached to but
/// not stopped, nor let go again before its child has gone on.
const VFORK: Duration = Duration::from_millis(500);

/// Threads that wait for a vfork child, and go on waiting.
fn vforks(found: &Members) -> Vec<Refusal> {
    let waiting = |pid: Pid| {
        let asleep = move |tid: &Tid| status::of_task(pid, *tid).is_ok_and(|s| s.state == 'D');
        let tids = process::tasks(pid).unwrap_or_default().into_iter().filter(asleep);
        tids.filter(move |tid| freeze::waits_for_vfork(pid, *tid)).map(move |tid| (pid, tid))
    };
    let parents =
        || found.living.iter().filter(|(pid, _)| process::children(*pid).is_ok_and(|c| !c.is_empty()));
    let mut all: Vec<(Pid, Tid)> = parents().flat_map(|(pid, _)| waiting(*pid)).collect();
    let begin = Instant::now();
    while !all.is_empty() && begin.elapsed() < VFORK {
        std::thread::sleep(Duration::from_millis(5));
        all.retain(|(pid, tid)| freeze::waits_for_vfork(*pid, *tid));
    }
    all.into_iter().map(|(pid, tid)| freeze::vfork(pid, tid)).collect()
}

fn look(
    root: Pid,
    policy: tcp::TcpPolicy,
    external_unix: &[ExternalUnix],
    watched: &HashSet<Pid>,
    patience: Instant,
) -> Result<(Survey, Maps)> {
    let mut found = members(root)?;
    let vforks = vforks(&found);
    let mut collector = Collector::new(root, true);
    collector.tcp.policy = policy;
    collector.watched.clone_from(watched);
    collector.sockets.rules = external_unix.to_vec();
    collector.members = found.living.iter().map(|(pid, _)| pid.0).collect();
    let mut tables = Vec::new();
    let mut looks =
        workers::each(&found.living, |(pid, _)| description::look(&[&Opened::read(living(*pid))?], true))
            .into_iter();
    found.living.retain(|&(pid, _)| {
        // Only the root must be there; another process may end at any moment.
        match looks.next().expect("one for each") {
            Ok(table) => tables.push(Ok(table.into_iter().flatten().collect())),
            Err(e) if pid == root => tables.push(Err(e)),
            Err(_gone) if has_ended(pid) => return false,
            Err(e) => tables.push(Err(e)),
        }
        true
    });
    let tables = tables.into_iter().collect::<Result<Vec<Vec<description::Found>>>>()?;
    let links: Vec<Vec<Vec<u8>>> =
        tables.iter().map(|t| t.iter().map(|f| f.link.clone()).collect()).collect();
    let numbers: Vec<Vec<i32>> = tables.iter().map(|t| t.iter().map(|f| f.fd).collect()).collect();
    let tables = match description::collect(&mut collector, tables) {
        Ok(tables) => tables,
        Err(e) if has_ended(collector.pid) && collector.pid != root => {
            // Once more without the one that has ended meanwhile.
            let _gone = e;
            return look(root, policy, external_unix, watched, patience);
        }
        Err(e) => return Err(e),
    };
    tcp::finish(&mut collector)?;
    let (mut processes, mut maps) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    let mut areas = workers::each(&found.living, |(pid, _)| vma::read(living(*pid)));
    let took = begin.elapsed();
    // A watch by the tree itself stays.
    if !links.iter().flatten().any(|link| link == b"anon_inode:[userfaultfd]") {
        for ((pid, _), area) in
            found.living.iter().zip(&mut areas).filter(|((pid, _), _)| !watched.contains(pid))
        {
            while area.as_ref().is_ok_and(|maps| vma::watch_ends(*pid, maps)) && Instant::now() < patience {
                std::thread::sleep(PAUSE);
                *area = vma::read(living(*pid));
            }
        }
    }
    for (i, ((pid, status), area)) in found.living.iter().zip(areas).enumerate() {
        collector.turn_to(living(*pid));
        let (before, lost) = (collector.refusals.len(), collector.losses.len());
        let area = match area.and_then(|maps| process(&mut collector, root, *pid, status, maps)) {
            Ok(area) => area,
            Err(_gone) if *pid != root && has_ended(*pid) => {
                collector.refusals.truncate(before);
                collector.losses.truncate(lost);
                continue;
            }
            Err(e) => return Err(e),
        };
        let descriptors = tables[i].descriptors.iter().map(|d| {
            let at = numbers[i].binary_search(&d.fd);
            let link = at.map_or(&[][..], |at| &links[i][at]);
            Descriptor {
                fd: d.fd,
                kind: collector.objects.descriptions[d.description.0 as usize].kind.noun(),
                name: String::from_utf8_lossy(link).into_owned(),
                description: d.description.0,
            }
        });
        processes.push(Process {
            pid: *pid,
            ppid: Pid(status.ppid),
            name: String::from_utf8_lossy(&status.name).into_owned(),
            threads: status.threads,
            resident: status.rss_kb * 1024,
            areas: area.0,
            descriptors: descriptors.collect(),
        });
        maps.push((*pid, area.1));
    }
    sysv::collect(&mut collector)?;
    mqueue::refuse_shared(&mut collector);
    let ipc = sysv::names(&collector);
    let Collector { mut refusals, losses, order, .. } = collector;
    refusals.extend(vforks);
    Ok((Survey { processes, zombies: found.zombies, ipc, refusals, losses }, Maps { all: maps, took, order }))
}

/// What is asked of a process besides its descriptors: the count of its areas, and its map.
fn process(
    collector: &mut Collector,
    root: Pid,
    pid: Pid,
    status: &status::Status,
    maps: Vec<Mapping>,
) -> Result<(usize, Vec<Mapping>)> {
    refuse_process(collector, pid == root, status)?;
    thread::survey(collector, pid);
    timer::survey(collector, status.threads as usize);
    let areas = vma::collect(collector, &maps)?.len();
    task::exe(collector)?;
    Ok((areas, maps))
}

/// Processes of a tree that runs.
struct Members {
    living: Vec<(Pid, status::Status)>,
    zombies: Vec<(Pid, Pid, String)>,
}

/// Lists the tree below `root`. What comes and goes meanwhile may be missing.
fn members(root: Pid) -> Result<Members> {
    let mut all = Members { living: vec![(root, preconditions(root)?)], zombies: Vec::new() };
    let mut next = 0;
    while next < all.living.len() {
        let parent = all.living[next].0;
        for child in process::children(parent).unwrap_or_default() {
            let Ok(status) = status::of_process(child) else { continue };
            if all.living.iter().any(|(pid, _)| *pid == child) {
                continue;
            }
            if has_ended(child) {
                let name = String::from_utf8_lossy(&status.name).into_owned();
                all.zombies.push((child, parent, name));
            } else {
                match preconditions(child) {
                    Err(_) if child == Pid::this() => {
                        let why = format!(
                            "torpor itself, pid {child}, is below it: run torpor from elsewhere, as from another terminal"
                        );
                        return Err(Error::NotDumpable { pid: root, why });
                    }
                    Ok(status) => all.living.push((child, status)),
                    Err(_) if has_ended(child) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        next += 1;
    }
    Ok(all)
}

/// Whether nothing of a process is left, or only what its parent must collect.
fn has_ended(pid: Pid) -> bool {
    match status::of_process(pid) {
        Ok(status) if matches!(status.state, 'Z' | 'X') => process::tasks(pid).map_or(true, |t| t.len() < 2),
        Ok(_) => process::is_ending(pid) && process::tasks(pid).map_or(true, |t| t.len() < 2),
        Err(e) => e.is_gone(),
    }
}

/// A thread of the process that lives: its first one may have ended while others go on.
pub(crate) fn living(pid: Pid) -> Pid {
    if status::of_process(pid).is_ok_and(|s| s.state != 'Z') {
        return pid;
    }
    let lives = |tid: &torpor_kernel::ids::Tid| status::of_task(pid, *tid).is_ok_and(|s| s.state != 'Z');
    process::tasks(pid).unwrap_or_default().into_iter().find(lives).map_or(pid, |tid| Pid(tid.0))
}

/// What makes any look at a process pointless.
fn preconditions(pid: Pid) -> Result<status::Status> {
    let not = |why: &str| Err(Error::NotDumpable { pid, why: why.to_owned() });
    if pid.0 <= 0 {
        return Err(Error::NoProcess(pid));
    }
    let status = match status::of_process(pid) {
        Ok(status) => status,
        Err(e) if e.is_gone() => return Err(Error::NoProcess(pid)),
        Err(e) => return Err(Error::kernel(pid, "reading its status")(e)),
    };
    if status.tgid != pid.0 {
        return not(&format!("it is a thread of pid {}; name the process", status.tgid));
    }
    if pid == Pid::this() {
        return not("it is torpor itself: name another process");
    }
    if process::is_kernel_thread(pid).map_err(Error::kernel(pid, "reading its stat"))? {
        return not("it is a thread of the kernel: only programs can be dumped");
    }
    if (status.state == 'Z' || status.state == 'X') && process::tasks(pid).map_or(0, |t| t.len()) < 2 {
        return not(
            "it has ended and waits for its parent to collect its status: nothing of it is left to be dumped",
        );
    }
    if status.tracer_pid != 0 {
        return Err(Error::Traced {
            pid,
            tracer: status.tracer_pid,
            name: freeze::name_of(status.tracer_pid),
        });
    }
    Ok(status)
}

/// Those of torpor itself, which stays in them.
fn own_namespaces() -> torpor_kernel::Result<&'static [(String, u64)]> {
    static OWN: OnceLock<Vec<(String, u64)>> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let own = process::namespaces(Pid::this())?;
    Ok(OWN.get_or_init(|| own))
}

/// Refusals about the process as a whole; the root must share nothing with processes outside.
pub(crate) fn refuse_process(
    collector: &mut Collector,
    is_root: bool,
    status: &status::Status,
) -> Result<()> {
    let pid = collector.pid;
    let theirs = process::namespaces(pid).map_err(Error::looking(pid, "reading its namespaces"))?;
    for (name, own) in own_namespaces().map_err(Error::kernel(pid, "reading namespaces"))? {
        // That of children is named only where it is another one.
        let of_children = name.strip_suffix("_for_children");
        let inode = |wanted: &str| theirs.iter().find(|(n, _)| n == wanted).map(|(_, inode)| *inode);
        let same_as_own = of_children.is_some_and(|own| inode(own) == inode(name));
        if !same_as_own && inode(name).is_some_and(|inode| inode != *own) {
            collector.refuse(
                format!("its {name} namespace"),
                "it is not torpor's own, and namespaces cannot be dumped yet",
                &format!("run torpor inside of it (nsenter --target {pid} --all torpor ...)"),
            );
        }
    }
    if status.seccomp != 0 {
        collector.refuse("seccomp", "its filters cannot be dumped yet", "start the program without them");
    }
    for (kind, what) in [
        (KcmpType::Vm, "memory"),
        (KcmpType::Files, "descriptor table"),
        (KcmpType::Fs, "working directory"),
        (KcmpType::Sighand, "signal actions"),
    ] {
        let parent = Pid(status.ppid);
        // A parent that we may not look at shares nothing with a process that we may.
        if is_root
            && parent.0 != 0
            && fds::kcmp(pid, parent, kind, 0, 0).is_ok_and(|order| order == std::cmp::Ordering::Equal)
        {
            collector.refuse(
                format!("its {what}"),
                format!(
                    "shared with its parent, pid {parent} ({}), which is not part of the dump (CLONE_*)",
                    freeze::name_of(parent.0)
                ),
                &format!(
                    "dump pid {parent} with all below it, or wait until it has its own, as after execve"
                ),
            );
        }
    }
    directories(collector)?;
    // e_ident[EI_CLASS] is 2 for 64 bits (elf(5)).
    let mut class = [0u8; 5];
    let header = std::fs::File::open(format!("/proc/{pid}/exe")).and_then(|f| f.read_exact_at(&mut class, 0));
    if header.is_ok() && class[4] != 2 {
        collector.refuse(
            "its program",
            "it is of another word size than torpor",
            "use a program of this word size",
        );
    }
    Ok(())
}

/// Working and root directory must be found again by their names.
fn directories(collector: &mut Collector) -> Result<()> {
    let pid = collector.pid;
    for (what, link) in [("working directory", "cwd"), ("root directory", "root")] {
        let path = if link == "cwd" { process::cwd(pid) } else { process::root(pid) };
        let path = Bytes(path.map_err(Error::kernel(pid, format!("reading its {what}")))?);
        let own = nix::sys::stat::stat(format!("/proc/{pid}/{link}").as_str()).map_err(|e| {
            Error::kernel(pid, format!("reading its {what}"))(torpor_kernel::Error::syscall("stat", link, e))
        })?;
        if stat_path(&path).is_none_or(|now| (now.st_dev, now.st_ino) != (own.st_dev, own.st_ino)) {
            collector.refuse(
                format!("its {what} `{path}`"),
                "it was removed, or its path leads elsewhere by now",
                "let the program change to another directory",
            );
        }
    }
    Ok(())
}
