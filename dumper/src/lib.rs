//! Dumps a running process into an image.
//!
//! ```no_run
//! use torpor_dumper::{Destination, Options, Target};
//!
//! # fn main() -> Result<(), torpor_dumper::Error> {
//! let target = Target::find(1234)?; // refuses by name what a dump would lose, without stopping anything
//! let directory = Destination::create("image".as_ref(), false)?;
//! let mut frozen = target.freeze(false)?; // every thread stands
//! let dumped = frozen.dump(directory, &Options::default())?; // may be done again and again
//! println!("{} bytes", dumped.manifest.files.iter().map(|f| f.size).sum::<u64>());
//! frozen.kill()?; // or resume(), or keep_stopped()
//! # Ok(())
//! # }
//! ```
//! There is no global state: two dumps may run at once in one process, each in a thread of its own. Such a thread
//! becomes one of a few that work for its dumps, for good: a program that uses rayon itself had better do so in others.

mod address;
mod anon;
mod areas;
mod capture;
mod collect;
mod credentials;
mod description;
mod dump;
mod epoll;
mod error;
mod eventfd;
mod freeze;
mod gadget;
mod guardian;
mod hold;
mod inet;
mod inject;
mod inode;
mod inotify;
mod io_uring;
mod ip;
mod lease;
mod mark;
mod memory;
mod mqueue;
mod netlink;
mod opened;
mod packet;
mod peek;
mod pidfd;
mod pipe;
mod pty;
mod raw;
mod repair;
mod restart;
mod robust;
mod rules;
mod scheduling;
mod scratch;
mod sharing;
mod signal;
mod signalfd;
mod snapshot;
mod socket;
mod stage;
mod survey;
mod sysv;
mod sysv_msg;
mod sysv_sem;
mod sysv_shm;
mod task;
mod tcp;
mod terminal;
mod thread;
mod timer;
mod timerfd;
mod track;
mod tty_guardian;
mod udp;
mod unix;
mod vma;
mod workers;

pub use dump::{Destination, Dumped, Frozen, Options, Target, check};
pub use error::{Error, Refusal, Result};
pub use rules::{RuleError, Rules};
pub use snapshot::Way;
pub use survey::{Descriptor, Process, Survey};
pub use tcp::TcpPolicy;
pub use torpor_image::manifest::Freeze;
pub use torpor_image::rules::Rule;
pub use track::Tracking;
pub use unix::{ExternalUnix, Policy};
