//! Changing a pod's limit through the API, in the way that the cluster knows ([`bellows_core::pod::way`]).
//!
//! A JSON patch with a `test` on the old value, so that a change by somebody else is a conflict and
//! not overwritten; a resourceVersion would conflict with every status update. Only memory limits
//! are touched: one container's, and those of others beside it whose lowering is taken back. The patch returning means
//! that the API has taken it; that it is in force is seen in the cgroup, which is why success is not answered here.
//!
//! Where the API is away, late or busy the limit is raised by hand ([`super::by_hand`]), and the API asked again and again
//! until it says the same, or the burst is over. A refusal is not overridden. Where the API can change no limit at all, or
//! not lower it again, the limit is moved on the node alone.

mod agree;
mod answer;
mod beside;
mod change;
mod requester;
mod target;
mod way;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId,
    allowance::What,
    bucket::{Bucket, Urgency},
    pod::MANAGER,
    quantity,
};
use kube::{Api, Client};
use tokio::{
    runtime::Handle,
    sync::mpsc::UnboundedSender,
    time::{sleep, timeout},
};

pub(crate) use answer::{code_of, is_uncertain};
use answer::{counted, only_by_hand, refusal, silent, unrecorded};
pub use change::{Change, limits_patch, parameters};
pub(crate) use change::{pointer, test, test_uid};
pub(crate) use target::CARRIED_OUT;
pub use target::{Order, Target};
pub use way::{Probed, Ways, patched};

use super::{allowances::SharedAllowances, by_hand::ByHands, targets::Targets};
use crate::{
    attribution::{
        api::Pod,
        pods::{limit_at, limit_manager},
    },
    clock::now,
    guard::{Input, Refused},
    metrics::METRICS,
};

/// Longest time that the API may take to answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a resize: until it has answered, what it was asked for may come, and no other limit can be written by hand.
pub(super) const RESIZE_TIMEOUT: Duration = Duration::from_secs(8);
/// How soon the API is asked again to say what was raised by hand, and how seldom at last.
const AGREE: Duration = Duration::from_millis(500);
const LONGEST_AGREE: Duration = Duration::from_secs(5);

/// Sends resizes.
#[derive(Clone)]
pub struct Resizer {
    client: Client,
    ways: Ways,
    runtime: Handle,
    targets: Targets<Target>,
    inputs: SyncSender<Input>,
    observed: UnboundedSender<(CgroupId, Observed)>,
    by_hands: ByHands,
    bucket: Arc<Mutex<Bucket>>,
    allowances: SharedAllowances,
}

/// What the watch of pods is told of a container.
#[derive(Clone, Debug)]
pub enum Observed {
    /// It is neither guarded nor watched, although it should be.
    NotGuarded,
    /// A kill.
    Kill(String),
    /// A raise that it would have got.
    Raise(String),
    /// It was raised without the API.
    ByHand(String),
    /// There is no room for its raise.
    Waits(String),
    /// It may never end, and is not raised for that.
    Stopped(String),
    /// Its namespace does not allow its raise: the reason, and what to do.
    Bounded(&'static str, String),
}

impl std::fmt::Debug for Resizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Resizer").finish_non_exhaustive()
    }
}

impl Resizer {
    /// A requester for a node's pods.
    #[must_use]
    pub fn new(
        client: Client,
        runtime: Handle,
        inputs: SyncSender<Input>,
        observed: UnboundedSender<(CgroupId, Observed)>,
    ) -> Self {
        Self {
            ways: Ways::new(client.clone()),
            client,
            runtime,
            targets: Targets::default(),
            inputs,
            observed,
            by_hands: ByHands::default(),
            bucket: Arc::new(Mutex::new(Bucket::full(now()))),
            allowances: SharedAllowances::default(),
        }
    }

    /// How limits are changed here.
    #[must_use]
    pub const fn ways(&self) -> &Ways {
        &self.ways
    }

    /// What namespaces allow.
    #[must_use]
    pub const fn allowances(&self) -> &SharedAllowances {
        &self.allowances
    }

    /// Limits that were written by hand.
    #[must_use]
    pub const fn by_hands(&self) -> &ByHands {
        &self.by_hands
    }

    /// What was raised by hand and nobody guards any more has come down.
    pub fn are_lowered(&self) {
        let guarded: BTreeSet<(String, String)> = self
            .targets
            .with(|targets| targets.values().map(Target::key).collect());
        self.allowances.with(|all| {
            all.only_raised(What::MemoryLimit, |uid, container| {
                guarded.contains(&(uid.to_owned(), container.to_owned()))
            });
        });
    }

    /// A limit is somebody else's: what was written by hand is not ours to undo.
    pub fn is_theirs(&self, cgroup: CgroupId) {
        let path = self.targets.of(cgroup, |target| {
            target.by_hand = None;
            target.cgroup.path().to_owned()
        });
        if let Some(path) = path {
            self.by_hands.forget(&path);
        }
    }

    /// What may be asked for.
    #[must_use]
    pub const fn targets(&self) -> &Targets<Target> {
        &self.targets
    }

