//! /proc/PID/smaps and /proc/PID/maps: the mappings of a process.
//!
//! procfs (0.18) fails on a path that is not UTF-8, drops `VmFlags` words that it does not know, and panics on a
//! mapping of a file called `/SYSVolume`. Here paths are bytes and every flag word is kept.
//!
//! Lines are as fs/proc/task_mmu.c prints them (`show_map_vma`, `show_smap`). `seq_path` escapes the newline
//! and nothing else, not even the backslash, so a file really called `x\012` cannot be told from one with a newline;
//! whoever must know compares device and inode. In the same way " (deleted)" may be part of a living file's name.
//!
//! One pass over the bytes: a mapping in smaps is 25 lines, of which five matter.

use crate::text::{device, hex, lines, number, unescape, with, with_costly, words};
use crate::{Error, Pid, Result};

/// One mapping.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
    /// `MAP_SHARED` (private otherwise).
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file: major, minor.
    pub dev: (u32, u32),
    /// Inode of the file; 0 without a file.
    pub inode: u64,
    /// Path or special name, unescaped and without " (deleted)"; empty for plain anonymous memory.
    pub path: Vec<u8>,
    /// The path was followed by " (deleted)".
    pub deleted: bool,
    /// The two-letter flags; empty from `maps`.
    pub flags: VmFlags,
    /// Protection key; 0 is the default one.
    pub pkey: u32,
    /// `KernelPageSize`, in kB: more than the base page for hugetlb. 0 from `maps`.
    pub page_kb: u64,
    /// Resident memory in kB. 0 from `maps`.
    pub rss_kb: u64,
    /// Of that, pages that another process has as well, in kB. 0 from `maps`.
    pub shared_kb: u64,
    /// Of resident memory, anonymous memory in kB. 0 from `maps`.
    pub anonymous_kb: u64,
    /// Swapped out memory in kB. 0 from `maps`.
    pub swap_kb: u64,
}

/// What a mapping is, as far as its name tells.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Kind<'a> {
    /// Private anonymous memory.
    Anonymous,
    /// The same with a name from `PR_SET_VMA_ANON_NAME`.
    NamedAnonymous(&'a [u8]),
    /// `[heap]`: the brk area.
    Heap,
    /// `[stack]`: the main thread's stack.
    Stack,
    /// `[vdso]`.
    Vdso,
    /// `[vvar]`, `[vvar_vclock]`: the vdso's data.
    Vvar,
    /// `[vsyscall]`: outside user space, the same in every process.
    Vsyscall,
    /// Shared anonymous memory (`/dev/zero (deleted)`).
    SharedAnonymous,
    /// The same with a name.
    NamedSharedAnonymous(&'a [u8]),
    /// memfd_create(2), with the name it was given.
    Memfd(&'a [u8]),
    /// A System V segment by its key; the inode is the segment's id.
    SysV(u32),
    /// The ring of io_setup(2).
    Aio,
    /// Anonymous memory of huge pages (`/anon_hugepage (deleted)`).
    AnonHugepage,
    /// A mapping of an anonymous inode, by its class: `[perf_event]`, `[io_uring]`.
    AnonInode(&'a [u8]),
    /// Another name in brackets.
    Special(&'a [u8]),
    /// A file.
    File,
}

/// The words of the `VmFlags` line (Documentation/filesystems/proc.rst), all of them, known or not.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct VmFlags {
    /// The words in the order printed.
    pub words: Vec<[u8; 2]>,
}

impl VmFlags {
    /// Whether the word is there, as in `has("gd")`.
    pub fn has(&self, word: &str) -> bool {
        self.words.iter().any(|have| have == word.as_bytes())
    }
}

impl Mapping {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Never true for what the kernel prints.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the address lies inside.
    pub fn contains(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// What it is, by its name. Kernel-internal files are on unnamed devices (major 0), so a plain file on a disk that
    /// looks like one of them is still a `File`; on a tmpfs it must also be deleted to be mistaken.
    pub fn kind(&self) -> Kind<'_> {
        let path = self.path.as_slice();
        if path.is_empty() {
            return Kind::Anonymous;
        }
        if let Some(inner) = path.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) {
            return match inner {
                b"heap" => Kind::Heap,
                b"stack" => Kind::Stack,
                b"vdso" => Kind::Vdso,
                b"vvar" | b"vvar_vclock" => Kind::Vvar,
                b"vsyscall" => Kind::Vsyscall,
                _ => match (inner.strip_prefix(b"anon:"), inner.strip_prefix(b"anon_shmem:")) {
                    (Some(name), _) => Kind::NamedAnonymous(name),
                    (_, Some(name)) => Kind::NamedSharedAnonymous(name),
                    _ => Kind::Special(inner),
                },
            };
        }
        if let Some(class) = path.strip_prefix(b"anon_inode:") {
            return Kind::AnonInode(class);
        }
        if !self.deleted || self.dev.0 != 0 {
            return Kind::File;
        }
        match path {
            b"/dev/zero" => Kind::SharedAnonymous,
            b"/[aio]" => Kind::Aio,
            b"/anon_hugepage" => Kind::AnonHugepage,
            _ => match (path.strip_prefix(b"/memfd:"), path.strip_prefix(b"/SYSV")) {
                (Some(name), _) => Kind::Memfd(name),
                (_, Some(key)) if key.len() == 8 => {
                    hex(key).and_then(|key| u32::try_from(key).ok()).map_or(Kind::File, Kind::SysV)
                }
                _ => Kind::File,
            },
        }
    }
}

/// The mappings with their flags and sizes. Costs the kernel a walk of the page tables.
pub fn smaps(pid: Pid) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    with_costly(&path, |text| parse(&path, text))?
}

/// The mappings without flags and sizes; cheap.
pub fn maps(pid: Pid) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/maps");
    with(&path, |text| parse(&path, text))?
}

