//! The `ElasticNode` of this node: what its agent sees and does, for whoever asks the API and not the agent.
//!
//! One object a node, with the node's name, and written by that node's agent alone: the admission policy keeps each to its
//! own. It is owned by the Node object, and goes with it; whose uid that is the API itself says of our token, so no
//! right is needed to read nodes. Where that is not known it is owned by nobody.
//!
//! It is written at most every ten seconds, and only if it says something else, or after five minutes: somebody may have
//! deleted it. What changes all the time is rounded for that: a budget to a quarter of a GiB.
//!
//! It must not keep anybody waiting: this is a task of its own, and whatever fails is tried again later.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

use bellows_core::{
    Bytes,
    pod::{
        MANAGER,
        way::{Server, Way, Whose},
    },
    quantity,
};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    actuate::resize::{TIMEOUT, Ways, code_of},
    guard::{Counts, Input},
};

/// How often it is written at most.
const EVERY: Duration = Duration::from_secs(10);
/// How soon it is tried again where there is no such resource, or no right.
const MISSING: Duration = Duration::from_secs(300);
/// How often it is written at least.
const ANEW: Duration = Duration::from_secs(300);
/// What a budget is rounded down to.
const STEP: u64 = 256 << 20;
/// Names of the token's node.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    agent_version: &'static str,
    mode: &'static str,
    /// How limits of containers are moved.
    way: &'static str,
    /// Where growth is seen.
    signals: &'static str,
    /// What is lost with what the kernel does not have.
    missing: Vec<String>,
    guarded: usize,
    watched: usize,
    raised: usize,
    raised_memory: String,
    held: usize,
    waiting: usize,
    bounded: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<String>,
    owed_requests: String,
}

impl Status {
    fn of(counts: Counts, server: Option<Server>, owed: Bytes, only_observes: bool) -> Self {
        let Counts {
            guarded,
            watched,
            raised,
            raised_by,
            held,
            waiting,
            bounded,
            budget,
            has_programs,
            lost,
        } = counts;
        // Of a pod whose kubelet says what it has: of others limits are moved on the node.
        let way = server.map(|server| server.way(Whose::Container, true));
        Self {
            agent_version: env!("CARGO_PKG_VERSION"),
            mode: if only_observes { "Observe" } else { "Act" },
            way: match way {
                _ if only_observes => "None",
                Some(Some(Way::Resize)) => "Resize",
                Some(Some(Way::Patch)) => "Patch",
                Some(Some(Way::Node)) => "Node",
                // Nobody had to be resized yet.
                Some(None) | None => "Unknown",
            },
            signals: if has_programs { "Programs" } else { "Files" },
            missing: lost,
            guarded,
            watched,
            raised,
            raised_memory: quantity::format(raised_by),
            held,
            waiting,
            bounded,
            budget: budget.map(|budget| quantity::format(Bytes(budget.0 - budget.0 % STEP))),
            owed_requests: quantity::format(owed),
        }
    }
}

/// What was written last, and when.
#[derive(Default)]
struct Written(Option<(Status, Instant)>);

impl Written {
    /// Whether to write this.
    fn is_due(&self, status: &Status, now: Instant) -> bool {
        let is_same =
            |(written, at): &(Status, Instant)| written == status && now.duration_since(*at) < ANEW;
        !self.0.as_ref().is_some_and(is_same)
    }
}

/// Whether the API will not have it for long: there is no resource definition, or no right (a chart of before), or an
/// admission policy refuses it without a reason (422); or somebody has deleted it.
fn is_refused(code: u16) -> bool {
    [403, 404, 422].contains(&code)
}

/// Who writes it.
pub(super) struct Teller {
    pub(super) client: Client,
    pub(super) node: String,
    pub(super) inputs: SyncSender<Input>,
    pub(super) ways: Ways,
    pub(super) only_observes: bool,
    /// Memory requests that are owed, bytes.
    pub(super) owed: Arc<AtomicU64>,
}

/// The task that writes it ends with this.
pub(super) struct Telling(JoinHandle<()>);

impl Drop for Telling {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn api(client: &Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", "ElasticNode");
    Api::all_with(client.clone(), &ApiResource::from_gvk(&kind))
}

impl Teller {
    pub(super) fn start(self) -> Telling {
        Telling(tokio::spawn(self.tell()))
    }

    async fn tell(self) {
        let (mut written, mut is_made) = (Written::default(), false);
        loop {
            sleep(EVERY).await;
            let Some(status) = self.status().await else {
                continue;
            };
            if !written.is_due(&status, Instant::now()) {
                continue;
            }
            match timeout(TIMEOUT, self.write(&status, is_made)).await {
                Ok(Ok(())) => {
                    written = Written(Some((status, Instant::now())));
                    is_made = true;
                }
                Ok(Err(kube::Error::Api(said))) if is_refused(code_of(&said)) => {
                    tracing::debug!(%said, "this node's ElasticNode is not written");
                    if !std::mem::replace(&mut is_made, false) {
                        sleep(MISSING).await;
                    }
                }
                failed => tracing::debug!(?failed, "this node's ElasticNode is not written yet"),
            }
        }
    }

