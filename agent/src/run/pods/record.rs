//! What a limit or request was, written onto its pod.
//!
//! A patch that was given up may still be stored: an API server that waits for etcd or a webhook carries it out when that goes
//! on, on whatever the pod is then (seen of a resize). One annotation holds what was of all containers of a pod, so a late one
//! would put back what a newer one has replaced, and take out what that has added: the next agent would take a raised limit
//! for what it was. So each tests that the annotation is still what it was made from, and that the spec still says what it
//! records: whenever it comes, it undoes nothing, and tells no lie.
//!
//! What is known of the annotation may be old. A test that fails is told like a refusal (422), so the pod is read then: what
//! stands there is gone on from, unless it is there already, was changed since, or the refusal was meant.
//!
//! That there is none is tested by comparing it with `null`. The standard has no word for that (RFC 6902); API servers take it
//! so (evanphx/json-patch 4.12 and 4.13, tried), but only within annotations that are there.

use std::collections::BTreeMap;

use bellows_core::pod::{self, Level, ORIGINAL, ORIGINAL_CPU, ORIGINAL_REQUESTS};
use json_patch::{AddOperation, PatchOperation, jsonptr::PointerBuf};
use kube::{Api, Client, ResourceExt as _, api::Patch};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    actuate::resize::{TIMEOUT, code_of, parameters, pointer, test, test_uid},
    attribution::{api::Pod, pods::convert},
};

/// How often it is gone on from what somebody else has written meanwhile.
const TRIES: usize = 3;

/// Where in a pod stands what is recorded.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// A memory limit.
    Memory(Level),
    /// A container's CPU limit.
    Cpu(usize),
    /// A container's memory request.
    Request(usize),
}

impl Place {
    /// The annotation for what it was.
    pub(super) const fn annotation(self) -> &'static str {
        match self {
            Self::Memory(_) => ORIGINAL,
            Self::Cpu(_) => ORIGINAL_CPU,
            Self::Request(_) => ORIGINAL_REQUESTS,
        }
    }

    /// The same for a patch.
    fn pointer(self) -> PointerBuf {
        match self {
            Self::Memory(level) => pointer(level, ["limits", "memory"]),
            Self::Cpu(index) => pointer(Level::Container(index), ["limits", "cpu"]),
            Self::Request(index) => pointer(Level::Container(index), ["requests", "memory"]),
        }
    }

    /// What the spec says of it.
    pub(super) fn in_spec(self, seen: &pod::Pod) -> Option<&str> {
        let container = |index: usize| seen.containers.get(index);
        match self {
            Self::Memory(Level::Pod) => seen.memory_limit.as_deref(),
            Self::Memory(Level::Container(index)) => container(index)?.memory_limit.as_deref(),
            Self::Cpu(index) => container(index)?.cpu_limit.as_deref(),
            Self::Request(index) => container(index)?.memory_request.as_deref(),
        }
    }
}

/// Why a limit or request as it was is not on the pod.
#[derive(Debug)]
pub(super) struct NotRecorded {
    pub(super) why: String,
    /// Whether the API will not have it; else it may another time.
    pub(super) is_refused: bool,
}

impl NotRecorded {
    fn passing(why: &str) -> Self {
        Self {
            why: format!("what it was cannot be recorded: {why}"),
            is_refused: false,
        }
    }

    fn of(error: &kube::Error) -> Self {
        Self {
            // 422 is how an admission policy refuses that gives no reason.
            is_refused: matches!(error, kube::Error::Api(status) if [403, 422].contains(&code_of(status))),
            why: format!(
                "what it was cannot be recorded: {error}; look for the admission policy or webhook that refuses it"
            ),
        }
    }

    fn silent() -> Self {
        Self::passing("the API does not answer")
    }
}

/// What is to be written.
pub(super) struct Recording {
    /// The pod, with what was written onto it since it was seen.
    pub(super) seen: pod::Pod,
    /// Its annotations, as far as it is known what the API has.
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) place: Place,
    pub(super) container: String,
    /// What the spec says of it, as it was seen.
    pub(super) in_spec: Option<String>,
    /// What is written: the same, or, where a request was raised while it stood raised, the least that it may come down to.
    pub(super) original: String,
}

