//! One row of the reflex table: a guarded cgroup's rules, its open files, and what is done with them.
//!
//! The order of the writes in here is the safety of the reflex: intents before actions, a raise before
//! the brake follows it, a thaw before anything that could fail. It must not wait, and must not lower
//! a limit that usage has not been looked at for.
//!
//! A hold freezes. Whoever is still charged for after that grows inside a system call, where the freezer
//! does not reach: then the brake is set below usage, as deep as the answer is late ([`brake`]).

use std::sync::Arc;

use bellows_core::{
    Action, Actuation, Bytes, CgroupId, Nanos, Patience, Policy, Reaction, Reason, Thresholds,
    brake::{self, Growing},
    reflex::{Hold, Rung, is_rushing, reaction, rung_for, thresholds},
};
use bellows_ebpf_common::MemoryEvent;

use super::{Arm, Means, Verdict, brakes::Epoch};
use crate::{
    cgroup::{Cgroup, CgroupError, Control, Limit},
    clock::now,
    ledger::{Ledger, Record},
    signal::{programs::LoadError, source::Source},
};

/// How long a container whose hold expired is left alone.
const LET_GO_FOR: Nanos = Nanos::millis(10_000);
/// How long a page fault that was under way may still charge after a freeze.
const SETTLING: Nanos = Nanos::millis(2);
/// Shortest time between two brakes of one container.
const BRAKE_INTERVAL: Nanos = Nanos::millis(10);
/// A brake lasts at least this long, however soon the answer should be there.
const SHORTEST_BRAKE: Nanos = Nanos::millis(100);
/// More threads than this are not taken to grow at once.
const MOST_GROWERS: u64 = 16;
/// What is left of a container's patience must be worth a hold.
const SHORTEST_HOLD: Nanos = Nanos::millis(50);

/// The files that the reflex writes.
#[derive(Debug)]
pub struct Controls {
    cgroup: Cgroup,
    max: Control,
    heirs: Vec<Control>,
    high: Arc<Control>,
    freeze: Control,
    current: Control,
    /// `pids.current` counts threads; not there where the controller is not enabled.
    threads: Option<Control>,
}

impl Controls {
    /// Opens them.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one does not exist or cannot be written.
    pub fn open(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self {
            cgroup: cgroup.clone(),
            max: Control::open(cgroup, "memory.max")?,
            heirs: Control::open_heirs(cgroup),
            high: Arc::new(Control::open(cgroup, "memory.high")?),
            freeze: Control::open(cgroup, "cgroup.freeze")?,
            current: Control::open_read(cgroup, "memory.current")?,
            threads: Control::open_read(cgroup, "pids.current").ok(),
        })
    }

    pub(super) const fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The limit in force: the least of its own and of those that follow it. An heir that is gone has
    /// none.
    fn limit(&self) -> Result<Bytes, CgroupError> {
        let own = self.max.get()?.bytes();
        let of_heirs = self.heirs.iter().filter_map(|heir| heir.get().ok());
        Ok(of_heirs.map(Limit::bytes).fold(own, Bytes::min))
    }

    /// Threads that may be growing.
    fn growers(&self, cpus: u64) -> u64 {
        let threads = self
            .threads
            .as_ref()
            .and_then(|threads| threads.get().ok())
            .map(|count| count.bytes().0);
        threads.unwrap_or(2 * cpus).clamp(1, MOST_GROWERS)
    }
}

/// A hold that lasts.
#[derive(Clone, Copy)]
struct Held {
    since: Nanos,
    by: Hold,
    /// When it expires.
    until: Nanos,
    /// When its brake was last set below usage.
    braked_at: Option<Nanos>,
}

/// How much of its patience a container has used up in holds that follow each other.
#[derive(Clone, Copy, Default)]
struct Spent {
    time: Nanos,
    last_end: Nanos,
}

pub(super) struct Row {
    cgroup: CgroupId,
    policy: Policy,
    limit: Bytes,
    /// A limit of this size or more proves that a lower one was overtaken, and ends a hold.
    release_at: Bytes,
    reaction: Reaction,
    controls: Controls,
    held: Option<Held>,
    spent: Spent,
    /// Moves on when a brake below usage is no longer wanted.
    epoch: Epoch,
    /// Whether `memory.high` was somebody else's (the kubelet's MemoryQoS) when it was first armed: it is
    /// left alone then, and only the freezer holds.
    foreign_brake: bool,
    /// Since when it is let go after a hold expired: not braked or held again before the limit has
    /// risen or [`LET_GO_FOR`] has passed.
    let_go: Option<Nanos>,
}

