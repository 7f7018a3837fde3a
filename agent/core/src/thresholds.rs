//! Where the watermark, the brake and the hold of a limit stand.
//!
//! Two loads look alike until the last moment: a burst on its way through the limit, and a
//! program that fills 95 % of it and stays there (a JVM with a full heap). Raising for the second
//! is waste, not raising for the first is a kill. They are told apart by *where* they are: nothing
//! happens below about 97 % of the limit, and what is above must be quick. The per-CPU stock
//! (64 pages a CPU, counted as usage; `MEMCG_CHARGE_BATCH`, mm/memcontrol.c) makes a flat program
//! look up to 256 KiB a CPU larger than it is, so on small limits the watermark moves up by as
//! much, but never so far that a reaction has less than 1.5 % of the limit left.
//!
//! The brake (`memory.high`) stands at the watermark. Below 1.25 % over it the kernel does not sleep at
//! all, and at the limit, 3 % over it, one batch sleeps 60 ms: a safety net for the case that the
//! reaction is late, which costs nothing when it is not.
//!
//! The hold (`cgroup.freeze`) stands half way to the limit for what creeps, and at the watermark for what
//! would be at the limit before the answer ([`crate::reflex::is_rushing`]). It stops growth without consuming what
//! is left, is lifted at once by the answer (a sleeper of `memory.high` is not), and holds no lock.
//!
//! Growth by huge pages is told of earlier where a raise takes time. When the last one has been charged, anything
//! from nothing to 2 MiB is left, and for the next the kernel reclaims first, then takes a small page: with a
//! program that asked for huge pages (`MADV_HUGEPAGE`, which allows reclaim; `vma_thp_gfp_mask`,
//! mm/huge_memory.c, 6.12) all threads are in there when the freezer comes, and each still needs a page and a
//! page table. 8 of 40 such bursts were killed in a hold that had begun in time. So the watermark of a huge page
//! is lower by one for each CPU, and by an eighth of the limit at most; where not even one is an eighth there is
//! none. What rushes to there by huge pages and stops is raised for nothing, again each time that the limit was
//! lowered meanwhile.
//!
//! Without kernel programs nobody tells of the watermark before the brake is crossed, and then up to
//! 10 ms late, in which a thread touches 20 MiB. There the brake is the signal *and* the time: it
//! stands at a tenth of the limit, where eight threads at full speed need 0.6 s to the limit of a
//! 64 MiB container (64 s × r² for each batch), and a program that is flat at 95 % is raised once for
//! nothing.

use serde::{Deserialize, Serialize};

use crate::{
    policy::{Actuation, Policy, Signals},
    units::Bytes,
};

/// Pages that one CPU may hold charged in advance.
const STOCK_PER_CPU: Bytes = Bytes(64 * 4096);
const HUGE_PAGE: Bytes = Bytes::mib(2);

/// Demand from which on the agent is told of a charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// Of small pages.
    pub small: Bytes,
    /// Of a huge page.
    pub huge: Bytes,
}

impl Watermark {
    /// The same for both.
    #[must_use]
    pub const fn alike(at: Bytes) -> Self {
        Self {
            small: at,
            huge: at,
        }
    }
}

/// What a limit is watched and braked at. All are demand, that is usage without page cache, except
/// `high`, which the kernel compares with usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thresholds {
    /// From here on the agent is told.
    pub watermark: Bytes,
    /// The same for charges of huge pages.
    pub huge_watermark: Bytes,
    /// `memory.high`.
    pub high: Bytes,
    /// From here on the container is held until the answer to a request is there.
    pub hold: Bytes,
}

impl Thresholds {
    /// The thresholds of `limit` under a policy: of that part of it that can be used.
    #[must_use]
    pub fn under(policy: &Policy, limit: Bytes) -> Self {
        let usable = policy.usable(limit);
        let at = Self::of(usable, policy.cpus, policy.signals);
        let huge_watermark = match (policy.actuation, policy.signals) {
            // Files do not tell of single charges.
            (Actuation::Direct, _) | (_, Signals::Files) => at.watermark,
            (Actuation::Requested { .. }, Signals::Programs) => {
                let ahead = HUGE_PAGE.scaled(policy.cpus, 1).min(usable.per_mille(125));
                if ahead < HUGE_PAGE {
                    at.watermark
                } else {
                    at.watermark.minus(ahead).page_floor()
                }
            }
        };
        Self {
            huge_watermark,
            ..at
        }
    }

    /// What the kernel programs compare with.
    #[must_use]
    pub const fn watermarks(self) -> Watermark {
        Watermark {
            small: self.watermark,
            huge: self.huge_watermark,
        }
    }

