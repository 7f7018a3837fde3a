//! Holding a row's container, and letting it go.
//!
//! A hold freezes. Whoever is still charged for after that grows inside a system call, where the freezer
//! does not reach: then the brake is set below usage, as deep as the answer is late ([`brake`]). Where its
//! probes forbid the freezer there is only the brake.
//!
//! A hold must end, whatever anybody else does: with the limit's rise or with the container's patience.

use bellows_core::{
    Action, Actuation, Bytes, Nanos, Patience, Reason,
    brake::{self, Growing},
    reflex::Hold,
};
use bellows_ebpf_common::MemoryEvent;

use super::{
    Means, Verdict,
    row::{Row, text},
};
use crate::{cgroup::Limit, clock::now, ledger::Ledger, signal::source::Source};

/// How long a page fault that was under way may still charge after a freeze.
const SETTLING: Nanos = Nanos::millis(2);
/// Shortest time between two brakes of one container.
const BRAKE_INTERVAL: Nanos = Nanos::millis(10);
/// A brake lasts at least this long, however soon the answer should be there.
const SHORTEST_BRAKE: Nanos = Nanos::millis(100);
/// What is left of a container's patience must be worth a hold.
const SHORTEST_HOLD: Nanos = Nanos::millis(50);

/// A hold that lasts.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) since: Nanos,
    by: Hold,
    /// When it expires.
    until: Nanos,
    /// When its brake was last set below usage.
    pub(super) braked_at: Option<Nanos>,
}

/// How much of its patience a container has used up in holds that follow each other.
#[derive(Clone, Copy, Default)]
pub(super) struct Spent {
    time: Nanos,
    last_end: Nanos,
}

impl Row {
    /// Holds it, unless its patience is used up.
    pub(super) fn hold(
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
    pub(super) fn brake(
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
            self.outdated = None;
        }
        if limit > self.limit && self.outdated != Some(limit) {
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
}
