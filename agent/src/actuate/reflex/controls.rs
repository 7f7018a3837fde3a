//! The open files of one guarded cgroup.

use std::sync::Arc;

use bellows_core::{Bytes, Nanos};

use super::freezer::Freeze;
use crate::cgroup::{Cgroup, CgroupError, Control, Limit, field, parse_stalled};

/// More threads than this are not taken to grow at once.
const MOST_GROWERS: u64 = 16;

/// The files that the reflex writes.
#[derive(Debug)]
pub struct Controls {
    cgroup: Cgroup,
    pub(super) max: Control,
    heirs: Vec<Control>,
    pub(super) high: Control,
    /// The same file, opened once more for the brakes thread: the kernel serialises the writes to one open
    /// file (`of->mutex`, fs/kernfs/file.c), and that thread's may reclaim for seconds.
    pub(super) brake: Arc<Control>,
    pub(super) freeze: Arc<Freeze>,
    events: Control,
    pub(super) current: Control,
    /// `pids.current` counts threads; not there where the controller is not enabled.
    threads: Option<Control>,
    cpu: Control,
    /// Not there where PSI is off.
    pressures: [Option<Control>; 2],
}

impl Controls {
    /// Opens them.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one does not exist or cannot be written.
    pub fn open(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self {
            cgroup: cgroup.clone(),
            max: Control::open(cgroup, "memory.max")?,
            heirs: Control::open_heirs(cgroup),
            high: Control::open(cgroup, "memory.high")?,
            brake: Arc::new(Control::open(cgroup, "memory.high")?),
            freeze: Arc::new(Freeze::open(cgroup)?),
            events: Control::open_read(cgroup, "cgroup.events")?,
            current: Control::open_read(cgroup, "memory.current")?,
            threads: Control::open_read(cgroup, "pids.current").ok(),
            cpu: Control::open_read(cgroup, "cpu.stat")?,
            pressures: ["cpu.pressure", "memory.pressure"]
                .map(|name| Control::open_read(cgroup, name).ok()),
        })
    }

    pub(super) const fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The limit in force: the least of its own and of those that follow it. An heir that is gone has
    /// none.
    pub(super) fn limit(&self) -> Result<Bytes, CgroupError> {
        let own = self.max.get()?.bytes();
        let of_heirs = self.heirs.iter().filter_map(|heir| heir.get().ok());
        Ok(of_heirs.map(Limit::bytes).fold(own, Bytes::min))
    }

    /// Whether a freeze is complete: every thread in it stands still. One that is gone cannot go on.
    pub(super) fn is_frozen(&self) -> bool {
        self.events.has_line("frozen 1").unwrap_or(true)
    }

    /// For how long its threads have run, and any of them has waited for a CPU, or for memory in reclaim or in the
    /// brake: while none of it grows, nothing in it goes on.
    pub(super) fn activity(&self) -> Nanos {
        let ran = self.cpu.parsed(|content| field(content, "usage_usec"));
        let ran = Nanos(ran.unwrap_or(0).saturating_mul(1000));
        // A file of pressure cannot be read where PSI is off by boot parameter.
        let waited = self.pressures.iter().flatten();
        let waited = waited.filter_map(|pressure| pressure.parsed(parse_stalled));
        waited.fold(ran, |sum, waited| Nanos(sum.0.saturating_add(waited.0)))
    }

    /// Threads that may be growing.
    pub(super) fn growers(&self, cpus: u64) -> u64 {
        let threads = self
            .threads
            .as_ref()
            .and_then(|threads| threads.get().ok())
            .map(|count| count.bytes().0);
        threads.unwrap_or(2 * cpus).clamp(1, MOST_GROWERS)
    }
}
