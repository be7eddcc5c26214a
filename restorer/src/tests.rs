//! Plans of images made of parts, on a host that is plain data: no privilege, no system call.

mod kernel;
mod lineage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use torpor_image::credentials::Credentials;
use torpor_image::description::{Description, Kind, Objects};
use torpor_image::directory::Directory;
use torpor_image::epoll::{Epoll, EpollTarget};
use torpor_image::eventfd::EventFd;
use torpor_image::extent::{Extents, Record, Where};
use torpor_image::header;
use torpor_image::inode::{Inode, Source};
use torpor_image::manifest::Manifest;
use torpor_image::memory::{AddressSpace, MmFields};
use torpor_image::pidfd::PidFd;
use torpor_image::pipe::{Packet, Pipe, PipeEnd};
use torpor_image::pty::{Pty, PtyEnd, Side, Slave, Stop};
use torpor_image::rules::Rule;
use torpor_image::scheduling::Scheduling;
use torpor_image::signal::{ProcessSignals, SignalAction, ThreadSignals};
use torpor_image::task::{Descriptor, Task};
use torpor_image::terminal::ControllingTerminal;
use torpor_image::thread::Thread;
use torpor_image::timer::{Interval, PosixTimer, Timers};
use torpor_image::vma::{Lock, Mapping, Vma};
use torpor_image::{Bytes, DescriptionId, Image, InodeId, Pid, PipeId, PtyId};
use torpor_parasite::script::{Script, Value};

use crate::host::Host;
use crate::plan::{Open, Options, Plan, plan};

/// A machine without privileges to spare.
pub(crate) fn host() -> Host {
    Host {
        occupied: vec![(0x5555_0000_0000, 0x5555_0001_0000), (0x7fff_0000_0000, 0x7fff_0002_0000)],
        kernel_areas: vec![
            (b"[vvar]".as_slice().into(), 0x7fff_1000_0000, 0x7fff_1000_4000),
            (b"[vdso]".as_slice().into(), 0x7fff_1000_4000, 0x7fff_1000_6000),
        ],
        vdso: vec![0x90, 0x0f, 0x05, 0xc3].into(),
        xstate_features: 7,
        xstate_size: 576,
        boot: String::new(),
        program: (0, 0),
        limits: vec![(1024, 4096); 16],
        credentials: Credentials::default(),
        may_raise_limits: false,
        scheduling: (0, 0),
        affinity: vec![3, 0, 0, 0, 0, 0, 0, 0].into(),
        oom_score_adj: 0,
        coredump_filter: Some(0x33),
        timer_ids: true,
        last_capability: 40,
        pid: 3,
        pgid: 7,
    }
}

/// Parts of an image of one process, to be changed before they are put together.
struct Parts {
    manifest: Manifest,
    task: Task,
    objects: Objects,
    records: Vec<Record>,
}

fn bytes(text: &str) -> Bytes {
    text.as_bytes().into()
}

fn vma(start: u64, pages: u64, mapping: Mapping) -> Vma {
    Vma {
        start,
        end: start + pages * 4096,
        protection: 3,
        mapping,
        grows_down: false,
        no_reserve: false,
        locked: Lock::No,
        advice: Vec::new(),
    }
}

fn anonymous(start: u64, pages: u64) -> Vma {
    vma(start, pages, Mapping::Anonymous { name: None })
}

fn thread(tid: i32) -> Thread {
    Thread {
        tid: Pid(tid),
        name: bytes(&format!("thread-{tid}")),
        registers: arch::Registers::default(),
        xstate: vec![0; 576].into(),
        signals: ThreadSignals::default(),
        rseq: None,
        robust_list: (0, 0),
        clear_child_tid: 0,
        parent_death_signal: 0,
        scheduling: Scheduling { affinity: host().affinity, ..Scheduling::default() },
        credentials: Credentials::default(),
    }
}

