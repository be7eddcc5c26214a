//! `torpor squash`: an image that needs no other one.

use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::Serialize;
use torpor_image::{Identities, Image};

use crate::args::SquashArgs;
use crate::exit::Exit;
use crate::{encoding, output, verify};

#[derive(Serialize)]
struct Report {
    dir: PathBuf,
    bytes: u64,
    /// Images that it needed before.
    ancestors: usize,
}

pub(crate) fn run(args: &SquashArgs) -> anyhow::Result<Exit> {
    let image = Image::open_with(&args.dir, &Identities::read(&args.encoding.identity)?)?;
    let encoding = encoding::of(&args.encoding)?;
    let ancestors = image.manifest.ancestors.len();
    let (dir, manifest) = match &args.to {
        Some(to) => (to.clone(), torpor_image::squash::squash(&image, to, args.fsync, encoding)?),
        None if ancestors == 0 => (args.dir.clone(), image.manifest.clone()),
        None => {
            let beside = beside(&args.dir)?;
            let manifest = torpor_image::squash::squash(&image, &beside, args.fsync, encoding)?;
            exchange(&beside, &args.dir)?;
            (args.dir.clone(), manifest)
        }
    };
    let report = Report { bytes: verify::size(&manifest), ancestors, dir };
    if args.json {
        output::json(&report)?;
    } else {
        let (bytes, dir) = (output::bytes(report.bytes), report.dir.display());
        let before = output::count(ancestors, "other image", "other images");
        output::print(&format!("squashed {dir}: {bytes}, needed {before} before\n"))?;
    }
    Ok(Exit::Ok)
}

/// A directory for the new image, on the same file system.
fn beside(dir: &Path) -> anyhow::Result<PathBuf> {
    let real = dir.canonicalize().with_context(|| format!("cannot find `{}`", dir.display()))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(real.file_name().unwrap_or_default());
    name.push(format!(".torpor-squash-{}", std::process::id()));
    Ok(real.with_file_name(name))
}

/// Puts the new image in the place of the old one, in one step, and removes that.
fn exchange(new: &Path, old: &Path) -> anyhow::Result<()> {
    let remove = || std::fs::remove_dir_all(new);
    if let Err(e) = renameat2(AT_FDCWD, new, AT_FDCWD, old, RenameFlags::RENAME_EXCHANGE) {
        let _best_effort = remove();
        let why = "cannot put the new image in the place of the old one: name a directory for it";
        return Err(std::io::Error::from(e)).context(why);
    }
    remove().with_context(|| format!("the image is squashed, but the old one is left in `{}`", new.display()))
}
