//! One row of the reflex table: a guarded cgroup's rules, its open files, and what is done with them.
//!
//! The order of the writes in here is the safety of the reflex: intents before actions, a raise before
//! the brake follows it, a thaw before anything that could fail. It must not wait, and must not lower
//! a limit that usage has not been looked at for.

use bellows_core::{
    Action, Actuation, Bytes, CgroupId, Nanos, Policy, Reaction, Reason, Thresholds,
    reflex::{Rung, is_rushing, reaction, rung_for, thresholds},
};
use bellows_ebpf_common::{BATCH_PAGES, MemoryEvent};

use super::{
    Arm, Means, Verdict,
    brakes::Epoch,
    controls::Controls,
    freezer::Freezer,
    hold::{Held, Spent},
};
use crate::{
    cgroup::{CgroupError, Limit},
    clock::now,
    ledger::{Ledger, Record},
    signal::{programs::LoadError, source::Source},
};

/// The kernel programs close a window with the first charge after 5 ms: one of twice that has had a pause in it.
const SHORT_WINDOW: Nanos = Nanos::millis(10);
/// How long a container whose hold expired is left alone.
pub(crate) const LET_GO_FOR: Nanos = Nanos::millis(10_000);

pub(super) struct Row {
    pub(super) cgroup: CgroupId,
    pub(super) policy: Policy,
    pub(super) limit: Bytes,
    /// The limit that the kernel still has while a lower one is on its way: to see it proves nothing.
    pub(super) outdated: Option<Bytes>,
    reaction: Reaction,
    pub(super) controls: Controls,
    pub(super) held: Option<Held>,
    pub(super) spent: Spent,
    /// Moves on when a brake below usage is no longer wanted.
    pub(super) epoch: Epoch,
    /// Whether `memory.high` was somebody else's (the kubelet's MemoryQoS) when it was first armed: it is
    /// left alone then, and only the freezer holds.
    pub(super) foreign_brake: bool,
    /// Since when it is let go after a hold expired: not braked or held again before the limit has
    /// risen or [`LET_GO_FOR`] has passed.
    pub(super) let_go: Option<Nanos>,
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
        let before = match before {
            Some(before) => before,
            None => {
                let controls = controls.ok_or("armed without its files")?;
                Self::new(cgroup, policy, controls)?
            }
        };
        // What the controller knows may be older than the last raise.
        let actual = match before.controls.limit() {
            Ok(actual) => actual,
            Err(error) => {
                let thawed = before.thaw_now();
                return Err(before
                    .unbrake()
                    .and(thawed)
                    .err()
                    .unwrap_or_else(|| error.to_string()));
            }
        };
        let limit = lowering.map_or(actual, |lower| lower.min(actual));
        Ok(Self {
            policy,
            limit,
            outdated: (limit < actual).then_some(actual),
            reaction: reaction(&policy, limit),
            let_go: before.let_go.filter(|_| limit <= before.limit),
            ..before
        })
    }

    fn new(cgroup: CgroupId, policy: Policy, controls: Controls) -> Result<Self, String> {
        let limit = controls.limit().map_err(text)?;
        let foreign_brake = controls.high.get().map_err(text)? != Limit::Max;
        Ok(Self {
            cgroup,
            policy,
            limit,
            outdated: None,
            reaction: reaction(&policy, limit),
            controls,
            held: None,
            spent: Spent::default(),
            epoch: Epoch::default(),
            foreign_brake,
            let_go: None,
        })
    }

    pub(super) fn set_brake(&self, high: Limit) -> Result<(), CgroupError> {
        if self.foreign_brake {
            Ok(())
        } else {
            self.controls.high.set(high)
        }
    }

    pub(super) fn held_since(&self) -> Option<Nanos> {
        self.held.map(|held| held.since)
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
                Some(held) => self.grows_on(event, demand, held, means),
                None => None,
            },
            Reaction::Nothing => None,
        }
    }

    fn is_rushing(&self, event: &MemoryEvent, demand: Bytes) -> bool {
        let Actuation::Requested { p95 } = self.policy.actuation else {
            return false;
        };
        // One huge page in a short window is no speed yet.
        let huge = if event.window_ns < SHORT_WINDOW.0 {
            u64::from(event.charge_pages).saturating_sub(BATCH_PAGES)
        } else {
            0
        };
        let pages = event.window_pages.saturating_sub(huge);
        let rate = Bytes::from_pages(pages).scaled(1_000_000_000, event.window_ns);
        is_rushing(self.policy.usable(self.limit), demand, rate, p95)
    }

    /// Moves watermark and brake to where the limit wants them, or removes them.
    ///
    /// A brake below usage (a limit full of page cache, for one) would reclaim here, on this thread:
    /// it is left out then, and the watermark, which counts no cache, guards alone.
    pub(super) fn watch(&self, source: &mut Source) -> Result<(), String> {
        let thresholds = thresholds(&self.policy, self.limit);
        source
            .watch(self.cgroup, thresholds.map(Thresholds::watermarks))
            .map_err(|error: LoadError| error.to_string())?;
        if self.is_braked() {
            // It rests when the hold ends.
            return Ok(());
        }
        self.rest_brake()
    }

    fn is_braked(&self) -> bool {
        self.held.is_some_and(|held| held.braked.is_some())
    }

    /// Puts the brake where the limit wants it.
    pub(super) fn rest_brake(&self) -> Result<(), String> {
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
        if self.foreign_brake
            || self.is_braked()
            || self.controls.high.get().map_err(text)? == self.brake_at_rest()?
        {
            return Ok(());
        }
        self.rest_brake()
    }

    /// Takes note of a limit in force, and moves watermark, brake and reaction with it.
    pub(super) fn limit_is(&mut self, limit: Bytes, source: &mut Source) -> Result<(), String> {
        self.limit = limit;
        self.outdated = None;
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
        if usage > Thresholds::under(&self.policy, to).watermark
            || self.controls.max.set(Limit::At(to)).is_err()
        {
            // Making room has moved it.
            self.rest_brake()?;
            return Ok(Verdict::LowerRefused { cgroup });
        }
        self.limit_is(to, source)?;
        Ok(Verdict::Lowered { cgroup, limit: to })
    }

    /// Removes the brake; a cgroup that is gone has none.
    pub(super) fn unbrake(&self) -> Result<(), String> {
        self.epoch.next();
        match self.set_brake(Limit::Max) {
            Err(error) if !error.is_gone() => Err(error.to_string()),
            _ => Ok(()),
        }
    }

    /// Thaws it, and waits for that; one that is gone is frozen no more.
    pub(super) fn thaw_now(&self) -> Result<(), String> {
        match self.controls.freeze.release() {
            Err(error) if !error.is_gone() => Err(error.to_string()),
            _ => Ok(()),
        }
    }

    /// Thaws it for good; whether that is written already. One that is gone is frozen no more.
    pub(super) fn leave(&self, freezer: &Freezer) -> Result<bool, String> {
        match freezer.leave(&self.controls.freeze) {
            Err(error) if !error.is_gone() => Err(error.to_string()),
            thawed => Ok(thawed.unwrap_or(true)),
        }
    }

    pub(super) fn intend(
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
pub(super) fn text(error: CgroupError) -> String {
    error.to_string()
}