/// The smallest process there is.
fn parts() -> Parts {
    let exe = Inode {
        id: InodeId(0),
        source: Source::Path { path: bytes("/bin/victim") },
        device: 1,
        number: 2,
        mode: 0o100755,
        uid: 0,
        gid: 0,
        size: 8192,
        modified: 0,
        rule: Rule::Keep,
        saved: Extents::default(),
    };
    let kernel = |name: &str, start, pages| vma(start, pages, Mapping::Kernel { name: bytes(name) });
    let task = Task {
        pid: Pid(100),
        ppid: Pid(1),
        pgid: Pid(100),
        sid: Pid(100),
        stopped: false,
        threads: vec![thread(100)],
        memory: AddressSpace {
            vmas: vec![
                anonymous(0x10_0000_0000, 16),
                kernel("[vvar]", 0x7ffe_0000_0000, 4),
                kernel("[vdso]", 0x7ffe_0000_4000, 2),
            ],
            pages: Extents::default(),
            fields: MmFields::default(),
            auxv: Bytes::default(),
            exe: InodeId(0),
            dumpable: 1,
            thp_disabled: 0,
            coredump_filter: Some(0x33),
            membarrier: 0,
            mdwe: Default::default(),
            memory_merge: Default::default(),
        },
        descriptors: Vec::new(),
        locks: Vec::new(),
        signals: ProcessSignals { actions: vec![SignalAction::default(); 64], pending: Vec::new() },
        timers: Timers { interval: vec![Interval::default(); 3], posix: Vec::new() },
        limits: vec![(1024, 4096); 16],
        cwd: bytes("/"),
        root: bytes("/"),
        umask: 0o22,
        personality: 0,
        oom_score_adj: 0,
        child_subreaper: false,
        exit_signal: libc::SIGCHLD,
        stop_report: 0,
        leader_ended: None,
        shares: Default::default(),
        terminal: None,
    };
    let manifest = Manifest {
        torpor: "test".into(),
        taken_at: 0,
        host: torpor_image::manifest::Host { vdso: host().vdso, xstate_features: 7, ..Default::default() },
        root: Pid(100),
        tasks: vec![Pid(100)],
        zombies: Vec::new(),
        files: Vec::new(),
        ran_on: false,
        not_captured: Vec::new(),
        ..Manifest::default()
    };
    Parts {
        manifest,
        task,
        objects: Objects {
            descriptions: Vec::new(),
            inodes: vec![exe],
            pipes: Vec::new(),
            ..Objects::default()
        },
        records: Vec::new(),
    }
}

impl Parts {
    fn describe(&mut self, kind: Kind) -> DescriptionId {
        let id = DescriptionId(self.objects.descriptions.len() as u32);
        self.objects.descriptions.push(Description {
            id,
            flags: 2,
            position: 0,
            owner: None,
            flock: None,
            ofd_locks: Vec::new(),
            lease: None,
            kind,
        });
        id
    }

    fn descriptor(&mut self, fd: i32, description: DescriptionId) {
        self.task.descriptors.push(Descriptor { fd, description, close_on_exec: fd % 2 == 1 });
        self.task.descriptors.sort_by_key(|d| d.fd);
    }

    fn inode(&mut self, source: Source, size: u64) -> InodeId {
        let id = InodeId(self.objects.inodes.len() as u32);
        self.objects.inodes.push(Inode { id, source, size, ..self.objects.inodes[0].clone() });
        id
    }

    fn pipe(&mut self, data: &str) -> PipeId {
        let id = PipeId(self.objects.pipes.len() as u32);
        self.objects.pipes.push(Pipe {
            id,
            number: 5,
            capacity: 65536,
            data: bytes(data),
            packets: Vec::new(),
            fifo: None,
        });
        id
    }

    fn image(self) -> Image {
        Image::from_parts("/nowhere".into(), self.manifest, vec![self.task], self.objects, self.records)
            .expect("the parts fit together")
    }
}

