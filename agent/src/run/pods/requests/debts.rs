//! Who gets back what was lowered or lent, and what is owed for want of room.
//!
//! Until a waiting pod has what it wants the scheduler counts that, so what is lowered for it is not free to others. What it
//! gives up later is: whoever has lent it asks for it at the same moment as the scheduler places a pod there. What that has
//! taken is owed, and so is what a quota does not allow. What somebody still has who borrowed it is not.
//!
//! A request that does not come back at once is taken back: the kubelet would put off all else of its pod with it. What it
//! will never carry out is not asked for again soon. Whoever grows, or has a burst's resize under way, is not asked for
//! meanwhile, for the same reason.
//!
//! It must not lower a request below what the kubelet has allotted, nor let those wait longer who wait with a higher priority.

use std::time::Duration;

use bellows_core::{
    Bytes,
    requests::{Change, Lowered, RequestWhy, give_back, shortage},
};
use tokio::time::Instant;

use super::{KnownRequest, Requests, Watch, change::REFUSED, loans::Loan, summary::Summary};
use crate::{
    clock::now,
    explain::{told_owed, told_request},
    ledger::Record,
    run::pods::Key,
};

/// How soon what could not be had back is tried again, and how seldom at last.
const BACKOFF: Duration = Duration::from_secs(30);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// Pods that are named as those that use what is owed.
const USERS: usize = 3;

impl Requests {
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
    pub(super) fn given_back(&self, lowered: &[Lowered<Key>], now: Instant) -> Vec<Change<Key>> {
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
    /// Takes back what the kubelet puts off of ours: it would put off all else of the pod.
    pub(super) fn take_back_put_off(&mut self) {
        let known = self.requests.known.iter();
        let put_off = known.filter_map(|(key, known)| {
            let put_off = self.requests.pods.get(&key.0)?.put_off.as_ref()?;
            let allotted = known.to_take_back(put_off)?;
            Some((key.clone(), allotted, put_off.clone()))
        });
        for (key, allotted, put_off) in put_off.collect::<Vec<_>>() {
            if let Some(shortage) = shortage(&put_off.message) {
                self.requests.capacity_is(shortage.capacity);
            }
            let why = if put_off.is_infeasible {
                RequestWhy::Infeasible {
                    message: put_off.message,
                }
            } else {
                RequestWhy::NoRoom
            };
            self.change_request(&key, allotted, why);
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
        let wait = if let RequestWhy::Infeasible { .. } = why {
            // What others give up changes nothing about that.
            known.backoff = Duration::ZERO;
            REFUSED
        } else if why.takes_back() {
            known.backoff = (known.backoff * 2).clamp(BACKOFF, LONGEST_BACKOFF);
            known.backoff
        } else {
            if missing == Bytes::ZERO {
                self.owe(key, Bytes::ZERO);
            }
            return;
        };
        known.not_before = Some(Instant::now() + wait);
        let known = self.requests.known.get(key);
        let is_lent = known.is_some_and(|known| self.requests.is_lent(known));
        self.owe(key, if is_lent { Bytes::ZERO } else { missing });
        if let RequestWhy::Infeasible { .. } = why
            && let Some(pod) = self.pods.get(&key.0).cloned()
        {
            let note = format!("container {}: {}", key.1, told_request(why));
            self.refuse_request(key, &pod, "RequestRefused", note);
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

impl KnownRequest {
    /// Whether it waits until pods of this priority have room.
    fn is_behind(&self, waiting: Option<i32>) -> bool {
        self.wish.rules.is_some() && waiting.is_some_and(|waiting| waiting > self.wish.priority)
    }
}

#[cfg(test)]
mod tests;
