//! Changing a pod's limit through the API: the `resize` subresource (Kubernetes 1.33 and later).
//!
//! A JSON patch with a `test` on the old value, so that a change by somebody else is a conflict and
//! not overwritten; a resourceVersion would conflict with every status update. Only memory limits
//! are touched: one container's, and those of others beside it whose lowering is taken back. The patch returning means
//! that the API has taken it; that it is in force is seen in the cgroup, which is why success is not answered here.
//!
//! Where the API is away, late or busy the limit is raised by hand ([`super::by_hand`]), and the API asked again and again
//! until it says the same, or the burst is over. A refusal is not overridden.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId,
    bucket::{Bucket, Urgency},
    decide::ByHand,
    pod::{self, Level, MANAGER, Wish},
    quantity,
};
use json_patch::{PatchOperation, ReplaceOperation, TestOperation, jsonptr::PointerBuf};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::{
    runtime::Handle,
    sync::mpsc::UnboundedSender,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::{by_hand::ByHands, targets::Targets};
use crate::{
    attribution::{
        api::Pod,
        pods::{limit_at, limit_manager},
    },
    cgroup::{Cgroup, Limit},
    clock::now,
    guard::{Input, Refused, Requester, told_kill, told_raise, told_why},
    ledger::Record,
    metrics::{self, Call, METRICS},
};

/// Longest time that the API may take to answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a resize: until it has answered, what it was asked for may come, and no other limit can be written by hand.
pub(super) const RESIZE_TIMEOUT: Duration = Duration::from_secs(8);
/// For so long the kubelet may be about to carry out what the API has taken (0.3 to 1.5 s on an idle node).
const CARRIED_OUT: Duration = Duration::from_secs(2);
/// How soon the API is asked again to say what was raised by hand, and how seldom at last.
const AGREE: Duration = Duration::from_millis(500);
const LONGEST_AGREE: Duration = Duration::from_secs(5);

/// Where a guarded cgroup's limit is written in the API.
#[derive(Clone, Debug)]
pub struct Target {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its uid: another may have its name.
    pub uid: String,
    /// The guarded cgroup.
    pub cgroup: Cgroup,
    /// The container.
    pub container: String,
    /// Where its limit stands in the spec.
    pub level: Level,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// The limit at rest, as it was written: what to write back.
    pub original: (Bytes, String),
    /// The limit that was written by hand and that the spec does not say.
    pub by_hand: Option<Bytes>,
    /// Whether the limit of the pod's cgroup is the sum of its containers', and not the spec's own.
    pub pod_follows: bool,
    /// Whether the kubelet says that it cannot have what the spec says: there is no room.
    pub is_pending: bool,
    /// The number of the last request: an older one that was kept waiting is not made any more.
    latest: u64,
    /// What is asked for and not answered.
    asking: Vec<Bytes>,
    /// The smallest that was asked for without a certain answer: an API server that was given up may still carry it out
    /// (seen: a patch that was waited for 8 s, and stored when etcd went on).
    uncertain: Option<Bytes>,
    /// What the API took of late, and when: the kubelet may be about to carry out the one before the last.
    taken: Vec<(Bytes, Instant)>,
    /// Whether a task asks the API to say what was raised by hand.
    is_agreeing: bool,
    /// Whether the API refuses to: it is not asked for beside what others ask for.
    is_refused: bool,
    /// Whether the kubelet is about to carry out what the spec says, or tries to.
    pub is_in_progress: bool,
    /// One request of a pod at a time: a raise must not overtake the lowering that it answers, and the kubelet carries
    /// out all of a pod's resize or nothing of it.
    pub order: Order,
}

impl Target {
    /// One that nothing was asked for yet.
    #[must_use]
    pub fn new(pod: &pod::Pod, wish: &Wish, cgroup: Cgroup, rest: Bytes, order: Order) -> Self {
        Self {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            cgroup,
            container: wish.container.clone(),
            level: wish.level,
            limit: wish.limit_text.clone(),
            original: (rest, wish.rest_text.clone()),
            by_hand: None,
            pod_follows: wish.level != Level::Pod && pod.memory_limit.is_none(),
            is_pending: pod.is_resize_pending,
            latest: 0,
            asking: Vec::new(),
            uncertain: None,
            taken: Vec::new(),
            is_agreeing: false,
            is_refused: false,
            is_in_progress: pod.is_resize_in_progress,
            order,
        }
    }

    /// What the spec says, as the kernel has it.
    fn in_spec(&self) -> Option<Bytes> {
        let limit = quantity::parse(&self.limit).ok()?;
        Some(limit.page_floor())
    }

    /// The API has taken a limit.
    fn takes(&mut self, limit: Bytes) {
        self.taken.retain(|(_, at)| at.elapsed() < CARRIED_OUT);
        self.taken.push((limit, Instant::now()));
    }

    /// Whether the API has taken something so lately that what it says of the pod may be older.
    #[must_use]
    pub fn was_just_taken(&self) -> bool {
        let mut taken = self.taken.iter();
        taken.any(|(_, at)| at.elapsed() < CARRIED_OUT)
    }

    fn may_come(&mut self, limit: Bytes) {
        let least = self.uncertain.map_or(limit, |other| other.min(limit));
        self.uncertain = Some(least);
    }

    fn by_hand_change(&self) -> Option<Change> {
        let to = quantity::format(self.by_hand.filter(|_| !self.is_refused)?);
        Some(Change::memory(self.level, self.limit.clone(), to))
    }

    fn may_be_raised_by_hand(&self, to: Bytes) -> ByHand {
        if self.is_pending {
            return ByHand::No;
        }
        let is_below = |limit: Bytes| limit.page_floor() < to.page_floor();
        let mut may_come = self.asking.iter().copied().chain(self.uncertain);
        let is_asking = may_come.any(is_below);
        let mut taken = self.taken.iter();
        let is_coming = taken.any(|&(limit, at)| is_below(limit) && at.elapsed() < CARRIED_OUT)
            || (self.is_in_progress && self.in_spec().is_some_and(is_below));
        if is_asking || is_coming {
            ByHand::NotYet
        } else {
            ByHand::Yes
        }
    }
}

/// Held while a request of a pod is under way.
pub type Order = Arc<tokio::sync::Mutex<()>>;

/// A change of one limit.
#[derive(Clone, Debug)]
pub struct Change {
    resource: &'static str,
    level: Level,
    from: String,
    to: String,
}

impl Change {
    /// Of memory: where it stands, what it must be, what it becomes.
    #[must_use]
    pub const fn memory(level: Level, from: String, to: String) -> Self {
        Self {
            resource: "memory",
            level,
            from,
            to,
        }
    }

    /// The same of CPU.
    #[must_use]
    pub const fn cpu(level: Level, from: String, to: String) -> Self {
        Self {
            resource: "cpu",
            level,
            from,
            to,
        }
    }
}

/// Sends resizes.
#[derive(Clone)]
pub struct Resizer {
    client: Client,
    runtime: Handle,
    targets: Targets<Target>,
    inputs: SyncSender<Input>,
    observed: UnboundedSender<(CgroupId, Observed)>,
    by_hands: ByHands,
    bucket: Arc<Mutex<Bucket>>,
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
            client,
            runtime,
            targets: Targets::default(),
            inputs,
            observed,
            by_hands: ByHands::default(),
            bucket: Arc::new(Mutex::new(Bucket::full(now()))),
        }
    }

    /// Limits that were written by hand.
    #[must_use]
    pub const fn by_hands(&self) -> &ByHands {
        &self.by_hands
    }

    /// A limit is somebody else's: what was written by hand is not ours to undo.
    pub fn is_theirs(&self, cgroup: CgroupId) {
        let path = self.targets.of(cgroup, |target| {
            target.by_hand = None;
            target.cgroup.path().to_owned()
        });
        if let Some(path) = path {
            self.by_hands.is_known(&path);
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
            if result.is_err() {
                // A controller that has ended needs no answer.
                drop(this.inputs.try_send(Input::Answered { cgroup, to, result }));
            }
        });
    }

    /// Waits until the API may be asked for a change. It bounds what this node asks of it, its urgent changes first.
    pub(super) async fn may_ask(&self, urgency: Urgency) {
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
                target.limit = limit;
                // Whatever was asked for, it has come or will not.
                target.uncertain = None;
                if let Some(limit) = target.in_spec() {
                    target.takes(limit);
                }
                let is_theirs = is_new && !is_ours && target.by_hand.take().is_some();
                is_theirs.then(|| target.cgroup.path().to_owned())
            });
            if let Some(path) = theirs.flatten() {
                self.by_hands.is_known(&path);
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
        let own = Change::memory(target.level, target.limit.clone(), value.clone());
        let begun = self.begins_in(&target.uid, Some(cgroup));
        let by_hand = self.by_hand_beside(cgroup, &beside);
        let others = beside.values().chain(&by_hand).cloned();
        let changes: Vec<Change> = [own].into_iter().chain(others).collect();
        let patch = limits_patch(&target.uid, &changes);
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let parameters = parameters();
        let patched = pods.patch_resize(&target.name, &parameters, &patch);
        let patched = timeout(RESIZE_TIMEOUT, patched).await;
        let is_uncertain = is_uncertain(&patched);
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
        self.ends_in(begun, is_uncertain);
        if is_uncertain {
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

    /// Changes a target; one that is gone needs no change.
    fn note(&self, cgroup: CgroupId, change: impl FnOnce(&mut Target)) {
        self.targets.of(cgroup, change);
    }

    /// The API has taken a resize of the pod of a target.
    fn is_taken(&self, cgroup: CgroupId, patched: &Pod) {
        let agreed = self.targets.of(cgroup, |target| {
            target.limit = limit_at(patched, target.level)?;
            target.uncertain = None;
            let in_spec = target.in_spec()?;
            target.takes(in_spec);
            // One that was written since the request was made is asked for again.
            target.by_hand.take_if(|by_hand| *by_hand <= in_spec)?;
            target.is_refused = false;
            Some(target.cgroup.path().to_owned())
        });
        if let Some(path) = agreed.flatten() {
            self.by_hands.is_known(&path);
        }
    }

    /// The API has taken a resize of this pod.
    pub(super) fn is_taken_in(&self, uid: &str, patched: &Pod) {
        for cgroup in self.of_pod(uid) {
            self.is_taken(cgroup, patched);
        }
    }

    /// A resize of something else in a pod begins: with it the kubelet sets the limit of the pod's cgroup, too, and may set
    /// those of all of its containers, to what the spec says then.
    pub(super) fn begins_in(&self, uid: &str, own: Option<CgroupId>) -> Vec<(CgroupId, Bytes)> {
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

    /// It has ended.
    pub(super) fn ends_in(&self, begun: Vec<(CgroupId, Bytes)>, is_uncertain: bool) {
        for (cgroup, comes) in begun {
            self.is_answered(cgroup, comes);
            if is_uncertain {
                self.note(cgroup, |target| target.may_come(comes));
            }
        }
    }

    /// What was raised by hand in a pod, for a patch of something else.
    pub(super) fn by_hand_in(&self, uid: &str) -> Vec<Change> {
        self.targets.with(|targets| {
            let own = targets.values().filter(|target| target.uid == uid);
            own.filter_map(Target::by_hand_change).collect()
        })
    }

    /// Targets in one pod.
    fn of_pod(&self, uid: &str) -> Vec<CgroupId> {
        self.targets.with(|targets| {
            let own = targets.iter().filter(|(_, target)| target.uid == uid);
            own.map(|(&cgroup, _)| cgroup).collect()
        })
    }

    /// What was raised by hand in the same pod: with the next resize of any resource the kubelet sets what the spec says.
    fn by_hand_beside(
        &self,
        cgroup: CgroupId,
        lowerings: &BTreeMap<CgroupId, Change>,
    ) -> Vec<Change> {
        let Some(uid) = self.targets.of(cgroup, |target| target.uid.clone()) else {
            return Vec::new();
        };
        self.targets.with(|targets| {
            let own = targets.iter().filter(|(id, target)| {
                **id != cgroup && target.uid == uid && !lowerings.contains_key(*id)
            });
            own.filter_map(|(_, target)| target.by_hand_change())
                .collect()
        })
    }

    /// Lowers a limit to what the spec says all the time: nobody else would.
    async fn is_lowered_by_hand(&self, cgroup: CgroupId, to: Bytes) -> Result<bool, Refused> {
        let by_hand = self.target(cgroup, |target| {
            let by_hand = target.by_hand?;
            let is_lowering = to < by_hand && target.in_spec() == Some(to.page_floor());
            is_lowering.then(|| target.cgroup.clone())
        })?;
        let Some(own) = by_hand else {
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
                self.note(cgroup, |target| target.by_hand = None);
                Ok(true)
            }
            Ok(Ok(false)) => Err(refused("usage has grown meanwhile".to_owned())),
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
            let waiting = beside.filter_map(|(&id, target)| {
                let Limit::At(in_force) = target.cgroup.limit("memory.max").ok()? else {
                    return None;
                };
                let asked = quantity::parse(&target.limit).ok()?;
                let to = quantity::format(in_force);
                let change = Change::memory(target.level, target.limit.clone(), to);
                (asked.page_floor() < in_force).then_some((id, change))
            });
            waiting.collect()
        }))
    }
}

