//! IPC objects of an image, which belong to no process of it in particular.

use std::fmt::Write as _;

use torpor_image::Image;

use super::process::stored;
use crate::output::{self, Table};

/// Objects that have no descriptor.
pub(super) fn write(out: &mut String, image: &Image) -> Result<(), std::fmt::Error> {
    let objects = &image.objects;
    let mut table = Table::new(&["KIND", "ID", "KEY", "MODE", "WHAT"], &[1]);
    let mut row = |kind: &str, id: i32, p: &torpor_image::sysv::Permissions, what: String| {
        let key = if p.key == 0 { "private".to_owned() } else { format!("{:#x}", p.key) };
        table.row([kind.into(), id.to_string(), key, format!("{:03o}", p.mode), what]);
    };
    for inode in &objects.inodes {
        let (Some(segment), Some(content)) = (inode.segment(), inode.content()) else { continue };
        let data = stored(image.records(content), 0, u64::MAX);
        let mut what = format!("{}, {} in the image", output::bytes(inode.size), output::bytes(data));
        what.push_str(if segment.removed { ", marked to be removed" } else { "" });
        what.push_str(if segment.locked { ", locked" } else { "" });
        row("shared memory", segment.id, &segment.permissions, what);
    }
    for set in &objects.sysv_sem {
        let values: Vec<String> = set.semaphores.iter().take(8).map(|s| s.value.to_string()).collect();
        let mut what = values.join(", ");
        if set.semaphores.len() > values.len() {
            what.push_str(&format!(", and {} more", set.semaphores.len() - values.len()));
        }
        if !set.adjustments.is_empty() {
            what.push_str(&format!(
                "; {}",
                output::count(set.adjustments.len(), "adjustment", "adjustments")
            ));
        }
        row("semaphores", set.id, &set.permissions, what);
    }
    for queue in &objects.sysv_msg {
        let what = output::count(queue.messages.len(), "message", "messages");
        row("message queue", queue.id, &queue.permissions, what);
    }
    if !table.is_empty() {
        writeln!(out, "\nSystem V IPC\n{table}")?;
    }
    Ok(())
}
