//! Plans of images made of parts, on a host that is plain data: no privilege, no system call.

mod any;
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

fn timer(id: i32) -> PosixTimer {
    let setting = Interval { value: (1, 0), period: (2, 0) };
    PosixTimer { id, clock: 1, notify: 0, signal: 14, value: 99, thread: 0, setting, overrun: 0 }
}

#[test]
fn threads_signals_and_timers() {
    let mut parts = parts();
    parts.task.threads.extend([thread(103), thread(101)]);
    parts.task.threads[1].signals.mask = 0x10;
    parts.task.threads[1].signals.pending.push(vec![0; 128].into());
    parts.task.threads[2].parent_death_signal = 9;
    parts.task.signals.actions[9].handler = 0x1234;
    parts.task.timers.posix.push(PosixTimer { overrun: 1, ..timer(7) });
    parts.task.timers.interval[0] = Interval { value: (0, 5), period: (1, 0) };
    parts.task.sid = Pid(90);
    parts.task.pgid = Pid(91);
    parts.manifest.ran_on = true;
    parts.manifest.not_captured.push("the colour of fd 3".into());
    snapshot("threads", &planned(parts));
}

/// The place of scripts is chosen for what they take as a rule, in which timers do not count.
#[test]
fn scripts_that_take_more_than_expected_have_room() {
    let room = |timers: i32| {
        let mut parts = parts();
        parts.task.timers.posix.extend((0..timers).map(timer));
        let plan = planned(parts);
        let end = crate::plan::layout(&plan.begin, &plan.births, &plan.helpers, &plan.tasks).end;
        assert!(end <= plan.place.arena_length, "{end} of {}", plan.place.arena_length);
        let opened: std::collections::BTreeSet<_> = plan.opens.iter().map(|o| format!("{o:?}")).collect();
        assert_eq!(opened.len(), plan.opens.len(), "what was opened for the first place is still there");
        plan.place.arena_length
    };
    assert!(room(3000) > room(0), "the expected room was enough");
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
