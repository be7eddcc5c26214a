//! Directories that lived only as long as the program: made again where they are missing.

use std::os::unix::fs::DirBuilderExt;

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::open::Opener;

/// Makes those that are missing, parents first, before anything is opened in them.
pub(crate) fn make(opener: &mut Opener<'_>) -> Result<()> {
    for directory in &opener.image.objects.directories {
        let path = directory.path.path();
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            // Whatever it is: what needs it will tell.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(e) => {
                let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
                return Err(Error::Conflict {
                    what: format!("directory `{}`", directory.path),
                    why: format!("it is gone and cannot be made again ({errno})"),
                    remedy: "put it back where it was".into(),
                });
            }
        }
        opener.files.directory(path.to_owned(), directory.mode & 0o7777);
        // One that the user may not give away stays his.
        let _stays = std::os::unix::fs::lchown(path, Some(directory.uid), Some(directory.gid));
    }
    Ok(())
}
