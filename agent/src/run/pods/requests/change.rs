//! A request is asked for: what is written down before, how the API answers, and how soon it is asked again.
//!
//! What is asked for counts from then on, with what its namespace allows, too, and is room again if it is refused. What cannot
//! be written down is not asked for.
//!
//! Each failure makes the next one rarer, and a refusal as such rarer still. What the kubelet puts off is another matter: all
//! else of its pod is put off with it, so how often it was asked for in vain says nothing of how soon it is taken back.
//!
//! It must not decide who gets what, nor have the watch wait for an answer.

use std::time::Duration;

use bellows_core::{Bytes, allowance::What, bucket::Urgency, requests::RequestWhy};
use tokio::time::Instant;

use super::{
    Key, News, Watch,
    known::{Asked, KnownRequest},
    loans::Loan,
};
use crate::{
    actuate::{
        allowances::SharedAllowances,
        requests::{NotChanged, RequestChange},
        resize::Order,
    },
    clock::now,
    explain::told_request,
    ledger::Record,
};

/// How soon what was refused or not answered is tried again; each time twice as late, so many times.
pub(super) const AGAIN: Duration = Duration::from_secs(5);
const MOST_DOUBLED: u32 = 6;
/// The same of what is refused as such.
pub(super) const REFUSED: Duration = Duration::from_secs(600);
/// At last what the kubelet puts off is taken back no more seldom than this: all else of its pod is put off with it, a
/// burst's raise, too.
const TAKEN_BACK_AGAIN: Duration = Duration::from_secs(10);
/// The same of what is refused as such: it would be again, and each time take what others need to ask.
const TAKING_BACK_REFUSED: Duration = Duration::from_secs(60);

/// A change has ended.
pub(in crate::run::pods) struct Done {
    pub(super) key: Key,
    pub(super) to: Bytes,
    pub(super) why: RequestWhy,
    pub(super) result: Result<(), NotChanged>,
}

impl Watch {
    /// Asks for a request, beside whatever goes on.
    pub(super) fn change_request(&mut self, key: &Key, to: Bytes, why: RequestWhy) {
        let Some(known) = self.requests.known.get(key) else {
            return;
        };
        let record = Record::Request {
            at: now(),
            cgroup: known.cgroup.id(),
            uid: key.0.clone(),
            name: known.name.clone(),
            from: known.wish.request,
            to,
            why: why.clone(),
        };
        let is_written = self.requests.write(&record);
        let Some(known) = self.requests.known.get_mut(key) else {
            return;
        };
        if !is_written {
            known.failed(&why, true);
            return;
        }
        known.asked = Some(Asked { to, taken: None });
        let allowances = self.context.resizer.allowances();
        allowances.ask_request((&key.0, &key.1), to);
        // Somebody waits for room, or all else of the pod for this.
        let is_urgent = matches!(why, RequestWhy::Lent { .. }) || why.takes_back();
        let change = RequestChange {
            namespace: known.namespace.clone(),
            name: known.pod.clone(),
            uid: key.0.clone(),
            index: known.wish.index,
            from: known.wish.request_text.clone(),
            to: known.text(to),
            is_reported: known.is_reported,
            order: Order::clone(&known.order),
            urgency: if is_urgent {
                Urgency::Urgent
            } else {
                Urgency::Later
            },
        };
        let (resizer, done) = (self.context.requests.clone(), self.requests.done.clone());
        let key = key.clone();
        drop(tokio::spawn(async move {
            let result = resizer.change(change).await;
            // A watch that has ended asks for nothing more.
            drop(done.send(News::Changed(Done {
                key,
                to,
                why,
                result,
            })));
        }));
    }

    /// A change has ended.
    pub(super) fn request_changed(&mut self, done: Done) {
        // Of one that is not known any more, too.
        done.settle(self.context.resizer.allowances());
        let Done {
            key,
            to,
            why,
            result,
        } = done;
        let Some(known) = self.requests.known.get_mut(&key) else {
            return;
        };
        match result {
            Ok(()) => {
                let is_up = to > known.wish.request;
                known.took(to, &why);
                let note = format!("container {}: request {to}: {}", key.1, told_request(&why));
                let reason = if is_up {
                    "RequestRaised"
                } else {
                    "RequestLowered"
                };
                if let Some(pod) = self.pods.get(&key.0) {
                    self.events.told(pod, reason, note);
                }
                self.settle_debt(&key, &why);
            }
            Err(NotChanged {
                why: not,
                is_passing,
            }) => {
                known.failed(&why, is_passing);
                let why = not;
                tracing::warn!(container = known.name, %to, why, "a request is not changed");
                let cgroup = known.cgroup.id();
                let record = Record::RequestFailed {
                    at: now(),
                    cgroup,
                    to,
                    why: why.clone(),
                };
                self.requests.write(&record);
                if let Some(pod) = self.pods.get(&key.0).cloned()
                    && !is_passing
                {
                    self.refuse_request(&key, &pod, "RequestRefused", why);
                }
            }
        }
    }
}

impl Done {
    /// What was not taken is room again.
    pub(super) fn settle(&self, allowances: &SharedAllowances) {
        if let Err(not) = &self.result {
            let own = (self.key.0.as_str(), self.key.1.as_str());
            allowances.refused(own, What::MemoryRequest, self.to.0, not.is_passing);
        }
    }
}

impl KnownRequest {
    /// It was not changed, for the time being or as such.
    pub(super) fn failed(&mut self, why: &RequestWhy, is_passing: bool) {
        self.asked = None;
        if why.takes_back() {
            let wait = if is_passing {
                (AGAIN * (1 << self.not_taken_back.min(MOST_DOUBLED))).min(TAKEN_BACK_AGAIN)
            } else {
                TAKING_BACK_REFUSED
            };
            self.not_taken_back += 1;
            self.not_taken_back_before = Some(Instant::now() + wait);
        }
        let wait = if is_passing {
            AGAIN * (1 << self.failures.min(MOST_DOUBLED))
        } else {
            REFUSED
        };
        self.failures += 1;
        self.not_before = Some(Instant::now() + wait);
    }

    /// The API has taken a request.
    pub(super) fn took(&mut self, to: Bytes, why: &RequestWhy) {
        self.asked = Some(Asked {
            to,
            taken: Some(Instant::now()),
        });
        self.not_allotted = (!why.takes_back()).then_some(to);
        self.failures = 0;
        (self.not_taken_back, self.not_taken_back_before) = (0, None);
        if self.wish.request == to {
            // Seen before it was answered.
            self.asked = None;
        }
        if let RequestWhy::Lent { .. } = why {
            self.loans.extend(Loan::of(why, Instant::now()));
        }
        self.settle();
    }
}
