//! System V message queues (msgget(2)).

use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::sysv::Permissions;

/// A queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Its id.
    pub id: i32,
    /// Key, owner and mode.
    pub permissions: Permissions,
    /// Most bytes it takes (`msg_qbytes`).
    pub capacity: u64,
    /// Who sent last, or 0.
    pub sender: i32,
    /// Who received last, or 0.
    pub receiver: i32,
    /// The messages in it, the oldest first.
    pub messages: Vec<Message>,
}

/// A message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its type, above 0.
    pub kind: i64,
    /// Its text.
    pub text: Bytes,
}
