//! The arbiter: who gets memory, who waits and for whom, where there is not enough for all.
//!
//! **What there is.** Memory is shared in rooms: the node, and each ancestor cgroup with a limit that is somebody
//! else's ([`node_room`], [`cgroup_room`]). A grant needs to fit each room that its container is in. What was granted
//! and is not used yet does not show in any counter, so it is subtracted here, from the claims themselves: in each
//! room, of every container in it, what it is promised less what it uses. Hence three duties of the caller:
//! - *Every* guarded container is among the claims, also those that ask for nothing. One that is left out is a promise
//!   that is given twice.
//! - Use is without page cache, as everywhere here, and what is free is with it. If use had cache in it that also
//!   counts as free, a container could grow into its cache, and others too. A counter that takes some cache for used
//!   (the kubelet's working set has the active half of it) errs towards too little.
//! - Use is read first, then what is free. What grows in between is then counted twice, which is harmless; what is
//!   given back in between is missed for one look, which is what the reserve is for.
//!
//! What a container at rest does not use of its limit is not promised by us: its request is, by the scheduler.
//!
//! **Why bursts are not given a little each.** A burst comes back with a larger claim at each step. Two builds that
//! need 2 GiB each and have been given 1 GiB each of 2.5 wait for each other until both are killed; one after the
//! other both pass. So a step is granted as a whole or not at all, and only if afterwards all bursts that have begun
//! can still end, one after the other, each with what is left then and what those before it have given back: Dijkstra's
//! banker. The simpler rule, to keep enough for *one* that has begun, is not enough: with 0.2 GiB left for one of 1
//! GiB that needs 0.2 more, and two others that hold 1 GiB each and need 2, it ends, and its 1.2 GiB end neither of the
//! others (`one_that_can_end_is_not_enough`). As the last of all may take whatever there is, a burst that may grow
//! beyond every measure runs alone, and does not wait for ever. How many run side by side therefore depends on how
//! well [`Claim::most`] is known.
//!
//! **Order.** By priority; then bursts that have begun, the oldest first; then the others by when they came, as if
//! each GiB that it would then have beyond rest, over its weight, had made it come a second later. Of those that came
//! at once that is weighted max-min fairness, filled up in whole claims: who would have the smallest share is served
//! first. The second keeps small claims from overtaking a large one for ever. A weight of zero comes last of its
//! priority; ties go by arrival, then by id.
//!
//! **Waiting.** Who waits behind somebody has what it asks for kept, in all of its rooms: nobody that has not begun,
//! and comes later in the order, takes it. If others could not end with what it asks for granted, nobody later begins
//! at all: it would be one more that has to end. Those that have begun go on whatever their priority, because their
//! end is what everybody waits for. So it is for as long as the container may be held, and at most for
//! [`RESERVED_FOR`]: then what was kept for it is for others, which may be able to wait for less, and whoever may be held
//! for longer has nothing but its place in the order. After its own time it is let go. What is kept for the end of a burst
//! that has not moved for [`RESERVED_FOR`] and does not wait itself is for others, too, and what it has is no longer counted
//! on: a leak or a plateau does not give back. Nobody waits for one that itself has waited for so long: it gives nothing back
//! before it has more. Where not even the end of all others would help nothing is kept, and the answer says how much there
//! is, for whoever can do with less.
//!
//! **What may never end.** A leak is granted nothing. One that grows without a trigger and gives nothing back ([`crate::growth`]) is not counted on to end,
//! comes after all others of its priority, and begins nothing: it is granted what fits beside what those at rest are known
//! to need, or expected to, when they burst, as far as that is a quarter of the room or one of them alone needs more. It is told so
//! at once, for to wait is in vain. Not all of what they need: on a node of a hundred workspaces that is many times what it has,
//! and a build by a daemon, which may look so, would die beside gigabytes that nobody asks for. The price: more
//! bursts at once than for what was kept may find that it has taken the rest.
//!
//! **What follows**, each a property that is tested on seeded random cases (`arbiter::tests`):
//! - *No over-commit*: in no room more is granted than is free and not promised.
//! - *Priority*: nothing that is asked for later in the order changes what is granted earlier in it.
//! - *No deadlock*: if all that have begun could end before, they can after. If a room shrinks under them, those that
//!   still can end are not made worse off, and of the others only the first goes on.
//! - *Work-conserving*: who is not granted does not fit into what is free and not kept, or would break the last rule.
//! - *No flapping*: nothing that was granted is taken back here, and who asks again at once gets the same answer, but
//!   for those that waited for one that has been granted its last step.
//! - *Monotone*: with more room, the first in the order whose answer changes is better off. (Where some cannot end,
//!   more room may mean that one of them can again, and is protected.)
//! - *Order and names do not matter*: the claims are a map, ids decide ties only.
//! - *No starvation*: who waits is overtaken only by higher priorities, by those that have begun, of whom there are
//!   finitely many with finitely much to come, and by those that came less than their share's seconds later.
//!   So it is served, or has waited for as long as it could and is told what for. (Who waits for longer than
//!   [`RESERVED_FOR`] is overtaken from then on by whoever needs less than it; that is what its own patience is for.)
//!
//! All of that is about one look. It holds over time as long as nobody uses more than it is promised, and who needs
//! more than [`Claim::most`] said is the price of a guess: it has to wait, and may be let go.
//!
//! It must not take anything back: that is done when a burst is over ([`crate::decide`]), and by whoever makes room.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use serde::{Deserialize, Serialize};

