//! A burst, a plateau, a leak: told apart by what they give back and by who grows.
//!
//! At one instant they look alike: more is used than before. What a burst has that a leak has not is an end. So a *spell* of
//! growth is followed from the first raise on, and judged at each further one, when it asks for more:
//! - It is as young as what it last gave back: a quarter of all that it has grown by since it was at rest (compilers end, a
//!   heap is trimmed). Of the *growth*: what a server allocates and frees with each request is little of what it has
//!   leaked, sooner or later. At rest it is over, and so it is when nothing has come for five minutes: how long it has kept
//!   what it has says nothing of what comes next.
//! - It has a *trigger* while at least half of what has come since the last raise is in processes that began with it (30 s
//!   before its first raise at most) and within the last quarter of an hour. That is a [`Nature::Burst`]: somebody has
//!   started something, and a link may take ten minutes and give nothing back in between. Since the last raise: a build
//!   beside a language server that has grown for days is a build.
//! - Without, what grows has been there before. For a minute that is a burst, too: a server has work to do. After that it is
//!   a [`Nature::Suspect`], and after a quarter of an hour a [`Nature::Leak`]. Where processes are not to be seen it is a burst
//!   for a quarter of an hour, and a suspect from then on: a leak is said of nobody whose processes nobody has looked at.
//!
//! A *plateau* does not ask, so it is not judged: it keeps what it has, and comes down to what it uses.
//!
//! What follows for each. A burst is served as ever. A suspect is served from what nobody else is known to need
//! ([`crate::arbiter`]), in small steps, and is not counted on to end: it loses its turn, not its life, as long as there is memory
//! that no burst wants. A leak is not raised any more, and meets its limit as it would have without Bellows: to feed it
//! is to put off its end and to take the node with it.
//!
//! **Where that errs.**
//! - A daemon that builds (Gradle, a watcher) and grows for more than a minute without giving back has no trigger: it waits
//!   behind others where memory is short. If it goes on for a quarter of an hour in one ascent, it is stopped. No build of ten
//!   minutes is, whatever it consists of.
//! - A link, or a notebook's computation, of more than a quarter of an hour in one process becomes a suspect and a leak at
//!   once. What was learnt of runs before does not excuse it.
//! - A leak that comes in steps, with five minutes and more between them, is a row of bursts, up to its maximum: so is a
//!   service that steps up for good a few times a day, which it cannot be told from.
//! - A leak in a heap that breathes (a collector's generations) is taken for a row of bursts until all its growth is four times
//!   the breath.
//! - A small leak beside small processes that come and go (a shell, a probe) is theirs until its steps are twice as large.
//! - A leak in a process that began with the spell is a burst for its first quarter of an hour.
//! - A leak that takes all that is left within its first minute is a burst until then, and what it was granted it keeps: a
//!   burst's steps are three times what it uses, and the last before that minute is over may be all there is.
//! - Where processes are not to be seen a leak has its first quarter of an hour, and what nobody else is known to need from
//!   then on, up to its maximum. A build of many jobs that never gives a quarter back, for so long, waits behind others.
//!
//! It must not judge what does not ask for more.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// Growth of what was there before is that of a burst for so long.
pub const UNTRIGGERED: Nanos = Nanos::millis(60_000);
/// Who has begun within this time has been started for something. More than the longest build that must not be mistaken.
pub const TRIGGERED: Nanos = Nanos::millis(900_000);
/// Who has begun so long before its limit was reached has begun with the spell.
const LEAD: Nanos = Nanos::millis(30_000);
/// A spell is over when nothing has come for so long.
const RESTED: Nanos = Nanos::millis(300_000);
/// What is no more than so much of what there was has not come: a heap that is used is never quite still.
const STILL_PER_MILLE: u64 = 1003;
/// A spell is over when so much of its growth was given back.
const GIVEN_BACK_PER_MILLE: u64 = 250;
/// So much of its growth must be in young processes.
const YOUNG_PER_MILLE: u64 = 500;

/// What is to be thought of one that grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum Nature {
    /// It will end.
    Burst,
    /// It may not.
    Suspect,
    /// It will not.
    Leak,
}

/// Growth since the first raise, or since something was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spell {
    /// When it began. Who gives back begins anew in all but this: what was started for it is still at work.
    began: Nanos,
    since: Nanos,
    /// For how long it was held since it began.
    held: Nanos,
    /// When something has come, and what there was then.
    came: (Nanos, Bytes),
    /// The lowest demand since it began.
    base: Bytes,
    /// The highest since it last gave back.
    highest: Bytes,
    /// Demand at the last raise.
    raised_at: Bytes,
}

impl Spell {
    /// One that begins.
    #[must_use]
    pub const fn begin(now: Nanos, demand: Bytes) -> Self {
        Self {
            began: now,
            since: now,
            held: Nanos(0),
            came: (now, demand),
            base: demand,
            highest: demand,
            raised_at: demand,
        }
    }

