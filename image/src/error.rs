//! What can be wrong with an image or with writing one.

use std::io;
use std::path::PathBuf;

/// Reading or writing an image failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {operation} `{}`: {source}{}", path.display(), advice(operation, source))]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no image in the directory.
    #[error("`{}` holds no image: it has no manifest.tpr; name the directory a dump was written to", path.display())]
    NoImage {
        /// The directory.
        path: PathBuf,
    },
    /// The directory of a new dump holds an image already.
    #[error("`{}` already holds an image; name another directory, or remove that image first", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// The directory of a new dump has files that only an image has.
    #[error(
        "`{}` has `{name}` in it, as of an image that has lost its manifest; name another directory, or remove it",
        path.display()
    )]
    Remains {
        /// The directory.
        path: PathBuf,
        /// One of them.
        name: String,
    },
    /// Another dump goes into the same directory at this moment.
    #[error("another dump is being written to `{}`; name another directory", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A file is not what it must be.
    #[error(
        "`{file}` is damaged: {what}; take the image from its source again (`torpor verify` checks all of it)"
    )]
    Damaged {
        /// Name inside the image.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// An image that this one builds on is missing or altered.
    #[error(
        "the image in `{}` builds on the one in `{}`, which it cannot use: {why}; put that image back where it was",
        image.display(), path.display()
    )]
    Parent {
        /// The image.
        image: PathBuf,
        /// The other.
        path: PathBuf,
        /// What is wrong with that.
        why: String,
    },
    /// An encrypted image would be written in clear.
    #[error("the image in `{}` is encrypted; say for whom the new one shall be (--encrypt, --encrypt-to)", path.display())]
    NoRecipients {
        /// The image.
        path: PathBuf,
    },
    /// Nothing can build on this image.
    #[error("the image in `{}` cannot be a parent: {why}; dump without --parent", path.display())]
    NoParent {
        /// The image.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The image is of a format this program cannot read.
    #[error(
        "the image is of format {major}.{minor}, this torpor reads up to {}.x; use a newer torpor",
        crate::header::MAJOR
    )]
    TooNew {
        /// Format of the image.
        major: u16,
        /// Its minor part.
        minor: u16,
    },
    /// The image was taken on another kind of machine.
    #[error("the image was taken on {image}, this is {here}; restore it on a machine of its kind")]
    OtherMachine {
        /// Machine of the image.
        image: String,
        /// This machine.
        here: &'static str,
    },
    /// The image is encrypted, and no identity was given.
    #[error("`{file}` is encrypted; give the key it was encrypted for: --identity FILE")]
    Encrypted {
        /// Name inside the image.
        file: String,
    },
    /// No identity that was given fits.
    #[error("`{file}` is encrypted for another key than those given with --identity; give the one that fits")]
    OtherKey {
        /// Name inside the image.
        file: String,
    },
    /// A key cannot be taken.
    #[error("{what}")]
    Key {
        /// Which, and why.
        what: String,
    },
    /// A body could not be encoded.
    #[error("cannot encode {what}: {why}")]
    Encode {
        /// The body.
        what: &'static str,
        /// The encoder's word.
        why: String,
    },
}

impl Error {
    pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Error::File { operation, path, source }
    }

    pub(crate) fn damaged(file: &str, what: impl Into<String>) -> Self {
        Error::Damaged { file: file.to_owned(), what: what.into() }
    }
}

/// What can be done about a failed file operation, where its error tells the cause: to follow the message.
fn advice(operation: &str, error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    const EMFILE: i32 = 24;
    let reading = matches!(operation, "find" | "open" | "stat" | "read");
    match error.kind() {
        Kind::NotFound if reading => "; take the image from its source again",
        Kind::NotFound => "; make the directories above it first",
        Kind::NotADirectory if reading => "; name the directory a dump was written to",
        Kind::NotADirectory => "; name a directory",
        Kind::IsADirectory if reading => "; take the image from its source again",
        Kind::PermissionDenied if reading => "; run torpor as a user who may read it",
        Kind::PermissionDenied => "; name a directory that this user may write to",
        Kind::StorageFull | Kind::QuotaExceeded => "; make room there, or name a directory elsewhere",
        Kind::ReadOnlyFilesystem => "; name a directory on a file system that is mounted for writing",
        Kind::FileTooLarge => "; raise the limit of file sizes (`ulimit -f`)",
        _ if error.raw_os_error() == Some(EMFILE) => "; raise the limit of open files (`ulimit -n`)",
        _ => "",
    }
}

/// The result of image operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
