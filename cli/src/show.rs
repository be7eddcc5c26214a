//! `torpor show`: what is in an image.

mod ipc;
mod objects;
mod process;
mod tree;

use std::fmt::Write as _;

use serde::ser::{Serialize, SerializeStruct, Serializer};
use torpor_image::Image;
use torpor_image::extent::{Record, Where};

use crate::args::ShowArgs;
use crate::exit::Exit;
use crate::output::{self, Table};
use crate::{encoding, verify};

pub(crate) fn run(args: &ShowArgs) -> anyhow::Result<Exit> {
    let opened = encoding::open(&args.dir, &args.reading)?;
    let image = &opened.image;
    if args.json {
        output::json_pretty(&Everything(image))?;
    } else {
        output::print(&text(image)?)?;
    }
    Ok(Exit::Ok)
}

/// The image for people.
fn text(image: &Image) -> Result<String, std::fmt::Error> {
    let mut out = head(image)?;
    if image.tasks.len() > 1 || !image.manifest.zombies.is_empty() {
        out.push_str("\ntree\n");
        out.push_str(&tree::table(image));
    }
    for task in &image.tasks {
        out.push('\n');
        process::write(&mut out, image, task)?;
    }
    ipc::write(&mut out, image)?;
    out.push_str("\nfiles of the image\n");
    out.push_str(&files(image));
    Ok(out)
}

/// What a newcomer should see of an image: where it is from, what it cost, how large it is.
pub(crate) fn head(image: &Image) -> Result<String, std::fmt::Error> {
    let manifest = &image.manifest;
    let (host, times) = (&manifest.host, &manifest.times);
    let mut out = String::new();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<13}{}", output::name(&value));
    line("image", image.dir.display().to_string())?;
    line("taken", output::instant(manifest.taken_at))?;
    // An image of another machine would not have been opened.
    line("on", format!("{}, Linux {} ({})", host.name, host.kernel, std::env::consts::ARCH))?;
    line("by", format!("torpor {}", manifest.torpor))?;
    let files = output::count(manifest.files.len() + 1, "file", "files");
    line("size", format!("{} in {files}", output::bytes(verify::size(manifest))))?;
    line("memory", memory(image.all_records()))?;
    line(
        "frozen for",
        format!(
            "{} ({} of it for memory), after {} to stop it",
            output::nanoseconds(times.frozen),
            output::nanoseconds(times.memory),
            output::nanoseconds(times.freezing),
        ),
    )?;
    let fallback = manifest.fallback.as_ref().map_or_else(String::new, |why| format!("; {why}"));
    let by = manifest.followed.as_ref().map_or_else(String::new, |by| format!(" by {}", output::name(by)));
    line("freeze", format!("{}{by}{fallback}", manifest.freeze))?;
    let afterwards = if manifest.ran_on {
        "the process was left alive: what it did since is not undone by a restore"
    } else {
        "the process was ended"
    };
    line("afterwards", afterwards.to_owned())?;
    for lost in &manifest.not_captured {
        line("not captured", lost.clone())?;
    }
    Ok(out)
}

fn memory(records: &[Record]) -> String {
    let sum =
        |place| records.iter().filter(|r| r.place == place).map(|r| r.length).fold(0, u64::saturating_add);
    let data = output::bytes(sum(Where::Data));
    match sum(Where::Zero) {
        0 => format!("{data} of content"),
        zero => format!("{data} of content, and {} of zeros that take no space", output::bytes(zero)),
    }
}

fn files(image: &Image) -> String {
    let mut table = Table::new(&["FILE", "SIZE", "CRC-32C", "WHAT"], &[1]);
    for file in &image.manifest.files {
        let what = match file.name.strip_suffix(".age").unwrap_or(&file.name) {
            "chunks.idx" => "where the chunks of pages lie",
            "objects.tpr" => "open files, pipes and sockets",
            "pages.idx" => "where the pages lie",
            name if name.starts_with("task-") => "the process: threads, memory map, descriptors",
            _ => "pages",
        };
        table.row([file.name.clone(), output::bytes(file.size), format!("{:08x}", file.crc32c), what.into()]);
    }
    table.to_string()
}

/// All that the files of the image say, for programs.
struct Everything<'a>(&'a Image);

impl Serialize for Everything<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all = serializer.serialize_struct("Image", 4)?;
        all.serialize_field("manifest", &self.0.manifest)?;
        all.serialize_field("tasks", &self.0.tasks)?;
        all.serialize_field("objects", &self.0.objects)?;
        all.serialize_field("extents", &Extents(self.0.all_records()))?;
        all.end()
    }
}

struct Extents<'a>(&'a [Record]);

impl Serialize for Extents<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Row {
            address: u64,
            length: u64,
            #[serde(rename = "where")]
            place: &'static str,
            file: Option<u32>,
            offset: Option<u64>,
        }
        serializer.collect_seq(self.0.iter().map(|r| {
            let data = r.place == Where::Data;
            Row {
                address: r.address,
                length: r.length,
                place: match r.place {
                    Where::Data => "data",
                    Where::Zero => "zero",
                    Where::Guard => "guard",
                },
                file: data.then_some(r.file),
                offset: data.then_some(r.offset),
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_as_json() {
        let record = |place| Record { address: 4096, length: 8192, place, file: 1, offset: 0 };
        let records = [record(Where::Data), record(Where::Zero)];
        assert_eq!(
            serde_json::to_string(&Extents(&records)).unwrap(),
            "[{\"address\":4096,\"length\":8192,\"where\":\"data\",\"file\":1,\"offset\":0},\
             {\"address\":4096,\"length\":8192,\"where\":\"zero\",\"file\":null,\"offset\":null}]"
        );
        assert_eq!(memory(&records), "8.0 KiB of content, and 8.0 KiB of zeros that take no space");
    }
}
