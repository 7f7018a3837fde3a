//! Finding out how limits are changed here: what the API server has, and what it takes.
//!
//! It is asked once for each list of pods: an API server that comes back may be a later one.

use std::sync::{Arc, MutexGuard, PoisonError};

use bellows_core::pod::{
    self, Level,
    way::{Server, Way, Whose},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{Status, response::StatusSummary},
};
use tokio::{sync::Mutex, time::timeout};

use super::{Change, TIMEOUT, code_of, limits_patch, parameters};
use crate::attribution::api::Pod;

/// What is known of the API server; clones share it.
#[derive(Clone)]
pub struct Ways {
    client: Client,
    known: Arc<std::sync::Mutex<Known>>,
    /// One asks at a time.
    asking: Arc<Mutex<()>>,
}

#[derive(Default)]
struct Known {
    server: Option<Server>,
    /// How often it was forgotten: what was asked before may be of another one.
    forgotten: u64,
}

impl Known {
    fn forget(&mut self) {
        self.server = None;
        self.forgotten += 1;
    }

    fn found(&mut self, server: Server, forgotten: u64) {
        if self.forgotten == forgotten {
            self.server = Some(server);
        }
    }
}

/// A pod, and a change that it is not to suffer.
#[derive(Debug)]
pub struct Probed<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its uid.
    pub uid: &'a str,
    /// Whose limit is to be changed.
    pub whose: Whose,
    /// Whether the kubelet says what resources its running containers have, and, where it has some of its own, the pod.
    pub is_reported: bool,
    /// What the API server is asked for where nothing else tells, without doing it.
    pub change: Change,
}

impl<'a> Probed<'a> {
    /// One of a pod's limits.
    #[must_use]
    pub fn of(pod: &'a pod::Pod, level: Level, change: Change) -> Self {
        let whose = Whose::of(pod, level);
        Self {
            namespace: &pod.namespace,
            name: &pod.name,
            uid: &pod.uid,
            whose,
            is_reported: is_reported(pod, level) && (whose != Whose::Pod || pod.reports_resources),
            change,
        }
    }
}

/// Whether the kubelet says what resources running containers have: of the one that is meant, or, where that does not run (it
/// has ended, or is about to be started again), of another of its pod. Where none runs it cannot, and the API server does
/// not ask either (`isPodResizeRequestSupported`, pkg/apis/core/validation/validation.go).
fn is_reported(pod: &pod::Pod, level: Level) -> bool {
    let own = match level {
        Level::Pod => None,
        Level::Container(index) => pod.containers.get(index),
    };
    if let Some(own) = own.filter(|own| own.id.is_some()) {
        return own.reports_resources;
    }
    let mut running = pod
        .containers
        .iter()
        .filter(|container| container.id.is_some())
        .peekable();
    running.peek().is_none() || running.any(|container| container.reports_resources)
}

impl std::fmt::Debug for Ways {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Ways").finish_non_exhaustive()
    }
}

impl Ways {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self {
            client,
            known: Arc::default(),
            asking: Arc::default(),
        }
    }

    /// It may be another one from now on.
    pub fn forget(&self) {
        self.lock().forget();
    }

    /// What is known of the API server.
    #[must_use]
    pub fn known(&self) -> Option<Server> {
        self.lock().server
    }

    #[cfg(test)]
    pub(crate) fn knows(&self, server: Server) {
        self.lock().server = Some(server);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How limits of a pod are changed, where that is known: nobody is asked.
    #[must_use]
    pub fn known_of(&self, probed: &Probed<'_>) -> Option<Way> {
        self.known()?.way(probed.whose, probed.is_reported)
    }

    /// How limits of a pod are changed.
    ///
    /// # Errors
    ///
    /// When the API server does not say, for people.
    pub async fn of(&self, probed: &Probed<'_>) -> Result<Way, String> {
        if let Some(way) = self.known_of(probed) {
            return Ok(way);
        }
        let _turn = self.asking.lock().await;
        let forgotten = self.lock().forgotten;
        let mut server = match self.known() {
            Some(server) => server,
            None => self.discovered().await?,
        };
        self.lock().found(server, forgotten);
        if let Some(way) = server.way(probed.whose, probed.is_reported) {
            return Ok(way);
        }
        let takes = self.takes(probed).await?;
        server.takes_patch = Some(takes);
        self.lock().found(server, forgotten);
        tracing::info!(takes, "whether the API server resizes by a patch of a pod");
        let way = server.way(probed.whose, probed.is_reported);
        Ok(way.unwrap_or(Way::Node))
    }

    async fn discovered(&self) -> Result<Server, String> {
        let asked = async {
            let version = self.client.apiserver_version().await?;
            let resources = self.client.list_core_api_resources("v1").await?;
            Ok::<_, kube::Error>((version, resources.resources))
        };
        let (version, resources) = match timeout(TIMEOUT, asked).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => {
                return Err(format!("the API server does not say what it is: {error}"));
            }
            Err(_elapsed) => return Err("the API server does not say what it is".to_owned()),
        };
        let server = Server {
            minor: minor(&version.major, &version.minor)
                .ok_or_else(|| format!("the API server is of version {}", version.git_version))?,
            has_resize: resources.iter().any(|kind| kind.name == "pods/resize"),
            takes_patch: None,
        };
        tracing::info!(version = version.git_version, ?server, "API server");
        Ok(server)
    }

    /// Whether a patch of a pod that changes a limit is taken: with in-place resize off limits are immutable.
    async fn takes(&self, probed: &Probed<'_>) -> Result<bool, String> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), probed.namespace);
        let patch = limits_patch(probed.uid, std::slice::from_ref(&probed.change));
        let parameters = PatchParams {
            dry_run: true,
            ..parameters()
        };
        match timeout(TIMEOUT, api.patch(probed.name, &parameters, &patch)).await {
            Ok(Ok(_as_it_would_be)) => Ok(true),
            Ok(Err(kube::Error::Api(status))) => said(&status).ok_or_else(|| {
                format!(
                    "whether limits can be changed is not known: {}",
                    status.message
                )
            }),
            Ok(Err(error)) => Err(format!(
                "whether limits can be changed is not known: {error}"
            )),
            Err(_elapsed) => Err("the API does not answer".to_owned()),
        }
    }
}

