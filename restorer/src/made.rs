//! What a restore made and changed in the file system, to be undone unless it succeeds.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use torpor_image::InodeId;

/// What was made and changed. Dropped before [`Made::keep`], all of it is as it was.
#[derive(Debug, Default)]
pub(crate) struct Made {
    /// Files, with device and inode number.
    files: Vec<(PathBuf, u64, u64)>,
    /// Directories, parents before their children, with the mode they will have.
    directories: Vec<(PathBuf, u32)>,
    changed: Vec<Changed>,
    cuts: Vec<(File, u64)>,
    /// Files to be compared with the image, by their names in messages.
    pub(crate) to_put_back: Vec<(InodeId, String)>,
    /// Files whose rule was applied.
    pub(crate) settled: BTreeSet<InodeId>,
}

/// A file whose contents are being put back. Dropped, it is as before, unless it was kept.
#[derive(Debug)]
pub(crate) struct Changed {
    /// The file, open for writing.
    pub(crate) file: File,
    /// Its size before.
    size: u64,
    /// What was in it, at the same offsets.
    old: File,
    /// Offsets and lengths of that.
    parts: Vec<(u64, u64)>,
    kept: bool,
}

impl Made {
    /// A file was made.
    pub(crate) fn file(&mut self, path: PathBuf) {
        if let Ok(now) = std::fs::symlink_metadata(&path) {
            self.files.push((path, now.dev(), now.ino()));
        }
    }

    /// A directory was made. It gets its mode at the end, lest nothing can be made in it.
    pub(crate) fn directory(&mut self, path: PathBuf, mode: u32) {
        self.directories.push((path, mode));
    }

    /// A file was changed.
    pub(crate) fn change(&mut self, changed: Changed) {
        self.changed.push(changed);
    }

    /// A file that will be cut off when everything else stands: what is cut off could not be put back.
    pub(crate) fn cut(&mut self, file: File, size: u64) {
        self.cuts.push((file, size));
    }

    /// Everything stands: what was made stays, and what was put off is done. Opened for writing, a file can
    /// be shortened.
    pub(crate) fn keep(&mut self) {
        for (file, size) in self.cuts.drain(..) {
            let _cannot_fail = file.set_len(size);
        }
        for (path, mode) in self.directories.drain(..) {
            let _ours = std::fs::set_permissions(path, Permissions::from_mode(mode));
        }
        self.files.clear();
        self.changed.iter_mut().for_each(|changed| changed.kept = true);
        self.changed.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.changed.clear();
        for (path, device, number) in self.files.drain(..) {
            // Somebody may have put another one there.
            let ours = std::fs::symlink_metadata(&path).is_ok_and(|m| (m.dev(), m.ino()) == (device, number));
            if ours {
                let _best_effort = std::fs::remove_file(path);
            }
        }
        for (path, _) in self.directories.drain(..).rev() {
            // Fails if somebody has put something into it meanwhile, which is right.
            let _best_effort = std::fs::remove_dir(path);
        }
    }
}

impl Changed {
    /// Begins to change a file of this size; what is overwritten goes to `old`.
    pub(crate) fn new(file: File, size: u64, old: File) -> Self {
        Changed { file, size, old, parts: Vec::new(), kept: false }
    }

    /// Overwrites a part, keeping what was there.
    pub(crate) fn replace(&mut self, offset: u64, wanted: &[u8], actual: &[u8]) -> std::io::Result<()> {
        self.save(offset, actual)?;
        self.file.write_all_at(wanted, offset)
    }

    /// Keeps what was in a part.
    pub(crate) fn save(&mut self, offset: u64, actual: &[u8]) -> std::io::Result<()> {
        self.old.write_all_at(actual, offset)?;
        self.parts.push((offset, actual.len() as u64));
        Ok(())
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let mut buffer = Vec::new();
        let _best_effort = self.file.set_len(self.size);
        for &(offset, length) in &self.parts {
            buffer.resize(length as usize, 0);
            let _best_effort = self
                .old
                .read_exact_at(&mut buffer, offset)
                .and_then(|()| self.file.write_all_at(&buffer, offset));
        }
    }
}