fn planned(parts: Parts) -> Plan {
    plan(&parts.image(), &host(), &Options::default()).expect("it can be planned")
}

/// Compares with `tests/plans/NAME.txt`; `UPDATE_PLANS=1` writes it.
fn snapshot(name: &str, plan: &Plan) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans").join(format!("{name}.txt"));
    let text = plan.to_string();
    if std::env::var_os("UPDATE_PLANS").is_some() {
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("a directory");
        std::fs::write(&path, text).expect("written");
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{}: UPDATE_PLANS=1 takes the new plan", path.display());
}

#[test]
fn the_smallest_process() {
    snapshot("smallest", &planned(parts()));
}

#[test]
fn descriptors_of_every_simple_kind() {
    let mut parts = parts();
    let file = parts.inode(Source::Path { path: bytes("/etc/passwd") }, 100);
    let gone = parts.inode(Source::Deleted { path: bytes("/tmp/gone"), content: Extents::default() }, 0);
    let pipe = parts.pipe("still in it");
    let file = parts.describe(Kind::File(file));
    let gone = parts.describe(Kind::File(gone));
    let read = parts.describe(Kind::Pipe(PipeEnd { pipe }));
    let write = parts.describe(Kind::Pipe(PipeEnd { pipe }));
    let event = parts.describe(Kind::EventFd(EventFd { count: 5, semaphore: true }));
    let target = EpollTarget { fd: 9, description: event, events: 1, data: 77 };
    let epoll = parts.describe(Kind::Epoll(Epoll { targets: vec![target] }));
    for (fd, id) in
        [(0, file), (1, file), (200, file), (3, gone), (4, read), (5, write), (9, event), (7, epoll)]
    {
        parts.descriptor(fd, id);
    }
    snapshot("descriptors", &planned(parts));
}

#[test]
fn files_about_the_process_take_over_from_what_kept_their_numbers() {
    let mut parts = parts();
    let maps = parts.inode(Source::Process { pid: Pid(100), rest: bytes("maps") }, 0);
    let maps = parts.describe(Kind::File(maps));
    let pidfd = parts.describe(Kind::PidFd(PidFd { pid: Some(Pid(100)) }));
    let target = EpollTarget { fd: 7, description: maps, events: 1, data: 77 };
    let epoll = parts.describe(Kind::Epoll(Epoll { targets: vec![target] }));
    for (fd, id) in [(4, maps), (5, pidfd), (7, maps), (8, epoll)] {
        parts.descriptor(fd, id);
    }
    let plan = planned(parts);
    assert!(plan.opens.contains(&Open::Description(maps)));
    let script = |name: &str| &plan.tasks[0].phases.iter().find(|p| p.name == name).expect("a phase").script;
    let numbers = |name| -> Vec<_> { calls(script(name), libc::SYS_dup3).map(|a| number(a[1])).collect() };
    assert_eq!(numbers("descriptors"), [4, 5, 7, 8].map(Some));
    assert_eq!(numbers("state"), [4, 7].map(Some));
    let count = |name, nr| calls(script(name), nr).count();
    // The pidfd is there before the threads are, the file is not, nor what watches it.
    assert_eq!([count("descriptors", libc::SYS_recvmsg), count("state", libc::SYS_recvmsg)], [1, 1]);
    assert_eq!([count("descriptors", libc::SYS_epoll_ctl), count("state", libc::SYS_epoll_ctl)], [0, 1]);
    assert!(plan.to_string().contains("fd 4, /proc/100/maps"), "{plan}");
}

