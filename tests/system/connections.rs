//! TCP connections: to the outside by each policy, at their beginning, and under a dumper that dies.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use torpor_tests::{Outcome, PATIENCE, Victim, ensure, run_torpor, state, torpor_command};

const REFUSED: i32 = 5;

pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! all {
        ($($name:literal => $test:expr),* $(,)?) => { vec![$(Trial::test(concat!("tcp: ", $name), || Ok($test()?))),*] };
    }
    all![
        "a connection to the outside is refused by name" => refused,
        "a connection to the outside is restored as reset" => closed,
        "a connection to the outside goes on" => || kept(false, &[]),
        "a connection to the outside goes on after its peer has ended" => || kept(true, &[]),
        "what waits to be sent waits while the image is made" => || kept(false, &["paced"]),
        "a kept connection and a process that goes on exclude each other" => exclusive,
        "a connection that is being made is made again" => sought,
        "data that nobody can read is refused" => unread,
        "data that nobody can read yet is waited for" => slow,
        "an outside client waiting to be accepted is refused, or dropped" => shy,
        "both ends in different processes" => apart,
        "a thousand connections" => many,
        "what was on its way arrives at once" => at_once,
        "a dumper that is killed leaves connections as they were" => torture_inside,
        "a dumper that is killed leaves connections to the outside as they were" => || torture_outside(&[]),
        "a dumper that is killed leaves all of a tree with such a connection, or none" => || torture_outside(&["family"]),
    ]
}

fn text<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
}

fn listener() -> Outcome<(TcpListener, String)> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let port = listener.local_addr().map_err(text)?.port().to_string();
    Ok((listener, port))
}

fn refused() -> Outcome {
    let (listener, port) = listener()?;
    let mut victim = Victim::start("outside", &["reset", &port])?;
    let image = victim.image();
    let said = run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?;
    let said = said.expect(REFUSED)?;
    for word in [port.as_str(), "--tcp close", "fd 4"] {
        ensure!(said.contains(word), "it does not say {word}: {said}");
    }
    ensure!(!image.exists(), "it left an image");
    drop(listener);
    victim.ticks(2)
}

fn log_has(victim: &Victim, word: &str) -> bool {
    fs::read_to_string(victim.log()).is_ok_and(|log| log.lines().any(|l| l == word))
}

fn wait_for(victim: &Victim, word: &str) -> Outcome {
    for _ in 0..100 {
        if log_has(victim, word) {
            return Ok(());
        }
        victim.ticks(1)?;
    }
    Err(format!("the victim never says {word:?}"))
}

fn closed() -> Outcome {
    let (listener, port) = listener()?;
    let mut victim = Victim::start("outside", &["reset", &port])?;
    let (mut peer, _) = listener.accept().map_err(text)?;
    // With something in its queue, which the program may still read.
    let stopped = victim.dump_with(&["--leave-stopped", "--tcp", "close"])?;
    peer.write_all(b"last words").map_err(text)?;
    drop(stopped);
    let image = victim.image();
    let pid = victim.pid.to_string();
    let said = run_torpor(&["dump", "--tcp", "close", &pid, image.to_str().ok_or("a path")?])?.expect(0)?;
    ensure!(said.contains(&port), "it does not name the connection: {said}");
    victim.reap()?;
    let mut end = [0; 8];
    let _ended = peer.read(&mut end);
    victim.restore_with(&[], &image)?;
    // It was stopped when it was dumped.
    // SAFETY: kill takes numbers; the process is a child of ours.
    unsafe { libc::kill(victim.pid, libc::SIGCONT) };
    wait_for(&victim, "got 10")?;
    wait_for(&victim, &format!("error {}", libc::ECONNRESET))?;
    wait_for(&victim, "got 0")
}