/// Parses the text of an smaps file.
pub fn parse_smaps(text: &[u8]) -> Result<Vec<Mapping>> {
    parse("smaps", text)
}

/// Parses the text of a maps file.
pub fn parse_maps(text: &[u8]) -> Result<Vec<Mapping>> {
    parse("maps", text)
}

fn parse(file: &str, text: &[u8]) -> Result<Vec<Mapping>> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in lines(text) {
        // Keys begin with a capital letter, mappings with a small hexadecimal digit.
        let Some(b'A'..=b'Z') = line.first() else {
            all.push(header(line).ok_or_else(|| Error::parse(file, line))?);
            continue;
        };
        let Some(last) = all.last_mut() else { return Err(Error::parse(file, line)) };
        let field = match line[0] {
            b'V' => {
                if let Some(flags) = line.strip_prefix(b"VmFlags:") {
                    last.flags.words = flag_words(flags);
                }
                continue;
            }
            b'P' => {
                if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
                    last.pkey = number(key).ok_or_else(|| Error::parse(file, line))?;
                }
                continue;
            }
            b'K' => (&b"KernelPageSize:"[..], &mut last.page_kb),
            b'R' => (&b"Rss:"[..], &mut last.rss_kb),
            b'A' => (&b"Anonymous:"[..], &mut last.anonymous_kb),
            b'S' => match line.strip_prefix(b"Shared_") {
                // Clean and dirty ones.
                Some(shared) => {
                    let value = shared.split(|byte| *byte == b':').nth(1).and_then(kilobytes);
                    last.shared_kb += value.ok_or_else(|| Error::parse(file, line))?;
                    continue;
                }
                None => (&b"Swap:"[..], &mut last.swap_kb),
            },
            _ => continue,
        };
        if let Some(value) = line.strip_prefix(field.0) {
            *field.1 = kilobytes(value).ok_or_else(|| Error::parse(file, line))?;
        }
    }
    Ok(all)
}

fn kilobytes(value: &[u8]) -> Option<u64> {
    let value = value.trim_ascii();
    number(value.strip_suffix(b"kB").unwrap_or(value))
}

fn flag_words(line: &[u8]) -> Vec<[u8; 2]> {
    let mut all = Vec::with_capacity(line.len() / 3 + 1);
    all.extend(words(line).filter_map(|word| <[u8; 2]>::try_from(word).ok()));
    all
}

