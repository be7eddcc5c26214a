//! Round trips through pairs of this process.

use super::*;
use std::os::fd::{AsFd, OwnedFd};

fn pair() -> Option<(OwnedFd, OwnedFd)> {
    let pty = nix::pty::posix_openpt(nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_NOCTTY).ok()?;
    let master: OwnedFd = pty.into();
    tty::set_lock(&master, false).unwrap();
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let slave = tty::peer(&master, flags).unwrap();
    Some((master, slave))
}

/// Everything that comes out of a pair holding `queues`.
fn through(change: impl Fn(&mut Termios), packet: bool, queues: &Queues, rounds: u32) {
    let Some((master, slave)) = pair() else {
        eprintln!("skipped: no pseudo terminals here");
        return;
    };
    let mut termios = tty::termios(&master).unwrap();
    change(&mut termios);
    tty::set_termios(&master, &termios).unwrap();
    tty::set_packet_mode(&master, packet).unwrap();
    let ends = Ends { master: master.as_fd(), slave: slave.as_fd(), termios: &termios, packet };
    ends.put_back(queues).unwrap();
    for round in 0..=rounds {
        let mut found = Queues::new();
        assert!(ends.may_hold_something());
        ends.take_out(&mut found).unwrap();
        let lines = |q: &Queues| q.lines().map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(lines(&found), lines(queues), "round {round}");
        let typed = (found.unfinished.filled(), queues.unfinished.filled());
        assert!(typed.0 == typed.1, "round {round}: {} {}", typed.0.len(), typed.1.len());
        let output = (found.output.filled(), queues.output.filled());
        assert!(output.0 == output.1, "round {round}: {} {}", output.0.len(), output.1.len());
        assert_eq!(found.stop(), queues.stop(), "round {round}");
        ends.put_back(&found).unwrap();
        assert_eq!(tty::termios(&master).unwrap(), termios);
        assert_eq!(tty::poll(&master, libc::POLLPRI), 0);
    }
}

fn odd() -> Vec<u8> {
    (0..=255).filter(|b| *b != b'\n').collect()
}

#[test]
fn lines_of_every_kind_and_an_unfinished_one() {
    let mut queues = Queues::new();
    for line in [&b""[..], b"one\n", b"ended", b"", b"\n", b"with\nin it\n", &odd(), b"last\n", b"", b""] {
        queues.add_line(line).unwrap();
    }
    queues.unfinished.add(&odd()).unwrap();
    queues.output.add(b"some\r\n\x13\x11output\0").unwrap();
    through(|_| (), false, &queues, 20);
    through(|_| (), true, &queues, 20);
    through(|t| t.cc[libc::VEOF] = b'e', false, &queues, 20);
    for stop in [Stop::Flow, Stop::Typed] {
        queues.set_stop(stop);
        through(|_| (), false, &queues, 20);
        through(|_| (), true, &queues, 20);
    }
}

#[test]
fn only_an_unfinished_line_or_nothing() {
    let mut queues = Queues::new();
    through(|_| (), false, &queues, 2);
    queues.unfinished.add(b"unfin\x04ished").unwrap();
    through(|_| (), true, &queues, 50);
}

#[test]
fn bytes() {
    let mut queues = Queues::new();
    queues.unfinished.add(&odd()).unwrap();
    queues.output.add(&vec![b'x'; 18000]).unwrap();
    for packet in [false, true] {
        through(|t| t.lflag &= !libc::ICANON, packet, &queues, 20);
        through(|t| t.lflag |= tty::EXTPROC, packet, &queues, 20);
        through(|t| (t.lflag, t.iflag, t.cc[libc::VMIN]) = (0, 0, 100), packet, &queues, 20);
    }
    queues.set_stop(Stop::Flow);
    through(|t| (t.lflag, t.iflag) = (0, 0), true, &queues, 20);
}

#[test]
fn as_much_output_as_there_can_be() {
    let Some((master, slave)) = pair() else {
        eprintln!("skipped: no pseudo terminals here");
        return;
    };
    let termios = tty::termios(&master).unwrap();
    let ends = Ends { master: master.as_fd(), slave: slave.as_fd(), termios: &termios, packet: false };
    for size in [1, 7, 100, 255, 256, 257, 512, 1000, 2000, 4000, 8192, 40000] {
        let piece = vec![b'x'; size];
        let mut failures = 0;
        while failures < 20 {
            match nix::unistd::write(&slave, &piece) {
                Ok(_) => failures = 0,
                Err(_) => {
                    failures += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        let mut first = 0;
        for _ in 0..3 {
            let mut found = Queues::new();
            ends.take_out(&mut found).unwrap();
            let length = found.output.filled().len();
            assert!(length > 8000 && (first == 0 || first == length), "{size}: {first} {length}");
            assert_eq!(found.stop(), Stop::No);
            first = length;
            ends.put_back(&found).unwrap_or_else(|e| panic!("{length} in pieces of {size}: {e}"));
        }
        ends.take_out(&mut Queues::new()).unwrap();
        ends.put_back(&Queues::new()).unwrap();
    }
}

#[test]
fn a_full_line_discipline() {
    let mut queues = Queues::new();
    queues.unfinished.add(&vec![b'y'; 12000]).unwrap();
    through(|t| (t.lflag, t.iflag) = (0, 0), false, &queues, 10);
    let mut queues = Queues::new();
    for _ in 0..40 {
        queues.add_line(&[&[b'z'; 98][..], b"\n"].concat()).unwrap();
    }
    through(|_| (), false, &queues, 10);
}
