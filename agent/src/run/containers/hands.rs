//! What the quotas thread does and tells, carried out and passed on.

use std::sync::Arc;

use bellows_core::{Cpu, Reason, boost::Boosts};
use tokio::sync::{Notify, mpsc};

use crate::{actuate::update::Updater, cgroup::Cgroup, quota::Setter};

/// Hands for the quotas thread.
#[derive(Debug)]
pub(in crate::run) struct Hands {
    pub(in crate::run) updater: Updater,
    /// To the watch: paths of cgroups that were made.
    pub(in crate::run) made: mpsc::Sender<String>,
    /// To the watch: the boosts of a container have changed.
    pub(in crate::run) boosted: Arc<Notify>,
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
            self.boosted.notify_one();
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
