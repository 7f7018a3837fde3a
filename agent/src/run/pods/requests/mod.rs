//! The memory requests of this node's pods: what is recorded of them, what their containers use, what is asked of the API.
//!
//! Who is lowered and who gets something back is decided in core (`requests`); [`room`] looks whom that concerns now. What a
//! request was is written onto the pod when its container is met, so that nothing but the resize itself is left to do when
//! somebody waits for room. Every change is in a ledger before it is asked for, and by it the next agent knows to whom
//! something was lent. A container that is started again is the same to it.
//!
//! A resize that the kubelet puts off keeps all else of the pod from being resized, its memory limit too: a request that
//! does not come back at once is taken back, and owed. While a limit of the pod is raised, or somebody in it grows, no request
//! is: that resize would wait with this one.
//!
//! It must not move a limit.

mod recent;
mod room;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId, Nanos,
    allowance::What,
    bucket::Urgency,
    pod::{self, Level, ORIGINAL_REQUESTS, PutOff, RequestWish, RequestWishes},
    quantity,
    requests::{Observed, RequestWhy, right_size},
};
use tokio::{sync::mpsc::UnboundedSender, time::Instant};

use super::{Key, Watch, one};
use crate::{
    actuate::{
        allowances::SharedAllowances,
        requests::{NotChanged, RequestChange},
        resize::Order,
    },
    attribution::api::Pod,
    cgroup::Cgroup,
    clock::now,
    explain::told_request,
    ledger::{self, Ledger, Record},
};
use recent::Recent;
use room::{Loan, Owner, Served, capacity, loans, unsettled};

/// How often it is looked what containers use.
pub(super) const SAMPLE: Duration = Duration::from_secs(5);
/// What the API says within this time of our own change may be older than that.
const OLD: Duration = Duration::from_secs(5);
/// How soon what was refused or not answered is tried again; each time twice as late, so many times.
const AGAIN: Duration = Duration::from_secs(5);
const MOST_DOUBLED: u32 = 6;
/// The same of what is refused as such.
const REFUSED: Duration = Duration::from_secs(600);
/// At last what the kubelet puts off is taken back no more seldom than this: all else of its pod is put off with it, a
/// burst's raise, too.
const TAKEN_BACK_AGAIN: Duration = Duration::from_secs(10);
/// The same of what is refused as such: it would be again, and each time take what others need to ask.
const TAKING_BACK_REFUSED: Duration = Duration::from_secs(60);
/// What is told of a pod whose policy asks for what this agent is not to do.
const NOT_ENABLED: &str = "its policy has memory.requests, and this agent may not change requests: set requests.enabled of the chart (--requests), or take that out of the policy";

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

/// A pod, as far as others' requests are concerned.
struct Summary {
    /// For people.
    name: String,
    priority: i32,
    requested: Bytes,
    /// What its containers request, without all else that a scheduler counts.
    own: Bytes,
    /// What the kubelet has allotted to them; what they request where it does not say.
    allotted: Bytes,
    put_off: Option<PutOff>,
    /// Whether the kubelet has said of the same as it asks for now that it does not get it, and not for memory. Anything that
    /// changes in its spec makes that word an old one.
    was_in_vain: bool,
    /// Whether what was allotted is a guess: it waits for more, and some of it does not run.
    is_guessed: bool,
    /// Whether it is on its way out: it gets nothing more.
    is_ending: bool,
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
    recent: Recent,
    /// What was asked for and is not seen yet.
    asked: Option<Asked>,
    loans: Vec<Loan>,
    /// What it is owed, as it was told.
    owed: Bytes,
    /// It is not asked for again before.
    not_before: Option<Instant>,
    /// How often, one after the other, it was not answered or refused for a while.
    failures: u32,
    /// The same of what the kubelet puts off: it is not taken back before, and how often that failed. What failed on its
    /// way up says nothing of that: the API may have taken it without an answer.
    not_taken_back_before: Option<Instant>,
    not_taken_back: u32,
    /// How long it was waited the last time that what it was could not be had.
    backoff: Duration,
}