#[test]
fn impossible_files_and_pipes_are_refused() {
    let refused = |spoil: &dyn Fn(&mut Parts)| {
        let mut parts = parts();
        spoil(&mut parts);
        let Parts { manifest, task, objects, records } = parts;
        let image = Image::from_parts("/nowhere".into(), manifest, vec![task], objects, records);
        image.is_err()
    };
    assert!(!refused(&|_| ()));
    let process = |pid, rest| Source::Process { pid: Pid(pid), rest: bytes(rest) };
    for (pid, rest, wrong) in [
        (100, "fd", false),
        (100, "", false),
        (1, "maps", true),
        (100, "a/../../1/mem", true),
        (100, "a\0b", true),
    ] {
        assert_eq!(refused(&|p| p.objects.inodes[0].source = process(pid, rest)), wrong, "{pid} {rest:?}");
    }
    let directory = |path| Directory { path: bytes(path), mode: 0o40755, uid: 0, gid: 0 };
    for (path, wrong) in [("/a", false), ("a", true), ("", true), ("/a\0", true)] {
        assert_eq!(refused(&|p| p.objects.directories.push(directory(path))), wrong, "{path:?}");
    }
    for (packets, wrong) in [
        (&[(0, 2), (3, 1)][..], false),
        (&[(0, 0)], true),
        (&[(2, 2), (0, 2)], true),
        (&[(0, 3), (2, 2)], true),
        (&[(3, 2)], true),
        (&[(u32::MAX, 2)], true),
    ] {
        let packets = packets.iter().map(|&(offset, length)| Packet { offset, length });
        assert_eq!(
            refused(&|p| {
                let id = p.pipe("four");
                p.objects.pipes[id.0 as usize].packets = packets.clone().collect();
            }),
            wrong
        );
    }
    // Contents of a file with a name are looked at like any other.
    assert!(refused(&|p| {
        let id = p.inode(Source::Path { path: bytes("/f") }, 100);
        let inode = &mut p.objects.inodes[id.0 as usize];
        (inode.rule, inode.saved) = (Rule::Save, Extents { first: 0, count: 9 });
    }));
}

#[test]
fn memory_of_every_kind() {
    let mut parts = parts();
    let file = parts.inode(Source::Path { path: bytes("/lib/libc.so.6") }, 1 << 20);
    let shared = parts.inode(Source::SharedMemory { content: Extents { first: 2, count: 1 } }, 8192);
    let memfd = Source::Memfd { name: bytes("m"), seals: 2, content: Extents::default() };
    let memfd = parts.inode(memfd, 4096);
    let data = torpor_image::manifest::ImageFile { name: "pages-0.dat".into(), size: 3 * 4096, crc32c: 0 };
    parts.manifest.files.push(data);
    let record = |address, place, offset| Record { address, length: 4096, place, file: 0, offset };
    parts.records = vec![
        record(0x10_0000_0000, Where::Data, 0),
        record(0x10_0000_1000, Where::Guard, 0),
        record(0, Where::Data, 4096),
    ];
    parts.task.memory.pages = Extents { first: 0, count: 2 };
    let mut stack = anonymous(0x7ffd_0000_0000, 33);
    stack.grows_down = true;
    let mut none = anonymous(0x30_0000_0000, 4);
    none.protection = 0;
    none.no_reserve = true;
    none.advice = vec![libc::MADV_DONTDUMP];
    none.locked = Lock::OnFault;
    let more = [
        vma(0x20_0000_0000, 2, Mapping::Private { inode: file, offset: 4096 }),
        vma(0x20_0001_0000, 2, Mapping::Shared { inode: shared, offset: 0, may_write: true }),
        vma(0x20_0002_0000, 2, Mapping::Shared { inode: shared, offset: 0, may_write: true }),
        vma(0x20_0003_0000, 1, Mapping::Shared { inode: memfd, offset: 0, may_write: true }),
        none,
        stack,
    ];
    parts.task.memory.vmas.extend(more);
    parts.task.memory.vmas.sort_by_key(|v| v.start);
    snapshot("memory", &planned(parts));
}

