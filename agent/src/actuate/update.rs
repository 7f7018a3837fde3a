//! Changing a container's limit through its runtime: CRI's UpdateContainerResources.
//!
//! The runtime remembers what it was asked for and sends all of it to the kernel with every later update, so
//! what is set behind its back is lost by the next change of the CPU. It is slow (it runs `runc`), so a container
//! is held meanwhile, as for the API. Only the memory limit is sent; swap goes with it where the runtime
//! would take it away.
//!
//! The pod's own limit moves by as much, before a raise and after a lowering. It is computed from what it was when
//! the first of the pod's containers was adopted, never from what it is: an update that was cut short is mended
//! by the next.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
};

use bellows_core::{Bytes, CgroupId};
use tokio::{runtime::Handle, sync::Mutex as AsyncMutex, task::spawn_blocking};

use super::pod_cgroup;
use crate::{
    cgroup::Cgroup,
    cri::{LinuxContainerResources, Runtime, RuntimeError, with_memory},
    guard::{Input, Refused, Requester},
    ledger::Record,
    originals::{self, Original},
};

/// A guarded container, as its runtime knows it.
#[derive(Clone, Debug)]
pub struct Target {
    /// What it had, and what we have asked for.
    pub original: Original,
    /// What the runtime said of its resources when it was looked at last: what may swap is kept.
    pub said: LinuxContainerResources,
    /// The cgroup of its pod, where that has a limit.
    pub pod: Option<Cgroup>,
    /// One request at a time for a pod: a raise must not overtake the lowering that it answers.
    pub order: Arc<AsyncMutex<()>>,
}

/// The targets, shared between who watches containers and the requests.
pub type Targets = Arc<Mutex<BTreeMap<CgroupId, Target>>>;

/// Sends updates.
#[derive(Clone, Debug)]
pub struct Updater {
    runtime: Runtime,
    tasks: Handle,
    targets: Targets,
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
        targets: Targets,
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
        self.tasks.spawn(async move {
            let result = this.update(&cgroup, to).await;
            let answer = Input::Answered {
                cgroup: cgroup.id(),
                to,
                result,
            };
            // A controller that has ended needs no answer.
            drop(this.inputs.try_send(answer));
        });
    }

    fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let target = targets.get_mut(&cgroup);
        target
            .map(change)
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
        let order = self.target(cgroup.id(), |target| Arc::clone(&target.order))?;
        let _turn = order.lock().await;
        let target = self.ask(cgroup.id(), to)?;
        // The pod goes up before the container does.
        self.raise_pod(&target).await?;
        let resources = with_memory(to, &target.said);
        let updated = self.runtime.update(&target.original.id, resources).await;
        if let Err(error) = &updated
            && !error.is_uncertain()
        {
            let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
            self.ask(cgroup.id(), limit)?;
        }
        // And down after it, whether or not it did.
        let lowered = self.lower_pod(cgroup).await;
        updated.map_err(refusal)?;
        lowered
    }

    /// The limit that a pod must have for what its containers have been asked to have.
    fn pod_limit(&self, target: &Target) -> Option<(Cgroup, Bytes)> {
        let (pod, at_rest) = (target.pod.clone()?, target.original.pod_limit?);
        let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |target: &&Target| target.pod.as_ref() == Some(&pod);
        let raised = targets.values().filter(same);
        let raised = raised.map(|target| target.original.raised_by());
        let limit = raised.fold(at_rest, Bytes::plus);
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
