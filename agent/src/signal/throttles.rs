//! Cgroups that have used their CPU quota up, as the kernel tells.

use bellows_core::{CgroupId, Nanos};

use super::{programs::life_event, told::Event};

/// A cgroup is throttled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// Which.
    pub cgroup: CgroupId,
    /// Since when.
    pub at: Nanos,
}

impl Event for Throttled {
    const RING: &'static str = "THROTTLES";
    const NAMED: &'static str = "QUOTAS";
    /// When it was told of last.
    type Kept = u64;

    fn decode(record: &[u8]) -> Option<Self> {
        life_event(record).map(|event| Self {
            cgroup: CgroupId(event.cgroup_id),
            at: Nanos(event.at_ns),
        })
    }
}
