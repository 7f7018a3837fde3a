//! The controller: keeps each guarded container's history, asks core, and has the plan carried out.
//!
//! It is a plain loop over one channel, so that everything that happens to a guard happens in one
//! order. The urgent part is not here: by the time that the controller hears of a watermark the
//! reflex has written or held what was armed. The controller must not wait for anything but its
//! channel and the reclaim of a shrink; requests to others are sent through [`Requester`] and
//! answered with an [`Input`].

use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender},
    time::{Duration, Instant},
};

use bellows_core::{
    Action, Actuation, Bytes, CgroupId, History, Nanos, Policy, Reason, Snapshot, decide,
};
use bellows_ebpf_common::{Growth, Holds, KIND_EXIT, KIND_OOM, KIND_WATERMARK, MemoryEvent};
use thiserror::Error;

use crate::{
    actuate::{
        reflex::{Arm, Command, Controls, Reflex, Verdict, now},
        shrink,
    },
    cgroup::{Cgroup, CgroupError},
    ledger::{Ledger, Record},
    signal::programs::{Kernel, LoadError},
};

/// How often a guard is looked at while its limit is above its original or it is held.
const ACTIVE_TICK: Duration = Duration::from_millis(100);
/// How often the controller looks at life events when nothing is raised.
const QUIET_TICK: Duration = Duration::from_secs(1);
/// A refused raise is not asked for again for this long.
const REFUSED_FOR: Nanos = Nanos::millis(10_000);
/// A request that is not in force after this long got lost or was deferred. The kubelet reports a
/// limit below usage after 12.9 s (measured on 1.37).
const REQUEST_LOST: Nanos = Nanos::millis(15_000);
/// How many requests the 95th percentile of their time is taken over.
const LATENCIES: usize = 20;
/// Room for inputs that the controller has not taken yet.
pub const INPUTS: usize = 4096;

/// Whatever reaches the controller.
#[derive(Debug)]
pub enum Input {
    /// The reflex saw or did something.
    Verdict(Verdict),
    /// A request was answered.
    Answered {
        /// For which cgroup.
        cgroup: CgroupId,
        /// The limit that was asked for.
        to: Bytes,
        /// Whether it is in force, and why not.
        result: Result<(), Refused>,
    },
    /// Guard a cgroup from now on; the name is for people.
    Adopt(Cgroup, Policy, String),
    /// A guarded cgroup's rules have changed.
    Policy(CgroupId, Policy),
    /// Guard it no more.
    Forget(CgroupId),
    /// End.
    Stop,
}

/// Why a request was not carried out.
#[derive(Clone, Debug)]
pub struct Refused {
    /// What to tell people.
    pub why: String,
    /// Whether it may be carried out all the same: nobody has answered.
    pub uncertain: bool,
}

/// Carries changes to limits that somebody else owns.
pub trait Requester {
    /// Asks for a raise. The answer comes as [`Input::Answered`]; must not block.
    fn raise(&mut self, cgroup: &Cgroup, from: Bytes, to: Bytes);

    /// Lowers the limit; usage has been brought below `to` already. Must not block.
    fn lower(&mut self, cgroup: &Cgroup, from: Bytes, to: Bytes);

    /// Takes back a request for `to` that was not carried out in time: the limit is still `limit`.
    fn take_back(&mut self, cgroup: &Cgroup, to: Bytes, limit: Bytes);

    /// Takes note of what was decided and observed, for people.
    fn record(&mut self, cgroup: &Cgroup, record: &Record);
}

