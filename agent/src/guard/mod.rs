//! The controller: keeps each guarded container's history, asks core, and has the plan carried out.
//!
//! It is a plain loop over one channel, so that everything that happens to a guard happens in one
//! order. The urgent part is not here: by the time that the controller hears of a watermark the
//! reflex has written or held what was armed. The controller must not wait for anything but its
//! channel and the reclaim of a shrink; requests to others are sent through [`Requester`] and
//! answered with an [`Input`].

mod bounds;
mod counts;
mod foreign_brake;
mod growers;
mod guarded;
mod learnt;
mod lending;
mod observed;
mod requests;
mod room;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender},
    time::{Duration, Instant},
};

use bellows_core::{
    Action, Actuation, Bytes, CgroupId, History, Nanos, Policy, Reason, Snapshot,
    allowance::Bound,
    decide::{ByHand, decide},
    thrash::Look,
};
use bellows_ebpf_common::{
    Growth, Holds, KIND_EXIT, KIND_OOM, KIND_RECLAIM, KIND_WATERMARK, KIND_WRITTEN, MemoryEvent,
    loss,
};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::{
    actuate::reflex::{Arm, Command, Controls, Reflex, Verdict},
    cgroup::{Cgroup, CgroupError},
    clock::now,
    ledger::{Ledger, Record},
    metrics::METRICS,
    parallel::Parallel,
    signal::programs::{Kernel, LoadError},
    state,
};
pub use bounds::told_bound;
pub use counts::Counts;
use foreign_brake::ForeignBrake;
use growers::Growers;
pub use guarded::Report;
use guarded::{Answers, Guarded};
use learnt::Memory;
pub use lending::told_balance;
use observed::Watched;
pub use observed::{Watching, told_kill, told_raise};
use requests::Loss;
pub use room::told_why;

/// How often a guard is looked at while its limit is above its original or it is held.
const ACTIVE_TICK: Duration = Duration::from_millis(100);
/// How often the controller looks at life events when nothing is raised.
const QUIET_TICK: Duration = Duration::from_secs(1);
/// How long the reflex may take to release whom nobody guards any more; it may be too busy to say so.
const LONGEST_LEAVE: Nanos = Nanos::millis(10_000);
/// Shortest time between two looks at a guard's page cache.
const THRASH_INTERVAL: Nanos = Nanos::millis(900);
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
    /// Page cache was given back for a shrink to `to`, or could not be.
    RoomMade {
        /// In which cgroup.
        cgroup: CgroupId,
        /// The limit that room was made for.
        to: Bytes,
        /// Whether there is room now, and what went wrong.
        result: Result<bool, String>,
    },
    /// Guard a cgroup from now on.
    Adopt(Cgroup, Policy, Named),
    /// Watch a cgroup, with the rules that it would have.
    Observe(Watching),
    /// A guarded cgroup's rules have changed.
    Policy(CgroupId, Policy),
    /// A guarded cgroup's limit is below the one at rest, and not because somebody else wants it so: raise it.
    ToRest(CgroupId),
    /// What namespaces allow has changed.
    Bounds,
    /// Guard or watch it no more.
    Forget(CgroupId),
    /// Jobs are paused or resumed for want of memory.
    Lent(Record),
    /// Somebody asks what all guards are together.
    Count(oneshot::Sender<Counts>),
    /// Somebody asks whether the controller and the reflex go round: the reflex answers.
    Alive(oneshot::Sender<()>),
    /// End.
    Stop,
}

/// What a guarded cgroup is called.
#[derive(Clone, Debug)]
pub struct Named {
    /// For people.
    pub name: String,
    /// What outlives it, and has needed as much before: `NAMESPACE/WORKLOAD/CONTAINER`, or a plain word.
    pub workload: String,
}

/// Why a request was not carried out.
#[derive(Clone, Debug)]
pub struct Refused {
    /// What to tell people.
    pub why: String,
    /// Whether it may be carried out all the same: nobody has answered.
    pub uncertain: bool,
    /// Whether the same may be granted later: whoever was asked is away, or busy.
    pub is_passing: bool,
}

/// Carries changes to limits that somebody else owns.
pub trait Requester {
    /// What bounds a limit beside its policy, at this moment. What is asked for counts from then on.
    fn bound(&self, _cgroup: CgroupId) -> Option<Bound> {
        None
    }

