//! Seeded random cases, and what becomes of them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::*,
    properties::{has_begun, moved_lately},
};

/// Amounts of cases are small multiples of this, so that they often just fit.
pub(super) const UNIT: u64 = 64 << 20;

/// Whatever is random is a number from a seed (splitmix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % end
    }

    pub(super) fn chance(&mut self, per_cent: u64) -> bool {
        self.below(100) < per_cent
    }

    fn units(&mut self, end: u64) -> Bytes {
        Bytes(self.below(end) * UNIT)
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        let index = self.below(values.len() as u64);
        values[usize::try_from(index).unwrap()]
    }
}

/// A node at one moment.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) now: Nanos,
    pub(super) rooms: Rooms,
    pub(super) claims: BTreeMap<CgroupId, Claim>,
    /// Whether there are numbers in it that nobody has.
    pub(super) is_extreme: bool,
}

impl Case {
    pub(super) fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let now = Nanos::millis(30_000);
        let ancestors = random.below(3);
        let scale = random.of(&[6, 12, 24, 48]);
        let mut room = |free| {
            let free = random.units(free);
            let more = random.of(&[Bytes(4 * UNIT), Bytes(64 * UNIT)]);
            let size = free.plus(more);
            Room { free, size }
        };
        let rooms = Rooms {
            node: room(scale),
            ancestors: (0..ancestors).map(|_| room(scale)).collect(),
        };
        let count = 1 + random.below(6);
        let mut claims: BTreeMap<CgroupId, Claim> = (0..count)
            .map(|id| (CgroupId(id), Self::claim(&mut random, now, ancestors)))
            .collect();
        let is_extreme = random.chance(4);
        if is_extreme {
            for claim in claims.values_mut() {
                extreme(claim, &mut random);
            }
        }
        Self {
            now,
            rooms,
            claims,
            is_extreme,
        }
    }

    fn claim(random: &mut Random, now: Nanos, ancestors: u64) -> Claim {
        let at_rest = Bytes(UNIT).plus(random.units(2));
        let promised = if random.chance(50) {
            at_rest.plus(random.units(7))
        } else {
            random.of(&[Bytes::ZERO, Bytes(UNIT), at_rest])
        };
        let used = random.units(1 + promised.max(at_rest).0 / UNIT);
        let asked = if random.chance(75) {
            Bytes(UNIT).plus(random.units(6))
        } else {
            Bytes::ZERO
        };
        let wanted = promised.max(used).max(at_rest).plus(asked);
        let quiet = if random.chance(85) {
            Nanos::millis(500 * random.below(6))
        } else {
            Nanos::millis(9_500 + 500 * random.below(3))
        };
        let moved_at = now.since(quiet);
        let more = wanted.plus(random.units(16));
        let room = |index: u64| random.chance(50).then(|| usize::try_from(index).unwrap());
        Claim {
            ancestors: (0..ancestors).filter_map(room).collect(),
            priority: random.of(&[0, 0, 0, 1]),
            weight: random.of(&[0, 50, 100, 100, 200]),
            since: moved_at.since(Nanos::millis(500 * random.below(5))),
            moved_at,
            may_wait: Nanos::millis(random.of(&[0, 800, 5_000, 10_000, 300_000])),
            at_rest,
            used,
            promised,
            wanted,
            most: random.of(&[wanted, more, more, Bytes::ZERO, Bytes(u64::MAX)]),
            nature: Nature::Burst,
            usual: Bytes::ZERO,
        }
    }

    pub(super) fn verdicts(&self) -> BTreeMap<CgroupId, Verdict> {
        arbitrate(self.now, &self.rooms, &self.claims)
    }

    /// The same after what was granted was given.
    pub(super) fn given(&self, verdicts: &BTreeMap<CgroupId, Verdict>) -> Self {
        let mut case = self.clone();
        for (id, verdict) in verdicts {
            if let (Verdict::Granted(to), Some(claim)) = (verdict, case.claims.get_mut(id)) {
                claim.promised = *to;
                claim.moved_at = self.now;
            }
        }
        case
    }

    /// The same where one asks for nothing, unless it stands still for what it asks for: whether it does is nothing that it
    /// asks for.
    pub(super) fn without(&self, id: CgroupId) -> Self {
        let mut case = self.clone();
        if let Some(claim) = case.claims.get_mut(&id) {
            if has_begun(self, claim) && !moved_lately(self, claim) {
                return case;
            }
            claim.most = claim.most.max(claim.wanted);
            claim.wanted = Bytes::ZERO;
        }
        case
    }

    /// The same under other names: ids that keep their order, ancestors that do not.
    pub(super) fn renamed(&self) -> Self {
        let mut case = self.clone();
        case.rooms.ancestors.reverse();
        let count = self.rooms.ancestors.len();
        let renamed = self.claims.iter().map(|(id, claim)| {
            let ancestors: BTreeSet<usize> = claim
                .ancestors
                .iter()
                .map(|index| count - 1 - index)
                .collect();
            let claim = Claim {
                ancestors,
                ..claim.clone()
            };
            (CgroupId(id.0 * 7 + 3), claim)
        });
        case.claims = renamed.collect();
        case
    }

    pub(super) fn room(&self, index: usize) -> Room {
        match index.checked_sub(1) {
            None => self.rooms.node,
            Some(ancestor) => self.rooms.ancestors[ancestor],
        }
    }
}

fn extreme(claim: &mut Claim, random: &mut Random) {
    let large = Bytes(u64::MAX - random.below(2));
    match random.below(6) {
        0 => claim.used = large,
        1 => claim.promised = large,
        2 => claim.wanted = large,
        3 => claim.at_rest = large,
        4 => (claim.since, claim.moved_at) = (Nanos(u64::MAX), Nanos(u64::MAX)),
        _ => claim.weight = u64::MAX,
    }
}