/// Why a cgroup cannot be guarded.
#[derive(Debug, Error)]
pub enum GuardError {
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A map.
    #[error(transparent)]
    Kernel(#[from] LoadError),
    /// The ledger.
    #[error("the ledger cannot be written, so nothing is guarded: {0}; free memory on /run")]
    Ledger(#[from] std::io::Error),
}

/// What happened to a guarded cgroup, for the summary and the benches.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Limits over time, the first one at adoption.
    pub limits: Vec<(Nanos, Bytes)>,
    /// Raises.
    pub raises: u64,
    /// Shrinks.
    pub shrinks: u64,
    /// Times that it was held.
    pub holds: u64,
    /// Total time that it was held.
    pub held: Nanos,
    /// Highest demand seen.
    pub peak_demand: Bytes,
    /// Times that the OOM killer was entered.
    pub ooms: u64,
    /// Longest time from a kernel event to the raise that answered it.
    pub slowest_reaction: Nanos,
    /// Verdicts and records lost on the way.
    pub lost: u64,
    /// What failed.
    pub errors: Vec<String>,
    /// Times that the kernel held a thread for 10 ms or more.
    pub sleeps: u64,
    /// Charges seen by the growth hook.
    pub charges: u64,
    /// Times from a request to the limit in force, the latest first.
    pub latencies: Vec<Nanos>,
}

/// What a report keeps of each kind: a guard may live for months.
const KEPT: usize = 4096;

impl Report {
    fn failed(&mut self, error: String) {
        if self.errors.len() < KEPT {
            self.errors.push(error);
        }
    }
}

struct Guarded {
    cgroup: Cgroup,
    policy: Policy,
    history: History,
    limit: Bytes,
    requested: Option<(Bytes, Nanos)>,
    held_since: Option<Nanos>,
    refused_shrink: Option<(Bytes, Nanos)>,
    raise_not_before: Nanos,
    report: Report,
}

impl Guarded {
    const fn active(&self) -> bool {
        self.limit.0 != self.policy.original.0
            || self.held_since.is_some()
            || self.requested.is_some()
    }

    const fn snapshot(&self, now: Nanos) -> Snapshot {
        Snapshot {
            now,
            policy: self.policy,
            history: self.history,
            limit: self.limit,
            requested: self.requested,
            held_since: self.held_since,
            refused_shrink: self.refused_shrink,
            raise_not_before: self.raise_not_before,
        }
    }

    /// The lower limit that is on its way, if one is.
    fn lowering(&self) -> Option<Bytes> {
        self.requested
            .map(|(to, _)| to)
            .filter(|&to| to < self.limit)
    }

    fn limit_is(&mut self, at: Nanos, limit: Bytes) {
        if limit == self.limit {
            return;
        }
        if limit > self.limit {
            self.report.raises += 1;
            self.refused_shrink = None;
        } else {
            self.report.shrinks += 1;
            self.history.shrunk();
        }
        if let Some((to, asked)) = self.requested
            && (to == limit || (self.limit < to && to <= limit))
        {
            self.requested = None;
            let latencies = &mut self.report.latencies;
            latencies.truncate(KEPT);
            latencies.insert(0, at.since(asked));
        }
        self.limit = limit;
        if self.report.limits.len() < KEPT {
            self.report.limits.push((at, limit));
        }
    }
}

/// The controller of one agent.
pub struct Controller<R> {
    kernel: Kernel,
    reflex: Reflex,
    ledger: Ledger,
    inputs: Receiver<Input>,
    requester: R,
    guards: BTreeMap<CgroupId, Guarded>,
}

impl<R: Requester> Controller<R> {
    /// A controller that guards nothing yet.
    pub const fn new(
        kernel: Kernel,
        reflex: Reflex,
        ledger: Ledger,
        inputs: Receiver<Input>,
        requester: R,
    ) -> Self {
        Self {
            kernel,
            reflex,
            ledger,
            inputs,
            requester,
            guards: BTreeMap::new(),
        }
    }