    /// Asks for a raise. The answer comes as [`Input::Answered`]; must not block. Where the requester raises by hand of its
    /// own accord it must have done so after `patience`: who is held for it can wait no longer.
    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, patience: Nanos);

    /// Lowers the limit; usage has been brought below `to` already. Must not block.
    fn lower(&mut self, cgroup: &Cgroup, to: Bytes);

    /// Takes back a request for `to` that was not carried out in time: the limit is still `limit`.
    fn take_back(&mut self, cgroup: &Cgroup, to: Bytes, limit: Bytes);

    /// Whether others are guarded on the same node: then each raise must find room beside theirs.
    fn shares_the_node(&self) -> bool {
        true
    }

    /// Whether a raise to `to` that was asked for may be written by hand. Never, where that is the requester's own affair.
    fn by_hand(&self, _cgroup: CgroupId, _to: Bytes) -> ByHand {
        ByHand::No
    }

    /// Raises a limit by hand that was asked for, and sees to it that its owner comes to know it. Must not block.
    ///
    /// # Errors
    ///
    /// Why not, for people.
    fn raise_by_hand(&mut self, _cgroup: &Cgroup, _to: Bytes) -> Result<(), String> {
        Err("limits are not raised by hand here".to_owned())
    }

    /// Takes note of what was decided and observed, for people.
    fn record(&mut self, cgroup: &Cgroup, record: &Record);

    /// Takes note that a cgroup is neither guarded nor watched, although it should be.
    fn not_guarded(&mut self, cgroup: CgroupId);
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
    /// A thread.
    #[error("no thread can be had to make room for a lower limit: {0}")]
    Thread(#[source] std::io::Error),
    /// The ledger.
    #[error("the ledger cannot be written, so nothing is guarded: {0}; free memory on /run")]
    Ledger(#[from] std::io::Error),
}

/// The controller of one agent.
pub struct Controller<R> {
    /// What the programs count; `None` where growth is seen through files.
    kernel: Option<Kernel>,
    reflex: Reflex,
    ledger: Ledger,
    inputs: Receiver<Input>,
    /// The way back in, for what is done on other threads.
    answers: SyncSender<Input>,
    requester: R,
    guards: BTreeMap<CgroupId, Guarded>,
    /// Those that are only watched.
    observed: BTreeMap<CgroupId, Watched>,
    raise_times: Answers,
    memory: Memory,
    /// Whether the reflex still writes into the ledger that was put aside.
    reflex_is_behind: bool,
    /// Cgroups of which something was seen that is to be decided on.
    due: BTreeSet<CgroupId>,
    /// Cgroups that the reflex is to release and forget, since when.
    leaving: BTreeMap<CgroupId, Nanos>,
    /// Where the first is guarded that asks for it.
    parallel: Option<Parallel>,
}

impl<R: Requester> Controller<R> {
    /// A controller that guards nothing yet.
    pub fn new(
        kernel: Option<Kernel>,
        reflex: Reflex,
        ledger: Ledger,
        (answers, inputs): (SyncSender<Input>, Receiver<Input>),
        requester: R,
    ) -> Self {
        Self {
            kernel,
            reflex,
            ledger,
            inputs,
            answers,
            requester,
            guards: BTreeMap::new(),
            observed: BTreeMap::new(),
            raise_times: Answers::default(),
            memory: Memory::new(),
            reflex_is_behind: false,
            due: BTreeSet::new(),
            leaving: BTreeMap::new(),
            parallel: None,
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
        named: Named,
    ) -> Result<(), GuardError> {
        let (id, at) = (cgroup.id(), now());
        let limit = cgroup.limit_in_force()?;
        let controls = Controls::open(&cgroup)?;
        let mut guarded = Guarded::new(cgroup, named, policy, at, limit);
        guarded.learnt = self.memory.of(&guarded.workload);
        if policy.actuation == Actuation::Direct {
            guarded.recall(String::new());
        }
        let record = guarded.adoption(at);
        self.ledger.append(&record)?;
        self.requester.record(&guarded.cgroup, &record);
        if let Some(kernel) = &mut self.kernel {
            kernel.track(id)?;
        }
        if let Ok(stat) = guarded.cgroup.stat() {
            guarded.saw(at, stat);
        }
        guarded.take_bound(self.requester.bound(id));
        self.arm(&guarded, Some(controls));
        self.guards.insert(id, guarded);
        self.count_guards();
        self.lend(id);
        Ok(())
    }

    fn arm(&self, guarded: &Guarded, controls: Option<Controls>) {
        let Guarded { cgroup, policy, .. } = guarded;
        let arm = Arm {
            cgroup: cgroup.id(),
            policy: *policy,
            lowering: guarded.lowering,
            controls,
        };
        self.reflex.send(Command::Arm(Box::new(arm)));
    }

    /// Stops guarding a cgroup: brake and hold are lifted, its limit stays.
    pub fn forget(&mut self, id: CgroupId) -> Option<Report> {
        let guarded = self.guards.remove(&id)?;
        self.count_guards();
        self.reflex.send(Command::Disarm(id));
        self.leaving.insert(id, now());
        if let Some(parallel) = self
            .parallel
            .as_ref()
            .filter(|_| guarded.may_have.is_some())
        {
            parallel.forget(id);
        }
        let counted = self.kernel.as_mut().map(|kernel| kernel.forget(id));
        let (growth, holds) = counted.unwrap_or_default();
        let Growth {
            peak_demand_pages,
            charges,
            ..
        } = growth;
        let Holds { long_holds, .. } = holds;
        let mut report = guarded.report;
        report.peak_demand = guarded
            .history
            .peak_demand
            .max(Bytes::from_pages(peak_demand_pages));
        report.sleeps = long_holds;
        report.charges = charges;
        let losses = self.losses();
        report.lost = self.reflex.lost() + losses.iter().sum::<u64>();
        Some(report)
    }

    /// What the programs have lost, by slot of [`loss`].
    fn losses(&self) -> [u64; loss::SLOTS as usize] {
        self.kernel.as_ref().map(Kernel::losses).unwrap_or_default()
    }

    fn count_guards(&self) {
        METRICS
            .guarded
            .set(i64::try_from(self.guards.len()).unwrap_or(i64::MAX));
    }

    /// Runs until [`Input::Stop`]; then lifts every brake and hold.
    /// Returns what happened to what was guarded at the end.
    pub fn run(mut self) -> BTreeMap<CgroupId, Report> {
        let mut last_tick = Instant::now();
        loop {
            let active = self.guards.values().any(Guarded::active)
                || self.observed.values().any(Watched::is_active);
            let tick = if active { ACTIVE_TICK } else { QUIET_TICK };
            // Traffic must not starve the tick: it is due whether or not inputs keep coming.
            let rest = tick.saturating_sub(last_tick.elapsed());
            match self.inputs.recv_timeout(rest) {
                Ok(input) => {
                    if !self.take_all(input) {
                        break;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
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
        if !self.requester.shares_the_node() {
            // What it was made for has ended; else a successor sees the end.
            ids.iter().for_each(|&id| self.end_run(id));
        }
        let reports = ids
            .into_iter()
            .filter_map(|id| Some((id, self.forget(id)?)))
            .collect();
        self.reflex.stop();
        // Everybody goes on.
        drop(self.parallel.take());
        if let Err(error) = self.ledger.retire() {
            tracing::warn!(%error, "the ledger is left behind");
        }
        reports
    }

    /// Takes all that the reflex has told by now, and decides then: whoever is at its limit makes events faster than anybody
    /// decides, and what was decided by each of them in turn was told of containers that had died seconds before, behind which
    /// others waited. Returns whether to go on.
    fn take_all(&mut self, first: Input) -> bool {
        let (mut next, mut most) = (Some(first), INPUTS);
        while let Some(input) = next {
            if matches!(input, Input::Stop) {
                return false;
            }
            if !matches!(input, Input::Verdict(_)) {
                // Which may take its time, or go by what was decided.
                self.decide_due();
            }
            self.take(input);
            most -= 1;
            next = (most > 0).then(|| self.inputs.try_recv().ok()).flatten();
        }
        self.decide_due();
        true
    }

    fn decide_due(&mut self) {
        for id in std::mem::take(&mut self.due) {
            self.decide(id);
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Verdict(verdict) => self.take_verdict(verdict),
            Input::Answered { cgroup, to, result } => self.take_answer(cgroup, to, result),
            Input::RoomMade { cgroup, to, result } => self.lower(cgroup, to, result),
            Input::Policy(id, policy) => {
                if let Some(guarded) = self.guards.get_mut(&id) {
                    guarded.follow(policy);
                    guarded.take_bound(self.requester.bound(id));
                    self.arm(&self.guards[&id], None);
                    self.lend(id);
                }
            }
            Input::Adopt(cgroup, policy, named) => {
                let (path, id) = (cgroup.path().to_owned(), cgroup.id());
                if let Err(error) = self.adopt(cgroup, policy, named) {
                    self.requester.not_guarded(id);
                    tracing::error!(path = %path.display(), %error, "cannot guard a container");
                }
            }
            Input::Observe(watching) => {
                let cgroup = &watching.cgroup;
                let (path, id) = (cgroup.path().to_owned(), cgroup.id());
                if let Err(error) = self.observe(watching) {
                    self.requester.not_guarded(id);
                    tracing::error!(path = %path.display(), %error, "cannot watch a container");
                }
            }
            Input::ToRest(id) => self.raise_to_rest(id),
            Input::Bounds => self.take_bounds(),
            Input::Forget(id) => {
                self.stop_observing(id);
                self.end_run(id);
                drop(self.forget(id));
            }
            Input::Lent(record) => self.take_lent(&record),
            // Who has asked may be gone.
            Input::Count(answer) => drop(answer.send(self.counts())),
            Input::Alive(answer) => self.reflex.send(Command::Alive(answer)),
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
            Verdict::Held { cgroup, at, braked } => self.update(cgroup, |guarded| {
                guarded.held_since = Some(at);
                METRICS.holds.inc();
                guarded.report.holds += 1;
                guarded.report.brakes += u64::from(braked);
            }),
            Verdict::ForeignBrake { cgroup } => {
                self.update(cgroup, |guarded| {
                    guarded.foreign_brake = Some(ForeignBrake::default());
                });
                self.look_at(cgroup);
            }
            Verdict::Braked { cgroup } => self.update(cgroup, |guarded| guarded.report.brakes += 1),
            Verdict::Released { cgroup, error } => self.update(cgroup, |guarded| {
                if let Some(since) = guarded.held_since.take() {
                    guarded.resumed(at);
                    let held = at.since(since);
                    METRICS.held_seconds.inc_by(seconds(held));
                    guarded.report.held = Nanos(guarded.report.held.0 + held.0);
                }
                if let Some(error) = error {
                    tracing::warn!(cgroup.id = cgroup.0, %error, "a release was not without fault");
                    guarded.report.failed(error);
                }
            }),
            Verdict::Lowered { cgroup, limit } => {
                self.update(cgroup, |guarded| guarded.limit_is(at, limit));
            }
            Verdict::LowerRefused { cgroup } => self.update(cgroup, |guarded| {
                guarded.refused_shrink = Some((guarded.history.demand, at));
            }),
            Verdict::LimitRose { cgroup, limit } => {
                self.update(cgroup, |guarded| {
                    guarded.limit_is(at, limit);
                    guarded.learn_latency();
                });
            }
            Verdict::Forgotten { cgroup } => drop(self.leaving.remove(&cgroup)),
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
            self.remember(id);
            self.lend(id);
        }
    }

    /// Remembers what a burst that has just ended has needed.
    fn remember(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if let Some((trigger, part)) = guarded.ended.take() {
            // Its like may have run beside it.
            guarded.learnt = self.memory.of(&guarded.workload);
            guarded.learnt.ended(&trigger, part);
            self.memory.keep(&guarded.workload, guarded.learnt.clone());
        }
    }

    /// A container ends in the middle of a burst: that is the end of its run.
    fn end_run(&mut self, id: CgroupId) {
        // Of a whole life: that of a command is one run.
        let is_one_run = !self.requester.shares_the_node();
        let counted = self.kernel.as_ref().filter(|_| is_one_run);
        let peak = counted.and_then(|kernel| kernel.growth(id));
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if guarded.limit <= guarded.policy.original {
            return;
        }
        let at = now();
        if let Some(growth) = peak {
            // It may have ended before it was looked at.
            let peak = Bytes::from_pages(growth.peak_demand_pages);
            guarded.history.observe(at, peak);
            guarded.look_at_burst(at);
        }
        guarded.burst_is_over(at);
        self.remember(id);
    }

    /// Looks what a burst is for that is about to be answered for the first time, and what that has needed before.
    fn recall(&mut self, id: CgroupId) -> bool {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return false;
        };
        if guarded.trigger.is_some() {
            return false;
        }
        let growers = Growers::of(&guarded.cgroup);
        // Its like may have run in another replica, or before it was made anew.
        guarded.learnt = self.memory.of(&guarded.workload);
        guarded.recall(growers.map(|growers| growers.trigger).unwrap_or_default());
        guarded.policy.learnt.is_some()
    }

    /// Reads the limit back and records it.
    fn verify(&mut self, id: CgroupId, error: Option<String>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        self.raise_times.learn(guarded);
        let (limit, error) = match guarded.cgroup.limit_in_force() {
            Ok(limit) => (limit, error),
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
            return self.take_observed(event);
        };
        match event.kind {
            KIND_OOM => {
                METRICS.ooms.inc();
                guarded.report.ooms += 1;
            }
            KIND_WATERMARK => {
                observe(&mut guarded.history, event, now());
                self.due.insert(id);
            }
            _ => {}
        }
    }

    /// Begins a new ledger when this one is full. A failure is tried again at the next tick.
    fn turn_page(&mut self) -> std::io::Result<()> {
        let at = now();
        self.leaving
            .retain(|_, since| at.since(*since) < LONGEST_LEAVE);
        // The next ledger does not have those who leave, and a successor must release them until they are released.
        if self.leaving.is_empty() && self.ledger.is_full()? {
            let guarded: Vec<Record> = self
                .guards
                .values()
                .flat_map(|guarded| guarded.standing(at))
                .chain(self.observed.values().map(|watched| watched.record(at)))
                .collect();
            self.ledger.rotate(&guarded)?;
            self.reflex_is_behind = true;
        }
        if self.reflex_is_behind {
            self.reflex.send(Command::Ledger(self.ledger.another()?));
            self.reflex_is_behind = false;
        }
        Ok(())
    }

    fn tick(&mut self) {
        if let Err(error) = self.turn_page() {
            tracing::warn!(%error, "a full ledger cannot be put aside: free memory on /run");
        }
        METRICS.lost(self.losses(), self.reflex.lost());
        state::renew_reserve();
        let mut exited = Vec::new();
        let (mut reclaimed, mut written) = (BTreeSet::new(), BTreeSet::new());
        match &mut self.kernel {
            Some(kernel) => kernel.drain_life(|event| match event.kind {
                KIND_EXIT => exited.push(CgroupId(event.cgroup_id)),
                KIND_RECLAIM => drop(reclaimed.insert(CgroupId(event.cgroup_id))),
                KIND_WRITTEN => drop(written.insert(CgroupId(event.cgroup_id))),
                _ => {}
            }),
            // Without the programs nobody tells who is reclaimed from.
            None => reclaimed.extend(self.guards.keys()),
        }
        for &id in &written {
            self.reflex.send(Command::PutBack(id));
        }
        for id in reclaimed {
            self.look_for_thrash(id);
        }
        let active: Vec<CgroupId> = self
            .guards
            .iter()
            .filter(|(id, guarded)| {
                let is_told = exited.contains(id) || written.contains(id);
                guarded.active() || guarded.is_lending() || is_told
            })
            .map(|(&id, _)| id)
            .collect();
        for id in active {
            self.look_at(id);
        }
        self.look_at_bounds();
        self.look_at_observed();
    }

    /// Looks whether what is reclaimed from a guard is read back at once.
    fn look_for_thrash(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        // Looked at a moment ago: the faster tick has nothing to add.
        if at.since(guarded.thrash_looked) < THRASH_INTERVAL {
            return;
        }
        guarded.thrash_looked = at;
        match (guarded.cgroup.refaulted(), guarded.cgroup.stalled()) {
            (Ok(refaulted), Ok(stalled)) => {
                let look = Look {
                    at,
                    refaulted,
                    stalled,
                };
                guarded.thrash.look(guarded.limit, look);
                self.decide(id);
            }
            (Err(error), _) | (_, Err(error)) => guarded.report.failed(error.to_string()),
        }
    }

    /// Observes a guard through its files, and decides.
    fn look_at(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        match (guarded.cgroup.stat(), guarded.cgroup.limit_in_force()) {
            (Ok(stat), Ok(limit)) => {
                guarded.saw(at, stat);
                let is_new_brake = match guarded.look_at_brake(at) {
                    Ok(is_new) => is_new,
                    Err(error) => {
                        guarded.report.failed(error.to_string());
                        false
                    }
                };
                if limit != guarded.limit {
                    // In force by a request, or changed by somebody else, who wins.
                    guarded.limit_is(at, limit);
                    guarded.learn_latency();
                    self.verify(id, None);
                    self.remember(id);
                    self.arm(&self.guards[&id], None);
                } else if is_new_brake {
                    self.arm(&self.guards[&id], None);
                } else if let Some(to) = guarded.lost(at) {
                    self.requester.take_back(&guarded.cgroup, to, limit);
                    self.give_up(id, Loss::Silent);
                    // What is asked for next must not be sent beside what is taken back.
                    return;
                }
                self.decide(id);
            }
            (Err(error), _) | (_, Err(error)) => {
                if error.is_gone() {
                    self.end_run(id);
                    drop(self.forget(id));
                } else {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }

    /// Decides, and has it carried out. Who was asked for just now may have to be raised by hand at once: that is raised
    /// first, or nothing is left of its patience.
    fn decide(&mut self, id: CgroupId) {
        let is_asked = |guarded: &Guarded| {
            guarded.policy.by_hand_after.is_some() && guarded.requested.is_some()
        };
        let was_asked = self.guards.get(&id).is_some_and(is_asked);
        self.decide_once(id);
        if !was_asked && self.guards.get(&id).is_some_and(is_asked) {
            self.decide_once(id);
        }
        self.lend(id);
    }

    fn decide_once(&mut self, id: CgroupId) {
        self.take_bound(id);
        let is_short = |own: &Guarded| own.waiting.is_some() || own.told_bound.is_some();
        // Who has nothing to give back keeps nothing from anybody.
        let is_raised = |own: &Guarded| own.limit > own.policy.original;
        let somebody_waits =
            self.guards.get(&id).is_some_and(is_raised) && self.guards.values().any(is_short);
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        guarded.look_at_burst(at);
        let by_hand = match guarded.requested {
            Some((to, _)) if at >= guarded.by_hand_not_before => self.requester.by_hand(id, to),
            _ => ByHand::No,
        };
        let snapshot = |guarded: &Guarded| Snapshot {
            // What is kept for what may come is whoever's who needs it now.
            quiet: if somebody_waits {
                Nanos(0)
            } else {
                guarded.quiet()
            },
            ..guarded.snapshot(at, by_hand)
        };
        let mut plan = decide(&snapshot(guarded));
        let is_raise = |(action, _): &(Action, _)| matches!(action, Action::Raise { .. });
        let is_burst = |(action, reason): &(Action, Reason)| {
            matches!(action, Action::Raise { .. }) && *reason != Reason::CacheThrashes
        };
        if !plan.actions.iter().any(is_raise) {
            // It does not need it any more.
            guarded.waiting = None;
            guarded.calm_down();
        } else if plan.actions.iter().any(is_burst)
            && self.recall(id)
            && let Some(guarded) = self.guards.get(&id)
        {
            plan = decide(&snapshot(guarded));
        }
        let planned: Vec<Action> = plan.actions.iter().map(|(action, _)| *action).collect();
        let cut = self.guards.get(&id);
        if let Some(wanted) = cut.and_then(|guarded| guarded.cut(&snapshot(guarded), &planned)) {
            self.tell_of_bound(id, wanted);
        }
        for (action, reason) in plan.actions {
            let action = match action {
                Action::Raise { from, to } => match self.room_for(id, from, to, reason) {
                    Some(to) => Action::Raise { from, to },
                    None => continue,
                },
                other => other,
            };
            if let Err(error) = self.carry_out(id, action, reason) {
                tracing::warn!(cgroup.id = id.0, ?action, ?reason, %error, "an action failed");
                if let Some(guarded) = self.guards.get_mut(&id) {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }
}

/// Takes a watermark event into a history.
///
/// A record may have been sent by a program of another build: a time after `now` would keep the burst
/// from ever being over, and the limit from coming down.
pub fn observe(history: &mut History, event: &MemoryEvent, now: Nanos) {
    let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
    history.observe(Nanos(event.at_ns).min(now), demand);
    history.observe_rate(
        Bytes::from_pages(event.window_pages),
        Nanos(event.window_ns),
    );
}

fn seconds(time: Nanos) -> f64 {
    Duration::from_nanos(time.0).as_secs_f64()
}

/// Makes the sink through which the reflex reaches a controller.
#[must_use]
pub fn sink(inputs: SyncSender<Input>) -> crate::actuate::reflex::Sink {
    Box::new(move |verdict| inputs.try_send(Input::Verdict(verdict)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_never_later_than_now() {
        let mut history = History::default();
        let event = MemoryEvent {
            at_ns: u64::MAX,
            usage_pages: 100,
            ..MemoryEvent::default()
        };
        observe(&mut history, &event, Nanos(7));
        assert_eq!(history.last_growth, Nanos(7));
    }
}
