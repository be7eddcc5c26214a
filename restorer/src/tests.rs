//! A host for tests, as plain data.

use torpor_image::credentials::Credentials;

use crate::host::Host;

/// A machine without privileges to spare.
pub(crate) fn host() -> Host {
    Host {
        occupied: vec![(0x5555_0000_0000, 0x5555_0001_0000), (0x7fff_0000_0000, 0x7fff_0002_0000)],
        kernel_areas: vec![
            (b"[vvar]".as_slice().into(), 0x7fff_1000_0000, 0x7fff_1000_4000),
            (b"[vdso]".as_slice().into(), 0x7fff_1000_4000, 0x7fff_1000_6000),
        ],
        vdso: vec![0x90, 0x0f, 0x05, 0xc3].into(),
        xstate_features: 7,
        limits: vec![(1024, 4096); 16],
        credentials: Credentials::default(),
        may_raise_limits: false,
        scheduling: (0, 0),
        affinity: vec![3, 0, 0, 0, 0, 0, 0, 0].into(),
        oom_score_adj: 0,
        coredump_filter: Some(0x33),
        timer_ids: true,
        program: (1, 1),
        last_capability: 40,
    }
}