    /// Guards a cgroup whose limit is `policy.original` or was raised above it by a predecessor.
    ///
    /// # Errors
    ///
    /// [`GuardError`]; nothing is guarded then.
    pub fn adopt(
        &mut self,
        cgroup: Cgroup,
        policy: Policy,
        name: String,
    ) -> Result<(), GuardError> {
        let (id, at) = (cgroup.id(), now());
        let limit = cgroup.limit("memory.max")?.bytes();
        let controls = Controls::open(&cgroup)?;
        let record = Record::Adopt {
            at,
            cgroup: id,
            path: cgroup.path().to_owned(),
            name,
            original: policy.original,
            limit,
        };
        self.ledger.append(&record)?;
        self.requester.record(&cgroup, &record);
        self.kernel.track(id)?;
        let mut guarded = Guarded {
            cgroup,
            policy,
            history: History {
                last_growth: at,
                ..History::default()
            },
            limit,
            requested: None,
            held_since: None,
            refused_shrink: None,
            raise_not_before: Nanos(0),
            report: Report {
                limits: vec![(at, limit)],
                ..Report::default()
            },
        };
        if let Ok(stat) = guarded.cgroup.stat() {
            guarded.history.observe(at, stat.demand());
        }
        self.arm(&guarded, Some(controls));
        self.guards.insert(id, guarded);
        Ok(())
    }

    fn arm(&self, guarded: &Guarded, controls: Option<Controls>) {
        let Guarded { cgroup, policy, .. } = guarded;
        let arm = Arm {
            cgroup: cgroup.id(),
            policy: *policy,
            lowering: guarded.lowering(),
            controls,
        };
        self.reflex.send(Command::Arm(Box::new(arm)));
    }

    /// Stops guarding a cgroup: brake and hold are lifted, its limit stays.
    pub fn forget(&mut self, id: CgroupId) -> Option<Report> {
        let guarded = self.guards.remove(&id)?;
        self.reflex.send(Command::Disarm(id));
        let Growth {
            peak_demand_pages,
            charges,
            ..
        } = self.kernel.growth(id).unwrap_or_default();
        let Holds { long_holds, .. } = self.kernel.holds(id).unwrap_or_default();
        self.kernel.forget(id);
        let mut report = guarded.report;
        report.peak_demand = guarded
            .history
            .peak_demand
            .max(Bytes::from_pages(peak_demand_pages));
        report.sleeps = long_holds;
        report.charges = charges;
        report.lost = self.reflex.lost() + self.kernel.losses().iter().sum::<u64>();
        Some(report)
    }

    /// Runs until [`Input::Stop`] or until every sender is gone; then lifts every brake and hold.
    /// Returns what happened to what was guarded at the end.
    pub fn run(mut self) -> BTreeMap<CgroupId, Report> {
        let mut last_tick = Instant::now();
        loop {
            let active = self.guards.values().any(Guarded::active);
            let tick = if active { ACTIVE_TICK } else { QUIET_TICK };
            // Traffic must not starve the tick: it is due whether or not inputs keep coming.
            let rest = tick.saturating_sub(last_tick.elapsed());
            match self.inputs.recv_timeout(rest) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if last_tick.elapsed() >= tick {
                self.tick();
                last_tick = Instant::now();
            }
        }
        while let Ok(input) = self.inputs.try_recv() {
            self.take(input);
        }
        let ids: Vec<CgroupId> = self.guards.keys().copied().collect();
        let reports = ids
            .into_iter()
            .filter_map(|id| Some((id, self.forget(id)?)))
            .collect();
        self.reflex.stop();
        if let Err(error) = self.ledger.retire() {
            tracing::warn!(%error, "the ledger is left behind");
        }
        reports
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Verdict(verdict) => self.take_verdict(verdict),
            Input::Answered { cgroup, to, result } => self.take_answer(cgroup, to, result),
            Input::Policy(id, policy) => {
                if let Some(guarded) = self.guards.get_mut(&id) {
                    guarded.policy = policy;
                    self.arm(&self.guards[&id], None);
                }
            }
            Input::Adopt(cgroup, policy, name) => {
                let path = cgroup.path().to_owned();
                if let Err(error) = self.adopt(cgroup, policy, name) {
                    tracing::error!(path = %path.display(), %error, "cannot guard a container");
                }
            }
            Input::Forget(id) => drop(self.forget(id)),
            Input::Stop => {}
        }
    }

