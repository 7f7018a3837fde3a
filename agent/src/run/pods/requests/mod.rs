//! The memory requests of this node's pods: what is recorded of them, what their containers use, what is asked of the API.
//!
//! Who is lowered and who gets something back is decided in core (`requests`); [`room`] looks whom that concerns now. What a
//! request was is written onto the pod when its container is met, so that nothing but the resize itself is left to do when
//! somebody waits for room. Every change is in the ledger before it is asked for, and by it the next agent knows to whom
//! something was lent.
//!
//! A resize that the kubelet puts off keeps all else of the pod from being resized, its memory limit too: a request that
//! does not come back at once is taken back, and owed.
//!
//! It must not move a limit.

mod room;

use std::{collections::BTreeMap, path::Path, time::Duration};

use bellows_core::{
    Bytes, CgroupId, Nanos,
    bucket::Urgency,
    pod::{self, Level, ORIGINAL_REQUESTS, PutOff, RequestWish, RequestWishes},
    quantity,
    requests::{Observed, RequestWhy, right_size},
};
use tokio::{sync::mpsc::UnboundedSender, time::Instant};

use super::{Key, Watch, one};
use crate::{
    actuate::{
        requests::{NotChanged, RequestChange},
        resize::Order,
    },
    attribution::api::Pod,
    cgroup::Cgroup,
    clock::now,
    explain::{LEDGER, told_request},
    ledger::{self, Ledger, Record},
};
use room::{Loan, Served, loans};

/// How often it is looked what containers use.
pub(super) const SAMPLE: Duration = Duration::from_secs(5);
/// What the API says within this time of our own change may be older than that.
const OLD: Duration = Duration::from_secs(5);
/// How soon what was refused or not answered is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// The same of what is refused as such.
const REFUSED: Duration = Duration::from_secs(600);
/// What is told of a pod whose policy asks for what this agent is not to do.
const NOT_ENABLED: &str = "its policy has memory.requests, and this agent may not change requests: set requests.enabled of the chart (--requests), or take that out of the policy";

/// All that is known of requests.
pub(super) struct Requests {
    known: BTreeMap<Key, KnownRequest>,
    pods: BTreeMap<String, Summary>,
    /// Why a container's request is left alone, as it was told; without a container's name, those of a pod.
    refused: BTreeMap<Key, String>,
    /// When what was to be recorded on a pod, and was refused, is tried again.
    unrecorded: BTreeMap<Key, Instant>,
    /// What was last done for each pod that waits for room, by its uid.
    served: BTreeMap<String, Served>,
    /// What the node has for pods, as the kubelet has said.
    capacity: Option<Bytes>,
    /// What was lent before this agent began.
    before: BTreeMap<CgroupId, Vec<Loan>>,
    done: UnboundedSender<Done>,
}

/// A pod, as far as others' requests are concerned.
struct Summary {
    /// For people.
    name: String,
    priority: i32,
    requested: Bytes,
    /// What the kubelet has allotted to its containers; what they request where it does not say.
    allotted: Bytes,
    put_off: Option<PutOff>,
    /// When it was first seen.
    arrived: Instant,
}

/// A container whose request may be moved.
struct KnownRequest {
    wish: RequestWish,
    /// Whether the kubelet says what resources it has.
    is_reported: bool,
    cgroup: Cgroup,
    /// For people.
    name: String,
    namespace: String,
    pod: String,
    order: Order,
    /// Since when it is watched, and the most that it has used since.
    since: Instant,
    peak: Bytes,
    /// What was asked for and is not seen yet.
    asked: Option<Asked>,
    loans: Vec<Loan>,
    /// What it is owed, as it was told.
    owed: Bytes,
    /// It is not asked for again before.
    not_before: Option<Instant>,
    /// How long it was waited the last time that what it was could not be had.
    backoff: Duration,
}

#[derive(Clone, Copy)]
struct Asked {
    to: Bytes,
    /// When the API took it.
    taken: Option<Instant>,
}

/// A change has ended.
pub(super) struct Done {
    key: Key,
    cgroup: CgroupId,
    to: Bytes,
    why: RequestWhy,
    result: Result<(), NotChanged>,
}

impl Requests {
    pub(super) fn new(done: UnboundedSender<Done>) -> Self {
        Self {
            known: BTreeMap::new(),
            pods: BTreeMap::new(),
            refused: BTreeMap::new(),
            unrecorded: BTreeMap::new(),
            served: BTreeMap::new(),
            capacity: None,
            before: loans(Path::new(LEDGER)),
            done,
        }
    }

    /// Whether anybody's request may be moved.
    pub(super) fn is_any(&self) -> bool {
        !self.known.is_empty()
    }