fn byte(n: u64) -> u8 {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Sends without end, and checks that all of it comes back in order.
fn stream(peer: TcpStream, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<Outcome<u64>> {
    std::thread::spawn(move || {
        // One that says nothing any more is an error, too.
        peer.set_read_timeout(Some(PATIENCE)).map_err(text)?;
        peer.set_write_timeout(Some(PATIENCE)).map_err(text)?;
        let mut writer = peer.try_clone().map_err(text)?;
        let stopping = stop.clone();
        let sender = std::thread::spawn(move || -> Outcome<u64> {
            let mut n = 0u64;
            while !stopping.load(Ordering::Relaxed) {
                let part: Vec<u8> = (n..n + 10_000).map(byte).collect();
                writer.write_all(&part).map_err(|e| format!("send: {e}"))?;
                n += part.len() as u64;
                std::thread::sleep(Duration::from_micros(300));
            }
            writer.shutdown(std::net::Shutdown::Write).map_err(text)?;
            Ok(n)
        });
        let mut reader = peer;
        let (mut n, mut buffer) = (0u64, vec![0u8; 65536]);
        loop {
            let got = reader.read(&mut buffer).map_err(|e| format!("receive: {e}"))?;
            if got == 0 {
                break;
            }
            for b in &buffer[..got] {
                if *b != byte(n) {
                    return Err(format!("byte {n} is wrong"));
                }
                n += 1;
            }
        }
        let sent = sender.join().map_err(|_| "the sender panicked")??;
        if n == sent { Ok(n) } else { Err(format!("{n} of {sent} bytes came back")) }
    })
}

fn kept(idle: bool, more: &[&str]) -> Outcome {
    let (listener, port) = listener()?;
    let mut victim = Victim::start("outside", &[&["echo", port.as_str()], more].concat())?;
    let (peer, _) = listener.accept().map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let talk = stream(peer, stop.clone());
    for round in 0..2 {
        let image = victim.dump_with(&["--tcp", "keep"])?;
        victim.reap()?;
        if idle && round == 1 {
            // It ends while there is nobody to hear of it.
            stop.store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(300));
        }
        victim.restore(&image)?;
        victim.ticks(5)?;
    }
    stop.store(true, Ordering::Relaxed);
    let bytes = talk.join().map_err(|_| "the stream panicked")??;
    ensure!(bytes > 0, "nothing was sent");
    wait_for(&victim, "end")
}

fn exclusive() -> Outcome {
    let said = run_torpor(&["dump", "--tcp", "keep", "--leave-running", "1", "/nonexistent/x"])?.expect(2)?;
    ensure!(said.contains("--tcp keep"), "it does not say why: {said}");
    Ok(())
}

fn sought() -> Outcome {
    // A listening socket whose queue is full does not answer.
    let (listener, port) = listener()?;
    // SAFETY: listen takes numbers only.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    let _fills_it = TcpStream::connect(listener.local_addr().map_err(text)?).map_err(text)?;
    let mut victim = Victim::start("outside", &["seek", &port])?;
    let image = victim.dump()?;
    victim.restore(&image)?;
    victim.ticks(5)?;
    ensure!(!log_has(&victim, "connected"), "it is connected to a full queue");
    drop(listener.accept().map_err(text)?);
    let mut hello = [0; 5];
    listener.accept().map_err(text)?.0.read_exact(&mut hello).map_err(text)?;
    ensure!(&hello == b"hello", "it said {hello:?}");
    wait_for(&victim, "connected")
}

fn unread() -> Outcome {
    let mut victim = Victim::start("outside", &["unread"])?;
    let image = victim.image();
    let said = run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?;
    let said = said.expect(REFUSED)?;
    ensure!(said.contains("6 bytes") && said.contains("accepted"), "it says: {said}");
    victim.ticks(2)
}

fn slow() -> Outcome {
    let mut victim = Victim::start("outside", &["slow"])?;
    // Of dumps that do not wait every fourth is refused. Where the victim gets no processor for a while, its connection
    // looks like any that nobody accepts.
    let mut refused = 0;
    for _ in 0..30 {
        let image = victim.image();
        let pid = victim.pid.to_string();
        let said = run_torpor(&["dump", "--leave-running", &pid, image.to_str().ok_or("a path")?])?;
        let again = said.code() == REFUSED && refused == 0;
        refused += u32::from(again);
        said.expect(if again { REFUSED } else { 0 })?;
        victim.ticks(1)?;
    }
    victim.cycles(5)
}

fn shy() -> Outcome {
    let mut victim = Victim::start("outside", &["shy"])?;
    let log = fs::read_to_string(victim.log()).map_err(text)?;
    let port: u16 = log.lines().find_map(|l| l.strip_prefix("port ")?.parse().ok()).ok_or("no port")?;
    let client = TcpStream::connect(("127.0.0.1", port)).map_err(text)?;
    let own = client.local_addr().map_err(text)?.port().to_string();
    let image = victim.image();
    let said = run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?;
    let said = said.expect(REFUSED)?;
    ensure!(said.contains(&own) && said.contains("outside"), "it says: {said}");
    let image = victim.dump_with(&["--tcp", "close"])?;
    victim.reap()?;
    victim.restore(&image)?;
    victim.ticks(2)
}

fn apart() -> Outcome {
    let mut victim = Victim::start("outside", &["apart"])?;
    for _ in 0..3 {
        victim.dump_with(&["--leave-running"])?;
        victim.ticks(1)?;
    }
    victim.cycles(5)
}

fn many() -> Outcome {
    let mut victim = Victim::start("outside", &["many", "1000"])?;
    let image = victim.dump_with(&["--leave-running"])?;
    let shown = run_torpor(&["show", "--json", image.to_str().ok_or("a path")?])?.expect(0)?;
    let shown: serde_json::Value = serde_json::from_str(&shown).map_err(text)?;
    let frozen = shown["manifest"]["times"]["frozen"].as_u64().unwrap_or(0);
    eprintln!("a thousand connections: frozen for {} ms", frozen / 1_000_000);
    victim.cycles(2)
}

fn at_once() -> Outcome {
    let mut victim = Victim::start("connections", &[])?;
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let image = victim.dump()?;
        let before = victim.count()?;
        victim.restore(&image)?;
        let begin = Instant::now();
        victim.ticks_from(before, 1)?;
        best = best.min(begin.elapsed());
    }
    ensure!(best < Duration::from_millis(50), "what was on its way took {} ms", best.as_millis());
    Ok(())
}

