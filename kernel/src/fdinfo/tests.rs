use super::*;

fn with(tail: &str) -> FdInfo {
    parse(format!("pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\n{tail}").as_bytes()).unwrap()
}

#[test]
fn common_lines_and_locks() {
    let info = parse(
        b"pos:\t-4096\nflags:\t02100002\nmnt_id:\t27\nino:\t10010745\n\
          lock:\t1: FLOCK  ADVISORY  WRITE 3973 fe:00:10010745 0 EOF\n\
          lock:\t2: POSIX  ADVISORY  READ 3973 fe:00:10010745 100 109\n\
          lock:\t3: OFDLCK ADVISORY  WRITE -1 08:02:131 1000 EOF\n\
          lock:\t4: LEASE  BREAKING  READ 3973 fe:00:10010746 0 EOF\n",
    )
    .unwrap();
    assert_eq!(info.pos, (-4096i64).cast_unsigned());
    assert_eq!((info.flags, info.mnt_id, info.ino), (0o2_100_002, 27, 10_010_745));
    assert!(info.cloexec());
    assert_eq!(info.detail, Detail::Plain);
    let flock = Lock {
        kind: LockKind::Flock,
        write: true,
        breaking: false,
        pid: 3973,
        dev: (0xfe, 0),
        ino: 10_010_745,
        start: 0,
        end: None,
    };
    assert_eq!(info.locks[0], flock);
    assert_eq!(
        info.locks[1],
        Lock { kind: LockKind::Posix, write: false, start: 100, end: Some(109), ..flock }
    );
    assert_eq!(
        info.locks[2],
        Lock { kind: LockKind::Ofd, pid: -1, dev: (8, 2), ino: 131, start: 1000, ..flock }
    );
    assert_eq!(info.locks[3].kind, LockKind::Lease);
    assert!(info.locks[3].breaking);
}

#[test]
fn eventfd_counts_in_hex() {
    let detail = with("eventfd-count:             1234\neventfd-id: 1\neventfd-semaphore: 1\n").detail;
    assert_eq!(detail, Detail::Eventfd { count: 0x1234, semaphore: Some(true), id: Some(1) });
    let detail = with("eventfd-count: fffffffffffffffe\n").detail;
    assert_eq!(detail, Detail::Eventfd { count: u64::MAX - 1, semaphore: None, id: None });
}

#[test]
fn signalfd_timerfd_pidfd_tty() {
    assert_eq!(with("sigmask:\t0000000000000200\n").detail, Detail::Signalfd { mask: 0x200 });
    let text = "clockid: 0\nticks: 3\nsettime flags: 03\nit_value: (999, 318212669)\nit_interval: (5, 7)\n";
    let timer =
        Timerfd { clockid: 0, ticks: 3, settime_flags: 3, it_value: (999, 318_212_669), it_interval: (5, 7) };
    assert_eq!(with(text).detail, Detail::Timerfd(timer));
    let pidfd = with("Pid:\t3973\nNSpid:\t3973\t2\n").detail;
    assert_eq!(pidfd, Detail::Pidfd { pid: 3973, nspid: vec![3973, 2] });
    assert_eq!(with("Pid:\t-1\nNSpid:\t-1\n").detail, Detail::Pidfd { pid: -1, nspid: vec![-1] });
    assert_eq!(with("tty-index:\t4\n").detail, Detail::Tty { index: 4 });
    assert_eq!(with("scm_fds: 2\n").detail, Detail::Socket { scm_fds: 2 });
}

#[test]
fn epoll_targets() {
    let info = with(
        "tfd:        6 events:       1f data:                6  pos:0 ino:40e sdev:10\n\
         tfd:        3 events: 80000019 data: ffffffff00000003  pos:0 ino:40e sdev:10\n\
         tfd:        5 events:       19 data:                5\n",
    );
    let Detail::Epoll(targets) = info.detail else { panic!() };
    assert_eq!(targets[0], EpollTarget { fd: 6, events: 0x1f, data: 6, pos: 0, ino: 0x40e, sdev: 0x10 });
    assert_eq!((targets[1].events, targets[1].data), (0x8000_0019, 0xffff_ffff_0000_0003));
    assert_eq!(targets[2].ino, 0);
}

