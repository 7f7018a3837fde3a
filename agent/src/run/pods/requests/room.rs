//! Who waits for room, who lends it, and who gets it back.
//!
//! The kubelet says in the condition PodResizePending (Deferred) what a pod wants, what the others have and what there is for
//! pods: what is short by its own account, and only if memory is the first thing that is short. It tries again by itself as
//! soon as another pod of the node has come down, those that come down first, then by priority (`sortPendingResizes`,
//! pkg/kubelet/allocation/allocation_manager.go, 1.37).
//!
//! Until then the scheduler counts what the waiting pod wants, so what is lowered for it is not free to others. What it gives
//! up later is: whoever has lent it asks for it at the same moment as the scheduler places a pod there. What that has taken
//! is owed.

use std::{collections::BTreeMap, path::Path, time::Duration};

use bellows_core::{
    Bytes, CgroupId, quantity,
    requests::{Change, Lender, Lowered, RequestWhy, Shortage, give_back, make_room, shortage},
};
use tokio::time::Instant;

use super::{KnownRequest, Watch, read, write};
use crate::{clock::now, explain::told_owed, ledger::Record, run::pods::Key};

/// For how long what was made of a kubelet's word counts as under way. After it the same word means that it did not suffice.
const UNDER_WAY: Duration = Duration::from_secs(10);
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
}

/// What was made of a kubelet's word.
pub(super) struct Served {
    message: String,
    at: Instant,
}

/// A pod that waits for room.
pub(super) struct Waiting {
    uid: String,
    name: String,
    pub(super) priority: i32,
    message: String,
    shortage: Shortage,
    before: Bytes,
}

/// What was lent by each container before this agent began, and is not given back.
pub(super) fn loans(path: &Path) -> BTreeMap<CgroupId, Vec<Loan>> {
    left(&read(path))
}

fn left(records: &[Record]) -> BTreeMap<CgroupId, Vec<Loan>> {
    let mut loans: BTreeMap<CgroupId, (Bytes, Vec<Loan>)> = BTreeMap::new();
    for record in records {
        let Record::Request {
            cgroup,
            from,
            to,
            why,
            ..
        } = record
        else {
            continue;
        };
        let (whole, own) = loans.entry(*cgroup).or_default();
        *whole = (*whole).max(*from);
        own.extend(Loan::of(why, None));
        if to >= whole {
            own.clear();
        }
    }
    let loans = loans.into_iter().map(|(cgroup, (_, own))| (cgroup, own));
    loans.collect()
}

impl Watch {
    /// Pods whose resize finds no room for memory, the highest priority first.
    pub(super) fn waiting(&mut self) -> Vec<Waiting> {
        let pods = self.requests.pods.iter();
        let waiting = pods.filter_map(|(uid, pod)| {
            let put_off = pod.put_off.as_ref()?;
            let shortage = shortage(&put_off.message)?;
            (put_off.is_current && !put_off.is_infeasible).then(|| Waiting {
                uid: uid.clone(),
                name: pod.name.clone(),
                priority: pod.priority,
                message: put_off.message.clone(),
                shortage,
                before: pod.allotted,
            })
        });
        let mut waiting: Vec<Waiting> = waiting.collect();
        waiting.sort_by(|a, b| (b.priority, &a.name).cmp(&(a.priority, &b.name)));
        if let Some(waits) = waiting.first() {
            self.requests.capacity = Some(waits.shortage.capacity);
        }
        waiting
    }

    /// Has others come down for one that waits, unless that is under way.
    pub(super) fn make_room_for(&mut self, waits: &Waiting) {
        let served = self.requests.served.get(&waits.uid);
        let is_under_way =
            |served: &Served| served.message == waits.message && served.at.elapsed() < UNDER_WAY;
        if served.is_some_and(is_under_way) {
            return;
        }
        let is_told = served.is_some_and(|served| served.message == waits.message);
        let short = waits.shortage.short().minus(self.coming_down());
        if short == Bytes::ZERO {
            return;
        }
        let lenders = self.lenders();
        let changes = make_room(short, waits.priority, &lenders);
        let served = Served {
            message: waits.message.clone(),
            at: Instant::now(),
        };
        self.requests.served.insert(waits.uid.clone(), served);
        if changes.is_empty() && !is_told {
            tracing::info!(pod = waits.name, %short, "no room can be made");
            let note = format!(
                "its resize is short of {short}, and pods of lower priority whose policies allow it (memory.requests.makeRoom) do not have that to spare"
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
            };
            self.change_request(&key, to, why);
        }
    }

    fn tell_waiting(&self, waits: &Waiting, reason: &'static str, note: String) {
        if let Some(pod) = self.pods.get(&waits.uid) {
            self.events.told(pod, reason, note);
        }
    }

    /// What the kubelet has not taken from those that were lowered already.
    fn coming_down(&self) -> Bytes {
        let lowered = self.requests.known.values();
        let coming = lowered.filter_map(|known| {
            let allotted = quantity::parse(known.wish.allotted.as_deref()?).ok()?;
            Some(allotted.minus(known.request()))
        });
        coming.fold(Bytes::ZERO, Bytes::plus)
    }