/// `7f3edc831000-7f3edc832000 rw-s 00000000 fe:00 10010748                   /tmp/x (deleted)`
fn header(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|byte| *byte == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let &[read, write, exec, shared] = fields.next()? else { return None };
    let offset = hex(fields.next()?)?;
    let dev = device(fields.next()?, 16)?;
    let inode = number(fields.next()?)?;
    // The name is padded to a column; names begin with `/`, `[` or a letter, never with a blank.
    let name = fields.next().unwrap_or(b"").trim_ascii_start();
    let (name, deleted) = match name.strip_suffix(b" (deleted)") {
        Some(rest) if name.starts_with(b"/") => (rest, true),
        _ => (name, false),
    };
    if end < start {
        return None;
    }
    Some(Mapping {
        start,
        end,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        // `S`, `P`: a mapping that may not be, or is not, shared, in very old kernels only.
        shared: shared == b's',
        offset,
        dev,
        inode,
        path: unescape(name, b"\n"),
        deleted,
        ..Mapping::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"\
7f3edc831000-7f3edc832000 rw-s 00001000 fe:00 10010748                   /tmp/a b/x\\012y\\z\xff (deleted)
Size:                  4 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                   8 kB
Pss:                   0 kB
Pss_Dirty:             0 kB
Shared_Clean:          4 kB
Shared_Dirty:         16 kB
Private_Clean:         0 kB
Shared_Hugetlb:        0 kB
Anonymous:            12 kB
AnonHugePages:         2 kB
Swap:                 16 kB
SwapPss:               1 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd wr sh mr mw me ms ac ss sl zz 
7ffebd90d000-7ffebd92e000 rw-p 00000000 00:00 0                          [stack]
Rss:                  60 kB
VmFlags: rd wr mr mw me gd ac 
7fff00000000-7fff00001000 ---p 00000000 00:00 0 
VmFlags:\x20
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex \n";

    #[test]
    fn smaps_text() {
        let all = parse_smaps(SMAPS).unwrap();
        assert_eq!(all.len(), 4);
        let file = &all[0];
        assert_eq!((file.start, file.end, file.offset), (0x7f3e_dc83_1000, 0x7f3e_dc83_2000, 0x1000));
        assert!(file.read && file.write && !file.exec && file.shared && file.deleted);
        assert_eq!((file.dev, file.inode), ((0xfe, 0), 10_010_748));
        assert_eq!(file.path, b"/tmp/a b/x\ny\\z\xff");
        assert_eq!((file.page_kb, file.rss_kb, file.anonymous_kb, file.swap_kb), (4, 8, 12, 16));
        assert_eq!(file.shared_kb, 20);
        assert_eq!(file.pkey, 3);
        assert_eq!(file.flags.words.len(), 11);
        assert!(file.flags.has("ss") && file.flags.has("zz") && !file.flags.has("gd"));
        assert_eq!(file.kind(), Kind::File);
        assert!(all[1].flags.has("gd"));
        assert_eq!(all[1].kind(), Kind::Stack);
        assert_eq!((all[2].path.as_slice(), all[2].kind()), (&b""[..], Kind::Anonymous));
        assert!(all[2].flags.words.is_empty() && !all[2].read);
        assert_eq!(all[3].kind(), Kind::Vsyscall);
        assert_eq!(all[3].start, 0xffff_ffff_ff60_0000);
    }

    #[test]
    fn names() {
        let kind_of = |dev: &str, name: &str| {
            let line = format!("1000-2000 rw-p 00000000 {dev} 7                    {name}\n");
            let mapping = parse_maps(line.as_bytes()).unwrap().remove(0);
            format!("{:?}", mapping.kind())
        };
        assert_eq!(kind_of("00:01", "/dev/zero (deleted)"), "SharedAnonymous");
        assert_eq!(kind_of("00:06", "/dev/zero"), "File");
        assert_eq!(kind_of("00:01", "/memfd:x (deleted)"), format!("{:?}", Kind::Memfd(b"x")));
        assert_eq!(kind_of("00:01", "/SYSV0000002a (deleted)"), "SysV(42)");
        assert_eq!(kind_of("00:01", "/SYSVolume (deleted)"), "File");
        assert_eq!(kind_of("fe:00", "/SYSV0000002a (deleted)"), "File");
        assert_eq!(kind_of("00:0f", "/[aio] (deleted)"), "Aio");
        assert_eq!(kind_of("00:0f", "/anon_hugepage (deleted)"), "AnonHugepage");
        assert_eq!(kind_of("00:00", "[anon:a b]"), format!("{:?}", Kind::NamedAnonymous(b"a b")));
        assert_eq!(kind_of("00:01", "[anon_shmem:s]"), format!("{:?}", Kind::NamedSharedAnonymous(b"s")));
        assert_eq!(
            kind_of("00:10", "anon_inode:[io_uring]"),
            format!("{:?}", Kind::AnonInode(b"[io_uring]"))
        );
        assert_eq!(kind_of("00:00", "[vvar_vclock]"), "Vvar");
        assert_eq!(kind_of("00:00", "[uprobes]"), format!("{:?}", Kind::Special(b"uprobes")));
    }

    #[test]
    fn odd_input_is_an_error() {
        for text in [
            &b"\xff\n"[..],
            b"Rss: 4 kB\n",
            b"1000-2000\n",
            b"2000-1000 rw-p 0 00:00 0 \n",
            b"1000-2000 rw-p 0 00:00 0 \nRss: x kB\n",
            b"1000-2000 rw-p 0 00:00 99999999999999999999999\n",
        ] {
            assert!(parse_smaps(text).is_err(), "{}", text.escape_ascii());
        }
        assert!(parse_smaps(b"").unwrap().is_empty());
    }

    #[test]
    fn our_own() {
        let here = SMAPS.as_ptr().addr() as u64;
        let all = smaps(Pid::this()).unwrap();
        assert!(all.iter().any(|mapping| mapping.contains(here) && mapping.flags.has("rd")));
        assert!(all.iter().any(|mapping| mapping.kind() == Kind::Stack));
        assert!(maps(Pid::this()).unwrap().iter().any(|mapping| mapping.kind() == Kind::Vdso));
        assert!(maps(Pid(0x3fff_ffff)).unwrap_err().is_gone());
    }
}
