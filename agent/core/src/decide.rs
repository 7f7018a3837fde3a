//! The decision: a [`Snapshot`] of one guarded container in, a [`Plan`] out.
//!
//! **Up.** Granting everything at the first signal would always work and waste most of it, so the
//! limit climbs in geometric steps and any burst costs a logarithmic number of raises. On a direct
//! path the steps stand in the reflex table and nothing is decided here. Where the raise is a request, the
//! container stands still until it is answered, so a step is larger: what grows while the answer
//! is on its way, at least 3.1 times the demand (sixteen times the limit in three requests), at
//! most 4.5 times (a wrong rate must not grant a node).
//!
//! **By hand.** A raise whose answer does not come in time, or could not be asked for, is written without it where the
//! rules allow that ([`Policy::by_hand_after`]). The hazard is a smaller limit that is still on its way: whoever carries that
//! out looks at no usage, and kills. So it is waited for, for as long as the container's patience allows.
//!
//! **Down.** A burst is over when demand has not grown for the quiet period. The limit goes to
//! 1.25 times the demand, never below the original, and only if that gives back at least a fifth:
//! a limit that follows every breath would pay a request for each. Where somebody waits for room, a burst is over as soon as
//! most of it has been gone for a moment.
//!
//! **Page cache** that is a working set and does not fit is served slowly, by trial ([`crate::thrash`]).
//!
//! **Hold.** It ends with the answer or, whatever happens, when the container's patience is over: one
//! that is held for longer fails its probes, which is a kill by another hand. The reflex knows when.
//!
//! It must not plan a raise above the ceiling or a limit below demand.

use serde::{Deserialize, Serialize};

use crate::{
    action::{Action, Reason},
    history::History,
    policy::{Actuation, Policy},
    reflex::{Reaction, reaction, thresholds},
    thrash::Thrash,
    thresholds::Thresholds,
    units::{Bytes, Nanos},
};

/// A shrink goes to 1.25 times the demand.
const SHRINK_MARGIN_PER_MILLE: u64 = 1250;
/// A shrink that gives back less than this share of the limit is not worth its cost.
const SHRINK_WORTH_PER_MILLE: u64 = 800;
/// Where others wait for room, a burst most of which has been gone for this long is over: the next process of one that goes
/// on begins within milliseconds. By the rules' own time whoever waits has been held for most of its patience, or for all of
/// it (`storm`: three of twenty were granted what came back a second after theirs was over, and killed).
const SHRINK_FOR_OTHERS: Nanos = Nanos::millis(1000);
/// A refused shrink is tried again after this time even if demand has not fallen.
pub const SHRINK_REFUSED_FOR: Nanos = Nanos::millis(10_000);
/// For how long the kernel's own caches that were not given back when they were asked for count as in use: nobody tells when
/// they are not any more.
pub const SLAB_IN_USE_FOR: Nanos = Nanos::millis(300_000);
/// A requested raise goes to at least this multiple of the demand.
pub const REQUEST_STEP_MIN_PER_MILLE: u64 = 3100;
/// A requested raise goes to at most this multiple of the demand.
const REQUEST_STEP_MAX_PER_MILLE: u64 = 4500;

/// Everything a decision may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When it was taken.
    pub now: Nanos,
    /// The rules.
    pub policy: Policy,
    /// What was seen.
    pub history: History,
    /// What is known of its page cache.
    pub thrash: Thrash,
    /// `memory.max` as last read.
    pub limit: Bytes,
    /// The limit of a request that is not answered yet, and when it was sent.
    pub requested: Option<(Bytes, Nanos)>,
    /// A lower limit that was asked for and may still come into force, though a raise was asked for since.
    pub lowering: Option<Bytes>,
    /// Since when the container is held.
    pub held_since: Option<Nanos>,
    /// Whether it was let go because its patience was over, and needs its raise yet.
    pub is_let_go: bool,
    /// A shrink was refused at this demand: tried again with less, or from this time on.
    pub refused_shrink: Option<(Bytes, Nanos)>,
    /// A raise was refused; do not ask again before this time.
    pub raise_not_before: Nanos,
    /// Whether the request could not be made, for a passing reason.
    pub request_failed: bool,
    /// Whether the raise that was asked for may be written by hand.
    pub by_hand: ByHand,
    /// For how long demand must not have grown before the limit comes down, if longer than by the rules.
    pub quiet: Nanos,
    /// Whether anybody else waits for room: what is kept for what may come is whoever's who needs it now.
    pub others_wait: bool,
    /// What of the demand are the kernel's own caches, of names and inodes: they may be given back when the limit comes
    /// down. How many are in use nobody knows, so a burst that grows beside them is as large as it looks.
    pub slab: Bytes,
    /// When they were not given back though asked for.
    pub slab_kept: Option<Nanos>,
}

