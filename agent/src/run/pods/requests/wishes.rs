//! What policies say of the requests of a pod's containers, and what those were before.
//!
//! A request is moved only once what it was is on the pod: that is written when its container is met, not when somebody waits
//! for room. An API that refuses it as such is not asked again soon, and the request is left alone.
//!
//! Where no policy asks for it any more, or this agent is not to move any, a request that was lowered is still followed, to
//! be asked for as it was. Whoever is left alone is told why, once.
//!
//! It must not ask for a request, nor follow one by a list of policies that is not whole.

use std::time::Duration;

use bellows_core::{
    Bytes,
    pod::{self, Level, RequestWish, RequestWishes},
};
use tokio::time::Instant;

use super::{Key, Watch, change::REFUSED, known::KnownRequest, recent::Recent};
use crate::{
    attribution::api::Pod,
    cgroup::Cgroup,
    run::pods::{one, record::Place},
};

/// What is told of a pod whose policy asks for what this agent is not to do.
const NOT_ENABLED: &str = "its policy has memory.requests, and this agent may not change requests: set requests.enabled of the chart (--requests), or take that out of the policy";

impl Watch {
    /// Follows what policies say of the requests of a pod's containers.
    pub(in crate::run::pods) fn follow_requests(&mut self, pod: &Pod, seen: &pod::Pod) {
        let uid = seen.uid.clone();
        if !self.policies.are_known(&seen.namespace) || self.context.only_observes {
            return;
        }
        let wishes = self.request_wishes(pod, seen);
        let known = self.requests.known.range((uid.clone(), String::new())..);
        let known = known.take_while(|((own, _), _)| *own == uid);
        let others: Vec<Key> = known
            .filter(|((_, name), _)| !matches!(wishes.get(name), Some(Ok(_))))
            .map(|(key, _)| key.clone())
            .collect();
        for key in others {
            self.requests.forget(&key);
        }
        for (name, wish) in wishes {
            let key = (uid.clone(), name);
            match wish {
                Ok(wish) => {
                    if let Err(error) = self.follow_request(&key, pod, seen, wish) {
                        tracing::warn!(pod.namespace = seen.namespace, pod.name = seen.name, container = key.1, %error, "a container's request is not followed");
                        self.pending.insert(uid.clone());
                    }
                }
                Err(refusal) => {
                    self.refuse_request(&key, pod, refusal.reason(), refusal.to_string());
                }
            }
        }
    }

    /// What the requests of a pod may become. Where none may be moved, what was lowered is asked for as it was: that may be
    /// refused, too.
    fn request_wishes(&mut self, pod: &Pod, seen: &pod::Pod) -> RequestWishes {
        let mut wishes = pod::request_wishes(seen, self.policies.all());
        if self.context.moves_requests {
            let claims = |container: &str| self.claims(pod, container);
            let told = pod::yield_requests(&mut wishes, claims);
            for (container, refusal) in told {
                let key = (seen.uid.clone(), container);
                self.refuse_request(&key, pod, refusal.reason(), refusal.to_string());
            }
            return wishes;
        }
        let is_asked = |wish: &RequestWish| wish.rules.is_some();
        if wishes.values().flatten().any(is_asked) {
            let key = (seen.uid.clone(), String::new());
            self.refuse_request(&key, pod, "RequestsNotEnabled", NOT_ENABLED.to_owned());
        }
        pod::request_wishes(seen, &[])
    }

    /// A LimitRange may allow no smaller request, or a limit so many times the request: that is not lowered beyond what the
    /// limit may come to need.
    fn keep_allowed(&self, key: &Key, wish: &mut RequestWish) {
        let Some(rules) = &mut wish.rules else {
            return;
        };
        let policy = self.known.get(key).and_then(|known| known.policy);
        let ceiling = policy.map_or(Bytes::ZERO, |policy| policy.ceiling);
        let allowances = self.context.resizer.allowances();
        let least = allowances.least_request((&key.0, &key.1), ceiling);
        rules.floor = rules.floor.max(least);
    }

