//! What becomes of a file that has a name.

use serde::{Deserialize, Serialize};

/// What a restore does about a file that is found again by its path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rule {
    /// It must be there, as large as it was.
    #[default]
    Keep,
    /// Its contents are in the image: it is made again when it is missing, and they are put back when they
    /// differ.
    Save,
    /// It must be there; what it grew since the dump is cut off.
    Truncate,
    /// Its contents are in the image for the case that it is missing; one that is there is treated as by `Keep`.
    Spare,
}

impl Rule {
    /// Whether the contents go into the image.
    pub fn has_content(self) -> bool {
        matches!(self, Rule::Save | Rule::Spare)
    }
}