use crate::{
    growth::Nature,
    units::{Bytes, CgroupId, Nanos},
};

mod bursts;
#[cfg(test)]
mod tests;

use bursts::{Burst, Bursts};

/// A burst that has not moved for so long is not counted on, and nothing is kept for it. As long as the usual hold.
pub const RESERVED_FOR: Nanos = crate::patience::LONGEST;
/// A GiB over this weight counts as a second of waiting.
pub const DEFAULT_WEIGHT: u64 = 100;

/// The share of a room that is kept for known bursts from one that may never end.
const KEPT_PER_MILLE: u64 = 250;

/// More than any room has, and few enough that a sum of many does not overflow.
const EVERYTHING: i128 = 1 << 80;

/// Memory that several share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// What nobody uses. What is promised is not yet subtracted.
    pub free: Bytes,
    /// What one could have if nobody else used anything.
    pub size: Bytes,
}

/// The rooms of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rooms {
    /// All of it: every claim is in here.
    pub node: Room,
    /// Ancestor cgroups with a limit that is not moved along with their containers' (as a pod's is,
    /// [`crate::moved`]).
    pub ancestors: Vec<Room>,
}

/// Which room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// The node.
    Node,
    /// The ancestor with this index in [`Rooms::ancestors`].
    Ancestor(usize),
}

/// What is read of a node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeMemory {
    /// `MemTotal`.
    pub total: Bytes,
    /// `MemAvailable`.
    pub available: Bytes,
    /// What is left to others, to errors of measurement, and to what the kernel needs.
    pub reserve: Bytes,
    /// The kubelet's `memory.available`, and the threshold at which it evicts; `None` without a kubelet.
    pub kubelet: Option<(Bytes, Bytes)>,
}

/// One guarded container, and what it asks for. All amounts are of its own cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Those of [`Rooms::ancestors`] that it is in. One that does not exist has no room for anything.
    pub ancestors: BTreeSet<usize>,
    /// Of its pod; more is served first.
    pub priority: i32,
    /// Its share among those of its priority; usually [`DEFAULT_WEIGHT`].
    pub weight: u64,
    /// When its burst began: when it first asked for more than at rest.
    pub since: Nanos,
    /// When it last grew, was granted something, or began to ask after a quiet time. To ask again is not to move.
    pub moved_at: Nanos,
    /// How long it may be held from then on, if it asks ([`crate::patience`]).
    pub may_wait: Nanos,
    /// The limit that it comes back to.
    pub at_rest: Bytes,
    /// What it uses, without page cache.
    pub used: Bytes,
    /// What it may use at any moment: of a raised container the limit, the highest of what is in force and what was
    /// asked for ([`crate::moved::MovedLimit::raised_by`]); of one at rest its request, which may be zero.
    pub promised: Bytes,
    /// The limit that it asks for. One that it has, or had at rest, asks for nothing.
    pub wanted: Bytes,
    /// The highest limit that its burst is expected to ask for: what was learned, else its ceiling. Too much makes it
    /// run alone, too little may let others begin with which it cannot end.
    pub most: Bytes,
    /// What is to be thought of its growth.
    pub nature: Nature,
    /// The limit that it is known, or expected, to ask for when it bursts: what is kept for it from those that may never end.
    pub usual: Bytes,
}

/// Why something is not granted now. Closed, for [`Verdict`] to be told to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum Why {
    /// It is more than this place has, were it empty.
    ExceedsRoom(Place),
    /// Not even what all bursts in this place hold would be enough. So much would be granted at most, now.
    NoRoom(Place, Bytes),
    /// There is not enough until this one has been served, or has ended.
    Behind(CgroupId),
    /// There is enough, but this one, which has begun, could then not end.
    WouldStrand(CgroupId),
    /// It may never end, and what is left in this place is for bursts that will. So much would be granted at most, now.
    KeptForBursts(Place, Bytes),
    /// It will not end.
    Leaks,
}