    fn take_verdict(&mut self, verdict: Verdict) {
        let at = now();
        match verdict {
            Verdict::Event(event) => self.take_event(&event),
            Verdict::Raised {
                cgroup,
                event_at,
                at,
                limit,
            } => self.update(cgroup, |guarded| {
                guarded.report.slowest_reaction =
                    guarded.report.slowest_reaction.max(at.since(event_at));
                guarded.limit_is(at, limit);
            }),
            Verdict::Held { cgroup, at } => self.update(cgroup, |guarded| {
                guarded.held_since = Some(at);
                guarded.report.holds += 1;
            }),
            Verdict::Released { cgroup } => self.update(cgroup, |guarded| {
                if let Some(since) = guarded.held_since.take() {
                    guarded.report.held = Nanos(guarded.report.held.0 + at.since(since).0);
                }
            }),
            Verdict::Lowered { cgroup, limit } => {
                self.update(cgroup, |guarded| guarded.limit_is(at, limit));
            }
            Verdict::LowerRefused { cgroup } => self.update(cgroup, |guarded| {
                guarded.refused_shrink = Some((guarded.history.demand, at));
            }),
            Verdict::LimitRose { cgroup, limit } => {
                self.update(cgroup, |guarded| guarded.limit_is(at, limit));
                self.learn_latency(cgroup);
            }
            Verdict::Failed { cgroup, error } => {
                tracing::warn!(cgroup.id = cgroup.0, %error, "the reflex could not act");
                self.update(cgroup, |guarded| guarded.report.failed(error));
            }
        }
    }

