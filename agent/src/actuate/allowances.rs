//! What namespaces allow, shared: the watch of pods knows it, the controller and the quotas thread ask before they raise, and
//! whoever asks the API notes what has become of it.
//!
//! No lock outlasts a call, and none is held while another is waited for.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use bellows_core::{
    Bytes, Cpu,
    allowance::{Allowances, Bound, What},
};

use crate::{
    attribution::{api::Pod, counted::counted},
    clock::now,
};

/// Of one agent; clones share them.
#[derive(Clone, Debug, Default)]
pub struct SharedAllowances {
    all: Arc<Mutex<Allowances>>,
    is_known: Arc<AtomicBool>,
}

/// A container: its pod's uid, and its name.
type Key<'a> = (&'a str, &'a str);

impl SharedAllowances {
    /// All of them.
    pub fn with<R>(&self, change: impl FnOnce(&mut Allowances) -> R) -> R {
        change(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether it is known what namespaces allow: before that nothing may be raised without the API.
    #[must_use]
    pub fn are_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// Whether it is.
    pub fn known(&self, is_known: bool) {
        self.is_known.store(is_known, Ordering::Relaxed);
    }

    /// What bounds a memory limit now.
    #[must_use]
    pub fn memory(&self, key: Key<'_>) -> Option<Bound> {
        self.with(|all| all.most(key, What::MemoryLimit, now()))
    }

    /// What bounds a CPU limit now.
    #[must_use]
    pub fn cpu(&self, key: Key<'_>) -> Option<Bound> {
        self.with(|all| all.most(key, What::CpuLimit, now()))
    }

    /// A memory limit is asked for.
    pub fn ask_memory(&self, key: Key<'_>, to: Bytes) {
        self.ask(key, What::MemoryLimit, to.0);
    }

    /// A memory request is asked for.
    pub fn ask_request(&self, key: Key<'_>, to: Bytes) {
        self.ask(key, What::MemoryRequest, to.0);
    }

    /// As much of a memory request as is allowed.
    #[must_use]
    pub fn request_up_to(&self, key: Key<'_>, to: Bytes) -> Bytes {
        let bound = self.with(|all| all.most(key, What::MemoryRequest, now()));
        bound.map_or(to, |bound| to.min(Bytes(bound.most)))
    }

    /// The least that a memory request may become beside a limit of this much.
    #[must_use]
    pub fn least_request(&self, key: Key<'_>, limit: Bytes) -> Bytes {
        Bytes(self.with(|all| all.least_request(key, limit.0)))
    }

    /// A CPU limit will be.
    pub fn ask_cpu(&self, key: Key<'_>, to: Cpu) {
        self.ask(key, What::CpuLimit, to.0);
    }

    fn ask(&self, key: Key<'_>, what: What, to: u64) {
        self.with(|all| {
            all.settle(now());
            all.ask(key, what, to);
        });
    }

    /// What was asked for has not come; if that is uncertain it may yet.
    pub fn refused(&self, key: Key<'_>, what: What, to: u64, is_uncertain: bool) {
        let at = is_uncertain.then(now);
        self.with(|all| all.refused(key, what, to, at));
    }

    /// What was raised without the API has come down.
    pub fn lowered(&self, key: Key<'_>, what: What, to: u64) {
        self.with(|all| all.lowered(key, what, to));
    }

    /// The API has taken a pod.
    pub fn taken(&self, pod: &Pod) {
        self.with(|all| all.taken(counted(pod), now()));
    }
}