fn torture_inside() -> Outcome {
    let mut victim = Victim::start("connections", &[])?;
    torture(&mut victim, &["--leave-running"], 60)
}

fn torture_outside(more: &[&str]) -> Outcome {
    let (listener, port) = listener()?;
    let args: Vec<&str> = [&["echo", port.as_str()], more].concat();
    let mut victim = Victim::start("outside", &args)?;
    let (peer, _) = listener.accept().map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let own = peer.try_clone().map_err(text)?;
    let talk = stream(peer, stop.clone());
    let result = torture(&mut victim, &["--tcp", "keep"], 100).and_then(|()| ends(&mut victim));
    stop.store(true, Ordering::Relaxed);
    if result.is_err() {
        // Nobody is there any more to end it.
        let _may_be_gone = own.shutdown(std::net::Shutdown::Both);
    }
    let talk = talk.join().map_err(|_| "the stream panicked")?;
    let log = fs::read_to_string(victim.log()).unwrap_or_default();
    let unfit = log.lines().filter(|l| l.starts_with("repair")).count();
    eprintln!("the victim met its socket in repair mode {unfit} times");
    result?;
    talk.map(drop)
}

/// Kills dumpers about when they end the process: at random moments after the image has its name.
fn ends(victim: &mut Victim) -> Outcome {
    let pid = victim.pid.to_string();
    let mut ended = 0;
    for n in 0..100u64 {
        let image = victim.image();
        let mut dumper = torpor_command(&["dump", "--tcp", "keep", &pid, image.to_str().ok_or("a path")?])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(text)?;
        let begin = Instant::now();
        while !image.join("manifest.tpr").exists() && begin.elapsed() < Duration::from_secs(5) {
            std::hint::spin_loop();
        }
        let moment = Instant::now() + Duration::from_micros(n * 7919 % 400);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        dumper.kill().map_err(text)?;
        dumper.wait().map_err(text)?;
        ended += u32::from(settle(victim, &image).map_err(|e| format!("at end {n}: {e}"))?);
    }
    eprintln!("{ended} of 100 dumps ended the process");
    ensure!(ended > 0, "no dump was late enough");
    Ok(())
}

/// After a killed dump: the process goes on, or is restored from a complete image. Says which.
fn settle(victim: &mut Victim, image: &Path) -> Outcome<bool> {
    // One that is to end needs a turn for it.
    let (before, deadline) = (victim.count()?, Instant::now() + Duration::from_secs(60));
    let gone = loop {
        if matches!(state(victim.pid), None | Some('Z')) {
            break true;
        }
        if victim.count()? >= before + 2 {
            break false;
        }
        ensure!(Instant::now() < deadline, "it neither goes on nor ends");
        std::thread::sleep(Duration::from_millis(2));
    };
    if gone {
        victim.count()?;
        ensure!(image.join("manifest.tpr").exists(), "the process was ended without an image");
        victim.reap_all(image)?;
        victim.restore_with(&["--accept-changed"], image)?;
    }
    victim.ticks(1)?;
    Ok(gone)
}

/// Kills dumpers at random moments. One that was quicker has ended the process, which is restored then.
fn torture(victim: &mut Victim, options: &[&str], rounds: u64) -> Outcome {
    let pid = victim.pid.to_string();
    for n in 0..rounds {
        let image = victim.image();
        let mut args = vec!["dump"];
        args.extend(options);
        args.extend([pid.as_str(), image.to_str().ok_or("a path")?]);
        let mut dumper = torpor_command(&args)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(text)?;
        std::thread::sleep(Duration::from_micros(1000 + n * 7919 % 16_000));
        dumper.kill().map_err(text)?;
        dumper.wait().map_err(text)?;
        settle(victim, &image).map_err(|e| format!("after dump {n}: {e}"))?;
    }
    victim.ticks(15)
}
