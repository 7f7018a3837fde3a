//! The policies of the cluster, as the API has them.
//!
//! They are checked by the same reader as those in a file, although the API server has checked them already: the
//! resource definition may be another version's. One that cannot be read changes nothing; the one before holds.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bellows_core::elastic::ElasticPolicy;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DynamicObject},
    core::GroupVersionKind,
    runtime::watcher,
};

use super::conditions::Conditions;
use crate::{metrics::METRICS, policies};

const NOT_FOUND: u16 = 404;
const FORBIDDEN: u16 = 403;

/// The resource.
pub(super) fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", "ElasticPolicy");
    ApiResource::from_gvk_with_plural(&kind, "elasticpolicies")
}

/// The policies of all namespaces.
pub(super) fn api(client: &Client) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource())
}

/// How long it must be forbidden to read policies until there are taken to be none: an API server that has just started
/// knows no roles yet.
const FORBIDDEN_FOR: Duration = Duration::from_secs(60);

/// Those that are known.
#[derive(Default)]
pub(super) struct Policies {
    /// In the order of their names.
    all: Vec<ElasticPolicy>,
    by_name: BTreeMap<String, Read>,
    /// What is seen of a list that is not complete yet.
    listing: Option<BTreeMap<String, Read>>,
    /// Whether it is known which there are: before that nothing may be given back for want of one.
    is_known: bool,
    /// Since when it is forbidden to read them.
    forbidden: Option<Instant>,
    /// Whether it was told that there are none to be had.
    is_told: bool,
    /// Where it is said which can be read.
    conditions: Option<Conditions>,
}

/// A policy as it was last read.
#[derive(Clone, PartialEq, Eq)]
struct Read {
    namespace: String,
    /// The last that could be read.
    policy: Option<ElasticPolicy>,
    /// The version that could not be, if that is the last.
    unreadable: Option<String>,
}

impl Policies {
    /// None yet; what is read of them is said there.
    pub(super) fn with(conditions: Conditions) -> Self {
        Self {
            conditions: Some(conditions),
            ..Self::default()
        }
    }

    /// All that can be read.
    pub(super) fn all(&self) -> &[ElasticPolicy] {
        &self.all
    }

    /// Whether it is known which there are in a namespace: who is meant by one that cannot be read is not.
    pub(super) fn are_known(&self, namespace: &str) -> bool {
        let is_unknown = |read: &Read| read.namespace == namespace && read.policy.is_none();
        self.is_known && !self.by_name.values().any(is_unknown)
    }

    /// Takes an event of their watch; returns whether there are others now, or more is known.
    pub(super) fn take(
        &mut self,
        event: Result<Option<watcher::Event<DynamicObject>>, watcher::Error>,
    ) -> bool {
        let was_known = self.is_known;
        match event {
            Ok(Some(watcher::Event::Init)) => self.listing = Some(BTreeMap::new()),
            Ok(Some(watcher::Event::InitApply(object))) => {
                let read = self.read(&object);
                if let Some(listing) = &mut self.listing {
                    listing.insert(name(&object), read);
                }
                // While a list is read, the policies before it hold.
                return false;
            }
            Ok(Some(watcher::Event::InitDone)) => {
                (self.is_told, self.forbidden) = (false, None);
                self.is_known = true;
                self.by_name = self.listing.take().unwrap_or_default();
                if let Some(conditions) = &self.conditions {
                    conditions.keep(|namespace, name| {
                        self.by_name.contains_key(&format!("{namespace}/{name}"))
                    });
                }
            }
            Ok(Some(watcher::Event::Apply(object))) => {
                let read = self.read(&object);
                self.by_name.insert(name(&object), read);
            }
            Ok(Some(watcher::Event::Delete(object))) => {
                self.by_name.remove(&name(&object));
                if let Some(conditions) = &self.conditions {
                    conditions.forget(&object);
                }
            }
            Ok(None) => {}
            Err(error) => self.failed(&error),
        }
        let all = self.by_name.values().filter_map(|read| read.policy.clone());
        let all: Vec<ElasticPolicy> = all.collect();
        let is_new = all != self.all || self.is_known != was_known;
        self.all = all;
        is_new
    }

