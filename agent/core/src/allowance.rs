//! What a namespace allows: its LimitRanges and ResourceQuotas, looked at before a limit is raised.
//!
//! The API refuses what they do not allow (403), and by then a container has been held for the answer, or, where it is
//! raised first, has got what it must not have. So the ceiling of a container is the least of its policy's, what each
//! LimitRange leaves and what each quota has left, at the moment of the decision.
//!
//! A quota's status is older than what was asked for since. Of twenty raises at once each would find the same room, so what
//! was asked for is counted here until the status has it: the sum asked for never exceeds what was seen to be left. Which
//! status has it the versions do not tell: admission writes `used` before the pod is stored, so the status that counts a
//! raise is always older than the pod that has it. So by how much `used` grows is taken off what was asked for, first off
//! what the API is known to have taken, and each byte once. Where a raise is hidden by what came down with it, it is
//! counted for [`SETTLE`] more after the API has taken it: that costs room and exceeds nothing. Agents of other nodes are
//! not seen before the status is, and what they raise meanwhile may be taken for ours: the API judges between them.
//!
//! What Kubernetes counts is read in its admission plugins (plugin/pkg/admission/limitranger/admission.go and
//! pkg/quota/v1/evaluator/core/pods.go, 1.37): a resize is judged as the whole pod that it makes.
//!
//! It must not allow what cannot be known: a quota without a status has nothing left.

mod bound;

use std::collections::{BTreeMap, BTreeSet};

use crate::units::Nanos;

pub use bound::{Bound, By, Reached};

/// For so long what the API has taken is counted, while the quota's status is on its way to us.
pub const SETTLE: Nanos = Nanos::millis(2000);
/// The same where nobody has said whether it was taken.
pub const UNCERTAIN: Nanos = Nanos::millis(10_000);

/// What is bounded. Amounts of memory are in bytes, of CPU in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// `limits.memory`.
    MemoryLimit,
    /// `limits.cpu`.
    CpuLimit,
    /// `requests.memory`.
    MemoryRequest,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Memory.
    Memory,
    /// CPU.
    Cpu,
}

impl What {
    /// What it is an amount of.
    #[must_use]
    pub const fn measure(self) -> Measure {
        match self {
            Self::MemoryLimit | Self::MemoryRequest => Measure::Memory,
            Self::CpuLimit => Measure::Cpu,
        }
    }

    /// As quotas name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MemoryLimit => "limits.memory",
            Self::CpuLimit => "limits.cpu",
            Self::MemoryRequest => "requests.memory",
        }
    }
}

/// Limits and requests of a container, or of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    /// `limits.memory`, bytes.
    pub memory_limit: Option<u64>,
    /// `requests.memory`, bytes.
    pub memory_request: Option<u64>,
    /// `limits.cpu`, millionths.
    pub cpu_limit: Option<u64>,
    /// `requests.cpu`, millionths.
    pub cpu_request: Option<u64>,
}

impl Amounts {
    const fn of(&self, what: What) -> Option<u64> {
        match what {
            What::MemoryLimit => self.memory_limit,
            What::CpuLimit => self.cpu_limit,
            What::MemoryRequest => self.memory_request,
        }
    }

    const fn request(&self, measure: Measure) -> Option<u64> {
        match measure {
            Measure::Memory => self.memory_request,
            Measure::Cpu => self.cpu_request,
        }
    }

    /// Both together; what neither has is not there.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let sum = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
            (a, b) => a.or(b),
        };
        Self {
            memory_limit: sum(self.memory_limit, other.memory_limit),
            memory_request: sum(self.memory_request, other.memory_request),
            cpu_limit: sum(self.cpu_limit, other.cpu_limit),
            cpu_request: sum(self.cpu_request, other.cpu_request),
        }
    }

    /// The greater of both, of each.
    #[must_use]
    pub fn greatest(self, other: Self) -> Self {
        Self {
            memory_limit: self.memory_limit.max(other.memory_limit),
            memory_request: self.memory_request.max(other.memory_request),
            cpu_limit: self.cpu_limit.max(other.cpu_limit),
            cpu_request: self.cpu_request.max(other.cpu_request),
        }
    }

    /// These, and where there is nothing the other's.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            memory_limit: self.memory_limit.or(other.memory_limit),
            memory_request: self.memory_request.or(other.memory_request),
            cpu_limit: self.cpu_limit.or(other.cpu_limit),
            cpu_request: self.cpu_request.or(other.cpu_request),
        }
    }
}