#[test]
fn inotify_watches() {
    let info = with(
        "inotify wd:1f ino:13 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:13000000000000ff\n\
         inotify wd:1 ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 \n",
    );
    let Detail::Inotify(watches) = info.detail else { panic!() };
    let handle = FileHandle { bytes: vec![0x13, 0, 0, 0, 0, 0, 0, 0xff], kind: 1 };
    assert_eq!(
        watches[0],
        InotifyWatch { wd: 31, ino: 0x13, sdev: 0xfe0_0000, mask: 2, ignored_mask: 0, handle: Some(handle) }
    );
    assert_eq!((watches[1].mask, &watches[1].handle), (0x100, &None));
}

#[test]
fn fanotify_marks() {
    let info = with(
        "fanotify flags:0 event-flags:8000\n\
         fanotify mnt_id:1b mflags:0 mask:20 ignored_mask:1\n\
         fanotify sdev:fe00000 mflags:40 mask:20 ignored_mask:0\n\
         fanotify ino:3c4a7 sdev:fe00000 mflags:0 mask:8000020 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000\n",
    );
    let Detail::Fanotify { flags, event_flags, marks } = info.detail else { panic!() };
    assert_eq!((flags, event_flags, marks.len()), (0, 0x8000, 3));
    let mount = FanotifyObject::Mount { mnt_id: 27 };
    assert_eq!(marks[0], FanotifyMark { object: mount, mflags: 0, mask: 0x20, ignored_mask: 1 });
    assert_eq!(marks[1].object, FanotifyObject::Filesystem { sdev: 0xfe0_0000 });
    assert!(matches!(marks[2].object, FanotifyObject::Inode { ino: 0x3c4a7, handle: Some(_), .. }));
    assert_eq!(marks[2].mask, 0x800_0020);
}

#[test]
fn unknown_lines_are_kept() {
    let info = with("iff:\ttun0\nno colon\n");
    assert_eq!(info.detail, Detail::Plain);
    assert_eq!(info.unknown.len(), 2);
    assert_eq!(info.unknown[0], (b"iff".to_vec(), b"tun0".to_vec()));
}

#[test]
fn io_uring() {
    // Linux 6.18: a request submitted and one not, a completion, a poll under way, a registered file.
    let info = with(
        "SqMask:\t0x7\nSqHead:\t9\nSqTail:\t10\nCachedSqHead:\t9\nCqMask:\t0xf\nCqHead:\t7\nCqTail:\t8\n\
         CachedCqTail:\t8\nSQEs:\t1\n    1: opcode:NOP, fd:0, flags:0, off:0, addr:0x0, rw_flags:0x0, buf_index:0 user_data:7\n\
         CQEs:\t1\n    7: user_data:7, res:0, flag:0\nSqThread:\t-1\nSqThreadCpu:\t-1\nSqTotalTime:\t0\nSqWorkTime:\t0\n\
         UserFiles:\t1\n    0: socket:[4711]\nUserBufs:\t2\nPollList:\n  op=6, task_works=0\nCqOverflowList:\nNAPI:\tdisabled\n",
    );
    let ring = IoUring {
        sq_mask: 7,
        cq_mask: 15,
        submitted: 9,
        completed: 8,
        poller: None,
        files: 1,
        buffers: 2,
        polls: vec![6],
    };
    assert_eq!(info.detail, Detail::IoUring(ring));
    assert!(matches!(with("SqThread:\t42\n").detail, Detail::IoUring(IoUring { poller: Some(42), .. })));
}

#[test]
fn odd_input_is_an_error() {
    for text in [
        &b"pos:\tx\n"[..],
        b"flags:\t9\n",
        b"lock:\t1: FLOCK\n",
        b"lock:\t1: FLOCK  ADVISORY  WRITE 1 0802131 0 EOF\n",
        b"it_value: (1\n",
        b"tfd: 3\n",
        b"inotify wd:1 ino:1 sdev:1 mask:1 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:1\n",
        b"fanotify flags:zz event-flags:0\n",
        b"eventfd-count: \xff\n",
        b"SqMask:\t0xfffffffff\n",
        b"CachedSqHead:\t-1\n",
    ] {
        assert!(parse(text).is_err(), "{}", text.escape_ascii());
    }
    assert!(parse(b"").is_ok());
}

#[test]
fn of_our_own_descriptors() {
    let event =
        nix::sys::eventfd::EventFd::from_value_and_flags(18, nix::sys::eventfd::EfdFlags::EFD_CLOEXEC)
            .unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&event);
    let info = fdinfo(Pid::this(), fd).unwrap();
    assert!(info.cloexec());
    assert!(matches!(info.detail, Detail::Eventfd { count: 18, .. }));
    assert!(fdinfo(Pid::this(), 1_000_000).unwrap_err().is_gone());
}
