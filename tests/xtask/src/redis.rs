//! Redis under redis-benchmark, while it is dumped, and while it saves itself.
//!
//! A client of ours asks once in each millisecond, one question after the other: the longest time between two answers is the
//! stall that a program sees. How much was served is redis's own count.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::command::ms;
use crate::report::Table;
use crate::room;
use crate::sample::{Tool, alone, empty, end, warm};

/// Keys and the size of each value: about 1 GiB.
const KEYS: usize = 800_000;
const SIZE: usize = 1024;
/// How long is looked at what goes on without a dump.
const CALM: Duration = Duration::from_secs(4);

pub(crate) fn report(tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    room::need(5 << 30, 4 << 30, dir)?;
    warm(3 << 30);
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = Command::new("redis-server");
    command
        .args(["--port", &port.to_string(), "--save", "", "--enable-debug-command", "yes", "--dir"])
        .arg(dir);
    let server = alone(&mut command).spawn().context("skipped: there is no redis-server here")?;
    let result = loaded(port, &server, tool, dir);
    end(server);
    result
}

fn loaded(port: u16, server: &Child, tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    let mut client = Client::connect(port)?;
    client.ask(&["DEBUG", "POPULATE", &KEYS.to_string(), "key", &SIZE.to_string()])?;
    let mut command = Command::new("redis-benchmark");
    let keys = KEYS.to_string();
    command.args(["-p", &port.to_string(), "-c", "16", "-t", "set", "-d", "1024", "-r", &keys]);
    command.args(["-n", "2000000000", "-q"]);
    let load = alone(&mut command).spawn().context("skipped: there is no redis-benchmark here")?;
    std::thread::sleep(Duration::from_secs(1));
    let result = under_load(port, server.id() as i32, &mut client, tool, dir);
    end(load);
    result
}

fn under_load(port: u16, pid: i32, client: &mut Client, tool: &Tool, dir: &Path) -> anyhow::Result<Table> {
    let columns = ["took, ms", "frozen, ms", "longest stall, ms", "served/s", "of what is served else"];
    let mut table = Table::new("redis, 1 GiB, under load", &columns);
    let calm = watched(port, client, |_| {
        std::thread::sleep(CALM);
        Ok(f64::NAN)
    })?;
    let usual = calm.rate;
    let mut row = |name: &str, seen: &Seen| {
        table.row(name, vec![seen.took, seen.frozen, seen.stall, seen.rate, seen.rate / usual]);
    };
    row("nothing", &calm);
    let chain = empty(dir, "chain")?;
    let (first, second) = (chain.join("1"), chain.join("2"));
    let saved = watched(port, client, |client| {
        client.ask(&["BGSAVE"])?;
        while client.ask(&["INFO", "persistence"])?.contains("rdb_bgsave_in_progress:1") {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(f64::NAN)
    })?;
    row("its own BGSAVE", &saved);
    let parent = first.to_str().context("a path")?.to_owned();
    // Connections lead to the load, which is not dumped.
    let ways: [(&str, &Path, Vec<&str>); 4] = [
        ("copy", &dir.join("image"), vec!["--leave-running", "--freeze", "copy", "--tcp", "close"]),
        ("fork", &dir.join("image"), vec!["--leave-running", "--freeze", "fork", "--tcp", "close"]),
        ("track, the first", &first, vec!["--track", "--tcp", "close"]),
        ("track, the next", &second, vec!["--track", "--parent", &parent, "--tcp", "close"]),
    ];
    for (name, image, options) in ways {
        std::thread::sleep(Duration::from_secs(1));
        let _none = std::fs::remove_dir_all(dir.join("image"));
        let seen = watched(port, client, |_| {
            let dumped = tool.dump(pid, image, &options)?;
            Ok(dumped.freezing + dumped.frozen)
        })?;
        row(name, &seen);
    }
    Ok(table)
}

/// What was seen from outside while something was done.
struct Seen {
    took: f64,
    frozen: f64,
    stall: f64,
    rate: f64,
}

/// Does something, and watches.
fn watched(
    port: u16,
    client: &mut Client,
    work: impl FnOnce(&mut Client) -> anyhow::Result<f64>,
) -> anyhow::Result<Seen> {
    let mut other = Client::connect(port)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let begin = Instant::now();
                other.ask(&["SET", "torpor", "1"])?;
                longest = longest.max(begin.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            anyhow::Ok(longest)
        });
        let before = client.served()?;
        let begin = Instant::now();
        let result = work(client);
        let took = begin.elapsed();
        let served = client.served()? - before;
        done.store(true, Ordering::Relaxed);
        let Ok(longest) = watcher.join() else { bail!("the watcher has panicked") };
        let (frozen, longest) = (result?, longest?);
        Ok(Seen { took: ms(took), frozen, stall: ms(longest), rate: served as f64 / took.as_secs_f64() })
    })
}

/// A connection, in redis's own protocol (RESP).
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u16) -> anyhow::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
                    return Ok(Self(BufReader::new(stream)));
                }
                Err(e) if Instant::now() > deadline => bail!("redis-server does not answer: {e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The text of an answer that is not a list.
    fn ask(&mut self, words: &[&str]) -> anyhow::Result<String> {
        let mut question = format!("*{}\r\n", words.len());
        for word in words {
            question += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.0.get_mut().write_all(question.as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(!line.starts_with('-') && !line.is_empty(), "redis says {line:?}");
        let Some(length) = line.strip_prefix('$') else { return Ok(line) };
        let mut text = vec![0; length.trim().parse::<usize>()? + 2];
        self.0.read_exact(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Commands that were served since redis was started.
    fn served(&mut self) -> anyhow::Result<u64> {
        let text = self.ask(&["INFO", "stats"])?;
        let line = text.lines().find_map(|l| l.strip_prefix("total_commands_processed:"));
        line.and_then(|l| l.trim().parse().ok()).context("total_commands_processed")
    }
}
