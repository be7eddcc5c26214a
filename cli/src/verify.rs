//! `torpor verify`: is the image what the dump has written?

use serde::Serialize;
use torpor_image::manifest::Manifest;

use crate::args::VerifyArgs;
use crate::exit::Exit;
use crate::progress::Progress;
use crate::{encoding, output};

#[derive(Serialize)]
struct Report {
    ok: bool,
    files: usize,
    bytes: u64,
}

pub(crate) fn run(args: &VerifyArgs) -> anyhow::Result<Exit> {
    // Opening it checks everything but the data files.
    let opened = encoding::open(&args.dir, &args.reading)?;
    let image = &opened.image;
    let total = size(&image.manifest);
    let progress = Progress::new("verifying", image.data_bytes());
    image.verify(|bytes| progress.add(bytes))?;
    drop(progress);
    // The manifest does not list itself.
    let report = Report { ok: true, files: image.manifest.files.len() + 1, bytes: total };
    if args.json {
        output::json(&report)?;
    } else {
        let (files, bytes) = (output::count(report.files, "file", "files"), output::bytes(report.bytes));
        output::print(&format!("ok: {files}, {bytes}: every checksum and every reference is right\n"))?;
    }
    Ok(Exit::Ok)
}

/// Bytes in the files of an image, but for the manifest's own.
pub(crate) fn size(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
}
