//! What must hold of every case. Each is computed in another way than the arbiter does: whether bursts can end by
//! trying every order.

use std::collections::BTreeMap;

use super::{super::*, cases::*};

type Verdicts = BTreeMap<CgroupId, Verdict>;
type Checked = Result<(), String>;

/// What of a case is not as it must be.
pub(super) fn check(case: &Case, random: &mut Random) -> Checked {
    let verdicts = case.verdicts();
    nobody_is_forgotten(case, &verdicts)?;
    no_over_commit(case, &verdicts)?;
    if case.is_extreme {
        return lower_priorities_change_nothing(case, &verdicts);
    }
    whoever_is_later_changes_nothing(case, &verdicts, random)?;
    each_verdict_is_right(case, &verdicts)?;
    who_could_end_can(case, &verdicts)?;
    asked_again_nothing_changes(case, &verdicts)?;
    more_room_is_not_worse(case, &verdicts, random)?;
    names_do_not_matter(case, &verdicts)
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(what()) }
}

fn held(claim: &Claim) -> i128 {
    claim.used.max(claim.promised).0.into()
}

fn asked(claim: &Claim) -> i128 {
    i128::from(claim.wanted.0) - held(claim)
}

fn asks(claim: &Claim) -> bool {
    asked(claim) > 0 && claim.wanted > claim.at_rest
}

pub(super) fn has_begun(case: &Case, claim: &Claim) -> bool {
    let is_held = asks(claim) && case.now.0 < ends(claim);
    held(claim) > i128::from(claim.at_rest.0) && (moved_lately(case, claim) || is_held)
}

pub(super) fn moved_lately(case: &Case, claim: &Claim) -> bool {
    case.now.since(claim.moved_at) < RESERVED_FOR
}

/// Until when it may wait.
fn ends(claim: &Claim) -> u64 {
    claim.moved_at.0.saturating_add(claim.may_wait.0)
}

/// Indexes of rooms: the node, then the ancestors.
fn rooms(claim: &Claim) -> Vec<usize> {
    let ancestors = claim.ancestors.iter().map(|index| index + 1);
    std::iter::once(0).chain(ancestors).collect()
}

fn is_granted(verdicts: &Verdicts, id: CgroupId) -> bool {
    matches!(verdicts.get(&id), Some(Verdict::Granted(_)))
}

/// Free and not promised, in each room.
fn free(case: &Case) -> Vec<i128> {
    let count = case.rooms.ancestors.len() + 1;
    let free = (0..count).map(|room| {
        let inside = case
            .claims
            .values()
            .filter(|claim| rooms(claim).contains(&room));
        let owed: i128 = inside
            .map(|claim| held(claim) - i128::from(claim.used.0))
            .sum();
        i128::from(case.room(room).free.0) - owed
    });
    free.collect()
}

fn nobody_is_forgotten(case: &Case, verdicts: &Verdicts) -> Checked {
    for (id, claim) in &case.claims {
        let asks = asks(claim);
        let is_right = match verdicts.get(id) {
            None => !asks,
            Some(Verdict::Granted(to)) => asks && *to == claim.wanted,
            Some(Verdict::Waits(until, _)) => asks && *until > case.now && until.0 == ends(claim),
            Some(Verdict::Refused(_)) => asks,
        };
        ensure(is_right, || {
            format!("{id:?} asks, or does not: {:?}", verdicts.get(id))
        })?;
    }
    ensure(verdicts.len() <= case.claims.len(), || {
        "strangers".to_owned()
    })
}

fn no_over_commit(case: &Case, verdicts: &Verdicts) -> Checked {
    for (room, free) in free(case).into_iter().enumerate() {
        let inside = case
            .claims
            .iter()
            .filter(|(_, claim)| rooms(claim).contains(&room));
        let granted = inside.filter(|(id, _)| is_granted(verdicts, **id));
        let granted: i128 = granted.map(|(_, claim)| asked(claim)).sum();
        ensure(granted <= free.max(0), || {
            format!("over-commit: {granted} of {free} in room {room}")
        })?;
    }
    Ok(())
}

fn lower_priorities_change_nothing(case: &Case, verdicts: &Verdicts) -> Checked {
    let mut others = case.clone();
    for (id, claim) in &case.claims {
        if claim.priority < 1 {
            others = others.without(*id);
        }
    }
    let alone = others.verdicts();
    let high = verdicts
        .iter()
        .filter(|(id, _)| case.claims[*id].priority >= 1);
    let of_high = alone
        .iter()
        .filter(|(id, _)| case.claims[*id].priority >= 1);
    ensure(high.eq(of_high), || {
        format!("lower priorities change {alone:?}")
    })
}

