//! Terminals of somebody else, and controlling terminals.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Pid, PtyId};

/// A terminal from outside of the tree. A restore gives the process the terminal it is run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its path at the dump.
    pub path: Bytes,
    /// `struct termios` as TCGETS gives it.
    pub termios: Bytes,
    /// Rows and columns.
    pub size: (u16, u16),
}

/// The controlling terminal of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllingTerminal {
    /// The pair it is the slave of; `None` for a terminal from outside of the tree.
    pub pty: Option<PtyId>,
    /// Its foreground process group.
    pub foreground: Option<Pid>,
}