/// Whether a raise that was asked for may be written by hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ByHand {
    /// It may not: there is no room, or nobody else than who was asked may raise.
    #[default]
    No,
    /// Another limit may still come into force, and would be below usage.
    NotYet,
    /// It may.
    Yes,
}

/// What to do: actions in order, and what the reflex does from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// In the order in which they are to be carried out.
    pub actions: Vec<(Action, Reason)>,
    /// The reflex table's entry.
    pub reaction: Reaction,
}

/// Decides what to do with one guarded container.
#[must_use]
pub fn decide(snapshot: &Snapshot) -> Plan {
    let mut actions = Vec::new();
    actions.extend(raise(snapshot).or_else(|| raise_for_cache(snapshot)));
    actions.extend(raise_by_hand(snapshot));
    actions.extend(release(snapshot));
    actions.extend(shrink(snapshot));
    Plan {
        actions,
        reaction: reaction(&snapshot.policy, snapshot.limit),
    }
}

/// The size that a requested raise goes to.
pub(crate) fn request_target(policy: &Policy, history: &History, p95: Nanos) -> Bytes {
    let Policy { ceiling, .. } = *policy;
    let demand = history.demand;
    let meanwhile = history.rate_per_second.scaled(p95.0, 1_000_000_000);
    let target = demand.plus(meanwhile.per_mille(1500)).clamp(
        demand.per_mille(REQUEST_STEP_MIN_PER_MILLE),
        demand.per_mille(REQUEST_STEP_MAX_PER_MILLE),
    );
    policy.limit_for(target).round_up_mib().min(ceiling)
}

/// Where a raise goes: to what runs like this one have needed, in one step, or step by step where that is not known, or is
/// used up.
fn target(snapshot: &Snapshot, p95: Nanos) -> Bytes {
    let Snapshot {
        policy,
        history,
        limit,
        ..
    } = snapshot;
    // Who is held for a huge page is raised although it might go on without.
    let learnt = policy.learnt_for(history.demand);
    let learnt = learnt.filter(|learnt| learnt > limit);
    learnt.unwrap_or_else(|| request_target(policy, history, p95))
}

fn raise(snapshot: &Snapshot) -> Option<(Action, Reason)> {
    let Snapshot {
        policy,
        history,
        limit,
        requested,
        held_since,
        now,
        raise_not_before,
        ..
    } = snapshot;
    let Actuation::Requested { p95 } = policy.actuation else {
        return None;
    };
    if now < raise_not_before {
        return None;
    }
    let target = target(snapshot, p95);
    // Who is held waits for a raise.
    let needed_from = |at: Thresholds, limit: Bytes| match held_since {
        Some(_) => at.held_from(policy.usable(limit)),
        None => at.watermark,
    };
    match *requested {
        // A lower limit may be in force at any moment: it is what counts. The new request must differ
        // from the limit of today, or its arrival could not be told from the other's delay; at the ceiling
        // it can only be a little less.
        Some((lower, _)) if lower < *limit => {
            let at_lower = thresholds(policy, lower)?;
            let step = Bytes::mib(1);
            let more = target.max(limit.plus(step)).min(policy.ceiling);
            let less = limit.minus(step).min(policy.ceiling);
            let to = if more > *limit { more } else { less };
            (history.demand >= needed_from(at_lower, lower) && to > lower).then_some((
                Action::Raise { from: lower, to },
                Reason::GrewWhileShrinking,
            ))
        }
        Some(_) => None,
        None => {
            let at_limit = thresholds(policy, *limit)?;
            (history.demand >= needed_from(at_limit, *limit) && target > *limit).then_some((
                Action::Raise {
                    from: *limit,
                    to: target,
                },
                Reason::WatermarkReached,
            ))
        }
    }
}

