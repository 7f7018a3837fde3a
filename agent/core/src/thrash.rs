//! Thrash: a working set of page cache that does not fit its limit, read again and again.
//!
//! Page cache is no demand, since reclaim gives it back for free; it becomes demand when it is read
//! back at once. Nobody is killed for it, so there is time to be sure, and there must be: one file that
//! is read twice refaults every page once, whatever the limit. Thrash is when a quarter of the limit is
//! read back every second, tasks wait for it for a twentieth of the time (a fast disk makes them wait for
//! no more), and every page of the limit has come back ten times (eight times it does for a file of four
//! times the limit that is written and then read twice).
//!
//! Whether a larger limit helps cannot be known beforehand (under a cyclic reader both kernels' LRUs miss
//! every page until the whole file fits), so the raise is a trial: twice the limit, once more if that does
//! not help, and then it is taken back and left alone for a time that doubles. One that helped is kept for
//! a time that doubles, too, whenever the thrash comes back as soon as it was lowered.
//!
//! It must not be asked for a burst: it answers within seconds.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// Looks further apart than this do not belong to one streak.
const LONGEST_GAP: Nanos = Nanos::millis(5000);
/// A streak must last this long.
const SHORTEST_STREAK: Nanos = Nanos::millis(2000);
/// How many times the limit must have been read back before the first raise.
const TIMES_BEFORE: u64 = 10;
/// And after it, to say that it has not helped.
const TIMES_AFTER: u64 = 2;
/// Raises of one trial.
const STEPS: u8 = 2;
/// How long a raise that helped is kept at first, and how long a cgroup is left alone at first.
const FIRST_WAIT: Nanos = Nanos::millis(60_000);
/// What both double up to.
const LONGEST_WAIT: Nanos = Nanos::millis(3_600_000);
/// Thrash that comes back within this time after a lowering was served too briefly.
const SOON: Nanos = Nanos::millis(30_000);

/// What the kernel has counted up to an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// When.
    pub at: Nanos,
    /// File pages read again after they had been reclaimed.
    pub refaulted: Bytes,
    /// Time that tasks have waited for memory; `None` where the kernel does not tell.
    pub stalled: Option<Nanos>,
}

/// What is known of one cgroup's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thrash {
    last: Option<Look>,
    streak: Option<Streak>,
    /// Raises of the running trial, and when the last was made.
    trial: Option<(u8, Nanos)>,
    keep: Nanos,
    lowered: Option<Nanos>,
    alone: Nanos,
    not_before: Nanos,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Streak {
    since: Nanos,
    refaulted: Bytes,
}

impl Default for Thrash {
    fn default() -> Self {
        Self {
            last: None,
            streak: None,
            trial: None,
            keep: FIRST_WAIT,
            lowered: None,
            alone: FIRST_WAIT,
            not_before: Nanos(0),
        }
    }
}

impl Thrash {
    /// Takes in what the kernel has counted, under a limit.
    pub fn look(&mut self, limit: Bytes, look: Look) {
        let Some(before) = self.last.replace(look) else {
            return;
        };
        let elapsed = look.at.since(before.at);
        let refaulted = look.refaulted.minus(before.refaulted);
        if elapsed > LONGEST_GAP || !is_busy(limit, elapsed, refaulted, before, look) {
            self.streak = None;
            return;
        }
        let streak = self.streak.get_or_insert(Streak {
            since: before.at,
            refaulted: Bytes::ZERO,
        });
        streak.refaulted = streak.refaulted.plus(refaulted);
        if let Some((STEPS, _)) = self.trial
            && self.lasts(limit, TIMES_AFTER)
        {
            // Not even four times the limit has helped.
            self.trial = None;
            self.streak = None;
            self.not_before = Nanos(look.at.0.saturating_add(self.alone.0));
            self.alone = doubled(self.alone);
        }
    }

    fn lasts(&self, limit: Bytes, times: u64) -> bool {
        let (Some(streak), Some(last)) = (self.streak, self.last) else {
            return false;
        };
        last.at.since(streak.since) >= SHORTEST_STREAK && streak.refaulted >= limit.scaled(times, 1)
    }

    /// Whether the limit should be raised for it.
    #[must_use]
    pub fn wants(&self, limit: Bytes, now: Nanos) -> bool {
        match self.trial {
            None => now >= self.not_before && self.lasts(limit, TIMES_BEFORE),
            Some((steps, _)) => steps < STEPS && self.lasts(limit, TIMES_AFTER),
        }
    }

    /// Whether a raise that was made for it must stay for now.
    #[must_use]
    pub fn keeps(&self, now: Nanos) -> bool {
        self.trial.is_some_and(|(_, at)| now.since(at) < self.keep)
    }

    /// The limit was raised for it.
    pub fn raised(&mut self, now: Nanos) {
        let steps = self.trial.map_or(0, |(steps, _)| steps);
        if steps == 0 {
            let came_back = self.lowered.is_some_and(|at| now.since(at) < SOON);
            self.keep = if came_back {
                doubled(self.keep)
            } else {
                FIRST_WAIT
            };
        }
        self.trial = Some((steps.saturating_add(1), now));
        self.streak = None;
    }