/// A pod, as far as it is counted. None that is BestEffort is meant: it has nothing to raise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CountedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// Whether it has `activeDeadlineSeconds`: what a quota calls Terminating.
    pub is_terminating: bool,
    /// `priorityClassName`.
    pub priority_class: Option<String>,
    /// Whether its affinity looks into other namespaces.
    pub crosses_namespaces: bool,
    /// Its containers, by name.
    pub containers: BTreeMap<String, Amounts>,
    /// Its own (`spec.resources`): they come before its containers'.
    pub own: Amounts,
    /// All that run beside each other, sidecars included.
    pub together: Amounts,
    /// The most that an init container needs before them, with the sidecars that run by then: a quota charges no less.
    pub before: Amounts,
    /// The version of it: an older one says nothing new.
    pub version: Option<u64>,
}

/// What a LimitRange says of one resource of a container or of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Of what.
    pub measure: Measure,
    /// Whether of a pod's sum; else of each container.
    pub is_of_pod: bool,
    /// `max`, of what is requested and of limits.
    pub max: Option<u64>,
    /// `min`, of what is requested.
    pub min: Option<u64>,
    /// `maxLimitRequestRatio`, in thousandths.
    pub ratio_per_mille: Option<u64>,
}

/// Which pods a quota counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those with (or without) a deadline.
    Terminating(bool),
    /// Those that are BestEffort, or those that are not.
    BestEffort(bool),
    /// Those of a priority class.
    PriorityClass(Among),
    /// Those whose affinity looks into other namespaces.
    CrossNamespacePodAffinity,
    /// One that this build does not know: the quota may count every pod.
    Unknown,
}

/// Which values a scope selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Among {
    /// Any.
    Exists,
    /// None.
    DoesNotExist,
    /// One of these.
    In(Vec<String>),
    /// None of these; having none is that, too.
    NotIn(Vec<String>),
}

impl Among {
    fn has(&self, value: Option<&String>) -> bool {
        match self {
            Self::Exists => value.is_some(),
            Self::DoesNotExist => value.is_none(),
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
        }
    }
}

impl Scope {
    fn has(&self, pod: &CountedPod) -> bool {
        match self {
            Self::Terminating(is_terminating) => pod.is_terminating == *is_terminating,
            Self::BestEffort(is_best_effort) => !is_best_effort,
            Self::PriorityClass(among) => among.has(pod.priority_class.as_ref()),
            Self::CrossNamespacePodAffinity => pod.crosses_namespaces,
            Self::Unknown => true,
        }
    }
}

/// A ResourceQuota, as its status was last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// All must have a pod that is counted.
    pub scopes: Vec<Scope>,
    /// What there is, and what of it is used.
    pub amounts: BTreeMap<What, Amount>,
}

/// What there is of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// `hard`.
    pub hard: u64,
    /// `used`.
    pub used: u64,
}

/// What was asked for, and a quota may not say yet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    from: u64,
    to: u64,
    /// Whether the API has taken it.
    is_taken: bool,
    /// When it counts no more.
    until: Option<Nanos>,
}

/// All that was asked for one container.
#[derive(Clone, Debug, Default)]
struct Asking {
    all: Vec<Asked>,
    /// What of it each quota has counted, by the quota's name: up to where its `used` has grown with it.
    counted: BTreeMap<String, u64>,
}

/// A container's limit or request: its pod's uid, its name, what.
type Key = (String, String, What);

/// All that is known of what namespaces allow.
#[derive(Clone, Debug, Default)]
pub struct Allowances {
    /// By namespace and name.
    ranges: BTreeMap<(String, String), Vec<Range>>,
    quotas: BTreeMap<(String, String), Quota>,
    pods: BTreeMap<String, CountedPod>,
    asked: BTreeMap<Key, Asking>,
}

