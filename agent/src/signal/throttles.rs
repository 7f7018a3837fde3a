//! Cgroups that have used their CPU quota up, as the kernel tells.

use std::os::fd::{AsFd as _, BorrowedFd};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, RingBuf},
};
use bellows_core::{CgroupId, Nanos};

use super::programs::{LoadError, life_event, map};

/// The ring, and who is watched.
pub struct Throttles {
    ring: RingBuf<MapData>,
    watched: HashMap<MapData, u64, u64>,
}

impl std::fmt::Debug for Throttles {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Throttles").finish_non_exhaustive()
    }
}

impl Throttles {
    pub(super) fn of(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            ring: map(programs, "THROTTLES")?,
            watched: map(programs, "QUOTAS")?,
        })
    }

    /// Readable when somebody is throttled.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Tells of a cgroup from now on.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the map is full (8192 cgroups).
    pub fn watch(&mut self, cgroup: CgroupId) -> Result<(), LoadError> {
        let watched = self.watched.insert(cgroup.0, 0, 0);
        watched.map_err(|source| LoadError::Map {
            name: "QUOTAS",
            source,
        })
    }

    /// Tells of it no more.
    pub fn forget(&mut self, cgroup: CgroupId) {
        if let Err(error) = self.watched.remove(&cgroup.0) {
            tracing::debug!(cgroup.id = cgroup.0, %error, "the cgroup was not watched");
        }
    }

    /// The next that is throttled, and since when; never waits. A record of another build is skipped.
    pub fn take(&mut self) -> Option<(CgroupId, Nanos)> {
        loop {
            let item = self.ring.next()?;
            match life_event(&item) {
                Some(event) => return Some((CgroupId(event.cgroup_id), Nanos(event.at_ns))),
                None => tracing::warn!(bytes = item.len(), "an event of unknown size was skipped"),
            }
        }
    }
}
