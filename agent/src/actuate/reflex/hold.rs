//! Holding a row's container, and letting it go.
//!
//! A hold freezes. A page fault that is under way is served first, and then its thread stands still. What
//! grows inside a system call goes on, where the freezer does not reach: there the brake is set below usage,
//! as deep as the answer is late ([`brake`]), and takes the place of the freeze. Both together would hold up
//! the answer: before it changes a limit, runc asks whether the container is paused, and if it is to be frozen
//! waits until it is, for as long as 10 s, whatever becomes of the freeze meanwhile (`waitFrozen`,
//! cgroups/fs2/freezer.go). A long system call, or a thread that the brake has put to sleep, keeps it from
//! that. So a freeze that is not complete before runc may ask is lifted, too, unless only page faults have been
//! charged for and its threads go on. A page fault ends by itself, but that takes the CPU time for the pages that
//! the kernel clears and reclaims in it, and on a busy node, or where the container has used up its CPU quota, that
//! takes long. Whoever is let out meanwhile may use up what is left. Once runc has asked, a thaw cannot help it any
//! more, only a freeze that is complete. Where probes forbid the freezer there is only the brake from the start.
//!
//! A freeze that is written late (see [`super::freezer`]) needs a brake meanwhile. Where only page faults are charged for,
//! that is one from which everybody wakes up before runc may ask, and is frozen then: a brake for the whole answer, in
//! scarce room, made four threads sleep for five times as long as that took.
//!
//! A hold must end, whatever anybody else does: with the limit's rise or with the container's patience.

use bellows_core::{
    Action, Actuation, Bytes, Nanos, Reason,
    brake::{self, Growing},
    reflex::Hold,
};
use bellows_ebpf_common::{BATCH_PAGES, ENTRY_CALL, ENTRY_FAULT, MemoryEvent};

use super::{
    Means, Verdict,
    freezer::Freezer,
    row::{Row, text},
};
use crate::{cgroup::Limit, clock::now, ledger::Ledger, machine};

/// How long a page fault that was under way may still charge after a freeze, where it cannot be told from a
/// system call.
const SETTLING: Nanos = Nanos::millis(2);
/// Of a thread that is charged for inside a system call so long after the freeze, that call is a long one.
const LONG_CALL: Nanos = Nanos::millis(10);
/// When a freeze must be written, or whoever grows is braked meanwhile (see [`super::freezer`]): the sleeps of a brake may
/// outlast the answer, so it is waited for a little longer while there is room.
const UNWRITTEN: Nanos = Nanos::millis(5);
/// The same where the room may be used up before anybody sleeps.
const UNWRITTEN_WHILE_SCARCE: Nanos = Nanos::millis(1);
/// When a freeze must be complete: a raise takes the API server, the kubelet and the runtime 0.25 s and more
/// until runc asks.
const FREEZING: Nanos = Nanos::millis(100);
/// From when on it is looked at what keeps it.
const LOOKED_AT: Nanos = Nanos::millis(50);
/// Of the time that an answer takes, what passes at least until runc asks.
const UNTIL_ASKED_PER_MILLE: u64 = 333;
/// Whoever sleeps until a freeze is written wakes up well before that, so that what he does then is seen in time; and
/// before any runc asks, whatever answers have taken lately.
const AWAKE_PER_MILLE: u64 = 750;
const AWAKE: Nanos = Nanos::millis(150);
/// Shorter sleeps than this are not worth a brake.
const SHORTEST_SLEEP: Nanos = Nanos::millis(30);
/// Whoever has neither run nor waited for CPU or memory for a quarter of such a time waits for something else.
const INACTIVE: Nanos = Nanos::millis(25);
/// Shortest time between two brakes of one container.
const BRAKE_INTERVAL: Nanos = Nanos::millis(10);
/// A brake lasts at least this long, however soon the answer should be there.
const SHORTEST_BRAKE: Nanos = Nanos::millis(100);
/// What is left of a container's patience must be worth a hold.
const SHORTEST_HOLD: Nanos = Nanos::millis(50);

/// A hold that lasts.
#[derive(Clone, Copy)]
pub(super) struct Held {
    /// Since when: a freeze may be written later than that.
    pub(super) since: Nanos,
    /// When it expires.
    until: Nanos,
    freeze: Freeze,
    /// How its brake was last set below usage.
    pub(super) braked: Option<Braked>,
    /// The thread that was last charged for inside a system call while it was to be frozen.
    grower: Option<u32>,
    /// Whether all that was charged since is known to be page faults.
    is_faults: bool,
    activity: Option<Activity>,
}

