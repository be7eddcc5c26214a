//! What a dump of a running process would take, lose or refuse, without stopping it.

use std::os::unix::fs::FileExt;

use torpor_image::Bytes;
use torpor_kernel::fds::{self, KcmpType};
use torpor_kernel::ids::Pid;
use torpor_kernel::maps::Mapping;
use torpor_kernel::{process, status};

use crate::collect::{Collector, stat_path};
use crate::error::{Error, Refusal, Result};
use crate::{description, freeze, task, vma};

/// What a dump of a process would find.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The process.
    pub pid: Pid,
    /// Its name.
    pub name: String,
    /// How many threads it has.
    pub threads: u32,
    /// Resident memory in bytes.
    pub resident: u64,
    /// How many areas its memory has.
    pub areas: usize,
    /// Descriptors: number, kind and name.
    pub descriptors: Vec<(i32, &'static str, String)>,
    /// What a dump refuses, by name.
    pub refusals: Vec<Refusal>,
    /// What a dump would leave out and say so in the manifest.
    pub losses: Vec<String>,
}

/// Looks at a process that runs.
pub(crate) fn survey(pid: Pid) -> Result<(Survey, Vec<Mapping>)> {
    let status = preconditions(pid)?;
    let mut collector = Collector::new(pid, true)?;
    refuse_process(&mut collector, &status)?;
    let table = description::collect(&mut collector)?;
    let maps = vma::read(&collector)?;
    let areas = vma::collect(&mut collector, &maps)?.len();
    task::exe(&mut collector)?;
    let descriptors = table
        .descriptors
        .iter()
        .map(|d| {
            let kind = collector.objects.descriptions[d.description.0 as usize].kind.noun();
            let link = fds::readlink(pid, d.fd).unwrap_or_default();
            (d.fd, kind, String::from_utf8_lossy(&link).into_owned())
        })
        .collect();
    let survey = Survey {
        pid,
        name: String::from_utf8_lossy(&status.name).into_owned(),
        threads: status.threads,
        resident: status.rss_kb * 1024,
        areas,
        descriptors,
        refusals: collector.refusals,
        losses: collector.losses,
    };
    Ok((survey, maps))
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
        return not("it is torpor itself");
    }
    if process::is_kernel_thread(pid).map_err(Error::kernel(pid, "reading its stat"))? {
        return not("it is a thread of the kernel");
    }
    if status.state == 'Z' || status.state == 'X' {
        let others = process::tasks(pid).map_or(0, |t| t.len());
        return not(if others > 1 {
            "its first thread has exited while others go on; dumping such a process comes with trees"
        } else {
            "it has ended and waits for its parent to collect its status"
        });
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

/// Refusals about the process as a whole.
pub(crate) fn refuse_process(collector: &mut Collector, status: &status::Status) -> Result<()> {
    let pid = collector.pid;
    let theirs = match process::namespaces(pid) {
        Ok(all) => all,
        Err(e) if matches!(e.errno(), Some(nix::errno::Errno::EACCES | nix::errno::Errno::EPERM)) => {
            return Err(Error::Permission { pid, source: e });
        }
        Err(e) => return Err(Error::kernel(pid, "reading its namespaces")(e)),
    };
    for (name, own) in process::namespaces(Pid::this()).map_err(Error::kernel(pid, "reading namespaces"))? {
        if theirs.iter().any(|(n, inode)| *n == name && *inode != own) {
            collector.refuse(
                format!("its {name} namespace"),
                "it is not torpor's own, and namespaces cannot be dumped yet",
                "run torpor inside of it (nsenter)",
            );
        }
    }
    if status.seccomp != 0 {
        collector.refuse("seccomp", "its filters cannot be dumped yet", "start the program without them");
    }
    let children = process::children(pid).map_err(Error::kernel(pid, "listing its children"))?;
    if !children.is_empty() {
        let list: Vec<String> = children.iter().map(|c| format!("{c} ({})", freeze::name_of(c.0))).collect();
        collector.refuse(
            format!("its children {}", list.join(", ")),
            "trees of several processes cannot be dumped yet",
            "dump it while it has none",
        );
    }
    for (kind, what) in [
        (KcmpType::Vm, "memory"),
        (KcmpType::Files, "descriptor table"),
        (KcmpType::Fs, "working directory"),
        (KcmpType::Sighand, "signal actions"),
    ] {
        let parent = Pid(status.ppid);
        // A parent that we may not look at shares nothing with a process that we may.
        if parent.0 != 0
            && fds::kcmp(pid, parent, kind, 0, 0).is_ok_and(|order| order == std::cmp::Ordering::Equal)
        {
            collector.refuse(
                format!("its {what}"),
                format!(
                    "it is shared with its parent, pid {parent} (CLONE_*), which is not part of the dump"
                ),
                "wait until it has one of its own, as after execve",
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