    fn update(&mut self, id: CgroupId, change: impl FnOnce(&mut Guarded)) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let before = guarded.limit;
        change(guarded);
        if guarded.limit != before {
            self.verify(id, None);
        }
    }

    /// Reads the limit back and records it.
    fn verify(&mut self, id: CgroupId, error: Option<String>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let (limit, error) = match guarded.cgroup.limit("memory.max") {
            Ok(limit) => (limit.bytes(), error),
            Err(read) => (guarded.limit, Some(read.to_string())),
        };
        let record = Record::Verify {
            at: now(),
            cgroup: id,
            limit,
            error,
        };
        if let Err(error) = self.ledger.append(&record) {
            guarded.report.failed(error.to_string());
        }
        self.requester.record(&guarded.cgroup, &record);
    }

    fn take_event(&mut self, event: &MemoryEvent) {
        let id = CgroupId(event.cgroup_id);
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        match event.kind {
            KIND_OOM => guarded.report.ooms += 1,
            KIND_WATERMARK => {
                let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
                guarded.history.observe(Nanos(event.at_ns), demand);
                guarded.history.observe_rate(
                    Bytes::from_pages(event.window_pages),
                    Nanos(event.window_ns),
                );
                self.decide(id);
            }
            _ => {}
        }
    }

    fn take_answer(&mut self, id: CgroupId, to: Bytes, result: Result<(), Refused>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if let Err(Refused {
            why: error,
            uncertain,
        }) = result
        {
            tracing::warn!(path = %guarded.cgroup.path().display(), %to, %error, "a change of the limit failed");
            guarded.report.failed(error.clone());
            if guarded
                .requested
                .is_some_and(|(requested, _)| requested == to)
            {
                if uncertain {
                    let limit = guarded.limit;
                    self.requester.take_back(&guarded.cgroup, to, limit);
                }
                self.give_up(id);
            }
            self.verify(id, Some(error));
        }
        self.look_at(id);
    }

    /// A request was refused or got lost: what waited for it waits no more.
    fn give_up(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        let Some((to, _)) = guarded.requested.take() else {
            return;
        };
        if to < guarded.limit {
            guarded.refused_shrink = Some((guarded.history.demand, at));
        } else {
            guarded.raise_not_before = Nanos(at.0.saturating_add(REFUSED_FOR.0));
        }
        if guarded.held_since.is_some() {
            self.reflex.send(Command::Release(id, Reason::HoldExpired));
        }
        self.arm(&self.guards[&id], None);
    }

    /// Takes the measured time of the last request into the policy.
    fn learn_latency(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let mut recent: Vec<Nanos> = guarded
            .report
            .latencies
            .iter()
            .take(LATENCIES)
            .copied()
            .collect();
        recent.sort_unstable();
        let rank = (recent.len() * 95).div_ceil(100);
        if let (Some(&measured), Actuation::Requested { p95 }) = (
            recent.get(rank.saturating_sub(1)),
            &mut guarded.policy.actuation,
        ) {
            *p95 = measured;
        }
    }

    fn tick(&mut self) {
        let mut exited = Vec::new();
        self.kernel.drain_life(|event| {
            if event.kind == KIND_EXIT {
                exited.push(CgroupId(event.cgroup_id));
            }
        });
        let active: Vec<CgroupId> = self
            .guards
            .iter()
            .filter(|(id, guarded)| guarded.active() || exited.contains(id))
            .map(|(&id, _)| id)
            .collect();
        for id in active {
            self.look_at(id);
        }
    }

    /// Observes a guard through its files, and decides.
    fn look_at(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        match (guarded.cgroup.stat(), guarded.cgroup.limit("memory.max")) {
            (Ok(stat), Ok(limit)) => {
                guarded.history.observe(at, stat.demand());
                let lost = guarded
                    .requested
                    .filter(|&(_, asked)| at.since(asked) >= REQUEST_LOST);
                if limit.bytes() != guarded.limit {
                    // In force by a request, or changed by somebody else, who wins.
                    guarded.limit_is(at, limit.bytes());
                    self.verify(id, None);
                    self.learn_latency(id);
                    self.arm(&self.guards[&id], None);
                } else if let Some((to, _)) = lost {
                    let limit = guarded.limit;
                    self.requester.take_back(&guarded.cgroup, to, limit);
                    self.give_up(id);
                }
                self.decide(id);
            }
            (Err(error), _) | (_, Err(error)) => {
                if error.is_gone() {
                    drop(self.forget(id));
                } else {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }

    fn decide(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get(&id) else {
            return;
        };
        let plan = decide(&guarded.snapshot(now()));
        for (action, reason) in plan.actions {
            if let Err(error) = self.carry_out(id, action, reason) {
                tracing::warn!(cgroup.id = id.0, ?action, ?reason, %error, "an action failed");
                if let Some(guarded) = self.guards.get_mut(&id) {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }

    fn carry_out(
        &mut self,
        id: CgroupId,
        action: Action,
        reason: Reason,
    ) -> Result<(), GuardError> {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return Ok(());
        };
        let at = now();
        let record = Record::Intend {
            at,
            cgroup: id,
            action,
            reason,
            demand: guarded.history.demand,
        };
        self.ledger.append(&record)?;
        self.requester.record(&guarded.cgroup, &record);
        match action {
            Action::Raise { from, to } => {
                guarded.requested = Some((to, at));
                self.requester.raise(&guarded.cgroup, from, to);
            }
            Action::Release => self.reflex.send(Command::Release(id, reason)),
            Action::Shrink { from, to } => self.shrink(id, from, to)?,
            // The reflex holds by its table.
            Action::Hold => {}
        }
        Ok(())
    }

    fn shrink(&mut self, id: CgroupId, from: Bytes, to: Bytes) -> Result<(), GuardError> {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return Ok(());
        };
        let Guarded {
            cgroup,
            policy,
            history,
            ..
        } = guarded;
        if !shrink::make_room(cgroup, to, policy.cpus)? {
            guarded.refused_shrink = Some((history.demand, now()));
            self.arm(&self.guards[&id], None);
            return Ok(());
        }
        match policy.actuation {
            Actuation::Direct => self.reflex.send(Command::Lower(id, to)),
            Actuation::Requested { .. } => {
                guarded.requested = Some((to, now()));
                // Before the request: the lower limit is guarded when it comes into force.
                self.arm(&self.guards[&id], None);
                let cgroup = &self.guards[&id].cgroup;
                self.requester.lower(cgroup, from, to);
            }
        }
        Ok(())
    }
}

/// Makes the sink through which the reflex reaches a controller.
#[must_use]
pub fn sink(inputs: SyncSender<Input>) -> crate::actuate::reflex::Sink {
    Box::new(move |verdict| inputs.try_send(Input::Verdict(verdict)).is_ok())
}