/// What a refusal says of whether limits can be changed; `None` if nothing.
fn said(status: &Status) -> Option<bool> {
    if is_immutable(status) {
        return Some(false);
    }
    if is_denied_by_ours(status) {
        tracing::warn!(
            "the admission policy bellows-agent lets limits be changed by pods/resize only, which this API server does not have: limits are moved on the node alone; the chart renders a policy that fits this Kubernetes, the static manifests are for 1.32 and later"
        );
        return Some(false);
    }
    is_of_this_value(status).then_some(true)
}

/// The policy that is there was rendered for an API server with `pods/resize` (deploy/chart/templates/admission.yaml): what
/// is asked for in earnest would be denied, too.
fn is_denied_by_ours(status: &Status) -> bool {
    status
        .message
        .contains("an agent changes a spec by resize only")
}

/// Admission judges the value (a LimitRange, a quota, somebody's policy), after the API server has found that limits can be
/// changed: it validates first (`Store.Update`, k8s.io/apiserver/pkg/registry/generic/registry/store.go). A right that is
/// missing says nothing.
fn is_of_this_value(status: &Status) -> bool {
    code_of(status) == 403 && !status.message.contains("cannot patch resource")
}

/// "pod updates may not change fields other than …" (`ValidatePodUpdate`, pkg/apis/core/validation/validation.go).
fn is_immutable(status: &Status) -> bool {
    status.code == 422 && status.message.contains("may not change fields other than")
}

/// Managed clusters append a sign: "31+".
fn minor(major: &str, minor: &str) -> Option<u32> {
    let digits = minor.trim_end_matches(|other: char| !other.is_ascii_digit());
    digits.parse().ok().filter(|_| major == "1")
}