impl Allowances {
    /// A LimitRange is there, or is gone; returns whether that is new to a pod that is known.
    pub fn range(&mut self, namespace: &str, name: &str, range: Option<Vec<Range>>) -> bool {
        let key = (namespace.to_owned(), name.to_owned());
        set(&mut self.ranges, key, range) && self.has_pods(namespace)
    }

    /// A quota is there with this status, or is gone; returns whether that is new to a pod that is known.
    pub fn quota(&mut self, namespace: &str, name: &str, quota: Option<Quota>) -> bool {
        let key = (namespace.to_owned(), name.to_owned());
        let before = self.quotas.get(&key);
        if let (Some(before), Some(now)) = (before, &quota) {
            let grown = now.amounts.iter().filter_map(|(&what, now)| {
                let before = before.amounts.get(&what)?;
                Some((what, now.used.saturating_sub(before.used)))
            });
            for (what, grown) in grown.collect::<Vec<_>>() {
                self.is_counted((namespace, name), now, what, grown);
            }
        }
        set(&mut self.quotas, key, quota) && self.has_pods(namespace)
    }

    /// What a quota says is used has grown: it has counted so much of what was asked for.
    fn is_counted(
        &mut self,
        (namespace, name): (&str, &str),
        quota: &Quota,
        what: What,
        mut grown: u64,
    ) {
        for is_taken in [true, false] {
            for ((uid, container, other), asking) in &mut self.asked {
                let pod = self.pods.get(uid).filter(|pod| pod.namespace == namespace);
                let pod = pod.filter(|pod| *other == what && quota.counts(pod, container, what));
                let said = pod.and_then(|pod| pod.of(container, what));
                let (Some(said), Some((from, to))) = (said, extent(asking.all.iter())) else {
                    continue;
                };
                let counted = asking.counted.entry(name.to_owned()).or_default();
                *counted = (*counted).max(from);
                let to = if is_taken { to.min(said) } else { to };
                let more = to.saturating_sub(*counted).min(grown);
                *counted += more;
                grown -= more;
            }
        }
    }

    fn has_pods(&self, namespace: &str) -> bool {
        let mut pods = self.pods.values();
        pods.any(|pod| pod.namespace == namespace)
    }

    /// Forgets LimitRanges that have gone while nobody looked; returns whether that is new to a pod that is known.
    pub fn keep_ranges(&mut self, listed: &BTreeSet<(String, String)>) -> bool {
        let gone = keep(&mut self.ranges, listed);
        gone.iter().any(|namespace| self.has_pods(namespace))
    }

    /// The same of quotas.
    pub fn keep_quotas(&mut self, listed: &BTreeSet<(String, String)>) -> bool {
        let gone = keep(&mut self.quotas, listed);
        gone.iter().any(|namespace| self.has_pods(namespace))
    }

    /// A pod as the API has it; one that is older than what is known says nothing.
    pub fn pod(&mut self, pod: CountedPod) {
        let known = self.pods.get(&pod.uid).and_then(|known| known.version);
        if known.is_some_and(|known| pod.version.is_some_and(|version| version < known)) {
            return;
        }
        self.pods.insert(pod.uid.clone(), pod);
    }

    /// A pod as the API has just taken it: what was asked for and is in it will be in the quota's status.
    pub fn taken(&mut self, pod: CountedPod, now: Nanos) {
        for ((uid, container, what), asked) in &mut self.asked {
            if *uid != pod.uid {
                continue;
            }
            let is_said = pod.of(container, *what);
            for asked in &mut asked.all {
                if !asked.is_taken && is_said.is_some_and(|said| said >= asked.to) {
                    asked.is_taken = true;
                    asked.until = Some(Nanos(now.0.saturating_add(SETTLE.0)));
                }
            }
        }
        self.pod(pod);
    }

    /// A pod is gone.
    pub fn forget(&mut self, uid: &str) {
        self.pods.remove(uid);
        self.asked.retain(|(own, _, _), _| own != uid);
    }

