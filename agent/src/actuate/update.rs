//! Changing a container's limit through its runtime: CRI's UpdateContainerResources.
//!
//! The runtime remembers what it was asked for and sends all of it to the kernel with every later update, so
//! what is set behind its back is lost by the next change of the CPU. It is slow (it runs `runc`), so a container
//! is held meanwhile, as for the API. The memory limit is sent, with swap where the runtime would take it away and
//! the CPU quota where that is moved ([`super::quota`]): one call at a time for each container, because a call that
//! carries what was true before the last would undo it.
//!
//! A runtime that is away or late does not cost a container its life: the raise is written by hand then, within what
//! the policy allows, and the runtime told until it knows. One task for each container tells it, one value at a
//! time, always the latest; while the runtime is known to be late, raises are written first. A call that is late is
//! given up for a newer value. What it asked for may still arrive (`runc` is not stopped by that), which nobody can
//! prevent who does not own the runtime.
//!
//! The pod's own limit moves by as much, before a raise and after a lowering ([`Pod`]).

use std::{
    collections::BTreeSet,
    pin::pin,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

use bellows_core::{Bytes, CgroupId};
use tokio::{
    runtime::Handle,
    select,
    sync::Notify,
    time::{Instant, sleep, timeout},
};

use super::{
    pod::{May, Pod, Who},
    shrink::FULL_PER_MILLE,
    targets::Targets,
};
use crate::{
    cgroup::{Cgroup, Limit},
    cri::{LinuxContainerResources, Runtime, RuntimeError, with_memory, with_quota},
    guard::{Input, Refused, Requester},
    ledger::Record,
    originals::{MovedQuota, Original, Records},
};

/// An update that takes longer is late. On a busy emulated node they take up to 0.8 s.
const LATE: Duration = Duration::from_millis(1500);
/// A lowering that takes longer is given up: the controller waits no longer, and guards the old limit then.
const LOWERING: Duration = Duration::from_secs(5);
/// How long a CPU quota must have been moved before the runtime is told of it, and how often it is at most.
const QUOTA_AFTER: Duration = Duration::from_secs(1);
const QUOTA_INTERVAL: Duration = Duration::from_secs(10);
/// How soon a runtime that did not take a limit is told of it again, and how seldom at last.
const SETTLE: Duration = Duration::from_millis(500);
const LONGEST_SETTLE: Duration = Duration::from_secs(10);

/// A guarded container, as its runtime knows it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// What it had, and what we have asked for.
    pub original: Original,
    /// What the runtime said of its resources when it was looked at last: what may swap is kept.
    pub said: LinuxContainerResources,
    /// Its pod.
    pub pod: Option<Arc<Pod>>,
    /// What is asked for and not yet on its way.
    wanted: Option<Bytes>,
    /// When the runtime was told of a CPU quota last.
    pub(super) quota_told: Option<Instant>,
    /// Whether a task tells the runtime, which [`Target::changed`] wakes.
    is_telling: bool,
    changed: Arc<Notify>,
}

impl Target {
    /// One that nothing was asked for yet.
    #[must_use]
    pub fn new(
        cgroup: Cgroup,
        original: Original,
        said: LinuxContainerResources,
        pod: Option<Arc<Pod>>,
    ) -> Self {
        Self {
            cgroup,
            original,
            said,
            pod,
            wanted: None,
            quota_told: None,
            is_telling: false,
            changed: Arc::default(),
        }
    }

    /// Whether something is asked for that the runtime does not know yet.
    #[must_use]
    pub const fn is_telling(&self) -> bool {
        self.is_telling
    }

    /// Whether it is one of a pod's.
    #[must_use]
    pub fn is_in(&self, pod: &Pod) -> bool {
        self.pod.as_deref().is_some_and(|own| ptr::eq(own, pod))
    }

    /// In how long the runtime is to be told of the CPU quota; `None` if it knows.
    fn quota_due(&self) -> Option<Duration> {
        let quota = self.original.quota.as_ref()?;
        let waited = self.quota_told.map(|told| told.elapsed());
        let rest = waited.map_or(Duration::ZERO, |waited| {
            QUOTA_INTERVAL.saturating_sub(waited)
        });
        (quota.latest().cpu != quota.told).then(|| rest.max(QUOTA_AFTER))
    }
}

