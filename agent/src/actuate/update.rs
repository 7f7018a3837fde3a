//! Changing a container's limit through its runtime: CRI's UpdateContainerResources.
//!
//! The runtime remembers what it was asked for and sends all of it to the kernel with every later update, so
//! what is set behind its back is lost by the next change of the CPU. It is slow (it runs `runc`), so a container
//! is held meanwhile, as for the API. Only the memory limit is sent; swap goes with it where the runtime
//! would take it away.
//!
//! A runtime that is away or late does not cost a container its life: the raise is written by hand then, within what
//! the policy allows, and the runtime told until it knows. A call that is late may still be carried out, so nothing
//! further is asked for a pod before it has ended, or its deadline has passed: then an old limit may still arrive
//! late, which nobody can prevent who does not own the runtime.
//!
//! The pod's own limit moves by as much, before a raise and after a lowering. It is computed from what it was with
//! all of the pod's containers at rest, so that an update that was cut short is mended by the next.

use std::{
    path::PathBuf,
    pin::pin,
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{Bytes, CgroupId};
use tokio::{
    runtime::Handle,
    sync::Mutex as AsyncMutex,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{pod_cgroup, targets::Targets};
use crate::{
    cgroup::{Cgroup, Limit},
    cri::{LinuxContainerResources, Runtime, RuntimeError, with_memory},
    guard::{Input, Refused, Requester},
    ledger::Record,
    originals::{self, Original},
};

/// An update that takes longer is late. On a busy emulated node they take up to 0.8 s.
const LATE: Duration = Duration::from_millis(1500);
/// A limit that is fuller than this is not set: the container may grow while `runc` is on its way.
const FULL_PER_MILLE: u64 = 970;
/// How soon a runtime that did not take a limit is told of it again, and how seldom at last.
const SETTLE: Duration = Duration::from_millis(500);
const LONGEST_SETTLE: Duration = Duration::from_secs(10);

/// A guarded container, as its runtime knows it.
#[derive(Clone, Debug)]
pub struct Target {
    /// What it had, and what we have asked for.
    pub original: Original,
    /// What the runtime said of its resources when it was looked at last: what may swap is kept.
    pub said: LinuxContainerResources,
    /// The cgroup of its pod, where that has a limit.
    pub pod: Option<Cgroup>,
    /// Requests so far: one that waits its turn while another is made is not carried out.
    pub requests: u64,
    /// One request at a time for a pod: a raise must not overtake the lowering that it answers.
    pub order: Arc<AsyncMutex<()>>,
}

/// Sends updates.
#[derive(Clone, Debug)]
pub struct Updater {
    runtime: Runtime,
    tasks: Handle,
    targets: Targets<Target>,
    inputs: SyncSender<Input>,
    /// Where originals are kept.
    directory: PathBuf,
}

impl Updater {
    /// A requester for what a runtime runs.
    #[must_use]
    pub const fn new(
        runtime: Runtime,
        tasks: Handle,
        targets: Targets<Target>,
        inputs: SyncSender<Input>,
        directory: PathBuf,
    ) -> Self {
        Self {
            runtime,
            tasks,
            targets,
            inputs,
            directory,
        }
    }

    fn send(&self, cgroup: &Cgroup, to: Bytes) {
        let (this, cgroup) = (self.clone(), cgroup.clone());
        let asked = self.target(cgroup.id(), |target| {
            target.requests += 1;
            (target.requests, Arc::clone(&target.order))
        });
        self.tasks.spawn(async move {
            let done = match asked {
                Ok((number, order)) => {
                    let _turn = order.lock().await;
                    let latest = this.target(cgroup.id(), |target| target.requests);
                    if latest.is_ok_and(|latest| latest != number) {
                        // Whoever asked has asked for something else meanwhile.
                        return;
                    }
                    this.update(&cgroup, to).await
                }
                Err(refused) => Err(refused),
            };
            this.answer(&cgroup, to, done);
        });
    }

    fn answer(&self, cgroup: &Cgroup, to: Bytes, result: Result<(), Refused>) {
        let cgroup = cgroup.id();
        // A controller that has ended needs no answer.
        drop(self.inputs.try_send(Input::Answered { cgroup, to, result }));
    }

    fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        self.targets
            .of(cgroup, change)
            .ok_or_else(|| refused("the container is gone", false))
    }

    /// Writes down what will be asked for, before it is.
    fn ask(&self, cgroup: CgroupId, to: Bytes) -> Result<Target, Refused> {
        let target = self.target(cgroup, |target| {
            target.original.ask(to);
            target.clone()
        })?;
        originals::write(&self.directory, &target.original).map_err(|error| {
            let why = format!("{}: {error}; free memory on /run", self.directory.display());
            refused(&why, false)
        })?;
        Ok(target)
    }

    async fn update(&self, cgroup: &Cgroup, to: Bytes) -> Result<(), Refused> {
        let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
        let is_ours = self.target(cgroup.id(), |target| target.original.is_ours(limit))?;
        if to < limit && !is_ours {
            let why = format!("somebody else has set the limit to {limit}, which is not lowered");
            return Err(refused(&why, false));
        }
        if to < limit && !fits(cgroup, to)? {
            return Err(refused("usage has grown meanwhile", false));
        }
        let target = self.ask(cgroup.id(), to)?;
        // The pod goes up before the container does.
        self.raise_pod(&target).await?;
        let resources = with_memory(to, &target.said);
        let mut call = pin!(self.runtime.update(&target.original.id, resources));
        let mut updated = match timeout(LATE, &mut call).await {
            Ok(updated) => updated,
            Err(_elapsed) => {
                if fall_back(cgroup, to)? {
                    self.answer(cgroup, to, Ok(()));
                }
                call.await
            }
        };
        if let Err(error) = &updated
            && !error.is_gone()
            && fall_back(cgroup, to)?
        {
            tracing::warn!(path = %cgroup.path().display(), %to, %error, "the limit is raised without its runtime, which is told later");
            self.settle_later(cgroup);
            updated = Ok(());
        }
        if let Err(error) = &updated
            && !error.is_uncertain()
        {
            let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
            self.ask(cgroup.id(), limit)?;
        }
        // And down after it, whether or not it did.
        if let Err(Refused { why, .. }) = self.lower_pod(cgroup).await {
            tracing::warn!(path = %cgroup.path().display(), why, "the pod's limit stays for now");
        }
        updated.map_err(refusal)
    }

    /// Tells the runtime of a limit that it did not take, again and again: with its next update of anything else
    /// it would set the one that it remembers.
    fn settle_later(&self, cgroup: &Cgroup) {
        let (this, cgroup) = (self.clone(), cgroup.clone());
        self.tasks.spawn(async move {
            let mut wait = SETTLE;
            loop {
                sleep(wait).await;
                let Ok(order) = this.target(cgroup.id(), |target| Arc::clone(&target.order)) else {
                    return;
                };
                let _turn = order.lock().await;
                let Ok(target) = this.target(cgroup.id(), |target| target.clone()) else {
                    return;
                };
                // Whatever was asked for last; a later request may have told it already.
                let Some(&latest) = target.original.asked.first() else {
                    return;
                };
                if !fits(&cgroup, latest).unwrap_or(false) {
                    // A lower limit that is about to be taken back.
                    continue;
                }
                let resources = with_memory(latest, &target.said);
                match this.runtime.update(&target.original.id, resources).await {
                    Err(error) if !error.is_gone() => wait = (wait * 2).min(LONGEST_SETTLE),
                    _ => return,
                }
            }
        });
    }

    /// The limit that a pod must have for what its containers have been asked to have.
    fn pod_limit(&self, target: &Target) -> Option<(Cgroup, Bytes)> {
        let (pod, at_rest) = (target.pod.clone()?, target.original.pod_limit?);
        let limit = self.targets.with(|targets| {
            let same = targets.values();
            let same = same.filter(|target| target.pod.as_ref() == Some(&pod));
            let raised = same.map(|target| target.original.raised_by());
            raised.fold(at_rest, Bytes::plus)
        });
        Some((pod, limit))
    }

    async fn raise_pod(&self, target: &Target) -> Result<(), Refused> {
        let Some((pod, wanted)) = self.pod_limit(target) else {
            return Ok(());
        };
        let limit = pod.limit("memory.max").map_err(text)?.bytes();
        if limit < wanted {
            set_pod(pod, wanted).await?;
        }
        Ok(())
    }

    /// Lowers the pod as far as the limit allows that its container has come to.
    async fn lower_pod(&self, cgroup: &Cgroup) -> Result<(), Refused> {
        let target = self.target(cgroup.id(), |target| target.clone())?;
        let Some((pod, wanted)) = self.pod_limit(&target) else {
            return Ok(());
        };
        let limit = pod.limit("memory.max").map_err(text)?.bytes();
        let in_force = cgroup.limit("memory.max").map_err(text)?.bytes();
        let Original { limit: at_rest, .. } = target.original;
        if limit > wanted && in_force <= at_rest.plus(target.original.raised_by()) {
            set_pod(pod, wanted).await?;
        }
        Ok(())
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

async fn set_pod(pod: Cgroup, limit: Bytes) -> Result<(), Refused> {
    match spawn_blocking(move || pod_cgroup::set_limit(&pod, limit)).await {
        Ok(set) => set.map_err(text),
        Err(error) => Err(text(error)),
    }
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

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn refusal(error: RuntimeError) -> Refused {
    refused(&error.to_string(), error.is_uncertain())
}

impl Requester for Updater {
    fn raise(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup, to);
    }

    fn lower(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup, to);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.send(cgroup, limit);
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
    }
}