    /// Somebody asks for this much.
    pub fn ask(&mut self, (uid, container): (&str, &str), what: What, to: u64) {
        let Some(from) = self.pods.get(uid).and_then(|pod| pod.of(container, what)) else {
            return;
        };
        if to <= from {
            return;
        }
        let key = (uid.to_owned(), container.to_owned(), what);
        let asking = self.asked.entry(key).or_default();
        if asking.all.is_empty() {
            asking.counted.clear();
        }
        let mut asked = asking.all.iter();
        if !asked.any(|asked| asked.to == to && !asked.is_taken) {
            asking.all.push(Asked {
                from,
                to,
                is_taken: false,
                until: None,
            });
        }
    }

    /// It was refused; or, if that is not certain, it may come within some time.
    pub fn refused(
        &mut self,
        (uid, container): (&str, &str),
        what: What,
        to: u64,
        uncertain_at: Option<Nanos>,
    ) {
        let key = (uid.to_owned(), container.to_owned(), what);
        let Some(Asking { all: asked, .. }) = self.asked.get_mut(&key) else {
            return;
        };
        let is_it = |asked: &Asked| asked.to == to && !asked.is_taken;
        match uncertain_at {
            None => asked.retain(|asked| !is_it(asked)),
            Some(at) => {
                for asked in asked.iter_mut().filter(|asked| is_it(asked)) {
                    asked.until = Some(Nanos(at.0.saturating_add(UNCERTAIN.0)));
                }
            }
        }
    }

    /// What was raised without the API has come down to this.
    pub fn lowered(&mut self, (uid, container): (&str, &str), what: What, to: u64) {
        let key = (uid.to_owned(), container.to_owned(), what);
        let Some(Asking { all: asked, .. }) = self.asked.get_mut(&key) else {
            return;
        };
        for asked in asked.iter_mut().filter(|asked| !asked.is_taken) {
            asked.to = asked.to.min(to);
        }
        asked.retain(|asked| asked.to > asked.from);
    }

    /// Nothing is raised without the API any more but what these have: what nobody guards any more has come down.
    pub fn only_raised(&mut self, what: What, is_guarded: impl Fn(&str, &str) -> bool) {
        self.asked.retain(|(uid, container, own), asking| {
            if *own == what && !is_guarded(uid, container) {
                asking.all.retain(|asked| asked.is_taken);
            }
            !asking.all.is_empty()
        });
    }

    /// The most that a limit or request may become now, and what bounds it; `None` where nothing does.
    #[must_use]
    pub fn most(&self, (uid, container): (&str, &str), what: What, now: Nanos) -> Option<Bound> {
        let pod = self.pods.get(uid)?;
        let own = pod.of(container, what)?;
        let ranges = in_namespace(&self.ranges, &pod.namespace);
        let ranges = ranges.flat_map(|(name, ranges)| {
            let fitting = ranges.iter();
            let fitting = fitting.filter(|range| range.measure == what.measure());
            fitting.filter_map(move |range| self.by_range((name, range), pod, container, what, now))
        });
        let quotas = in_namespace(&self.quotas, &pod.namespace);
        let quotas = quotas.filter(|(_, quota)| quota.counts(pod, container, what));
        let quotas = quotas.filter_map(|(name, quota)| {
            let amount = *quota.amounts.get(&what)?;
            let key = (uid, container);
            let (base, others) = self.asked_under((name, quota), pod, key, what, now);
            let base = base.unwrap_or(own).max(pod.charged(own, what));
            let left = amount.hard.saturating_sub(amount.used);
            let by = By::Quota {
                name: name.to_owned(),
                what,
                amount,
                asked: others,
            };
            let most = base.saturating_add(left.saturating_sub(others));
            // What the API has granted stays, whatever is left.
            let most = most.max(own);
            Some(Bound { most, by })
        });
        ranges.chain(quotas).min_by_key(|bound| bound.most)
    }

