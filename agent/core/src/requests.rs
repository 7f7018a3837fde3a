//! Whose memory request is lowered by how much, and whose is given back.
//!
//! A request is what a scheduler and a kubelet count, used or not. Two things lower one, each where a policy allows it:
//! pods that reserve far more than they ever used are *right-sized*, and room is *made* for a pod of higher priority whose
//! own resize the kubelet has put off (Deferred) for want of room. The limit stays what it is in both, so nobody is killed
//! for it; what is lost is the claim to memory that was not in use.
//!
//! Room is made wholly or not at all: a pod that is lowered for a resize that stays put off has lost something for
//! nothing. Nobody is lowered below what it uses, with a margin, nor below its policy's floor.
//!
//! This must not judge whether the node has memory left: the kernel and the kubelet's eviction do.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// What a policy allows of a container's memory request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRules {
    /// Whether it comes down to what was used.
    pub right_size: bool,
    /// Whether it may come down for the resize of a pod of higher priority.
    pub make_room: bool,
    /// It never is below this.
    pub floor: Bytes,
    /// What it keeps beyond what is used, in thousandths of that.
    pub margin_per_mille: u64,
    /// For how long it is watched before it is right-sized.
    pub observe: Nanos,
}

impl RequestRules {
    /// The least request of a container that uses so much. Whole MiB, and above zero: a request of nothing would be another
    /// QoS class.
    #[must_use]
    pub fn least(&self, used: Bytes) -> Bytes {
        let used = used.plus(used.per_mille(self.margin_per_mille));
        used.round_up_mib().max(self.floor).max(Bytes::mib(1))
    }
}

/// What was seen of a container since it is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// For how long.
    pub time: Nanos,
    /// The most that it has used.
    pub peak: Bytes,
}

/// A change of less than this share of a request is not worth a resize, in thousandths.
const WORTH_PER_MILLE: u64 = 100;

/// The request that a right-sized container must have which has `request` now, and had `original`; `None` to leave it.
/// It comes back up at once, at most to what it was.
#[must_use]
pub fn right_size(
    rules: &RequestRules,
    original: Bytes,
    request: Bytes,
    observed: Observed,
) -> Option<Bytes> {
    let wanted = rules.least(observed.peak).min(original);
    let is_worth = request.minus(wanted) >= request.per_mille(WORTH_PER_MILLE).max(Bytes::mib(1));
    let is_lower = wanted < request && is_worth && observed.time >= rules.observe;
    (wanted > request || is_lower).then_some(wanted)
}

/// A container whose request may come down for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lender<K> {
    /// Which. Keys order those that are alike in all else.
    pub key: K,
    /// Its pod's priority.
    pub priority: i32,
    /// Its request.
    pub request: Bytes,
    /// What that must be at least.
    pub least: Bytes,
}

impl<K> Lender<K> {
    const fn spare(&self) -> Bytes {
        self.request.minus(self.least)
    }
}

/// A request that changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change<K> {
    /// Whose.
    pub key: K,
    /// What it is.
    pub from: Bytes,
    /// What it becomes.
    pub to: Bytes,
}

/// Who is lowered so that a pod of this priority gets what is short: nobody if that does not suffice.
///
/// Only containers of lower priority. None of a priority above the lowest one up to which there is enough; of those up to
/// it as few as suffice; of sets as small the one with lower priorities. Together they give exactly what is short, and the
/// one of the highest priority, of which not all may be needed, keeps the rest.
#[must_use]
pub fn make_room<K: Clone + Ord>(
    short: Bytes,
    priority: i32,
    lenders: &[Lender<K>],
) -> Vec<Change<K>> {
    let may = |lender: &&Lender<K>| lender.priority < priority && lender.spare() > Bytes::ZERO;
    let mut lower: Vec<&Lender<K>> = lenders.iter().filter(may).collect();
    lower.sort_by(|a, b| (a.priority, &a.key).cmp(&(b.priority, &b.key)));
    let Some(highest) = highest_needed(short, &lower) else {
        return Vec::new();
    };
    lower.retain(|lender| lender.priority <= highest);
    let mut chosen = fewest(short, &lower);
    prefer_lower_priorities(short, &lower, &mut chosen);
    chosen.sort_unstable();
    let mut left = short;
    let changes = chosen.into_iter().map(|index| {
        let lender = lower[index];
        let cut = lender.spare().min(left);
        left = left.minus(cut);
        Change {
            key: lender.key.clone(),
            from: lender.request,
            to: lender.request.minus(cut),
        }
    });
    changes.filter(|change| change.to < change.from).collect()
}

/// The lowest priority up to which there is enough. Lenders are in the order of theirs.
fn highest_needed<K>(short: Bytes, lenders: &[&Lender<K>]) -> Option<i32> {
    let mut sum = Bytes::ZERO;
    let enough = lenders.iter().find(|lender| {
        sum = sum.plus(lender.spare());
        sum >= short
    });
    enough.map(|lender| lender.priority)
}

