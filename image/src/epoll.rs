//! epoll(7)

use serde::{Deserialize, Serialize};

use crate::DescriptionId;

/// An epoll set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    /// What it watches.
    pub targets: Vec<EpollTarget>,
}

/// One entry of an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// The number it was added under.
    pub fd: i32,
    /// The description it was added for: the number may mean another one since.
    pub description: DescriptionId,
    /// `EPOLL*` bits.
    pub events: u32,
    /// The user's word.
    pub data: u64,
}
