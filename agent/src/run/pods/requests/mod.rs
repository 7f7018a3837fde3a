//! The memory requests of this node's pods: what is recorded of them, what their containers use, what is asked of the API.
//!
//! Who is lowered and who gets something back is decided in core (`requests`); [`room`] and [`debts`] look whom that concerns
//! now, by what is [`known`] of containers and summed up ([`summary`]) of pods. What a request was is written onto the pod when
//! its container is met ([`wishes`]), so that nothing but the resize itself is left to do when somebody waits for room. Every
//! [`change`] is in a ledger before it is asked for, and by it the next agent knows to whom something was lent ([`loans`]). A
//! container that is started again is the same to it.
//!
//! A resize that the kubelet puts off keeps all else of the pod from being resized, its memory limit too: a request that
//! does not come back at once is taken back, and owed. While a limit of the pod is being raised, or somebody in it grows, no
//! request is: that resize would wait with this one.
//!
//! It must not move a limit.

mod change;
mod debts;
mod known;
mod loans;
mod recent;
mod room;
mod summary;
mod wishes;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId,
    requests::{RequestWhy, right_size},
};
use tokio::{sync::mpsc::UnboundedSender, time::Instant};

use super::{Key, Watch};
use crate::ledger;
use change::Done;
use known::KnownRequest;
use loans::{Loan, Owner, capacity, loans, read};
use room::Served;
use summary::Summary;

/// How often it is looked what containers use.
pub(super) const SAMPLE: Duration = Duration::from_secs(5);

/// All that is known of requests.
pub(super) struct Requests {
    /// The ledger of requests.
    path: PathBuf,
    known: BTreeMap<Key, KnownRequest>,
    pods: BTreeMap<String, Summary>,
    /// Why a container's request is left alone, as it was told; without a container's name, those of a pod.
    refused: BTreeMap<Key, String>,
    /// When what was to be recorded on a pod, and was refused, is tried again.
    unrecorded: BTreeMap<Key, Instant>,
    /// What was last done for each pod that waits for room, by its uid.
    served: BTreeMap<String, Served>,
    /// What the node has for pods, as the kubelet has said, and when that was.
    capacity: Option<(Bytes, Instant)>,
    /// What was lent before this agent began.
    before: BTreeMap<Owner, Vec<Loan>>,
    /// While it is looked what containers use.
    is_sampling: bool,
    done: UnboundedSender<News>,
    /// What all are owed, bytes.
    all_owed: Arc<AtomicU64>,
}

/// What was begun beside the watch has come to an end.
pub(super) enum News {
    /// A change.
    Changed(Done),
    /// A look at what containers use, by their cgroups.
    Used(Vec<(Key, CgroupId, Bytes)>),
}

impl Requests {
    pub(super) fn new(
        ledger: &Path,
        done: UnboundedSender<News>,
        all_owed: Arc<AtomicU64>,
    ) -> Self {
        let path = ledger::requests(ledger);
        let records = read(&path);
        Self {
            known: BTreeMap::new(),
            pods: BTreeMap::new(),
            refused: BTreeMap::new(),
            unrecorded: BTreeMap::new(),
            served: BTreeMap::new(),
            capacity: capacity(&records).map(|capacity| (capacity, Instant::now())),
            before: loans(&records),
            path,
            is_sampling: false,
            done,
            all_owed,
        }
    }

    /// Sums up what is owed.
    fn sum_up(&self) {
        let owed = self.known.values().map(|known| known.owed);
        let owed = owed.fold(Bytes::ZERO, Bytes::plus);
        self.all_owed.store(owed.0, Ordering::Relaxed);
    }

    /// Whether anybody's request may be moved.
    pub(super) fn is_any(&self) -> bool {
        !self.known.is_empty()
    }

    /// All of this node's pods were listed: what others have lent nobody gets back.
    pub(super) fn keep_only(&mut self, listed: &[String]) {
        self.before.retain(|(uid, _), _| listed.contains(uid));
    }

    fn forget(&mut self, key: &Key) {
        self.known.remove(key);
    }

    pub(super) fn forget_pod(&mut self, uid: &str) {
        self.before.retain(|(own, _), _| own != uid);
        self.known.retain(|(own, _), _| own != uid);
        self.refused.retain(|(own, _), _| own != uid);
        self.unrecorded.retain(|(own, _), _| own != uid);
        self.served.remove(uid);
        if self.pods.remove(uid).is_some() {
            self.try_again();
        }
    }

    /// Somebody has given something up: what could not be had back may be there now.
    fn try_again(&mut self) {
        let mut known = self.known.values_mut();
        for known in known
            .by_ref()
            .filter(|known| known.backoff > Duration::ZERO)
        {
            known.not_before = None;
        }
    }
}

impl Watch {
    /// Does what is to be done now. Nothing is before it is known whose requests may be moved at all.
    pub(super) fn step_requests(&mut self) {
        let is_known = self.is_listed && !self.autoscalers.are_awaited();
        if !is_known || !self.requests.is_any() {
            return self.requests.sum_up();
        }
        self.take_back_put_off();
        let waiting = self.waiting();
        for waits in &waiting {
            self.make_room_for(waits);
        }
        self.right_size();
        let served = waiting.iter().filter(|waits| self.is_served(waits));
        let highest = served.map(|waits| waits.priority).max();
        self.give_back_requests(highest);
        self.requests.sum_up();
    }

    fn right_size(&mut self) {
        let changes = self.requests.known.iter().filter_map(|(key, known)| {
            let rules = known.wish.rules.filter(|rules| rules.right_size)?;
            let pod = self.requests.pods.get(&key.0)?;
            let may = known.is_free() && pod.put_off.is_none() && known.loans.is_empty();
            let (original, request) = (known.wish.original, known.request());
            let to = right_size(&rules, original, request, known.observed()).filter(|_| may)?;
            // Back up by what there is room for.
            let why = RequestWhy::RightSized { peak: known.peak };
            (to < request).then(|| (key.clone(), to, why))
        });
        for (key, to, why) in changes.collect::<Vec<_>>() {
            self.change_request(&key, to, why);
        }
    }

    /// Takes what has come of what was begun.
    pub(super) fn take_request_news(&mut self, news: News) {
        match news {
            News::Changed(done) => self.request_changed(done),
            News::Used(used) => self.requests.sampled(used),
        }
        self.step_requests();
    }
}

#[cfg(test)]
mod tests;