impl Row {
    /// A row as the controller wants it, with what the one before knew. If that fails, nothing is left
    /// on the cgroup.
    pub(super) fn armed(arm: Arm, before: Option<Self>) -> Result<Self, String> {
        let Arm {
            cgroup,
            policy,
            lowering,
            controls,
        } = arm;
        let (known, controls) = match before {
            Some(Self {
                limit,
                held,
                spent,
                epoch,
                foreign_brake,
                let_go,
                controls,
                ..
            }) => (
                Some((limit, held, spent, epoch, foreign_brake, let_go)),
                controls,
            ),
            None => (None, controls.ok_or("armed without its files")?),
        };
        // What the controller knows may be older than the last raise.
        let actual = controls.limit().map_err(|error| {
            let lifted = controls
                .high
                .set(Limit::Max)
                .and_then(|()| controls.freeze.set_flag(false));
            lifted.err().unwrap_or(error).to_string()
        })?;
        let limit = lowering.map_or(actual, |lower| lower.min(actual));
        let (held, spent, epoch, foreign_brake, let_go) = match known {
            Some((before, held, spent, epoch, foreign_brake, let_go)) => {
                let let_go = let_go.filter(|_| limit <= before);
                (held, spent, epoch, foreign_brake, let_go)
            }
            None => {
                let foreign = controls.high.get().map_err(text)? != Limit::Max;
                (None, Spent::default(), Epoch::default(), foreign, None)
            }
        };
        Ok(Self {
            cgroup,
            policy,
            limit,
            release_at: actual.plus(Bytes(1)),
            reaction: reaction(&policy, limit),
            controls,
            held,
            spent,
            epoch,
            foreign_brake,
            let_go,
        })
    }

    /// Whether its brake is not ours to move.
    pub(super) const fn has_foreign_brake(&self) -> bool {
        self.foreign_brake
    }

    fn set_brake(&self, high: Limit) -> Result<(), CgroupError> {
        if self.foreign_brake {
            Ok(())
        } else {
            self.controls.high.set(high)
        }
    }

    pub(super) const fn is_held(&self) -> bool {
        self.held.is_some()
    }

    fn is_let_go(&self) -> bool {
        self.let_go
            .is_some_and(|since| now().since(since) < LET_GO_FOR)
    }

    /// What the table says to do about a demand, done.
    pub(super) fn react(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        match &self.reaction {
            Reaction::Raise { rungs } => {
                let rung = *rung_for(rungs, demand).filter(|rung| rung.limit > self.limit)?;
                Some(self.climb(event, demand, rung, means))
            }
            &Reaction::Hold { at, by } => match self.held {
                None if !self.is_let_go() && (demand >= at || self.is_rushing(event, demand)) => {
                    self.hold(event, demand, by, means)
                }
                Some(held) => self.brake(event, demand, held, means),
                None => None,
            },
            Reaction::Nothing => None,
        }
    }

    fn is_rushing(&self, event: &MemoryEvent, demand: Bytes) -> bool {
        let Actuation::Requested { p95 } = self.policy.actuation else {
            return false;
        };
        let rate = Bytes::from_pages(event.window_pages).scaled(1_000_000_000, event.window_ns);
        is_rushing(self.limit, demand, rate, p95)
    }

    /// Moves watermark and brake to where the limit wants them, or removes them.
    ///
    /// A brake below usage (a limit full of page cache, for one) would reclaim here, on this thread:
    /// it is left out then, and the watermark, which counts no cache, guards alone.
    pub(super) fn watch(&self, source: &mut Source) -> Result<(), String> {
        let thresholds = thresholds(&self.policy, self.limit);
        source
            .watch(self.cgroup, thresholds.map(|at| at.watermark))
            .map_err(|error: LoadError| error.to_string())?;
        self.rest_brake()
    }

    /// Puts the brake where the limit wants it.
    fn rest_brake(&self) -> Result<(), String> {
        self.epoch.next();
        let high = self.brake_at_rest()?;
        self.set_brake(high).map_err(text)
    }

    fn brake_at_rest(&self) -> Result<Limit, String> {
        let usage = self.controls.current.get().map_err(text)?.bytes();
        let braked =
            thresholds(&self.policy, self.limit).filter(|at| !self.is_let_go() && usage <= at.high);
        Ok(braked.map_or(Limit::Max, |at| Limit::At(at.high)))
    }