#[derive(Clone, Copy)]
struct Asked {
    to: Bytes,
    /// When the API took it.
    taken: Option<Instant>,
}

/// What was begun beside the watch has come to an end.
pub(super) enum News {
    /// A change.
    Changed(Done),
    /// A look at what containers use, by their cgroups.
    Used(Vec<(Key, CgroupId, Bytes)>),
}

/// A change has ended.
pub(super) struct Done {
    key: Key,
    to: Bytes,
    why: RequestWhy,
    result: Result<(), NotChanged>,
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

    /// Has it looked what containers use, beside the watch: the kernel sums up all that all CPUs have charged to answer
    /// (`cgroup_rstat_flush` under `memory.stat`), which takes milliseconds each on a large node.
    pub(super) fn sample(&mut self) {
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

    fn sampled(&mut self, used: Vec<(Key, CgroupId, Bytes)>) {
        self.is_sampling = false;
        for (key, cgroup, used) in used {
            let known = self.known.get_mut(&key);
            if let Some(known) = known.filter(|known| known.cgroup.id() == cgroup) {
                known.saw(used);
            }
        }
    }

    /// Pods in which somebody grows, of those that are looked at.
    fn growing(&self) -> BTreeSet<String> {
        let known = self.known.iter();
        let growing = known.filter(|(_, known)| known.recent.is_growing());
        growing.map(|((uid, _), _)| uid.clone()).collect()
    }

    /// Writes into the ledger; returns whether it is written.
    fn write(&self, record: &Record) -> bool {
        let written = Ledger::open(&self.path).and_then(|mut ledger| {
            if ledger.is_full()? {
                ledger.rotate(&self.unsettled())?;
            }
            ledger.append(record)
        });
        if let Err(error) = &written {
            tracing::error!(%error, "what cannot be written down is not done");
        }
        written.is_ok()
    }

    /// What a new ledger begins with: what is not given back, of containers that are there.
    fn unsettled(&self) -> Vec<Record> {
        let known = self.known.iter();
        let known = known.map(|((uid, _), known)| (uid.clone(), known.name.clone()));
        let owners: BTreeSet<Owner> = known.chain(self.before.keys().cloned()).collect();
        unsettled(&read(&self.path), |owner| owners.contains(owner))
    }
}

impl KnownRequest {
    /// Nothing is known of one that is gone or about to be started again.
    fn sample(&mut self) {
        if let Ok(used) = self.cgroup.working_set() {
            self.saw(used);
        }
    }

    fn saw(&mut self, used: Bytes) {
        self.peak = self.peak.max(used);
        self.recent.saw(used);
    }

    /// What it has used of late, by what was seen of it last; `None` if nothing was.
    fn used(&self) -> Option<Bytes> {
        self.recent.is_any().then(|| self.recent.peak())
    }

    /// What it uses, or has used of late; `None` of one that is gone or about to be started again.
    fn uses(&self) -> Option<Bytes> {
        let used = self.cgroup.working_set().ok()?;
        Some(used.max(self.recent.peak()))
    }

    /// What the kubelet has allotted to it, where it says that.
    fn allotted(&self) -> Option<Bytes> {
        quantity::parse(self.wish.allotted.as_deref()?).ok()
    }

    /// Whether a change of ours is under way.
    fn is_moved_by_us(&self) -> bool {
        let is_taken = self.allotted().is_none_or(|own| own == self.wish.request);
        self.asked.is_some() || self.wish.is_ours && !is_taken
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
        self.wish.recorded && self.asked.is_none() && !self.is_too_soon()
    }

    /// Whether it was refused a moment ago.
    fn is_too_soon(&self) -> bool {
        self.not_before.is_some_and(|at| Instant::now() < at)
    }

