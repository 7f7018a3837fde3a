//! The policies of the cluster, as the API has them.
//!
//! They are checked by the same reader as those in a file, although the API server has checked them already: the
//! resource definition may be another version's. One that cannot be read changes nothing; the one before holds.

use std::collections::{BTreeMap, BTreeSet};

use bellows_core::elastic::ElasticPolicy;
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{ApiResource, DynamicObject},
    core::GroupVersionKind,
    runtime::watcher,
};

use super::super::events::Events;
use crate::{metrics::METRICS, policies};

const NOT_FOUND: u16 = 404;
const FORBIDDEN: u16 = 403;

/// The resource.
fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", "ElasticPolicy");
    ApiResource::from_gvk_with_plural(&kind, "elasticpolicies")
}

/// The policies of all namespaces.
pub(super) fn api(client: &Client) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource())
}

/// Those that are known.
#[derive(Default)]
pub(super) struct Policies {
    /// In the order of their names.
    all: Vec<ElasticPolicy>,
    by_name: BTreeMap<String, ElasticPolicy>,
    /// What is seen of a list that is not complete yet.
    listed: BTreeSet<String>,
    /// Whether it is known which there are: before that nothing may be given back for want of one.
    is_known: bool,
    /// Whether it was told that there are none to be had.
    is_told: bool,
}

impl Policies {
    /// All of them.
    pub(super) fn all(&self) -> &[ElasticPolicy] {
        &self.all
    }

    /// Whether it is known which there are.
    pub(super) const fn are_known(&self) -> bool {
        self.is_known
    }

    /// Takes an event of their watch; returns whether there are others now.
    pub(super) fn take(
        &mut self,
        event: Result<Option<watcher::Event<DynamicObject>>, watcher::Error>,
        events: &Events,
    ) -> bool {
        let was_known = self.is_known;
        match event {
            Ok(Some(watcher::Event::Init)) => self.listed.clear(),
            Ok(Some(watcher::Event::InitApply(object))) => {
                self.listed.insert(name(&object));
                self.read(&object, events);
            }
            Ok(Some(watcher::Event::InitDone)) => {
                self.is_told = false;
                self.is_known = true;
                let Self {
                    by_name, listed, ..
                } = self;
                by_name.retain(|name, _| listed.contains(name));
            }
            Ok(Some(watcher::Event::Apply(object))) => self.read(&object, events),
            Ok(Some(watcher::Event::Delete(object))) => drop(self.by_name.remove(&name(&object))),
            Ok(None) => {}
            Err(error) => self.failed(&error),
        }
        // While a list is read, the policies before it hold.
        let all: Vec<ElasticPolicy> = self.by_name.values().cloned().collect();
        let is_new = all != self.all || self.is_known != was_known;
        self.all = all;
        is_new
    }

    fn read(&mut self, object: &DynamicObject, events: &Events) {
        let name = name(object);
        let namespace = object.namespace().unwrap_or_default();
        match policies::of_object(&name, &namespace, &object.data["spec"]) {
            Ok(policy) => {
                tracing::info!(name, mode = ?policy.mode, "policy");
                self.by_name.insert(name, policy);
            }
            Err(why) => {
                METRICS.policies_rejected.inc();
                tracing::error!(name, why, "a policy cannot be read; the one before holds");
                events.rejected(object.object_ref(&resource()), why);
            }
        }
    }

    fn failed(&mut self, error: &watcher::Error) {
        if let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error
            && [NOT_FOUND, FORBIDDEN].contains(&status.code)
        {
            // Without a resource definition there are none, and without a role none for us.
            self.is_known = true;
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
