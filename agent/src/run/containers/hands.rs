//! What the quotas thread does and tells, carried out and passed on.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use bellows_core::{CgroupId, Cpu, Reason, boost::Boosts};
use tokio::sync::{Notify, mpsc};

use crate::{actuate::update::Updater, cgroup::Cgroup, quota::Setter};

/// Hands for the quotas thread.
#[derive(Debug)]
pub(in crate::run) struct Hands {
    pub(in crate::run) updater: Updater,
    /// To the watch: paths of cgroups that were made.
    pub(in crate::run) made: mpsc::Sender<String>,
    /// To the watch: what is lent of memory.
    pub(in crate::run) lent: Arc<Lent>,
}

/// Containers to which other memory is lent than before.
#[derive(Debug, Default)]
pub(in crate::run) struct Lent {
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

impl Setter for Hands {
    fn set(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), String> {
        self.updater.set_quota(cgroup, to, reason)
    }

    fn settle(&self, cgroup: &Cgroup) -> Result<(), String> {
        self.updater.settle_pod_of(cgroup)
    }

    fn boosted(&self, cgroup: &Cgroup, boosts: &Boosts) -> Result<(), String> {
        let changed = self.updater.change(cgroup.id(), |original| {
            original.has_begun |= !boosts.is_empty();
            let before = std::mem::replace(&mut original.boosts, boosts.clone());
            before.memory() != boosts.memory()
        });
        if changed.map_err(|refused| refused.why)? {
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
