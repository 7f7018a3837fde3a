//! LimitRanges and ResourceQuotas of the cluster, as the API has them.
//!
//! All namespaces are watched: watching those alone that have guarded pods needs the same right in all of them, and a
//! watch for each. Nothing in these objects is secret.
//!
//! An agent that may not read them (a chart of before) knows no bounds, and then nothing is raised before the API is
//! asked. An amount that cannot be read counts as nothing left: a guess would exceed it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use bellows_core::{
    allowance::{Among, Amount, Measure, Quota, Range, Scope, What},
    quantity,
};
use k8s_openapi::{
    api::core::v1::{LimitRange, LimitRangeItem, ResourceQuota, ScopedResourceSelectorRequirement},
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{ResourceExt, runtime::watcher};

use crate::actuate::allowances::SharedAllowances;

/// How often it is told that they cannot be read.
const TOLD: Duration = Duration::from_secs(600);

/// What an event of a watch is for whoever keeps what it watches.
enum Change<K> {
    Set(K),
    Gone(K),
    /// The list is complete.
    Listed,
}

/// What an event says to the pods of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum News {
    None,
    /// There is more or less left.
    Bounds,
    /// What is asked for a pod may be another: whether a limit is raised first, how far a request is lowered.
    Rules,
}

/// One of the two watches.
#[derive(Default)]
struct Seen {
    /// While a list is read.
    listing: Option<BTreeSet<(String, String)>>,
    /// Whether something of the list is new: that is told when it is whole.
    is_new: bool,
    is_listed: bool,
    told: Option<Instant>,
}

/// What is watched of both.
#[derive(Default)]
pub(super) struct Allowed {
    shared: SharedAllowances,
    ranges: Seen,
    quotas: Seen,
}

type Event<K> = Result<Option<watcher::Event<K>>, watcher::Error>;

impl Seen {
    /// What is to be done, if anything.
    fn take<K: ResourceExt>(&mut self, kind: &str, event: Event<K>) -> Option<Change<K>> {
        match event {
            Ok(Some(watcher::Event::Init)) => self.listing = Some(BTreeSet::new()),
            Ok(Some(watcher::Event::InitApply(object))) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(key(&object));
                }
                return Some(Change::Set(object));
            }
            Ok(Some(watcher::Event::InitDone)) => {
                self.is_listed = true;
                return Some(Change::Listed);
            }
            Ok(Some(watcher::Event::Apply(object))) => return Some(Change::Set(object)),
            Ok(Some(watcher::Event::Delete(object))) => return Some(Change::Gone(object)),
            Ok(None) => {}
            Err(error) => {
                if self.told.is_none_or(|told| told.elapsed() >= TOLD) {
                    self.told = Some(Instant::now());
                    tracing::warn!(kind, %error, "what namespaces allow is not known yet: nothing is raised before the API is asked");
                }
            }
        }
        None
    }

    /// Whether it is to be told that something is new: not as long as a list is read.
    fn tells(&mut self, is_new: bool) -> bool {
        self.is_new |= is_new;
        self.listing.is_none() && std::mem::take(&mut self.is_new)
    }
}

fn key(object: &impl ResourceExt) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

impl Allowed {
    pub(super) fn new(shared: SharedAllowances) -> Self {
        Self {
            shared,
            ..Self::default()
        }
    }

    /// Takes an event of the watch of LimitRanges.
    pub(super) fn take_range(&mut self, event: Event<LimitRange>) -> News {
        let is_new = match self.ranges.take("LimitRange", event) {
            None => false,
            Some(Change::Set(object)) => {
                let (namespace, name) = key(&object);
                let ranges = Some(ranges(&object));
                self.shared.with(|all| all.range(&namespace, &name, ranges))
            }
            Some(Change::Gone(object)) => {
                let (namespace, name) = key(&object);
                self.shared.with(|all| all.range(&namespace, &name, None))
            }
            Some(Change::Listed) => {
                let listed = self.ranges.listing.take().unwrap_or_default();
                self.shared.with(|all| all.keep_ranges(&listed))
            }
        };
        let is_told = self.ranges.tells(is_new);
        let own = if is_told { News::Rules } else { News::None };
        own.max(self.is_known())
    }

