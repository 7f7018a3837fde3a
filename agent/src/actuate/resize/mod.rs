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

mod answer;
mod change;
mod target;
mod way;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId, Nanos,
    allowance::{Bound, What},
    arbiter::Why,
    bucket::{Bucket, Urgency},
    decide::ByHand,
    pod::{MANAGER, way::Way},
    quantity,
};
use kube::{Api, Client};
use tokio::{
    runtime::Handle,
    sync::mpsc::UnboundedSender,
    task::spawn_blocking,
    time::{error::Elapsed, sleep, timeout},
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
    cgroup::{Cgroup, Limit},
    clock::now,
    guard::{Input, Refused, Requester, told_balance, told_bound, told_kill, told_raise, told_why},
    ledger::Record,
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

    /// A resize of something else in a pod begins: with it the kubelet sets the limit of the pod's cgroup, too, and may set
    /// those of all of its containers, to what the spec says then.
    fn begins_in(&self, uid: &str, own: Option<CgroupId>) -> Vec<(CgroupId, Bytes)> {
        self.targets.with(|targets| {
            let others = targets
                .iter_mut()
                .filter(|(id, target)| target.uid == uid && own != Some(**id));
            let begun = others.filter_map(|(&id, target)| {
                let comes = target.by_hand.or_else(|| target.in_spec())?;
                target.asking.push(comes);
                Some((id, comes))
            });
            begun.collect()
        })
    }

    /// Changes something else in a pod than a memory limit that is guarded; returns whether it may still come, too. What was raised by hand
    /// of memory goes with it.
    pub(crate) async fn patch_beside(
        &self,
        uid: &str,
        way: Way,
        named: (&str, &str),
        own: Change,
    ) -> (Result<kube::Result<Pod>, Elapsed>, bool) {
        if self.is_only_by_hand(uid, None) {
            return (Ok(Err(only_by_hand())), false);
        }
        let begun = self.begins_in(uid, None);
        let by_hand = self.by_hand_in(uid, |_| false);
        let changes: Vec<Change> = [own].into_iter().chain(by_hand).collect();
        let patch = limits_patch(uid, &changes);
        let patched = timeout(RESIZE_TIMEOUT, patched(&self.client, way, named, &patch)).await;
        let is_uncertain = is_uncertain(&patched);
        counted(&patched);
        if let Ok(Ok(patched)) = &patched {
            self.is_taken_in(uid, patched);
        }
        self.ends_in(begun, is_uncertain);
        (patched, is_uncertain)
    }

    /// Whether a patch of something else in a pod carries what was raised by hand: what refuses it may be that.
    pub(super) fn carries(&self, uid: &str) -> bool {
        !self.by_hand_in(uid, |_| false).is_empty()
    }

    /// It has ended.
    fn ends_in(&self, begun: Vec<(CgroupId, Bytes)>, is_uncertain: bool) {
        for (cgroup, comes) in begun {
            self.is_answered(cgroup, comes);
            if is_uncertain {
                self.note(cgroup, |target| target.may_come(comes));
            }
        }
    }

    /// What was raised by hand in a pod, for a patch of something else: with the next resize of any resource the kubelet sets
    /// what the spec says. But for those that the patch has anyway.
    fn by_hand_in(&self, uid: &str, has: impl Fn(CgroupId) -> bool) -> Vec<Change> {
        self.targets.with(|targets| {
            let own = targets
                .iter()
                .filter(|&(&id, target)| target.uid == uid && !has(id));
            own.filter_map(|(_, target)| target.by_hand_change())
                .collect()
        })
    }

    /// Whether something else in a pod is raised on the node, and no patch would say so.
    #[must_use]
    pub fn is_only_by_hand(&self, uid: &str, own: Option<CgroupId>) -> bool {
        self.targets.with(|targets| {
            let mut others = targets.iter();
            others.any(|(id, target)| {
                target.uid == uid && own != Some(*id) && target.is_only_by_hand()
            })
        })
    }

    /// Whether a memory limit of a pod stands above rest, or is about to.
    #[must_use]
    pub fn is_bursting(&self, uid: &str) -> bool {
        self.targets.with(|targets| {
            let mut own = targets.values().filter(|target| target.uid == uid);
            own.any(Target::is_bursting)
        })
    }

    /// Targets in one pod.
    fn of_pod(&self, uid: &str) -> Vec<CgroupId> {
        self.targets.with(|targets| {
            let own = targets.iter().filter(|(_, target)| target.uid == uid);
            own.map(|(&cgroup, _)| cgroup).collect()
        })
    }

    /// Lowers a limit to what the spec says all the time: nobody else would. Where limits are moved on the node alone, to
    /// whatever is wanted, and while nothing may be asked of the API because what somebody else has set is not recorded, to
    /// what the spec says at least: it would stay where it is for as long as that is refused.
    async fn is_lowered_by_hand(&self, cgroup: CgroupId, to: Bytes) -> Result<bool, Refused> {
        let raised = self.target(cgroup, |target| {
            let by_hand = target.by_hand?;
            let in_spec = target.in_spec()?;
            let is_said = to.page_floor() == in_spec;
            let is_above = !target.is_recorded && to.page_floor() > in_spec;
            let is_lowering = to < by_hand && (is_said || is_above || target.way == Way::Node);
            is_lowering.then(|| (target.cgroup.clone(), by_hand))
        })?;
        let Some((own, by_hand)) = raised else {
            return Ok(false);
        };
        let by_hands = self.by_hands.clone();
        let lowered = spawn_blocking(move || by_hands.lower(&own, to, || true)).await;
        let refused = |why: String| Refused {
            why,
            uncertain: false,
            is_passing: false,
        };
        match lowered.map(|lowered| lowered.map_err(|error| error.to_string())) {
            Ok(Ok(true)) => {
                let key = self
                    .targets
                    .of(cgroup, |target| target.is_lowered(by_hand, to));
                if let Some((uid, container)) = key.flatten() {
                    let key = (uid.as_str(), container.as_str());
                    self.allowances.lowered(key, What::MemoryLimit, to.0);
                }
                Ok(true)
            }
            Ok(Ok(false)) => Err(refused(
                "usage has grown meanwhile, or the limit was raised again".to_owned(),
            )),
            Ok(Err(why)) => Err(refused(why)),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// Sees to it that the API comes to say what was raised by hand.
    pub fn agree(&self, cgroup: CgroupId) {
        let is_new = self.targets.of(cgroup, |target| {
            !std::mem::replace(&mut target.is_agreeing, true)
        });
        if is_new == Some(true) {
            drop(self.runtime.spawn(self.clone().until_agreed(cgroup)));
        }
    }

    async fn until_agreed(self, cgroup: CgroupId) {
        let mut wait = AGREE;
        loop {
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_AGREE);
            match self.is_agreed(cgroup).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(refused) if refused.is_passing => {
                    tracing::debug!(
                        why = refused.why,
                        "the API does not say yet what was raised by hand"
                    );
                }
                Err(Refused { why, .. }) => {
                    tracing::warn!(
                        why,
                        "the API refuses what was raised by hand: it is lowered when the burst is over"
                    );
                    return self.note(cgroup, |target| {
                        target.is_agreeing = false;
                        target.is_refused = true;
                    });
                }
            }
        }
    }

    async fn is_agreed(&self, cgroup: CgroupId) -> Result<bool, Refused> {
        let order = self.target(cgroup, |target| Arc::clone(&target.order))?;
        self.may_ask(Urgency::Later).await;
        let _turn = order.lock().await;
        let by_hand = self.target(cgroup, |target| {
            target.is_agreeing = target.by_hand.is_some();
            target.by_hand
        })?;
        let Some(to) = by_hand else {
            return Ok(true);
        };
        self.note(cgroup, |target| target.asking.push(to));
        let resized = self.resize_in_turn(cgroup, to).await;
        self.is_answered(cgroup, to);
        resized.map(|()| false)
    }

    /// Lowerings of a pod's other containers that are not in force. The kubelet carries out all of a pod's resize or
    /// nothing (`validateMemoryResizeAction`, pkg/kubelet/kuberuntime/kuberuntime_manager.go, 1.37): a raise must not wait
    /// for a lowering that it refuses, so it takes that back. It is asked for again later. None for a lowering.
    fn lowerings_beside(
        &self,
        cgroup: CgroupId,
        to: Bytes,
    ) -> Result<BTreeMap<CgroupId, Change>, Refused> {
        let (uid, limit) = self.target(cgroup, |target| {
            (target.uid.clone(), quantity::parse(&target.limit))
        })?;
        if limit.is_ok_and(|limit| to <= limit) {
            return Ok(BTreeMap::new());
        }
        Ok(self.targets.with(|targets| {
            let beside = targets.iter();
            let beside = beside.filter(|(id, target)| **id != cgroup && target.uid == uid);
            let beside = beside.filter(|(_, target)| target.is_recorded);
            let waiting = beside.filter_map(|(&id, target)| {
                let Limit::At(in_force) = target.cgroup.limit("memory.max").ok()? else {
                    return None;
                };
                let in_spec = target.in_spec()?;
                let to = quantity::format(in_force);
                let change = Change::memory(target.level, target.limit.clone(), to);
                (in_spec < in_force).then_some((id, change))
            });
            waiting.collect()
        }))
    }
}