fn raise_for_cache(snapshot: &Snapshot) -> Option<(Action, Reason)> {
    let Snapshot {
        policy,
        thrash,
        limit,
        requested,
        now,
        raise_not_before,
        ..
    } = snapshot;
    let is_wanted = requested.is_none() && now >= raise_not_before && thrash.wants(*limit, *now);
    let to = limit.scaled(2, 1).min(policy.ceiling);
    (is_wanted && to > *limit)
        .then_some((Action::Raise { from: *limit, to }, Reason::CacheThrashes))
}

fn raise_by_hand(snapshot: &Snapshot) -> Option<(Action, Reason)> {
    let Snapshot {
        now,
        policy,
        limit,
        requested,
        held_since,
        is_let_go,
        request_failed,
        by_hand,
        ..
    } = snapshot;
    let after = policy.by_hand_after?;
    let (to, asked) = requested.filter(|(to, _)| to > limit)?;
    // Nobody is held for long enough to be answered: what was waited for was room.
    let is_held_for = |patience| held_since.is_some_and(|since| now.since(since) >= patience);
    let is_held_too_long = is_held_for(policy.last_moment());
    let is_urgent = *is_let_go || is_held_too_long;
    let reason = if after == Nanos(0) {
        Reason::RaisedFirst
    } else if *request_failed {
        Reason::RequestFailed
    } else if is_urgent || now.since(asked) >= after.min(policy.answer_within()) {
        Reason::AnswerLate
    } else {
        return None;
    };
    let may = match by_hand {
        ByHand::No => false,
        // Who was let go may live without it: a smaller limit that comes after it kills.
        ByHand::NotYet => {
            let since = held_since.map(|since| since.max(asked));
            let is_late = |since| now.since(since) >= policy.answer_within_at_last();
            is_held_for(policy.very_last_moment()) || since.is_some_and(is_late)
        }
        ByHand::Yes => true,
    };
    may.then_some((Action::RaiseByHand { from: *limit, to }, reason))
}

fn release(snapshot: &Snapshot) -> Option<(Action, Reason)> {
    let Snapshot {
        policy,
        history,
        held_since,
        ..
    } = snapshot;
    let limit = effective(snapshot);
    let is_cleared = thresholds(policy, limit)
        .is_none_or(|at| history.demand < at.held_from(policy.usable(limit)));
    (held_since.is_some() && is_cleared).then_some((Action::Release, Reason::RaiseArrived))
}

/// The limit that counts: a lower one on its way may be in force at any moment.
fn effective(snapshot: &Snapshot) -> Bytes {
    snapshot
        .lowering
        .map_or(snapshot.limit, |lower| lower.min(snapshot.limit))
}

