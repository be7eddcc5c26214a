//! The architecture this build is for.
//!
//! `arch/x86_64` and `arch/aarch64` export the same names with the same signatures; everyone else
//! depends on this crate and holds no `cfg` on the architecture.
#![no_std]

#[cfg(target_arch = "aarch64")]
pub use torpor_arch_aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use torpor_arch_x86_64::*;