    /// A raise was granted.
    pub const fn raised(&mut self, demand: Bytes) {
        self.raised_at = demand;
    }

    /// Takes in an observation of demand.
    pub fn observe(&mut self, now: Nanos, demand: Bytes) {
        let (came_at, came) = self.came;
        if demand > came.per_mille(STILL_PER_MILLE) {
            if now.since(came_at) >= RESTED {
                *self = Self::begin(now, demand);
                return;
            }
            self.came = (now, demand);
        }
        self.highest = self.highest.max(demand);
        let grown = self.highest.minus(self.base);
        let fallen = self.highest.minus(demand);
        let is_much = fallen >= grown.per_mille(GIVEN_BACK_PER_MILLE);
        if fallen > Bytes::ZERO && is_much {
            self.since = now;
            self.came = (now, demand);
            self.highest = demand;
            self.base = self.base.min(demand);
            self.raised_at = self.raised_at.min(demand);
        }
    }

    /// Time in which it could not grow, held, is none of its own.
    pub const fn held_for(&mut self, held: Nanos) {
        self.since = Nanos(self.since.0.saturating_add(held.0));
        self.held = Nanos(self.held.0.saturating_add(held.0));
        let (came_at, came) = self.came;
        self.came = (Nanos(came_at.0.saturating_add(held.0)), came);
    }

    /// For how long it has lasted.
    #[must_use]
    pub fn age(&self, now: Nanos) -> Nanos {
        now.since(self.since)
    }

    /// What has come since the last raise.
    #[must_use]
    pub fn grown(&self) -> Bytes {
        self.highest.minus(self.raised_at)
    }

    /// Whoever began at this time or later is young.
    #[must_use]
    pub const fn young_from(&self, now: Nanos) -> Nanos {
        let with_it = self.began.0.saturating_sub(LEAD.0);
        let lately = now
            .0
            .saturating_sub(TRIGGERED.0)
            .saturating_sub(self.held.0);
        if with_it > lately {
            Nanos(with_it)
        } else {
            Nanos(lately)
        }
    }