    async fn status(&self) -> Option<Status> {
        let (answer, counts) = oneshot::channel();
        self.inputs.try_send(Input::Count(answer)).ok()?;
        let counts = timeout(TIMEOUT, counts).await.ok()?.ok()?;
        let owed = Bytes(self.owed.load(Ordering::Relaxed));
        let server = self.ways.known();
        Some(Status::of(counts, server, owed, self.only_observes))
    }

    async fn write(&self, status: &Status, is_made: bool) -> kube::Result<()> {
        let api = api(&self.client);
        let parameters = PatchParams::apply(MANAGER).force();
        let mut object = json!({
            "apiVersion": "bellows.dev/v1alpha1",
            "kind": "ElasticNode",
            "metadata": { "name": self.node },
        });
        if !is_made {
            let review = Api::<SelfSubjectReview>::all(self.client.clone());
            let own = SelfSubjectReview::default();
            let said = review.create(&PostParams::default(), &own).await.ok();
            let mut made = object.clone();
            made["metadata"]["ownerReferences"] = owner(said.as_ref(), &self.node);
            api.patch(&self.node, &parameters, &Patch::Apply(&made))
                .await?;
        }
        object["status"] = json!(status);
        api.patch_status(&self.node, &parameters, &Patch::Apply(&object))
            .await?;
        Ok(())
    }
}

/// Whose it is, as the API says of our token.
fn owner(said: Option<&SelfSubjectReview>, node: &str) -> Value {
    let user = said.and_then(|said| said.status.as_ref()?.user_info.as_ref());
    let extra = user.and_then(|user| user.extra.as_ref());
    let one = |name: &str| extra.and_then(|extra| extra.get(name)?.first());
    match (one(NODE_NAME), one(NODE_UID)) {
        (Some(name), Some(uid)) if name == node => json!([{
            "apiVersion": "v1", "kind": "Node", "name": node, "uid": uid,
        }]),
        _ => json!([]),
    }
}

/// Takes it away, at the end of an agent after which none comes.
pub(super) async fn forget(client: &Client, node: &str) {
    let api = api(client);
    let parameters = DeleteParams::default();
    let deleted = api.delete(node, &parameters);
    match timeout(TIMEOUT, deleted).await {
        Ok(Ok(_)) => {}
        failed => tracing::debug!(?failed, "this node's ElasticNode is left behind"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(budget: u64) -> Counts {
        Counts {
            guarded: 3,
            raised: 1,
            raised_by: Bytes::mib(192),
            budget: Some(Bytes::mib(budget)),
            has_programs: true,
            ..Counts::default()
        }
    }

    #[test]
    fn what_changes_all_the_time_is_rounded() {
        let of = |budget| Status::of(counts(budget), None, Bytes::ZERO, false);
        assert_eq!(of(1030), of(1270));
        assert_ne!(of(1030), of(1290));
        let said = json!(of(1030));
        assert_eq!(
            (&said["budget"], &said["raisedMemory"]),
            (&json!("1Gi"), &json!("192Mi"))
        );
        assert_eq!(
            (&said["way"], &said["signals"]),
            (&json!("Unknown"), &json!("Programs"))
        );
    }

    #[test]
    fn what_is_the_same_is_written_now_and_then() {
        let of = |budget| Status::of(counts(budget), None, Bytes::ZERO, false);
        let now = Instant::now();
        assert!(Written::default().is_due(&of(1024), now));
        let written = Written(Some((of(1024), now)));
        assert!(!written.is_due(&of(1024), now + ANEW - EVERY));
        assert!(written.is_due(&of(2048), now + EVERY));
        // It may have been deleted.
        assert!(written.is_due(&of(1024), now + ANEW));
    }

    #[test]
    fn who_is_refused_waits() {
        let refused = (400..600).filter(|&code| is_refused(code));
        assert_eq!(refused.collect::<Vec<_>>(), [403, 404, 422]);
    }

    #[test]
    fn the_way_is_that_of_the_server() {
        let server = |minor| Server {
            minor,
            has_resize: true,
            takes_patch: None,
        };
        let way = |server, only_observes| {
            Status::of(counts(0), Some(server), Bytes::ZERO, only_observes).way
        };
        assert_eq!(way(server(37), false), "Resize");
        assert_eq!(way(server(33), false), "Node");
        assert_eq!(way(server(37), true), "None");
    }

    #[test]
    fn it_is_owned_by_the_node_of_the_token_and_no_other() {
        let review = |name: &str| -> SelfSubjectReview {
            let extra = json!({ NODE_NAME: [name], NODE_UID: ["u1"] });
            serde_json::from_value(json!({ "status": { "userInfo": { "extra": extra } } })).unwrap()
        };
        assert_eq!(owner(Some(&review("n1")), "n1")[0]["uid"], "u1");
        assert_eq!(owner(Some(&review("n2")), "n1"), json!([]));
        assert_eq!(owner(None, "n1"), json!([]));
    }

    /// What is written and what the API server keeps are the same fields.
    #[test]
    fn the_resource_definition_has_every_field() {
        let definition = include_str!("../../../../deploy/elasticnodes.yaml");
        let definition: Value = serde_saphyr::from_str(definition).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let fields = schema["properties"]["status"]["properties"]
            .as_object()
            .unwrap();
        let said = json!(Status::of(counts(1), None, Bytes::ZERO, false));
        let said: Vec<&String> = said.as_object().unwrap().keys().collect();
        assert_eq!(fields.keys().collect::<Vec<_>>(), said);
    }
}