/// Whether what was asked for may still come.
pub(super) fn is_uncertain<T, E>(ended: &Result<Result<T, kube::Error>, E>) -> bool {
    match ended {
        Ok(Ok(_)) => false,
        Ok(Err(error)) => refusal(error).0.uncertain,
        Err(_elapsed) => true,
    }
}

/// Counts a resize that ended so.
pub(super) fn counted<T, E>(ended: &Result<Result<T, kube::Error>, E>) {
    count(match ended {
        Ok(Ok(_)) => metrics::OK,
        Ok(Err(error)) if !refusal(error).0.uncertain => metrics::REFUSED,
        _ => metrics::SILENT,
    });
}

fn count(result: &'static str) {
    let counted = Call {
        call: "resize",
        result,
    };
    METRICS.api_calls.get_or_create(&counted).inc();
}

/// Patches are made under our own name: by it a change of ours is told from others'.
#[must_use]
pub fn parameters() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// Replaces limits of a pod if each is still what it was.
#[must_use]
pub fn limits_patch(uid: &str, changes: &[Change]) -> Patch<()> {
    let test = |path, value: &str| {
        PatchOperation::Test(TestOperation {
            path,
            value: value.into(),
        })
    };
    let mut operations = vec![test(PointerBuf::from_tokens(["metadata", "uid"]), uid)];
    for Change {
        resource,
        level,
        from,
        to,
    } in changes
    {
        let limit = ["resources", "limits", *resource];
        let path = match level {
            Level::Pod => PointerBuf::from_tokens(["spec"].into_iter().chain(limit)),
            Level::Container(index) => {
                let index = index.to_string();
                PointerBuf::from_tokens(["spec", "containers", &index].into_iter().chain(limit))
            }
        };
        operations.push(test(path.clone(), from));
        operations.push(PatchOperation::Replace(ReplaceOperation {
            path,
            value: to.as_str().into(),
        }));
    }
    Patch::Json(json_patch::Patch(operations))
}