impl Recording {
    /// Returns the annotation as it is stored then.
    pub(super) async fn write(mut self, client: &Client) -> Result<String, NotRecorded> {
        let api: Api<Pod> = Api::namespaced(client.clone(), &self.seen.namespace);
        let parameters = parameters();
        for _ in 0..TRIES {
            let patch = self.patch();
            let patched = api.patch_metadata(&self.seen.name, &parameters, &patch);
            match timeout(TIMEOUT, patched).await {
                Ok(Ok(_patched)) => return Ok(self.value()),
                Ok(Err(error)) if is_unprocessable(&error) => {
                    if !self.has_changed(&api, &error).await? {
                        return Ok(self.value());
                    }
                }
                Ok(Err(error)) => return Err(NotRecorded::of(&error)),
                Err(_elapsed) => return Err(NotRecorded::silent()),
            }
        }
        Err(NotRecorded::passing("the pod changes again and again"))
    }

    fn value(&self) -> String {
        let annotation = self.place.annotation();
        pod::with_original(&self.seen, annotation, &self.container, &self.original)
    }

    fn patch(&self) -> Patch<()> {
        let (annotation, value) = (self.place.annotation(), self.value());
        let all = ["metadata", "annotations"];
        let (path, before, value) = if self.annotations.is_empty() {
            let all = PointerBuf::from_tokens(all);
            (all, Value::Null, json!({ annotation: value }))
        } else {
            let own = PointerBuf::from_tokens(all.into_iter().chain([annotation]));
            (own, json!(self.annotations.get(annotation)), json!(value))
        };
        Patch::Json(json_patch::Patch(vec![
            test_uid(&self.seen.uid),
            test(self.place.pointer(), json!(self.in_spec)),
            test(path.clone(), before),
            PatchOperation::Add(AddOperation { path, value }),
        ]))
    }

    /// Reads what there is now in place of what the patch was made from; returns whether there is anything left to write.
    async fn has_changed(
        &mut self,
        api: &Api<Pod>,
        refusal: &kube::Error,
    ) -> Result<bool, NotRecorded> {
        let pod = match timeout(TIMEOUT, api.get(&self.seen.name)).await {
            Ok(Ok(pod)) => pod,
            Ok(Err(error)) => return Err(NotRecorded::passing(&error.to_string())),
            Err(_elapsed) => return Err(NotRecorded::silent()),
        };
        let annotations = pod.annotations().clone();
        let seen = convert(&pod);
        let is_same = seen.uid == self.seen.uid;
        if !is_same || self.place.in_spec(&seen) != self.in_spec.as_deref() {
            return Err(NotRecorded::passing("it was changed meanwhile"));
        }
        let annotation = self.place.annotation();
        let stored = annotations.get(annotation);
        let is_as_known = stored == self.annotations.get(annotation)
            && annotations.is_empty() == self.annotations.is_empty();
        self.seen = seen;
        if stored == Some(&self.value()) {
            return Ok(false);
        }
        if is_as_known {
            return Err(NotRecorded::of(refusal));
        }
        self.annotations = annotations;
        Ok(true)
    }
}

