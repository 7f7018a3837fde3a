//! What the quotas thread does and tells, carried out and passed on.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use bellows_core::{CgroupId, Cpu, Reason, boost::Boosts};
use tokio::sync::{Notify, mpsc};

use crate::{
    actuate::containers::Owner,
    cgroup::Cgroup,
    quota::{Most, NotSet, Setter},
};

/// Cgroups that were made and not looked at yet, at most.
pub(super) const MADE: usize = 4096;

/// Hands for the quotas thread.
#[derive(Debug)]
pub(super) struct Hands<O> {
    /// Who writes quotas, and tells whoever owns them.
    pub(super) owner: O,
    /// To the watch: paths of cgroups that were made.
    pub(super) made: mpsc::Sender<String>,
    /// To the watch: what is lent of memory.
    pub(super) lent: Arc<Lent>,
}

/// Containers to which other memory is lent than before.
#[derive(Debug, Default)]
pub(super) struct Lent {
    cgroups: Mutex<BTreeSet<CgroupId>>,
    woken: Notify,
}

impl Lent {
    fn add(&self, cgroup: CgroupId) {
        let mut cgroups = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        cgroups.insert(cgroup);
        self.woken.notify_one();
    }

    /// Waits for one.
    pub(super) async fn wait(&self) {
        self.woken.notified().await;
    }

    /// Takes those that have come.
    pub(super) fn take(&self) -> BTreeSet<CgroupId> {
        let mut cgroups = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut cgroups)
    }
}

impl<O: Owner> Setter for Hands<O> {
    fn set(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet> {
        self.owner.set_quota(cgroup, to, reason)
    }

    fn most(&self, cgroup: CgroupId) -> Option<Most> {
        self.owner.most(cgroup)
    }

    fn rests(&self, cgroup: &Cgroup, at_rest: Cpu) {
        self.owner.rests(cgroup, at_rest);
    }

    fn settle(&self, cgroup: &Cgroup) -> Result<(), String> {
        self.owner.containers().settle_pod_of(cgroup)
    }

    fn boosted(&self, cgroup: &Cgroup, boosts: &Boosts) -> Result<(), String> {
        let changed = self.owner.containers().change(cgroup.id(), |original| {
            original.has_begun |= !boosts.is_empty();
            let before = std::mem::replace(&mut original.boosts, boosts.clone());
            before.memory() != boosts.memory()
        });
        if changed? {
            self.lent.add(cgroup.id());
        }
        Ok(())
    }

    fn created(&self, path: String) {
        // Where more are made than are looked at, the runtime is asked.
        if let Err(error) = self.made.try_send(path) {
            tracing::debug!(%error, "a cgroup is not told of");
        }
    }
}