/// The claims that ask, in the order in which they are served.
fn order(case: &Case) -> Vec<CgroupId> {
    let mut keyed: Vec<_> = case
        .claims
        .iter()
        .filter(|(_, claim)| asks(claim))
        .map(|(&id, claim)| {
            // Seconds over sixteen of a GiB, at a weight of 100.
            let share = u128::from(claim.wanted.minus(claim.at_rest).0 / UNIT) * 6_250_000_000;
            let (new, when) = match (has_begun(case, claim), claim.weight) {
                (true, _) => (false, 0),
                (false, 0) => (true, u128::MAX),
                (false, weight) => (true, u128::from(claim.since.0) + share / u128::from(weight)),
            };
            ((-claim.priority, new, when, claim.since, id), id)
        })
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, id)| id).collect()
}

fn whoever_is_later_changes_nothing(
    case: &Case,
    verdicts: &Verdicts,
    random: &mut Random,
) -> Checked {
    let order = order(case);
    let cut = usize::try_from(random.below(order.len() as u64 + 1)).unwrap_or(0);
    let (before, later) = order.split_at(cut);
    let fewer = later
        .iter()
        .fold(case.clone(), |case, id| case.without(*id));
    let alone = fewer.verdicts();
    let is_same = before.iter().all(|id| alone.get(id) == verdicts.get(id));
    ensure(is_same, || {
        format!("{later:?} change those before: {alone:?}")
    })
}

#[derive(Clone)]
struct Begun {
    id: CgroupId,
    rooms: Vec<usize>,
    held: i128,
    rest: i128,
    most: i128,
    stands: bool,
}

#[derive(Clone)]
struct Model {
    free: Vec<i128>,
    begun: Vec<Begun>,
    kept: Vec<(CgroupId, Vec<usize>, i128)>,
}

impl Model {
    fn new(case: &Case) -> Self {
        let begun = case
            .claims
            .iter()
            .filter(|(_, claim)| has_begun(case, claim));
        let mut begun: Vec<_> = begun
            .map(|(&id, claim)| (-claim.priority, claim.since, id))
            .collect();
        begun.sort_unstable();
        Self {
            free: free(case),
            begun: begun
                .iter()
                .map(|&(_, _, id)| Self::begun(case, id))
                .collect(),
            kept: Vec::new(),
        }
    }

    fn begun(case: &Case, id: CgroupId) -> Begun {
        let claim = &case.claims[&id];
        let rooms = rooms(claim);
        let size = rooms
            .iter()
            .map(|&room| case.room(room).size)
            .min()
            .unwrap();
        Begun {
            id,
            rooms,
            held: held(claim),
            rest: claim.at_rest.0.into(),
            most: claim.most.max(claim.wanted).min(size).0.into(),
            stands: asks(claim) && !moved_lately(case, claim),
        }
    }

    fn grant(&mut self, case: &Case, id: CgroupId) {
        let claim = &case.claims[&id];
        let index = self.begun.iter().position(|begun| begun.id == id);
        let index = index.unwrap_or_else(|| {
            self.begun.push(Self::begun(case, id));
            self.begun.len() - 1
        });
        self.begun[index].held = claim.wanted.0.into();
        self.begun[index].stands = false;
        for room in rooms(claim) {
            self.free[room] -= asked(claim);
        }
    }

    /// Who can end in some order, as bits. The last of all takes what there is.
    fn can_end(&self) -> u32 {
        let all = (1_u32 << self.begun.len()) - 1;
        let (mut seen, mut next) = (vec![false; 1 << self.begun.len()], vec![0]);
        let mut ended = 0;
        while let Some(done) = next.pop() {
            ended |= done;
            for (index, burst) in self.begun.iter().enumerate() {
                let with = done | 1 << index;
                let fits = burst.rooms.iter().all(|&room| {
                    let back = self.begun.iter().enumerate().filter(|(other, begun)| {
                        done & 1 << other != 0 && begun.rooms.contains(&room)
                    });
                    let back: i128 = back
                        .map(|(_, begun)| (begun.held - begun.rest).max(0))
                        .sum();
                    burst.most - burst.held <= (self.free[room] + back).max(0)
                });
                let is_new = with != done && !seen[usize::try_from(with).unwrap()];
                if is_new && (fits || with == all) {
                    seen[usize::try_from(with).unwrap()] = true;
                    next.push(with);
                }
            }
        }
        ended
    }