/// A test that has failed, or a refusal without a reason of its own.
fn is_unprocessable(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 422)
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
    };

    use http_body_util::{BodyExt as _, Full};
    use hyper::{
        Method, Request, Response,
        body::{Bytes, Incoming},
        server::conn::http1,
        service::service_fn,
    };
    use hyper_util::rt::TokioIo;
    use tokio::net::TcpListener;

    use super::*;

    fn pod(limit: &str, annotations: &Value) -> Value {
        let own = |name: &str, limit: &str| json!({ "name": name, "resources": { "limits": { "memory": limit } } });
        let mut pod = json!({
            "metadata": { "name": "workspace", "namespace": "dev", "uid": "u" },
            "spec": { "containers": [own("app", limit), own("side", "32Mi")] },
        });
        if !annotations.is_null() {
            pod["metadata"]["annotations"] = annotations.clone();
        }
        pod
    }

    /// What the limit of a container is, of a pod that was seen so.
    fn recording(seen: &Value, index: usize) -> Recording {
        let pod: Pod = serde_json::from_value(seen.clone()).unwrap();
        let seen = convert(&pod);
        Recording {
            annotations: pod.annotations().clone(),
            place: Place::Memory(Level::Container(index)),
            container: seen.containers[index].name.clone(),
            in_spec: seen.containers[index].memory_limit.clone(),
            original: seen.containers[index].memory_limit.clone().unwrap(),
            seen,
        }
    }

    /// As API servers carry it out; `None` if a test fails.
    fn stored(pod: &Value, patch: json_patch::Patch) -> Option<Value> {
        let is_absent = |operation: &PatchOperation| {
            let PatchOperation::Test(test) = operation else {
                return false;
            };
            let place = test.path.as_str();
            let above = place
                .rsplit_once('/')
                .and_then(|(above, _)| pod.pointer(above));
            test.value.is_null() && above.is_some() && pod.pointer(place).is_none()
        };
        let operations = patch.0.into_iter();
        let rest: Vec<_> = operations
            .filter(|operation| !is_absent(operation))
            .collect();
        let mut pod = pod.clone();
        json_patch::patch(&mut pod, &rest).ok()?;
        Some(pod)
    }

    fn store(pod: &mut Value, recording: &Recording) -> bool {
        let Patch::Json(patch) = recording.patch() else {
            panic!("no JSON patch");
        };
        let patched = stored(pod, patch);
        let is_stored = patched.is_some();
        *pod = patched.unwrap_or_else(|| pod.clone());
        is_stored
    }

    fn original(pod: &Value) -> Option<&str> {
        pod["metadata"]["annotations"][ORIGINAL].as_str()
    }

    /// An API server with one pod.
    struct Server {
        pod: Value,
        is_refusing: bool,
        patches: usize,
    }

    impl Server {
        fn answer(&mut self, patch: Option<json_patch::Patch>) -> (u16, Value) {
            let Some(patch) = patch else {
                return (200, self.pod.clone());
            };
            self.patches += 1;
            match stored(&self.pod, patch).filter(|_| !self.is_refusing) {
                Some(pod) => {
                    self.pod = pod;
                    (200, self.pod.clone())
                }
                None => {
                    let status = json!({ "kind": "Status", "status": "Failure", "code": 422 });
                    (422, status)
                }
            }
        }
    }

    async fn answered(
        request: Request<Incoming>,
        server: Arc<Mutex<Server>>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let is_patch = request.method() == Method::PATCH;
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let patch = is_patch.then(|| serde_json::from_slice(&body).unwrap());
        let (code, answer) = server.lock().unwrap().answer(patch);
        let body = Full::new(Bytes::from(answer.to_string()));
        Ok(Response::builder().status(code).body(body).unwrap())
    }

    /// What comes of a recording by somebody who has seen this, and how the pod is then, after how many patches.
    async fn written(
        seen: &Value,
        is: Value,
        is_refusing: bool,
    ) -> (Result<String, NotRecorded>, Value, usize) {
        let server = Arc::new(Mutex::new(Server {
            pod: is,
            is_refusing,
            patches: 0,
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let served = Arc::clone(&server);
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _from) = listener.accept().await.unwrap();
                let served = Arc::clone(&served);
                let answers = service_fn(move |request| answered(request, Arc::clone(&served)));
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), answers);
                tokio::spawn(connection);
            }
        });
        let client = Client::try_from(kube::Config::new(address.parse().unwrap())).unwrap();
        let result = recording(seen, 0).write(&client).await;
        serving.abort();
        let server = server.lock().unwrap();
        (result, server.pod.clone(), server.patches)
    }

    #[test]
    fn one_that_comes_late_undoes_nothing_newer() {
        for before in [
            Value::Null,
            json!({ "a": "b" }),
            json!({ ORIGINAL: "app=48Mi" }),
        ] {
            let mut is = pod("64Mi", &before);
            let [late, newer] = [0, 1].map(|index| recording(&is, index));
            assert!(store(&mut is, &newer), "{before}");
            let newest = is.clone();
            assert!(!store(&mut is, &late), "{before}");
            assert_eq!(is, newest);
            assert!(original(&is).unwrap().contains("side=32Mi"));
        }
    }

    /// Somebody else had set it to 128 MiB, and then back, and we have raised it since.
    #[test]
    fn one_that_comes_late_tells_no_lie() {
        let known = json!({ ORIGINAL: "app=64Mi" });
        let late = recording(&pod("128Mi", &known), 0);
        let mut raised = pod("512Mi", &known);
        assert!(!store(&mut raised, &late));
        assert_eq!(original(&raised), Some("app=64Mi"));
        assert!(store(&mut pod("128Mi", &known), &late));
    }

    #[test]
    fn one_for_another_pod_of_that_name_is_not_stored() {
        let late = recording(&pod("64Mi", &Value::Null), 0);
        let mut another = pod("64Mi", &Value::Null);
        another["metadata"]["uid"] = json!("another");
        assert!(!store(&mut another, &late));
    }

    /// A request was raised beyond the original while the limit stood raised.
    #[test]
    fn what_a_raised_limit_is_to_come_down_to_is_recorded() {
        let known = json!({ ORIGINAL: "app=64Mi" });
        let mut is = pod("512Mi", &known);
        let mut least = recording(&is, 0);
        least.original = "129Mi".to_owned();
        assert!(store(&mut is, &least));
        assert_eq!(original(&is), Some("app=129Mi"));
        assert!(!store(&mut pod("256Mi", &known), &least));
    }

    #[tokio::test]
    async fn what_was_written_meanwhile_is_kept() {
        for (before, now) in [
            (Value::Null, json!({ ORIGINAL: "side=32Mi" })),
            (json!({ "a": "b" }), json!({ ORIGINAL: "side=32Mi" })),
            (
                json!({ ORIGINAL: "app=48Mi" }),
                json!({ ORIGINAL: "app=48Mi,side=32Mi" }),
            ),
        ] {
            let seen = pod("64Mi", &before);
            let (result, is, patches) = written(&seen, pod("64Mi", &now), false).await;
            assert_eq!(result.unwrap(), "side=32Mi,app=64Mi");
            assert_eq!((original(&is), patches), (Some("side=32Mi,app=64Mi"), 2));
        }
        // All annotations are gone.
        let seen = pod("64Mi", &json!({ "a": "b" }));
        let (result, is, _) = written(&seen, pod("64Mi", &Value::Null), false).await;
        assert_eq!(
            (result.unwrap().as_str(), original(&is)),
            ("app=64Mi", Some("app=64Mi"))
        );
    }

    #[tokio::test]
    async fn what_has_arrived_without_an_answer_is_found() {
        let seen = pod("64Mi", &json!({ "a": "b" }));
        let is = pod("64Mi", &json!({ "a": "b", ORIGINAL: "app=64Mi" }));
        let (result, _, patches) = written(&seen, is, false).await;
        assert_eq!((result.unwrap().as_str(), patches), ("app=64Mi", 1));
    }

    #[tokio::test]
    async fn a_refusal_is_told_from_a_test_that_has_failed() {
        let seen = pod("64Mi", &json!({ "a": "b" }));
        let (result, _, patches) = written(&seen, seen.clone(), true).await;
        assert!(result.unwrap_err().is_refused);
        assert_eq!(patches, 1);
        let changed = pod("128Mi", &json!({ "a": "b" }));
        let (result, is, _) = written(&seen, changed, false).await;
        assert!(!result.unwrap_err().is_refused);
        assert_eq!(original(&is), None);
    }
}