    /// The same of quotas.
    pub(super) fn take_quota(&mut self, event: Event<ResourceQuota>) -> News {
        let is_new = match self.quotas.take("ResourceQuota", event) {
            None => false,
            Some(Change::Set(object)) => {
                let (namespace, name) = key(&object);
                let quota = Some(quota(&object));
                self.shared.with(|all| all.quota(&namespace, &name, quota))
            }
            Some(Change::Gone(object)) => {
                let (namespace, name) = key(&object);
                self.shared.with(|all| all.quota(&namespace, &name, None))
            }
            Some(Change::Listed) => {
                let listed = self.quotas.listing.take().unwrap_or_default();
                self.shared.with(|all| all.keep_quotas(&listed))
            }
        };
        let is_told = self.quotas.tells(is_new);
        let own = if is_told { News::Bounds } else { News::None };
        own.max(self.is_known())
    }

    /// Whether both are known; that changes the rules.
    fn is_known(&self) -> News {
        let is_known = self.ranges.is_listed && self.quotas.is_listed;
        if self.shared.are_known() == is_known {
            return News::None;
        }
        self.shared.known(is_known);
        News::Rules
    }
}

/// An amount; `None` for one that cannot be read.
fn amount(measure: Measure, quantity: &Quantity) -> Option<u64> {
    match measure {
        Measure::Memory => Some(quantity::parse(&quantity.0).ok()?.0),
        Measure::Cpu => Some(quantity::parse_cpu_amount(&quantity.0)?.0),
    }
}

/// A factor, in thousandths.
fn per_mille(quantity: &Quantity) -> Option<u64> {
    Some(quantity::parse_cpu_amount(&quantity.0)?.0 / 1000)
}

fn ranges(object: &LimitRange) -> Vec<Range> {
    let items = object.spec.iter().flat_map(|spec| &spec.limits);
    let ranges = items.flat_map(|item| {
        let of = |measure, name| range(item, measure, name);
        of(Measure::Memory, "memory")
            .into_iter()
            .chain(of(Measure::Cpu, "cpu"))
    });
    ranges.collect()
}

fn range(item: &LimitRangeItem, measure: Measure, name: &str) -> Option<Range> {
    let is_of_pod = match item.type_.as_str() {
        "Container" => false,
        "Pod" => true,
        _ => return None,
    };
    let max = item.max.as_ref().and_then(|max| max.get(name));
    // A request is compared with it, and no limit is ever set below its own.
    let min = item.min.as_ref().and_then(|min| min.get(name));
    let min = min.filter(|_| measure == Measure::Memory);
    let ratio = item.max_limit_request_ratio.as_ref();
    let ratio = ratio.and_then(|ratio| ratio.get(name));
    (max.is_some() || min.is_some() || ratio.is_some()).then(|| Range {
        measure,
        is_of_pod,
        max: max.map(|max| amount(measure, max).unwrap_or(0)),
        // One that cannot be read may be any: nothing is lowered.
        min: min.map(|min| amount(measure, min).unwrap_or(u64::MAX)),
        ratio_per_mille: ratio.map(|ratio| per_mille(ratio).unwrap_or(0)),
    })
}

/// A request has two names.
const NAMES: [(What, &[&str]); 3] = [
    (What::MemoryLimit, &["limits.memory"]),
    (What::CpuLimit, &["limits.cpu"]),
    (What::MemoryRequest, &["requests.memory", "memory"]),
];

fn quota(object: &ResourceQuota) -> Quota {
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let amounts = NAMES.iter().filter_map(|&(what, names)| {
        let all = names.iter().filter_map(|&name| {
            let hard = spec?.hard.as_ref()?.get(name)?;
            let hard = amount(what.measure(), hard).unwrap_or(0);
            // What the API goes by is in the status; without one it refuses.
            let said = |all: Option<&std::collections::BTreeMap<String, Quantity>>| {
                amount(what.measure(), all?.get(name)?)
            };
            let ruled = said(status.and_then(|status| status.hard.as_ref()));
            let used = said(status.and_then(|status| status.used.as_ref()));
            Some(match (ruled, used) {
                (Some(ruled), Some(used)) => Amount {
                    hard: ruled.min(hard),
                    used,
                },
                _ => Amount { hard, used: hard },
            })
        });
        // The one of both that leaves less.
        let least = all.min_by_key(|amount| amount.hard.saturating_sub(amount.used));
        Some((what, least?))
    });
    let named = spec.and_then(|spec| spec.scopes.as_ref());
    let named = named.into_iter().flatten();
    let named = named.map(|name| scope(name, None));
    let selected = spec.and_then(|spec| spec.scope_selector.as_ref());
    let selected = selected.and_then(|selector| selector.match_expressions.as_ref());
    let selected = selected.into_iter().flatten();
    let selected = selected.map(|selected| scope(&selected.scope_name, Some(selected)));
    Quota {
        scopes: named.chain(selected).collect(),
        amounts: amounts.collect(),
    }
}

