//! The executor (`torpor-parasite`) as machine code, ready to be put into a task.
//!
//! `build.rs` compiles, links and verifies it: position-independent without a single relocation, no
//! writable data, no path that panics, its entry at the first byte, one page at most.
#![cfg_attr(not(test), no_std)]

/// The code: to be mapped readable and executable at any address that is a multiple of the page size. It
/// needs no writable memory but a stack and the arena its context names.
pub const BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/blob.bin"));

/// Offset of the entry in [`BLOB`]: a C function with one argument, the address of a
/// `torpor_parasite::wire::Context`. It never returns.
pub const ENTRY: u64 = 0;
