//! POSIX message queues (mq_overview(7)).

use serde::{Deserialize, Serialize};

use crate::{Bytes, Pid};

/// A queue, which several descriptions may be open on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mqueue {
    /// Its name, with the slash it begins with.
    pub name: Bytes,
    /// The name is gone (mq_unlink(3)).
    pub unlinked: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Most messages it takes (`mq_maxmsg`).
    pub max_messages: u64,
    /// Size of the largest message it takes (`mq_msgsize`).
    pub message_size: u64,
    /// The messages in it, in the order in which they are received.
    pub messages: Vec<MqueueMessage>,
    /// The process that has asked to be notified of the next message without being told (mq_notify(3), `SIGEV_NONE`).
    #[serde(default)]
    pub asked: Option<Pid>,
}

/// A message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqueueMessage {
    /// Its priority.
    pub priority: u32,
    /// Its text.
    pub text: Bytes,
}
