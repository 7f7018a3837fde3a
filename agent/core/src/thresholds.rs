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
//! Without kernel programs nobody tells of the watermark before the brake is crossed, and then up to
//! 10 ms late, in which a thread touches 20 MiB. There the brake is the signal *and* the time: it
//! stands at a tenth of the limit, where eight threads at full speed need 0.6 s to the limit of a
//! 64 MiB container (64 s × r² for each batch), and a program that is flat at 95 % is raised once for
//! nothing.

use serde::{Deserialize, Serialize};

use crate::{
    policy::{Policy, Signals},
    units::Bytes,
};

/// Pages that one CPU may hold charged in advance.
const STOCK_PER_CPU: Bytes = Bytes(64 * 4096);

/// What a limit is watched and braked at. All are demand, that is usage without page cache, except
/// `high`, which the kernel compares with usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thresholds {
    /// From here on the agent is told.
    pub watermark: Bytes,
    /// `memory.high`.
    pub high: Bytes,
    /// From here on the container is held until the answer to a request is there.
    pub hold: Bytes,
}

impl Thresholds {
    /// The thresholds of `limit` under a policy: of that part of it that can be used.
    #[must_use]
    pub fn under(policy: &Policy, limit: Bytes) -> Self {
        Self::of(policy.usable(limit), policy.cpus, policy.signals)
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
            high: watermark,
            hold: limit.minus(Bytes(margin.0 / 2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_program_at_96_percent_and_full_stocks_stays_below() {
        for limit in [32, 64, 100, 256, 1024, 65536].map(Bytes::mib) {
            for cpus in [1, 2] {
                let flat = limit.per_mille(960).plus(Bytes(STOCK_PER_CPU.0 * cpus));
                let Thresholds {
                    watermark,
                    high,
                    hold,
                } = Thresholds::of(limit, cpus, Signals::Programs);
                assert!(flat.plus(limit.per_mille(3)) <= watermark, "{limit} {cpus}");
                assert!(watermark <= high && high <= hold && hold < limit);
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
