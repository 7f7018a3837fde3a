//! Containers whose policy only watches (modes Observe and Recommend).
//!
//! They are not in the updater's table, so nobody can move a limit of theirs, and nothing is written down of them.

use bellows_core::{
    Policy, Signals,
    elastic::{MemoryRules, Mode},
};

use super::{Watch, name, text};
use crate::{
    cgroup::{Cgroup, Limit},
    guard::{Input, Watching},
};

impl Watch {
    /// Watches a container by its rules, or watches it no more.
    pub(super) async fn follow_watched(
        &mut self,
        id: &str,
        rules: Option<(Mode, MemoryRules)>,
    ) -> Result<(), String> {
        let Some(known) = self.known.get(id).filter(|known| !known.is_starting) else {
            return Ok(());
        };
        let Some((mode, rules)) = rules.filter(|_| known.memory.is_none()) else {
            self.stop_watching(id);
            return Ok(());
        };
        // Without programs growth is seen only where it is braked.
        if self.context.signals == Signals::Files {
            return Ok(());
        }
        let before = known.watched.clone();
        let cgroup = match &before {
            Some((cgroup, ..)) => cgroup.clone(),
            None => self.find(id, false).await?.0,
        };
        let Limit::At(limit) = cgroup.limit("memory.max").map_err(text)? else {
            // There is nothing that it could be killed at.
            self.stop_watching(id);
            return Ok(());
        };
        let policy = match self.policy(limit, Some(rules), None) {
            Ok(policy) => policy,
            Err(why) => {
                self.stop_watching(id);
                return Err(why);
            }
        };
        let is_same = |(_, before, was): (Cgroup, Policy, Mode)| (before, was) == (policy, mode);
        if before.is_some_and(is_same) {
            return Ok(());
        }
        let Some(known) = self.known.get_mut(id) else {
            return Ok(());
        };
        known.watched = Some((cgroup.clone(), policy, mode));
        let container = name(&known.subject);
        let path = cgroup.path().display();
        tracing::info!(container, id, %path, ?mode, "watched");
        self.send(Input::Observe(Watching {
            cgroup,
            policy,
            name: container,
            recommends: mode == Mode::Recommend,
        }));
        Ok(())
    }

    /// Watches it no more.
    pub(super) fn stop_watching(&mut self, id: &str) {
        let watched = self.known.get_mut(id);
        let watched = watched.and_then(|known| known.watched.take());
        if let Some((cgroup, ..)) = watched {
            self.send(Input::Forget(cgroup.id()));
        }
    }
}