#[test]
fn threads_signals_and_timers() {
    let mut parts = parts();
    parts.task.threads.extend([thread(103), thread(101)]);
    parts.task.threads[1].signals.mask = 0x10;
    parts.task.threads[1].signals.pending.push(vec![0; 128].into());
    parts.task.threads[2].parent_death_signal = 9;
    parts.task.signals.actions[9].handler = 0x1234;
    let posix = PosixTimer {
        id: 7,
        clock: 1,
        notify: 0,
        signal: 14,
        value: 99,
        thread: 0,
        setting: Interval { value: (1, 0), period: (2, 0) },
        overrun: 1,
    };
    parts.task.timers.posix.push(posix);
    parts.task.timers.interval[0] = Interval { value: (0, 5), period: (1, 0) };
    parts.task.sid = Pid(90);
    parts.task.pgid = Pid(91);
    parts.manifest.ran_on = true;
    parts.manifest.not_captured.push("the colour of fd 3".into());
    snapshot("threads", &planned(parts));
}

#[test]
fn vector_state_that_the_processor_lacks_is_refused_by_name() {
    let mut parts = parts();
    let mut xstate = vec![0u8; 576 + 512];
    xstate[512] = 0xe7;
    parts.task.threads[0].xstate = xstate.into();
    let host = Host { xstate_size: 576 + 512, ..host() };
    let error = plan(&parts.image(), &host, &Options::default()).expect_err("refused").to_string();
    assert!(error.to_lowercase().contains("avx"), "{error}");
}

#[test]
fn another_kernel_is_refused() {
    let other = Host { vdso: vec![0x0f, 0x05].into(), ..host() };
    let error = plan(&parts().image(), &other, &Options::default()).expect_err("refused").to_string();
    assert!(error.contains("vdso"), "{error}");
}

/// The numeric arguments of every call `nr` in a script, with its result where that is one right value.
fn calls(script: &Script, nr: i64) -> impl Iterator<Item = [Value; 6]> + '_ {
    script.steps().iter().filter(move |s| s.nr == nr).map(|s| s.args)
}

fn number(value: Value) -> Option<u64> {
    match value {
        Value::Number(n) => Some(n),
        _ => None,
    }
}

fn pty() -> Pty {
    Pty {
        id: PtyId(0),
        number: 3,
        path: bytes("/dev/pts/3"),
        ptmx: bytes("/dev/ptmx"),
        node: (0o620, 0, 5),
        termios: vec![0; Pty::TERMIOS].into(),
        size: [24, 80, 0, 0],
        packet: false,
        locked: false,
        exclusive: (false, false),
        slave: Slave::Open,
        stop: Stop::No,
        output: Bytes::default(),
        lines: vec![bytes("typed\n")],
        unfinished: Bytes::default(),
    }
}

fn with_terminal(foreground: i32) -> Parts {
    let mut parts = parts();
    parts.objects.ptys.push(pty());
    parts.task.terminal =
        Some(ControllingTerminal { pty: Some(PtyId(0)), foreground: Some(Pid(foreground)) });
    parts
}

#[test]
fn a_terminal_is_taken_right_after_setsid() {
    let plan = planned(with_terminal(100));
    let steps = plan.births[0].steps();
    let session = steps.iter().position(|s| s.nr == libc::SYS_setsid).expect("it leads a session");
    assert_eq!(steps[session + 1].nr, libc::SYS_ioctl);
    assert_eq!(number(steps[session + 1].args[1]), Some(libc::TIOCSCTTY));
    // Its own group is in the foreground by that.
    let state = |p: &&crate::plan::Phase| p.name == "state";
    let state = plan.tasks[0].phases.iter().find(state).expect("there is one");
    assert_eq!(calls(&state.script, libc::SYS_ioctl).count(), 0);
}

#[test]
fn a_foreground_group_that_is_gone_is_said_once() {
    let plan = planned(with_terminal(77));
    let said = plan.notes.iter().filter(|n| n.contains("process group 77") && n.contains("/dev/pts/3"));
    assert_eq!(said.count(), 1, "{:?}", plan.notes);
}

