//! What the program says by its exit code. docs/exit-codes.md is the same for users.

use std::fmt;

use nix::errno::Errno;
use torpor_dumper::Error as DumpError;
use torpor_image::Error as ImageError;
use torpor_kernel::Error as KernelError;
use torpor_restorer::Error as RestoreError;

use crate::output;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: it was done.
    Ok,
    /// 1: something unexpected, such as a kernel call that failed.
    Unexpected,
    /// 2: the command line was not understood.
    Usage,
    /// 3: there is no such process, or it ended meanwhile.
    NoProcess,
    /// 4: a permission or privilege is missing.
    Permission,
    /// 5: the process is, or has, something that cannot be dumped.
    Refused,
    /// 6: the image is damaged, incomplete, or no image at all.
    Damaged,
    /// 7: the image is of a newer format, or this machine cannot take it.
    Unfit,
    /// 8: something the restored process needs is taken, gone or changed: a pid, a port, a file.
    Conflict,
    /// 9: the output cannot be written: no permission, occupied, disk full.
    Output,
    /// 10: a limit was hit: of open files, of processes, of memory.
    Limit,
    /// 11: the image is encrypted, and the key is missing or another one.
    Key,
    /// 12: memory that was to come later could not be read, and the restored tree was ended.
    Lost,
    /// An attached restore: the status of the program itself.
    Program(u8),
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Unexpected => 1,
            Exit::Usage => 2,
            Exit::NoProcess => 3,
            Exit::Permission => 4,
            Exit::Refused => 5,
            Exit::Damaged => 6,
            Exit::Unfit => 7,
            Exit::Conflict => 8,
            Exit::Output => 9,
            Exit::Limit => 10,
            Exit::Key => 11,
            Exit::Lost => 12,
            Exit::Program(status) => status,
        }
    }

    /// The code for an error: the outermost cause that has a meaning decides.
    pub fn of(error: &anyhow::Error) -> Self {
        let known = |cause: &(dyn std::error::Error + 'static)| {
            if let Some(failure) = cause.downcast_ref::<Failure>() {
                Some(failure.exit)
            } else if let Some(e) = cause.downcast_ref::<DumpError>() {
                Some(of_dump(e))
            } else if let Some(e) = cause.downcast_ref::<RestoreError>() {
                Some(of_restore(e))
            } else if let Some(e) = cause.downcast_ref::<ImageError>() {
                Some(of_reading(e))
            } else {
                cause.downcast_ref::<KernelError>().map(|e| of_errno(e.errno()))
            }
        };
        error.chain().find_map(known).unwrap_or(Exit::Unexpected)
    }
}

fn of_dump(error: &DumpError) -> Exit {
    match error {
        DumpError::NoProcess(_) | DumpError::Died { .. } => Exit::NoProcess,
        DumpError::NotDumpable { .. }
        | DumpError::Traced { .. }
        | DumpError::Refused { .. }
        | DumpError::Timeout { .. }
        | DumpError::Injection { .. }
        | DumpError::Declined { .. } => Exit::Refused,
        DumpError::Permission { .. } => Exit::Permission,
        DumpError::Image(e) => of_writing(e),
        DumpError::Kernel { source, .. } => of_errno(source.errno()),
        _ => Exit::Unexpected,
    }
}

fn of_restore(error: &RestoreError) -> Exit {
    match error {
        RestoreError::Image(e) => of_reading(e),
        RestoreError::Unfit { .. } => Exit::Unfit,
        RestoreError::Conflict { .. } | RestoreError::Fleeting { .. } => Exit::Conflict,
        RestoreError::Permission { .. } => Exit::Permission,
        RestoreError::Limit { .. } => Exit::Limit,
        RestoreError::Lost { .. } => Exit::Lost,
        RestoreError::Open { errno, .. } | RestoreError::Script { errno, .. } => of_restore_errno(*errno),
        RestoreError::Kernel { source, .. } => source.errno().map_or(Exit::Unexpected, of_restore_errno),
        _ => Exit::Unexpected,
    }
}

