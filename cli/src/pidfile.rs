//! The file that tells others the pid of a restored process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::exit::Failure;

/// A pidfile that is taken back unless it is [kept](PidFile::keep).
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    /// Something that was there before and is no regular file: a pipe, /dev/stdout.
    special: bool,
    kept: bool,
}

impl PidFile {
    /// Writes `pid` to `path`: under another name first, so that no reader sees half of it.
    pub(crate) fn write(path: &Path, pid: i32) -> Result<Self, Failure> {
        let special = fs::symlink_metadata(path).is_ok_and(|found| !found.is_file());
        let text = format!("{pid}\n");
        let written = if special {
            OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()))
        } else {
            replace(path, &text)
        };
        written.map_err(Failure::output(format!("cannot write the pid to `{}`", path.display())))?;
        Ok(PidFile { path: path.to_owned(), special, kept: false })
    }

    /// The process runs: the file stays.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.kept && !self.special {
            let _best_effort = fs::remove_file(&self.path);
        }
    }
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let made = File::create_new(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&temporary, path));
    if made.is_err() {
        let _best_effort = fs::remove_file(&temporary);
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_replaced_kept_and_taken_back() {
        let dir = std::env::temp_dir().join(format!("torpor-pidfile-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("pid");
        fs::write(&path, "an older and longer content\n").unwrap();
        PidFile::write(&path, 42).unwrap().keep();
        assert_eq!(fs::read_to_string(&path).unwrap(), "42\n");
        drop(PidFile::write(&path, 43).unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        assert!(PidFile::write(&dir, 44).is_err());
        assert!(PidFile::write(&dir.join("missing/pid"), 44).is_err());
        drop(PidFile::write(Path::new("/dev/null"), 44).unwrap());
        assert!(Path::new("/dev/null").exists());
        fs::remove_dir(&dir).unwrap();
    }
}
