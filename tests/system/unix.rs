//! Unix sockets with peers that are not part of the dump, and what is refused of them.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::time::Duration;

use libtest_mimic::Trial;
use torpor_tests::{Holder, Outcome, Victim, ensure, run_torpor, torpor_command};

const REFUSED: i32 = 5;
const CONFLICT: i32 = 8;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("unix: peers outside are refused by name", || Ok(refused()?)),
        Trial::test("unix: peers outside are connected anew", || Ok(reconnected()?)),
        Trial::test("unix: peers outside are gone", || Ok(closed()?)),
        Trial::test("unix: each peer outside by its own policy", || Ok(mixed()?)),
        Trial::test("unix: datagrams from outside keep their sender", || Ok(senders()?)),
        Trial::test("unix: a connection is accepted before the freeze", || Ok(accepted()?)),
        Trial::test("unix: a connection with data that is never accepted", || Ok(never_accepted()?)),
        Trial::test("unix: a creator whose pid is taken is named", || Ok(creator()?)),
        Trial::test("unix: SO_PEERPIDFD tells of members", || Ok(peer_pidfd()?)),
        Trial::test("unix: peeking does not outlive torpor", || Ok(killed()?)),
    ]
}

/// The other side: a listener and a datagram socket in a directory of its own.
struct Outside {
    dir: tempfile::TempDir,
    listener: Option<UnixListener>,
    datagrams: Option<UnixDatagram>,
}

impl Outside {
    fn new() -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("torpor-out-").tempdir().map_err(|e| e.to_string())?;
        let mut outside = Outside { dir, listener: None, datagrams: None };
        outside.open()?;
        Ok(outside)
    }

    fn open(&mut self) -> Outcome {
        self.listener = Some(UnixListener::bind(self.stream()).map_err(|e| e.to_string())?);
        let datagrams = UnixDatagram::bind(self.log()).map_err(|e| e.to_string())?;
        datagrams.set_nonblocking(true).map_err(|e| e.to_string())?;
        self.datagrams = Some(datagrams);
        Ok(())
    }

    fn close(&mut self) {
        (self.listener, self.datagrams) = (None, None);
        for path in [self.stream(), self.log()] {
            let _gone = std::fs::remove_file(path);
        }
    }

    fn stream(&self) -> PathBuf {
        self.dir.path().join("stream")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn victim(&self) -> Outcome<Victim> {
        let (stream, log) = (self.stream(), self.log());
        Victim::start("unix_outside", &[stream.to_str().ok_or("a path")?, log.to_str().ok_or("a path")?])
    }

    /// Takes a connection and a byte from it.
    fn hears(&self) -> Outcome<std::os::unix::net::UnixStream> {
        let (mut stream, _) = self.listener.as_ref().ok_or("closed")?.accept().map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| e.to_string())?;
        let mut byte = [0];
        std::io::Read::read_exact(&mut stream, &mut byte).map_err(|e| format!("no byte: {e}"))?;
        Ok(stream)
    }

    /// Empties the datagram socket, and waits for one more.
    fn logged(&self) -> Outcome {
        let socket = self.datagrams.as_ref().ok_or("closed")?;
        let mut byte = [0; 8];
        while socket.recv(&mut byte).is_ok() {}
        for _ in 0..1000 {
            if socket.recv(&mut byte).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err("no datagram comes".into())
    }
}

fn log_of(victim: &Victim) -> String {
    std::fs::read_to_string(victim.log()).unwrap_or_default()
}