/// What becomes of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum Verdict {
    /// The limit may be raised to this: what it asked for.
    Granted(Bytes),
    /// It may be held until then.
    Waits(Nanos, Why),
    /// It has waited for as long as it may, or to wait is in vain: whoever is held is let go. It may go on asking,
    /// for less too.
    Refused(Why),
}

/// The node as a room: the least of what the kernel has available and what is left until the kubelet evicts.
#[must_use]
pub fn node_room(memory: &NodeMemory) -> Room {
    let NodeMemory {
        total,
        available,
        reserve,
        kubelet,
    } = *memory;
    let (free, size) = (available.minus(reserve), total.minus(reserve));
    match kubelet {
        Some((available, threshold)) => Room {
            free: free.min(available.minus(threshold)),
            size: size.min(total.minus(threshold)),
        },
        None => Room { free, size },
    }
}

/// A cgroup with a limit as a room, by its `memory.current` and the page cache in it (the file LRU lists of
/// `memory.stat`).
#[must_use]
pub fn cgroup_room(limit: Bytes, usage: Bytes, cache: Bytes) -> Room {
    Room {
        free: limit.minus(usage.minus(cache)),
        size: limit,
    }
}

impl Claim {
    /// What it uses or may use at any moment.
    fn held(&self) -> Bytes {
        self.promised.max(self.used)
    }

    fn asks(&self) -> bool {
        self.wanted > self.held().max(self.at_rest)
    }

    /// Whether its burst is under way: it has more than at rest, and is counted on to go on and give back. Who is held for
    /// what it asks for cannot move.
    fn has_begun(&self, now: Nanos) -> bool {
        let is_counted_on = self.moved_lately(now) || (self.asks() && now < self.patience_ends());
        self.nature == Nature::Burst && self.held() > self.at_rest && is_counted_on
    }

    fn moved_lately(&self, now: Nanos) -> bool {
        now.since(self.moved_at) < RESERVED_FOR
    }

    /// What is kept for it from one that may never end: nothing once it has begun, for then it must be able to end.
    fn is_kept(&self, now: Nanos) -> Bytes {
        if self.nature == Nature::Burst && !self.has_begun(now) {
            self.usual.minus(self.held())
        } else {
            Bytes::ZERO
        }
    }

    /// Until when it may wait.
    fn patience_ends(&self) -> Nanos {
        Nanos(self.moved_at.0.saturating_add(self.may_wait.0))
    }

    /// Its place in the order, but for its id.
    fn rank(&self, now: Nanos) -> (Reverse<i32>, Nature, bool, u128, Nanos) {
        const SECOND: u128 = 1_000_000_000;
        let has_begun = self.has_begun(now);
        let as_if_at = if has_begun {
            0
        } else {
            let share = u128::from(self.wanted.minus(self.at_rest).0);
            let share = (share * SECOND * u128::from(DEFAULT_WEIGHT)) >> 30;
            let later = share.checked_div(u128::from(self.weight));
            later.map_or(u128::MAX, |later| u128::from(self.since.0) + later)
        };
        let priority = Reverse(self.priority);
        (priority, self.nature, !has_begun, as_if_at, self.since)
    }

    /// The rooms that it is in, the node first.
    fn places(&self) -> Vec<Place> {
        let ancestors = self.ancestors.iter().copied().map(Place::Ancestor);
        std::iter::once(Place::Node).chain(ancestors).collect()
    }
}

impl Place {
    /// The node's is 0.
    const fn index(self) -> usize {
        match self {
            Self::Node => 0,
            Self::Ancestor(ancestor) => ancestor.saturating_add(1),
        }
    }
}

impl Rooms {
    /// By their index.
    fn all(&self) -> impl Iterator<Item = &Room> {
        std::iter::once(&self.node).chain(&self.ancestors)
    }

    fn size(&self, place: Place) -> Bytes {
        let room = self.all().nth(place.index());
        room.map_or(Bytes::ZERO, |room| room.size)
    }
}

/// What each claim that asks for something is told.
#[must_use]
pub fn arbitrate(
    now: Nanos,
    rooms: &Rooms,
    claims: &BTreeMap<CgroupId, Claim>,
) -> BTreeMap<CgroupId, Verdict> {
    let mut order: Vec<(CgroupId, &Claim)> =
        claims.iter().map(|(&id, claim)| (id, claim)).collect();
    order.sort_by_key(|&(id, claim)| (claim.rank(now), id));
    let mut arbiter = Arbiter {
        now,
        rooms,
        bursts: Bursts::new(now, rooms, &order),
        kept: Vec::new(),
        claims,
    };
    let asking = order.into_iter().filter(|(_, claim)| claim.asks());
    asking
        .map(|(id, claim)| (id, arbiter.judge(id, claim)))
        .collect()
}

