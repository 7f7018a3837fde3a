//! Who waits for room, and who lends it.
//!
//! The kubelet says in the condition PodResizePending (Deferred) what a pod wants, what the others have and what there is for
//! pods: what is short by its own account, and only if memory is the first thing that is short. It tries again by itself as
//! soon as another pod of the node has come down, those that come down first, then by priority (`sortPendingResizes`,
//! pkg/kubelet/allocation/allocation_manager.go, 1.37).
//!
//! It takes its time for that word, 0.1 to 2.9 s after a resize is asked for. What the node has for pods is known from an
//! earlier one, and what each has from the API, so room is made before it. What it says then is what counts: where it had
//! room, or it is CPU that is short, or the resize is impossible, what was lent is given back.
//!
//! It must not look at more containers than it would lower, nor have others lend twice for one shortage.

use std::{collections::BTreeSet, time::Duration};

use bellows_core::{
    Bytes,
    requests::{Change, Lender, RequestWhy, Shortage, make_room},
};
use tokio::time::Instant;

use super::{
    Requests, Watch,
    summary::{Summary, expected},
};
use crate::run::pods::Key;

/// For how long it is not known whether a kubelet's word counts what was lent. After it, it does.
const UNDER_WAY: Duration = Duration::from_secs(10);
/// How soon it is looked again for whom no room could be made.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// For how long the kubelet's word of what the node has is taken: it says it when it puts a resize off, which what is lent
/// before its word keeps it from, and another configuration gives it more or less. After that nobody lends before its word,
/// and what is owed is asked back by one container at a time, until it says it again.
pub(super) const HOLDS: Duration = Duration::from_secs(3600);

/// What was done for a pod that waits.
pub(super) struct Served {
    /// For what: what the pod wants, and whether the kubelet has said that it waits. What it says of the others changes with
    /// each of them, and is not another wait.
    wait: (Bytes, bool),
    /// When it was last looked for who lends.
    looked: Instant,
    /// Of what it was last told that there is no room for it.
    told: Option<Bytes>,
    /// Since when others come down for it.
    at: Instant,
    /// What they came down by.
    lent: Bytes,
}

impl Served {
    /// Whether it was just looked in vain for who lends.
    fn is_in_vain(&self, waits: &Waiting, now: Instant) -> bool {
        let is_soon = now.duration_since(self.looked) < LOOK_AGAIN;
        is_soon && self.lent == Bytes::ZERO && self.wait == waits.wait()
    }

    /// What of a shortage is still to be lent, where so much that was lent was not taken yet.
    ///
    /// The kubelet judges anew with each pod that comes down, and what it says then is not ordered with what the API says of
    /// those: a word that counts one lender of two may come after both are seen to be down. So while that is under way, it is
    /// what was lent that counts.
    fn left(served: Option<&Self>, short: Bytes, coming_down: Bytes, now: Instant) -> Bytes {
        let under_way = served.filter(|served| now.duration_since(served.at) < UNDER_WAY);
        let lent = under_way.map_or(Bytes::ZERO, |served| served.lent);
        short.minus(lent.max(coming_down))
    }
}

/// A pod that waits for room.
pub(super) struct Waiting {
    uid: String,
    name: String,
    pub(super) priority: i32,
    /// Whether the kubelet has said so.
    is_said: bool,
    shortage: Shortage,
    before: Bytes,
}

impl Waiting {
    fn of(uid: &str, pod: &Summary, is_said: bool, shortage: Shortage) -> Self {
        Self {
            uid: uid.to_owned(),
            name: pod.name.clone(),
            priority: pod.priority,
            is_said,
            shortage,
            before: pod.allotted,
        }
    }

    const fn wait(&self) -> (Bytes, bool) {
        (self.shortage.requested, self.is_said)
    }
}

impl Requests {
    pub(super) fn capacity_is(&mut self, capacity: Bytes) {
        self.capacity = Some((capacity, Instant::now()));
    }

    /// What the node has for pods, where the kubelet has said that of late.
    pub(super) fn capacity(&self, now: Instant) -> Option<Bytes> {
        let (capacity, at) = self.capacity?;
        (now.duration_since(at) < HOLDS).then_some(capacity)
    }
}

impl Watch {
    /// Pods whose resize finds no room for memory, or will find none, the highest priority first.
    pub(super) fn waiting(&mut self) -> Vec<Waiting> {
        let Requests { pods, served, .. } = &mut self.requests;
        let waits = |pod: &Summary| pod.put_off.is_some() || pod.is_not_judged();
        served.retain(|uid, _| pods.get(uid).is_some_and(waits));
        let told = self
            .requests
            .pods
            .iter()
            .filter_map(|(uid, pod)| Some(Waiting::of(uid, pod, true, pod.shortage()?)));
        let mut waiting: Vec<Waiting> = told.collect();
        if let Some(waits) = waiting.iter().max_by_key(|waits| waits.priority) {
            self.requests.capacity_is(waits.shortage.capacity);
        }
        let capacity = self.requests.capacity(Instant::now());
        let Requests { pods, known, .. } = &self.requests;
        // What is given back by us waits for nobody.
        let ours = known.iter().filter(|(_, known)| known.is_moved_by_us());
        let ours: BTreeSet<&String> = ours.map(|((uid, _), _)| uid).collect();
        let others = pods.iter().filter(|(uid, _)| !ours.contains(uid));
        waiting.extend(others.filter_map(|(uid, pod)| {
            let shortage = expected(pods, uid, capacity)?;
            Some(Waiting::of(uid, pod, false, shortage))
        }));
        waiting.sort_by(|a, b| (b.priority, &a.name).cmp(&(a.priority, &b.name)));
        waiting
    }

