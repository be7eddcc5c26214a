//! The parasite: the one thing Torpor puts inside a task.
//!
//! It is a *syscall executor*. It runs a script, an array of fixed-size operations in an arena, and writes
//! every result back into the operation that produced it. All knowledge of what the calls mean stays
//! outside: the dumper and the restorer compose scripts with [`script::Script`]. The same executor serves
//! both.
//!
//! The crate is compiled twice: as an ordinary library for the programs outside, and (`cfg(parasite_blob)`)
//! as position-independent machine code, see `parasite/blob`. In the second form there is no std, nothing
//! panics, allocates, formats or keeps statics; the build proves it.
#![cfg_attr(parasite_blob, no_std)]

pub mod executor;
#[cfg(parasite_blob)]
mod rt;
#[cfg(not(parasite_blob))]
pub mod script;
pub mod wire;
