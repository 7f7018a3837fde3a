//! What is known of containers whose limits are moved: shared by whoever watches them, whoever decides, and whoever tells
//! their owner. What is changed is written down first.

use std::sync::{Arc, Mutex, PoisonError};

use bellows_core::{CgroupId, Cpu, Reason};
use tokio::time::{Duration, Instant};

use super::{pod::Pod, targets::Targets};
use crate::{
    cgroup::Cgroup,
    originals::{MovedQuota, Original, Records},
    quota::{Most, NotSet},
};

/// How long a CPU quota must have been moved before its owner is told of it, and how often that is at most.
const QUOTA_AFTER: Duration = Duration::from_secs(1);
const QUOTA_INTERVAL: Duration = Duration::from_secs(10);

/// A container whose limits are moved.
pub trait Moved {
    /// Its cgroup.
    fn cgroup(&self) -> &Cgroup;
    /// What it had, and what we have asked for.
    fn original(&self) -> &Original;
    /// The same, to be changed by [`Containers::change`] only.
    fn original_mut(&mut self) -> &mut Original;
    /// Its pod.
    fn pod(&self) -> Option<&Arc<Pod>>;
    /// Whether a kubelet gives its pod no less than what all of its containers have together.
    fn is_summed_up(&self) -> bool {
        false
    }
    /// When its quota was moved and told.
    fn times(&mut self) -> &mut QuotaTimes;
}

/// Whoever writes quotas, and tells those who own them.
pub trait Owner: Send + 'static {
    /// What it knows of a container.
    type Target: Moved;

    /// What it knows of all.
    fn containers(&self) -> &Containers<Self::Target>;

    /// The most that its quota may become now, beside what its policy says; `None` where nothing bounds it.
    fn most(&self, _cgroup: CgroupId) -> Option<Most> {
        None
    }

    /// Sets the quota of a container at once, and has its owner told.
    ///
    /// # Errors
    ///
    /// [`NotSet`].
    fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet>;

    /// A container was seen at rest, and nothing is lent to it: its owner is not told of what was asked for before.
    fn rests(&self, cgroup: &Cgroup, at_rest: Cpu);
}

/// When a CPU quota was first moved away from what its owner knows, and when that was told of one last.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuotaTimes {
    /// `None` if it knows.
    pub moved: Option<Instant>,
    /// `None` if it was never told.
    pub told: Option<Instant>,
}

impl QuotaTimes {
    /// When the owner is to be told of a quota; `None` if it knows.
    #[must_use]
    pub fn due(self, quota: Option<&MovedQuota>) -> Option<Instant> {
        let quota = quota?;
        if quota.is_told() {
            return None;
        }
        let moved = self.moved.unwrap_or_else(Instant::now) + QUOTA_AFTER;
        let told = self.told.map(|told| told + QUOTA_INTERVAL);
        Some(told.map_or(moved, |told| told.max(moved)))
    }
}

/// Those of one agent; clones share them.
#[derive(Debug)]
pub struct Containers<T> {
    targets: Targets<T>,
    records: Records<Original>,
    /// Held while a record is changed.
    writing: Arc<Mutex<()>>,
}

impl<T> Clone for Containers<T> {
    fn clone(&self) -> Self {
        Self {
            targets: self.targets.clone(),
            records: self.records.clone(),
            writing: Arc::clone(&self.writing),
        }
    }
}

impl<T> Containers<T> {
    /// None yet.
    #[must_use]
    pub fn new(records: Records<Original>) -> Self {
        Self {
            targets: Targets::default(),
            records,
            writing: Arc::default(),
        }
    }

    /// All of them.
    #[must_use]
    pub const fn targets(&self) -> &Targets<T> {
        &self.targets
    }

    /// Where it is written down.
    #[must_use]
    pub const fn records(&self) -> &Records<Original> {
        &self.records
    }

    /// Forgets a container: what is under way for it is not written down any more.
    pub fn forget(&self, cgroup: CgroupId) {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.targets.with(|targets| drop(targets.remove(&cgroup)));
    }
}

impl<T: Moved> Containers<T> {
    /// Changes what is known of a container, and writes it down. Several threads do: one at a time, or an older record
    /// would be written last. What cannot be written down is not changed.
    ///
    /// # Errors
    ///
    /// Why not, for people.
    pub fn change<R>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Original) -> R,
    ) -> Result<R, String> {
        const GONE: &str = "the container is gone";
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let original = self.targets.of(cgroup, |target| target.original().clone());
        let mut original = original.ok_or(GONE)?;
        let result = change(&mut original);
        self.records
            .write(&original)
            .map_err(|error| error.to_string())?;
        self.targets
            .of(cgroup, |target| *target.original_mut() = original)
            .ok_or(GONE)?;
        Ok(result)
    }
}