/// How telling the runtime of a limit ended.
enum Told {
    /// It knows, or there is nothing to know.
    Known,
    /// The limit is in force, and it must be told again.
    Untold(Bytes),
    /// Something else is asked for meanwhile.
    Overtaken,
}

/// Sends updates; clones share what they know.
#[derive(Clone, Debug)]
pub struct Updater {
    runtime: Runtime,
    tasks: Handle,
    targets: Targets<Target>,
    inputs: SyncSender<Input>,
    records: Records<Original>,
    /// Whether the runtime was late when it was asked last.
    is_late: Arc<AtomicBool>,
}

impl Updater {
    /// A requester for what a runtime runs.
    #[must_use]
    pub fn new(
        runtime: Runtime,
        tasks: Handle,
        inputs: SyncSender<Input>,
        records: Records<Original>,
    ) -> Self {
        Self {
            runtime,
            tasks,
            targets: Targets::default(),
            inputs,
            records,
            is_late: Arc::default(),
        }
    }

    /// What may be asked for.
    #[must_use]
    pub const fn targets(&self) -> &Targets<Target> {
        &self.targets
    }

    /// The runtime that is asked.
    #[must_use]
    pub const fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Where originals are kept.
    #[must_use]
    pub const fn records(&self) -> &Records<Original> {
        &self.records
    }

    /// Asks for a limit, in place of whatever is asked for and not yet on its way.
    pub fn send(&self, cgroup: CgroupId, to: Bytes) {
        if let Err(refused) = self.wake(cgroup, |target| target.wanted = Some(to)) {
            self.answer(cgroup, to, Err(refused));
        }
    }