    /// What to take back of what the kubelet puts off: to what it has allotted.
    fn to_take_back(&self, put_off: &PutOff) -> Option<Bytes> {
        let is_too_soon = self
            .not_taken_back_before
            .is_some_and(|at| Instant::now() < at);
        let is_meant = self.asked.is_none() && put_off.is_current && self.is_moved_by_us();
        self.allotted().filter(|_| is_meant && !is_too_soon)
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

    /// Takes over what others' requests depend on.
    pub(super) fn summarize(&mut self, seen: &pod::Pod) {
        let size = |text: &Option<String>| {
            let text = text.as_deref()?;
            quantity::parse(text).ok()
        };
        let allotted = seen.containers.iter().map(|container| {
            let said = size(&container.allotted).or_else(|| size(&container.memory_request));
            said.unwrap_or_default()
        });
        let are_all_said = seen.containers.iter().all(|own| own.allotted.is_some());
        let own = seen.containers.iter();
        let own = own.map(|container| size(&container.memory_request).unwrap_or_default());
        let before = self.requests.pods.get(&seen.uid);
        let mut summary = Summary {
            name: format!("{}/{}", seen.namespace, seen.name),
            priority: seen.priority,
            requested: seen.requested,
            own: own.fold(Bytes::ZERO, Bytes::plus),
            allotted: allotted.fold(Bytes::ZERO, Bytes::plus),
            put_off: seen.put_off.clone(),
            was_in_vain: false,
            is_guessed: seen.put_off.is_some() && !are_all_said,
            is_ending: seen.ending,
            arrived: before.map_or_else(Instant::now, |before| before.arrived),
        };
        summary.was_in_vain = before.is_some_and(|before| summary.is_in_vain_as(before));
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
        self.keep_allowed(key, &mut wish);
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

    /// Writes a request as it was onto the pod, unless that is refused as such, which is not tried again soon. Returns whether
    /// it is there.
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
        if !wish.foreign {
            self.record_beside(key, ORIGINAL_REQUESTS, seen, &wish.original_text);
            return Ok(false);
        }
        let recorded = self.record_original(seen, ORIGINAL_REQUESTS, &key.1, &wish.original_text);
        match recorded.await {
            Ok(()) => {
                self.requests.unrecorded.remove(key);
                Ok(true)
            }
            Err(not) if not.is_refused => {
                self.request_not_recorded(key, pod, not.why);
                Ok(false)
            }
            Err(not) => Err(not.into()),
        }
    }

    /// What a request was the API does not take: it is not asked again soon.
    pub(super) fn request_not_recorded(&mut self, key: &Key, pod: &Pod, why: String) {
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
        let order = Order::clone(self.orders.entry(seen.uid.clone()).or_default());
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
            owed: Bytes::ZERO,
            not_before: None,
            failures: 0,
            not_taken_back_before: None,
            not_taken_back: 0,
            backoff: Duration::ZERO,
        };
        known.settle_loans();
        known.sample();
        tracing::info!(container = known.name, request = %known.wish.request, original = %known.wish.original, "its request may be moved");
        self.requests.known.insert(key.clone(), known);
        Ok(())
    }

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