    /// Whether a grant leaves all able to end that are, or it is for the first of those that are not.
    fn may_grant(&self, case: &Case, id: CgroupId) -> bool {
        let mut after = self.clone();
        after.grant(case, id);
        let (could, can) = (self.can_end(), after.can_end());
        let first_stuck = can.trailing_ones();
        let index = after.begun.iter().position(|begun| begun.id == id).unwrap();
        let index = u32::try_from(index).unwrap();
        could & !can == 0 && (can & 1 << index != 0 || first_stuck == index)
    }

    /// Whom a grant leaves unable to end: those that could before, else all.
    fn strands(&self, case: &Case, id: CgroupId) -> Vec<CgroupId> {
        let mut after = self.clone();
        after.grant(case, id);
        let (could, can) = (self.can_end(), after.can_end());
        let others = |bits: u32| -> Vec<CgroupId> {
            let begun = after.begun.iter().enumerate();
            let begun = begun.filter(|(index, begun)| bits & 1 << index != 0 && begun.id != id);
            begun.map(|(_, begun)| begun.id).collect()
        };
        let lost = others(could & !can);
        if lost.is_empty() { others(!can) } else { lost }
    }

    fn left(&self, room: usize, is_new: bool) -> i128 {
        let kept = self
            .kept
            .iter()
            .filter(|(_, rooms, _)| is_new && rooms.contains(&room));
        self.free[room] - kept.map(|(_, _, amount)| amount).sum::<i128>()
    }
}

fn index(place: Place) -> usize {
    match place {
        Place::Node => 0,
        Place::Ancestor(ancestor) => ancestor + 1,
    }
}

/// Work-conserving, and safe: who is granted fits, and can end; who is not does not, and is told why.
fn each_verdict_is_right(case: &Case, verdicts: &Verdicts) -> Checked {
    let mut model = Model::new(case);
    for id in order(case) {
        let claim = &case.claims[&id];
        let (verdict, rooms) = (verdicts[&id], rooms(claim));
        let is_new = !has_begun(case, claim);
        let fits = |room: &usize| model.left(*room, is_new) >= asked(claim);
        let is_large = rooms
            .iter()
            .any(|&room| claim.wanted > case.room(room).size);
        let may_grant = model.may_grant(case, id);
        let is_possible = !is_large && rooms.iter().all(fits) && may_grant;
        let wrong = || format!("{id:?} is told {verdict:?}");
        ensure(is_possible == is_granted(verdicts, id), wrong)?;
        let ends = ends(claim);
        let why = match verdict {
            Verdict::Granted(_) => {
                model.grant(case, id);
                continue;
            }
            Verdict::Refused(why) => why,
            Verdict::Waits(_, why) => why,
        };
        let may_wait = case.now.0 < ends && !is_large;
        let waits = verdict == Verdict::Waits(Nanos(ends), why);
        ensure(waits == may_wait, wrong)?;
        ensure(reason_is_right(case, &model, id, why), wrong)?;
        if matches!(why, Why::NoRoom(..)) {
            continue;
        }
        let kept = if may_grant {
            asked(claim)
        } else {
            i128::from(u64::MAX)
        };
        if may_wait && moved_lately(case, claim) {
            model.kept.push((id, rooms, kept));
        }
    }
    Ok(())
}

