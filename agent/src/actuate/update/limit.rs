//! One limit on its way: for the pod, for the container, and by hand where its runtime is late or fails.
//!
//! The order is what keeps it alive: a pod goes up before its container and down after it, and a limit is written down as
//! ours before anybody is asked for it.

use std::{collections::BTreeSet, time::Duration};

use bellows_core::Bytes;
use tokio::{select, time::Instant};

use super::{Target, Updater, Wanted, refusal, refused, text};
use crate::{
    actuate::{
        pod::{May, Pod, Who},
        shrink, systemd,
        tell::{Delivered, Told},
        turns::Turn,
    },
    cgroup::Cgroup,
    cri::RuntimeError,
    guard::Refused,
    metrics::METRICS,
};

/// An update that takes longer is late. On a busy emulated node they take up to 0.8 s.
pub(in crate::actuate) const LATE: Duration = Duration::from_millis(1500);
/// A lowering that takes longer is given up: the controller waits no longer, and guards the old limit then.
const LOWERING: Duration = Duration::from_secs(5);
/// A raise that is in force already is not waited for any longer: it is told again.
const RAISE: Duration = Duration::from_secs(15);

/// Where there is less time than this systemd is not asked first.
const SYSTEMD_TAKES: Duration = Duration::from_millis(200);

impl Updater {
    /// Writes down what will be asked for, before it is.
    fn ask(&self, cgroup: &Cgroup, to: Bytes) -> Result<(), Refused> {
        let in_force = cgroup.limit("memory.max").map_err(text)?.bytes();
        self.change(cgroup.id(), |original| {
            if let Some(limit) = &mut original.limit {
                limit.ask(to, in_force);
            }
        })
    }

    pub(in crate::actuate) async fn update(
        &self,
        target: &Target,
        wanted: Wanted,
    ) -> Result<Told, Refused> {
        let Wanted { to, deadline } = wanted;
        let cgroup = &target.cgroup;
        let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
        let moved = target.original.limit.as_ref();
        if to < limit && !moved.is_some_and(|moved| moved.is_ours(limit)) {
            let why = format!("somebody else has set the limit to {limit}, which is not lowered");
            return Err(refused(&why, false));
        }
        if to < limit && !shrink::fits(cgroup, to).map_err(text)? {
            return Err(refused("usage has grown meanwhile", false));
        }
        self.ask(cgroup, to)?;
        // The pod goes up before the container does.
        self.settle_pod(target.pod.as_deref(), May::Rise, deadline)
            .await?;
        let told = if to < limit {
            self.lower(target, to).await
        } else {
            self.raise(target, wanted).await
        };
        // And down after it, whether or not it did. What is asked for next does not wait for that.
        let (this, pod) = (self.clone(), target.pod.clone());
        self.tasks.spawn(async move {
            if let Err(Refused { why, .. }) = this.settle_pod(pod.as_deref(), May::Fall, None).await
            {
                tracing::warn!(why, "a pod's limit stays for now");
            }
        });
        told
    }

    /// Raises the limit of who has no patience left by writing it: until a task has its turn it may be dead (seen: after 0.2 s
    /// on a busy node). The runtime is told as of any other. Not while a call is under way that may set an older limit, and
    /// none begins before the turn is dropped: by then it must be known what is wanted.
    pub(super) fn raise_at_once(&self, cgroup: &Cgroup, to: Bytes) -> Option<Turn> {
        let id = cgroup.id();
        let target = self.targets().of(id, |target| target.clone())?;
        if self.left.of(id, |turns| turns.is_busy()) == Some(true) {
            return None;
        }
        let turn = target.turns.at_once()?;
        if let Err(refused) = self.write(&target, to) {
            tracing::warn!(path = %cgroup.path().display(), why = refused.why, "the limit is not raised at once");
        }
        Some(turn)
    }

    /// Writes a limit for its pod, then for itself, and answers when it is in force.
    fn write(&self, target: &Target, to: Bytes) -> Result<(), Refused> {
        self.ask(&target.cgroup, to)?;
        if let Some(pod) = target.pod.as_deref() {
            let raised = |who| self.raised_in(pod, who);
            pod.raise_by_hand(&raised).map_err(text)?;
        }
        self.write_own(&target.cgroup, to)
    }