    /// Asks for a request, beside whatever goes on.
    fn change_request(&mut self, key: &Key, to: Bytes, why: RequestWhy) {
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
        let is_urgent = matches!(why, RequestWhy::Lent { .. } | RequestWhy::NoRoom);
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

    /// Takes what has come of what was begun.
    pub(super) fn take_request_news(&mut self, news: News) {
        match news {
            News::Changed(done) => self.request_changed(done),
            News::Used(used) => self.requests.sampled(used),
        }
        self.step_requests();
    }

    /// A change has ended.
    fn request_changed(&mut self, done: Done) {
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
    fn settle(&self, allowances: &SharedAllowances) {
        if let Err(not) = &self.result {
            let own = (self.key.0.as_str(), self.key.1.as_str());
            allowances.refused(own, What::MemoryRequest, self.to.0, not.is_passing);
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
        self.settle_loans();
    }

    /// Its container was started again: what it has lent and used before is still its own.
    fn is_started_again(&mut self, wish: RequestWish, cgroup: Cgroup, is_reported: bool) {
        self.cgroup = cgroup;
        self.follow(wish, is_reported);
        self.sample();
    }

    /// It was not changed, for the time being or as such.
    fn failed(&mut self, why: &RequestWhy, is_passing: bool) {
        self.asked = None;
        if *why == RequestWhy::NoRoom {
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
    fn took(&mut self, to: Bytes, why: &RequestWhy) {
        self.asked = Some(Asked {
            to,
            taken: Some(Instant::now()),
        });
        self.failures = 0;
        (self.not_taken_back, self.not_taken_back_before) = (0, None);
        if self.wish.request == to {
            // Seen before it was answered.
            self.asked = None;
        }
        if let RequestWhy::Lent { .. } = why {
            self.loans.extend(Loan::of(why, Instant::now()));
        }
        self.settle_loans();
    }

    /// What was lent is back once the kubelet has allotted it: what the API takes it may yet put off. Where it does not say
    /// that, what the API has taken counts.
    fn settle_loans(&mut self) {
        let is_whole = self.request() >= self.wanted();
        let has = self.allotted().unwrap_or_else(|| self.request());
        if is_whole && has >= self.request() {
            self.loans.clear();
        }
    }
}

/// What is written in a ledger. A new one has begun with all that counts of the one before; that is only read where an agent
/// has died between them.
fn read(path: &Path) -> Vec<Record> {
    let read = ledger::read(path).or_else(|_| ledger::read(&ledger::previous(path)));
    read.unwrap_or_default().records
}

#[cfg(test)]
mod tests {
    use bellows_core::{
        CgroupId,
        allowance::{Amount, Amounts, CountedPod, Quota},
        requests::RequestRules,
    };

    use super::*;

    pub(super) fn known(request: u64, original: u64) -> KnownRequest {
        let rules = RequestRules {
            right_size: true,
            make_room: true,
            floor: Bytes::mib(1),
            margin_per_mille: 250,
            observe: Nanos::millis(1000),
        };
        let [request, original] = [request, original].map(Bytes::mib);
        KnownRequest {
            wish: RequestWish {
                index: 0,
                id: Some("c1".to_owned()),
                request_text: quantity::format(request),
                request,
                original,
                original_text: quantity::format(original),
                allotted: None,
                rules: Some(rules),
                priority: 100,
                recorded: true,
                is_ours: true,
                foreign: false,
            },
            is_reported: true,
            cgroup: Cgroup::stand_in(Path::new("/nowhere"), CgroupId(1)),
            name: "dev/filler/app".to_owned(),
            namespace: "dev".to_owned(),
            pod: "filler".to_owned(),
            order: Order::default(),
            since: Instant::now(),
            peak: Bytes::mib(40),
            recent: Recent::default(),
            asked: None,
            loans: Vec::new(),
            owed: Bytes::ZERO,
            not_before: None,
            failures: 0,
            not_taken_back_before: None,
            not_taken_back: 0,
            backoff: Duration::ZERO,
        }
    }

    #[test]
    fn a_request_that_is_refused_is_room_again() {
        let allowances = SharedAllowances::default();
        let amounts = Amounts {
            memory_request: Some(Bytes::mib(64).0),
            ..Amounts::default()
        };
        let pod = |uid: &str| CountedPod {
            namespace: "dev".to_owned(),
            uid: uid.to_owned(),
            containers: [("app".to_owned(), amounts)].into(),
            ..CountedPod::default()
        };
        let [hard, used] = [256, 128].map(|mib| Bytes::mib(mib).0);
        let quota = Quota {
            amounts: [(What::MemoryRequest, Amount { hard, used })].into(),
            ..Quota::default()
        };
        allowances.with(|all| {
            all.pod(pod("a"));
            all.pod(pod("b"));
            all.quota("dev", "q", Some(quota));
        });
        let most = || allowances.request_up_to(("b", "app"), Bytes::mib(1024));
        allowances.ask_request(("a", "app"), Bytes::mib(164));
        assert_eq!(most(), Bytes::mib(92));
        let done = Done {
            key: ("a".to_owned(), "app".to_owned()),
            to: Bytes::mib(164),
            why: RequestWhy::GivenBack,
            result: Err(NotChanged {
                why: "no".to_owned(),
                is_passing: false,
            }),
        };
        done.settle(&allowances);
        assert_eq!(most(), Bytes::mib(192));
    }

    /// What it has lent is not lost with its old cgroup, nor is it taken for one that uses nothing.
    #[test]
    fn a_container_that_is_started_again_is_the_same() {
        let mut known = known(100, 400);
        known.recent.saw(Bytes::mib(40));
        assert_eq!(known.uses(), None);
        known.sample();
        let why = RequestWhy::Lent {
            to: "dev/db".to_owned(),
            uid: "db".to_owned(),
            before: Bytes::ZERO,
            short: Bytes::mib(300),
            capacity: None,
        };
        known.took(Bytes::mib(100), &why);
        known.owed = Bytes::mib(300);
        let again = RequestWish {
            id: Some("c2".to_owned()),
            ..known.wish.clone()
        };
        let cgroup = Cgroup::stand_in(Path::new("/nowhere"), CgroupId(2));
        known.is_started_again(again, cgroup, true);
        assert_eq!((known.loans.len(), known.owed), (1, Bytes::mib(300)));
        let used = (known.peak, known.recent.peak());
        assert_eq!(used, (Bytes::mib(40), Bytes::mib(40)));
        assert_eq!(
            (known.wish.id.as_deref(), known.cgroup.id()),
            (Some("c2"), CgroupId(2))
        );
    }

    #[test]
    fn what_fails_again_and_again_is_asked_for_less_and_less_often() {
        let mut known = known(100, 400);
        let mut wait = |is_passing| {
            known.failed(&RequestWhy::GivenBack, is_passing);
            let wait = known.not_before.unwrap() - Instant::now();
            (wait + Duration::from_millis(500)).as_secs()
        };
        let waits: Vec<u64> = (0..9).map(|_| wait(true)).collect();
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 320, 320]);
        assert_eq!(wait(false), 600);
        known.took(Bytes::mib(400), &RequestWhy::GivenBack);
        known.failed(&RequestWhy::GivenBack, true);
        assert!(known.not_before.unwrap() - Instant::now() <= AGAIN);
    }

    /// The API takes what it does not answer for, and the kubelet puts it off: with it whatever else its pod needs.
    #[test]
    fn what_is_put_off_is_taken_back_however_often_it_has_failed() {
        let mut known = known(400, 400);
        known.wish.allotted = Some("300Mi".to_owned());
        let put_off = PutOff {
            is_infeasible: false,
            message: String::new(),
            is_current: true,
        };
        for _ in 0..9 {
            known.failed(&RequestWhy::GivenBack, true);
        }
        known.failed(&RequestWhy::GivenBack, false);
        assert!(known.is_too_soon());
        assert_eq!(known.to_take_back(&put_off), Some(Bytes::mib(300)));
        let mut wait = |is_passing| {
            known.failed(&RequestWhy::NoRoom, is_passing);
            assert_eq!(known.to_take_back(&put_off), None);
            let wait = known.not_taken_back_before.unwrap() - Instant::now();
            (wait + Duration::from_millis(500)).as_secs()
        };
        assert_eq!([true, true, true, false].map(&mut wait), [5, 10, 10, 60]);
        known.took(Bytes::mib(300), &RequestWhy::NoRoom);
        known.asked = None;
        assert_eq!(known.to_take_back(&put_off), Some(Bytes::mib(300)));
    }
}
