//! Calls that go on as restart_syscall(2).
//!
//! A call with a relative timeout that was interrupted once, by a stop or by an earlier dump, is afterwards made
//! by that number, and only the kernel knows which one it is. Its arguments are still in their registers, and
//! while the thread sleeps, the kernel tells the function it sleeps in. So running threads are looked at before
//! the freeze, for the image of those that are found in the same call then.

use std::collections::HashMap;

use torpor_kernel::ids::{Pid, Tid};
use torpor_kernel::process::{self, BlockedCall};

/// Threads seen in such a call, and which it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Restarts(HashMap<Tid, (BlockedCall, u64)>);

impl Restarts {
    /// Looks at every thread of running processes. A thread that cannot be looked at is left out.
    pub(crate) fn look(pids: impl IntoIterator<Item = Pid>) -> Self {
        let tids = |pid| process::tasks(pid).unwrap_or_default().into_iter().map(move |tid| (pid, tid));
        let seen = pids.into_iter().flat_map(tids).filter_map(|(pid, tid)| {
            let call = process::blocked_call(pid, tid).ok()??;
            if call.nr as u64 != arch::nr::RESTART_SYSCALL {
                return None;
            }
            let channel = process::wait_channel(pid, tid).ok()?;
            Some((tid, (call, arch::call_asleep_in(&channel, &call.args)?)))
        });
        Restarts(seen.collect())
    }

    /// The call of a stopped thread, if it is still in the one that was seen.
    pub(crate) fn of(&self, tid: Tid, registers: &arch::Registers) -> Option<u64> {
        let (call, nr) = self.0.get(&tid)?;
        (call.ip == registers.ip() && call.sp == registers.sp()).then_some(*nr)
    }
}