#[test]
fn impossible_pseudo_terminals_are_refused() {
    let refused = |change: &dyn Fn(&mut Parts)| {
        let mut parts = with_terminal(100);
        let path = bytes("/dev/ptmx");
        parts.describe(Kind::Pty(PtyEnd { pty: PtyId(0), side: Side::Master, path }));
        change(&mut parts);
        let Parts { manifest, task, objects, records } = parts;
        Image::from_parts("/nowhere".into(), manifest, vec![task], objects, records).is_err()
    };
    assert!(!refused(&|_| ()));
    assert!(refused(&|p| p.objects.ptys[0].number = Pty::MAX_NUMBER));
    assert!(refused(&|p| p.objects.ptys[0].id = PtyId(1)));
    assert!(refused(&|p| p.objects.ptys[0].path = bytes("relative")));
    assert!(refused(&|p| p.objects.ptys[0].ptmx = bytes("/dev/\0ptmx")));
    assert!(refused(&|p| p.objects.ptys[0].ptmx = Bytes::default()));
    assert!(refused(&|p| p.objects.ptys[0].termios = vec![0; 36].into()));
    assert!(refused(&|p| p.objects.ptys[0].node.0 = 0o100_644));
    assert!(refused(&|p| p.objects.ptys[0].output = vec![0; Pty::MAX_QUEUED + 1].into()));
    assert!(refused(&|p| p.objects.ptys[0].lines = vec![Bytes::default(); Pty::MAX_QUEUED]));
    assert!(refused(&|p| p
        .objects
        .descriptions
        .push(Description { id: DescriptionId(1), ..p.objects.descriptions[0].clone() })));
    assert!(refused(
        &|p| p.task.terminal = Some(ControllingTerminal { pty: Some(PtyId(1)), foreground: None })
    ));
}

/// What must hold of every plan.
fn holds(image: &Image, plan: &Plan) {
    let task = &image.tasks[0];
    let (opens, place, birth) = (&plan.opens, plan.place, &plan.births[0]);
    let plan = &plan.tasks[0];
    let script = |name: &str| &plan.phases.iter().find(|p| p.name == name).expect("a phase").script;
    // Every number gets its description, by dup3 from above all numbers: no move reads what it has written.
    // A set that watches a number used for something else by now borrows it in between.
    let mut made: BTreeMap<u64, DescriptionId> = BTreeMap::new();
    let mut aside: BTreeMap<u32, Option<DescriptionId>> = BTreeMap::new();
    let last = task.descriptors.last().map_or(-1, |d| i64::from(d.fd));
    let mut received = None;
    for (i, step) in script("descriptors").steps().iter().enumerate() {
        if step.nr == libc::SYS_recvmsg {
            received = Some(step.args[0]);
        }
        let duplicate = [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC].map(|c| Some(c as u64));
        if step.nr == libc::SYS_fcntl && duplicate.contains(&number(step.args[1])) {
            let source = match step.args[0] {
                Value::Word(_) => received.take().expect("a message before"),
                source => source,
            };
            let id = match source {
                Value::Descriptor(slot) => match opens[slot as usize] {
                    Open::Description(id) => Some(id),
                    // The program file needs a number for a moment.
                    _ => continue,
                },
                Value::Number(fd) => Some(made[&fd]),
                // What the task opened itself.
                Value::Result(_) => None,
                other => panic!("fcntl of {other:?}"),
            };
            let least = number(step.args[2]).expect("a number") as i64;
            assert!(least > last, "a move reads what it has written");
            aside.insert(i as u32, id);
        } else if step.nr == libc::SYS_dup3 {
            let Value::Result(source) = step.args[0] else { panic!("dup3 of {:?}", step.args[0]) };
            if let Some(id) = aside[&source.0] {
                made.insert(number(step.args[1]).expect("a number"), id);
            }
        }
    }
    let wanted: BTreeMap<u64, DescriptionId> =
        task.descriptors.iter().map(|d| (d.fd as u64, d.description)).collect();
    made.retain(|fd, _| wanted.contains_key(fd));
    assert_eq!(made, wanted);
    // Nothing is mapped over the executor, which lies apart from all that is there.
    let own = (place.park, place.arena + place.arena_length);
    let apart = |start: u64, end: u64| end <= own.0 || start >= own.1;
    for vma in &task.memory.vmas {
        assert!(apart(vma.start, vma.end), "the executor lies on {:x}-{:x}", vma.start, vma.end);
    }
    // Memory that a child begins with is complete before that is born.
    let memory = |nr| calls(birth, nr).chain(calls(script("memory"), nr));
    for args in memory(libc::SYS_mmap) {
        let (start, length) = (number(args[0]).expect("an address"), number(args[1]).expect("a length"));
        assert!(apart(start, start + length), "mmap of {start:x} on the executor");
    }
    // Every area is there in the end, at its place.
    let places: BTreeSet<u64> = memory(libc::SYS_mmap)
        .filter_map(|a| number(a[0]))
        .chain(memory(libc::SYS_mremap).filter_map(|a| number(a[4])))
        .collect();
    for vma in task.memory.vmas.iter().filter(|v| !matches!(v.mapping, Mapping::Kernel { .. })) {
        assert!(places.contains(&vma.start), "nothing is mapped at {:x}", vma.start);
    }
    assert_eq!(plan.threads.len(), task.threads.len() - 1);
}

