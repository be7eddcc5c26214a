//! The contents of a data file, however they are stored.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::{Error, Result};

/// A data file, open for reading. Offsets are those of the page index.
#[derive(Debug)]
pub struct Data {
    file: File,
    path: PathBuf,
}

impl Data {
    pub(crate) fn raw(file: File, path: PathBuf) -> Self {
        Data { file, path }
    }

    /// The file itself, if its bytes are the contents: whoever has it can read them without us.
    pub fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    /// Fills `bytes` with what lies at `offset`. May be called by several threads at once.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(Error::file("read", &self.path))
    }
}