impl Requester for Resizer {
    fn bound(&self, cgroup: CgroupId) -> Option<Bound> {
        let (uid, container) = self.targets.of(cgroup, |target| target.key())?;
        self.allowances.memory((&uid, &container))
    }

    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, _patience: Nanos) {
        let id = cgroup.id();
        if let Some((uid, container)) = self.targets.of(id, |target| target.key()) {
            self.allowances.ask_memory((&uid, &container), to);
        }
        if self.targets.of(id, |target| target.way) != Some(Way::Node) {
            return self.send(id, to, Urgency::Urgent);
        }
        if let Err(why) = self.raise_by_hand(cgroup, to) {
            let result = Err(Refused {
                why,
                uncertain: false,
                is_passing: true,
            });
            // A controller that has ended needs no answer, and one that is late asks again.
            drop(self.inputs.try_send(Input::Answered {
                cgroup: id,
                to,
                result,
            }));
        }
    }

    fn lower(&mut self, cgroup: &Cgroup, to: Bytes) {
        self.send(cgroup.id(), to, Urgency::Later);
    }

    fn take_back(&mut self, cgroup: &Cgroup, to: Bytes, limit: Bytes) {
        self.is_not_taken(cgroup.id(), to, true);
        self.send(cgroup.id(), limit, Urgency::Later);
    }

    fn by_hand(&self, cgroup: CgroupId, to: Bytes) -> ByHand {
        let may = self.targets.of(cgroup, |target| {
            (target.may_be_raised_by_hand(to), target.cgroup.clone())
        });
        match may {
            Some((may, cgroup)) if may == ByHand::No || !cgroup.is_pinned() => may,
            Some(_) | None => ByHand::No,
        }
    }

    fn raise_by_hand(&mut self, cgroup: &Cgroup, to: Bytes) -> Result<(), String> {
        let id = cgroup.id();
        let target = self.targets.of(id, |target| target.clone());
        let target = target.ok_or("the pod is gone")?;
        let before = target.in_spec().ok_or("its limit is no size")?;
        let to = to.page_floor();
        self.by_hands
            .raise(&target.cgroup, to, before, target.pod_follows)?;
        self.note(id, |target| {
            target.by_hand = Some(to);
            target.is_refused = false;
        });
        if target.way == Way::Node {
            return Ok(());
        }
        self.agree(id);
        let note = format!(
            "container {}: limit raised to {to} on the node, before the API",
            target.container
        );
        // A watch that has ended tells nobody.
        drop(self.observed.send((id, Observed::ByHand(note))));
        Ok(())
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
        let observed = match record {
            Record::ObservedKill { kill, .. } => Observed::Kill(told_kill(kill)),
            Record::WouldRaise { would, .. } => Observed::Raise(told_raise(would)),
            Record::Waits {
                wanted,
                why,
                behind,
                ..
            } => {
                let note = told_why(*wanted, *why, behind.as_deref());
                match why {
                    Why::KeptForBursts(..) | Why::Leaks => Observed::Stopped(note),
                    _ => Observed::Waits(note),
                }
            }
            Record::Lends { balance, .. } => Observed::Waits(told_balance(balance)),
            Record::Bounded {
                wanted,
                reason,
                why,
                ..
            } => Observed::Bounded(reason.reason(), told_bound(*wanted, why)),
            _ => return,
        };
        // A watch that has ended tells nobody.
        drop(self.observed.send((cgroup.id(), observed)));
    }

    fn not_guarded(&mut self, cgroup: CgroupId) {
        // A watch that has ended tries nobody again.
        drop(self.observed.send((cgroup, Observed::NotGuarded)));
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path, process, sync::mpsc::sync_channel};

    use super::*;
    use crate::actuate::resize::target::tests::target;

    /// Of an API server that is not there.
    fn resizer() -> Resizer {
        let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let (inputs, _controller) = sync_channel(1);
        let (observed, _watch) = tokio::sync::mpsc::unbounded_channel();
        let client = Client::try_from(nowhere).unwrap();
        Resizer::new(client, Handle::current(), inputs, observed)
    }

    #[tokio::test]
    async fn nothing_is_raised_by_hand_that_a_runtime_would_undo() {
        let directory = env::temp_dir().join(format!("bellows-may-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let resizer = resizer();
        let target = Target {
            cgroup: Cgroup::open(&directory).unwrap(),
            ..target()
        };
        resizer
            .targets
            .with(|targets| targets.insert(CgroupId(1), target));
        let may = |cpus: &str| {
            fs::write(directory.join("cpuset.cpus"), cpus).unwrap();
            resizer.by_hand(CgroupId(1), Bytes::mib(128))
        };
        assert_eq!(may("\n"), ByHand::Yes);
        assert_eq!(may("0-2\n"), ByHand::No);
        assert_eq!(resizer.by_hand(CgroupId(2), Bytes::mib(128)), ByHand::No);
        fs::remove_dir_all(&directory).unwrap();
    }

    /// What is asked of the API server fails otherwise.
    #[tokio::test]
    async fn nothing_of_a_pod_is_resized_while_a_limit_is_raised_on_the_node_alone() {
        let resizer = resizer();
        let asked = async |change: &dyn Fn(&mut Target)| {
            let mut first = target();
            change(&mut first);
            let of = |id| Cgroup::stand_in(Path::new("/nowhere"), CgroupId(id));
            let other = Target {
                cgroup: of(2),
                ..target()
            };
            resizer.targets.with(|targets| {
                targets.insert(CgroupId(1), first);
                targets.insert(CgroupId(2), other);
            });
            let own = Change::memory_request(0, "32Mi".to_owned(), "16Mi".to_owned());
            let named = ("dev", "workspace");
            let (patched, _) = resizer.patch_beside("u", Way::Resize, named, own).await;
            let raised = resizer.patch(CgroupId(2), Bytes::mib(128), BTreeMap::new());
            let is_asked = !matches!(patched, Ok(Err(kube::Error::Api(_))));
            let is_raised = raised.await.unwrap_err().1.is_none();
            assert_eq!(is_asked, is_raised);
            is_asked
        };
        assert!(asked(&|_| {}).await);
        assert!(asked(&|target| target.by_hand = Some(Bytes::mib(128))).await);
        let on_the_node = |target: &mut Target| {
            target.by_hand = Some(Bytes::mib(128));
            target.way = Way::Node;
        };
        assert!(!asked(&on_the_node).await);
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

    #[tokio::test]
    async fn what_was_raised_by_hand_comes_down_while_nothing_is_recorded() {
        let resizer = resizer();
        let by_hand = Bytes::mib(512);
        let lowered = async |is_recorded, to| {
            let raised = Target {
                by_hand: Some(by_hand),
                is_recorded,
                ..target()
            };
            let targets = &resizer.targets;
            targets.with(|targets| targets.insert(CgroupId(1), raised));
            let is_lowered = resizer
                .is_lowered_by_hand(CgroupId(1), Bytes::mib(to))
                .await;
            let left = targets.of(CgroupId(1), |target| target.by_hand);
            (is_lowered.unwrap(), left.flatten())
        };
        assert_eq!(lowered(true, 256).await, (false, Some(by_hand)));
        assert_eq!(lowered(false, 256).await, (true, Some(Bytes::mib(256))));
        assert_eq!(lowered(false, 64).await, (true, None));
        // The spec would still say more.
        assert_eq!(lowered(false, 32).await, (false, Some(by_hand)));
    }
}
