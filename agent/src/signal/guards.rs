//! The watermarks that the kernel compares with, and how it learns that they have moved.

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use bellows_core::{Bytes, CgroupId, Watermark};
use bellows_ebpf_common::{Guard, WATERMARK_OFF, changes};

use super::programs::{LoadError, map};

/// The watermarks that the kernel compares with.
pub struct Guards {
    watermarks: HashMap<MapData, u64, Guard>,
    /// Where the programs see that what they know of the watermarks is old.
    changes: Array<MapData, u64>,
    changed: u64,
}

impl Guards {
    pub(super) fn of(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            watermarks: map(programs, "GUARDS")?,
            changes: map(programs, "CHANGES")?,
            changed: 0,
        })
    }

    /// Sets a cgroup's watermarks; `None` switches them off but keeps the cgroup tracked.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the map is full (4096 cgroups).
    pub fn set(&mut self, cgroup: CgroupId, watermark: Option<Watermark>) -> Result<(), LoadError> {
        let pages =
            |at: fn(Watermark) -> Bytes| watermark.map_or(WATERMARK_OFF, |it| at(it).pages());
        let guard = Guard {
            watermark_pages: pages(|watermark| watermark.small),
            huge_watermark_pages: pages(|watermark| watermark.huge),
        };
        self.watermarks
            .insert(cgroup.0, guard, 0)
            .map_err(|source| LoadError::Map {
                name: "GUARDS",
                source,
            })?;
        self.tell_change()
    }

    /// Stops watching a cgroup.
    pub fn remove(&mut self, cgroup: CgroupId) {
        if let Err(error) = self.watermarks.remove(&cgroup.0) {
            tracing::debug!(cgroup.id = cgroup.0, %error, "the cgroup was not guarded");
        }
        if let Err(error) = self.tell_change() {
            tracing::debug!(%error, "the programs find out by themselves within a second");
        }
    }

    /// Must follow the change: what a program finds out in between is then old.
    fn tell_change(&mut self) -> Result<(), LoadError> {
        self.changed += 1;
        self.changes
            .set(changes::GUARDS, self.changed, 0)
            .map_err(|source| LoadError::Map {
                name: "CHANGES",
                source,
            })
    }
}

impl std::fmt::Debug for Guards {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Guards").finish_non_exhaustive()
    }
}