    fn read(&self, object: &DynamicObject) -> Read {
        let name = name(object);
        let namespace = object.namespace().unwrap_or_default();
        let before = self.by_name.get(&name);
        let read = policies::of_object(&name, &namespace, &object.data["spec"]);
        if let Some(conditions) = &self.conditions {
            let told = |policy| policies::told(std::slice::from_ref(policy));
            let told = read.as_ref().map(told);
            conditions.judged(object, told.map_err(String::as_str));
        }
        match read {
            Ok(policy) => {
                tracing::info!(name, mode = ?policy.mode, "policy");
                Read {
                    namespace,
                    policy: Some(policy),
                    unreadable: None,
                }
            }
            Err(why) => {
                let version = object.resource_version();
                let is_told = before.is_some_and(|before| before.unreadable == version);
                if !is_told {
                    METRICS.policies_rejected.inc();
                    tracing::error!(name, why, "a policy cannot be read; the one before holds");
                }
                Read {
                    namespace,
                    policy: before.and_then(|before| before.policy.clone()),
                    unreadable: version,
                }
            }
        }
    }

    fn failed(&mut self, error: &watcher::Error) {
        let (watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error)) = error
        else {
            tracing::debug!(%error, "the watch of policies is interrupted");
            return;
        };
        match error {
            kube::Error::Api(status) if status.code == NOT_FOUND => {
                // Without a resource definition there are none.
                self.by_name.clear();
                self.is_known = true;
            }
            kube::Error::Api(status) if status.code == FORBIDDEN => {
                let since = *self.forbidden.get_or_insert_with(Instant::now);
                self.is_known |= since.elapsed() >= FORBIDDEN_FOR;
            }
            _ => {}
        }
        if std::mem::replace(&mut self.is_told, true) {
            tracing::debug!(%error, "no policies");
        } else {
            tracing::warn!(%error, "no policies can be read: only annotations hold; apply deploy/elasticpolicies.yaml to have some");
        }
    }
}

/// `NAMESPACE/NAME`.
fn name(object: &DynamicObject) -> String {
    let namespace = object.namespace().unwrap_or_default();
    format!("{namespace}/{}", object.name_any())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn object(name: &str, version: &str, spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "bellows.dev/v1alpha1",
            "kind": "ElasticPolicy",
            "metadata": { "name": name, "namespace": "dev", "resourceVersion": version },
            "spec": spec,
        }))
        .unwrap()
    }

    fn good(max: &str) -> Value {
        json!({ "mode": "Act", "containers": [{ "memory": { "max": max } }] })
    }

    /// Policies, and whether each event says that there are others now.
    #[derive(Default)]
    struct Bed(Policies);

    impl Bed {
        fn take(&mut self, event: watcher::Event<DynamicObject>) -> bool {
            self.0.take(Ok(Some(event)))
        }
    }

    #[test]
    fn a_list_counts_when_it_is_whole() {
        let mut bed = Bed::default();
        assert!(!bed.take(watcher::Event::Init));
        assert!(!bed.take(watcher::Event::InitApply(object("a", "1", &good("1Gi")))));
        assert!(bed.0.all().is_empty() && !bed.0.are_known("dev"));
        assert!(bed.take(watcher::Event::InitDone));
        assert_eq!((bed.0.all().len(), bed.0.are_known("dev")), (1, true));
        // Another list, without it.
        assert!(!bed.take(watcher::Event::Init));
        assert_eq!(bed.0.all().len(), 1);
        assert!(bed.take(watcher::Event::InitDone));
        assert!(bed.0.all().is_empty() && bed.0.are_known("dev"));
    }

    #[test]
    fn what_cannot_be_read_changes_nothing_and_is_not_none() {
        let wrong = json!({ "containers": [{ "memory": { "maximum": "1Gi" } }] });
        let mut bed = Bed::default();
        bed.take(watcher::Event::Init);
        bed.take(watcher::Event::InitApply(object("a", "1", &wrong)));
        bed.take(watcher::Event::InitDone);
        // Whoever it means may have been raised by it, before this agent was there.
        assert!(!bed.0.are_known("dev") && bed.0.are_known("other"));
        bed.take(watcher::Event::Apply(object("a", "2", &good("1Gi"))));
        assert!(bed.0.are_known("dev"));
        assert!(!bed.take(watcher::Event::Apply(object("a", "3", &wrong))));
        assert_eq!((bed.0.all().len(), bed.0.are_known("dev")), (1, true));
    }

    #[test]
    fn without_a_resource_definition_there_are_none() {
        let mut bed = Bed::default();
        let status = |code: u16| {
            let status = kube::core::Status {
                code,
                ..kube::core::Status::default()
            };
            watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
        };
        assert!(!bed.0.take(Err(status(403))));
        assert!(!bed.0.are_known("dev"));
        assert!(bed.0.take(Err(status(404))));
        assert!(bed.0.are_known("dev"));
    }
}