    /// Tells why a container's request is left alone, once.
    pub(super) fn refuse_request(&mut self, key: &Key, pod: &Pod, reason: &str, why: String) {
        if self.requests.refused.get(key) != Some(&why) {
            self.events.refused(pod, reason, why.clone());
            self.requests.refused.insert(key.clone(), why);
        }
    }

    fn follow_request(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        mut wish: RequestWish,
    ) -> Result<(), String> {
        let container = seen.containers.get(wish.index);
        let is_reported = container.is_some_and(|container| container.reports_resources);
        if wish.id.is_none() {
            return Ok(());
        }
        self.keep_allowed(key, &mut wish);
        if !wish.recorded && wish.rules.is_some() {
            self.record_request(key, pod, seen, &wish);
            // What somebody else has set is followed at once, and not changed before it is on the pod.
            if !wish.foreign {
                return Ok(());
            }
        }
        let known = self.requests.known.get(key);
        let is_seen = known.is_some_and(|known| known.has_seen(&wish));
        let theirs = (wish.foreign && !is_seen).then_some(wish.original);
        match self.requests.known.get_mut(key) {
            Some(known) if known.wish.id == wish.id => known.follow(wish, is_reported),
            _ => self.adopt_request(key, seen, wish, is_reported)?,
        }
        if let Some(theirs) = theirs {
            let note = format!(
                "container {}: the memory request was changed to {theirs} by somebody else, which is the new original",
                key.1
            );
            self.events.guarded(pod, note);
        }
        Ok(())
    }

    /// Has a request as it was written onto the pod, unless that was refused as such, which is not tried again soon.
    fn record_request(&mut self, key: &Key, pod: &Pod, seen: &pod::Pod, wish: &RequestWish) {
        let again = self.requests.unrecorded.get(key);
        if again.is_some_and(|&at| Instant::now() < at) {
            return;
        }
        let place = Place::Request(wish.index);
        self.record_beside(key, pod, seen, place, &wish.original_text);
    }

    /// What a request was the API does not take: it is not asked again soon.
    pub(in crate::run::pods) fn request_not_recorded(&mut self, key: &Key, pod: &Pod, why: String) {
        let at = Instant::now() + REFUSED;
        self.requests.unrecorded.insert(key.clone(), at);
        self.refuse_request(key, pod, "RequestRefused", why);
    }

    fn adopt_request(
        &mut self,
        key: &Key,
        seen: &pod::Pod,
        wish: RequestWish,
        is_reported: bool,
    ) -> Result<(), String> {
        let path = one::find(&seen.uid, Level::Container(wish.index), wish.id.as_deref());
        let path = path.ok_or("it has no cgroup yet")?;
        let cgroup = Cgroup::open(&path).map_err(|error| error.to_string())?;
        let order = self.order(&seen.uid);
        let name = format!("{}/{}/{}", seen.namespace, seen.name, key.1);
        if let Some(known) = self.requests.known.get_mut(key) {
            tracing::info!(container = name, "it was started again");
            known.is_started_again(wish, cgroup, is_reported);
            return Ok(());
        }
        let loans = self.requests.before.remove(&(key.0.clone(), name.clone()));
        let mut known = KnownRequest {
            name,
            namespace: seen.namespace.clone(),
            pod: seen.name.clone(),
            loans: loans.filter(|_| !wish.foreign).unwrap_or_default(),
            wish,
            is_reported,
            cgroup,
            order,
            since: Instant::now(),
            peak: Bytes::ZERO,
            recent: Recent::default(),
            asked: None,
            not_allotted: None,
            owed: Bytes::ZERO,
            not_before: None,
            failures: 0,
            not_taken_back_before: None,
            not_taken_back: 0,
            backoff: Duration::ZERO,
        };
        known.settle();
        known.sample();
        tracing::info!(container = known.name, request = %known.wish.request, original = %known.wish.original, "its request may be moved");
        self.requests.known.insert(key.clone(), known);
        Ok(())
    }
}
