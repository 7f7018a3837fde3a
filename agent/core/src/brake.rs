//! How deep the brake must stand where the freezer does not hold.
//!
//! A frozen task stops when it returns to user mode. What grows inside one system call (`MAP_POPULATE`,
//! a large `write` to tmpfs, a fork of a large process) goes on until the call is done, and so does a
//! container that must not be frozen. There only `memory.high` is left, which makes the kernel sleep in
//! the charge itself (Linux 5.18, `try_charge_memcg`): 64 s × r² for each batch of 64 pages, r being the
//! relative overage, at most 2 s, nothing below 10 ms (`calculate_high_delay`, mm/memcontrol.c, 6.1 to
//! 7.3). The rule is solved for r, so that what is left of the limit lasts for the time that the answer
//! needs. Whoever sleeps is not woken by the answer, so the brake is not deeper than that, and it is
//! set again with each charge that comes through.
//!
//! It must not be used where the freezer works: it stalls whoever it holds beyond the answer. Where the freezer is only late,
//! it is not the answer that the room must last for ([`high_until_frozen`]).

use crate::units::{Bytes, Nanos};

/// So many pages the kernel charges at once (`MEMCG_CHARGE_BATCH`).
const BATCH: u64 = 64;
/// The kernel's sleep for one batch at an overage of 1.
const UNIT: Nanos = Nanos::millis(64_000);
/// The kernel's longest sleep.
const LONGEST_SLEEP: Nanos = Nanos::millis(2000);
/// An overage of 1.
const ONE: u64 = 1 << 20;

/// Growth that goes on although it should stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growing {
    /// What is used.
    pub usage: Bytes,
    /// The limit that it must not reach.
    pub limit: Bytes,
    /// What is charged at once: a batch, or a huge page.
    pub charge: Bytes,
    /// Threads that may be growing at once.
    pub growers: u64,
    /// What a page of this kernel's has.
    pub page: Bytes,
}

impl Growing {
    fn batch(self) -> Bytes {
        self.page.scaled(BATCH, 1)
    }

    /// The kernel charges no less than a batch.
    fn at_once(self) -> Bytes {
        self.charge.max(self.batch())
    }
}

/// Where `memory.high` must stand so that the room left lasts for `time`. Who is charged sleeps for as long as that takes,
/// the kernel's 2 s at most: of few charges that are left each thread needs more than `time` itself.
#[must_use]
pub fn high(growing: Growing, time: Nanos) -> Bytes {
    with_sleeps(growing, time, LONGEST_SLEEP, growing.usage)
}

/// The same where whoever wakes up cannot go on by then, for he is frozen: nobody sleeps for longer than `time` for a charge
/// of this size, also when all the others have been charged, too; in a small limit those who were charged before them sleep for
/// less. Where there is not another charge for each, the first sleeps for two thirds of it, and the last for longer: who is
/// back before he is frozen is killed. `None` where that would have to be above usage: it would let those pass who come first.
#[must_use]
pub fn high_until_frozen(growing: Growing, time: Nanos) -> Option<Bytes> {
    let Growing {
        usage,
        limit,
        growers,
        ..
    } = growing;
    let charge = growing.at_once();
    let after = |charges| usage.plus(charge.scaled(charges, 1)).min(limit).max(usage);
    let high = with_sleeps(growing, time, time.min(LONGEST_SLEEP), after(growers));
    let is_last = charge.scaled(growers, 1) >= limit.minus(usage);
    let high = if is_last {
        high.min(with_sleeps(growing, time, time.per_mille(667), after(1)))
    } else {
        high
    };
    (high < usage).then_some(high)
}

/// With sleeps of this length at most, where `at` is used.
fn with_sleeps(growing: Growing, time: Nanos, longest: Nanos, at: Bytes) -> Bytes {
    let Growing {
        usage,
        limit,
        growers,
        page,
        ..
    } = growing;
    let batch = growing.batch();
    let charge = growing.at_once();
    let charges_left = (limit.minus(usage).0 / charge.0).max(1);
    let sleep = u128::from(time.0) * u128::from(growers.max(1)) / u128::from(charges_left);
    let sleep = sleep.min(u128::from(longest.0));
    let batches = u128::from(charge.0 / batch.0.max(1));
    // r², scaled by the square of ONE.
    let square = sleep * u128::from(ONE) * u128::from(ONE) / (u128::from(UNIT.0) * batches);
    let overage = u64::try_from(square.isqrt()).unwrap_or(ONE);
    let high = at.scaled(ONE, ONE.saturating_add(overage));
    high.floor_to(page)
}

