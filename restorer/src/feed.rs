//! Contents that a task cannot read by itself, since they are stored compressed or encrypted: it is fed them.
//!
//! A script says in which order its task reads, so that what it will ask for is known before: the task gets one end of
//! a stream socket, from which it receives straight to the addresses where the contents belong (recv(2), `MSG_WAITALL`;
//! all signals are blocked that could cut that short), and threads of ours decode what belongs to the other end. They
//! go ahead of the tasks by a bounded amount. Memory could as well be written from outside (process_vm_writev(2)), but
//! only where a task stands still, and scripts would have to be cut there; as it is, mapping, filling and protecting
//! stay one script, and a task waits for its own contents only.
//!
//! A chunk that turns out to be damaged closes the sockets: the receiving fails, and with it the restore. Each of our
//! threads has an id that nobody of the image wants (clone3(2), `set_tid`).

mod run;

use torpor_parasite::script::Script;

pub(crate) use self::run::{Feeds, Sockets};
use crate::plan::{Open, Planner};

/// A part of the contents of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Planner<'_> {
    /// Plans that a task fills `address` from a data file.
    pub(crate) fn contents(&mut self, script: &mut Script, purpose: String, address: u64, from: Range) {
        let Range { file, offset, length } = from;
        let (call, args) = if self.image.is_raw(file) {
            let slot = self.open(Open::Data { file });
            (libc::SYS_pread64, vec![self.descriptor(slot), address.into(), length.into(), offset.into()])
        } else {
            let task = self.turn;
            let slot = self.open(Open::Feed { task });
            self.feeds.entry(task).or_default().push(from);
            let fd = self.descriptor(slot);
            let args = vec![fd, address.into(), length.into(), libc::MSG_WAITALL.into(), 0.into(), 0.into()];
            (libc::SYS_recvfrom, args)
        };
        script.call_for(purpose, call, &args, length as i64);
    }
}
