//! Pseudo terminals with their master in the tree.

use serde::{Deserialize, Serialize};

use crate::{Bytes, PtyId};

/// A pair of master and slave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// Its number in this image.
    pub id: PtyId,
    /// Its number in its devpts.
    pub number: u32,
    /// The file of the slave, as /dev/pts/N.
    pub path: Bytes,
    /// The file its master was opened by: /dev/ptmx, or `ptmx` in a devpts. Empty if the master is closed, and all
    /// that is left are slaves that have hung up.
    pub ptmx: Bytes,
    /// Mode, owner and group of the slave's file.
    pub node: (u32, u32, u32),
    /// `struct termios2`
    pub termios: Bytes,
    /// Rows, columns, and both in pixels.
    pub size: [u16; 4],
    /// `TIOCPKT`
    pub packet: bool,
    /// `TIOCSPTLCK`
    pub locked: bool,
    /// `TIOCEXCL` of master and slave.
    pub exclusive: (bool, bool),
    /// What became of the slave.
    pub slave: Slave,
    /// How output was stopped.
    pub stop: Stop,
    /// Written by the slave, not read from the master.
    pub output: Bytes,
    /// Lines typed and not read: with their newline, or without where they ended otherwise.
    pub lines: Vec<Bytes>,
    /// What was typed of an unfinished line; everything typed if the terminal is not read by lines.
    pub unfinished: Bytes,
}

/// Whether a slave is open: its master can tell a slave that was closed from one that never was open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slave {
    /// It was never opened.
    Unopened,
    /// It was opened, and all have closed it.
    Closed,
    /// It is open.
    Open,
}

/// How the output of a slave was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    /// It was not.
    No,
    /// By the stop character.
    Typed,
    /// By tcflow(3).
    Flow,
}

/// An open end of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyEnd {
    /// The pair.
    pub pty: PtyId,
    /// Which end.
    pub side: Side,
    /// The file it was opened by: /dev/pts/N or /dev/tty for a slave.
    pub path: Bytes,
}

/// An end of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The side of the terminal emulator.
    Master,
    /// The side of the programs.
    Slave,
    /// That, after its terminal hung up (vhangup(2), or its master was closed).
    HungUp,
}

impl Pty {
    /// The largest number a devpts gives (linux/devpts_fs.h, `NR_UNIX98_PTY_MAX`).
    pub const MAX_NUMBER: u32 = 1 << 20;
    /// More bytes than a pair holds in one direction.
    pub const MAX_QUEUED: usize = 60 << 10;
    /// Bytes of `struct termios2`.
    pub const TERMIOS: usize = 44;

    /// Whether anything of it is impossible.
    pub fn is_possible(&self) -> bool {
        let typed = self.lines.iter().map(|l| l.len()).fold(self.unfinished.len(), usize::saturating_add);
        let open = self.ptmx.is_empty() || self.termios.len() == Self::TERMIOS;
        let absolute = |path: &Bytes| path.first() == Some(&b'/') && !path.contains(&0);
        open && self.number < Self::MAX_NUMBER
            && (self.ptmx.is_empty() || absolute(&self.ptmx))
            && absolute(&self.path)
            && self.node.0 & !0o7777 == 0
            && self.output.len() <= Self::MAX_QUEUED
            && typed.saturating_add(2 * self.lines.len()) <= Self::MAX_QUEUED
    }
}