/// Whether the room may be used up before anybody sleeps: each thread is charged for up to two batches first
/// (`memcg_nr_pages_over_high > MEMCG_CHARGE_BATCH`, `try_charge_memcg`, mm/memcontrol.c, 5.18 to 7.3).
#[must_use]
pub fn is_scarce(growing: Growing) -> bool {
    let before_sleep = growing.batch().scaled(2, 1).scaled(growing.growers, 1);
    growing.limit.minus(growing.usage) <= before_sleep
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Bytes = Bytes(4096);
    const BATCH: Bytes = Bytes(64 * 4096);

    /// The kernel's sleep for one charge (`calculate_high_delay` and its caller).
    fn kernel_sleep(usage: Bytes, high: Bytes, charge: Bytes) -> Nanos {
        let overage =
            u128::from(usage.0.saturating_sub(high.0)) * u128::from(ONE) / u128::from(high.0);
        let per_batch =
            u128::from(UNIT.0) * overage * overage / (u128::from(ONE) * u128::from(ONE));
        let sleep = per_batch * u128::from(charge.0) / u128::from(BATCH.0);
        Nanos(u64::try_from(sleep.min(u128::from(LONGEST_SLEEP.0))).unwrap())
    }

    #[test]
    fn the_room_lasts_for_the_time() {
        for (limit, room) in [(64, 1), (256, 4), (1024, 15)] {
            for growers in [1, 4] {
                for charge in [BATCH, Bytes::mib(2)] {
                    let (limit, room) = (Bytes::mib(limit), Bytes::mib(room));
                    let time = Nanos::millis(600);
                    let mut usage = limit.minus(room);
                    let mut lasted = 0;
                    while usage.plus(charge) <= limit {
                        let growing = Growing {
                            usage,
                            limit,
                            charge,
                            growers,
                            page: PAGE,
                        };
                        let left = Nanos(time.0.saturating_sub(lasted));
                        let high = high(growing, left);
                        usage = usage.plus(charge);
                        lasted += kernel_sleep(usage, high, charge).0 / growers;
                    }
                    let possible = room.0 / charge.0 * LONGEST_SLEEP.0 / growers.max(1);
                    assert!(
                        lasted >= time.0.min(possible) * 9 / 10,
                        "{limit} {growers} {charge}: {lasted}"
                    );
                }
            }
        }
    }

    #[test]
    fn nobody_sleeps_for_longer_than_the_freeze_is_late() {
        for (limit, charge) in [32, 64, 1024]
            .map(Bytes::mib)
            .into_iter()
            .flat_map(|limit| [(limit, BATCH), (limit, Bytes::mib(2))])
        {
            for (room, growers) in [(0, 1), (1, 4), (4, 4), (5, 8), (40, 16)] {
                let growing = Growing {
                    usage: limit
                        .minus(charge.scaled(room, 1))
                        .max(limit.per_mille(500)),
                    limit,
                    charge,
                    growers,
                    page: PAGE,
                };
                let time = Nanos::millis(150);
                let long = high(growing, time);
                let sleep = |after: u64, high| {
                    let usage = growing.usage.plus(charge.scaled(after, 1)).min(limit);
                    kernel_sleep(usage, high, charge).as_millis()
                };
                let what = format!("{limit} {charge} {room} {growers}");
                let Some(short) = high_until_frozen(growing, time) else {
                    assert!(charge.scaled(growers, 1) > limit.per_mille(30), "{what}");
                    continue;
                };
                assert!(short < growing.usage, "{what}");
                assert!(sleep(growers, short) <= sleep(growers, long), "{what}");
                if room <= growers {
                    assert!(sleep(1, short) >= 95, "{what}: {}", sleep(1, short));
                    assert!(sleep(growers, short) >= 140, "{what}");
                } else {
                    for after in 0..=growers {
                        assert!(sleep(after, short) <= 151, "{what} {after}");
                    }
                }
            }
        }
    }

    #[test]
    fn room_is_scarce_where_all_threads_may_use_it_up_awake() {
        let growing = Growing {
            usage: Bytes::mib(62),
            limit: Bytes::mib(64),
            charge: BATCH,
            growers: 3,
            page: PAGE,
        };
        assert!(!is_scarce(growing));
        assert!(is_scarce(Growing {
            growers: 4,
            ..growing
        }));
    }

    #[test]
    fn never_above_usage_and_never_absurd() {
        for usage in [0, 1, 4096, u64::MAX] {
            let growing = Growing {
                usage: Bytes(usage),
                limit: Bytes(usage),
                charge: Bytes(0),
                growers: 0,
                page: PAGE,
            };
            assert!(high(growing, Nanos(u64::MAX)).0 <= usage);
            // As the kernel reads it back.
            let large = Growing {
                page: Bytes(65_536),
                ..growing
            };
            assert_eq!(high(large, Nanos::millis(600)).0 % 65_536, 0);
        }
    }
}
