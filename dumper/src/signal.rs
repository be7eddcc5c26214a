//! Signal actions: 64 calls of rt_sigaction in one script.

use torpor_image::Bytes;
use torpor_image::signal::{ProcessSignals, SignalAction};
use torpor_parasite::call;
use torpor_parasite::script::{Data, Outcome, Script};

/// `_NSIG`
const SIGNALS: u64 = 64;
/// Bytes of `struct kernel_sigaction` on x86_64: handler, flags, restorer, mask.
const ACTION: usize = 32;

pub(crate) fn ask(script: &mut Script) -> Vec<Data> {
    (1..=SIGNALS)
        .map(|signal| {
            let action = script.reserve(ACTION);
            let purpose = format!("the action of signal {signal}");
            call!(script, purpose, libc::SYS_rt_sigaction, signal, 0, action, 8);
            action
        })
        .collect()
}

pub(crate) fn assemble(asked: &[Data], outcome: &Outcome, pending: Vec<Bytes>) -> ProcessSignals {
    let actions = asked
        .iter()
        .map(|&action| SignalAction {
            handler: outcome.u64(action),
            flags: outcome.u64(action.at(8)),
            restorer: outcome.u64(action.at(16)),
            mask: outcome.u64(action.at(24)),
        })
        .collect();
    ProcessSignals { actions, pending }
}
