//! /proc/PID/mountinfo: the mounts that a process sees.
//!
//! Fields as in proc_pid_mountinfo(5); blanks, newlines and backslashes in names are octal escapes (fs/proc_namespace.c,
//! `seq_path_root` and `mangle`), and type and source escape `#` as well. The optional fields end with a lone `-`.
//! The root may read `/path//deleted` when the mounted directory is gone.

use crate::text::{device, lines, number, unescape, with};
use crate::{Error, Pid, Result};

/// One mount.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Mount {
    /// Its id.
    pub id: i32,
    /// Id of the mount it stands on; its own id at the top.
    pub parent: i32,
    /// Device of its files: major, minor.
    pub dev: (u32, u32),
    /// The directory of the file system that is mounted. For nsfs, the name of the namespace.
    pub root: Vec<u8>,
    /// Where, as seen from the process's root.
    pub mount_point: Vec<u8>,
    /// Options of the mount.
    pub options: Vec<u8>,
    /// Propagation: `shared:N`, `master:N`, `propagate_from:N`, `unbindable`.
    pub propagation: Vec<Vec<u8>>,
    /// Type of file system, possibly with a subtype: `fuse.sshfs`.
    pub fs_type: Vec<u8>,
    /// What is mounted.
    pub source: Vec<u8>,
    /// Options of the file system.
    pub super_options: Vec<u8>,
}

/// Reads the mounts, in the order in which they were made.
pub fn mountinfo(pid: Pid) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    with(&path, |text| parse_file(&path, text))?
}

/// Parses the text of a mountinfo file.
pub fn parse(text: &[u8]) -> Result<Vec<Mount>> {
    parse_file("mountinfo", text)
}

fn parse_file(file: &str, text: &[u8]) -> Result<Vec<Mount>> {
    lines(text).map(|line| mount(line).ok_or_else(|| Error::parse(file, line))).collect()
}

fn mount(line: &[u8]) -> Option<Mount> {
    // Not on runs of blanks: a source may be the empty string.
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next = || fields.next();
    let name = |field: &[u8]| unescape(field, b" \t\n\\#");
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let dev = device(next()?, 10)?;
    let root = name(next()?);
    let mount_point = name(next()?);
    let options = name(next()?);
    let mut propagation = Vec::new();
    loop {
        match next()? {
            b"-" => break,
            field => propagation.push(field.to_vec()),
        }
    }
    Some(Mount {
        id,
        parent,
        dev,
        root,
        mount_point,
        options,
        propagation,
        fs_type: name(next()?),
        source: name(next()?),
        super_options: name(next()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text() {
        let all = parse(
            b"36 35 98:0 /mnt1\\040x /mnt2\\134\\011\xff rw,noatime master:1 shared:2 - ext3 /dev/root\\043 rw,errors=continue\n\
              22 27 0:21 / /proc rw,relatime - proc  rw\n",
        )
        .unwrap();
        assert_eq!((all[0].id, all[0].parent, all[0].dev), (36, 35, (98, 0)));
        assert_eq!(
            (all[0].root.as_slice(), all[0].mount_point.as_slice()),
            (&b"/mnt1 x"[..], &b"/mnt2\\\t\xff"[..])
        );
        assert_eq!(all[0].options, b"rw,noatime");
        assert_eq!(all[0].propagation, [b"master:1".to_vec(), b"shared:2".to_vec()]);
        assert_eq!((all[0].fs_type.as_slice(), all[0].source.as_slice()), (&b"ext3"[..], &b"/dev/root#"[..]));
        assert_eq!(all[0].super_options, b"rw,errors=continue");
        assert_eq!((all[1].source.as_slice(), all[1].super_options.as_slice()), (&b""[..], &b"rw"[..]));
    }

    #[test]
    fn odd_input_is_an_error() {
        for text in [
            &b"\n\n"[..],
            b"36 35 98 / / rw - a b c\n",
            b"36 35 98:0 / / rw a b c\n",
            b"36 35 98:0 / / rw - a\n",
        ] {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn our_own() {
        assert!(mountinfo(Pid::this()).unwrap().iter().any(|mount| mount.mount_point == b"/proc"));
    }
}
