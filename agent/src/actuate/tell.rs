//! Telling a runtime of limits until it knows them.
//!
//! One task for each container, one call at a time, always with the latest of memory and CPU: a call that carries what
//! was true before the last would undo it. While the runtime is known to be late, raises are written first, where systemd
//! owns the cgroup once that answers. A call that
//! is late is waited for no longer when a newer value of memory is asked for, but it goes on, and its successor takes its
//! turn after it ([`super::turns`]).

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bellows_core::{Bytes, CgroupId};
use tokio::{
    select,
    time::{Instant, sleep_until, timeout},
};

use super::{
    containers::Owner as _,
    shrink, systemd,
    update::{LATE, Target, Updater, late_after},
};
use crate::{
    cgroup::Limit,
    cri::{LinuxContainerResources, RuntimeError, memory_limit, with_memory, with_quota},
    guard::Refused,
    metrics::METRICS,
};

/// How soon a runtime that did not take a limit is told of it again, and how seldom at last.
const SETTLE: Duration = Duration::from_millis(500);
const LONGEST_SETTLE: Duration = Duration::from_secs(2);
/// Longer than any call may take.
const WHATEVER_IT_TAKES: Duration = Duration::from_secs(60);

/// How telling the runtime of a limit ended.
pub(super) enum Told {
    /// It knows, or there is nothing to know.
    Known,
    /// The limit is in force, and it must be told again.
    Untold(Bytes),
    /// The same, and the runtime is away: to be asked soon costs it nothing.
    Away(Bytes),
    /// Something else is asked for meanwhile.
    Overtaken,
}

/// How a call ended.
pub(super) enum Delivered {
    /// With an answer.
    Answered(Result<(), RuntimeError>),
    /// Without one, for as long as it was waited for.
    Silent,
    /// It was late, and something else is asked for.
    Overtaken,
}

impl Updater {
    /// Tells the runtime what is asked for until it knows the latest. With its next update of anything else it would
    /// set the limit that it remembers.
    pub(super) async fn tell(self, id: CgroupId) {
        let Ok(changed) = self.target(id, |target| Arc::clone(&target.changed)) else {
            return;
        };
        let (mut untold, mut wait) = (None, SETTLE);
        let mut again = Instant::now();
        loop {
            let next = self.target(id, |target| {
                if !Arc::ptr_eq(&changed, &target.changed) {
                    // It was left and adopted again: another task is for that.
                    return None;
                }
                let wanted = target.wanted.take();
                let quota_due = target.times.due(target.original.quota.as_ref());
                target.is_moving = wanted.is_some() || untold.is_some();
                target.is_telling = target.is_moving || quota_due.is_some();
                Some((wanted, quota_due, target.clone()))
            });
            let Ok(Some((wanted, quota_due, target))) = next else {
                return;
            };
            let told = match (wanted, untold, quota_due) {
                (Some(wanted), _, _) => {
                    wait = SETTLE;
                    let told = self.update(&target, wanted).await;
                    told.unwrap_or_else(|refused| {
                        self.answer(id, wanted.to, Err(refused));
                        self.left_untold(id, wanted.to, untold)
                            .map_or(Told::Known, Told::Untold)
                    })
                }
                (None, Some(to), _) => {
                    select! {
                        () = changed.notified() => continue,
                        () = sleep_until(again) => {}
                    }
                    let told = self.tell_again(&target, to).await;
                    wait = match told {
                        Told::Away(_) => SETTLE,
                        _ => (wait * 2).min(LONGEST_SETTLE),
                    };
                    told
                }
                (None, None, Some(due)) => {
                    select! {
                        () = changed.notified() => continue,
                        () = sleep_until(due) => {}
                    }
                    self.tell_quota(&target).await
                }
                (None, None, None) => return,
            };
            again = Instant::now() + wait;
            untold = match told {
                Told::Known => None,
                Told::Untold(to) | Told::Away(to) => Some(to),
                Told::Overtaken => untold,
            };
        }
    }

    /// The limit in force, if it is ours and was raised without the runtime, which is to be told of it all the same when what
    /// was `wanted` is refused.
    fn left_untold(&self, id: CgroupId, wanted: Bytes, untold: Option<Bytes>) -> Option<Bytes> {
        let target = self.targets().of(id, |target| target.clone())?;
        let moved = target.original.limit?;
        let in_force = target.cgroup.limit("memory.max").ok()?.bytes();
        let is_raised = in_force > moved.at_rest && moved.is_ours(in_force);
        (is_raised && (in_force == wanted || untold.is_some())).then_some(in_force)
    }

    async fn tell_again(&self, target: &Target, to: Bytes) -> Told {
        if !shrink::fits(&target.cgroup, to).unwrap_or(false) {
            // Whatever grew is raised again.
            return Told::Untold(to);
        }
        let delivered = self.deliver_anyway(target, Some(to));
        match delivered.await {
            Ok(Delivered::Answered(Err(error @ RuntimeError::Refused { .. })))
                if error.is_uncertain() =>
            {
                Told::Away(to)
            }
            Ok(Delivered::Answered(Err(error))) if !error.is_gone() => Told::Untold(to),
            Ok(Delivered::Answered(_)) | Err(_) => Told::Known,
            Ok(Delivered::Silent) => Told::Untold(to),
            Ok(Delivered::Overtaken) => Told::Overtaken,
        }
    }