    /// The least that a memory request may become, so that its own limit and one of this much are still allowed beside it.
    #[must_use]
    pub fn least_request(&self, (uid, container): (&str, &str), limit: u64) -> u64 {
        let Some(pod) = self.pods.get(uid) else {
            return 0;
        };
        let Some(own) = pod.containers.get(container) else {
            return 0;
        };
        let limit = limit.max(own.memory_limit.unwrap_or_default());
        let all = in_namespace(&self.ranges, &pod.namespace);
        let memory = all.flat_map(|(_, ranges)| ranges);
        let memory = memory.filter(|range| range.measure == Measure::Memory);
        let least = memory.map(|range| {
            let of = |limit: u64| {
                let by_ratio = range.ratio_per_mille.map_or(0, |per_mille| {
                    let least = (u128::from(limit) * 1000).checked_div(u128::from(per_mille));
                    // Rounded up; a ratio of nothing is reached by no request.
                    least.map_or(u64::MAX, |least| {
                        u64::try_from(least + 1).unwrap_or(u64::MAX)
                    })
                });
                by_ratio.max(range.min.unwrap_or_default())
            };
            if !range.is_of_pod {
                return of(limit);
            }
            let beside = |all: Option<u64>, own: Option<u64>| {
                let all = all.unwrap_or_default();
                all.saturating_sub(own.unwrap_or_default())
            };
            let limits = beside(pod.together.memory_limit, own.memory_limit);
            let requests = beside(pod.together.memory_request, own.memory_request);
            of(limits.saturating_add(limit)).saturating_sub(requests)
        });
        least.max().unwrap_or_default()
    }

    fn by_range(
        &self,
        (name, range): (&str, &Range),
        pod: &CountedPod,
        container: &str,
        what: What,
        now: Nanos,
    ) -> Option<Bound> {
        let is_of_own = container == crate::pod::WHOLE_POD;
        if !range.is_of_pod && is_of_own || range.is_of_pod && pod.is_beside(container, what) {
            return None;
        }
        let own = pod.of(container, what)?;
        let (sum, request) = if range.is_of_pod {
            let all = pod.own.or(pod.together);
            let others = self.asked_in(pod, container, what, now);
            let sum = all.of(what).unwrap_or(own).saturating_add(others);
            (sum, all.request(what.measure()))
        } else {
            let amounts = pod.containers.get(container)?;
            (own, amounts.request(what.measure()))
        };
        let beside = sum.saturating_sub(own);
        let by_max = range.max.map(|max| Bound {
            most: max.saturating_sub(beside),
            by: By::RangeMax {
                name: name.to_owned(),
                what,
                is_of_pod: range.is_of_pod,
                max,
            },
        });
        let ratio = range
            .ratio_per_mille
            .filter(|_| what != What::MemoryRequest);
        let by_ratio = ratio.map(|per_mille| {
            let most = u128::from(request.unwrap_or(0)) * u128::from(per_mille) / 1000;
            let most = u64::try_from(most).unwrap_or(u64::MAX);
            Bound {
                most: most.saturating_sub(beside),
                by: By::RangeRatio {
                    name: name.to_owned(),
                    what,
                    is_of_pod: range.is_of_pod,
                    per_mille,
                    request: request.unwrap_or(0),
                },
            }
        });
        by_max
            .into_iter()
            .chain(by_ratio)
            .min_by_key(|bound| bound.most)
    }

    /// What was asked for beside this and a quota may not have counted; and how much of this one it has.
    fn asked_under(
        &self,
        (name, quota): (&str, &Quota),
        own: &CountedPod,
        key: (&str, &str),
        what: What,
        now: Nanos,
    ) -> (Option<u64>, u64) {
        let (mut base, mut others) = (None, 0_u64);
        for ((uid, container, other), asking) in &self.asked {
            let pod = self
                .pods
                .get(uid)
                .filter(|pod| pod.namespace == own.namespace);
            let pod = pod.filter(|pod| *other == what && quota.counts(pod, container, what));
            let said = pod.and_then(|pod| pod.of(container, what));
            let open = asking.all.iter().filter(|asked| asked.counts(now));
            let (Some(said), Some((from, to))) = (said, extent(open)) else {
                continue;
            };
            // What has grown may be somebody else's as long as the API has not taken this.
            let counted = asking
                .counted
                .get(name)
                .map_or(from, |&counted| counted.max(from));
            let counted = counted.min(said);
            if (uid.as_str(), container.as_str()) == key {
                base = Some(counted);
            } else {
                others = others.saturating_add(to.saturating_sub(counted));
            }
        }
        (base, others)
    }

