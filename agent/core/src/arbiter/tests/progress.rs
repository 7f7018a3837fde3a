//! Bursts that live: each climbs by steps to what it needs, works, and gives back. Whatever they need, all end. If all
//! is over before a reservation expires, all are served; else who is refused is killed, as it would be, and no other.

use std::collections::BTreeMap;

use super::{super::*, cases::*};

/// Ticks of a life that is over soon, and of one that is not.
const TICK: [Nanos; 2] = [Nanos::millis(1), Nanos::millis(500)];
/// Far more than all need if one runs after the other.
const TICKS: u64 = 3000;

struct Life {
    /// What it needs in the end.
    peak: Bytes,
    starts_at: Nanos,
    /// Ticks that it works at its peak.
    works: u64,
    has_ended: bool,
}

impl Life {
    fn end(&mut self, claim: &mut Claim) {
        self.has_ended = true;
        claim.used = claim.at_rest;
        (claim.promised, claim.wanted) = (Bytes::ZERO, Bytes::ZERO);
    }
}

/// What is wrong with how bursts lived.
pub(super) fn check(seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let total = Bytes((8 + random.below(24)) * UNIT);
    let count = 1 + random.below(7);
    let is_slow = random.chance(30);
    let tick_length = TICK[usize::from(is_slow)];
    let (mut claims, mut lives) = (BTreeMap::new(), BTreeMap::new());
    for id in (0..count).map(CgroupId) {
        let (claim, life) = burst(&mut random, total, count, tick_length);
        claims.insert(id, claim);
        lives.insert(id, life);
    }
    for tick in 0..TICKS {
        let now = Nanos(tick_length.0 * tick);
        for (id, claim) in &mut claims {
            if let Some(life) = lives.get_mut(id) {
                live(claim, life, now, &mut random);
            }
        }
        let used = claims
            .values()
            .fold(Bytes::ZERO, |sum, claim| sum.plus(claim.used));
        if used > total {
            return Err(format!("tick {tick}: {used} used of {total}"));
        }
        let rooms = Rooms {
            node: Room {
                free: total.minus(used),
                size: total,
            },
            ancestors: Vec::new(),
        };
        for (id, verdict) in arbitrate(now, &rooms, &claims) {
            let (Some(claim), Some(life)) = (claims.get_mut(&id), lives.get_mut(&id)) else {
                continue;
            };
            match verdict {
                Verdict::Granted(to) => (claim.promised, claim.moved_at) = (to, now),
                Verdict::Refused(_) if is_slow => life.end(claim),
                Verdict::Waits(..) | Verdict::Refused(_) => {}
            }
        }
        if lives.values().all(|life| life.has_ended) {
            return Ok(());
        }
    }
    let left = lives.iter().filter(|(_, life)| !life.has_ended);
    let left: Vec<_> = left.map(|(id, _)| (id, &claims[id])).collect();
    Err(format!("have not ended, with {total}: {left:?}"))
}

fn burst(random: &mut Random, total: Bytes, count: u64, tick: Nanos) -> (Claim, Life) {
    let at_rest = Bytes(UNIT / 8);
    // So much one can have while all others are at rest.
    let reach = total.minus(Bytes(at_rest.0 * count)).0 / UNIT;
    let peak = Bytes((1 + random.below(reach)) * UNIT);
    let most = match random.below(3) {
        0 => Bytes(u64::MAX),
        1 => peak,
        _ => peak.plus(Bytes(random.below(8) * UNIT)),
    };
    let claim = Claim {
        ancestors: BTreeSet::new(),
        priority: i32::try_from(random.below(2)).unwrap_or(0),
        weight: random.below(3) * 100,
        since: Nanos(0),
        moved_at: Nanos(0),
        may_wait: Nanos::millis(random.below(12) * 1000),
        at_rest,
        used: at_rest,
        promised: Bytes::ZERO,
        wanted: Bytes::ZERO,
        most,
        nature: Nature::Burst,
        usual: Bytes::ZERO,
    };
    let life = Life {
        peak,
        starts_at: Nanos(tick.0 * random.below(20)),
        works: random.below(10),
        has_ended: false,
    };
    (claim, life)
}

/// A step of a burst: it uses what it has, and asks for four times as much; or works, or ends.
fn live(claim: &mut Claim, life: &mut Life, now: Nanos, random: &mut Random) {
    if now < life.starts_at || life.has_ended {
        return;
    }
    if claim.wanted == Bytes::ZERO {
        (claim.since, claim.moved_at) = (now, now);
    }
    let limit = claim.promised.max(claim.at_rest);
    if limit >= life.peak {
        claim.used = life.peak;
        if life.works > 0 {
            life.works -= 1;
            return;
        }
        life.end(claim);
    } else if claim.used < limit && random.chance(50) {
        claim.used = limit;
        claim.moved_at = now;
    } else {
        claim.used = limit;
        claim.wanted = limit.scaled(4, 1).min(life.peak);
    }
}
