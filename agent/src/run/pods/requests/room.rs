//! Who waits for room, who lends it, and who gets it back.
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
//! Until then the scheduler counts what the waiting pod wants, so what is lowered for it is not free to others. What it gives
//! up later is: whoever has lent it asks for it at the same moment as the scheduler places a pod there. What that has taken
//! is owed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bellows_core::{
    Bytes,
    pod::PutOff,
    requests::{Change, Lender, Lowered, RequestWhy, Shortage, give_back, make_room, shortage},
};
use tokio::time::Instant;

use super::{KnownRequest, Requests, Summary, Watch};
use crate::{clock::now, explain::told_owed, ledger::Record, run::pods::Key};

/// For how long it is not known whether a kubelet's word counts what was lent. After it, it does.
const UNDER_WAY: Duration = Duration::from_secs(10);
/// How soon it is looked again for whom no room could be made.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// For how long the kubelet's word of what the node has is taken: it says it when it puts a resize off, which what is lent
/// before its word keeps it from, and another configuration gives it more or less. After that nobody lends before its word,
/// and what is owed is asked back by one container at a time, until it says it again.
const HOLDS: Duration = Duration::from_secs(3600);
/// How soon what could not be had back is tried again, and how seldom at last.
const BACKOFF: Duration = Duration::from_secs(30);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// Pods that are named as those that use what is owed.
const USERS: usize = 3;

/// What was lent by one container.
#[derive(Clone, Debug)]
pub(super) struct Loan {
    /// The borrowing pod's uid.
    uid: String,
    /// What that had before.
    before: Bytes,
    /// When; `None` if by a predecessor.
    at: Option<Instant>,
}

impl Loan {
    pub(super) fn of(why: &RequestWhy, at: impl Into<Option<Instant>>) -> Option<Self> {
        let RequestWhy::Lent { uid, before, .. } = why else {
            return None;
        };
        Some(Self {
            uid: uid.clone(),
            before: *before,
            at: at.into(),
        })
    }

    /// What it had before was its containers' alone, without overhead and sidecars.
    fn is_had_by(&self, borrower: &Summary) -> bool {
        !borrower.waits_in_vain() && borrower.own > self.before
    }
}

impl Summary {
    /// Whether its containers ask for more than the kubelet has allotted to them, of which it has not said anything yet.
    fn is_not_judged(&self) -> bool {
        let is_judged = self.said().is_some() || self.waits_in_vain();
        !is_judged && !self.is_ending && self.own > self.allotted
    }

    /// What the kubelet says of what it asks for now.
    fn said(&self) -> Option<&PutOff> {
        self.put_off.as_ref().filter(|said| said.is_current)
    }

    /// What it is short of, as the kubelet says. Nobody lends to one that is on its way out.
    fn shortage(&self) -> Option<Shortage> {
        let said = self.said().filter(|said| !said.is_infeasible);
        shortage(&said?.message).filter(|_| !self.is_ending)
    }

    /// Whether it does not get what it asks for, and it is not for memory, or it is on its way out: that is free to others.
    fn waits_in_vain(&self) -> bool {
        if self.is_ending {
            return self.own > self.allotted;
        }
        self.said().map_or(self.was_in_vain, |said| {
            said.is_infeasible || shortage(&said.message).is_none()
        })
    }

    /// Whether it asks for the same as before, in vain.
    pub(super) fn is_in_vain_as(&self, before: &Self) -> bool {
        let is_same = (self.own, self.allotted) == (before.own, before.allotted);
        is_same && before.waits_in_vain()
    }

    /// What nobody else can have of what the node has.
    fn claimed(&self) -> Bytes {
        if self.waits_in_vain() {
            self.counted()
        } else {
            self.requested
        }
    }

    /// What the kubelet counts of it: what it has allotted, and what is no container's.
    fn counted(&self) -> Bytes {
        if self.requested == Bytes::ZERO {
            return Bytes::ZERO;
        }
        self.requested.minus(self.own).plus(self.allotted)
    }
}

