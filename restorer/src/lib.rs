//! Restores an image.
//!
//! ```no_run
//! use torpor_image::Image;
//! use torpor_restorer::{Host, Options, plan, prepare};
//!
//! # fn main() -> Result<(), torpor_restorer::Error> {
//! let image = Image::open("image".as_ref())?; // reads and checks
//! let plan = plan(&image, &Host::probe()?, &Options::default())?; // pure
//! print!("{plan}");
//! let prepared = prepare(&image, &plan, None)?; // builds everything, stopped
//! let running = prepared.resume(false); // cannot fail; or abort()
//! println!("{}", running.pid()); // a child of this process
//! # Ok(())
//! # }
//! ```
//! There is no global state: two restores may run at once in one process, each in a thread of its own.

mod address;
mod arena;
mod birth;
mod credentials;
mod crew;
mod description;
mod directory;
mod epoll;
mod error;
mod eventfd;
mod feed;
mod holder;
mod host;
mod inet;
mod inode;
mod inotify;
mod io_uring;
mod ip;
mod kept;
mod late;
pub mod lazy;
mod lease;
mod lineage;
mod lock;
mod made;
mod memory;
mod mqueue;
mod netlink;
mod open;
mod packet;
mod pidfd;
mod pipe;
mod plan;
mod print;
mod process_file;
mod pty;
mod raw;
mod rules;
mod run;
mod scheduling;
mod signal;
mod signalfd;
mod socket;
mod sysv;
mod sysv_msg;
mod sysv_sem;
mod sysv_shm;
mod task;
mod tcp;
mod terminal;
#[cfg(test)]
mod tests;
mod thread;
mod timer;
mod timerfd;
mod udp;
mod unix;
mod vma;

pub use error::{Error, Result};
pub use host::Host;
pub use plan::{Options, Plan, plan};
pub use run::{Prepared, Running, prepare};
