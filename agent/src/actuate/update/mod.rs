//! Changing a container's limit through its runtime: CRI's UpdateContainerResources.
//!
//! The runtime remembers what it was asked for and sends all of it to the kernel with every later update, so
//! what is set behind its back is lost by the next change of the CPU. It is slow (it runs `runc`), so a container
//! is held meanwhile, as for the API. The memory limit is sent, with swap where the runtime would take it away and
//! the CPU quota where that is moved ([`super::quota`]): one call at a time for each container, because a call that
//! carries what was true before the last would undo it.
//!
//! A runtime that is away or late does not cost a container its life: the raise is written by hand then, within what
//! the policy allows, and the runtime told until it knows ([`super::tell`]).
//!
//! The pod's own limit moves by as much, before a raise and after a lowering ([`Pod`]).

mod limit;

use std::{
    ptr,
    sync::{Arc, atomic::AtomicBool, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{Bytes, CgroupId, Cpu, Nanos, Reason};
use tokio::{runtime::Handle, sync::Notify, time::Instant};

pub(super) use self::limit::{LATE, late_after};
use super::{
    containers::{Containers, Moved, Owner, QuotaTimes},
    pod::Pod,
    targets::Targets,
    turns::{Turn, Turns},
};
use crate::{
    cgroup::Cgroup,
    cri::{LinuxContainerResources, Runtime, RuntimeError, resources},
    guard::{Input, Refused, Requester},
    ledger::Record,
    originals::{Original, Records},
    quota::NotSet,
};

/// A limit that is asked for.
#[derive(Clone, Copy, Debug)]
pub(in crate::actuate) struct Wanted {
    pub(in crate::actuate) to: Bytes,
    /// When it must be in force, where somebody is held for it.
    pub(in crate::actuate) deadline: Option<Instant>,
}

/// Who can wait for less than an update usually takes is raised by writing it first: on a busy node one was asked for 0.24 s
/// before the end of a patience, and its container killed 0.4 s after that (seen in `storm`).
const UPDATE_TAKES: Duration = Duration::from_millis(500);

/// A guarded container, as its runtime knows it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// What it had, and what we have asked for.
    pub original: Original,
    /// What the runtime said of its resources when it was asked last: what may swap is kept.
    pub said: Option<LinuxContainerResources>,
    /// Its pod.
    pub pod: Option<Arc<Pod>>,
    /// Whether the controller could not guard it: to be tried again.
    pub is_unguarded: bool,
    /// What is asked for and not yet on its way.
    pub(in crate::actuate) wanted: Option<Wanted>,
    /// Whether a memory limit is asked for that the runtime does not know yet.
    pub(in crate::actuate) is_moving: bool,
    pub(in crate::actuate) times: QuotaTimes,
    /// Whether a task tells the runtime, which [`Target::changed`] wakes.
    pub(in crate::actuate) is_telling: bool,
    pub(in crate::actuate) changed: Arc<Notify>,
    pub(in crate::actuate) turns: Turns,
}

impl Moved for Target {
    fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn original(&self) -> &Original {
        &self.original
    }

    fn original_mut(&mut self) -> &mut Original {
        &mut self.original
    }

    fn pod(&self) -> Option<&Arc<Pod>> {
        self.pod.as_ref()
    }

    fn times(&mut self) -> &mut QuotaTimes {
        &mut self.times
    }
}

impl Owner for Updater {
    type Target = Target;

    fn containers(&self) -> &Containers<Target> {
        &self.containers
    }

    fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet> {
        self.containers.set_quota(cgroup, to, reason)?;
        let woken = self.wake(cgroup.id(), |_| {});
        woken.map_err(|refused| refused.why.into())
    }

    fn rests(&self, cgroup: &Cgroup, at_rest: Cpu) {
        // Whoever tells finds that there is nothing to tell any more, or that the runtime knows another.
        if self.containers.rests(cgroup.id(), at_rest)
            && let Err(refused) = self.wake(cgroup.id(), |_| {})
        {
            tracing::debug!(why = refused.why, "the runtime is not told of a CPU quota");
        }
    }
}

impl Target {
    /// One that nothing was asked for yet.
    #[must_use]
    pub fn new(
        cgroup: Cgroup,
        original: Original,
        said: Option<LinuxContainerResources>,
        pod: Option<Arc<Pod>>,
    ) -> Self {
        Self {
            cgroup,
            original,
            said,
            pod,
            is_unguarded: false,
            wanted: None,
            is_moving: false,
            times: QuotaTimes::default(),
            is_telling: false,
            changed: Arc::default(),
            turns: Turns::default(),
        }
    }

    /// Whether something is asked for that the runtime does not know yet: it may arrive at any moment.
    #[must_use]
    pub const fn is_telling(&self) -> bool {
        self.is_telling
    }

    /// Whether that is a memory limit.
    #[must_use]
    pub const fn is_moving(&self) -> bool {
        self.is_moving
    }

    /// Whether it is one of a pod's.
    #[must_use]
    pub fn is_in(&self, pod: &Pod) -> bool {
        self.pod.as_deref().is_some_and(|own| ptr::eq(own, pod))
    }
}

/// Sends updates; clones share what they know.
#[derive(Clone, Debug)]
pub struct Updater {
    runtime: Runtime,
    pub(in crate::actuate) tasks: Handle,
    containers: Containers<Target>,
    inputs: SyncSender<Input>,
    /// Calls that are under way for containers that were let go: they may be adopted again, as when the runtime loses sight of
    /// them while it is started.
    left: Targets<Turns>,
    /// Whether the runtime was late when it was asked last.
    pub(in crate::actuate) is_late: Arc<AtomicBool>,
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
            containers: Containers::new(records),
            inputs,
            left: Targets::default(),
            is_late: Arc::default(),
        }
    }

    /// What may be asked for.
    #[must_use]
    pub const fn targets(&self) -> &Targets<Target> {
        self.containers.targets()
    }

    /// The runtime that is asked.
    #[must_use]
    pub const fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// What the runtime says of a container's resources; it is asked once.
    ///
    /// # Errors
    ///
    /// [`RuntimeError`].
    pub async fn said(&self, target: &Target) -> Result<LinuxContainerResources, RuntimeError> {
        if let Some(said) = &target.said {
            return Ok(said.clone());
        }
        let (status, _process) = self.runtime.status(&target.original.id).await?;
        let said = resources(status);
        let id = target.cgroup.id();
        self.targets()
            .of(id, |target| target.said = Some(said.clone()));
        Ok(said)
    }

    /// Forgets a container: what is under way for it is not written down any more.
    pub fn forget(&self, cgroup: CgroupId) {
        let turns = self.targets().of(cgroup, |target| target.turns.clone());
        self.left.with(|left| {
            left.extend(turns.map(|turns| (cgroup, turns)));
            left.retain(|_, turns| turns.is_busy());
        });
        self.containers.forget(cgroup);
    }

    /// Waits until no call is under way for a container, from before it was adopted neither.
    pub(in crate::actuate) async fn turn(&self, target: &Target) -> Turn {
        let id = target.cgroup.id();
        if let Some(before) = self.left.of(id, |turns| turns.clone()) {
            drop(before.next().await);
            self.left.with(|left| drop(left.remove(&id)));
        }
        target.turns.next().await
    }

    /// Where originals are kept.
    #[must_use]
    pub const fn records(&self) -> &Records<Original> {
        self.containers.records()
    }

    /// Asks for a limit, in place of whatever is asked for and not yet on its way.
    pub fn send(&self, cgroup: CgroupId, to: Bytes) {
        self.want(cgroup, Wanted { to, deadline: None });
    }

    fn want(&self, cgroup: CgroupId, wanted: Wanted) {
        if let Err(refused) = self.wake(cgroup, |target| {
            target.wanted = Some(wanted);
            target.is_moving = true;
        }) {
            self.answer(cgroup, wanted.to, Err(refused));
        }
    }

    /// Changes what the runtime must be told of a container, and sees to it that it is.
    pub(in crate::actuate) fn wake(
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

    pub(in crate::actuate) fn answer(
        &self,
        cgroup: CgroupId,
        to: Bytes,
        result: Result<(), Refused>,
    ) {
        // A controller that has ended needs no answer.
        drop(self.inputs.try_send(Input::Answered { cgroup, to, result }));
    }

    pub(in crate::actuate) fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        self.targets()
            .of(cgroup, change)
            .ok_or_else(|| refused("the container is gone", false))
    }

    /// Changes what is known of a container, and writes it down. Several threads do: one at a time, or an older record
    /// would be written last. What cannot be written down is not changed.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn change<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Original) -> T,
    ) -> Result<T, Refused> {
        let changed = self.containers.change(cgroup, change);
        changed.map_err(|why| refused(&why, false))
    }
}