    fn send(&self, cgroup: CgroupId, to: Bytes, urgency: Urgency) {
        let this = self.clone();
        let number = self.targets.of(cgroup, |target| {
            target.asking.push(to);
            target.latest += 1;
            target.latest
        });
        let number = number.unwrap_or_default();
        self.runtime.spawn(async move {
            let result = this.resize(cgroup, to, number, urgency).await;
            this.is_answered(cgroup, to);
            // One that was taken is not refused any more.
            let is_uncertain = result.as_ref().is_err_and(|refused| refused.uncertain);
            this.is_not_taken(cgroup, to, is_uncertain);
            if result.is_err() {
                // A controller that has ended needs no answer.
                drop(this.inputs.try_send(Input::Answered { cgroup, to, result }));
            }
        });
    }

    /// Waits until the API may be asked for a change. It bounds what this node asks of it, its urgent changes first.
    pub(crate) async fn may_ask(&self, urgency: Urgency) {
        loop {
            let taken = {
                let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.take(now(), urgency)
            };
            match taken {
                Ok(()) => return,
                Err(wait) => {
                    METRICS.api_waits.inc();
                    sleep(Duration::from_nanos(wait.0)).await;
                }
            }
        }
    }

    fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        self.targets.of(cgroup, change).ok_or_else(|| Refused {
            why: "the pod is gone".to_owned(),
            uncertain: false,
            is_passing: false,
        })
    }

    async fn resize(
        &self,
        cgroup: CgroupId,
        to: Bytes,
        number: u64,
        urgency: Urgency,
    ) -> Result<(), Refused> {
        let order = self.target(cgroup, |target| Arc::clone(&target.order))?;
        self.may_ask(urgency).await;
        let _turn = order.lock().await;
        // A lowering that was kept waiting must not come after the raise that answers it.
        if self.target(cgroup, |target| target.latest)? != number {
            return Ok(());
        }
        if self.is_lowered_by_hand(cgroup, to).await? {
            return Ok(());
        }
        self.resize_in_turn(cgroup, to).await
    }

    async fn resize_in_turn(&self, cgroup: CgroupId, to: Bytes) -> Result<(), Refused> {
        let beside = self.lowerings_beside(cgroup, to)?;
        let is_alone = beside.is_empty();
        let first = self.patch(cgroup, to, beside).await;
        // 422: the test on the old value failed, or the value itself is refused. If the value in the
        // spec is ours, it was the former, and only our knowledge was old.
        match first {
            // What is known of those beside it may be old, too.
            Err((refused, Some(422))) if self.catch_up(cgroup).await? || !is_alone => {
                tracing::debug!(
                    why = refused.why,
                    "patching again from the value in the spec"
                );
                let patched = self.patch(cgroup, to, BTreeMap::new()).await;
                patched.map_err(|(refused, _)| refused)
            }
            result => result.map_err(|(refused, _)| refused),
        }
    }

    /// Reads the limit in the spec; returns whether it is a value of ours that we did not know of.
    async fn catch_up(&self, cgroup: CgroupId) -> Result<bool, Refused> {
        let target = self.target(cgroup, |target| target.clone())?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let pod = match timeout(RESIZE_TIMEOUT, pods.get(&target.name)).await {
            Ok(Ok(pod)) => pod,
            Ok(Err(error)) => return Err(refusal(&error).0),
            Err(_elapsed) => return Err(silent()),
        };
        let mut is_any_new = false;
        for own in self.of_pod(&target.uid) {
            let theirs = self.targets.of(own, |target| {
                let limit = limit_at(&pod, target.level)?;
                let manager = limit_manager(&pod, &target.container);
                let is_ours = manager.as_deref() == Some(MANAGER);
                let is_new = target.limit != limit;
                if is_new && !is_ours && own == cgroup {
                    // Whoever watches the pod takes it over.
                    return None;
                }
                is_any_new |= is_new;
                target.is_told(limit, manager.as_deref());
                // Whatever was asked for, it has come or will not.
                target.uncertain = None;
                if let Some(limit) = target.in_spec() {
                    target.takes(limit);
                }
                let is_theirs = is_new && !is_ours && target.by_hand.take().is_some();
                is_theirs.then(|| target.cgroup.path().to_owned())
            });
            if let Some(path) = theirs.flatten() {
                self.by_hands.forget(&path);
            }
        }
        Ok(is_any_new)
    }

    async fn patch(
        &self,
        cgroup: CgroupId,
        to: Bytes,
        beside: BTreeMap<CgroupId, Change>,
    ) -> Result<(), (Refused, Option<u16>)> {
        let (target, value) = self
            .target(cgroup, |target| {
                let (original, text) = &target.original;
                let value = if to == *original {
                    text.clone()
                } else {
                    quantity::format(to)
                };
                (target.clone(), value)
            })
            .map_err(|refused| (refused, None))?;
        if !target.is_recorded {
            return Err((unrecorded(), None));
        }
        if self.is_only_by_hand(&target.uid, Some(cgroup)) {
            return Err(refusal(&only_by_hand()));
        }
        let own = Change::memory(target.level, target.limit.clone(), value.clone());
        let begun = self.begins_in(&target.uid, Some(cgroup));
        let has = |id| id == cgroup || beside.contains_key(&id);
        let by_hand = self.by_hand_in(&target.uid, has);
        let others = beside.values().chain(&by_hand).cloned();
        let changes: Vec<Change> = [own].into_iter().chain(others).collect();
        let patch = limits_patch(&target.uid, &changes);
        let named = (target.namespace.as_str(), target.name.as_str());
        let patched = patched(&self.client, target.way, named, &patch);
        let patched = timeout(RESIZE_TIMEOUT, patched).await;
        counted(&patched);
        let (refused, code) = match patched {
            Ok(Ok(patched)) => {
                for (cgroup, change) in beside {
                    self.note(cgroup, |target| target.limit = change.to);
                }
                self.is_taken_in(&target.uid, &patched);
                self.ends_in(begun, false);
                return Ok(());
            }
            Ok(Err(error)) => refusal(&error),
            Err(_elapsed) => (silent(), None),
        };
        self.ends_in(begun, refused.uncertain);
        if refused.uncertain {
            self.note(cgroup, |target| target.may_come(to));
        }
        let (namespace, name, why) = (&target.namespace, &target.name, &refused.why);
        let why = format!("resize of {namespace}/{name} to {value}: {why}");
        Err((Refused { why, ..refused }, code))
    }

    fn is_answered(&self, cgroup: CgroupId, to: Bytes) {
        self.note(cgroup, |target| {
            let asked = target.asking.iter().position(|&asked| asked == to);
            if let Some(index) = asked {
                target.asking.remove(index);
            }
        });
    }

    /// What was asked for and not taken counts no more, or, if that is uncertain, not for long.
    fn is_not_taken(&self, cgroup: CgroupId, to: Bytes, is_uncertain: bool) {
        let key = self.targets.of(cgroup, |target| target.key());
        let is_raised = self
            .targets
            .of(cgroup, |target| target.by_hand == Some(to.page_floor()));
        // One that is in force all the same counts until it is lowered.
        if let Some((uid, container)) = key.filter(|_| is_raised != Some(true)) {
            let key = (uid.as_str(), container.as_str());
            self.allowances
                .refused(key, What::MemoryLimit, to.0, is_uncertain);
        }
    }

    /// Changes a target; one that is gone needs no change.
    fn note(&self, cgroup: CgroupId, change: impl FnOnce(&mut Target)) {
        self.targets.of(cgroup, change);
    }

    /// The API has taken a resize of the pod of a target.
    fn is_taken(&self, cgroup: CgroupId, patched: &Pod) {
        let agreed = self.targets.of(cgroup, |target| {
            let limit = limit_at(patched, target.level)?;
            target.is_told(limit, limit_manager(patched, &target.container).as_deref());
            target.uncertain = None;
            let in_spec = target.in_spec()?;
            target.takes(in_spec);
            // One that was written since the request was made is asked for again.
            target.by_hand.take_if(|by_hand| *by_hand <= in_spec)?;
            target.is_refused = false;
            Some((target.cgroup.path().to_owned(), in_spec))
        });
        if let Some((path, in_spec)) = agreed.flatten() {
            self.by_hands.is_known(&path, in_spec);
        }
    }

    /// The API has taken a resize of this pod.
    fn is_taken_in(&self, uid: &str, patched: &Pod) {
        self.allowances.taken(patched);
        for cgroup in self.of_pod(uid) {
            self.is_taken(cgroup, patched);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process, sync::mpsc::sync_channel};

    use super::*;
    use crate::{actuate::resize::target::tests::target, cgroup::Cgroup};

    /// Of an API server that is not there.
    pub(super) fn resizer() -> Resizer {
        let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let (inputs, _controller) = sync_channel(1);
        let (observed, _watch) = tokio::sync::mpsc::unbounded_channel();
        let client = Client::try_from(nowhere).unwrap();
        Resizer::new(client, Handle::current(), inputs, observed)
    }

    #[tokio::test]
    async fn what_somebody_else_has_set_is_not_changed_before_it_is_recorded() {
        let directory = env::temp_dir().join(format!("bellows-theirs-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let raised = Bytes::mib(256).0.to_string();
        fs::write(directory.join("memory.max"), raised).unwrap();
        let resizer = resizer();
        let asked = async |is_recorded| {
            let theirs = Target {
                cgroup: Cgroup::open(&directory).unwrap(),
                is_recorded,
                ..target()
            };
            resizer.targets.with(|targets| {
                targets.insert(CgroupId(1), theirs);
                targets.insert(CgroupId(2), target());
            });
            let patched = resizer.patch(CgroupId(1), Bytes::mib(128), BTreeMap::new());
            let (refused, _) = patched.await.unwrap_err();
            assert!(refused.is_passing && !refused.uncertain);
            let beside = resizer.lowerings_beside(CgroupId(2), Bytes::mib(128));
            (refused.why != unrecorded().why, beside.unwrap().len())
        };
        assert_eq!(asked(true).await, (true, 1));
        assert_eq!(asked(false).await, (false, 0));
        fs::remove_dir_all(&directory).unwrap();
    }
}