    /// Puts a brake right that somebody else has moved. One that is set below usage while the container is
    /// held stays.
    pub(super) fn put_back(&self) -> Result<(), String> {
        let is_braked = self.held.is_some_and(|held| held.braked_at.is_some());
        if self.foreign_brake
            || is_braked
            || self.controls.high.get().map_err(text)? == self.brake_at_rest()?
        {
            return Ok(());
        }
        self.rest_brake()
    }

    /// Takes note of a limit in force, and moves watermark, brake and reaction with it.
    fn limit_is(&mut self, limit: Bytes, source: &mut Source) -> Result<(), String> {
        self.limit = limit;
        self.release_at = limit.plus(Bytes(1));
        self.reaction = reaction(&self.policy, limit);
        self.watch(source)
    }

    fn climb(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        rung: Rung,
        means: &mut Means<'_>,
    ) -> Result<Verdict, String> {
        let action = Action::Raise {
            from: self.limit,
            to: rung.limit,
        };
        self.intend(means.ledger, action, Reason::WatermarkReached, demand)?;
        self.controls.max.set(Limit::At(rung.limit)).map_err(text)?;
        let at = now();
        // The ladder that is armed holds the rungs above this one too.
        self.limit = rung.limit;
        self.watch(means.source)?;
        Ok(Verdict::Raised {
            cgroup: self.cgroup,
            event_at: Nanos(event.at_ns),
            at,
            limit: rung.limit,
        })
    }

    /// Raises a limit that nobody else manages, unless the table has raised it further meanwhile.
    pub(super) fn raise(
        &mut self,
        source: &mut Source,
        to: Bytes,
    ) -> Option<Result<Verdict, String>> {
        if to <= self.limit {
            return None;
        }
        let asked = now();
        let raised = self
            .controls
            .max
            .set(Limit::At(to))
            .map_err(text)
            .and_then(|()| self.limit_is(to, source));
        Some(raised.map(|()| Verdict::Raised {
            cgroup: self.cgroup,
            event_at: asked,
            at: now(),
            limit: to,
        }))
    }

    /// Lowers a limit that nobody else manages, if usage is below the watermark of the new one.
    pub(super) fn lower(&mut self, source: &mut Source, to: Bytes) -> Result<Verdict, String> {
        let cgroup = self.cgroup;
        let usage = self.controls.current.get().map_err(text)?.bytes();
        let Policy { cpus, signals, .. } = self.policy;
        if usage > Thresholds::of(to, cpus, signals).watermark
            || self.controls.max.set(Limit::At(to)).is_err()
        {
            return Ok(Verdict::LowerRefused { cgroup });
        }
        self.limit_is(to, source)?;
        Ok(Verdict::Lowered { cgroup, limit: to })
    }

    /// Holds it, unless its patience is used up.
    fn hold(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        by: Hold,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let (cgroup, at) = (self.cgroup, now());
        let until = self.patience_ends(by, at)?;
        let held = Held {
            since: at,
            by,
            until,
            braked_at: None,
        };
        match by {
            Hold::Freezer => Some(self.freeze(demand, held, means.ledger)),
            Hold::Brake => {
                self.held = Some(held);
                match self.brake(event, demand, held, means) {
                    Some(Err(error)) => {
                        self.held = None;
                        Some(Err(error))
                    }
                    _ => Some(Ok(Verdict::Held { cgroup, at })),
                }
            }
        }
    }

    fn freeze(
        &mut self,
        demand: Bytes,
        held: Held,
        ledger: &mut Ledger,
    ) -> Result<Verdict, String> {
        self.intend(ledger, Action::Hold, Reason::RaiseUnderWay, demand)?;
        self.controls.freeze.set_flag(true).map_err(text)?;
        self.held = Some(held);
        Ok(Verdict::Held {
            cgroup: self.cgroup,
            at: held.since,
        })
    }

    /// When a hold that begins at `at` has to end.
    fn patience_ends(&mut self, by: Hold, at: Nanos) -> Option<Nanos> {
        let patience = self.policy.patience;
        if at.since(self.spent.last_end) >= patience.recovery {
            self.spent.time = Nanos(0);
        }
        let allowed = match by {
            Hold::Freezer => patience.frozen,
            Hold::Brake => patience.braked,
        };
        let left = Patience::left(allowed, self.spent.time);
        (left >= SHORTEST_HOLD).then_some(Nanos(at.0.saturating_add(left.0)))
    }

