//! Idle CPUs for several that want them at once: by priority, then by weighted max-min fairness.
//!
//! Where each takes what it finds idle, the first of several JVMs that start together gets its boost and the last
//! starts at rest; where none looks at what is idle, they take from those that were there before. CPU time, other than
//! memory, can be given a little each ([`crate::arbiter`] says why memory cannot): it is taken back at once, and half
//! a boost is worth half. So nobody gets more than it wants, nobody's share is larger, over its weight, than that of
//! one that wants more, and nothing is left idle that is wanted. A weight of zero gets what the others of its priority
//! leave.
//!
//! What is shared is what is idle *and* what those that share use beyond rest, or a boost would count as a reason to
//! end it: each would be seen to leave nothing idle, and lose what it has at the next look.
//!
//! It must not be asked to share what is used by others, nor does it know what a container has at rest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::units::{Amount as _, CgroupId, Cpu};

/// What one wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Of its pod; more is served first.
    pub priority: i32,
    /// Its share among those of its priority.
    pub weight: u64,
    /// How much beyond rest.
    pub wanted: Cpu,
}

/// What each gets of `idle`, beyond rest.
#[must_use]
pub fn share(idle: Cpu, wishes: &BTreeMap<CgroupId, Wish>) -> BTreeMap<CgroupId, Cpu> {
    let mut groups: BTreeMap<_, Vec<(CgroupId, Wish)>> = BTreeMap::new();
    for (&id, wish) in wishes {
        let group = (std::cmp::Reverse(wish.priority), wish.weight == 0);
        // Those without a weight share alike.
        let weight = wish.weight.max(1);
        groups
            .entry(group)
            .or_default()
            .push((id, Wish { weight, ..*wish }));
    }
    let mut left = idle;
    let mut shares = BTreeMap::new();
    for (_, group) in groups {
        for (id, got) in fill(left, group) {
            left = left.minus(got);
            shares.insert(id, got);
        }
    }
    shares
}

/// Whoever wants the least for its weight first: what it leaves is for the others.
fn fill(mut left: Cpu, mut group: Vec<(CgroupId, Wish)>) -> Vec<(CgroupId, Cpu)> {
    let times = |wish: &Wish, weight: u64| u128::from(wish.wanted.0) * u128::from(weight);
    group.sort_by(|(_, a), (_, b)| times(a, b.weight).cmp(&times(b, a.weight)));
    let mut weights: u128 = group.iter().map(|(_, wish)| u128::from(wish.weight)).sum();
    let mut shares = Vec::new();
    for (id, wish) in group {
        let weight = u128::from(wish.weight);
        let fair = (u128::from(left.0) * weight).checked_div(weights);
        let fair = fair.map_or(0, |fair| u64::try_from(fair).unwrap_or(u64::MAX));
        let got = wish.wanted.min(Cpu(fair));
        left = left.minus(got);
        weights -= weight;
        shares.push((id, got));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(priority: i32, weight: u64, millis: u64) -> Wish {
        Wish {
            priority,
            weight,
            wanted: Cpu::millis(millis),
        }
    }

    fn shares(idle: u64, wishes: &[Wish]) -> Vec<u64> {
        let ids = (0..).map(CgroupId);
        let shares = share(
            Cpu::millis(idle),
            &ids.zip(wishes.iter().copied()).collect(),
        );
        shares.into_values().map(|cpu| cpu.0 / 1000).collect()
    }

    #[test]
    fn those_that_start_at_once_share_by_weight_and_none_is_left_out() {
        let equals = [wish(0, 100, 3700); 4];
        assert_eq!(shares(4000, &equals), [1000; 4]);
        assert_eq!(shares(40_000, &equals), [3700; 4]);
        let weights = [wish(0, 100, 4000), wish(0, 300, 4000)];
        assert_eq!(shares(4000, &weights), [1000, 3000]);
        let modest = [wish(0, 100, 4000), wish(0, 300, 600), wish(0, 100, 4000)];
        assert_eq!(shares(4000, &modest), [1700, 600, 1700]);
    }

    #[test]
    fn priority_comes_before_weight_and_no_weight_last() {
        let wishes = [
            wish(0, 1000, 2000),
            wish(1, 1, 3000),
            wish(0, 0, 800),
            wish(0, 0, 800),
        ];
        assert_eq!(shares(2500, &wishes), [0, 2500, 0, 0]);
        assert_eq!(shares(4000, &wishes), [1000, 3000, 0, 0]);
        assert_eq!(shares(6000, &wishes), [2000, 3000, 500, 500]);
    }

    /// Whatever is random is a number from a seed (splitmix64).
    fn next(seed: &mut u64, below: u64) -> u64 {
        *seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % below
    }

    #[test]
    fn whatever_is_wanted_all_is_shared_fairly_and_more_is_worse_for_nobody() {
        for case in 0..20_000 {
            let mut seed = case;
            let count = 1 + next(&mut seed, 6);
            let wishes: BTreeMap<CgroupId, Wish> = (0..count)
                .map(|id| {
                    let priority = i32::try_from(next(&mut seed, 2)).unwrap();
                    let (weight, wanted) = (next(&mut seed, 4), Cpu(next(&mut seed, 5000)));
                    let wish = Wish {
                        priority,
                        weight,
                        wanted,
                    };
                    (CgroupId(id), wish)
                })
                .collect();
            let idle = Cpu(next(&mut seed, 12_000));
            let shares = share(idle, &wishes);
            let sum = |amounts: &mut dyn Iterator<Item = Cpu>| amounts.fold(Cpu::ZERO, Cpu::plus);
            let wanted = sum(&mut wishes.values().map(|wish| wish.wanted));
            let given = sum(&mut shares.values().copied());
            assert_eq!(given, wanted.min(idle), "case {case}");
            for (a, has) in &wishes {
                assert!(shares[a] <= has.wanted, "case {case}");
                let is_short = shares[a] < has.wanted;
                for (b, other) in &wishes {
                    let is_after =
                        (other.priority, other.weight > 0) < (has.priority, has.weight > 0);
                    assert!(
                        !is_short || !is_after || shares[b] == Cpu::ZERO,
                        "case {case}"
                    );
                    let is_equal =
                        other.priority == has.priority && other.weight.min(has.weight) > 0;
                    // In whole millionths each loses less than one, which is left to those after it.
                    let fair = (shares[a].0 + 1) * other.weight + count * has.weight;
                    assert!(
                        !is_short || !is_equal || shares[b].0 * has.weight <= fair,
                        "case {case}"
                    );
                }
            }
            let more = share(idle.plus(Cpu(next(&mut seed, 3))), &wishes);
            assert!(
                shares.iter().all(|(id, had)| more[id] >= *had),
                "case {case}"
            );
        }
    }

    #[test]
    fn the_largest_numbers_do_no_harm() {
        let wishes = [wish(0, u64::MAX, u64::MAX), wish(0, u64::MAX, u64::MAX)];
        let half = u64::MAX / 1000 / 2;
        assert_eq!(shares(u64::MAX, &wishes), [half, half]);
        assert_eq!(shares(1000, &[]), [0; 0]);
    }
}