/// All but priority classes know one operator only, Exists (`validateScopedResourceSelectorRequirement`,
/// pkg/apis/core/validation/validation.go).
fn scope(name: &str, selected: Option<&ScopedResourceSelectorRequirement>) -> Scope {
    match name {
        "Terminating" => Scope::Terminating(true),
        "NotTerminating" => Scope::Terminating(false),
        "BestEffort" => Scope::BestEffort(true),
        "NotBestEffort" => Scope::BestEffort(false),
        "CrossNamespacePodAffinity" => Scope::CrossNamespacePodAffinity,
        "PriorityClass" => {
            let values = || selected.and_then(|selected| selected.values.clone());
            let operator = selected.map(|selected| selected.operator.as_str());
            match operator {
                None | Some("Exists") => Scope::PriorityClass(Among::Exists),
                Some("DoesNotExist") => Scope::PriorityClass(Among::DoesNotExist),
                Some("In") => Scope::PriorityClass(Among::In(values().unwrap_or_default())),
                Some("NotIn") => Scope::PriorityClass(Among::NotIn(values().unwrap_or_default())),
                Some(_) => Scope::Unknown,
            }
        }
        _ => Scope::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use bellows_core::allowance::CountedPod;
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Quota {
        let value = json!({
            "metadata": { "namespace": "dev", "name": "q" },
            "spec": value["spec"], "status": value["status"],
        });
        quota(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_quota_is_what_its_status_says() {
        let read = read(&json!({
            "spec": {
                "hard": { "limits.memory": "4Gi", "requests.memory": "1Gi", "memory": "2Gi", "limits.cpu": "8", "pods": "3" },
                "scopes": ["NotTerminating"],
                "scopeSelector": { "matchExpressions": [
                    { "scopeName": "PriorityClass", "operator": "In", "values": ["high"] },
                    { "scopeName": "VolumeAttributesClass", "operator": "Exists" },
                ] },
            },
            "status": {
                "hard": { "limits.memory": "4Gi", "requests.memory": "1Gi", "memory": "2Gi" },
                "used": { "limits.memory": "1e9", "requests.memory": "100Mi", "memory": "100Mi" },
            },
        }));
        let gib = |n: u64| n << 30;
        let amount = |hard, used| Amount { hard, used };
        assert_eq!(
            read.amounts[&What::MemoryLimit],
            amount(gib(4), 1_000_000_000)
        );
        assert_eq!(
            read.amounts[&What::MemoryRequest],
            amount(gib(1), 100 << 20)
        );
        // It was not counted yet, and the API refuses until it is.
        assert_eq!(read.amounts[&What::CpuLimit], amount(8_000_000, 8_000_000));
        let class = Among::In(vec!["high".to_owned()]);
        let scopes = [
            Scope::Terminating(false),
            Scope::PriorityClass(class),
            Scope::Unknown,
        ];
        assert_eq!(read.scopes, scopes);
    }

    /// The API prints 1,000 CPUs as `1k`, whatever was written.
    #[test]
    fn a_quota_of_thousands_of_cpus_leaves_them() {
        let hard = json!({ "limits.cpu": "2k" });
        let read = read(&json!({
            "spec": { "hard": hard }, "status": { "hard": hard, "used": { "limits.cpu": "1k" } },
        }));
        let thousand = 1_000_000_000;
        assert_eq!(
            read.amounts[&What::CpuLimit],
            Amount {
                hard: 2 * thousand,
                used: thousand,
            }
        );
        let object = json!({ "metadata": { "name": "r" }, "spec": { "limits": [
            { "type": "Container", "max": { "cpu": "1k" }, "maxLimitRequestRatio": { "cpu": "1k" } },
        ] } });
        let range = &ranges(&serde_json::from_value(object).unwrap())[0];
        assert_eq!(range.max, Some(thousand));
        assert_eq!(range.ratio_per_mille, Some(1_000_000));
    }

    #[test]
    fn what_cannot_be_read_leaves_nothing() {
        let hard = json!({ "limits.memory": "-1" });
        let read = read(&json!({
            "spec": { "hard": hard }, "status": { "hard": hard, "used": { "limits.memory": "1" } },
        }));
        assert_eq!(
            read.amounts[&What::MemoryLimit],
            Amount { hard: 0, used: 0 }
        );
        let item = json!({ "type": "Container", "max": { "memory": "much" } });
        let object = json!({ "metadata": { "name": "r" }, "spec": { "limits": [item] } });
        assert_eq!(
            ranges(&serde_json::from_value(object).unwrap())[0].max,
            Some(0)
        );
    }

    #[test]
    fn a_limit_range_is_read_of_containers_and_pods() {
        let object = json!({ "metadata": { "name": "r" }, "spec": { "limits": [
            { "type": "Container", "max": { "memory": "1Gi", "cpu": "1500m" }, "min": { "memory": "1Mi" } },
            { "type": "Pod", "maxLimitRequestRatio": { "memory": "2.5" } },
            { "type": "PersistentVolumeClaim", "max": { "storage": "1Gi" } },
        ] } });
        let range = |measure, is_of_pod, max, min, ratio_per_mille| Range {
            measure,
            is_of_pod,
            max,
            min,
            ratio_per_mille,
        };
        assert_eq!(
            ranges(&serde_json::from_value(object).unwrap()),
            [
                range(Measure::Memory, false, Some(1 << 30), Some(1 << 20), None),
                range(Measure::Cpu, false, Some(1_500_000), None, None),
                range(Measure::Memory, true, None, None, Some(2500)),
            ]
        );
    }

    #[test]
    fn they_are_known_when_both_lists_are_whole() {
        let shared = SharedAllowances::default();
        let mut allowed = Allowed::new(shared.clone());
        let object = |name: &str| -> LimitRange {
            let item = json!({ "type": "Container", "max": { "memory": "1Gi" } });
            let metadata = json!({ "namespace": "dev", "name": name });
            serde_json::from_value(json!({ "metadata": metadata, "spec": { "limits": [item] } }))
                .unwrap()
        };
        let pod = CountedPod {
            namespace: "dev".to_owned(),
            uid: "u".to_owned(),
            ..CountedPod::default()
        };
        shared.with(|all| all.pod(pod));
        let range = |allowed: &mut Allowed, event| allowed.take_range(Ok(Some(event)));
        assert_eq!(range(&mut allowed, watcher::Event::Init), News::None);
        // A list says what it has to say once, and what is known then is not all.
        let a = || object("a");
        assert_eq!(
            range(&mut allowed, watcher::Event::InitApply(a())),
            News::None
        );
        assert_eq!(range(&mut allowed, watcher::Event::InitDone), News::Rules);
        assert!(!shared.are_known());
        allowed.take_quota(Ok(Some(watcher::Event::Init)));
        // Whoever was adopted before may be raised first from now on.
        let done = allowed.take_quota(Ok(Some(watcher::Event::InitDone)));
        assert_eq!(done, News::Rules);
        assert!(shared.are_known());
        // What is the same is no news, and what is gone in the next list is gone.
        assert_eq!(range(&mut allowed, watcher::Event::Apply(a())), News::None);
        assert_eq!(
            range(&mut allowed, watcher::Event::Apply(object("b"))),
            News::Rules
        );
        let mut other = object("c");
        other.metadata.namespace = Some("other".to_owned());
        assert_eq!(
            range(&mut allowed, watcher::Event::Apply(other)),
            News::None
        );
        let quota = json!({
            "metadata": { "namespace": "dev", "name": "q" },
            "spec": { "hard": { "limits.memory": "1Gi" } },
        });
        let quota = || serde_json::from_value(quota.clone()).unwrap();
        let told = allowed.take_quota(Ok(Some(watcher::Event::Apply(quota()))));
        assert_eq!(told, News::Bounds);
        range(&mut allowed, watcher::Event::Init);
        assert_eq!(range(&mut allowed, watcher::Event::InitDone), News::Rules);
        assert!(!shared.with(|all| all.range("dev", "a", None)));
    }
}
