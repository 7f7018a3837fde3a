//! A container whose request may be moved: what it is to have, what it has, and what it uses.
//!
//! What its request is depends on who is asked: the spec, the kubelet, which may not have followed yet, and what was asked for
//! a moment ago. Whoever decides takes the answer from here, so that all decide by the same one. A container that is started
//! again is the same: it has lent and used what it had lent and used before, and only its cgroup is another.
//!
//! What it uses is known from looks beside the watch; it is looked at anew only where a decision is about to be taken by it.
//!
//! It must not ask for anything, nor forget what was lent before it is back.

use std::{collections::BTreeSet, time::Duration};

use bellows_core::{
    Bytes, CgroupId, Nanos,
    pod::{PutOff, RequestWish},
    quantity,
    requests::Observed,
};
use tokio::time::Instant;

use super::{Key, News, Requests, loans::Loan, recent::Recent};
use crate::{actuate::resize::Order, cgroup::Cgroup};

/// What the API says within this time of our own change may be older than that.
const OLD: Duration = Duration::from_secs(5);

/// A container whose request may be moved.
pub(super) struct KnownRequest {
    pub(super) wish: RequestWish,
    /// Whether the kubelet says what resources it has.
    pub(super) is_reported: bool,
    pub(super) cgroup: Cgroup,
    /// For people.
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) order: Order,
    /// Since when it is watched, and the most that it has used since.
    pub(super) since: Instant,
    pub(super) peak: Bytes,
    pub(super) recent: Recent,
    /// What was asked for and is not seen yet.
    pub(super) asked: Option<Asked>,
    /// What the API took last, until the kubelet has allotted it; nothing of what was taken back.
    pub(super) not_allotted: Option<Bytes>,
    pub(super) loans: Vec<Loan>,
    /// What it is owed, as it was told.
    pub(super) owed: Bytes,
    /// It is not asked for again before.
    pub(super) not_before: Option<Instant>,
    /// How often, one after the other, it was not answered or refused for a while.
    pub(super) failures: u32,
    /// The same of what the kubelet puts off: it is not taken back before, and how often that failed. What failed on its
    /// way up says nothing of that: the API may have taken it without an answer.
    pub(super) not_taken_back_before: Option<Instant>,
    pub(super) not_taken_back: u32,
    /// How long it was waited the last time that what it was could not be had.
    pub(super) backoff: Duration,
}

#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) to: Bytes,
    /// When the API took it.
    pub(super) taken: Option<Instant>,
}

impl Requests {
    /// Has it looked what containers use, beside the watch: the kernel sums up all that all CPUs have charged to answer
    /// (`cgroup_rstat_flush` under `memory.stat`), which takes milliseconds each on a large node.
    pub(in crate::run::pods) fn sample(&mut self) {
        if self.is_sampling {
            return;
        }
        self.is_sampling = true;
        let known = self.known.iter();
        let known: Vec<(Key, Cgroup)> = known
            .map(|(key, known)| (key.clone(), known.cgroup.clone()))
            .collect();
        let done = self.done.clone();
        drop(tokio::task::spawn_blocking(move || {
            // Nothing is known of one that is gone or about to be started again.
            let used = known.into_iter().filter_map(|(key, cgroup)| {
                let used = cgroup.working_set().ok()?;
                Some((key, cgroup.id(), used))
            });
            drop(done.send(News::Used(used.collect())));
        }));
    }

    pub(super) fn sampled(&mut self, used: Vec<(Key, CgroupId, Bytes)>) {
        self.is_sampling = false;
        for (key, cgroup, used) in used {
            let known = self.known.get_mut(&key);
            if let Some(known) = known.filter(|known| known.cgroup.id() == cgroup) {
                known.saw(used);
            }
        }
    }

    /// Pods in which somebody grows, of those that are looked at.
    pub(super) fn growing(&self) -> BTreeSet<String> {
        let known = self.known.iter();
        let growing = known.filter(|(_, known)| known.recent.is_growing());
        growing.map(|((uid, _), _)| uid.clone()).collect()
    }
}

impl KnownRequest {
    /// Nothing is known of one that is gone or about to be started again.
    pub(super) fn sample(&mut self) {
        if let Ok(used) = self.cgroup.working_set() {
            self.saw(used);
        }
    }

    pub(super) fn saw(&mut self, used: Bytes) {
        self.peak = self.peak.max(used);
        self.recent.saw(used);
    }