/// What a call says of the host while a process is being built: nothing of the process can be meant by it.
fn of_restore_errno(errno: Errno) -> Exit {
    match errno {
        Errno::EADDRINUSE | Errno::EADDRNOTAVAIL | Errno::EEXIST | Errno::ENOENT | Errno::ENOTDIR => {
            Exit::Conflict
        }
        errno => of_errno(Some(errno)),
    }
}

fn of_reading(error: &ImageError) -> Exit {
    match error {
        ImageError::NoImage { .. } | ImageError::Damaged { .. } | ImageError::Parent { .. } => Exit::Damaged,
        ImageError::NoParent { .. } | ImageError::NoRecipients { .. } => Exit::Usage,
        ImageError::TooNew { .. } | ImageError::OtherMachine { .. } => Exit::Unfit,
        ImageError::Occupied { .. } => Exit::Output,
        ImageError::Encrypted { .. } | ImageError::OtherKey { .. } => Exit::Key,
        ImageError::Key { .. } => Exit::Usage,
        // ELOOP: a link where the image has a file.
        ImageError::File { source, .. } => match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EISDIR) => Exit::Damaged,
            errno => of_errno(errno),
        },
        _ => Exit::Unexpected,
    }
}

fn of_writing(error: &ImageError) -> Exit {
    match error {
        ImageError::File { source, .. }
            if matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
        {
            Exit::Limit
        }
        ImageError::File { .. }
        | ImageError::Occupied { .. }
        | ImageError::Remains { .. }
        | ImageError::Busy { .. } => Exit::Output,
        _ => Exit::Unexpected,
    }
}

fn of_errno(errno: Option<Errno>) -> Exit {
    match errno {
        Some(Errno::ESRCH) => Exit::NoProcess,
        Some(Errno::EPERM | Errno::EACCES) => Exit::Permission,
        Some(Errno::ENOSYS) => Exit::Unfit,
        Some(errno) if is_limit(errno as i32) => Exit::Limit,
        _ => Exit::Unexpected,
    }
}

fn is_limit(errno: i32) -> bool {
    matches!(Errno::from_raw(errno), Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EFBIG)
}