fn shrink(snapshot: &Snapshot) -> Option<(Action, Reason)> {
    let Snapshot {
        policy,
        history,
        limit,
        requested,
        held_since,
        now,
        refused_shrink,
        thrash,
        quiet,
        others_wait,
        slab,
        slab_kept,
        ..
    } = snapshot;
    let is_quiet = if *others_wait {
        let since = history.last_growth.max(history.last_large);
        now.since(history.last_growth) >= policy.shrink_after
            || now.since(since) >= SHRINK_FOR_OTHERS.max(*quiet)
    } else {
        now.since(history.last_growth) >= policy.shrink_after.max(*quiet)
    };
    let is_busy = requested.is_some() || held_since.is_some() || thrash.keeps(*now);
    if *limit <= policy.original || !is_quiet || is_busy {
        return None;
    }
    let refused =
        refused_shrink.is_some_and(|(demand, until)| history.demand >= demand && *now < until);
    if refused {
        return None;
    }
    let needed = match slab_kept {
        Some(at) if now.since(*at) < SLAB_IN_USE_FOR => history.demand,
        _ => history.demand.minus(*slab),
    };
    let to = policy
        .limit_for(needed.per_mille(SHRINK_MARGIN_PER_MILLE))
        .round_up_mib()
        .max(policy.original);
    // The original is always worth it: what is near to it would otherwise stay raised for ever.
    let worth = to == policy.original || to <= limit.per_mille(SHRINK_WORTH_PER_MILLE);
    (worth && to < *limit).then_some((Action::Shrink { from: *limit, to }, Reason::BurstOver))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(actuation: Actuation) -> Snapshot {
        Snapshot {
            now: Nanos::millis(10_000),
            policy: Policy {
                actuation,
                ..Policy::direct(Bytes::mib(64), Bytes::mib(4096))
            },
            history: History {
                last_growth: Nanos::millis(9_999),
                ..History::default()
            },
            thrash: Thrash::default(),
            limit: Bytes::mib(64),
            requested: None,
            lowering: None,
            held_since: None,
            is_let_go: false,
            refused_shrink: None,
            raise_not_before: Nanos(0),
            request_failed: false,
            by_hand: ByHand::No,
            quiet: Nanos(0),
            others_wait: false,
            slab: Bytes::ZERO,
            slab_kept: None,
        }
    }

    /// Who has walked many files has the kernel remember their names.
    #[test]
    fn what_the_kernel_can_give_back_keeps_no_limit_up() {
        let mut walked = snapshot(REQUESTED);
        walked.limit = Bytes::mib(1024);
        walked.history.demand = Bytes::mib(400);
        walked.history.last_growth = Nanos(0);
        let to = |snapshot: &Snapshot| match decide(snapshot).actions[..] {
            [(Action::Shrink { to, .. }, _)] => Some(to),
            _ => None,
        };
        assert_eq!(to(&walked), Some(Bytes::mib(500)));
        walked.slab = Bytes::mib(300);
        assert_eq!(to(&walked), Some(Bytes::mib(125)));
        // A refusal of another kind says nothing of them.
        walked.refused_shrink = Some((Bytes::mib(400), walked.now));
        assert_eq!(to(&walked), Some(Bytes::mib(125)));
        walked.slab_kept = Some(Nanos(0));
        assert_eq!(to(&walked), Some(Bytes::mib(500)));
        // They may have come out of use.
        walked.now = SLAB_IN_USE_FOR;
        assert_eq!(to(&walked), Some(Bytes::mib(125)));
        // They may be in use: what grows beside them is raised all the same.
        walked.limit = Bytes::mib(400);
        let is_raise = |(action, _): &(Action, Reason)| matches!(action, Action::Raise { .. });
        assert!(decide(&walked).actions.iter().any(is_raise));
    }

    #[test]
    fn what_the_last_burst_needed_is_granted_in_one_step() {
        let mut again = snapshot(REQUESTED);
        again.history.demand = Bytes::mib(63);
        again.policy.learnt = Some(Bytes::mib(900));
        let to = |snapshot: &Snapshot| match decide(snapshot).actions[..] {
            [(Action::Raise { to, .. }, _)] => Some(to),
            _ => None,
        };
        assert_eq!(to(&again), Some(Bytes::mib(900)));
        again.policy.ceiling = Bytes::mib(500);
        assert_eq!(to(&again), Some(Bytes::mib(500)));
        // What it needs now is more, or nearly: it is a burst like none before.
        again.policy.ceiling = Bytes::mib(4096);
        (again.limit, again.history.demand) = (Bytes::mib(900), Bytes::mib(890));
        assert!(to(&again) > Some(Bytes::mib(2700)));
        // Who is held gets more than it has.
        again.held_since = Some(again.now);
        again.history.demand = Bytes::mib(800);
        assert!(
            to(&again).is_none_or(|to| to > again.limit),
            "{:?}",
            decide(&again)
        );
    }

    #[test]
    fn a_late_raise_is_written_by_hand_where_that_may_be() {
        let mut late = snapshot(REQUESTED);
        late.policy.by_hand_after = Some(Nanos::millis(2000));
        late.by_hand = ByHand::Yes;
        late.history.demand = Bytes::mib(63);
        let (from, to) = (late.limit, Bytes::mib(200));
        late.requested = Some((to, late.now));
        let by_hand = |reason| vec![(Action::RaiseByHand { from, to }, reason)];
        let after = |late: &Snapshot, ms| {
            let now = Nanos(late.now.0 + Nanos::millis(ms).0);
            decide(&Snapshot { now, ..*late }).actions
        };
        assert_eq!(after(&late, 1999), []);
        assert_eq!(after(&late, 2000), by_hand(Reason::AnswerLate));
        late.request_failed = true;
        assert_eq!(after(&late, 0), by_hand(Reason::RequestFailed));
        // Another limit is on its way: it is waited for until patience ends.
        late.by_hand = ByHand::NotYet;
        late.held_since = Some(late.now);
        assert_eq!(after(&late, 8900), []);
        assert_eq!(after(&late, 9000), by_hand(Reason::RequestFailed));
        late.by_hand = ByHand::No;
        assert_eq!(after(&late, 60_000), []);
        late.by_hand = ByHand::Yes;
        // There was no room until its patience was nearly over: it is asked for now, and there is no time for an answer.
        late.request_failed = false;
        let asked = |ms| {
            let asked = Nanos(late.now.0 + Nanos::millis(ms).0);
            let requested = Some((to, asked));
            after(&Snapshot { requested, ..late }, ms)
        };
        assert_eq!(asked(7499), []);
        assert_eq!(asked(7500), by_hand(Reason::AnswerLate));
        // Who may be held for longer has waited for room, and waits for an answer as long as everybody.
        let mut patient = late;
        patient.policy.patience.longest = Nanos::millis(120_000);
        let asked = Nanos(late.now.0 + Nanos::millis(60_000).0);
        patient.requested = Some((to, asked));
        assert_eq!(after(&patient, 61_999), []);
        assert_eq!(after(&patient, 62_000), by_hand(Reason::AnswerLate));
        patient.by_hand = ByHand::NotYet;
        assert_eq!(after(&patient, 68_999), []);
        assert_eq!(after(&patient, 69_000), by_hand(Reason::AnswerLate));
        let let_go = Snapshot {
            held_since: None,
            is_let_go: true,
            ..late
        };
        assert_eq!(after(&let_go, 0), by_hand(Reason::AnswerLate));
        let by_hand = ByHand::NotYet;
        assert_eq!(after(&Snapshot { by_hand, ..let_go }, 0), []);
        late.policy.by_hand_after = None;
        assert_eq!(after(&late, 60_000), []);
    }

    #[test]
    fn a_lowering_and_what_is_in_force_are_not_written_by_hand() {
        let mut raised = snapshot(REQUESTED);
        raised.policy.by_hand_after = Some(Nanos(0));
        raised.by_hand = ByHand::Yes;
        raised.limit = Bytes::mib(200);
        raised.history.demand = Bytes::mib(10);
        for to in [Bytes::mib(64), Bytes::mib(200)] {
            raised.requested = Some((to, Nanos(0)));
            assert_eq!(decide(&raised).actions, [], "{to}");
        }
        raised.requested = Some((Bytes::mib(300), raised.now));
        let [(Action::RaiseByHand { .. }, Reason::RaisedFirst)] = decide(&raised).actions[..]
        else {
            panic!("{:?}", decide(&raised))
        };
    }

    #[test]
    fn a_container_with_little_patience_is_raised_before_that_ends() {
        let mut late = snapshot(REQUESTED);
        late.policy.by_hand_after = Some(Nanos::millis(2000));
        late.policy.patience.frozen = Nanos::millis(800);
        late.by_hand = ByHand::Yes;
        late.requested = Some((Bytes::mib(200), Nanos(late.now.0 - Nanos::millis(600).0)));
        assert!(matches!(
            decide(&late).actions[..],
            [(Action::RaiseByHand { .. }, Reason::AnswerLate)]
        ));
    }

    const REQUESTED: Actuation = Actuation::Requested {
        p95: Nanos::millis(700),
    };

    #[test]
    fn a_slow_path_requests_once_and_at_least_three_times_the_demand() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(63);
        let plan = decide(&snapshot);
        let [(Action::Raise { from, to }, Reason::WatermarkReached)] = plan.actions[..] else {
            panic!("{plan:?}")
        };
        assert_eq!(from, Bytes::mib(64));
        assert!(to >= Bytes::mib(190) && to <= Bytes::mib(290), "{to}");
        snapshot.requested = Some((to, snapshot.now));
        assert_eq!(decide(&snapshot).actions, []);
    }

    #[test]
    fn where_somebody_else_throttles_raises_come_sooner_and_go_further() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(57);
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.policy.usable_per_mille = 900;
        let [(Action::Raise { to, .. }, Reason::WatermarkReached)] = decide(&snapshot).actions[..]
        else {
            panic!("no raise")
        };
        assert!(snapshot.policy.usable(to) >= Bytes::mib(57 * 3), "{to}");
    }

    #[test]
    fn below_the_watermark_nothing_happens() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(61);
        assert_eq!(decide(&snapshot).actions, []);
    }

    #[test]
    fn who_is_held_gets_its_raise() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(62);
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.held_since = Some(snapshot.now);
        assert!(matches!(
            decide(&snapshot).actions[..],
            [(Action::Raise { .. }, Reason::WatermarkReached)]
        ));
    }

    #[test]
    fn who_is_held_for_a_huge_page_that_did_not_fit_is_neither_let_go_nor_forgotten() {
        let mut held = snapshot(REQUESTED);
        held.held_since = Some(held.now);
        for lower in [None, Some(Bytes::mib(48))] {
            held.requested = lower.map(|lower| (lower, held.now));
            held.lowering = lower;
            let at = Thresholds::under(&held.policy, lower.unwrap_or(held.limit));
            held.history.demand = at.huge_watermark.minus(Bytes::mib(2));
            assert!(
                matches!(decide(&held).actions[..], [(Action::Raise { .. }, _)]),
                "{lower:?}"
            );
            held.history.demand = at.huge_watermark.minus(Bytes::mib(3));
            assert_eq!(
                decide(&held).actions,
                [(Action::Release, Reason::RaiseArrived)],
                "{lower:?}"
            );
        }
    }

    #[test]
    fn never_above_the_ceiling() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.policy.ceiling = Bytes::mib(70);
        snapshot.history.demand = Bytes::mib(64);
        snapshot.history.rate_per_second = Bytes(u64::MAX);
        let plan = decide(&snapshot);
        assert_eq!(
            plan.actions,
            [(
                Action::Raise {
                    from: Bytes::mib(64),
                    to: Bytes::mib(70)
                },
                Reason::WatermarkReached
            )]
        );
        snapshot.limit = Bytes::mib(70);
        assert_eq!(
            decide(&snapshot),
            Plan {
                actions: vec![],
                reaction: Reaction::Nothing
            }
        );
    }

    #[test]
    fn a_hold_ends_with_the_answer() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(63);
        snapshot.held_since = Some(Nanos::millis(9_000));
        snapshot.requested = Some((Bytes::mib(200), Nanos::millis(9_000)));
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.history.demand = Bytes::mib(61);
        assert_eq!(
            decide(&snapshot).actions,
            [],
            "a little below the watermark"
        );
        snapshot.limit = Bytes::mib(200);
        assert_eq!(
            decide(&snapshot).actions,
            [(Action::Release, Reason::RaiseArrived)]
        );
    }

    #[test]
    fn a_burst_whose_processes_have_ended_gives_back_soon_where_others_wait() {
        let mut snapshot = snapshot(Actuation::Direct);
        snapshot.policy.shrink_after = Nanos::millis(5000);
        snapshot.limit = Bytes::mib(1000);
        snapshot.history = History {
            demand: Bytes::mib(10),
            burst_peak: Bytes::mib(700),
            last_growth: Nanos::millis(8_000),
            last_large: Nanos::millis(9_000),
            ..History::default()
        };
        assert_eq!(decide(&snapshot).actions, [], "nobody waits");
        snapshot.others_wait = true;
        let back = Action::Shrink {
            from: Bytes::mib(1000),
            to: Bytes::mib(64),
        };
        assert_eq!(decide(&snapshot).actions, [(back, Reason::BurstOver)]);
        snapshot.history.last_large = Nanos::millis(9_001);
        assert_eq!(decide(&snapshot).actions, [], "it may only draw breath");
        snapshot.history.last_large = Nanos::millis(8_000);
        snapshot.quiet = Nanos::millis(2_001);
        assert_eq!(decide(&snapshot).actions, [], "and has done so for longer");
        snapshot.quiet = Nanos::millis(2_000);
        assert_eq!(decide(&snapshot).actions, [(back, Reason::BurstOver)]);
    }

    #[test]
    fn shrinks_when_quiet_to_a_margin_above_demand_and_not_below_the_original() {
        let mut snapshot = snapshot(Actuation::Direct);
        snapshot.limit = Bytes::mib(1000);
        snapshot.history.demand = Bytes::mib(400);
        assert_eq!(decide(&snapshot).actions, [], "not quiet yet");
        snapshot.history.last_growth = Nanos::millis(8_000);
        let shrink = |to| {
            [(
                Action::Shrink {
                    from: Bytes::mib(1000),
                    to,
                },
                Reason::BurstOver,
            )]
        };
        assert_eq!(decide(&snapshot).actions, shrink(Bytes::mib(500)));
        // It has paused for longer before.
        snapshot.quiet = Nanos::millis(2001);
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.others_wait = true;
        assert_eq!(decide(&snapshot).actions, shrink(Bytes::mib(500)));
        snapshot.others_wait = false;
        snapshot.quiet = Nanos::millis(2000);
        assert_eq!(decide(&snapshot).actions, shrink(Bytes::mib(500)));
        snapshot.history.demand = Bytes::mib(10);
        assert_eq!(decide(&snapshot).actions, shrink(Bytes::mib(64)));
        snapshot.history.demand = Bytes::mib(700);
        assert_eq!(decide(&snapshot).actions, [], "not worth it");
    }

    #[test]
    fn growth_while_shrinking_is_answered_with_more_than_before() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.limit = Bytes::mib(640);
        snapshot.requested = Some((Bytes::mib(64), snapshot.now));
        snapshot.lowering = Some(Bytes::mib(64));
        snapshot.history.demand = Bytes::mib(40);
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.history.demand = Bytes::mib(63);
        let [(Action::Raise { from, to }, Reason::GrewWhileShrinking)] =
            decide(&snapshot).actions[..]
        else {
            panic!("{:?}", decide(&snapshot))
        };
        assert_eq!((from, to), (Bytes::mib(64), Bytes::mib(641)));
        snapshot.held_since = Some(snapshot.now);
        let released = decide(&snapshot)
            .actions
            .iter()
            .any(|(action, _)| *action == Action::Release);
        assert!(!released, "the lower limit may be in force: the hold stays");
        snapshot.requested = Some((Bytes::mib(641), snapshot.now));
        assert_eq!(decide(&snapshot).actions, [], "it may still come first");
    }

    #[test]
    fn growth_while_shrinking_from_the_ceiling_can_be_told_apart_too() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.limit = snapshot.policy.ceiling;
        snapshot.requested = Some((Bytes::mib(64), snapshot.now));
        snapshot.lowering = Some(Bytes::mib(64));
        snapshot.history.demand = Bytes::mib(63);
        let raise = Action::Raise {
            from: Bytes::mib(64),
            to: Bytes::mib(4095),
        };
        assert_eq!(
            decide(&snapshot).actions,
            [(raise, Reason::GrewWhileShrinking)]
        );
    }

    #[test]
    fn a_limit_just_above_the_original_comes_down_too() {
        let mut snapshot = snapshot(Actuation::Direct);
        snapshot.limit = Bytes::mib(70);
        snapshot.history.last_growth = Nanos(0);
        snapshot.history.demand = Bytes::mib(30);
        let shrink = Action::Shrink {
            from: Bytes::mib(70),
            to: Bytes::mib(64),
        };
        assert_eq!(decide(&snapshot).actions, [(shrink, Reason::BurstOver)]);
    }

    #[test]
    fn a_refused_raise_waits_its_time() {
        let mut snapshot = snapshot(REQUESTED);
        snapshot.history.demand = Bytes::mib(63);
        snapshot.raise_not_before = Nanos(snapshot.now.0 + 1);
        assert_eq!(decide(&snapshot).actions, []);
    }

    #[test]
    fn a_refused_shrink_waits_for_less_demand() {
        let mut snapshot = snapshot(Actuation::Direct);
        snapshot.limit = Bytes::mib(1000);
        snapshot.history.last_growth = Nanos(0);
        snapshot.history.demand = Bytes::mib(400);
        let until = Nanos(snapshot.now.0 + SHRINK_REFUSED_FOR.0);
        snapshot.refused_shrink = Some((Bytes::mib(400), until));
        assert_eq!(decide(&snapshot).actions, []);
        snapshot.history.demand = Bytes::mib(399);
        assert_eq!(decide(&snapshot).actions.len(), 1);
        snapshot.history.demand = Bytes::mib(400);
        snapshot.now = until;
        assert_eq!(decide(&snapshot).actions.len(), 1);
    }
}