fn arbitrary() -> impl Strategy<Value = Parts> {
    let areas = prop::collection::vec((1u64..64, 1u64..40, 0u8..4, 0u32..8, any::<bool>()), 0..40);
    let fds = prop::collection::btree_map(0i32..1100, (0usize..12, 0u8..4), 0..40);
    (areas, fds, 0i32..20, 0u64..0x7f).prop_map(|(areas, fds, threads, high)| {
        let mut parts = parts();
        let file = parts.inode(Source::Path { path: bytes("/f") }, 1 << 20);
        let shared = parts.inode(Source::SharedMemory { content: Extents::default() }, 64 * 4096);
        let mut at = (high << 40) + 0x20_0000;
        for (gap, pages, kind, protection, down) in areas {
            at += gap * 4096;
            let mapping = match kind {
                0 | 1 => Mapping::Anonymous { name: None },
                2 => Mapping::Private { inode: file, offset: pages * 4096 },
                _ => Mapping::Shared { inode: shared, offset: 0, may_write: true },
            };
            let mut area = vma(at, pages, mapping);
            area.protection = protection;
            area.grows_down = down && kind == 0;
            at = area.end;
            let free = |v: &Vma| v.end <= area.start || v.start >= area.end;
            if area.end < 0x7f00_0000_0000 && parts.task.memory.vmas.iter().all(free) {
                parts.task.memory.vmas.push(area);
            }
        }
        parts.task.memory.vmas.sort_by_key(|v| v.start);
        for (fd, (shared, kind)) in fds {
            let known = parts.objects.descriptions.len();
            let id = if shared < known {
                DescriptionId(shared as u32)
            } else {
                let kind = match kind {
                    0 => Kind::File(file),
                    1 => Kind::Pipe(PipeEnd { pipe: parts.pipe("x") }),
                    2 => Kind::EventFd(EventFd { count: 1, semaphore: false }),
                    _ => {
                        let target =
                            |d: &Description| EpollTarget { fd, description: d.id, events: 1, data: 0 };
                        let targets = parts.objects.descriptions.iter().take(3).map(target).collect();
                        Kind::Epoll(Epoll { targets })
                    }
                };
                parts.describe(kind)
            };
            parts.descriptor(fd, id);
        }
        parts.task.threads.extend((0..threads).map(|n| thread(200 + n)));
        parts
    })
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#?}\n{:#?}\n{:#?}", self.task.memory.vmas, self.task.descriptors, self.objects)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_holds(parts in arbitrary()) {
        let image = parts.image();
        let plan = plan(&image, &host(), &Options::default()).expect("it can be planned");
        holds(&image, &plan);
        let _text = plan.to_string();
    }
}

