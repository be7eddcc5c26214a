//! credentials(7), from /proc/PID/task/TID/status.

use torpor_image::credentials::Credentials;
use torpor_kernel::status::Status;

pub(crate) fn collect(status: &Status, securebits: u32) -> Credentials {
    Credentials {
        uids: status.uids,
        gids: status.gids,
        groups: status.groups.clone(),
        inheritable: status.cap_inheritable,
        permitted: status.cap_permitted,
        effective: status.cap_effective,
        bounding: status.cap_bounding,
        ambient: status.cap_ambient,
        securebits,
        no_new_privileges: status.no_new_privs,
    }
}
