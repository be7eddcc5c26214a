//! Why a restore did not happen.

use nix::errno::Errno;
use torpor_image as image;
use torpor_kernel as kernel;
use torpor_kernel::advice;

/// A restore failed. Whatever had been made by then is gone again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// This machine cannot take the image.
    #[error("cannot restore {what}: {why}; {remedy}")]
    Unfit {
        /// The process or object.
        what: String,
        /// What does not fit.
        why: String,
        /// What the user can do.
        remedy: String,
    },
    /// Something the image needs is taken, gone or changed.
    #[error("cannot restore {what}: {why}; {remedy}")]
    Conflict {
        /// The process or object.
        what: String,
        /// What stands in the way.
        why: String,
        /// What the user can do.
        remedy: String,
    },
    /// A privilege is missing.
    #[error("cannot restore {what}: {call}: {errno}; {remedy}")]
    Permission {
        /// The process or object.
        what: String,
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
        /// What the user can do.
        remedy: &'static str,
    },
    /// A pid is taken, by nobody that can be seen: a thread that has just ended keeps its number for a moment longer than
    /// its process shows it (kernel/exit.c, `release_task`).
    #[error("cannot restore {what}: pid {id} is taken, but by nobody that can be seen; try again")]
    Fleeting {
        /// The process.
        what: String,
        /// The pid.
        id: i32,
    },
    /// A limit was hit.
    #[error("cannot restore {what}: {call}: {errno}; {remedy}")]
    Limit {
        /// The process or object.
        what: String,
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The caller no longer wants it.
    #[error("the restore of {what} was called off; nothing of it is left")]
    Cancelled {
        /// The process.
        what: String,
    },
    /// A call made outside of the new tasks failed.
    #[error("cannot restore {what}: {call}: {errno}{}", advice(Some(*errno)))]
    Open {
        /// The object.
        what: String,
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// A call made inside a new task failed.
    #[error("cannot restore {task}: {purpose}: {errno}{}", advice(Some(*errno)))]
    Script {
        /// The task.
        task: String,
        /// What the call was for.
        purpose: String,
        /// Its error.
        errno: Errno,
    },
    /// A new task ended before it was complete.
    #[error("cannot restore {task}: it ended while it was being built ({how})")]
    Died {
        /// The task.
        task: String,
        /// How.
        how: String,
    },
    /// Memory that was to come later cannot be read: the tree was ended, lest it goes on without.
    #[error("{what} was ended: memory of it that was to come from the image cannot be read: {why}")]
    Lost {
        /// The root.
        what: String,
        /// What is wrong with the image.
        why: String,
    },
    /// A kernel call failed.
    #[error("cannot restore {what}: {source}{}", advice(source.errno()))]
    Kernel {
        /// What was being done.
        what: String,
        /// The call and its error.
        source: kernel::Error,
    },
}

impl Error {
    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(kernel::Error) -> Self {
        let what = what.into();
        move |source| Error::Kernel { what, source }
    }

    pub(crate) fn open(what: &str, call: &'static str) -> impl Fn(Errno) -> Self {
        let what = what.to_owned();
        move |errno| Error::Open { what: what.clone(), call, errno }
    }

    pub(crate) fn last(what: &str, call: &'static str) -> Self {
        Error::Open { what: what.to_owned(), call, errno: Errno::last() }
    }
}

/// The result of restore operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