/// What an error of the client means: an answer of the API is definite, anything else may have
/// reached it.
fn refusal(error: &kube::Error) -> (Refused, Option<u16>) {
    let code = match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    };
    let uncertain = code.is_none_or(|code| code >= 500 && code != 503) && !was_not_sent(error);
    // A conflict, too many requests, or unavailable.
    let is_busy = code.is_none_or(|code| [409, 429, 503].contains(&code));
    (
        Refused {
            why: error.to_string(),
            uncertain,
            is_passing: uncertain || is_busy,
        },
        code,
    )
}

fn silent() -> Refused {
    Refused {
        why: format!("no answer within {} s", RESIZE_TIMEOUT.as_secs()),
        uncertain: true,
        is_passing: true,
    }
}

/// Whether nothing can have reached the API: there was no connection.
fn was_not_sent(error: &kube::Error) -> bool {
    let error: &(dyn std::error::Error + 'static) = error;
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::AddrNotAvailable
            )
        })
    })
}

impl Requester for Resizer {
    fn raise(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to, Urgency::Urgent);
    }

    fn lower(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to, Urgency::Later);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.send(cgroup.id(), limit, Urgency::Later);
    }

    fn by_hand(&self, cgroup: CgroupId, to: Bytes) -> ByHand {
        let may = self
            .targets
            .of(cgroup, |target| target.may_be_raised_by_hand(to));
        may.unwrap_or_default()
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
            } => Observed::Waits(told_why(*wanted, *why, behind.as_deref())),
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
    use super::*;

    fn target() -> Target {
        Target {
            namespace: "dev".to_owned(),
            name: "workspace".to_owned(),
            uid: "u".to_owned(),
            cgroup: Cgroup::stand_in(std::path::Path::new("/nowhere"), CgroupId(1)),
            container: "app".to_owned(),
            level: Level::Container(0),
            limit: "64Mi".to_owned(),
            original: (Bytes::mib(64), "64Mi".to_owned()),
            by_hand: None,
            pod_follows: true,
            is_pending: false,
            latest: 0,
            asking: Vec::new(),
            uncertain: None,
            taken: Vec::new(),
            is_agreeing: false,
            is_refused: false,
            is_in_progress: false,
            order: Order::default(),
        }
    }

    /// Each smaller limit that may still come into force is waited for.
    #[test]
    fn nothing_is_raised_by_hand_beyond_what_may_still_come() {
        let to = Bytes::mib(256);
        let may = |change: &dyn Fn(&mut Target)| {
            let mut target = target();
            change(&mut target);
            target.may_be_raised_by_hand(to)
        };
        assert_eq!(may(&|_| {}), ByHand::Yes);
        assert_eq!(may(&|target| target.asking = vec![to]), ByHand::Yes);
        let lower = Bytes::mib(128);
        assert_eq!(
            may(&|target| target.asking = vec![to, lower]),
            ByHand::NotYet
        );
        assert_eq!(may(&|target| target.may_come(lower)), ByHand::NotYet);
        assert_eq!(may(&|target| target.takes(to)), ByHand::Yes);
        // The kubelet may have seen the first before the second.
        let both = |target: &mut Target| {
            target.takes(lower);
            target.takes(to);
        };
        assert_eq!(may(&both), ByHand::NotYet);
        assert_eq!(may(&|target| target.is_in_progress = true), ByHand::NotYet);
        assert_eq!(may(&|target| target.is_pending = true), ByHand::No);
    }

    #[test]
    fn what_the_api_refuses_is_not_asked_for_beside_others() {
        let mut raised = target();
        raised.by_hand = Some(Bytes::mib(256));
        assert!(raised.by_hand_change().is_some());
        raised.is_refused = true;
        assert!(raised.by_hand_change().is_none());
    }

    #[test]
    fn what_was_not_sent_is_certain() {
        let of = |kind| {
            let refused: Box<dyn std::error::Error + Send + Sync> = Box::new(io::Error::from(kind));
            refusal(&kube::Error::Service(refused)).0
        };
        let refused = of(io::ErrorKind::ConnectionRefused);
        assert!(!refused.uncertain && refused.is_passing);
        let broken = of(io::ErrorKind::BrokenPipe);
        assert!(broken.uncertain && broken.is_passing);
        let status = |code| {
            let status = kube::core::Status {
                code,
                ..kube::core::Status::default()
            };
            let refused = refusal(&kube::Error::Api(Box::new(status))).0;
            (refused.uncertain, refused.is_passing)
        };
        for code in [409, 429, 503] {
            assert_eq!(status(code), (false, true), "{code}");
        }
        for code in [500, 504] {
            assert_eq!(status(code), (true, true), "{code}");
        }
        for code in [400, 403, 404, 422] {
            assert_eq!(status(code), (false, false), "{code}");
        }
    }

    #[test]
    fn a_patch_tests_whose_it_is_and_what_was() {
        let change =
            |level, from: &str, to: &str| Change::memory(level, from.to_owned(), to.to_owned());
        let level = Level::Container(0);
        let changes = [
            change(Level::Container(1), "64Mi", "512Mi"),
            change(Level::Pod, "1Gi", "2Gi"),
            Change::cpu(level, "250m".to_owned(), "2".to_owned()),
        ];
        let Patch::Json(patch) = limits_patch("0f8c", &changes) else {
            panic!("no JSON patch")
        };
        let container = "/spec/containers/1/resources/limits/memory";
        let pod = "/spec/resources/limits/memory";
        let cpu = "/spec/containers/0/resources/limits/cpu";
        let expected = serde_json::json!([
            { "op": "test", "path": "/metadata/uid", "value": "0f8c" },
            { "op": "test", "path": container, "value": "64Mi" },
            { "op": "replace", "path": container, "value": "512Mi" },
            { "op": "test", "path": pod, "value": "1Gi" },
            { "op": "replace", "path": pod, "value": "2Gi" },
            { "op": "test", "path": cpu, "value": "250m" },
            { "op": "replace", "path": cpu, "value": "2" },
        ]);
        assert_eq!(serde_json::to_value(patch).unwrap(), expected);
    }
}