    fn forget(&mut self, key: &Key) {
        self.known.remove(key);
    }

    pub(super) fn forget_pod(&mut self, uid: &str) {
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

    /// Looks what containers use.
    pub(super) fn sample(&mut self) {
        for known in self.known.values_mut() {
            known.sample();
        }
    }
}

impl KnownRequest {
    /// A container that is gone uses nothing more.
    fn sample(&mut self) -> Bytes {
        let used = self.cgroup.working_set().unwrap_or_default();
        self.peak = self.peak.max(used);
        used
    }

    /// Its request: what the spec says, or will say.
    fn request(&self) -> Bytes {
        self.asked.map_or(self.wish.request, |asked| asked.to)
    }

    fn observed(&self) -> Observed {
        let time = u64::try_from(self.since.elapsed().as_nanos());
        Observed {
            time: Nanos(time.unwrap_or(u64::MAX)),
            peak: self.peak,
        }
    }

    /// What its request is to be when nobody waits for room.
    fn wanted(&self) -> Bytes {
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
    fn is_free(&self) -> bool {
        let is_too_soon = self.not_before.is_some_and(|at| Instant::now() < at);
        self.wish.recorded && self.asked.is_none() && !is_too_soon
    }

    fn text(&self, to: Bytes) -> String {
        if to == self.wish.original {
            self.wish.original_text.clone()
        } else {
            quantity::format(to)
        }
    }
}

impl Watch {
    /// Follows what policies say of the requests of a pod's containers.
    pub(super) async fn follow_requests(&mut self, pod: &Pod, seen: &mut pod::Pod) {
        self.summarize(seen);
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
                    if let Err(error) = self.follow_request(&key, pod, seen, wish).await {
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

    /// Takes over what others' requests depend on.
    fn summarize(&mut self, seen: &pod::Pod) {
        let size = |text: &Option<String>| {
            let text = text.as_deref()?;
            quantity::parse(text).ok()
        };
        let allotted = seen.containers.iter().map(|container| {
            let said = size(&container.allotted).or_else(|| size(&container.memory_request));
            said.unwrap_or_default()
        });
        let before = self.requests.pods.get(&seen.uid);
        let summary = Summary {
            name: format!("{}/{}", seen.namespace, seen.name),
            priority: seen.priority,
            requested: seen.requested,
            allotted: allotted.fold(Bytes::ZERO, Bytes::plus),
            put_off: seen.put_off.clone(),
            arrived: before.map_or_else(Instant::now, |before| before.arrived),
        };
        let is_less = before.is_some_and(|before| summary.requested < before.requested);
        self.requests.pods.insert(seen.uid.clone(), summary);
        if is_less {
            self.requests.try_again();
        }
    }

    /// Tells why a container's request is left alone, once.
    fn refuse_request(&mut self, key: &Key, pod: &Pod, reason: &str, why: String) {
        if self.requests.refused.get(key) != Some(&why) {
            self.events.refused(pod, reason, why.clone());
            self.requests.refused.insert(key.clone(), why);
        }
    }

    async fn follow_request(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &mut pod::Pod,
        mut wish: RequestWish,
    ) -> Result<(), String> {
        let container = seen.containers.get(wish.index);
        let is_reported = container.is_some_and(|container| container.reports_resources);
        if wish.id.is_none() {
            return Ok(());
        }
        if !wish.recorded && wish.rules.is_some() {
            if !self.record_request(key, pod, seen, &wish).await? {
                return Ok(());
            }
            wish.recorded = true;
            if wish.foreign {
                let note = format!(
                    "container {}: the memory request was changed to {} by somebody else, which is the new original",
                    key.1, wish.original
                );
                self.events.guarded(pod, note);
            }
        }
        match self.requests.known.get_mut(key) {
            Some(known) if known.wish.id == wish.id => known.follow(wish, is_reported),
            _ => self.adopt_request(key, seen, wish, is_reported)?,
        }
        Ok(())
    }

    /// Writes a request as it was onto the pod, unless that is refused as such, which is not tried again soon.
    async fn record_request(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &mut pod::Pod,
        wish: &RequestWish,
    ) -> Result<bool, String> {
        let again = self.requests.unrecorded.get(key);
        if again.is_some_and(|&at| Instant::now() < at) {
            return Ok(false);
        }
        let recorded = self.record_original(seen, ORIGINAL_REQUESTS, &key.1, &wish.original_text);
        match recorded.await {
            Ok(()) => {
                self.requests.unrecorded.remove(key);
                Ok(true)
            }
            Err(not) if not.is_refused => {
                let at = Instant::now() + REFUSED;
                self.requests.unrecorded.insert(key.clone(), at);
                self.refuse_request(key, pod, "RequestRefused", not.why);
                Ok(false)
            }
            Err(not) => Err(not.into()),
        }
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
        let order = Order::clone(self.orders.entry(seen.uid.clone()).or_default());
        let loans = self.requests.before.remove(&cgroup.id());
        let mut known = KnownRequest {
            name: format!("{}/{}/{}", seen.namespace, seen.name, key.1),
            namespace: seen.namespace.clone(),
            pod: seen.name.clone(),
            loans: loans
                .filter(|_| wish.request < wish.original)
                .unwrap_or_default(),
            wish,
            is_reported,
            cgroup,
            order,
            since: Instant::now(),
            peak: Bytes::ZERO,
            asked: None,
            owed: Bytes::ZERO,
            not_before: None,
            backoff: Duration::ZERO,
        };
        known.sample();
        tracing::info!(container = known.name, request = %known.wish.request, original = %known.wish.original, "its request may be moved");
        self.requests.known.insert(key.clone(), known);
        Ok(())
    }

    /// Does what is to be done now.
    pub(super) fn step_requests(&mut self) {
        if !self.is_listed || !self.requests.is_any() {
            return;
        }
        self.take_back_put_off();
        let waiting = self.waiting();
        for waits in &waiting {
            self.make_room_for(waits);
        }
        self.right_size();
        let highest = waiting.iter().map(|waits| waits.priority).max();
        self.give_back_requests(highest);
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

    /// Asks for a request, beside whatever goes on.
    fn change_request(&mut self, key: &Key, to: Bytes, why: RequestWhy) {
        let Some(known) = self.requests.known.get_mut(key) else {
            return;
        };
        let cgroup = known.cgroup.id();
        let record = Record::Request {
            at: now(),
            cgroup,
            name: known.name.clone(),
            from: known.wish.request,
            to,
            why: why.clone(),
        };
        if !write(&record) {
            known.not_before = Some(Instant::now() + AGAIN);
            return;
        }
        known.asked = Some(Asked { to, taken: None });
        let is_lent = matches!(why, RequestWhy::Lent { .. });
        let change = RequestChange {
            namespace: known.namespace.clone(),
            name: known.pod.clone(),
            uid: key.0.clone(),
            index: known.wish.index,
            from: known.wish.request_text.clone(),
            to: known.text(to),
            is_reported: known.is_reported,
            order: Order::clone(&known.order),
            urgency: if is_lent {
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
            drop(done.send(Done {
                key,
                cgroup,
                to,
                why,
                result,
            }));
        }));
    }

    /// A change has ended.
    pub(super) fn request_changed(&mut self, done: Done) {
        let Done {
            key,
            cgroup,
            to,
            why,
            result,
        } = done;
        let known = self.requests.known.get_mut(&key);
        let Some(known) = known.filter(|known| known.cgroup.id() == cgroup) else {
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
            Err(NotChanged { why, is_passing }) => {
                known.asked = None;
                known.not_before = Some(Instant::now() + if is_passing { AGAIN } else { REFUSED });
                tracing::warn!(container = known.name, %to, why, "a request is not changed");
                let record = Record::RequestFailed {
                    at: now(),
                    cgroup,
                    to,
                    why: why.clone(),
                };
                write(&record);
                if let Some(pod) = self.pods.get(&key.0).cloned()
                    && !is_passing
                {
                    self.refuse_request(&key, &pod, "RequestRefused", why);
                }
            }
        }
    }
}

impl KnownRequest {
    /// Takes over what the API says.
    fn follow(&mut self, wish: RequestWish, is_reported: bool) {
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
    }

    /// The API has taken a request.
    fn took(&mut self, to: Bytes, why: &RequestWhy) {
        self.asked = Some(Asked {
            to,
            taken: Some(Instant::now()),
        });
        if self.wish.request == to {
            // Seen before it was answered.
            self.asked = None;
        }
        if let RequestWhy::Lent { .. } = why {
            self.loans.extend(Loan::of(why, Instant::now()));
        }
        if to >= self.wanted() {
            self.loans.clear();
        }
    }
}

/// Writes into the ledger, which may have been put aside since the last time; returns whether it is written.
fn write(record: &Record) -> bool {
    let written = Ledger::open(Path::new(LEDGER)).and_then(|mut ledger| ledger.append(record));
    if let Err(error) = &written {
        tracing::error!(%error, "what cannot be written down is not done");
    }
    written.is_ok()
}

/// What a predecessor has written.
fn read(path: &Path) -> Vec<Record> {
    let previous = ledger::read(&ledger::previous(path));
    let all = [previous, ledger::read(path)].into_iter().flatten();
    all.flat_map(|contents| contents.records).collect()
}