/// What is left while claims are served in their order.
struct Arbiter<'a> {
    now: Nanos,
    rooms: &'a Rooms,
    bursts: Bursts,
    /// For whom how much is kept, in order.
    kept: Vec<(Burst, i128)>,
    claims: &'a BTreeMap<CgroupId, Claim>,
}

impl Arbiter<'_> {
    fn judge(&mut self, id: CgroupId, claim: &Claim) -> Verdict {
        let burst = Burst::of(self.now, id, claim, self.rooms);
        let asked = i128::from(claim.wanted.0) - burst.held;
        let has_begun = claim.has_begun(self.now);
        let is_too_small = |place: &&Place| claim.wanted > self.rooms.size(**place);
        if let Some(&place) = burst.places.iter().find(is_too_small) {
            return Verdict::Refused(Why::ExceedsRoom(place));
        }
        let why = match claim.nature {
            Nature::Burst => None,
            Nature::Suspect => self.kept_for_bursts(&burst, asked),
            Nature::Leak => Some(Why::Leaks),
        };
        if let Some(why) = why {
            return Verdict::Refused(why);
        }
        let stranded = self.bursts.would_strand(&burst, asked);
        let shortage = self.shortage(&burst, asked, has_begun);
        let Some(why) = shortage.or(stranded.map(Why::WouldStrand)) else {
            self.bursts.grant(burst, asked);
            return Verdict::Granted(claim.wanted);
        };
        let until = claim.patience_ends();
        if self.now >= until {
            return Verdict::Refused(why);
        }
        if claim.moved_lately(self.now) && !matches!(why, Why::NoRoom(..)) {
            // Whoever began now would be one more that has to end before.
            let kept = stranded.map_or(asked, |_| EVERYTHING);
            self.kept.push((burst, kept));
        }
        Verdict::Waits(until, why)
    }

    /// Why one that may never end is not granted so much, where there is a place that is kept for those that will.
    fn kept_for_bursts(&self, burst: &Burst, asked: i128) -> Option<Why> {
        let lefts = burst.places.iter().map(|&place| {
            let others = self.claims.iter().filter(|(id, _)| **id != burst.id);
            let inside = others.filter(|(_, claim)| claim.places().contains(&place));
            let needs = inside.map(|(_, claim)| claim.is_kept(self.now));
            let (mut all, mut largest) = (Bytes::ZERO, Bytes::ZERO);
            for need in needs {
                all = all.plus(need);
                largest = largest.max(need);
            }
            let share = self.rooms.size(place).per_mille(KEPT_PER_MILLE);
            let kept = all.min(share).max(largest);
            (self.left(place, false) - i128::from(kept.0), place)
        });
        let (least, place) = lefts.min()?;
        let limit = u64::try_from(burst.held + least.max(0)).unwrap_or(u64::MAX);
        (least < asked).then_some(Why::KeptForBursts(place, Bytes(limit)))
    }

    /// What is kept in a place for those before, from one that has begun or has not.
    fn kept(&self, place: Place, has_begun: bool) -> impl Iterator<Item = (CgroupId, i128)> {
        let kept = self.kept.iter().filter(move |_| !has_begun);
        kept.filter(move |(other, _)| other.places.contains(&place))
            .map(|(other, amount)| (other.id, *amount))
    }

    /// What may be granted in a place; below zero if there is less than nothing.
    fn left(&self, place: Place, has_begun: bool) -> i128 {
        let kept: i128 = self.kept(place, has_begun).map(|(_, amount)| amount).sum();
        self.bursts.free(place) - kept
    }

    /// Why there is too little, if there is. Where to wait would be in vain, that is told first, of the place with the
    /// least.
    fn shortage(&self, burst: &Burst, asked: i128, has_begun: bool) -> Option<Why> {
        let lefts = burst.places.iter();
        let mut lefts: Vec<_> = lefts
            .map(|&place| (self.left(place, has_begun), place))
            .collect();
        lefts.sort_unstable();
        let &(least, _) = lefts.first()?;
        let limit = u64::try_from(burst.held + least.max(0)).unwrap_or(u64::MAX);
        let short = lefts.iter().filter(|&&(left, _)| left < asked);
        let mut reasons = short.map(|&(_, place)| {
            let (holder, given_back) = self.bursts.holders(place, burst.id);
            let keeper = self.kept(place, has_begun).map(|(id, _)| id).next();
            keeper
                .or(holder)
                .filter(|_| self.bursts.free(place) + given_back >= asked)
                .map_or(Why::NoRoom(place, Bytes(limit)), Why::Behind)
        });
        let first = reasons.next()?;
        let in_vain = |why: &Why| matches!(why, Why::NoRoom(..));
        Some(
            std::iter::once(first)
                .chain(reasons)
                .find(in_vain)
                .unwrap_or(first),
        )
    }
}