    /// The same of the container alone.
    fn write_own(&self, cgroup: &Cgroup, to: Bytes) -> Result<(), Refused> {
        if fall_back(cgroup, to)? {
            self.answer(cgroup.id(), to, Ok(()));
        }
        Ok(())
    }

    async fn lower(&self, target: &Target, to: Bytes) -> Result<Told, Refused> {
        let still_fits = || {
            let fits = shrink::fits(&target.cgroup, to).map_err(text)?;
            let grew = || refused("usage has grown meanwhile", false);
            fits.then_some(()).ok_or_else(grew)
        };
        let delivered = self.deliver(target, Some(to), LOWERING, None, still_fits, || Ok(()));
        match delivered.await? {
            Delivered::Answered(Ok(())) => Ok(Told::Known),
            Delivered::Answered(Err(error)) => {
                self.failed(target, &error)?;
                Err(refusal(&error))
            }
            Delivered::Silent => {
                let why = format!("no answer within {} s", LOWERING.as_secs());
                Err(refused(&why, true))
            }
            Delivered::Overtaken => Ok(Told::Overtaken),
        }
    }

    async fn raise(&self, target: &Target, wanted: Wanted) -> Result<Told, Refused> {
        let Wanted { to, deadline } = wanted;
        let cgroup = &target.cgroup;
        let by_hand = || self.write_own(cgroup, to);
        let error = match self
            .deliver(target, Some(to), RAISE, deadline, || Ok(()), by_hand)
            .await?
        {
            Delivered::Answered(Ok(())) => return Ok(Told::Known),
            Delivered::Overtaken => return Ok(Told::Overtaken),
            Delivered::Silent => return Ok(Told::Untold(to)),
            Delivered::Answered(Err(error)) => error,
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
        self.ask(&target.cgroup, limit)
    }

    /// Brings the limit of a pod to where its containers need it.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub async fn settle_pod(
        &self,
        pod: Option<&Pod>,
        may: May,
        deadline: Option<Instant>,
    ) -> Result<(), Refused> {
        let Some(pod) = pod else {
            return Ok(());
        };
        let raised = |who| self.raised_in(pod, who);
        let settled = pod.settle(&raised, may);
        let settled = match may {
            May::Fall => settled.await,
            // A container must not wait for longer than it can, nor be killed by its pod because systemd refuses: it is told
            // afterwards. Where there is no time it is not even begun: a call that is given up may come through all the same.
            May::Rise => {
                let late = late_after(deadline);
                let settled = if late < SYSTEMD_TAKES {
                    None
                } else {
                    select! {
                        biased;
                        settled = settled => Some(settled),
                        _ = systemd::late(late, pod.cgroup().path(), deadline) => None,
                    }
                };
                match settled {
                    Some(Ok(())) => Ok(()),
                    failed => {
                        tracing::warn!(path = %pod.cgroup().path().display(), ?failed, "the limit of a pod is raised by hand");
                        pod.raise_by_hand(&raised)
                    }
                }
            }
        };
        settled.map_err(text)?;
        // systemd may have set its own CPU quota again on the way.
        self.containers
            .settle_pod_quota(Some(pod), May::Rise)
            .map_err(|why| refused(&why, false))
    }

    /// By how much each container of a pod is raised.
    fn raised_in(&self, pod: &Pod, who: Who) -> Vec<Bytes> {
        let (mut limits, mut known): (Vec<_>, BTreeSet<_>) = self.targets().with(|targets| {
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
            let left = self.records().all().into_iter();
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

/// After which time whoever was asked is late, where that must be in force by `deadline`.
pub(in crate::actuate) fn late_after(deadline: Option<Instant>) -> Duration {
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
    deadline.map_or(LATE, |deadline| left(deadline).min(LATE))
}

/// Raises the limit by writing it, where the runtime is late or fails: its container would be killed. The
/// policy allows the limit, and it is written down as ours. Returns whether it is in force.
fn fall_back(cgroup: &Cgroup, to: Bytes) -> Result<bool, Refused> {
    let cgroup = cgroup.clone().with_inner();
    let limit = cgroup.limit_in_force().map_err(text)?;
    if limit < to {
        // Usage is below a limit that is raised: nothing is reclaimed here.
        cgroup.raise_to(to).map_err(text)?;
        METRICS.raises_by_hand.inc();
    }
    Ok(limit <= to)
}
