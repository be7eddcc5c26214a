//! Where the names of sockets are resolved and made.
//!
//! A relative name is resolved from the directory it was given in. And the name of a socket whose file is gone,
//! or which is only one end of a connection, is made where nobody sees it: a directory of ours serves as the
//! root for the one call, so that the kernel keeps the same address, and no file at that path is touched.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::Mode;

/// Where a call is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// As we are: for abstract names, and none.
    Here,
    /// With this root and working directory.
    At {
        /// Root directory, if it is another than ours.
        root: Option<PathBuf>,
        /// Working directory.
        dir: Option<PathBuf>,
    },
}

impl Place {
    /// Makes a call in a thread whose root, working directory and umask are its own.
    pub(crate) fn run(&self, call: &(dyn Fn() -> nix::Result<()> + Sync)) -> nix::Result<()> {
        if *self == Place::Here {
            return call();
        }
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
                self.enter()?;
                call()
            });
            worker.join().expect("the call does not panic")
        })
    }

    /// Goes there. Allocates nothing.
    pub(crate) fn enter(&self) -> nix::Result<()> {
        let Place::At { root, dir } = self else { return Ok(()) };
        nix::sys::stat::umask(Mode::empty());
        if let Some(root) = root {
            nix::unistd::chroot(root.as_path())?;
            nix::unistd::chdir("/")?;
        }
        if let Some(dir) = dir {
            nix::unistd::chdir(dir.as_path())?;
        }
        Ok(())
    }
}

/// The directory from which relative `name` leads to `path`.
pub(crate) fn directory_of(path: &Path, name: &Path) -> Option<PathBuf> {
    let mut dir = path;
    for part in name.components().rev() {
        match part {
            std::path::Component::Normal(part) if dir.file_name() == Some(part) => dir = dir.parent()?,
            std::path::Component::CurDir => {}
            _ => return None,
        }
    }
    Some(dir.to_owned())
}

/// Directories of ours in which names are made that nobody is to see; removed on drop.
#[derive(Debug, Default)]
pub(crate) struct Hidden {
    base: Option<PathBuf>,
    count: u32,
}

impl Hidden {
    /// A new empty place where a file `name` can be made.
    pub(crate) fn place(&mut self, name: &Path) -> nix::Result<Place> {
        let failed = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        let base = match &self.base {
            Some(base) => base.clone(),
            None => {
                let template = std::env::temp_dir().join("torpor-sockets-XXXXXX");
                let made = nix::unistd::mkdtemp(&template)?;
                self.base.insert(made).clone()
            }
        };
        self.count += 1;
        let root = base.join(self.count.to_string());
        std::fs::DirBuilder::new().mode(0o755).create(&root).map_err(failed)?;
        // From the root `..` leads nowhere else.
        let mut dir = root.clone();
        for part in name.parent().into_iter().flat_map(Path::components) {
            match part {
                std::path::Component::Normal(part) => dir.push(part),
                std::path::Component::ParentDir if dir != root => {
                    dir.pop();
                }
                _ => {}
            }
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir).map_err(failed)?;
        }
        Ok(Place::At { root: Some(root), dir: None })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Some(base) = &self.base {
            let _best_effort = std::fs::remove_dir_all(base);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_is_resolved_from_its_directory() {
        let dir = |path, name| directory_of(Path::new(path), Path::new(name));
        assert_eq!(dir("/run/x/sock", "./sock"), Some("/run/x".into()));
        assert_eq!(dir("/run/x/sock", "x/sock"), Some("/run".into()));
        assert_eq!(dir("/run/x/sock", "../sock"), None);
    }

    #[test]
    fn hidden_names() {
        let mut hidden = Hidden::default();
        for (name, dir) in
            [("/run/x/sock", "run/x"), ("sock", ""), ("../a/../b/sock", "b"), ("./a/sock", "a")]
        {
            let Place::At { root: Some(root), .. } = hidden.place(Path::new(name)).unwrap() else {
                panic!("no place for {name}");
            };
            assert!(root.join(dir).is_dir(), "{name}");
        }
        let base = hidden.base.clone().unwrap();
        drop(hidden);
        assert!(!base.exists());
    }
}