    /// Has others come down for one that waits, unless that is under way.
    pub(super) fn make_room_for(&mut self, waits: &Waiting) {
        let now = Instant::now();
        let served = self.requests.served.get(&waits.uid);
        if served.is_some_and(|served| served.is_in_vain(waits, now)) {
            return;
        }
        let coming_down = self.coming_down();
        let short = Served::left(served, waits.shortage.short(), coming_down, now);
        if short == Bytes::ZERO {
            return;
        }
        let changes = choose(short, waits.priority, self.lenders(), |key| {
            let known = self.requests.known.get(key)?;
            Some(known.wish.rules?.least(known.uses()?))
        });
        let under_way = served.filter(|served| now.duration_since(served.at) < UNDER_WAY);
        let before = under_way.map_or(Bytes::ZERO, |served| served.lent);
        let lent = changes.iter().fold(before, |lent, change| {
            lent.plus(change.from.minus(change.to))
        });
        let is_more = lent > before;
        let told = served.and_then(|served| served.told);
        let wants = waits.shortage.requested;
        let is_to_be_told = changes.is_empty() && waits.is_said && told != Some(wants);
        let served = Served {
            wait: waits.wait(),
            looked: now,
            told: if is_to_be_told { Some(wants) } else { told },
            // What was lent before is not younger for what is looked for in vain.
            at: under_way
                .filter(|_| !is_more)
                .map_or(now, |served| served.at),
            lent,
        };
        self.requests.served.insert(waits.uid.clone(), served);
        if is_to_be_told {
            tracing::info!(pod = waits.name, %short, "no room can be made");
            let note = format!(
                "its resize is short of {short}, and pods of lower priority whose policies allow it (memory.requests.makeRoom) do not have that to spare: lower its request, or make room on the node"
            );
            self.tell_waiting(waits, "NoRoomToMake", note);
        }
        if changes.is_empty() {
            return;
        }
        let names: Vec<&str> = changes
            .iter()
            .filter_map(|change| Some(self.requests.known.get(&change.key)?.name.as_str()))
            .collect();
        let note = format!("{short} are lent to its resize by {}", names.join(", "));
        self.tell_waiting(waits, "RoomMade", note);
        for Change { key, to, .. } in changes {
            let why = RequestWhy::Lent {
                to: waits.name.clone(),
                uid: waits.uid.clone(),
                before: waits.before,
                short,
                capacity: self.requests.capacity(now),
            };
            self.change_request(&key, to, why);
        }
    }

    /// Whether room is being made for a pod: what others get back meanwhile it would be short of. For one that cannot have any
    /// nobody waits.
    pub(super) fn is_served(&self, waits: &Waiting) -> bool {
        let served = self.requests.served.get(&waits.uid);
        served.is_some_and(|served| served.lent > Bytes::ZERO)
    }

    fn tell_waiting(&self, waits: &Waiting, reason: &'static str, note: String) {
        if let Some(pod) = self.pods.get(&waits.uid) {
            self.events.told(pod, reason, note);
        }
    }

    /// What the kubelet has not taken from those that were lowered already.
    fn coming_down(&self) -> Bytes {
        let lowered = self.requests.known.values();
        let coming = lowered.filter_map(|known| Some(known.allotted()?.minus(known.request())));
        coming.fold(Bytes::ZERO, Bytes::plus)
    }

    /// Who may lend, by what was seen last of what they use.
    fn lenders(&self) -> Vec<Lender<Key>> {
        let pods = &self.requests.pods;
        let known = self.requests.known.iter();
        let lenders = known.filter_map(|(key, known)| {
            let rules = known.wish.rules.filter(|rules| rules.make_room)?;
            let is_put_off = pods.get(&key.0)?.put_off.is_some();
            if !known.is_free() || is_put_off {
                return None;
            }
            Some(Lender {
                key: key.clone(),
                priority: known.wish.priority,
                request: known.request(),
                least: rules.least(known.used()?),
            })
        });
        lenders.collect()
    }
}

/// Who is lowered. What all of them use was seen a moment ago, and to look again takes the kernel milliseconds for each
/// (`memory.stat`), while whoever starts or waits waits for this: so only those are looked at who would be lowered.
fn choose(
    short: Bytes,
    priority: i32,
    mut lenders: Vec<Lender<Key>>,
    least_now: impl Fn(&Key) -> Option<Bytes>,
) -> Vec<Change<Key>> {
    let mut looked: BTreeSet<Key> = BTreeSet::new();
    loop {
        let changes = make_room(short, priority, &lenders);
        let chosen = changes.iter().map(|change| change.key.clone());
        let new: BTreeSet<Key> = chosen.filter(|key| !looked.contains(key)).collect();
        if new.is_empty() {
            return changes;
        }
        lenders.retain_mut(|lender| {
            if !new.contains(&lender.key) {
                return true;
            }
            // Nothing is known of one that is gone.
            let least = least_now(&lender.key);
            lender.least = least.unwrap_or(lender.least).max(lender.least);
            least.is_some()
        });
        looked.extend(new);
    }
}

#[cfg(test)]
mod tests;
