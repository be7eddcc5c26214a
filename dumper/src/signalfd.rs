//! signalfd(2), from fdinfo.

use torpor_image::description::Kind;
use torpor_image::signalfd::SignalFd;

pub(crate) fn collect(mask: u64) -> Kind {
    Kind::SignalFd(SignalFd { mask })
}
