//! Images on standard output and standard input.

use std::fs::{DirBuilder, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statvfs::statvfs;
use torpor_image::spool;
use torpor_image::stream::Output;

use crate::exit::{Exit, Failure};
use crate::held::Held;

/// How long to wait for the other end, in milliseconds, before looking whether a signal wants us to end: signals are held
/// back meanwhile.
const MOMENT: u8 = 100;

/// Standard output, taken over: whoever else writes there would break the stream.
struct Taken(File);

/// Takes over standard output for an image.
pub(crate) fn take_output() -> anyhow::Result<Box<dyn Output>> {
    if io::stdout().is_terminal() {
        let what =
            "`-` writes the image to standard output, which is a terminal: send it to a file or a pipe";
        return Err(Failure::new(Exit::Usage, what).into());
    }
    let failed = |e: io::Error| Failure::new(Exit::Output, format!("cannot write to standard output: {e}"));
    let own: OwnedFd = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let null = File::options().write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    let own = File::from(own);
    // To wait at a pipe is ours to choose: the flag must not become that of others who have the pipe open.
    let pipe = own.metadata().is_ok_and(|m| m.file_type().is_fifo());
    let reopened = || {
        let path = format!("/proc/self/fd/{}", own.as_raw_fd());
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()
    };
    Ok(Box::new(Taken(pipe.then(reopened).flatten().unwrap_or(own))))
}

impl Write for Taken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(&self.0, PollFlags::POLLOUT)?,
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Output for Taken {
    fn close(self: Box<Self>) -> io::Result<()> {
        nix::unistd::close(self.0.into_raw_fd()).map_err(io::Error::from)
    }
}

/// Waits until something can be done; an error if a signal wants us to end.
fn wait(file: &File, what: PollFlags) -> io::Result<()> {
    loop {
        if Held::wants_end() {
            return Err(io::Error::other("it was called off by a signal"));
        }
        match poll(&mut [PollFd::new(file.as_fd(), what)], PollTimeout::from(MOMENT)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Standard input, read as long as no signal wants us to end.
struct Waiting(File);

impl Read for Waiting {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        wait(&self.0, PollFlags::POLLIN)?;
        self.0.read(bytes)
    }
}

/// A directory of ours that holds an image for a while. Removed on drop.
#[derive(Debug)]
pub(crate) struct Spool(PathBuf);

impl Spool {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let _best_effort = std::fs::remove_dir_all(&self.0);
    }
}

/// Reads an image from standard input into a directory in `dir`, or where temporary files go.
pub(crate) fn receive(dir: Option<&Path>) -> anyhow::Result<Spool> {
    if io::stdin().is_terminal() {
        let what = "`-` reads the image from standard input, which is a terminal: give it a file or a pipe";
        return Err(Failure::new(Exit::Usage, what).into());
    }
    let dir = dir.map_or_else(std::env::temp_dir, Path::to_owned);
    let spool = make(&dir).map_err(|e| {
        let what = format!(
            "cannot make a directory for the image in `{}`: {e}; --spool names another",
            dir.display()
        );
        Failure::new(Exit::Output, what)
    })?;
    let room = || {
        let space = statvfs(spool.path())?;
        Ok(space.blocks_available() as u64 * space.fragment_size() as u64)
    };
    let mut from = Waiting(File::from(io::stdin().as_fd().try_clone_to_owned()?));
    spool::receive(&mut from, spool.path(), &room).map_err(|e| match &e {
        torpor_image::Error::File { operation: "write" | "create", .. } => {
            anyhow::Error::from(Failure::new(Exit::Output, format!("{e}; --spool names another place")))
        }
        _ => e.into(),
    })?;
    // What is restored may have to be given a terminal.
    let terminal =
        File::options().read(true).write(true).open("/dev/tty").or_else(|_| File::open("/dev/null"))?;
    nix::unistd::dup2_stdin(&terminal)?;
    Ok(spool)
}

fn make(dir: &Path) -> io::Result<Spool> {
    let mut number = 0;
    loop {
        let path = dir.join(format!("torpor-spool-{}-{number}", std::process::id()));
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(Spool(path)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
            Err(e) => return Err(e),
        }
    }
}
