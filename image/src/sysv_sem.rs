//! System V semaphores (semget(2)).

use serde::{Deserialize, Serialize};

use crate::Pid;
use crate::sysv::Permissions;

/// A set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    /// Its id.
    pub id: i32,
    /// Key, owner and mode.
    pub permissions: Permissions,
    /// Its semaphores, in order.
    pub semaphores: Vec<Semaphore>,
    /// Whether semop(2) was ever called on it: programs wait for that (`sem_otime`).
    pub operated: bool,
    /// What the end of a process adds to its semaphores (`SEM_UNDO`).
    pub adjustments: Vec<Adjustment>,
}

/// One semaphore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Semaphore {
    /// `semval`
    pub value: u16,
    /// Who operated on it last (`sempid`), or 0.
    pub pid: i32,
}

/// A `semadj` that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adjustment {
    /// The process.
    pub pid: Pid,
    /// Index of the semaphore.
    pub semaphore: u16,
    /// What is added to the semaphore when the process ends.
    pub value: i32,
}