/// What the kubelet will say of a pod that it has not judged yet; `None` where it has room, and where the whole node has less.
fn expected(
    pods: &BTreeMap<String, Summary>,
    uid: &str,
    capacity: Option<Bytes>,
) -> Option<Shortage> {
    let pod = pods.get(uid).filter(|pod| pod.is_not_judged())?;
    // What somebody has who waits and does not run the kubelet does not say.
    if pods.values().any(|pod| pod.is_guessed) {
        return None;
    }
    let others = pods.iter().filter(|(other, _)| *other != uid);
    let used = others.map(|(_, pod)| pod.counted());
    let shortage = Shortage {
        requested: pod.requested,
        used: used.fold(Bytes::ZERO, Bytes::plus),
        capacity: capacity?,
    };
    let is_possible = shortage.requested <= shortage.capacity;
    (is_possible && shortage.short() > Bytes::ZERO).then_some(shortage)
}

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

/// A container of a pod, by that one's uid and its own name: it may have been started again since.
pub(super) type Owner = (String, String);

/// What was lent by each container and is not known to be given back: whose request stands where it was has lent nothing.
pub(super) fn loans(records: &[Record]) -> BTreeMap<Owner, Vec<Loan>> {
    let mut loans: BTreeMap<Owner, Vec<Loan>> = BTreeMap::new();
    for record in unsettled(records, |_| true) {
        if let Record::Request { uid, name, why, .. } = record {
            let own = loans.entry((uid, name)).or_default();
            own.extend(Loan::of(&why, None));
        }
    }
    loans
}

/// The records by which it is known what is not given back, of these containers: what each had, and what it has lent since
/// it was last seen to have that. What is asked for may not come.
pub(super) fn unsettled(records: &[Record], is_meant: impl Fn(&Owner) -> bool) -> Vec<Record> {
    let mut left: BTreeMap<Owner, (Bytes, Vec<&Record>)> = BTreeMap::new();
    for record in records {
        let Record::Request {
            uid,
            name,
            from,
            why,
            ..
        } = record
        else {
            continue;
        };
        let (whole, own) = left.entry((uid.clone(), name.clone())).or_default();
        // It has had all back, unless what was asked for was only put off.
        if from >= whole && *why != RequestWhy::NoRoom {
            own.clear();
        }
        if own.is_empty() || from > whole || matches!(why, RequestWhy::Lent { .. }) {
            own.push(record);
        }
        *whole = (*whole).max(*from);
    }
    let left = left.into_iter().filter(|(owner, _)| is_meant(owner));
    left.flat_map(|(_, (_, own))| own.into_iter().cloned())
        .collect()
}

/// What the node has for pods, as far as a predecessor has come to know it.
pub(super) fn capacity(records: &[Record]) -> Option<Bytes> {
    let mut records = records.iter().rev();
    records.find_map(|record| match record {
        Record::Request {
            why: RequestWhy::Lent { capacity, .. },
            ..
        } => *capacity,
        _ => None,
    })
}

impl Requests {
    fn capacity_is(&mut self, capacity: Bytes) {
        self.capacity = Some((capacity, Instant::now()));
    }

    /// What the node has for pods, where the kubelet has said that of late.
    fn capacity(&self, now: Instant) -> Option<Bytes> {
        let (capacity, at) = self.capacity?;
        (now.duration_since(at) < HOLDS).then_some(capacity)
    }

    /// What the node has for pods and nobody requests, as far as it is known: by the kubelet's last word, however old.
    fn free(&self) -> Option<Bytes> {
        let (capacity, _) = self.capacity?;
        let requested = self.pods.values().map(Summary::claimed);
        let requested = requested.fold(Bytes::ZERO, Bytes::plus);
        let asked = self.known.values().filter(|known| known.asked.is_some());
        let (more, less) = asked.fold((Bytes::ZERO, Bytes::ZERO), |(more, less), known| {
            let (to, from) = (known.request(), known.wish.request);
            (more.plus(to.minus(from)), less.plus(from.minus(to)))
        });
        Some(capacity.plus(less).minus(requested.plus(more)))
    }

