//! A terminal as a standard stream.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// A terminal the process was attached to. A restore gives the process the terminal it is run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its path at the dump.
    pub path: Bytes,
    /// `struct termios` as TCGETS gives it.
    pub termios: Bytes,
    /// Rows and columns.
    pub size: (u16, u16),
}
