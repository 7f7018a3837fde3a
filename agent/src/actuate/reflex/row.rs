//! One row of the reflex table: a guarded cgroup's rules, its open files, and what is done with them.
//!
//! The order of the writes in here is the safety of the reflex: intents before actions, a raise before
//! the brake follows it, a thaw before anything that could fail. It must not wait, and must not lower
//! a limit that usage has not been looked at for.

use bellows_core::{
    Action, Bytes, CgroupId, Nanos, Policy, Reaction, Reason, Thresholds,
    decide::HOLD_LIMIT,
    reflex::{Rung, reaction, rung_for, thresholds},
};
use bellows_ebpf_common::MemoryEvent;

use super::{Arm, Verdict, now};
use crate::{
    cgroup::{Cgroup, CgroupError, Control, Limit},
    ledger::{Ledger, Record},
    signal::programs::{Guards, LoadError},
};

/// How long a container whose hold expired is left alone.
const LET_GO_FOR: Nanos = Nanos::millis(10_000);

/// The files that the reflex writes.
#[derive(Debug)]
pub struct Controls {
    max: Control,
    high: Control,
    freeze: Control,
    current: Control,
}

impl Controls {
    /// Opens them.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one does not exist or cannot be written.
    pub fn open(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self {
            max: Control::open(cgroup, "memory.max")?,
            high: Control::open(cgroup, "memory.high")?,
            freeze: Control::open(cgroup, "cgroup.freeze")?,
            current: Control::open_read(cgroup, "memory.current")?,
        })
    }
}

