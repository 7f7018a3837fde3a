//! What a cgroup's files say of its memory, and of the time that its tasks wait.
//!
//! Reading `memory.stat` has the kernel sum up what all CPUs have charged, which takes milliseconds on a large node: once for
//! a decision, not in a loop. A file that an older kernel does not have is `None`; a line that is not in `memory.stat` stands
//! for no pages.
//!
//! It must not write, nor take a file that is not there for one that says zero.

use std::io;

use bellows_core::{Bytes, Nanos};

use super::{Cgroup, CgroupError, MemoryEvents, field, parse_events, text::parse_stalled};
use crate::machine;

/// Where page cache and the rest of a cgroup's memory stand, from `memory.stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStat {
    /// `memory.current`.
    pub usage: Bytes,
    /// Page cache on the LRU lists, which reclaim can give back.
    pub file: Bytes,
    /// Caches of names and inodes (`slab_reclaimable`), which it gives back where nobody uses them.
    pub slab: Bytes,
}

impl MemoryStat {
    /// Usage without page cache.
    #[must_use]
    pub const fn demand(self) -> Bytes {
        self.usage.minus(self.file)
    }

    /// What is left if all is given back that may be.
    #[must_use]
    pub const fn least(self) -> Bytes {
        self.demand().minus(self.slab)
    }
}

impl Cgroup {
    /// `memory.current`.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn usage(&self) -> Result<Bytes, CgroupError> {
        self.number("memory.current").map(Bytes)
    }

    /// `memory.peak`; `None` before Linux 5.19, which does not have it.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn peak(&self) -> Result<Option<Bytes>, CgroupError> {
        if self.has("memory.peak") {
            self.number("memory.peak").map(|peak| Some(Bytes(peak)))
        } else {
            Ok(None)
        }
    }

    /// `memory.events`, which counts the cgroups below as well.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn events(&self) -> Result<MemoryEvents, CgroupError> {
        Ok(parse_events(&self.read("memory.events")?))
    }

    /// Usage and page cache. Reading `memory.stat` flushes the kernel's statistics: once per
    /// decision, not in a loop.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn stat(&self) -> Result<MemoryStat, CgroupError> {
        let content = self.read("memory.stat")?;
        let field = |name| field(&content, name).unwrap_or(0);
        let file = Bytes(field("active_file").saturating_add(field("inactive_file")));
        Ok(MemoryStat {
            usage: self.usage()?,
            file,
            slab: Bytes(field("slab_reclaimable")),
        })
    }

    /// Usage without the page cache that is given back first: what the kubelet evicts by.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn working_set(&self) -> Result<Bytes, CgroupError> {
        let inactive = field(&self.read("memory.stat")?, "inactive_file");
        Ok(self.usage()?.minus(Bytes(inactive.unwrap_or(0))))
    }

    /// File pages that were read again after they had been reclaimed, since the cgroup was made.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when `memory.stat` cannot be read.
    pub fn refaulted(&self) -> Result<Bytes, CgroupError> {
        let stat = self.read("memory.stat")?;
        let pages = field(&stat, "workingset_refault_file").unwrap_or(0);
        Ok(machine::pages(pages))
    }

    /// Time that at least one of its tasks has waited for memory, from `memory.pressure`; `None` where the
    /// kernel does not account for it (`psi=0`).
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it is there and cannot be read.
    pub fn stalled(&self) -> Result<Option<Nanos>, CgroupError> {
        self.some_pressure("memory.pressure")
    }

    /// Time that at least one of its tasks has waited for a CPU, from `cpu.pressure`; `None` where the kernel does not
    /// account for it.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it is there and cannot be read.
    pub fn waited_for_cpu(&self) -> Result<Option<Nanos>, CgroupError> {
        self.some_pressure("cpu.pressure")
    }

    fn some_pressure(&self, file: &str) -> Result<Option<Nanos>, CgroupError> {
        match self.read(file) {
            Ok(content) => Ok(parse_stalled(&content)),
            Err(CgroupError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