fn refused(why: &str, uncertain: bool) -> Refused {
    Refused {
        why: why.to_owned(),
        uncertain,
        // What passes is waited for here.
        is_passing: false,
    }
}

fn text(error: impl std::fmt::Display) -> Refused {
    refused(&error.to_string(), false)
}

fn refusal(error: &RuntimeError) -> Refused {
    refused(&error.to_string(), error.is_uncertain())
}

impl Requester for Updater {
    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, patience: Nanos) {
        let patience = Duration::from_nanos(patience.0);
        let _turn = (patience < UPDATE_TAKES)
            .then(|| self.raise_at_once(cgroup, to))
            .flatten();
        let deadline = Some(Instant::now() + patience);
        self.want(cgroup.id(), Wanted { to, deadline });
    }

    fn lower(&mut self, cgroup: &Cgroup, to: Bytes) {
        self.send(cgroup.id(), to);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.send(cgroup.id(), limit);
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
    }

    fn not_guarded(&mut self, cgroup: CgroupId) {
        self.targets()
            .of(cgroup, |target| target.is_unguarded = true);
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, os::unix::net::UnixListener, process, sync::mpsc::sync_channel};

    use bellows_core::{boost::Boosts, moved::MovedLimit};
    use tokio::time::sleep;

    use super::*;

    const ID: CgroupId = CgroupId(7);

    /// A runtime that says nothing, and one of its containers.
    fn updater(name: &str) -> (Updater, Cgroup, UnixListener) {
        let path = env::temp_dir().join(format!("bellows-update-{name}-{}", process::id()));
        fs::create_dir_all(&path).unwrap();
        let limit = Bytes::mib(64);
        fs::write(path.join("memory.max"), limit.0.to_string()).unwrap();
        let socket = path.join("socket");
        let silent = UnixListener::bind(&socket).unwrap();
        let (inputs, _answers) = sync_channel(8);
        let records = Records::at(path.join("records"));
        let runtime = Runtime::at(&socket).unwrap();
        let updater = Updater::new(runtime, Handle::current(), inputs, records);
        let cgroup = Cgroup::stand_in(&path, ID);
        let original = Original {
            id: "one".to_owned(),
            name: "one".to_owned(),
            limit: Some(MovedLimit::new(limit)),
            quota: None,
            boosts: Boosts::none(),
            has_begun: false,
            path,
        };
        let target = Target::new(cgroup.clone(), original, None, None);
        updater.targets().with(|all| drop(all.insert(ID, target)));
        (updater, cgroup, silent)
    }

    /// Whether a raise is in force at once, before any task has had its turn, and a moment after it was asked for.
    async fn is_raised(name: &str, patience: Nanos) -> [bool; 2] {
        let (mut updater, cgroup, _silent) = updater(name);
        let to = Bytes::mib(128);
        let is_in_force = || cgroup.limit("memory.max").unwrap().bytes() == to;
        Requester::raise(&mut updater, &cgroup, to, patience);
        let at_once = is_in_force();
        sleep(LATE / 2).await;
        let soon = is_in_force();
        drop(fs::remove_dir_all(cgroup.path()));
        [at_once, soon]
    }

    /// There was no room until its patience was nearly over: the runtime would answer to somebody who is dead.
    #[tokio::test(start_paused = true)]
    async fn who_can_wait_no_longer_is_raised_before_the_runtime_answers() {
        assert_eq!(is_raised("urgent", Nanos::millis(50)).await, [true, true]);
        assert_eq!(is_raised("soon", Nanos::millis(600)).await, [false, true]);
        assert_eq!(
            is_raised("patient", Nanos::millis(5000)).await,
            [false, false]
        );
    }
}
