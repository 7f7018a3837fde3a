//! The controller: keeps each guarded container's history, asks core, and has the plan carried out.
//!
//! It is a plain loop over one channel, so that everything that happens to a guard happens in one
//! order. The urgent part is not here: by the time that the controller hears of a watermark the
//! reflex has written or held what was armed. The controller must not wait for anything but its
//! channel and the reclaim of a shrink; requests to others are sent through [`Requester`] and
//! answered with an [`Input`].

mod bounds;
mod counts;
mod decisions;
mod ending;
mod foreign_brake;
mod growers;
mod guarded;
mod inputs;
mod learnt;
mod lending;
mod looks;
mod observed;
mod requests;
mod room;
mod runs;
mod verdicts;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender},
    time::{Duration, Instant},
};

use bellows_core::{Actuation, Bytes, CgroupId, Nanos, Policy};
use bellows_ebpf_common::{Growth, Holds, loss};

use crate::{
    actuate::reflex::{Arm, Command, Controls, Reflex},
    cgroup::Cgroup,
    clock::now,
    ledger::Ledger,
    metrics::METRICS,
    parallel::Parallel,
    signal::programs::Kernel,
};
pub use bounds::told_bound;
pub use counts::Counts;
pub use guarded::Report;
use guarded::{Answers, Guarded};
pub use inputs::{GuardError, INPUTS, Input, Named, Refused, Requester, sink};
use learnt::Memory;
pub use lending::told_balance;
use observed::Watched;
pub use observed::{Watching, told_kill, told_raise};
pub use room::told_why;
pub use verdicts::observe;

/// How often a guard is looked at while its limit is above its original or it is held.
const ACTIVE_TICK: Duration = Duration::from_millis(100);
/// How often the controller looks at life events when nothing is raised.
const QUIET_TICK: Duration = Duration::from_secs(1);

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
    /// When any request was carried out last.
    carried_out: Nanos,
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
            carried_out: Nanos(0),
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
}

fn seconds(time: Nanos) -> f64 {
    Duration::from_nanos(time.0).as_secs_f64()
}
