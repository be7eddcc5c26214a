//! credentials(7) and capabilities(7)

use serde::{Deserialize, Serialize};

/// Credentials of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file system user id.
    pub uids: [u32; 4],
    /// The same of groups.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable capabilities.
    pub inheritable: u64,
    /// Permitted capabilities.
    pub permitted: u64,
    /// Effective capabilities.
    pub effective: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Ambient set.
    pub ambient: u64,
    /// prctl(PR_GET_SECUREBITS)
    pub securebits: u32,
    /// prctl(PR_GET_NO_NEW_PRIVS)
    pub no_new_privileges: bool,
}