    /// The demand from which on one that is held needs a raise: a look may see less than the event told, by
    /// a huge page that did not fit.
    #[must_use]
    pub fn held_from(self, usable: Bytes) -> Bytes {
        let margin = usable.minus(self.watermark);
        let huge_page = HUGE_PAGE.min(usable.per_mille(125));
        self.huge_watermark.minus(margin.max(huge_page))
    }

    /// The thresholds of `limit` on a machine with `cpus` CPUs.
    #[must_use]
    pub fn of(limit: Bytes, cpus: u64, signals: Signals) -> Self {
        let stock = Bytes(STOCK_PER_CPU.0.saturating_mul(cpus));
        let margin = match signals {
            Signals::Programs => limit
                .per_mille(36)
                .minus(stock)
                .clamp(limit.per_mille(15), limit.per_mille(30)),
            Signals::Files => limit.per_mille(100),
        };
        // The kernel counts pages: a watermark within one would be reached there and not here.
        let watermark = limit.minus(margin).page_floor();
        Self {
            watermark,
            huge_watermark: watermark,
            high: watermark,
            hold: limit.minus(Bytes(margin.0 / 2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Nanos;

    #[test]
    fn a_flat_program_at_96_percent_and_full_stocks_stays_below() {
        for limit in [32, 64, 100, 256, 1024, 65536].map(Bytes::mib) {
            for cpus in [1, 2] {
                let flat = limit.per_mille(960).plus(Bytes(STOCK_PER_CPU.0 * cpus));
                let Thresholds {
                    watermark,
                    high,
                    hold,
                    ..
                } = Thresholds::of(limit, cpus, Signals::Programs);
                assert!(flat.plus(limit.per_mille(3)) <= watermark, "{limit} {cpus}");
                assert!(watermark <= high && high <= hold && hold < limit);
            }
        }
    }

    #[test]
    fn a_slow_raise_is_asked_for_while_huge_pages_still_fit() {
        for (limit, cpus, ahead) in [
            (16, 2, 2),
            (32, 1, 2),
            (32, 2, 4),
            (32, 64, 4),
            (256, 8, 16),
            // There a huge page is more than an eighth.
            (15, 2, 0),
            (4, 64, 0),
        ] {
            let limit = Bytes::mib(limit);
            let mut policy = Policy {
                actuation: Actuation::Requested { p95: Nanos(1) },
                cpus,
                ..Policy::direct(limit, Bytes::mib(4096))
            };
            let at = Thresholds::under(&policy, limit);
            let expected = at.watermark.minus(Bytes::mib(ahead));
            assert_eq!(at.huge_watermark, expected, "{limit} {cpus}");
            policy.signals = Signals::Files;
            let at = Thresholds::under(&policy, limit);
            assert_eq!(at.huge_watermark, at.watermark);
            policy.signals = Signals::Programs;
            policy.actuation = Actuation::Direct;
            let at = Thresholds::under(&policy, limit);
            assert_eq!(at.huge_watermark, at.watermark);
        }
    }

    #[test]
    fn who_is_held_is_not_let_go_for_the_page_that_did_not_fit() {
        for (limit, cpus, usable_per_mille) in [(32, 2, 1000), (256, 8, 1000), (256, 64, 900)] {
            let limit = Bytes::mib(limit);
            let policy = Policy {
                actuation: Actuation::Requested { p95: Nanos(1) },
                cpus,
                usable_per_mille,
                ..Policy::direct(limit, Bytes::mib(4096))
            };
            let usable = policy.usable(limit);
            let at = Thresholds::under(&policy, limit);
            assert!(at.huge_watermark >= usable.per_mille(840));
            let from = at.held_from(usable);
            assert!(from.plus(HUGE_PAGE) <= at.huge_watermark, "{limit} {cpus}");
            assert!(from >= usable.per_mille(760), "{limit} {cpus}: {from}");
        }
    }

    #[test]
    fn who_is_held_in_a_small_limit_can_be_let_go() {
        for limit in [4, 15, 64].map(Bytes::mib) {
            for signals in [Signals::Files, Signals::Programs] {
                let from = Thresholds::of(limit, 2, signals).held_from(limit);
                assert!(from >= limit.per_mille(770), "{limit} {signals:?}: {from}");
            }
        }
    }

    #[test]
    fn the_watermark_is_the_kernels() {
        for limit in [33_333_333, 149_286_912, 653_262_848].map(Bytes) {
            let Thresholds { watermark, .. } = Thresholds::of(limit, 2, Signals::Programs);
            assert_eq!(watermark, Bytes::from_pages(watermark.pages()));
        }
    }

    #[test]
    fn something_is_always_left_to_react_in() {
        for cpus in [1, 2, 64, 1024] {
            let limit = Bytes::mib(32);
            let Thresholds { watermark, .. } = Thresholds::of(limit, cpus, Signals::Programs);
            assert!(limit.minus(watermark) >= limit.per_mille(15));
        }
    }
}