    /// Sets the brake of a held container below its usage, if it goes on growing.
    fn brake(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        held: Held,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let at = Nanos(event.at_ns);
        let is_settling = held.by == Hold::Freezer && at.since(held.since) < SETTLING;
        let is_recent = held
            .braked_at
            .is_some_and(|braked_at| at.since(braked_at) < BRAKE_INTERVAL);
        if is_settling || is_recent || self.foreign_brake {
            return None;
        }
        let Actuation::Requested { p95 } = self.policy.actuation else {
            return None;
        };
        let growing = Growing {
            usage: Bytes::from_pages(event.usage_pages),
            limit: self.limit,
            charge: Bytes::from_pages(event.charge_pages.into()),
            growers: self.controls.growers(self.policy.cpus),
        };
        let answer = p95.per_mille(1250).since(at.since(held.since));
        let high = brake::high(growing, answer.max(SHORTEST_BRAKE));
        let action = Action::Brake { high };
        if let Err(error) = self.intend(means.ledger, action, Reason::GrowsWhileHeld, demand) {
            return Some(Err(error));
        }
        let Self {
            cgroup, controls, ..
        } = self;
        means.brakes.set(*cgroup, &controls.high, high, &self.epoch);
        self.held = Some(Held {
            braked_at: Some(at),
            ..held
        });
        Some(Ok(Verdict::Braked { cgroup: *cgroup }))
    }

    /// Lifts a hold if the limit was raised, or if it has lasted for longer than anybody may be held.
    pub(super) fn look_after(
        &mut self,
        at: Nanos,
        ledger: &mut Ledger,
        source: &mut Source,
        verdicts: &mut Vec<Verdict>,
    ) {
        let cgroup = self.cgroup;
        let limit = match self.controls.limit() {
            Ok(limit) => limit,
            Err(error) => {
                verdicts.push(self.thaw(ledger, Reason::Ended));
                let error = error.to_string();
                return verdicts.push(Verdict::Failed { cgroup, error });
            }
        };
        if limit == self.limit {
            // The lower limit has come into force: any rise from here is the answer.
            self.release_at = limit.plus(Bytes(1));
        }
        if limit >= self.release_at {
            self.let_go = None;
            if let Err(error) = self.limit_is(limit, source) {
                verdicts.push(Verdict::Failed { cgroup, error });
            }
            verdicts.push(self.thaw(ledger, Reason::RaiseArrived));
            verdicts.push(Verdict::LimitRose { cgroup, limit });
        } else if self.held.is_some_and(|held| at >= held.until) {
            verdicts.push(self.thaw(ledger, Reason::HoldExpired));
        }
    }

    /// Lifts a hold; one that expired with its brake, which would go on where the hold ended: the
    /// kernel then decides as it would have. The writes come first: a ledger that cannot be written
    /// must not keep a container frozen.
    pub(super) fn thaw(&mut self, ledger: &mut Ledger, reason: Reason) -> Verdict {
        let (cgroup, at) = (self.cgroup, now());
        self.epoch.next();
        let held = self.held.take();
        let unbraked = if reason == Reason::HoldExpired {
            self.let_go = Some(at);
            self.set_brake(Limit::Max).map_err(text)
        } else if held.is_some_and(|held| held.braked_at.is_some()) {
            self.rest_brake()
        } else {
            Ok(())
        };
        let thawed = self.controls.freeze.set_flag(false).map_err(text);
        if let Some(held) = held {
            self.spent.time = Nanos(self.spent.time.0.saturating_add(at.since(held.since).0));
            self.spent.last_end = at;
        }
        let recorded = self.intend(ledger, Action::Release, reason, Bytes::ZERO);
        match unbraked.and(thawed).and(recorded) {
            Ok(()) => Verdict::Released { cgroup },
            Err(error) => Verdict::Failed { cgroup, error },
        }
    }

    /// Removes the brake; a cgroup that is gone has none.
    pub(super) fn unbrake(&self) -> Result<(), String> {
        self.epoch.next();
        match self.set_brake(Limit::Max) {
            Err(error) if !error.is_gone() => Err(error.to_string()),
            _ => Ok(()),
        }
    }

    fn intend(
        &self,
        ledger: &mut Ledger,
        action: Action,
        reason: Reason,
        demand: Bytes,
    ) -> Result<(), String> {
        let record = Record::Intend {
            at: now(),
            cgroup: self.cgroup,
            action,
            reason,
            demand,
        };
        ledger
            .append(&record)
            .map_err(|error| format!("the ledger cannot be written, so nothing is done: {error}"))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: CgroupError) -> String {
    error.to_string()
}
