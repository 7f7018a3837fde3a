//! Containers that are only watched: what would have been done for them is told, and nothing is done.
//!
//! They are in the table of the kernel programs with a watermark, and in none of the reflex: nobody can hold, brake or
//! raise them. A watermark that was reached is switched off until the container is below it again, because nobody
//! raises it: a container that stays above would wake the reflex a thousand times a second.
//!
//! The kernel tells that it entered the OOM killer for a container or for its pod, whose limit is often the same and is
//! then the first to be reached. Who was killed, if anybody, is what the container's own `memory.events` counts.
//!
//! It must not write to any file of theirs.

use std::mem::replace;

use bellows_core::{
    Bytes, CgroupId, Nanos, Policy, Thresholds,
    observe::{Kill, Observed, Would, WouldRaise},
};
use bellows_ebpf_common::{KIND_OOM, KIND_WATERMARK, MemoryEvent};

use super::{Controller, GuardError, Requester};
use crate::{
    actuate::reflex::Command,
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record,
    metrics::METRICS,
};

/// How long after an entry of the OOM killer a kill is looked for.
const LOOKED_FOR: Nanos = Nanos::millis(2000);

/// A cgroup that is to be watched.
#[derive(Clone, Debug)]
pub struct Watching {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The rules that it would have.
    pub policy: Policy,
    /// What it is, for people.
    pub name: String,
    /// Whether people are told of each raise that it would have got, and not only of kills.
    pub recommends: bool,
}

/// One that is.
pub(super) struct Watched {
    watching: Watching,
    observed: Observed,
    /// Its pod's cgroup.
    pod: Option<CgroupId>,
    /// Whether the kernel tells of its watermark.
    is_armed: bool,
    /// Kills in it so far.
    kills: u64,
    /// When the OOM killer was entered for it, or for its pod, and nobody was seen killed yet.
    oom: Option<Nanos>,
}

impl Watched {
    /// The ledger's record of it.
    pub(super) fn record(&self, at: Nanos) -> Record {
        Record::Observe {
            at,
            cgroup: self.watching.cgroup.id(),
            name: self.watching.name.clone(),
            limit: self.observed.limit(),
            ceiling: self.watching.policy.ceiling,
        }
    }

    pub(super) const fn is_active(&self) -> bool {
        self.oom.is_some()
    }

    /// Whether somebody was killed since the last look. One that is gone right after the OOM killer came has died of it.
    fn has_killed(&mut self) -> bool {
        match self.watching.cgroup.events() {
            Ok(events) => events.oom_kill > replace(&mut self.kills, events.oom_kill),
            Err(error) => error.is_gone(),
        }
    }
}

impl<R: Requester> Controller<R> {
    /// Watches a cgroup, or goes on with other rules.
    pub(super) fn observe(&mut self, watching: Watching) -> Result<(), GuardError> {
        let cgroup = &watching.cgroup;
        let id = cgroup.id();
        let limit = cgroup.limit_in_force()?;
        let pod = cgroup
            .path()
            .parent()
            .and_then(|pod| Cgroup::open(pod).ok());
        let watched = Watched {
            observed: Observed::new(watching.policy, limit),
            pod: pod.map(|pod| pod.id()),
            is_armed: false,
            // Whoever was killed before was not so by this limit.
            kills: cgroup.events()?.oom_kill,
            oom: None,
            watching,
        };
        let record = watched.record(now());
        self.ledger.append(&record)?;
        self.requester.record(&watched.watching.cgroup, &record);
        if let Some(kernel) = &mut self.kernel {
            kernel.track(id)?;
        }
        if let Some(pod) = watched.pod {
            self.reflex.send(Command::Watch(pod, None));
        }
        self.observed.insert(id, watched);
        self.arm_observed(id);
        Ok(())
    }

    fn arm_observed(&mut self, id: CgroupId) {
        if let Some(watched) = self.observed.get_mut(&id) {
            watched.is_armed = true;
            let watermark = watched.observed.thresholds().map(Thresholds::watermarks);
            self.reflex.send(Command::Watch(id, watermark));
        }
    }

    /// Watches it no more.
    pub(super) fn stop_observing(&mut self, id: CgroupId) {
        // It may have been killed since the last look.
        self.look_for_kills();
        let Some(watched) = self.observed.remove(&id) else {
            return;
        };
        let mut others = self.observed.values();
        let is_shared = others.any(|other| other.pod == watched.pod);
        let pod = watched.pod.filter(|_| !is_shared);
        for id in [Some(id), pod].into_iter().flatten() {
            self.reflex.send(Command::Unwatch(id));
        }
        if let Some(kernel) = &mut self.kernel {
            kernel.forget(id);
        }
        let record = Record::Unwatch {
            at: now(),
            cgroup: id,
        };
        self.tell(&watched.watching.cgroup, &record);
    }

    /// Takes an event of one of them, or of a pod of theirs.
    pub(super) fn take_observed(&mut self, event: &MemoryEvent) {
        let id = CgroupId(event.cgroup_id);
        let at = Nanos(event.at_ns).min(now());
        match event.kind {
            KIND_WATERMARK => self.take_growth(id, at, event),
            KIND_OOM => {
                let meant = self.observed.iter_mut();
                let meant = meant.filter(|(own, watched)| **own == id || watched.pod == Some(id));
                for (_, watched) in meant {
                    watched.oom = Some(at);
                }
                self.look_for_kills();
            }
            _ => {}
        }
    }