    /// What it has used of late, by what was seen of it last; `None` if nothing was.
    pub(super) fn used(&self) -> Option<Bytes> {
        self.recent.is_any().then(|| self.recent.peak())
    }

    /// What it uses, or has used of late; `None` of one that is gone or about to be started again.
    pub(super) fn uses(&self) -> Option<Bytes> {
        let used = self.cgroup.working_set().ok()?;
        Some(used.max(self.recent.peak()))
    }

    /// What the kubelet has allotted to it, where it says that.
    pub(super) fn allotted(&self) -> Option<Bytes> {
        quantity::parse(self.wish.allotted.as_deref()?).ok()
    }

    /// Whether a change of ours is under way.
    pub(super) fn is_moved_by_us(&self) -> bool {
        let is_taken = self.allotted().is_none_or(|own| own == self.wish.request);
        self.asked.is_some() || self.wish.is_ours && !is_taken
    }

    /// Its request: what the spec says, or will say.
    pub(super) fn request(&self) -> Bytes {
        self.asked.map_or(self.wish.request, |asked| asked.to)
    }

    pub(super) fn observed(&self) -> Observed {
        let time = u64::try_from(self.since.elapsed().as_nanos());
        Observed {
            time: Nanos(time.unwrap_or(u64::MAX)),
            peak: self.peak,
        }
    }

    /// What its request is to be when nobody waits for room.
    pub(super) fn wanted(&self) -> Bytes {
        let RequestWish {
            original, rules, ..
        } = self.wish;
        let Some(rules) = rules.filter(|rules| rules.right_size) else {
            return original;
        };
        let used = rules.least(self.peak);
        if self.observed().time >= rules.observe {
            used.min(original)
        } else if self.loans.is_empty() {
            // What a predecessor has seen is not known better yet.
            used.max(self.request()).min(original)
        } else {
            original
        }
    }

    /// Whether it may be asked for a change now.
    pub(super) fn is_free(&self) -> bool {
        self.wish.recorded && self.asked.is_none() && !self.is_too_soon()
    }

    /// Whether it was refused a moment ago.
    pub(super) fn is_too_soon(&self) -> bool {
        self.not_before.is_some_and(|at| Instant::now() < at)
    }

    /// What to take back of what the kubelet puts off: to what it has allotted.
    pub(super) fn to_take_back(&self, put_off: &PutOff) -> Option<Bytes> {
        let is_too_soon = self
            .not_taken_back_before
            .is_some_and(|at| Instant::now() < at);
        let is_meant = self.asked.is_none() && put_off.is_current && self.is_moved_by_us();
        self.allotted().filter(|_| is_meant && !is_too_soon)
    }

    pub(super) fn text(&self, to: Bytes) -> String {
        if to == self.wish.original {
            self.wish.original_text.clone()
        } else {
            quantity::format(to)
        }
    }

    /// Whether this is what somebody else had set when it was seen last.
    pub(super) fn has_seen(&self, wish: &RequestWish) -> bool {
        self.wish.foreign && self.wish.request_text == wish.request_text
    }

    /// Takes over what the API says.
    pub(super) fn follow(&mut self, wish: RequestWish, is_reported: bool) {
        self.is_reported = is_reported;
        if wish.foreign {
            // What was lent is lost with what it was a part of.
            self.loans.clear();
        }
        self.asked.take_if(|asked| {
            asked
                .taken
                .is_some_and(|at| wish.request == asked.to || wish.foreign || at.elapsed() > OLD)
        });
        self.wish = wish;
        self.settle();
    }

    /// Its container was started again: what it has lent and used before is still its own.
    pub(super) fn is_started_again(
        &mut self,
        wish: RequestWish,
        cgroup: Cgroup,
        is_reported: bool,
    ) {
        self.cgroup = cgroup;
        self.follow(wish, is_reported);
        self.sample();
    }

    /// What was lent is back, and what could not be had can be, once the kubelet has allotted it: what the API takes it may
    /// yet put off. Where it does not say that, what the API has taken counts.
    pub(super) fn settle(&mut self) {
        let is_whole = self.request() >= self.wanted();
        let has = self.allotted().unwrap_or_else(|| self.request());
        if self.not_allotted.take_if(|taken| *taken == has).is_some() {
            self.backoff = Duration::ZERO;
        }
        if is_whole && has >= self.request() {
            self.loans.clear();
        }
    }
}