/// Patches a pod's limits.
///
/// # Errors
///
/// As the API's own; 405 where limits are changed on the node.
pub async fn patched(
    client: &Client,
    way: Way,
    (namespace, name): (&str, &str),
    patch: &Patch<()>,
) -> kube::Result<Pod> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    match way {
        Way::Resize => api.patch_resize(name, &parameters(), patch).await,
        Way::Patch => api.patch(name, &parameters(), patch).await,
        Way::Node => Err(kube::Error::Api(Box::new(Status {
            status: Some(StatusSummary::Failure),
            code: 405,
            message: "in this cluster limits are not changed through the API".to_owned(),
            ..Status::default()
        }))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::attribution::pods::convert;

    /// An API server of 1.36 with kubelets of 1.35, which resize containers and no pods.
    #[test]
    fn a_pods_own_limit_is_resized_where_its_kubelet_says_what_it_is() {
        let way = |level, own: &serde_json::Value, reported: &serde_json::Value| {
            let container =
                json!({ "name": "app", "resources": { "limits": { "memory": "64Mi" } } });
            let running = json!({
                "name": "app", "containerID": "containerd://a", "state": { "running": {} }, "resources": {},
            });
            let pod = serde_json::from_value(json!({
                "metadata": {},
                "spec": { "containers": [container], "resources": own },
                "status": { "containerStatuses": [running], "resources": reported },
            }));
            let server = Server {
                minor: 36,
                has_resize: true,
                takes_patch: None,
            };
            let change = Change::memory(level, "1Gi".to_owned(), "2Gi".to_owned());
            let seen = convert(&pod.unwrap());
            let probed = Probed::of(&seen, level, change);
            server.way(probed.whose, probed.is_reported).unwrap()
        };
        let own = json!({ "limits": { "memory": "1Gi" } });
        let none = json!(null);
        for level in [Level::Pod, Level::Container(0)] {
            assert_eq!(way(level, &own, &own), Way::Resize);
            assert_eq!(way(level, &own, &none), Way::Node);
        }
        // What the pod does not have nobody needs to know.
        assert_eq!(way(Level::Container(0), &none, &none), Way::Resize);
        assert_eq!(way(Level::Container(0), &json!({}), &none), Way::Resize);
    }

    fn seen(statuses: &serde_json::Value) -> pod::Pod {
        let pod = serde_json::from_value(json!({
            "metadata": {},
            "spec": { "containers": [{ "name": "build" }, { "name": "side" }] },
            "status": { "phase": "Running", "containerStatuses": statuses },
        }));
        convert(&pod.unwrap())
    }

    /// A build that has ended beside a container that goes on: its limit is given back through the API.
    #[test]
    fn a_container_that_does_not_run_is_resized_as_others_of_its_pod_are() {
        let ended = json!({ "name": "build", "state": { "terminated": {} } });
        let running = |name: &str, resources: bool| {
            let resources = resources.then(|| json!({ "limits": { "memory": "64Mi" } }));
            json!({
                "name": name, "containerID": "containerd://a", "state": { "running": {} }, "resources": resources,
            })
        };
        let is_reported = |statuses: &serde_json::Value| {
            let change = Change::memory(Level::Container(0), "1Gi".to_owned(), "64Mi".to_owned());
            Probed::of(&seen(statuses), Level::Container(0), change).is_reported
        };
        assert!(is_reported(&json!([ended, running("side", true)])));
        assert!(!is_reported(&json!([ended, running("side", false)])));
        assert!(is_reported(&json!([ended])), "nobody can tell");
        // What is said of itself comes first.
        let [with, without] = [true, false].map(|resources| running("build", resources));
        assert!(!is_reported(&json!([without, running("side", true)])));
        assert!(is_reported(&json!([with, running("side", false)])));
    }

    /// The API server may have become another one while it was asked.
    #[test]
    fn what_was_asked_before_a_list_is_not_known_after_it() {
        let server = Server {
            minor: 36,
            has_resize: true,
            takes_patch: None,
        };
        let mut known = Known::default();
        known.found(server, 0);
        assert_eq!(known.server, Some(server));
        known.forget();
        known.found(server, 0);
        assert_eq!(known.server, None);
        known.found(server, 1);
        assert_eq!(known.server, Some(server));
    }

    #[test]
    fn versions_are_read_as_clusters_print_them() {
        assert_eq!(minor("1", "31"), Some(31));
        assert_eq!(minor("1", "33+"), Some(33));
        for (major, text) in [("2", "1"), ("1", ""), ("1", "x"), ("", "")] {
            assert_eq!(minor(major, text), None, "{major}.{text}");
        }
    }

    #[test]
    fn only_immutable_limits_say_that_the_gate_is_off() {
        let status = |code, message: &str| Status {
            code,
            message: message.to_owned(),
            ..Status::default()
        };
        let immutable = "Pod \"a\" is invalid: spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`";
        assert!(is_immutable(&status(422, immutable)));
        assert!(!is_immutable(&status(403, immutable)));
        // A test of the patch that failed.
        let other = "the server rejected our request due to an error in our request";
        assert!(!is_immutable(&status(422, other)));
    }

    /// It must not be asked again every two seconds, nor be taken for a cluster in which limits cannot be changed.
    #[test]
    fn whoever_refuses_the_value_has_taken_the_change() {
        let said = |code, message: &str| {
            said(&Status {
                code,
                message: message.to_owned(),
                ..Status::default()
            })
        };
        let range = "pods \"a\" is forbidden: maximum memory usage per Container is 1Gi, but limit is 1025Mi";
        assert_eq!(said(403, range), Some(true));
        let right = "pods \"a\" is forbidden: User \"b\" cannot patch resource \"pods\" in API group \"\" in the namespace \"c\"";
        assert_eq!(said(403, right), None);
        assert_eq!(said(403, "not yet ready to handle request"), None);
        assert_eq!(said(500, "etcdserver: request timed out"), None);
        let other = "Pod \"a\" is invalid: spec.containers[0].resources.requests: Invalid value: must be less than or equal to memory limit";
        assert_eq!(said(422, other), None);
    }

    /// Limits are moved on the node then: asking again does not change the policy.
    #[test]
    fn a_policy_that_does_not_fit_says_that_limits_cannot_be_changed() {
        let denied = Status {
            code: 422,
            message: "pods \"a\" is forbidden: ValidatingAdmissionPolicy 'bellows-agent' with binding 'bellows-agent' denied request: an agent changes a spec by resize only".to_owned(),
            ..Status::default()
        };
        assert_eq!(said(&denied), Some(false));
    }
}