    /// The limit was lowered.
    pub fn lowered(&mut self, now: Nanos) {
        if self.trial.take().is_some() {
            self.lowered = Some(now);
        }
        self.streak = None;
    }
}

/// Whether a quarter of the limit a second came back while tasks waited for a twentieth of the time.
fn is_busy(limit: Bytes, elapsed: Nanos, refaulted: Bytes, before: Look, look: Look) -> bool {
    let per_second = refaulted.scaled(1_000_000_000, elapsed.0);
    let waited = match (before.stalled, look.stalled) {
        (Some(before), Some(stalled)) => stalled.since(before).0.saturating_mul(20) >= elapsed.0,
        _ => true,
    };
    waited && per_second >= limit.per_mille(250)
}

fn doubled(wait: Nanos) -> Nanos {
    Nanos(wait.0.saturating_mul(2).min(LONGEST_WAIT.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Bytes = Bytes::mib(100);

    struct Reader {
        thrash: Thrash,
        look: Look,
        /// Whether it waits for half of the time.
        waits: bool,
    }

    impl Reader {
        fn new() -> Self {
            Self {
                thrash: Thrash::default(),
                look: Look {
                    at: Nanos::millis(1),
                    refaulted: Bytes::ZERO,
                    stalled: Some(Nanos(0)),
                },
                waits: true,
            }
        }

        /// A second in which so much came back.
        fn second(&mut self, limit: Bytes, refaulted: Bytes) {
            self.look.at.0 += 1_000_000_000;
            self.look.refaulted = self.look.refaulted.plus(refaulted);
            if let Some(stalled) = self.look.stalled.as_mut().filter(|_| self.waits) {
                stalled.0 += 500_000_000;
            }
            self.thrash.look(limit, self.look);
        }

        fn wants(&self, limit: Bytes) -> bool {
            self.thrash.wants(limit, self.look.at)
        }
    }

    #[test]
    fn a_file_of_four_times_the_limit_read_twice_is_no_thrash() {
        let mut reader = Reader::new();
        // The first look only begins; each of the other eight has read the limit back.
        for _ in 0..9 {
            reader.second(LIMIT, LIMIT);
            assert!(!reader.wants(LIMIT));
        }
        reader.second(LIMIT, Bytes::ZERO);
        assert!(!reader.wants(LIMIT));
    }

    #[test]
    fn what_comes_back_ten_times_is() {
        let mut reader = Reader::new();
        for _ in 0..11 {
            reader.second(LIMIT, LIMIT);
        }
        assert!(reader.wants(LIMIT));
    }

    #[test]
    fn what_nobody_waits_for_is_no_thrash() {
        let mut reader = Reader::new();
        reader.waits = false;
        for _ in 0..20 {
            reader.second(LIMIT, LIMIT);
            assert!(!reader.wants(LIMIT));
        }
        reader.look.stalled = None;
        for _ in 0..20 {
            reader.second(LIMIT, LIMIT);
        }
        assert!(reader.wants(LIMIT), "a kernel that does not tell");
    }

    #[test]
    fn a_trial_that_does_not_help_is_taken_back_and_left_alone_for_longer_each_time() {
        let mut reader = Reader::new();
        let mut waits = Vec::new();
        for _ in 0..2 {
            while !reader.wants(LIMIT) {
                reader.second(LIMIT, LIMIT.scaled(3, 1));
            }
            reader.thrash.raised(reader.look.at);
            let doubled = LIMIT.scaled(2, 1);
            while !reader.wants(doubled) {
                reader.second(doubled, LIMIT.scaled(3, 1));
            }
            reader.thrash.raised(reader.look.at);
            while reader.thrash.keeps(reader.look.at) {
                reader.second(LIMIT.scaled(4, 1), LIMIT.scaled(3, 1));
            }
            let given_up = reader.look.at;
            reader.thrash.lowered(given_up);
            waits.push(reader.thrash.not_before.since(given_up));
        }
        assert_eq!(waits, [FIRST_WAIT, doubled(FIRST_WAIT)]);
    }

    #[test]
    fn a_trial_that_helps_is_kept_longer_when_the_thrash_comes_back() {
        let mut reader = Reader::new();
        let mut kept = Vec::new();
        for _ in 0..3 {
            while !reader.wants(LIMIT) {
                reader.second(LIMIT, LIMIT);
            }
            let raised = reader.look.at;
            reader.thrash.raised(raised);
            while reader.thrash.keeps(reader.look.at) {
                reader.look.at.0 += 1_000_000_000;
            }
            kept.push(reader.look.at.since(raised));
            reader.thrash.lowered(reader.look.at);
        }
        assert_eq!(
            kept,
            [
                FIRST_WAIT,
                doubled(FIRST_WAIT),
                doubled(doubled(FIRST_WAIT))
            ]
        );
    }
}