    fn lenders(&mut self) -> Vec<Lender<Key>> {
        let pods = &self.requests.pods;
        let known = self.requests.known.iter_mut();
        let lenders = known.filter_map(|(key, known)| {
            let rules = known.wish.rules.filter(|rules| rules.make_room)?;
            let is_put_off = pods.get(&key.0)?.put_off.is_some();
            if !known.is_free() || is_put_off {
                return None;
            }
            let used = known.sample();
            Some(Lender {
                key: key.clone(),
                priority: known.wish.priority,
                request: known.request(),
                least: rules.least(used),
            })
        });
        lenders.collect()
    }

    /// Takes back what the kubelet puts off of ours: it would put off all else of the pod.
    pub(super) fn take_back_put_off(&mut self) {
        let known = self.requests.known.iter();
        let put_off = known.filter_map(|(key, known)| {
            let put_off = self.requests.pods.get(&key.0)?.put_off.as_ref()?;
            let allotted = quantity::parse(known.wish.allotted.as_deref()?).ok()?;
            let is_ours = known.wish.is_ours && known.asked.is_none() && put_off.is_current;
            let is_put_off = is_ours && allotted != known.wish.request;
            is_put_off.then(|| (key.clone(), allotted, shortage(&put_off.message)))
        });
        for (key, allotted, shortage) in put_off.collect::<Vec<_>>() {
            if let Some(shortage) = shortage {
                self.requests.capacity = Some(shortage.capacity);
            }
            self.change_request(&key, allotted, RequestWhy::NoRoom);
        }
    }

    /// What the node has for pods and nobody requests, as far as it is known.
    fn free(&self) -> Option<Bytes> {
        let capacity = self.requests.capacity?;
        let requested = self.requests.pods.values().map(|pod| pod.requested);
        let requested = requested.fold(Bytes::ZERO, Bytes::plus);
        let asked = self
            .requests
            .known
            .values()
            .filter(|known| known.asked.is_some());
        let (more, less) = asked.fold((Bytes::ZERO, Bytes::ZERO), |(more, less), known| {
            let (to, from) = (known.request(), known.wish.request);
            (more.plus(to.minus(from)), less.plus(from.minus(to)))
        });
        Some(capacity.plus(less).minus(requested.plus(more)))
    }

    /// Gives back what there is room for, and tells what there is none for. While pods wait, only to those of a priority as high.
    pub(super) fn give_back_requests(&mut self, waiting: Option<i32>) {
        let known = self.requests.known.iter();
        let lowered = known.filter(|(key, known)| {
            let pod = self.requests.pods.get(&key.0);
            let is_put_off = pod.is_none_or(|pod| pod.put_off.is_some());
            let is_behind = waiting.is_some_and(|waiting| waiting > known.wish.priority);
            // That there is no room needs no trial.
            let is_vain = self.requests.capacity.is_none() && self.is_lent(known);
            let is_any = known.request() < known.wanted();
            is_any && known.is_free() && !is_put_off && !is_behind && !is_vain
        });
        let lowered: Vec<Lowered<Key>> = lowered
            .map(|(key, known)| Lowered {
                key: key.clone(),
                priority: known.wish.priority,
                request: known.request(),
                wanted: known.wanted(),
            })
            .collect();
        self.forgive_debts();
        // Without the kubelet's word it is tried.
        let free = self.free().unwrap_or(Bytes(u64::MAX));
        let changes = give_back(free, &lowered);
        for own in &lowered {
            let given = changes.iter().find(|change| change.key == own.key);
            let owed = own
                .wanted
                .minus(given.map_or(own.request, |change| change.to));
            let is_lent = self
                .requests
                .known
                .get(&own.key)
                .is_some_and(|known| self.is_lent(known));
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

    /// Whether somebody has what a container has lent.
    fn is_lent(&self, known: &KnownRequest) -> bool {
        let has = |loan: &Loan| {
            let borrower = self.requests.pods.get(&loan.uid);
            borrower.is_some_and(|pod| pod.requested > loan.before)
        };
        known.loans.iter().any(has)
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
            self.owe(key, missing);
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
        if !write(&record) {
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

#[cfg(test)]
mod tests {
    use bellows_core::Nanos;

    use super::*;

    fn request(from: u64, to: u64, why: RequestWhy) -> Record {
        Record::Request {
            at: Nanos(1),
            cgroup: CgroupId(7),
            name: "dev/filler/app".to_owned(),
            from: Bytes::mib(from),
            to: Bytes::mib(to),
            why,
        }
    }

    fn lent(uid: &str) -> RequestWhy {
        RequestWhy::Lent {
            to: format!("dev/{uid}"),
            uid: uid.to_owned(),
            before: Bytes::mib(64),
            short: Bytes::mib(100),
        }
    }

    /// The next agent knows to whom something was lent, until all of it is back.
    #[test]
    fn what_was_lent_outlives_the_agent() {
        let borrowers = |records: &[Record]| {
            let own = left(records).remove(&CgroupId(7)).unwrap_or_default();
            own.into_iter().map(|loan| loan.uid).collect::<Vec<_>>()
        };
        let first = request(400, 300, lent("a"));
        let second = request(300, 250, lent("b"));
        let part = request(250, 350, RequestWhy::GivenBack);
        let all = request(350, 400, RequestWhy::GivenBack);
        let records = [first, second, part, all];
        assert_eq!(borrowers(&records[..1]), ["a"]);
        assert_eq!(borrowers(&records[..2]), ["a", "b"]);
        assert_eq!(borrowers(&records[..3]), ["a", "b"]);
        assert!(borrowers(&records).is_empty());
        assert!(borrowers(&[]).is_empty());
    }
}
