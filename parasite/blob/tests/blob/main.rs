//! The blob as a target sees it: it runs scripts, and a thread that the tracer leaves heals itself.

#[cfg(target_arch = "x86_64")]
mod heal;
mod mapped;
mod run;