    fn take_growth(&mut self, id: CgroupId, at: Nanos, event: &MemoryEvent) {
        let Some(watched) = self.observed.get_mut(&id) else {
            return;
        };
        if Bytes::from_pages(event.limit_pages) != watched.observed.limit() {
            // Somebody has set another, for which another watermark holds.
            let again = watched.watching.clone();
            if let Err(error) = self.observe(again) {
                tracing::warn!(%error, "a container is not watched any more");
                self.stop_observing(id);
            }
            return;
        }
        watched.is_armed = false;
        let cgroup = &watched.watching.cgroup;
        if cgroup
            .limit("memory.high")
            .is_ok_and(|high| high != Limit::Max)
        {
            watched.observed.without_brake();
        }
        self.reflex.send(Command::Watch(id, None));
        let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
        let (grown, within) = (
            Bytes::from_pages(event.window_pages),
            Nanos(event.window_ns),
        );
        let Some(would) = watched.observed.grew(at, demand, grown, within) else {
            return;
        };
        if watched.watching.recommends {
            let (name, text) = (&watched.watching.name, told_raise(&would));
            tracing::warn!(name, "{text}");
        }
        let record = Record::WouldRaise {
            at,
            cgroup: id,
            would,
        };
        let cgroup = watched.watching.cgroup.clone();
        self.tell(&cgroup, &record);
    }

    /// Looks at those for whom the OOM killer was entered.
    pub(super) fn look_for_kills(&mut self) {
        let measured = self.raise_times.p95();
        let mut told = Vec::new();
        for (&id, watched) in &mut self.observed {
            let Some(at) = watched.oom else {
                continue;
            };
            let is_over = now().since(at) >= LOOKED_FOR;
            let has_killed = watched.has_killed();
            if has_killed || is_over {
                watched.oom = None;
            }
            let kill = has_killed
                .then(|| watched.observed.is_killed(at, measured))
                .flatten();
            if let Some(kill) = kill {
                METRICS.observed(kill.would);
                let (name, text) = (&watched.watching.name, told_kill(&kill));
                tracing::warn!(name, "{text}");
                let record = Record::ObservedKill {
                    at,
                    cgroup: id,
                    kill,
                };
                told.push((watched.watching.cgroup.clone(), record));
            }
        }
        for (cgroup, record) in told {
            self.tell(&cgroup, &record);
        }
    }

    /// Looks at those that were above their watermark, whether they still are.
    pub(super) fn look_at_observed(&mut self) {
        self.look_for_kills();
        let mut below = Vec::new();
        for (&id, watched) in &mut self.observed {
            if watched.is_armed {
                continue;
            }
            let watermark = watched.observed.thresholds().map(|at| at.watermark);
            // Of one that is gone whoever watches its runtime tells.
            let Ok(stat) = watched.watching.cgroup.stat() else {
                continue;
            };
            if watermark.is_none_or(|watermark| stat.demand() < watermark) {
                watched.observed.fell();
                below.push(id);
            }
        }
        for id in below {
            self.arm_observed(id);
        }
    }

    fn tell(&mut self, cgroup: &Cgroup, record: &Record) {
        if let Err(error) = self.ledger.append(record) {
            tracing::warn!(%error, "what was observed is not in the ledger");
        }
        self.requester.record(cgroup, record);
    }
}

/// A raise in words.
#[must_use]
pub fn told_raise(would: &WouldRaise) -> String {
    let WouldRaise { demand, from, to } = would;
    format!("reached the watermark with {demand} of {from}: would be raised to {to}")
}

/// A kill in words.
#[must_use]
pub fn told_kill(kill: &Kill) -> String {
    let Kill {
        limit,
        lead,
        rate,
        answer,
        is_measured,
        to,
        is_all,
        would,
    } = kill;
    let how = match lead {
        Some(lead) => format!(
            "killed at {limit}, {}.{} ms after its watermark, which it reached growing by {rate} a second",
            lead.0 / 1_000_000,
            lead.0 / 100_000 % 10
        ),
        None => format!("killed at {limit}"),
    };
    let takes = if *is_measured {
        format!("{} ms that a raise takes on this node", answer.as_millis())
    } else {
        format!(
            "{} ms that a raise is taken for, since none was made yet",
            answer.as_millis()
        )
    };
    let all = if *is_all {
        ", all that its policy allows"
    } else {
        ""
    };
    let what = match would {
        Would::Live => format!(
            "in mode Act it would have been held there for the {takes}, and raised to {to}{all}: it would have lived"
        ),
        Would::AtCeiling => {
            "its policy allows no more: raise its maximum, or the limit".to_owned()
        }
        Would::Impatient => format!(
            "its probes, or somebody else's memory.high, do not let it be held for the {takes}: allow the probes more failures"
        ),
        Would::TooFast => {
            "in mode Act it might have been killed, too: it was at its limit before anybody reacts; give it a higher one"
                .to_owned()
        }
        Would::Unseen => "its watermark was not seen before: nothing is known".to_owned(),
    };
    format!("{how}; {what}")
}
