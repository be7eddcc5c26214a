//! Making an image that needs no other one out of one that builds on others.

use std::path::Path;

use crate::encode::Encoding;
use crate::manifest::Manifest;
use crate::read::Image;
use crate::write::ImageWriter;
use crate::{Error, Result};

/// Writes what is in `image` to `to`, with the data files of its ancestors; they are not copied where a file can have two
/// names. It keeps its identity, so that images which build on it may build on the new one. With `encoding` the
/// metadata of an encrypted image is encrypted again; data files stay as they are.
pub fn squash(image: &Image, to: &Path, fsync: bool, encoding: Encoding) -> Result<Manifest> {
    if image.is_encrypted() && encoding.recipients.is_none() {
        return Err(Error::NoRecipients { path: image.dir.clone() });
    }
    let mut writer = ImageWriter::create(to, fsync)?.encode(encoding);
    writer.link(image);
    writer.add_records(image.all_records());
    for task in &image.tasks {
        writer.add_task(task)?;
    }
    writer.add_objects(&image.objects)?;
    let manifest =
        Manifest { files: Vec::new(), ancestors: Vec::new(), borrowed: Vec::new(), ..image.manifest.clone() };
    writer.finish(manifest)
}
