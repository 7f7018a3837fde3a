//! What would have been done for a container that is only watched: the proof before anybody trusts us to act.
//!
//! Its watermark is the one that it would have in mode Act, and nothing else is: no brake, no hold, no raise. So its
//! growth is that of a container without Bellows, and when it is killed, what is known is how long before that the
//! watermark was reached, how fast it grew, and what a raise takes on this node. It would have stood still at the
//! watermark for as long as its probes allow: whether it would have lived is a comparison of these times.
//!
//! It must not promise more than it knows. Demand at a kill is the limit, whatever the container would have come to
//! need: what is said to live would have lived through *this* kill, with the limit that is named.

use serde::{Deserialize, Serialize};

use crate::{
    decide::request_target,
    history::History,
    policy::{Actuation, Policy},
    reflex::thresholds,
    thresholds::Thresholds,
    units::{Bytes, Nanos},
};

/// Processes that are killed within so long of each other are one kill.
const ONE_KILL: Nanos = Nanos::millis(1000);
/// Whoever is killed sooner after its watermark may have been so before it could be held: from the kernel's crossing to
/// the written file it takes 0.1 ms and more (bench `reaction`).
const LEAST_LEAD: Nanos = Nanos(200_000);

/// A container that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    policy: Policy,
    limit: Bytes,
    history: History,
    /// Since when it is above its watermark.
    above: Option<Nanos>,
    /// When it was last killed, the first of its processes.
    killed: Option<Nanos>,
}

/// A raise that would have been asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WouldRaise {
    /// Demand at that time.
    pub demand: Bytes,
    /// The limit that it has.
    pub from: Bytes,
    /// The limit that it would have got.
    pub to: Bytes,
}

/// A kill, and what would have become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill {
    /// The limit that it was killed at.
    pub limit: Bytes,
    /// From the watermark to the kill; `None` if the watermark was not seen.
    pub lead: Option<Nanos>,
    /// How fast it grew when it reached the watermark, a second.
    pub rate: Bytes,
    /// What a raise takes on this node (95th percentile).
    pub answer: Nanos,
    /// Whether that was measured here, and not assumed.
    pub is_measured: bool,
    /// The limit that it would have got.
    pub to: Bytes,
    /// Whether that is all that its policy allows.
    pub is_all: bool,
    /// Whether it would have lived.
    pub would: Would,
}

/// What would have become of a container in mode Act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Would {
    /// Held at its watermark, and raised in time.
    Live,
    /// Killed: its policy allows no more than it has.
    AtCeiling,
    /// Killed: its probes do not let it stand still for as long as a raise takes.
    Impatient,
    /// Perhaps killed: it was at its limit sooner than anybody reacts.
    TooFast,
    /// Nobody knows: it was killed without having been seen at its watermark.
    Unseen,
}

impl Observed {
    /// One that was not seen to grow yet.
    #[must_use]
    pub fn new(policy: Policy, limit: Bytes) -> Self {
        Self {
            policy,
            limit,
            history: History::default(),
            above: None,
            killed: None,
        }
    }

    /// What it would be watched at.
    #[must_use]
    pub fn thresholds(&self) -> Option<Thresholds> {
        thresholds(&self.policy, self.limit)
    }

    /// The limit that it is known to have.
    #[must_use]
    pub const fn limit(&self) -> Bytes {
        self.limit
    }

    /// It is above its watermark. Returns what would be asked for, once a burst.
    pub fn grew(
        &mut self,
        at: Nanos,
        demand: Bytes,
        grown: Bytes,
        within: Nanos,
    ) -> Option<WouldRaise> {
        self.history.observe(at, demand);
        if self.above.is_some() {
            return None;
        }
        self.above = Some(at);
        self.history.observe_rate(grown, within);
        let (answer, _) = self.answer(None);
        let (from, to) = (self.limit, self.target(answer));
        (to > from).then_some(WouldRaise { demand, from, to })
    }

    /// Its brake is somebody else's: mode Act would leave that alone, and only the freezer would be there.
    pub const fn without_brake(&mut self) {
        self.policy.patience.braked = Nanos(0);
    }

    /// It is below its watermark again.
    pub const fn fell(&mut self) {
        self.above = None;
    }

    /// Somebody in it was killed; `measured` is what raises take on this node, if any was made. Returns what is to be
    /// told.
    pub fn is_killed(&mut self, at: Nanos, measured: Option<Nanos>) -> Option<Kill> {
        if self
            .killed
            .is_some_and(|before| at.since(before) < ONE_KILL)
        {
            return None;
        }
        self.killed = Some(at);
        let lead = self.above.map(|reached| at.since(reached));
        let (answer, is_measured) = self.answer(measured);
        let to = self.target(answer);
        let patience = self.policy.patience;
        let allowed = if patience.may_freeze() {
            patience.frozen
        } else {
            patience.braked
        };
        let would = match lead {
            _ if to <= self.limit => Would::AtCeiling,
            None => Would::Unseen,
            Some(_) if patience.left(allowed, Nanos(0)) < answer => Would::Impatient,
            Some(lead) if lead < LEAST_LEAD => Would::TooFast,
            Some(_) => Would::Live,
        };
        Some(Kill {
            limit: self.limit,
            lead,
            rate: self.history.rate_per_second,
            answer,
            is_measured,
            to,
            is_all: to >= self.policy.ceiling,
            would,
        })
    }