/// Images that were written by real dumps and are kept.
fn golden() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(arch::MACHINE)))
        .collect()
}

/// A host of the kernel that an image was taken on.
fn home(image: &Image) -> Host {
    let kernel = image.tasks[0].memory.vmas.iter().filter_map(|v| match &v.mapping {
        Mapping::Kernel { name } => Some((name.clone(), v.start, v.end)),
        _ => None,
    });
    Host {
        kernel_areas: kernel.collect(),
        vdso: image.manifest.host.vdso.clone(),
        xstate_features: u64::MAX,
        xstate_size: image.tasks[0].threads[0].xstate.len(),
        ..host()
    }
}

#[test]
fn golden_images_can_be_planned() {
    for dir in golden() {
        let image = Image::open(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        image.verify(|_| ()).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let plan = plan(&image, &home(&image), &Options::default()).expect("it can be planned");
        holds(&image, &plan);
    }
}

/// Damage behind right checksums, as a hostile image would have it.
#[test]
fn mutated_images_are_refused_or_planned_but_never_panic() {
    let rounds: u64 = std::env::var("FUZZ_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(10_000);
    for dir in golden() {
        let manifest = Image::open(&dir).expect("golden").manifest;
        let kinds = [header::Kind::Objects, header::Kind::Task, header::Kind::Index, header::Kind::Manifest];
        let task = Task::file(manifest.root);
        let names = ["objects.tpr", task.as_str(), "pages.idx", Manifest::FILE];
        let copy = tempfile::tempdir().expect("a directory");
        for entry in std::fs::read_dir(&dir).expect("listed").flatten() {
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
        }
        let bodies: Vec<Vec<u8>> =
            names.iter().map(|n| std::fs::read(dir.join(n)).expect("read")[header::LEN..].to_vec()).collect();
        let put = |name: &str, kind, body: &[u8]| {
            let file = [header::encode(kind, body, header::PLAIN).as_slice(), body].concat();
            std::fs::write(copy.path().join(name), &file).expect("written");
            file
        };
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 16) as usize % below.max(1)
        };
        let mut opened = 0;
        for _ in 0..rounds {
            let which = next(4);
            let mut body = bodies[which].clone();
            for _ in 0..=next(4) {
                let at = next(body.len());
                match next(4) {
                    0 => body[at] ^= 1 << next(8),
                    1 => body[at] = [0, 1, 0x7f, 0x80, 0xff][next(5)],
                    2 => {
                        let end = (at + next(9)).min(body.len());
                        let value = [0, 0xff, 0x7f][next(3)];
                        body[at..end].fill(value);
                    }
                    _ => body[at] = next(256) as u8,
                }
            }
            let file = put(names[which], kinds[which], &body);
            if which < 3 {
                let mut changed = manifest.clone();
                let entry = changed.files.iter_mut().find(|f| f.name == names[which]).expect("listed");
                entry.size = file.len() as u64;
                entry.crc32c = crc32c::crc32c(&file);
                put(
                    Manifest::FILE,
                    header::Kind::Manifest,
                    &rmp_serde::to_vec_named(&changed).expect("encoded"),
                );
            }
            if let Ok(image) = Image::open(copy.path()) {
                opened += 1;
                let home = if image.tasks.is_empty() { host() } else { home(&image) };
                if let Ok(plan) = plan(&image, &home, &Options::default()) {
                    let _text = plan.to_string();
                }
            }
            put(names[which], kinds[which], &bodies[which]);
            if which < 3 {
                put(Manifest::FILE, header::Kind::Manifest, &bodies[3]);
            }
        }
        assert!(
            opened > rounds / 20,
            "only {opened} of {rounds} could be opened: the mutations are too coarse"
        );
    }
}
