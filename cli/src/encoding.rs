//! How images are written and read: compressed, encrypted, to standard output and from standard input.

use std::path::Path;

use nix::sys::signal::Signal;
use torpor_image::{Compression, Encoding, Identities, Image, Recipients};

use crate::args::{Compress, EncodingArgs, ReadingArgs};
use crate::held::Held;
use crate::stream::{self, Spool};

/// What the options of a dump say.
pub(crate) fn of(args: &EncodingArgs) -> torpor_image::Result<Encoding> {
    let mut recipients = args.encrypt.clone();
    for path in &args.encrypt_to {
        recipients.extend(Recipients::read(path)?);
    }
    let compression = args.compress.map(|how| match how {
        Compress::Lz4 => Compression::Lz4,
        Compress::Zstd => Compression::Zstd,
    });
    let recipients = if recipients.is_empty() { None } else { Some(Recipients::parse(&recipients)?) };
    Ok(Encoding { compression, recipients })
}

/// An image that a command reads.
pub(crate) struct Opened {
    pub(crate) image: Image,
    /// Where it lies if it came from a stream; removed on drop.
    pub(crate) spool: Option<Spool>,
    /// From before the spool was made until after it is removed.
    pub(crate) held: Option<Held>,
}

/// Opens an image as the options of a command say; `-` is standard input.
pub(crate) fn open(dir: &Path, args: &ReadingArgs) -> anyhow::Result<Opened> {
    let identities = Identities::read(&args.identity)?;
    if dir != Path::new("-") {
        return Ok(Opened { image: Image::open_with(dir, &identities)?, spool: None, held: None });
    }
    // Ctrl-\ is left for what does not want to end.
    let held = Some(Held::begin(&[Signal::SIGQUIT]));
    let spool = stream::receive(args.spool.as_deref())?;
    let image = Image::open_with(spool.path(), &identities)?;
    Ok(Opened { image, spool: Some(spool), held })
}
