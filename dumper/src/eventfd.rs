//! eventfd(2), from fdinfo.

use torpor_image::description::Kind;
use torpor_image::eventfd::EventFd;

use crate::collect::Collector;
use crate::description::Found;
use crate::error::Result;

/// Before Linux 6.5 fdinfo does not tell a semaphore from a counter; a guess would change what its reader
/// gets.
pub(crate) fn collect(
    collector: &mut Collector,
    found: &Found,
    count: u64,
    semaphore: Option<bool>,
) -> Result<Option<Kind>> {
    let Some(semaphore) = semaphore else {
        collector.refuse(
            found.title(),
            "this kernel does not tell whether it is a semaphore",
            "use Linux 6.5 or newer, or close it before the dump",
        );
        return Ok(None);
    };
    Ok(Some(Kind::EventFd(EventFd { count, semaphore })))
}