    /// Changes what the runtime must be told of a container, and sees to it that it is.
    pub(super) fn wake(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target),
    ) -> Result<(), Refused> {
        let starts = self.target(cgroup, |target| {
            change(target);
            target.changed.notify_one();
            !std::mem::replace(&mut target.is_telling, true)
        })?;
        if starts {
            drop(self.tasks.spawn(self.clone().tell(cgroup)));
        }
        Ok(())
    }

    fn answer(&self, cgroup: CgroupId, to: Bytes, result: Result<(), Refused>) {
        // A controller that has ended needs no answer.
        drop(self.inputs.try_send(Input::Answered { cgroup, to, result }));
    }

    pub(super) fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        self.targets
            .of(cgroup, change)
            .ok_or_else(|| refused("the container is gone", false))
    }

    /// Tells the runtime what is asked for until it knows the latest. With its next update of anything else it would
    /// set the limit that it remembers.
    async fn tell(self, id: CgroupId) {
        let (mut untold, mut wait) = (None, SETTLE);
        loop {
            let next = self.target(id, |target| {
                let wanted = target.wanted.take();
                let quota_due = target.quota_due();
                target.is_telling = wanted.is_some() || untold.is_some() || quota_due.is_some();
                (wanted, quota_due, target.clone())
            });
            let Ok((wanted, quota_due, target)) = next else {
                return;
            };
            let told = match (wanted, untold, quota_due) {
                (Some(to), _, _) => {
                    wait = SETTLE;
                    let told = self.update(&target, to).await;
                    told.unwrap_or_else(|refused| {
                        self.answer(id, to, Err(refused));
                        Told::Known
                    })
                }
                (None, Some(to), _) => {
                    select! {
                        () = target.changed.notified() => continue,
                        () = sleep(wait) => {}
                    }
                    wait = (wait * 2).min(LONGEST_SETTLE);
                    self.tell_again(&target, to).await
                }
                (None, None, Some(due)) => {
                    select! {
                        () = target.changed.notified() => continue,
                        () = sleep(due) => {}
                    }
                    self.tell_quota(&target).await
                }
                (None, None, None) => return,
            };
            untold = match told {
                Told::Known => None,
                Told::Untold(to) => Some(to),
                Told::Overtaken => untold,
            };
        }
    }

    async fn tell_again(&self, target: &Target, to: Bytes) -> Told {
        if !fits(&target.cgroup, to).unwrap_or(false) {
            // Whatever grew is raised again.
            return Told::Untold(to);
        }
        match self.call(target, Some(to)).await {
            Err(error) if !error.is_gone() => Told::Untold(to),
            _ => Told::Known,
        }
    }

    /// Asks the runtime for a memory limit, and for the CPU quota where that is moved.
    async fn call(&self, target: &Target, memory: Option<Bytes>) -> Result<(), RuntimeError> {
        let id = target.cgroup.id();
        let quota = self.target(id, |target| {
            target.original.quota.as_ref().map(MovedQuota::latest)
        });
        let quota = quota.ok().flatten();
        let resources = memory.map(|memory| with_memory(memory, &target.said));
        let resources = resources.unwrap_or_default();
        let resources = match quota {
            Some(quota) => with_quota(resources, quota),
            None => resources,
        };
        self.runtime.update(&target.original.id, resources).await?;
        if let Some(told) = quota {
            self.quota_is_told(target, told);
        }
        Ok(())
    }

    /// Tells the runtime of the CPU quota, with the memory limit that is in force: it would set the one that it
    /// remembers, which may be below usage.
    async fn tell_quota(&self, target: &Target) -> Told {
        let id = target.cgroup.id();
        let memory = match (&target.original.limit, target.cgroup.limit("memory.max")) {
            (Some(_), Ok(Limit::At(limit))) => Some(limit),
            _ => None,
        };
        let began = Instant::now();
        let mut call = pin!(self.call(target, memory));
        let called = loop {
            select! {
                called = &mut call => break called,
                () = target.changed.notified() => {}
            }
            // A raise of memory waits for it: what arrives after the raise would undo it.
            let is_wanted = self.target(id, |target| target.wanted.is_some());
            if is_wanted.unwrap_or(true) {
                match timeout(LATE.saturating_sub(began.elapsed()), &mut call).await {
                    Ok(called) => break called,
                    Err(_elapsed) => {
                        self.is_late.store(true, Ordering::Relaxed);
                        return Told::Overtaken;
                    }
                }
            }
        };
        if let Err(error) = called {
            tracing::warn!(path = %target.cgroup.path().display(), %error, "the runtime does not know the CPU quota yet");
        }
        // Known or not, it is not asked again at once.
        drop(self.target(id, |target| target.quota_told = Some(Instant::now())));
        Told::Known
    }

    /// Writes down what will be asked for, before it is.
    fn ask(&self, cgroup: CgroupId, to: Bytes) -> Result<(), Refused> {
        let original = self.target(cgroup, |target| {
            if let Some(limit) = &mut target.original.limit {
                limit.ask(to);
            }
            target.original.clone()
        })?;
        self.records.write(&original).map_err(text)
    }

    async fn update(&self, target: &Target, to: Bytes) -> Result<Told, Refused> {
        let (cgroup, id) = (&target.cgroup, target.cgroup.id());
        let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
        let moved = target.original.limit.as_ref();
        if to < limit && !moved.is_some_and(|moved| moved.is_ours(limit)) {
            let why = format!("somebody else has set the limit to {limit}, which is not lowered");
            return Err(refused(&why, false));
        }
        if to < limit && !fits(cgroup, to)? {
            return Err(refused("usage has grown meanwhile", false));
        }
        self.ask(id, to)?;
        // The pod goes up before the container does.
        self.settle_pod(target.pod.as_deref(), May::Rise).await?;
        let told = if to < limit {
            self.lower(target, to).await
        } else {
            self.raise(target, to).await
        };
        // And down after it, whether or not it did.
        if let Err(Refused { why, .. }) = self.settle_pod(target.pod.as_deref(), May::Fall).await {
            tracing::warn!(path = %cgroup.path().display(), why, "the pod's limit stays for now");
        }
        told
    }

    async fn lower(&self, target: &Target, to: Bytes) -> Result<Told, Refused> {
        match timeout(LOWERING, self.call(target, Some(to))).await {
            Ok(Ok(())) => Ok(Told::Known),
            Ok(Err(error)) => {
                self.failed(target, &error)?;
                Err(refusal(&error))
            }
            Err(_elapsed) => {
                let why = format!("no answer within {} s", LOWERING.as_secs());
                Err(refused(&why, true))
            }
        }
    }

    async fn raise(&self, target: &Target, to: Bytes) -> Result<Told, Refused> {
        let cgroup = &target.cgroup;
        let mut call = pin!(self.call(target, Some(to)));
        // A call that was not polled is not sent: it is under way when the raise is written first.
        let patience = if self.is_late.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            LATE
        };
        let updated = match timeout(patience, &mut call).await {
            Ok(updated) => updated,
            Err(_elapsed) => {
                self.is_late.store(true, Ordering::Relaxed);
                if fall_back(cgroup, to)? {
                    self.answer(cgroup.id(), to, Ok(()));
                }
                loop {
                    select! {
                        updated = &mut call => break updated,
                        () = target.changed.notified() => {}
                    }
                    // An older change may have left its mark.
                    if self.target(cgroup.id(), |target| target.wanted.is_some())? {
                        return Ok(Told::Overtaken);
                    }
                }
            }
        };
        let Err(error) = updated else {
            self.is_late.store(false, Ordering::Relaxed);
            return Ok(Told::Known);
        };
        if !error.is_gone() && fall_back(cgroup, to)? {
            tracing::warn!(path = %cgroup.path().display(), %to, %error, "the limit is raised without its runtime, which is told later");
            return Ok(Told::Untold(to));
        }
        self.failed(target, &error)?;
        Err(refusal(&error))
    }

    /// What was asked for will not come.
    fn failed(&self, target: &Target, error: &RuntimeError) -> Result<(), Refused> {
        if error.is_uncertain() {
            return Ok(());
        }
        let limit = target.cgroup.limit("memory.max").map_err(text)?.bytes();
        self.ask(target.cgroup.id(), limit)
    }

    /// Brings the limit of a pod to where its containers need it.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub async fn settle_pod(&self, pod: Option<&Pod>, may: May) -> Result<(), Refused> {
        let Some(pod) = pod else {
            return Ok(());
        };
        let raised = |who| self.raised_in(pod, who);
        pod.settle(&raised, may).await.map_err(text)
    }

    /// By how much each container of a pod is raised.
    fn raised_in(&self, pod: &Pod, who: Who) -> Vec<Bytes> {
        let (mut limits, mut known): (Vec<_>, BTreeSet<_>) = self.targets.with(|targets| {
            let same = targets.values().filter(|target| target.is_in(pod));
            let same = same.map(|target| {
                let Target {
                    cgroup, original, ..
                } = target;
                (
                    (Some(cgroup.clone()), original.limit.clone()),
                    original.id.clone(),
                )
            });
            same.unzip()
        });
        if who == Who::All {
            let left = self.records.all().into_iter();
            let left = left.filter(|left| {
                left.path.parent() == Some(pod.cgroup().path()) && known.insert(left.id.clone())
            });
            limits.extend(left.map(|left| (Cgroup::open(&left.path).ok(), left.limit)));
        }
        let raised = limits.iter().filter_map(|(cgroup, limit)| {
            let in_force = cgroup.as_ref()?.limit("memory.max").ok()?;
            Some(limit.as_ref()?.raised_by(in_force.bytes()))
        });
        raised.collect()
    }
}