/// A look at whether a container that is to be frozen still goes on.
#[derive(Clone, Copy)]
struct Activity {
    at: Nanos,
    /// For how long its threads have run or waited by then.
    sum: Nanos,
    goes_on: bool,
}

/// What the freezer does in a hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Freeze {
    /// It freezes, which may take a moment.
    Begun,
    /// All that could go on stands still, or nobody could tell, or it is too late to lift it.
    Complete,
    /// The brake takes its place as soon as it is set.
    Replaced,
    /// Nothing.
    Off,
}

/// A brake that is set below usage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Braked {
    at: Nanos,
    pub(super) high: Bytes,
    /// Whether only until the freeze is in force.
    is_brief: bool,
}

/// What a brake that is set below usage must last until.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The freeze is in force; then it must stand here.
    Frozen(Bytes),
    /// The limit is raised.
    Answered,
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
        let cgroup = self.cgroup;
        if by == Hold::Brake && self.foreign_brake {
            // There is nothing to hold it by.
            return None;
        }
        let until = self.patience_ends(by, now())?;
        let freeze = match by {
            Hold::Freezer => match self.freeze(demand, means) {
                Ok(true) => Freeze::Begun,
                Ok(false) => Freeze::Replaced,
                Err(error) => return Some(Err(error)),
            },
            Hold::Brake => Freeze::Off,
        };
        let at = now();
        let held = Held {
            since: at,
            until,
            freeze,
            braked: None,
            grower: None,
            is_faults: true,
            activity: None,
        };
        self.held = Some(held);
        let braked = match self.grows_on(event, demand, held, means) {
            // One that is frozen is held without a brake too.
            Some(Err(error)) if by == Hold::Brake => {
                self.held = None;
                return Some(Err(error));
            }
            braked => matches!(braked, Some(Ok(_))),
        };
        Some(Ok(Verdict::Held {
            cgroup,
            at,
            until,
            braked,
        }))
    }

    /// Returns whether the freeze comes.
    fn freeze(&self, demand: Bytes, means: &mut Means<'_>) -> Result<bool, String> {
        self.intend(means.ledger, Action::Hold, Reason::RaiseUnderWay, demand)?;
        Ok(means.freezer.freeze(&self.controls.freeze))
    }

    /// Freezes one again whose freeze the brake has replaced, for as long as it waits for room: a brake lasts for seconds, and
    /// nobody is asked meanwhile whom a freeze that is not complete could hold up. Where it grows on the brake replaces it again.
    pub(super) fn freeze_again(&mut self, means: &mut Means<'_>) -> Option<String> {
        let held = self.held.filter(|held| held.freeze == Freeze::Off)?;
        if !self.policy.patience.may_freeze() {
            return None;
        }
        match self.freeze(Bytes::ZERO, means) {
            Ok(true) => {
                let freeze = Freeze::Complete;
                self.held = Some(Held { freeze, ..held });
                None
            }
            Ok(false) => None,
            Err(error) => Some(error),
        }
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
        let left = patience.left(allowed, self.spent.time);
        (left >= SHORTEST_HOLD).then_some(Nanos(at.0.saturating_add(left.0)))
    }

    /// A held container was charged for: sets its brake below usage, if that is more than a page fault that
    /// was under way.
    pub(super) fn grows_on(
        &mut self,
        event: &MemoryEvent,
        demand: Bytes,
        held: Held,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let growing = self.growing(
            Bytes::from_pages(event.usage_pages),
            Bytes::from_pages(event.charge_pages.into()),
        );
        let beside = self.freeze_beside_brake(event, held, growing)?;
        self.brake(growing, beside, Nanos(event.at_ns), demand, means)
    }

    fn growing(&self, usage: Bytes, charge: Bytes) -> Growing {
        Growing {
            usage,
            limit: self.limit,
            charge,
            growers: self.controls.growers(self.policy.cpus),
            page: machine::pages(1),
        }
    }

    /// What becomes of the freeze when a brake is set for this charge, and until when that is; `None` if none is needed.
    fn freeze_beside_brake(
        &mut self,
        event: &MemoryEvent,
        held: Held,
        growing: Growing,
    ) -> Option<(Freeze, Until)> {
        let until_answer = |freeze| (freeze, Until::Answered);
        if matches!(held.freeze, Freeze::Replaced | Freeze::Off) {
            return Some(until_answer(held.freeze));
        }
        let at = Nanos(event.at_ns);
        let is_scarce = brake::is_scarce(growing);
        let frozen_at = self.controls.freeze.frozen_at();
        let patience = if is_scarce {
            UNWRITTEN_WHILE_SCARCE
        } else {
            UNWRITTEN
        };
        let held = Held {
            is_faults: held.is_faults && event.entry == ENTRY_FAULT,
            ..held
        };
        self.held = Some(held);
        if frozen_at.is_none() && at.since(held.since) >= patience && !self.foreign_brake {
            // It is late: the brake is not.
            let until_frozen = self.until_frozen(event, held, growing);
            let brief = until_frozen.map(|high| (held.freeze, Until::Frozen(high)));
            return Some(brief.unwrap_or_else(|| until_answer(Freeze::Replaced)));
        }
        // One that was about to be thawed is frozen for longer than it is held.
        let frozen_for =
            frozen_at.map_or(Nanos(0), |frozen_at| at.since(frozen_at.max(held.since)));
        let is_after_freeze = frozen_for > Nanos(0);
        match event.entry {
            // It is back in user mode when that is served.
            ENTRY_FAULT => None,
            // Most system calls are short: the same one again is none of those.
            ENTRY_CALL
                if frozen_for >= LONG_CALL
                    || (is_after_freeze && held.grower == Some(event.thread)) =>
            {
                Some(until_answer(Freeze::Replaced))
            }
            ENTRY_CALL => {
                let grower = is_after_freeze.then_some(event.thread);
                self.held = Some(Held { grower, ..held });
                is_scarce.then_some(until_answer(held.freeze))
            }
            _unknown => (is_scarce || frozen_for >= SETTLING).then_some(until_answer(held.freeze)),
        }
    }

    /// Where the brake must stand until a freeze that is late is in force, if that can be waited for: of page faults alone,
    /// and of small pages. A huge one sleeps for eight times as long.
    fn until_frozen(&self, event: &MemoryEvent, held: Held, growing: Growing) -> Option<Bytes> {
        let asleep = self
            .awake_after()
            .since(Nanos(event.at_ns).since(held.since));
        let may_wait = held.is_faults
            && u64::from(event.charge_pages) <= BATCH_PAGES
            && asleep >= SHORTEST_SLEEP;
        may_wait
            .then(|| brake::high_until_frozen(growing, asleep))
            .flatten()
    }

    /// Sets the brake below usage, for as long as what it is waited for should take from now.
    fn brake(
        &mut self,
        growing: Growing,
        (freeze, until): (Freeze, Until),
        at: Nanos,
        demand: Bytes,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let Actuation::Requested { p95 } = self.policy.actuation else {
            return None;
        };
        let held = self.held?;
        if self.foreign_brake {
            // Whose it is, it throttles: a freeze that is not complete would only hold up the answer.
            self.held = Some(Held { freeze, ..held });
            return None;
        }
        let is_brief = matches!(until, Until::Frozen(_));
        let is_recent = held.braked.is_some_and(|braked| {
            braked.is_brief == is_brief && at.since(braked.at) < BRAKE_INTERVAL
        });
        if is_recent && freeze == held.freeze {
            return None;
        }
        let high = match until {
            Until::Frozen(high) => high,
            Until::Answered => {
                let answer = p95.per_mille(1250).since(at.since(held.since));
                brake::high(growing, answer.max(SHORTEST_BRAKE))
            }
        };
        let action = Action::Brake { high };
        if let Err(error) = self.intend(means.ledger, action, Reason::GrowsWhileHeld, demand) {
            return Some(Err(error));
        }
        let (cgroup, control) = (self.cgroup, &self.controls.brake);
        if !means.brakes.set(cgroup, control, high, &self.epoch) {
            // The next charge asks again.
            return None;
        }
        self.held = Some(Held {
            freeze,
            braked: Some(Braked { at, high, is_brief }),
            ..held
        });
        Some(Ok(Verdict::Braked { cgroup }))
    }

    /// Lifts a freeze whose place the brake has taken, and one that is not complete in time.
    fn look_after_freeze(
        &mut self,
        at: Nanos,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let held = self.held?;
        match held.freeze {
            Freeze::Begun => self.look_after_begun(at, held, means),
            // In force from the first moment of the write, however long that then reclaims.
            Freeze::Replaced if self.foreign_brake || self.is_brake_set(held) => {
                let lifted = means.freezer.thaw(&self.controls.freeze).map_err(text);
                self.set_freeze(Freeze::Off);
                Some(Err(lifted.err()?))
            }
            _ => None,
        }
    }

    fn look_after_begun(
        &mut self,
        at: Nanos,
        held: Held,
        means: &mut Means<'_>,
    ) -> Option<Result<Verdict, String>> {
        let elapsed = at.since(held.since);
        if elapsed < LOOKED_AT {
            return None;
        }
        let is_written = self.controls.freeze.frozen_at().is_some();
        if is_written && self.controls.is_frozen() {
            self.set_freeze(Freeze::Complete);
            return None;
        }
        let may_end = self.goes_on(at, held) && held.is_faults && is_written;
        if elapsed < FREEZING {
            return None;
        }
        if self.foreign_brake && !is_written && elapsed < self.asked_after() {
            // There is nothing else to hold it by, and nobody waits for what is not written.
            return None;
        }
        if may_end {
            if elapsed >= self.asked_after() {
                self.set_freeze(Freeze::Complete);
            }
            return None;
        }
        let usage = self.controls.current.get().ok()?.bytes();
        let growing = self.growing(usage, Bytes::ZERO);
        let beside = (Freeze::Replaced, Until::Answered);
        self.brake(growing, beside, at, usage, means)
    }

    /// When runc may ask for a freeze that is under way.
    fn asked_after(&self) -> Nanos {
        match self.policy.actuation {
            Actuation::Requested { p95 } => p95.per_mille(UNTIL_ASKED_PER_MILLE),
            Actuation::Direct => Nanos(0),
        }
    }

    /// When whoever a brake has put to sleep until he is frozen has woken up.
    fn awake_after(&self) -> Nanos {
        self.asked_after().per_mille(AWAKE_PER_MILLE).min(AWAKE)
    }

    fn set_freeze(&mut self, freeze: Freeze) {
        self.held = self.held.map(|held| Held { freeze, ..held });
    }

    /// Whether anything in it has run, or waited for CPU or memory, lately; so it is taken to until it was looked
    /// at twice.
    fn goes_on(&mut self, at: Nanos, held: Held) -> bool {
        let before = held.activity;
        if let Some(recent) = before.filter(|before| at.since(before.at) < INACTIVE) {
            return recent.goes_on;
        }
        let sum = self.controls.activity();
        let goes_on =
            before.is_none_or(|before| sum.since(before.sum).0 >= at.since(before.at).0 / 4);
        let activity = Some(Activity { at, sum, goes_on });
        self.held = Some(Held { activity, ..held });
        goes_on
    }

    fn is_brake_set(&self, held: Held) -> bool {
        let set = self.controls.high.get().ok();
        held.braked
            .is_some_and(|braked| set == Some(Limit::At(braked.high)))
    }

    /// Lifts a hold if the limit was raised, or if it has lasted for longer than anybody may be held.
    pub(super) fn look_after(
        &mut self,
        at: Nanos,
        means: &mut Means<'_>,
        verdicts: &mut Vec<Verdict>,
    ) {
        let cgroup = self.cgroup;
        let limit = match self.controls.limit() {
            Ok(limit) => limit,
            Err(error) => {
                verdicts.push(self.thaw(means.ledger, means.freezer, Reason::Ended));
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
            if let Err(error) = self.limit_is(limit, means.source) {
                verdicts.push(Verdict::Failed { cgroup, error });
            }
            verdicts.push(self.thaw(means.ledger, means.freezer, Reason::RaiseArrived));
            verdicts.push(Verdict::LimitRose { cgroup, limit });
        } else if self.held.is_some_and(|held| at >= held.until) {
            verdicts.push(self.thaw(means.ledger, means.freezer, Reason::HoldExpired));
        } else if let Some(verdict) = self.look_after_freeze(at, means) {
            verdicts.push(verdict.unwrap_or_else(|error| Verdict::Failed { cgroup, error }));
        }
    }

    /// Leaves it alone for a while, its brake lifted: the kernel decides as it would have.
    pub(super) fn let_go(&mut self) -> Result<(), String> {
        self.let_go = Some(now());
        self.epoch.next();
        self.set_brake(Limit::Max).map_err(text)
    }

    /// Lifts a hold; one that expired with its brake, which would go on where the hold ended: the
    /// kernel then decides as it would have. The writes come first: a ledger that cannot be written
    /// must not keep a container frozen.
    pub(super) fn thaw(
        &mut self,
        ledger: &mut Ledger,
        freezer: &Freezer,
        reason: Reason,
    ) -> Verdict {
        let (cgroup, at) = (self.cgroup, now());
        self.epoch.next();
        let held = self.held.take();
        let unbraked = if reason.lets_go() {
            self.let_go()
        } else if held.is_some_and(|held| held.braked.is_some()) {
            self.rest_brake()
        } else {
            Ok(())
        };
        let thawed = freezer.thaw(&self.controls.freeze).map_err(text);
        if let Some(held) = held {
            self.spent.time = Nanos(self.spent.time.0.saturating_add(at.since(held.since).0));
            self.spent.last_end = at;
        }
        let recorded = self.intend(ledger, Action::Release, reason, Bytes::ZERO);
        Verdict::Released {
            cgroup,
            reason,
            error: unbraked.and(thawed).and(recorded).err(),
        }
    }
}