fn refused() -> Outcome {
    let outside = Outside::new()?;
    let mut victim = outside.victim()?;
    let stream = outside.hears()?;
    let image = victim.image();
    let text =
        run_torpor(&["dump", &victim.pid.to_string(), image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
    let me = format!("pid {}", std::process::id());
    let (path, log) = (outside.stream(), outside.log());
    for word in [
        "fd 4",
        "fd 5",
        &me,
        path.to_str().ok_or("a path")?,
        log.to_str().ok_or("a path")?,
        "--external-unix",
    ] {
        ensure!(text.contains(word), "it does not tell of {word}: {text}");
    }
    ensure!(!text.contains("fd 6"), "a socket that is not connected is refused: {text}");
    victim.ticks(3)?;
    drop(stream);
    Ok(())
}

fn reconnected() -> Outcome {
    let mut outside = Outside::new()?;
    let mut victim = outside.victim()?;
    let mut streams = vec![outside.hears()?];
    for _ in 0..2 {
        let image = victim.dump_with(&["--external-unix", "reconnect"])?;
        victim.reap()?;
        outside.close();
        let said = run_torpor(&["restore", "--detach", "--accept-changed", image.to_str().ok_or("a path")?])?;
        let text = said.expect(CONFLICT)?;
        ensure!(text.contains("/stream"), "it does not name the address: {text}");
        outside.open()?;
        victim.restore(&image)?;
        streams.push(outside.hears()?);
        outside.logged()?;
        victim.ticks(3)?;
        let log = log_of(&victim);
        ensure!(!log.contains("closed") && !log.contains("refused"), "{log}");
    }
    Ok(())
}

fn closed() -> Outcome {
    let outside = Outside::new()?;
    let mut victim = outside.victim()?;
    let _stream = outside.hears()?;
    let image = victim.dump_with(&["--external-unix", "closed"])?;
    victim.reap()?;
    victim.restore(&image)?;
    victim.ticks(5)?;
    let log = log_of(&victim);
    ensure!(log.contains("stream closed"), "the stream is open: {log}");
    ensure!(log.contains("datagrams refused"), "datagrams go somewhere: {log}");
    Ok(())
}

fn mixed() -> Outcome {
    let outside = Outside::new()?;
    let mut victim = outside.victim()?;
    let _stream = outside.hears()?;
    let image =
        victim.dump_with(&["--external-unix", "reconnect:*/log", "--external-unix", "closed:*/stream"])?;
    victim.reap()?;
    victim.restore(&image)?;
    outside.logged()?;
    victim.ticks(3)?;
    let log = log_of(&victim);
    ensure!(log.contains("stream closed") && !log.contains("datagrams refused"), "{log}");
    Ok(())
}

fn senders() -> Outcome {
    let outside = Outside::new()?;
    let mut victim = outside.victim()?;
    let stream = outside.hears()?;
    let inbox = victim.home().join("inbox");
    let reply = outside.dir.path().join("reply");
    let named = UnixDatagram::bind(&reply).map_err(|e| e.to_string())?;
    let unnamed = UnixDatagram::unbound().map_err(|e| e.to_string())?;
    for round in 0..5 {
        named.send_to(format!("named{round}").as_bytes(), &inbox).map_err(|e| e.to_string())?;
        unnamed.send_to(format!("unnamed{round}").as_bytes(), &inbox).map_err(|e| e.to_string())?;
        let image = victim.dump_with(&["--external-unix", "closed"])?;
        victim.reap()?;
        victim.restore(&image)?;
        victim.ticks(9)?;
        let log = log_of(&victim);
        let wanted = format!("got named{round} from {}", reply.display());
        ensure!(log.contains(&wanted), "not `{wanted}`: {log}");
        ensure!(log.contains(&format!("got unnamed{round} from \n")), "{log}");
    }
    ensure!(reply.exists(), "the sender's file is gone");
    drop(stream);
    Ok(())
}

fn accepted() -> Outcome {
    let mut victim = Victim::start("backlog", &[])?;
    for _ in 0..8 {
        let image = victim.dump_with(&["--leave-running"])?;
        std::fs::remove_dir_all(image).map_err(|e| e.to_string())?;
        victim.ticks(1)?;
    }
    victim.cycles(3)
}

fn never_accepted() -> Outcome {
    let mut victim = Victim::start("backlog", &["ever"])?;
    let image = victim.image();
    let pid = victim.pid.to_string();
    let text = run_torpor(&["dump", &pid, image.to_str().ok_or("a path")?])?.expect(REFUSED)?;
    ensure!(text.contains("not accepted") && text.contains("fd 5"), "{text}");
    ensure!(!image.exists(), "it left {}", image.display());
    victim.ticks(3)
}

/// A victim that looks at its peek offsets, while dumps of it are killed.
fn killed() -> Outcome {
    let mut victim = Victim::start("flight", &[])?;
    let pid = victim.pid.to_string();
    for round in 0u64..60 {
        let image = victim.image();
        let mut torpor = torpor_command(&["dump", "--leave-running", &pid, image.to_str().ok_or("a path")?])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_micros(round * 7919 % 12_000));
        torpor.kill().and_then(|()| torpor.wait()).map_err(|e| e.to_string())?;
        if round % 8 == 7 {
            victim.ticks(4).map_err(|e| format!("after kill {round}: {e}"))?;
        }
        let _partly = std::fs::remove_dir_all(image);
    }
    // Empty messages that the last ones have peeked at are received meanwhile.
    victim.ticks(8)?;
    victim.cycles(5)
}

fn creator() -> Outcome {
    let mut victim = Victim::start("creator", &[])?;
    let log = |victim: &Victim| std::fs::read_to_string(victim.log()).unwrap_or_default();
    let pid: i32 = log(&victim)
        .lines()
        .find_map(|l| l.strip_prefix("creator ")?.parse().ok())
        .ok_or("the victim names no creator")?;
    let image = victim.dump()?;
    let restore = |image: &std::path::Path| {
        run_torpor(&["restore", "--detach", "--accept-changed", image.to_str().ok_or("a path")?])?.expect(0)
    };
    let holder = Holder::of(pid)?;
    let said = restore(&image)?;
    victim.restored();
    for word in ["note", "SO_PEERCRED", &format!("pid {pid}, which is taken by `")] {
        ensure!(said.contains(word), "it does not say {word}: {said}");
    }
    victim.ticks(2)?;
    ensure!(log(&victim).contains("another"), "SO_PEERCRED tells of pid {pid}, which is somebody else");
    victim.kill();
    drop(holder);
    let others = |victim: &Victim| log(victim).matches("another").count();
    let before = others(&victim);
    let said = restore(&image)?;
    ensure!(!said.contains("SO_PEERCRED"), "it says: {said}");
    victim.restored();
    victim.ticks(2)?;
    ensure!(others(&victim) == before, "SO_PEERCRED tells of somebody else than pid {pid}");
    Ok(())
}

/// Of connections that are made anew. One that was there before tells of a process that has ended.
fn peer_pidfd() -> Outcome {
    let mut victim = Victim::start("peerpidfd", &[])?;
    victim.cycles(5)?;
    let log = std::fs::read_to_string(victim.log()).map_err(|e| e.to_string())?;
    if log.contains("SKIP") {
        eprintln!("skipped: no SO_PEERPIDFD in this kernel");
    }
    log.lines().filter(|l| l.starts_with("old")).for_each(|l| eprintln!("a connection of before: {l}"));
    Ok(())
}
