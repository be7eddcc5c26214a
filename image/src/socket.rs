//! What all sockets have.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// One socket option, as getsockopt(2) gave it and setsockopt(2) takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SOL_*`
    pub level: i32,
    /// `SO_*` and the like.
    pub name: i32,
    /// Its value.
    pub value: Bytes,
}