    /// Tells the runtime of the CPU quota, with the memory limit that is in force: it would set the one that it
    /// remembers, which may be below usage.
    async fn tell_quota(&self, target: &Target) -> Told {
        let told = match target.cgroup.limit("memory.max") {
            Ok(Limit::At(limit)) => self.deliver_anyway(target, Some(limit)).await,
            Ok(Limit::Max) if self.has_no_limit(target).await => {
                self.deliver_anyway(target, None).await
            }
            // Somebody has lifted a limit behind the runtime's back, which it would set again.
            Ok(Limit::Max) | Err(_) => Ok(Delivered::Silent),
        };
        if !matches!(told, Ok(Delivered::Answered(Ok(())))) {
            tracing::warn!(path = %target.cgroup.path().display(), "the runtime does not know the CPU quota yet");
        }
        // Known or not, it is not asked again at once.
        drop(self.target(target.cgroup.id(), |target| {
            target.times.told = Some(Instant::now());
        }));
        Told::Known
    }

    /// Whether the runtime knows of no memory limit.
    async fn has_no_limit(&self, target: &Target) -> bool {
        let said = self.said(target).await;
        said.is_ok_and(|said| memory_limit(&said).is_none())
    }

    /// Tells the runtime what is in force already, however long that takes.
    async fn deliver_anyway(
        &self,
        target: &Target,
        memory: Option<Bytes>,
    ) -> Result<Delivered, Refused> {
        let (always, nothing) = (|| Ok(()), || Ok(()));
        self.deliver(target, memory, WHATEVER_IT_TAKES, None, always, nothing)
            .await
    }

    /// Asks the runtime, if it still may when it has its turn, and waits for its answer: for as long as `longest`, and once
    /// it is late, at the latest at the `deadline`, after `late`, only until something else is asked for.
    pub(super) async fn deliver(
        &self,
        target: &Target,
        memory: Option<Bytes>,
        longest: Duration,
        deadline: Option<Instant>,
        may_go: impl Fn() -> Result<(), Refused>,
        late: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<Delivered, Refused> {
        let is_late = self.is_late.load(Ordering::Relaxed);
        let turn = loop {
            if self.target(target.cgroup.id(), |target| target.wanted.is_some())? {
                return Ok(Delivered::Overtaken);
            }
            select! {
                turn = self.turn(target) => {
                    // Both may have come at once, and it may have grown meanwhile.
                    if self.target(target.cgroup.id(), |target| target.wanted.is_some())? {
                        return Ok(Delivered::Overtaken);
                    }
                    may_go()?;
                    break turn;
                }
                () = target.changed.notified() => {}
            }
        };
        let (this, own) = (self.clone(), target.clone());
        let call = self.tasks.spawn(async move {
            let called = this.call(&own, memory).await;
            drop(turn);
            called
        });
        target.turns.began(call.abort_handle());
        let mut call = pin!(timeout(longest, call));
        let patience = if is_late {
            Duration::ZERO
        } else {
            late_after(deadline)
        };
        let called = select! {
            biased;
            called = &mut call => called,
            is_systemds = systemd::late(patience, target.cgroup.path(), deadline) => {
                // Who cannot wait for as long says nothing of the runtime, nor does one that waits for systemd.
                if is_late || (patience == LATE && !is_systemds) {
                    self.is_late.store(true, Ordering::Relaxed);
                    METRICS.runtime_late.inc();
                }
                late()?;
                loop {
                    if self.target(target.cgroup.id(), |target| target.wanted.is_some())? {
                        return Ok(Delivered::Overtaken);
                    }
                    select! {
                        called = &mut call => break called,
                        () = target.changed.notified() => {}
                    }
                }
            }
        };
        Ok(match called {
            // It was given up, or has ended with this process.
            Ok(Err(_ended)) => Delivered::Silent,
            Ok(Ok(answer)) => {
                if answer.is_ok() {
                    self.is_late.store(false, Ordering::Relaxed);
                }
                Delivered::Answered(answer)
            }
            Err(_elapsed) => Delivered::Silent,
        })
    }

    /// Asks the runtime for a memory limit, and for the CPU quota where that is moved.
    async fn call(&self, target: &Target, memory: Option<Bytes>) -> Result<(), RuntimeError> {
        let id = target.cgroup.id();
        let resources = match memory {
            Some(memory) => with_memory(memory, &self.said(target).await?),
            None => LinuxContainerResources::default(),
        };
        let original = &target.original.id;
        let Some(quota) = self.containers().quota_to_tell(id) else {
            return self.runtime().update(original, resources).await;
        };
        let resources = with_quota(resources, quota);
        let answer = self.runtime().update(original, resources).await;
        if !answer.as_ref().is_err_and(RuntimeError::is_uncertain) {
            self.containers().quota_is_told(id, quota, answer.is_ok());
        }
        answer
    }
}