    /// What it is, where so much is in young processes; `None` where those are not to be seen.
    #[must_use]
    pub fn nature(&self, now: Nanos, young: Option<Bytes>) -> Nature {
        let age = self.age(now);
        let has_trigger =
            young.is_some_and(|young| young >= self.grown().per_mille(YOUNG_PER_MILLE));
        let is_short = age < UNTRIGGERED || (young.is_none() && age < TRIGGERED);
        if has_trigger || is_short {
            Nature::Burst
        } else if age < TRIGGERED || young.is_none() {
            Nature::Suspect
        } else {
            Nature::Leak
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = Nanos::millis(1000);
    const NOBODY: Option<Bytes> = Some(Bytes::ZERO);

    fn at(seconds: u64) -> Nanos {
        Nanos(SECOND.0 * (1_000_000 + seconds))
    }

    /// A spell that has grown by so much a second, for so long.
    fn grown(mib_a_second: u64, seconds: u64) -> Spell {
        let mut spell = Spell::begin(at(0), Bytes::mib(60));
        for second in 0..=seconds {
            spell.observe(at(second), Bytes::mib(60 + second * mib_a_second));
        }
        spell
    }

    #[test]
    fn who_was_held_is_no_older_for_it() {
        let mut spell = grown(100, 30);
        spell.held_for(Nanos(SECOND.0 * 600));
        assert_eq!(spell.nature(at(659), NOBODY), Nature::Burst);
        assert_eq!(spell.nature(at(660), NOBODY), Nature::Suspect);
        // What has begun with it is as young as it is.
        assert_eq!(spell.young_from(at(1460)), Nanos(at(0).0 - LEAD.0));
        assert!(spell.young_from(at(1501)) > at(0));
        // Nor is what it had grown to before forgotten: nothing could come meanwhile.
        spell.observe(at(630), Bytes::mib(3200));
        assert_eq!(spell.nature(at(660), NOBODY), Nature::Suspect);
    }

    #[test]
    fn what_grows_for_ever_without_a_trigger_is_a_suspect_and_then_a_leak() {
        for rate in [1, 8, 500] {
            for (seconds, nature) in [
                (1, Nature::Burst),
                (59, Nature::Burst),
                (60, Nature::Suspect),
                (899, Nature::Suspect),
                (900, Nature::Leak),
                (90_000, Nature::Leak),
            ] {
                let spell = grown(rate, seconds);
                assert_eq!(
                    spell.nature(at(seconds), NOBODY),
                    nature,
                    "{rate} {seconds}"
                );
            }
        }
    }

    #[test]
    fn no_build_of_ten_minutes_is_taken_for_a_leak() {
        for seconds in 0..=600 {
            let spell = grown(3, seconds);
            let now = at(seconds);
            // A link: one process that began with it, or a little before, and has all.
            assert!(spell.young_from(now) <= Nanos(at(0).0 - SECOND.0 * 29));
            assert_eq!(spell.nature(now, Some(spell.grown())), Nature::Burst);
            // Half of it is a language server's.
            let half = spell.grown().per_mille(500);
            assert_eq!(spell.nature(now, Some(half)), Nature::Burst);
            // Processes that cannot be seen.
            assert_eq!(spell.nature(now, None), Nature::Burst);
            // A daemon that builds.
            assert_ne!(spell.nature(now, NOBODY), Nature::Leak);
        }
    }

    #[test]
    fn a_build_of_hours_has_young_processes_at_any_time() {
        let now = at(20_000);
        let spell = grown(1, 20_000);
        assert_eq!(spell.young_from(now), Nanos(now.0 - TRIGGERED.0));
        assert_eq!(spell.nature(now, Some(spell.grown())), Nature::Burst);
        // And one process that has run for hours has not.
        assert_eq!(spell.nature(now, NOBODY), Nature::Leak);
    }

    #[test]
    fn who_gives_back_begins_anew() {
        let mut spell = grown(8, 1000);
        // As it breathes: less than a quarter of what it has grown by.
        spell.observe(at(1001), Bytes::mib(60 + 8000 - 1999));
        assert_eq!(spell.nature(at(1001), NOBODY), Nature::Leak);
        spell.observe(at(1002), Bytes::mib(60 + 8000 - 2000));
        assert_eq!(spell.nature(at(1002), NOBODY), Nature::Burst);
        assert_eq!(spell.age(at(1003)), SECOND);
    }

    #[test]
    fn a_leak_that_breathes_is_seen_when_it_is_four_times_the_breath() {
        // Every ten seconds it allocates 100 MiB, and frees 96 of them.
        let mut spell = Spell::begin(at(0), Bytes::mib(60));
        let mut leaked = None;
        for round in 0..1000 {
            let now = at(round * 10);
            spell.observe(now, Bytes::mib(60 + round * 4 + 100));
            spell.observe(now, Bytes::mib(60 + round * 4 + 4));
            if leaked.is_none() && spell.nature(now, NOBODY) == Nature::Leak {
                leaked = Some(round * 4);
            }
        }
        // So much has come in the quarter of an hour that it takes then.
        let meanwhile = 90 * 4;
        let leaked = leaked.unwrap() - meanwhile;
        assert!((3 * 96 - 8..4 * 96).contains(&leaked), "{leaked}");
    }

    #[test]
    fn what_comes_after_a_rest_is_another_matter() {
        let mut spell = grown(8, 100);
        // For an hour it uses what it has, and a little less or more.
        for second in 100..3700 {
            spell.observe(at(second), Bytes::mib(855 + second % 12));
        }
        assert_eq!(spell.nature(at(3700), NOBODY), Nature::Leak);
        spell.observe(at(3700), Bytes::mib(900));
        for (after, nature) in [
            (0, Nature::Burst),
            (59, Nature::Burst),
            (60, Nature::Suspect),
        ] {
            spell.observe(at(3700 + after), Bytes::mib(901 + after));
            assert_eq!(spell.nature(at(3700 + after), NOBODY), nature, "{after}");
        }
        // What comes every four minutes has not rested.
        let mut spell = Spell::begin(at(0), Bytes::mib(60));
        for step in 0..5 {
            spell.observe(at(step * 240), Bytes::mib(60 + 60 * step));
        }
        assert_eq!(spell.nature(at(960), NOBODY), Nature::Leak);
    }

    #[test]
    fn who_was_started_with_it_is_young_though_others_gave_back() {
        let mut spell = grown(8, 100);
        spell.observe(at(100), Bytes::mib(400));
        assert_eq!(spell.age(at(165)), Nanos(SECOND.0 * 65));
        assert!(spell.young_from(at(165)) <= at(0));
    }

    #[test]
    fn a_build_beside_what_has_grown_for_days_is_a_build() {
        let days = 90_000;
        let mut spell = grown(1, days);
        spell.raised(Bytes::mib(60 + days - 100));
        spell.observe(at(days), Bytes::mib(60 + days + 400));
        let young = Some(Bytes::mib(300));
        assert_eq!(spell.nature(at(days), young), Nature::Burst);
        assert_eq!(spell.nature(at(days), Some(Bytes::mib(200))), Nature::Leak);
    }

    #[test]
    fn without_processes_to_be_seen_it_takes_longer() {
        for (seconds, nature) in [
            (899, Nature::Burst),
            (900, Nature::Suspect),
            (90_000, Nature::Suspect),
        ] {
            assert_eq!(grown(1, seconds).nature(at(seconds), None), nature);
        }
    }
}