    /// Who gets how much of what is free. By a word that is old there may be more: one alone tries that, the one that wants
    /// least, and the next once it has it. Who has lent what somebody has does not.
    fn given_back(&self, lowered: &[Lowered<Key>], now: Instant) -> Vec<Change<Key>> {
        // Without the kubelet's word it is tried.
        let free = self.free().unwrap_or(Bytes(u64::MAX));
        let changes = give_back(free, lowered);
        let is_old = self.capacity.is_some() && self.capacity(now).is_none();
        let is_any_moved = self.known.values().any(KnownRequest::is_moved_by_us);
        if !changes.is_empty() || !is_old || is_any_moved {
            return changes;
        }
        let owed = lowered.iter().filter(|own| {
            let known = self.known.get(&own.key);
            known.is_some_and(|known| !self.is_lent(known))
        });
        let least = owed.min_by_key(|own| own.wanted.minus(own.request));
        let tried = least.map(|own| Change {
            key: own.key.clone(),
            from: own.request,
            to: own.wanted,
        });
        tried.into_iter().collect()
    }

    /// Whether somebody has what a container has lent.
    fn is_lent(&self, known: &KnownRequest) -> bool {
        let has = |loan: &Loan| {
            let borrower = self.pods.get(&loan.uid);
            borrower.is_some_and(|borrower| loan.is_had_by(borrower))
        };
        known.loans.iter().any(has)
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

    /// Takes back what the kubelet puts off of ours: it would put off all else of the pod.
    pub(super) fn take_back_put_off(&mut self) {
        let known = self.requests.known.iter();
        let put_off = known.filter_map(|(key, known)| {
            let put_off = self.requests.pods.get(&key.0)?.put_off.as_ref()?;
            let allotted = known.to_take_back(put_off)?;
            Some((key.clone(), allotted, shortage(&put_off.message)))
        });
        for (key, allotted, shortage) in put_off.collect::<Vec<_>>() {
            if let Some(shortage) = shortage {
                self.requests.capacity_is(shortage.capacity);
            }
            self.change_request(&key, allotted, RequestWhy::NoRoom);
        }
    }

    /// Gives back what there is room for, and tells what there is none for. While room is made for pods, only to those of a
    /// priority as high, and where no policy asks for less any more.
    pub(super) fn give_back_requests(&mut self, waiting: Option<i32>) {
        let growing = self.requests.growing();
        let known = self.requests.known.iter();
        let lowered = known.filter(|(key, known)| {
            let pod = self.requests.pods.get(&key.0);
            let is_put_off = pod.is_none_or(|pod| pod.put_off.is_some());
            // A burst's own resize would wait with one that is put off.
            let is_calm = !growing.contains(&key.0) && !self.context.resizer.is_bursting(&key.0);
            let is_any = known.request() < known.wanted();
            is_any && known.is_free() && !is_put_off && is_calm && !known.is_behind(waiting)
        });
        let lowered: Vec<Lowered<Key>> = lowered
            .map(|(key, known)| Lowered {
                key: key.clone(),
                priority: known.wish.priority,
                request: known.request(),
                wanted: self.allowed_request(key, known),
            })
            .collect();
        self.forgive_debts();
        let allowed = lowered.iter();
        let allowed = allowed.filter(|own| own.wanted > own.request);
        let allowed: Vec<Lowered<Key>> = allowed.cloned().collect();
        let changes = self.requests.given_back(&allowed, Instant::now());
        for own in &lowered {
            let given = changes.iter().find(|change| change.key == own.key);
            // What a quota does not allow is owed, too.
            let known = self.requests.known.get(&own.key);
            let wanted = known.map_or(own.wanted, KnownRequest::wanted);
            let owed = wanted.minus(given.map_or(own.request, |change| change.to));
            let is_lent = self
                .requests
                .known
                .get(&own.key)
                .is_some_and(|known| self.requests.is_lent(known));
            self.owe(&own.key, if is_lent { Bytes::ZERO } else { owed });
        }
        for Change { key, to, .. } in changes {
            let Some(known) = self.requests.known.get(&key) else {
                continue;
            };
            let why = match known.wish.rules {
                None => RequestWhy::Unasked,
                Some(rules) if rules.right_size && known.loans.is_empty() => {
                    RequestWhy::UsesMore { peak: known.peak }
                }
                Some(_) => RequestWhy::GivenBack,
            };
            self.change_request(&key, to, why);
        }
    }

    /// As much of what a request is to be as its namespace allows; no less than it is.
    fn allowed_request(&self, key: &Key, known: &KnownRequest) -> Bytes {
        let allowances = self.context.resizer.allowances();
        let allowed = allowances.request_up_to((&key.0, &key.1), known.wanted());
        allowed.max(known.request())
    }

    /// What comes of a change that was made: a debt, or none any more.
    pub(super) fn settle_debt(&mut self, key: &Key, why: &RequestWhy) {
        let Some(known) = self.requests.known.get_mut(key) else {
            return;
        };
        let missing = known.wanted().minus(known.request());
        if *why == RequestWhy::NoRoom {
            known.backoff = (known.backoff * 2).clamp(BACKOFF, LONGEST_BACKOFF);
            known.not_before = Some(Instant::now() + known.backoff);
            let known = self.requests.known.get(key);
            let is_lent = known.is_some_and(|known| self.requests.is_lent(known));
            self.owe(key, if is_lent { Bytes::ZERO } else { missing });
        } else if missing == Bytes::ZERO {
            known.backoff = Duration::ZERO;
            self.owe(key, Bytes::ZERO);
        }
    }

    /// Who has all that it is to have is owed nothing, however that came.
    fn forgive_debts(&mut self) {
        let known = self.requests.known.iter();
        let is_whole = |known: &KnownRequest| known.request() >= known.wanted();
        let owed = known.filter(|(_, known)| known.owed > Bytes::ZERO && is_whole(known));
        for key in owed.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.owe(&key, Bytes::ZERO);
        }
    }