pub(super) struct Row {
    cgroup: CgroupId,
    policy: Policy,
    limit: Bytes,
    /// A limit of this size or more proves that a lower one was overtaken, and ends a hold.
    release_at: Bytes,
    reaction: Reaction,
    controls: Controls,
    /// Since when it is held.
    held: Option<Nanos>,
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
                let_go,
                controls,
                ..
            }) => (Some((limit, held, let_go)), controls),
            None => (None, controls.ok_or("armed without its files")?),
        };
        // What the controller knows may be older than the last raise.
        let actual = controls.max.get().map_err(|error| {
            let lifted = controls
                .high
                .set(Limit::Max)
                .and_then(|()| controls.freeze.set_flag(false));
            lifted.err().unwrap_or(error).to_string()
        })?;
        let actual = actual.bytes();
        let limit = lowering.map_or(actual, |lower| lower.min(actual));
        let (held, let_go) = known.map_or((None, None), |(before, held, let_go)| {
            (held, let_go.filter(|_| limit <= before))
        });
        Ok(Self {
            cgroup,
            policy,
            limit,
            release_at: actual.plus(Bytes(1)),
            reaction: reaction(&policy, limit),
            controls,
            held,
            let_go,
        })
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
        ledger: &mut Ledger,
        guards: &mut Guards,
    ) -> Option<Result<Verdict, String>> {
        match &self.reaction {
            Reaction::Raise { rungs } => {
                let rung = *rung_for(rungs, demand).filter(|rung| rung.limit > self.limit)?;
                Some(self.climb(event, demand, rung, ledger, guards))
            }
            Reaction::Hold { at } if demand >= *at && !self.is_held() && !self.is_let_go() => {
                Some(self.hold(demand, ledger))
            }
            Reaction::Hold { .. } | Reaction::Nothing => None,
        }
    }

    /// Moves watermark and brake to where the limit wants them, or removes them.
    ///
    /// A brake below usage (a limit full of page cache, for one) would reclaim here, on this thread:
    /// it is left out then, and the watermark, which counts no cache, guards alone.
    pub(super) fn watch(&self, guards: &mut Guards) -> Result<(), String> {
        let thresholds = thresholds(&self.policy, self.limit);
        guards
            .set(self.cgroup, thresholds.map(|at| at.watermark))
            .map_err(|error: LoadError| error.to_string())?;
        let usage = self.controls.current.get().map_err(text)?.bytes();
        let braked = thresholds.filter(|at| !self.is_let_go() && usage <= at.high);
        let high = braked.map_or(Limit::Max, |at| Limit::At(at.high));
        self.controls.high.set(high).map_err(text)
    }

    /// Takes note of a limit in force, and moves watermark, brake and reaction with it.
    fn limit_is(&mut self, limit: Bytes, guards: &mut Guards) -> Result<(), String> {
        self.limit = limit;
        self.release_at = limit.plus(Bytes(1));
        self.reaction = reaction(&self.policy, limit);
        self.watch(guards)
    }

    fn climb(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        rung: Rung,
        ledger: &mut Ledger,
        guards: &mut Guards,
    ) -> Result<Verdict, String> {
        let action = Action::Raise {
            from: self.limit,
            to: rung.limit,
        };
        self.intend(ledger, action, Reason::WatermarkReached, demand)?;
        self.controls.max.set(Limit::At(rung.limit)).map_err(text)?;
        let at = now();
        // The ladder that is armed holds the rungs above this one too.
        self.limit = rung.limit;
        self.watch(guards)?;
        Ok(Verdict::Raised {
            cgroup: self.cgroup,
            event_at: Nanos(event.at_ns),
            at,
            limit: rung.limit,
        })
    }

    /// Lowers a limit that nobody else manages, if usage is below the watermark of the new one.
    pub(super) fn lower(&mut self, guards: &mut Guards, to: Bytes) -> Result<Verdict, String> {
        let cgroup = self.cgroup;
        let usage = self.controls.current.get().map_err(text)?.bytes();
        if usage > Thresholds::of(to, self.policy.cpus).watermark
            || self.controls.max.set(Limit::At(to)).is_err()
        {
            return Ok(Verdict::LowerRefused { cgroup });
        }
        self.limit_is(to, guards)?;
        Ok(Verdict::Lowered { cgroup, limit: to })
    }

    fn hold(&mut self, demand: Bytes, ledger: &mut Ledger) -> Result<Verdict, String> {
        self.intend(ledger, Action::Hold, Reason::RaiseUnderWay, demand)?;
        self.controls.freeze.set_flag(true).map_err(text)?;
        let at = now();
        self.held = Some(at);
        Ok(Verdict::Held {
            cgroup: self.cgroup,
            at,
        })
    }

    /// Lifts a hold if the limit was raised, or if it has lasted for longer than anybody may be held.
    pub(super) fn look_after(
        &mut self,
        at: Nanos,
        ledger: &mut Ledger,
        guards: &mut Guards,
        verdicts: &mut Vec<Verdict>,
    ) {
        let cgroup = self.cgroup;
        let limit = match self.controls.max.get() {
            Ok(limit) => limit.bytes(),
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
            if let Err(error) = self.limit_is(limit, guards) {
                verdicts.push(Verdict::Failed { cgroup, error });
            }
            verdicts.push(self.thaw(ledger, Reason::RaiseArrived));
            verdicts.push(Verdict::LimitRose { cgroup, limit });
        } else if self.held.is_some_and(|since| at.since(since) >= HOLD_LIMIT) {
            verdicts.push(self.thaw(ledger, Reason::HoldExpired));
        }
    }

    /// Lifts a hold; one that expired with its brake, which would go on where the hold ended: the
    /// kernel then decides as it would have. The writes come first: a ledger that cannot be written
    /// must not keep a container frozen.
    pub(super) fn thaw(&mut self, ledger: &mut Ledger, reason: Reason) -> Verdict {
        let cgroup = self.cgroup;
        let unbraked = if reason == Reason::HoldExpired {
            self.let_go = Some(now());
            self.controls.high.set(Limit::Max)
        } else {
            Ok(())
        };
        let thawed = self.controls.freeze.set_flag(false);
        self.held = None;
        let recorded = self.intend(ledger, Action::Release, reason, Bytes::ZERO);
        match unbraked.and(thawed).map_err(text).and(recorded) {
            Ok(()) => Verdict::Released { cgroup },
            Err(error) => Verdict::Failed { cgroup, error },
        }
    }

    /// Removes the brake; a cgroup that is gone has none.
    pub(super) fn unbrake(&self) -> Result<(), String> {
        match self.controls.high.set(Limit::Max) {
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
