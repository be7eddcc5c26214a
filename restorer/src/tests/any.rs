//! Images of every shape: arbitrary ones, those of earlier versions, and damaged ones.

use super::*;

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
