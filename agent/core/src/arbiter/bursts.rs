//! The bursts that have begun, and whether they can end.
//!
//! Amounts are signed and wide: what is promised may exceed what is free after a room has shrunk, and then what is
//! given back fills that hole first.

use std::collections::BTreeSet;

use super::{Claim, Place, Rooms};
use crate::units::{CgroupId, Nanos};

/// A burst.
#[derive(Clone, Debug)]
pub(super) struct Burst {
    pub(super) id: CgroupId,
    pub(super) places: Vec<Place>,
    pub(super) held: i128,
    at_rest: i128,
    /// What it will hold at most.
    most: i128,
    /// Whether it stands still until it has what it asks for.
    stands: bool,
}

impl Burst {
    pub(super) fn of(now: Nanos, id: CgroupId, claim: &Claim, rooms: &Rooms) -> Self {
        let places = claim.places();
        // Nobody is granted more than a room's size.
        let size = places.iter().map(|&place| rooms.size(place)).min();
        let most = claim.most.max(claim.wanted);
        Self {
            id,
            held: claim.held().0.into(),
            at_rest: claim.at_rest.0.into(),
            most: size.map_or(most, |size| most.min(size)).0.into(),
            stands: claim.asks() && !claim.moved_lately(now),
            places,
        }
    }

    /// What it still needs to end; below zero if it has more.
    const fn needs(&self) -> i128 {
        self.most - self.held
    }

    /// What it gives back in the end, beyond what it needs until then. More than nothing: else it has not begun.
    const fn gives_back(&self) -> i128 {
        self.held - self.at_rest
    }
}

/// What is free, and who will give back.
#[derive(Clone, Debug)]
pub(super) struct Bursts {
    /// What is free and not promised, by the index of its place.
    free: Vec<i128>,
    /// Those that have begun, in order; whoever begins now comes last.
    begun: Vec<Burst>,
}

impl Bursts {
    /// Of claims in order.
    pub(super) fn new(now: Nanos, rooms: &Rooms, order: &[(CgroupId, &Claim)]) -> Self {
        let mut bursts = Self {
            free: rooms.all().map(|room| room.free.0.into()).collect(),
            begun: Vec::new(),
        };
        for &(id, claim) in order {
            let owed = claim.held().minus(claim.used);
            bursts.take(&claim.places(), owed.0.into());
            if claim.has_begun(now) {
                bursts.begun.push(Burst::of(now, id, claim, rooms));
            }
        }
        bursts
    }

    fn take(&mut self, places: &[Place], amount: i128) {
        for place in places {
            if let Some(free) = self.free.get_mut(place.index()) {
                *free -= amount;
            }
        }
    }

    /// What is free and not promised in a place; below zero where too much is promised.
    pub(super) fn free(&self, place: Place) -> i128 {
        self.free.get(place.index()).copied().unwrap_or(0)
    }

    /// The first of those that have begun in a place and go on, and how much all of them will give back. Who has been held
    /// for long gives nothing back before it has more: two such would wait for each other.
    pub(super) fn holders(&self, place: Place, but: CgroupId) -> (Option<CgroupId>, i128) {
        let others = self
            .begun
            .iter()
            .filter(|other| other.id != but && !other.stands);
        let mut others = others
            .filter(|other| other.places.contains(&place))
            .peekable();
        let first = others.peek().map(|other| other.id);
        (first, others.map(Burst::gives_back).sum())
    }

    /// Grants a burst more.
    pub(super) fn grant(&mut self, burst: Burst, amount: i128) {
        self.take(&burst.places, amount);
        match self.begun.iter_mut().find(|other| other.id == burst.id) {
            Some(begun) => (begun.held, begun.stands) = (begun.held + amount, false),
            None => self.begun.push(Burst {
                held: burst.held + amount,
                stands: false,
                ..burst
            }),
        }
    }

    /// Another that could not end if this one were granted so much more; `None` if all can that could before.
    ///
    /// Of those that could not before, the first goes on: it may need less than is expected.
    pub(super) fn would_strand(&self, burst: &Burst, amount: i128) -> Option<CgroupId> {
        let mut granted = self.clone();
        granted.grant(burst.clone(), amount);
        let after = granted.that_can_end();
        if after.len() == granted.begun.len() {
            return None;
        }
        let before = self.that_can_end();
        let ids = granted.begun.iter().map(|other| other.id);
        let stuck: Vec<CgroupId> = ids.filter(|id| !after.contains(id)).collect();
        let mut lost = stuck.iter().filter(|id| before.contains(id)).peekable();
        let is_harmless = lost.peek().is_none();
        if is_harmless && (after.contains(&burst.id) || stuck.first() == Some(&burst.id)) {
            return None;
        }
        lost.chain(&stuck).find(|id| **id != burst.id).copied()
    }

    /// Those that can end, one after the other, each with what is left then. The last of all can: it takes what there
    /// is, and nobody has to give it more. It does not matter which one goes first, for each only adds to what is left.
    fn that_can_end(&self) -> BTreeSet<CgroupId> {
        let mut free = self.free.clone();
        let mut ended = BTreeSet::new();
        let mut left: Vec<&Burst> = self.begun.iter().collect();
        while !left.is_empty() {
            // Who needs nothing more can end though more is promised than there is.
            let there_is = |place: &Place| free.get(place.index()).copied().unwrap_or(0).max(0);
            let fits = |burst: &Burst| {
                let mut places = burst.places.iter();
                places.all(|place| burst.needs() <= there_is(place))
            };
            let is_last = left.len() == 1;
            let Some(next) = left.iter().position(|burst| is_last || fits(burst)) else {
                break;
            };
            let burst = left.swap_remove(next);
            for place in &burst.places {
                if let Some(free) = free.get_mut(place.index()) {
                    *free += burst.gives_back();
                }
            }
            ended.insert(burst.id);
        }
        ended
    }
}