/// Whether usage fits below a limit: the runtime does not look before it lowers one, and the kernel kills.
fn fits(cgroup: &Cgroup, limit: Bytes) -> Result<bool, Refused> {
    Ok(cgroup.usage().map_err(text)? <= limit.per_mille(FULL_PER_MILLE))
}

/// Raises the limit by writing it, where the runtime is late or fails: its container would be killed. The
/// policy allows the limit, and it is written down as ours. Returns whether it is in force.
fn fall_back(cgroup: &Cgroup, to: Bytes) -> Result<bool, Refused> {
    let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
    if limit < to {
        // Usage is below a limit that is raised: nothing is reclaimed here.
        cgroup
            .set_limit("memory.max", Limit::At(to))
            .map_err(text)?;
    }
    Ok(limit <= to)
}

fn refused(why: &str, uncertain: bool) -> Refused {
    Refused {
        why: why.to_owned(),
        uncertain,
    }
}

fn text(error: impl std::fmt::Display) -> Refused {
    refused(&error.to_string(), false)
}

fn refusal(error: &RuntimeError) -> Refused {
    refused(&error.to_string(), error.is_uncertain())
}

impl Requester for Updater {
    fn raise(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to);
    }

    fn lower(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.send(cgroup.id(), limit);
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
    }
}
