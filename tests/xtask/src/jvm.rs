//! A Java virtual machine whose heap of 4 GiB is full.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::report::{DUMPS, Table, dump, mib, restore, track};
use crate::room;
use crate::sample::{Tool, alone, empty, end, warm};

const PROGRAM: &str = "\
public class Heap {
    public static void main(String[] words) throws Exception {
        java.util.ArrayList<long[]> all = new java.util.ArrayList<>();
        java.util.Random random = new java.util.Random(1);
        for (int i = 0; i < 3400; i++) {
            long[] piece = new long[(1 << 17) - 8];
            for (int j = 0; j < piece.length; j++) piece[j] = (long) i * j + 1;
            all.add(piece);
        }
        java.nio.file.Files.createFile(java.nio.file.Path.of(words[0]));
        for (long n = 0; ; n++) {
            long[] piece = all.get(random.nextInt(all.size()));
            piece[random.nextInt(piece.length)] = n;
            if (n % 10 == 0) Thread.sleep(1);
        }
    }
}
";

pub(crate) fn report(tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    room::need(10 << 30, 6 << 30, dir)?;
    let source = dir.join("Heap.java");
    fs::write(&source, PROGRAM)?;
    let compiled = Command::new("javac").arg("-d").arg(dir).arg(&source).status();
    ensure!(compiled.is_ok_and(|status| status.success()), "skipped: there is no javac here");
    warm(5 << 30);
    let ready = dir.join("ready");
    let _none = fs::remove_file(&ready);
    let mut command = Command::new("java");
    command.args(["-Xms4g", "-Xmx4g", "-cp"]).arg(dir).arg("Heap").arg(&ready);
    let mut java = alone(&mut command).spawn().context("skipped: there is no java here")?;
    let pid = java.id() as i32;
    let mut all = || {
        let deadline = Instant::now() + Duration::from_secs(180);
        while !ready.exists() {
            ensure!(java.try_wait()?.is_none(), "java has ended");
            ensure!(Instant::now() < deadline, "its heap is not full after three minutes");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut table = Table::new("JVM, 4 GiB of heap", &DUMPS);
        dump(&mut table, "left running, copy", pid, &["--leave-running", "--freeze", "copy"], tool, dir)?;
        dump(&mut table, "left running, fork", pid, &["--leave-running", "--freeze", "fork"], tool, dir)?;
        track(&mut table, pid, tool, dir)?;
        let image = empty(dir, "image")?;
        let dumped = tool.dump(pid, &image, &[])?;
        java.wait()?;
        table.row("ended", vec![dumped.freezing + dumped.frozen, dumped.wall, mib(&image), f64::NAN]);
        restore(&mut table, &image, tool)?;
        anyhow::Ok(table)
    };
    let result = all();
    end(java);
    result
}