    /// Records a debt that has changed.
    fn owe(&mut self, key: &Key, owed: Bytes) {
        let Some(known) = self.requests.known.get(key) else {
            return;
        };
        if known.owed == owed {
            return;
        }
        let since = known.loans.iter().filter_map(|loan| loan.at).min();
        let pods = self.requests.pods.iter();
        let users = pods.filter(|(uid, pod)| {
            let has_come = since.is_some_and(|since| pod.arrived > since);
            has_come && **uid != key.0 && pod.requested > Bytes::ZERO
        });
        let users: Vec<String> = users.map(|(_, pod)| pod.name.clone()).take(USERS).collect();
        let record = Record::Owed {
            at: now(),
            cgroup: known.cgroup.id(),
            name: known.name.clone(),
            owed,
            users: users.clone(),
        };
        if !self.requests.write(&record) {
            return;
        }
        let note = format!("container {}: {}", key.1, told_owed(owed, &users));
        if let Some(known) = self.requests.known.get_mut(key) {
            known.owed = owed;
        }
        if let Some(pod) = self.pods.get(&key.0) {
            self.events.told(pod, "RequestOwed", note);
        }
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

impl KnownRequest {
    /// Whether it waits until pods of this priority have room.
    fn is_behind(&self, waiting: Option<i32>) -> bool {
        self.wish.rules.is_some() && waiting.is_some_and(|waiting| waiting > self.wish.priority)
    }
}

#[cfg(test)]
mod tests;
