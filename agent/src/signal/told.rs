//! What the kernel tells of cgroups that were named: a ring that wakes, and who is named.

use std::{
    marker::PhantomData,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::{
    Ebpf, Pod,
    maps::{HashMap, MapData, RingBuf},
};
use bellows_core::CgroupId;

use super::programs::{LoadError, map};

/// A kind of event.
pub trait Event: Sized {
    /// The map of its ring.
    const RING: &'static str;
    /// The map of the cgroups of which it tells, by id.
    const NAMED: &'static str;
    /// What that map keeps for the programs; none to begin with.
    type Kept: Pod + Default;

    /// Decodes a record; `None` for one of another build.
    fn decode(record: &[u8]) -> Option<Self>;
}

/// Events of one kind.
pub struct Told<E: Event> {
    ring: RingBuf<MapData>,
    named: HashMap<MapData, u64, E::Kept>,
    kind: PhantomData<fn() -> E>,
}

impl<E: Event> std::fmt::Debug for Told<E> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct(E::RING).finish_non_exhaustive()
    }
}

impl<E: Event> Told<E> {
    pub(super) fn of(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            ring: map(programs, E::RING)?,
            named: map(programs, E::NAMED)?,
            kind: PhantomData,
        })
    }

    /// Readable when there is something to take.
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
        let named = self.named.insert(cgroup.0, E::Kept::default(), 0);
        named.map_err(|source| LoadError::Map {
            name: E::NAMED,
            source,
        })
    }

    /// Tells of it no more.
    pub fn forget(&mut self, cgroup: CgroupId) {
        if let Err(error) = self.named.remove(&cgroup.0) {
            tracing::debug!(cgroup.id = cgroup.0, %error, "the cgroup was not watched");
        }
    }

    /// The next event; never waits. A record of another build is skipped.
    pub fn take(&mut self) -> Option<E> {
        loop {
            let item = self.ring.next()?;
            match E::decode(&item) {
                Some(event) => return Some(event),
                None => tracing::warn!(bytes = item.len(), "an unknown event was skipped"),
            }
        }
    }
}