    /// What was asked for of a pod's other containers and its spec does not say.
    fn asked_in(&self, pod: &CountedPod, container: &str, what: What, now: Nanos) -> u64 {
        let all = self.asked.iter();
        let beside = all.filter(|((uid, other, asked), _)| {
            *uid == pod.uid && other != container && *asked == what
        });
        let missing = beside.filter_map(|((_, other, _), asking)| {
            let open = asking.all.iter().filter(|asked| asked.counts(now));
            let (_, to) = extent(open)?;
            Some(to.saturating_sub(pod.of(other, what)?))
        });
        missing.fold(0, u64::saturating_add)
    }

    /// Forgets what counts no more.
    pub fn settle(&mut self, now: Nanos) {
        self.asked.retain(|_, asking| {
            asking.all.retain(|asked| asked.counts(now));
            !asking.all.is_empty()
        });
    }
}

impl Quota {
    /// Whether it counts a container's of a pod.
    fn counts(&self, pod: &CountedPod, container: &str, what: What) -> bool {
        !pod.is_beside(container, what) && self.scopes.iter().all(|scope| scope.has(pod))
    }
}

impl Asked {
    fn counts(&self, now: Nanos) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// From the least to the most.
fn extent<'a>(asked: impl Iterator<Item = &'a Asked>) -> Option<(u64, u64)> {
    asked.fold(None, |extent, asked| {
        let (from, to) = extent.unwrap_or((asked.from, asked.to));
        Some((from.min(asked.from), to.max(asked.to)))
    })
}

impl CountedPod {
    /// A limit or request of a container, or of the pod's own under [`crate::pod::WHOLE_POD`].
    fn of(&self, container: &str, what: What) -> Option<u64> {
        if container == crate::pod::WHOLE_POD {
            self.own.of(what)
        } else {
            self.containers.get(container)?.of(what)
        }
    }

    /// How much a quota has charged for one that has `own`: what init containers needed is charged as long as the pod is.
    fn charged(&self, own: u64, what: What) -> u64 {
        if self.own.of(what).is_some() {
            return own;
        }
        let together = self.together.of(what).unwrap_or_default();
        let beside = together.saturating_sub(own);
        self.before
            .of(what)
            .unwrap_or_default()
            .saturating_sub(beside)
    }

    /// Whether a container's is not counted, because the pod has its own.
    fn is_beside(&self, container: &str, what: What) -> bool {
        container != crate::pod::WHOLE_POD && self.own.of(what).is_some()
    }
}

/// Those of a namespace, by name.
fn in_namespace<'a, T>(
    all: &'a BTreeMap<(String, String), T>,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a str, &'a T)> {
    let own = all.range((namespace.to_owned(), String::new())..);
    let own = own.take_while(move |((own, _), _)| own == namespace);
    own.map(|((_, name), value)| (name.as_str(), value))
}

/// Forgets all others; returns the namespaces of those.
fn keep<T>(
    all: &mut BTreeMap<(String, String), T>,
    listed: &BTreeSet<(String, String)>,
) -> BTreeSet<String> {
    let gone = all.extract_if(.., |key, _| !listed.contains(key));
    gone.map(|((namespace, _), _)| namespace).collect()
}

fn set<T: PartialEq>(
    all: &mut BTreeMap<(String, String), T>,
    key: (String, String),
    value: Option<T>,
) -> bool {
    match value {
        None => all.remove(&key).is_some(),
        Some(value) => {
            let is_new = all.get(&key) != Some(&value);
            all.insert(key, value);
            is_new
        }
    }
}

#[cfg(test)]
mod tests;