/// A failure of the program itself, with the code it ends in.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    text: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Failure { exit, text: text.into() }
    }

    /// For `map_err` of something written: what could not be done, then why.
    pub(crate) fn output<E: fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |why| Failure::new(Exit::Output, format!("{what}: {why}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// The text of an error and its causes, fit for a terminal: names in it may come from a hostile image.
///
/// Not `{:#}`: errors of the libraries name their cause themselves, which would then stand there twice.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    output::safe(&text)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use torpor_kernel::Pid;

    use super::*;

    fn file(errno: i32) -> ImageError {
        ImageError::File { operation: "open", path: "x".into(), source: io::Error::from_raw_os_error(errno) }
    }

    fn kernel(errno: Errno) -> KernelError {
        KernelError::syscall("call", "object", errno)
    }

    fn code(error: impl Into<anyhow::Error>) -> Exit {
        Exit::of(&error.into())
    }

    #[test]
    fn dumping() {
        let pid = Pid(7);
        assert_eq!(code(DumpError::NoProcess(pid)), Exit::NoProcess);
        assert_eq!(code(DumpError::Died { pid, how: "so".into() }), Exit::NoProcess);
        assert_eq!(code(DumpError::NotDumpable { pid, why: "so".into() }), Exit::Refused);
        assert_eq!(code(DumpError::Traced { pid, tracer: 1, name: "gdb".into() }), Exit::Refused);
        assert_eq!(code(DumpError::Refused { pid, refusals: Vec::new() }), Exit::Refused);
        assert_eq!(code(DumpError::Permission { pid, source: kernel(Errno::EPERM) }), Exit::Permission);
        let failed = |errno| DumpError::Kernel { pid, doing: "it".into(), source: kernel(errno) };
        assert_eq!(code(failed(Errno::ESRCH)), Exit::NoProcess);
        assert_eq!(code(failed(Errno::EPERM)), Exit::Permission);
        assert_eq!(code(failed(Errno::EIO)), Exit::Unexpected);
        assert_eq!(code(DumpError::Inconsistent { pid, what: "it".into() }), Exit::Unexpected);
    }

    #[test]
    fn the_same_file_error_means_another_thing_when_an_image_is_written() {
        for errno in [libc::EACCES, libc::ENOSPC, libc::ENOENT, libc::ENOTDIR, libc::EROFS] {
            assert_eq!(code(DumpError::Image(file(errno))), Exit::Output);
        }
        let occupied = ImageError::Occupied { path: PathBuf::from("x") };
        assert_eq!(code(DumpError::Image(occupied)), Exit::Output);
        assert_eq!(code(file(libc::EACCES)), Exit::Permission);
        assert_eq!(code(file(libc::ENOENT)), Exit::Damaged);
        assert_eq!(code(file(libc::EIO)), Exit::Unexpected);
    }

    #[test]
    fn reading_and_restoring() {
        let damaged = || ImageError::Damaged { file: "f".into(), what: "w".into() };
        assert_eq!(code(damaged()), Exit::Damaged);
        assert_eq!(code(RestoreError::Image(damaged())), Exit::Damaged);
        assert_eq!(code(ImageError::NoImage { path: "x".into() }), Exit::Damaged);
        assert_eq!(code(ImageError::TooNew { major: 9, minor: 0 }), Exit::Unfit);
        assert_eq!(code(ImageError::OtherMachine { image: "vax".into(), here: "x86_64" }), Exit::Unfit);
        let (what, why, remedy) = (String::new(), String::new(), String::new());
        assert_eq!(code(RestoreError::Conflict { what, why, remedy }), Exit::Conflict);
        let open = |errno| RestoreError::Open { what: "fd 3".into(), call: "bind", errno };
        assert_eq!(code(open(Errno::EADDRINUSE)), Exit::Conflict);
        assert_eq!(code(open(Errno::EACCES)), Exit::Permission);
        assert_eq!(code(open(Errno::ENOMEM)), Exit::Limit);
        assert_eq!(code(open(Errno::ENOSYS)), Exit::Unfit);
        assert_eq!(code(open(Errno::EIO)), Exit::Unexpected);
    }

    #[test]
    fn context_does_not_hide_the_code() {
        let error = anyhow::Error::from(DumpError::NoProcess(Pid(7))).context("first").context("second");
        assert_eq!(Exit::of(&error), Exit::NoProcess);
        assert_eq!(Exit::of(&anyhow::anyhow!("what")), Exit::Unexpected);
        assert_eq!(code(Failure::new(Exit::Output, "full")), Exit::Output);
    }

    #[test]
    fn a_cause_is_named_once() {
        let error = DumpError::Image(file(libc::ENOSPC));
        let text = message(&anyhow::Error::from(error));
        assert_eq!(text.matches("No space left").count(), 1, "{text}");
        let error = anyhow::anyhow!("inner").context("outer");
        assert_eq!(message(&error), "outer: inner");
    }

    #[test]
    fn codes_are_distinct_and_documented() {
        let page = include_str!("../../docs/exit-codes.md");
        let all = [
            Exit::Ok,
            Exit::Unexpected,
            Exit::Usage,
            Exit::NoProcess,
            Exit::Permission,
            Exit::Refused,
            Exit::Damaged,
            Exit::Unfit,
            Exit::Conflict,
            Exit::Output,
            Exit::Limit,
            Exit::Key,
        ];
        for (code, exit) in all.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), code);
            assert!(page.contains(&format!("\n| {code} | ")), "docs/exit-codes.md lacks {code}");
        }
    }
}