/// The indices of as few as suffice: those with the most to spare.
fn fewest<K>(short: Bytes, lenders: &[&Lender<K>]) -> Vec<usize> {
    let mut by_spare: Vec<usize> = (0..lenders.len()).collect();
    // Stable: among equals the lower priority comes first.
    by_spare.sort_by_key(|&index| std::cmp::Reverse(lenders[index].spare()));
    let mut sum = Bytes::ZERO;
    let needed = by_spare.into_iter().take_while(|&index| {
        let is_needed = sum < short;
        sum = sum.plus(lenders[index].spare());
        is_needed
    });
    needed.collect()
}

/// Puts those of lower priority in the place of others, the highest first, as long as what they spare suffices.
fn prefer_lower_priorities<K>(short: Bytes, lenders: &[&Lender<K>], chosen: &mut [usize]) {
    let spared = |chosen: &[usize]| {
        let spares = chosen.iter().map(|&index| lenders[index].spare());
        spares.fold(Bytes::ZERO, Bytes::plus)
    };
    chosen.sort_by_key(|&index| std::cmp::Reverse(lenders[index].priority));
    for place in 0..chosen.len() {
        let own = lenders[chosen[place]];
        let others = spared(chosen).minus(own.spare());
        let suffices = |index: &usize| {
            let other = lenders[*index];
            other.priority < own.priority
                && !chosen.contains(index)
                && others.plus(other.spare()) >= short
        };
        if let Some(better) = (0..lenders.len()).find(suffices) {
            chosen[place] = better;
        }
    }
}

/// A container whose request is lower than it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowered<K> {
    /// Which.
    pub key: K,
    /// Its pod's priority.
    pub priority: i32,
    /// Its request.
    pub request: Bytes,
    /// What it is to be.
    pub wanted: Bytes,
}

/// Who gets how much of what the node has free: the higher priority first, whole MiB, no more than there is. What is not
/// in it stays owed.
#[must_use]
pub fn give_back<K: Clone + Ord>(free: Bytes, lowered: &[Lowered<K>]) -> Vec<Change<K>> {
    let mut lowered: Vec<&Lowered<K>> = lowered.iter().collect();
    lowered.sort_by(|a, b| (b.priority, &a.key).cmp(&(a.priority, &b.key)));
    let mut free = free;
    let changes = lowered.into_iter().filter_map(|own| {
        let owed = own.wanted.minus(own.request);
        let part = Bytes(free.0 >> 20 << 20);
        let given = if owed <= free { owed } else { part };
        free = free.minus(given);
        (given > Bytes::ZERO).then(|| Change {
            key: own.key.clone(),
            from: own.request,
            to: own.request.plus(given),
        })
    });
    changes.collect()
}

/// By how much a resize does not fit, as the kubelet says it in the message of PodResizePending; `None` if it is not for
/// memory alone that it is put off, or the message is none that is known.
///
/// The first thing that does not fit is named, and CPU before memory (`fitsRequest`, pkg/scheduler/framework/plugins/noderesources/fit.go;
/// `Error` of `InsufficientResourceError`, pkg/kubelet/lifecycle/predicate.go; the same from 1.27 to 1.37).
#[must_use]
pub fn shortage(message: &str) -> Option<Shortage> {
    let rest = message.strip_prefix("Node didn't have enough resource: memory, ")?;
    let mut numbers = rest.split(", ").map(|part| part.split_once(": "));
    let mut number = |name: &str| {
        let (said, number) = numbers.next()??;
        (said == name).then(|| number.parse().ok().map(Bytes))?
    };
    Some(Shortage {
        requested: number("requested")?,
        used: number("used")?,
        capacity: number("capacity")?,
    })
}

/// What the kubelet counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// What the pod wants in all.
    pub requested: Bytes,
    /// What the node's other pods have.
    pub used: Bytes,
    /// What the node has for pods.
    pub capacity: Bytes,
}

impl Shortage {
    /// What is missing.
    #[must_use]
    pub const fn short(&self) -> Bytes {
        self.requested.plus(self.used).minus(self.capacity)
    }
}

/// Why a request changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum RequestWhy {
    /// It has used less, for long enough.
    RightSized {
        /// The most that it has used.
        peak: Bytes,
    },
    /// It uses more than it was right-sized for.
    UsesMore {
        /// The most that it has used.
        peak: Bytes,
    },
    /// Room is made.
    Lent {
        /// For which pod, for people.
        to: String,
        /// Its uid.
        uid: String,
        /// What that had before.
        before: Bytes,
        /// What it is short of.
        short: Bytes,
        /// What the node has for pods, as the kubelet has said.
        #[serde(default)]
        capacity: Option<Bytes>,
    },
    /// There is room for it again.
    GivenBack,
    /// There is no room for what it was: the kubelet has put it off, and would put off all else of the pod with it.
    NoRoom,
    /// The kubelet will never carry it out, as with any change of a request on a node with swap, and would carry out nothing
    /// else of the pod.
    Infeasible {
        /// Why, in its own words.
        message: String,
    },
    /// No policy asks for it any more.
    Unasked,
}

impl RequestWhy {
    /// Whether a change is taken back that the kubelet has not carried out.
    #[must_use]
    pub const fn takes_back(&self) -> bool {
        matches!(self, Self::NoRoom | Self::Infeasible { .. })
    }
}

#[cfg(test)]
mod tests;
