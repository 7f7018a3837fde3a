//! What is asked for whom: shared between whoever watches pods or containers and the requests on their way.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use bellows_core::CgroupId;

/// Targets of requests by the cgroup that is guarded; clones share them. No lock outlasts a call.
#[derive(Debug)]
pub struct Targets<T>(Arc<Mutex<BTreeMap<CgroupId, T>>>);

impl<T> Targets<T> {
    /// All of them.
    pub fn with<R>(&self, change: impl FnOnce(&mut BTreeMap<CgroupId, T>) -> R) -> R {
        // Whoever panicked with the lock has changed one target at most.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One of them; `None` if it is gone.
    pub fn of<R>(&self, cgroup: CgroupId, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.with(|targets| targets.get_mut(&cgroup).map(change))
    }
}

impl<T> Clone for Targets<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Targets<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}
