//! One container: what of it is guarded, and what is done when its rules or its limits change.
//!
//! Memory and CPU are guarded each by itself: a container may have a limit for one, or a policy for one, or somebody
//! who sets one.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bellows_core::{
    Policy,
    boost::Boosts,
    elastic::{ContainerRules, Mode, Subject},
};
use tokio::time::Instant;

use super::{Watch, name, subject, text};
use crate::{
    actuate::{pod::Pod, update::Target},
    attribution::{self, CGROUP_ROOT},
    cgroup::Cgroup,
    cri::{Container, ContainerState, ContainerStatus, PodSandbox, resources},
    originals::Original,
    quota::Rules,
};

/// How soon a container is looked at again that could not be guarded, and how seldom at last.
const AGAIN: Duration = Duration::from_secs(1);
const SELDOM_AGAIN: Duration = Duration::from_secs(60);

/// A container that runs.
#[derive(Debug)]
pub(super) struct Known {
    /// How policies see it: a container's names and its pod's labels do not change.
    pub(super) subject: Subject,
    /// The uid of its pod.
    uid: String,
    /// `None` while nothing of it is guarded.
    pub(super) cgroup: Option<Cgroup>,
    pub(super) memory: Option<Policy>,
    /// Where it is and by which rules, if it is only watched.
    pub(super) watched: Option<(Cgroup, Policy, Mode)>,
    /// For its quota and its boosts.
    pub(super) rules: Option<Rules>,
    /// Whether it is made and has none of its programs yet.
    pub(super) is_starting: bool,
    pub(super) started_at: Option<SystemTime>,
    /// Why it is not guarded as it should be.
    refusal: Option<String>,
    /// When that is looked at again, and how long it was waited for.
    again: Option<(Instant, Duration)>,
    /// Whether a predecessor has left it, and may have raised it.
    is_left: bool,
    /// Whether the runtime may believe something else than a predecessor has set: it died before that was told.
    pub(super) is_in_doubt: bool,
}

impl Known {
    pub(super) fn new(container: &Container, pod: Option<&PodSandbox>, is_left: bool) -> Self {
        let uid = pod.and_then(|pod| Some(pod.metadata.as_ref()?.uid.clone()));
        Self {
            subject: subject(container, pod),
            uid: uid.unwrap_or_default(),
            cgroup: None,
            memory: None,
            watched: None,
            rules: None,
            is_starting: container.state() == ContainerState::ContainerCreated,
            started_at: None,
            refusal: None,
            again: None,
            is_left,
            is_in_doubt: is_left,
        }
    }

    /// Whether it is time to look at it.
    pub(super) fn is_due(&self) -> bool {
        self.cgroup.is_some() || self.again.is_none_or(|(again, _)| Instant::now() >= again)
    }

    /// When one that could not be found is looked for again.
    pub(super) fn again_at(&self) -> Option<Instant> {
        let again = self.again.filter(|_| self.cgroup.is_none());
        again.map(|(at, _)| at)
    }

    /// It runs: all of it is guarded from now on.
    pub(super) fn has_started(&mut self) {
        if self.is_starting {
            self.is_starting = false;
            self.again = None;
            self.started_at = Some(SystemTime::now());
        }
    }

    /// Its rules may have changed.
    pub(super) const fn look_again(&mut self) {
        self.again = None;
    }

    /// Takes note of how guarding it went; returns whether there is something new to tell.
    pub(super) fn went(&mut self, refusal: Option<String>) -> bool {
        let is_new = refusal.is_some() && self.refusal != refusal;
        self.again = refusal.as_ref().map(|_| {
            let before = self.again.filter(|_| !is_new);
            let wait = before.map_or(AGAIN, |(_, wait)| (wait * 2).min(SELDOM_AGAIN));
            (Instant::now() + wait, wait)
        });
        self.refusal = refusal;
        is_new
    }

    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }
}

impl Watch {
    /// Guards what the rules name, as they name it, and leaves alone what they do not.
    pub(super) async fn follow(
        &mut self,
        id: &str,
        rules: Option<&ContainerRules>,
    ) -> Result<(), String> {
        let memory = rules.and_then(|rules| rules.memory);
        let Some(known) = self.known.get(id) else {
            return Ok(());
        };
        let boosts = rules.is_some_and(|rules| !rules.boosts.is_empty());
        if known.is_starting {
            return if boosts {
                self.expect(id, rules).await
            } else {
                Ok(())
            };
        }
        let has_rules = rules.is_some_and(|rules| rules.memory.is_some() || rules.cpu.is_some());
        let cgroup = match known.cgroup.clone() {
            Some(cgroup) => cgroup,
            None if has_rules || boosts || known.is_left => self.open(id, boosts).await?,
            None => return Ok(()),
        };
        let cpu = self.follow_cpu(id, &cgroup, rules);
        let memory = self.follow_memory(id, &cgroup, memory).await;
        let targets = self.context.updater.targets();
        let is_left = targets.of(cgroup.id(), |target| {
            let original = &target.original;
            original.limit.is_none() && original.quota.is_none() && original.boosts.is_empty()
        });
        if is_left.unwrap_or(true) && !boosts {
            self.leave(id, &cgroup);
        }
        match (memory, cpu) {
            (Err(memory), Err(cpu)) => Err(format!("{memory}; {cpu}")),
            (memory, cpu) => memory.and(cpu),
        }
    }

