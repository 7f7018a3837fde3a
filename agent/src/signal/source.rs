//! Where urgent events come from: the ring of the kernel programs, or cgroup files without them.
//!
//! Whoever reacts polls one file descriptor and takes events of one shape from either. What differs is
//! how late they are, which the thresholds know ([`bellows_core::Signals`]).

use std::os::fd::{AsFd as _, BorrowedFd};

use bellows_core::{CgroupId, Signals, Watermark};
use bellows_ebpf_common::MemoryEvent;

use super::{
    files::Files,
    programs::{LoadError, Reflexes, memory_event},
};
use crate::cgroup::{Cgroup, CgroupError};

/// A source of urgent events.
#[derive(Debug)]
pub enum Source {
    /// The kernel programs.
    Programs(Box<Reflexes>),
    /// Cgroup files.
    Files(Files),
}

/// What was taken from a source.
#[derive(Debug)]
pub enum Taken {
    /// An event.
    Event(MemoryEvent),
    /// A record of another build or a damaged one.
    Unknown,
}

impl Source {
    /// What it is, for the thresholds.
    #[must_use]
    pub const fn signals(&self) -> Signals {
        match self {
            Self::Programs(_) => Signals::Programs,
            Self::Files(_) => Signals::Files,
        }
    }

    /// Readable when there is something to take.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Programs(reflexes) => reflexes.ring.as_fd(),
            Self::Files(files) => files.as_fd(),
        }
    }

    /// The next event; never waits.
    pub fn take(&mut self) -> Option<Taken> {
        match self {
            Self::Programs(reflexes) => reflexes
                .ring
                .next()
                .map(|item| memory_event(&item).map_or(Taken::Unknown, Taken::Event)),
            Self::Files(files) => files.take().map(Taken::Event),
        }
    }

    /// Opens what is needed to see a cgroup.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one of its files cannot be opened.
    pub fn adopt(&mut self, cgroup: &Cgroup) -> Result<(), CgroupError> {
        match self {
            Self::Programs(_) => Ok(()),
            Self::Files(files) => files.adopt(cgroup),
        }
    }

    /// Sets a cgroup's watermarks; `None` switches them off but keeps the cgroup tracked.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the map is full (4096 cgroups).
    pub fn watch(
        &mut self,
        cgroup: CgroupId,
        watermark: Option<Watermark>,
    ) -> Result<(), LoadError> {
        match self {
            Self::Programs(reflexes) => reflexes.guards.set(cgroup, watermark),
            Self::Files(files) => {
                // Files do not tell of single charges.
                files.watch(cgroup, watermark.map(|watermark| watermark.small));
                Ok(())
            }
        }
    }

    /// Stops watching a cgroup.
    pub fn forget(&mut self, cgroup: CgroupId) {
        match self {
            Self::Programs(reflexes) => reflexes.guards.remove(cgroup),
            Self::Files(files) => files.forget(cgroup),
        }
    }
}