    /// What a raise takes, and whether that was measured.
    fn answer(&self, measured: Option<Nanos>) -> (Nanos, bool) {
        let assumed = match self.policy.actuation {
            Actuation::Direct => Nanos(0),
            Actuation::Requested { p95 } => p95,
        };
        (measured.unwrap_or(assumed), measured.is_some())
    }

    /// The limit that it would get. Where its demand was not seen, it is taken for that at the watermark at least.
    fn target(&self, answer: Nanos) -> Bytes {
        let mut history = self.history;
        let least = self.thresholds().map_or(self.limit, |at| at.watermark);
        history.demand = history.demand.max(least).min(self.limit);
        request_target(&self.policy, &history, answer).max(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::Patience;

    const LIMIT: Bytes = Bytes::mib(256);
    const ANSWER: Nanos = Nanos::millis(600);
    const PATIENT: Nanos = Nanos(u64::MAX);

    fn observed(ceiling: u64, frozen: Nanos, braked: Nanos) -> Observed {
        let policy = Policy {
            actuation: Actuation::Requested { p95: ANSWER },
            patience: Patience {
                frozen,
                braked,
                ..Patience::UNPROBED
            },
            ..Policy::direct(LIMIT, Bytes::mib(ceiling))
        };
        Observed::new(policy, LIMIT)
    }

    fn grow(observed: &mut Observed, at: Nanos) -> Option<WouldRaise> {
        observed.grew(at, Bytes::mib(250), Bytes::mib(10), Nanos::millis(5))
    }

    /// Killed 9 ms after its watermark.
    fn killed(mut observed: Observed) -> Kill {
        grow(&mut observed, Nanos::millis(10_000));
        observed.is_killed(Nanos::millis(10_009), None).unwrap()
    }

    #[test]
    fn a_kill_is_told_with_its_numbers() {
        let kill = killed(observed(4096, PATIENT, PATIENT));
        assert_eq!(kill.lead, Some(Nanos::millis(9)));
        assert_eq!((kill.would, kill.is_all), (Would::Live, false));
        assert_eq!((kill.answer, kill.is_measured), (ANSWER, false));
        assert_eq!(kill.rate, Bytes::mib(2000));
        assert!(kill.to >= Bytes::mib(3 * 250), "{}", kill.to);
        let mut measured = observed(4096, PATIENT, PATIENT);
        let kill = measured.is_killed(Nanos(1), Some(Nanos::millis(300)));
        let kill = kill.unwrap();
        assert_eq!((kill.answer, kill.is_measured), (Nanos::millis(300), true));
    }

    #[test]
    fn nobody_is_promised_what_would_not_come() {
        let would = |ceiling, frozen, braked| killed(observed(ceiling, frozen, braked)).would;
        assert_eq!(would(256, PATIENT, PATIENT), Would::AtCeiling);
        let impatient = Nanos::millis(500);
        assert_eq!(would(4096, impatient, PATIENT), Would::Impatient);
        // One that may not be frozen is braked.
        assert_eq!(would(4096, Nanos(0), PATIENT), Would::Live);
        assert_eq!(would(4096, Nanos(0), impatient), Would::Impatient);
        let mut unseen = observed(4096, PATIENT, PATIENT);
        let kill = unseen.is_killed(Nanos(1), None).unwrap();
        assert_eq!(kill.would, Would::Unseen);
        // No hold lasts for so long, whatever probes allow.
        let mut slow = observed(4096, PATIENT, PATIENT);
        grow(&mut slow, Nanos(0));
        let answer = Some(Nanos::millis(11_000));
        let kill = slow.is_killed(Nanos::millis(5), answer).unwrap();
        assert_eq!(kill.would, Would::Impatient);
    }

    #[test]
    fn whoever_is_killed_at_once_may_not_have_been_held() {
        let mut fast = observed(4096, PATIENT, PATIENT);
        grow(&mut fast, Nanos::millis(10_000));
        let kill = fast.is_killed(Nanos(10_000_100_000), None).unwrap();
        assert_eq!(kill.would, Would::TooFast);
    }

    #[test]
    fn a_burst_is_one_raise_and_a_kill_of_several_processes_is_one() {
        let mut observed = observed(4096, PATIENT, PATIENT);
        let at = |millis: u64| Nanos::millis(10_000 + millis);
        assert!(grow(&mut observed, at(0)).is_some());
        assert!(grow(&mut observed, at(300)).is_none());
        let kills = [400, 450, 1390, 1400, 5000, 5999, 6000];
        let told = kills.map(|millis| observed.is_killed(at(millis), None).is_some());
        assert_eq!(told, [true, false, false, true, true, false, true]);
        observed.fell();
        assert!(grow(&mut observed, at(60_000)).is_some());
    }

    #[test]
    fn no_raise_goes_beyond_the_ceiling() {
        let kill = killed(observed(300, PATIENT, PATIENT));
        assert_eq!((kill.to, kill.is_all), (Bytes::mib(300), true));
        let mut full = observed(256, PATIENT, PATIENT);
        assert_eq!(grow(&mut full, Nanos(1)), None);
    }
}