    /// Waits for the first program of a container that is made. Its limits are set by its runtime before that, and
    /// what is written before them would be written over.
    async fn expect(&mut self, id: &str, rules: Option<&ContainerRules>) -> Result<(), String> {
        let Some(known) = self.known.get(id).filter(|known| known.rules.is_none()) else {
            return Ok(());
        };
        let cgroup = match known.cgroup.clone() {
            Some(cgroup) => cgroup,
            // Its cgroup is told of when it is made.
            None if self.place(id).is_none() => return Ok(()),
            None => self.open(id, true).await?,
        };
        self.follow_cpu(id, &cgroup, rules)
    }

    /// Finds a container, and what is written down of it. Nothing of it is guarded yet. The runtime is asked only where
    /// its answer is needed now: it takes as long as all the rest.
    async fn open(&mut self, id: &str, is_boosted: bool) -> Result<Cgroup, String> {
        let (cgroup, status) = self.find(id, is_boosted).await?;
        let started_at = status.as_ref().map(|status| status.started_at);
        let started_at = started_at.and_then(|at| u64::try_from(at).ok().filter(|&at| at > 0));
        let said = status.map(resources);
        let known = self.known.get(id).ok_or("it is gone")?;
        let (name, uid) = (name(&known.subject), known.uid.clone());
        let recorded = self.records().read(id);
        let original = recorded.unwrap_or_else(|| Original {
            id: id.to_owned(),
            name,
            limit: None,
            quota: None,
            boosts: Boosts::none(),
            has_begun: false,
            path: cgroup.path().to_owned(),
        });
        let pod = self.pod_of(&cgroup, &uid);
        let target = Target::new(cgroup.clone(), original, said, pod);
        let targets = self.context.updater.targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        if let Some(known) = self.known.get_mut(id) {
            known.cgroup = Some(cgroup.clone());
            known.started_at =
                started_at.map(|at| SystemTime::UNIX_EPOCH + Duration::from_nanos(at));
        }
        Ok(cgroup)
    }

    /// Finds the cgroup of a container, and what its runtime says of it where that was asked: only if it must be, or if
    /// `is_asked`.
    pub(super) async fn find(
        &self,
        id: &str,
        is_asked: bool,
    ) -> Result<(Cgroup, Option<ContainerStatus>), String> {
        let root = Path::new(CGROUP_ROOT);
        let mut path = self.place(id);
        let mut said = None;
        if is_asked || path.is_none() {
            let (status, process) = self.runtime().status(id).await.map_err(text)?;
            let by_process = process.and_then(|process| attribution::of_process(root, process, id));
            path = by_process.or(path);
            said = Some(status);
        }
        let path = path.or_else(|| attribution::find_container(root, id));
        let cgroup = Cgroup::open(&path.ok_or("it has no cgroup (yet)")?).map_err(text)?;
        Ok((cgroup, said))
    }

    /// Where it was made, unless that is in another's pod.
    fn place(&self, id: &str) -> Option<PathBuf> {
        let uid = &self.known.get(id)?.uid;
        let place = self.places.of(id)?;
        let pod = place.parent()?.file_name()?.to_string_lossy();
        let is_anothers = attribution::is_a_pod(&pod) && !attribution::is_pod(&pod, uid);
        (uid.is_empty() || !is_anothers).then_some(place)
    }

    /// Leaves a container alone that is at rest.
    fn leave(&mut self, id: &str, cgroup: &Cgroup) {
        if let Some(known) = self.known.get_mut(id) {
            known.is_left = false;
            known.cgroup = None;
            // What follows takes all of it out of the controller's hands.
            known.watched = None;
        }
        self.let_go(cgroup);
        self.records().remove(id);
    }

    /// Changes what is known of a container, and writes it down.
    pub(super) fn record<T>(
        &self,
        cgroup: &Cgroup,
        change: impl FnOnce(&mut Original) -> T,
    ) -> Result<T, String> {
        let changed = self.context.updater.change(cgroup.id(), change);
        changed.map_err(|refused| refused.why)
    }

    /// A container's pod, one for all of its containers: each moves its limit.
    fn pod_of(&mut self, cgroup: &Cgroup, uid: &str) -> Option<Arc<Pod>> {
        let path = cgroup.path().parent().filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            attribution::is_pod(&name, uid)
        })?;
        let known = self.pods.iter().find(|pod| pod.cgroup().path() == path);
        if let Some(known) = known {
            return Some(Arc::clone(known));
        }
        let cgroup = Cgroup::open(path).ok()?;
        let pod = Arc::new(Pod::new(cgroup, self.context.pods.clone()));
        self.pods.push(Arc::clone(&pod));
        Some(pod)
    }
}