fn reason_is_right(case: &Case, model: &Model, id: CgroupId, why: Why) -> bool {
    let claim = &case.claims[&id];
    let (rooms, is_new) = (rooms(claim), !has_begun(case, claim));
    let asked = asked(claim);
    let is_short = |room: usize| model.left(room, is_new) < asked;
    let holders = |room: usize| {
        let others = model.begun.iter();
        let others = others.filter(move |begun| begun.id != id && !begun.stands);
        others.filter(move |begun| begun.rooms.contains(&room) && begun.held > begun.rest)
    };
    let keepers = |room: usize| {
        let kept = model
            .kept
            .iter()
            .filter(move |(_, rooms, _)| rooms.contains(&room));
        kept.map(|(id, ..)| *id).filter(|_| is_new)
    };
    let back = |room: usize| {
        holders(room)
            .map(|begun| begun.held - begun.rest)
            .sum::<i128>()
    };
    let is_vain = |room: usize| is_short(room) && model.free[room] + back(room) < asked;
    match why {
        Why::ExceedsRoom(place) => claim.wanted > case.room(index(place)).size,
        Why::NoRoom(place, limit) => {
            let left = rooms.iter().map(|&room| model.left(room, is_new)).min();
            is_vain(index(place)) && i128::from(limit.0) == held(claim) + left.unwrap().max(0)
        }
        Why::Behind(other) => {
            let mut short = rooms.iter().filter(|&&room| is_short(room));
            let is_first = |room: usize| {
                let mut all = keepers(room).chain(holders(room).map(|begun| begun.id));
                all.next() == Some(other)
            };
            short.clone().all(|&room| !is_vain(room)) && short.any(|&room| is_first(room))
        }
        Why::WouldStrand(other) => {
            let is_told = model.strands(case, id).contains(&other);
            is_told && !rooms.iter().any(|&room| is_short(room))
        }
        // Nobody in these cases may never end.
        Why::KeptForBursts(..) | Why::Leaks => false,
    }
}

/// After everything that was granted.
fn after(case: &Case, verdicts: &Verdicts) -> Model {
    let mut model = Model::new(case);
    for id in order(case) {
        if is_granted(verdicts, id) {
            model.grant(case, id);
        }
    }
    model
}

fn who_could_end_can(case: &Case, verdicts: &Verdicts) -> Checked {
    let (before, after) = (Model::new(case), after(case, verdicts));
    let lost = before.can_end() & !after.can_end();
    ensure(lost == 0, || format!("cannot end any more: {lost:b}"))
}

fn asked_again_nothing_changes(case: &Case, verdicts: &Verdicts) -> Checked {
    // One that is counted on again, with what it had when it was not, may help others at the second look, and so may
    // one that needs nothing more.
    let helps = |id: &CgroupId| {
        let claim = &case.claims[id];
        let most = Model::begun(case, *id).most;
        let is_complete = has_begun(case, claim) && most <= i128::from(claim.wanted.0);
        let is_back = held(claim) > i128::from(claim.at_rest.0) && !has_begun(case, claim);
        is_complete || is_back
    };
    if verdicts
        .keys()
        .any(|id| is_granted(verdicts, *id) && helps(id))
    {
        return Ok(());
    }
    let again = case.given(verdicts).verdicts();
    let granted = again.keys().find(|id| is_granted(&again, **id));
    ensure(granted.is_none(), || {
        format!("at a second look granted to {granted:?}")
    })?;
    let refused = verdicts.keys().filter(|id| !is_granted(verdicts, **id));
    ensure(refused.eq(again.keys()), || {
        "at a second look others wait".to_owned()
    })
}

fn more_room_is_not_worse(case: &Case, verdicts: &Verdicts, random: &mut Random) -> Checked {
    let model = Model::new(case);
    if model.can_end() != (1 << model.begun.len()) - 1 {
        return Ok(());
    }
    let mut larger = case.clone();
    let node = std::iter::once(&mut larger.rooms.node);
    for room in node.chain(&mut larger.rooms.ancestors) {
        room.free = room.free.plus(Bytes(random.below(4) * UNIT));
    }
    let more = larger.verdicts();
    let value = |verdict: &Verdict| match verdict {
        Verdict::Granted(_) => 4,
        Verdict::Waits(_, why) | Verdict::Refused(why) => match why {
            Why::WouldStrand(_) => 3,
            Why::Behind(_) => 2,
            Why::NoRoom(..) => 1,
            Why::ExceedsRoom(_) | Why::KeptForBursts(..) | Why::Leaks => 0,
        },
    };
    let values = |verdicts: &Verdicts| -> Vec<u64> {
        order(case).iter().map(|id| value(&verdicts[id])).collect()
    };
    // The first that differs decides.
    ensure(values(&more) >= values(verdicts), || {
        format!("worse off with {:?}: {more:?}", larger.rooms)
    })
}

fn names_do_not_matter(case: &Case, verdicts: &Verdicts) -> Checked {
    let renamed = case.renamed().verdicts();
    let granted = |verdicts: &Verdicts| -> Vec<bool> {
        verdicts
            .keys()
            .map(|id| is_granted(verdicts, *id))
            .collect()
    };
    ensure(granted(verdicts) == granted(&renamed), || {
        format!("renamed: {renamed:?}")
    })
}
