//! Changing a container's memory request through the API: the `resize` subresource, as with limits, and in the same order of a
//! pod's requests.
//!
//! Each patch carries what was raised by hand of memory in the same pod: with any resize the kubelet sets all of a
//! container's limits to what the spec says. It changes no limit otherwise, so nobody is killed for it.
//!
//! It must not lower a request before what it was is recorded on the pod.

use super::resize::{Change, Order, Probed, RESIZE_TIMEOUT, Resizer, code_of};
use bellows_core::{
    bucket::Urgency,
    pod::way::{Way, Whose},
};

/// A change of one request.
#[derive(Clone, Debug)]
pub struct RequestChange {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its uid: another may have its name.
    pub uid: String,
    /// The container's index in the spec.
    pub index: usize,
    /// The request in the spec, as written.
    pub from: String,
    /// What it becomes.
    pub to: String,
    /// Whether the kubelet says what resources it has.
    pub is_reported: bool,
    /// One request of a pod at a time.
    pub order: Order,
    /// Whether somebody waits for it.
    pub urgency: Urgency,
}

/// Why a request is not what it should be.
#[derive(Debug)]
pub struct NotChanged {
    /// In the API's words.
    pub why: String,
    /// Whether it may be another time; else it was refused as such (a quota, a LimitRange, a right that is missing).
    pub is_passing: bool,
}

/// Tells the API of requests; clones share what they know.
#[derive(Clone)]
pub struct RequestResizer {
    memory: Resizer,
}

impl std::fmt::Debug for RequestResizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("RequestResizer")
            .finish_non_exhaustive()
    }
}

impl RequestResizer {
    /// One for a node's pods, beside what resizes their memory limits.
    #[must_use]
    pub const fn new(memory: Resizer) -> Self {
        Self { memory }
    }

    /// Changes a request if it is still what it was.
    ///
    /// # Errors
    ///
    /// [`NotChanged`]; after an uncertain answer it may still come.
    pub async fn change(&self, change: RequestChange) -> Result<(), NotChanged> {
        let RequestChange {
            namespace,
            name,
            uid,
            index,
            from,
            to,
            is_reported,
            order,
            urgency,
        } = change;
        let own = Change::memory_request(index, from, to);
        let probed = Probed {
            namespace: &namespace,
            name: &name,
            uid: &uid,
            whose: Whose::Request,
            is_reported,
            change: own.clone(),
        };
        self.is_resized(&probed).await?;
        self.memory.may_ask(urgency).await;
        let _turn = order.lock().await;
        let named = (namespace.as_str(), name.as_str());
        let patched = self.memory.patch_beside(&uid, Way::Resize, named, own);
        let (patched, _is_uncertain) = patched.await;
        match patched {
            Ok(Ok(_patched)) => Ok(()),
            Ok(Err(error)) => Err(NotChanged {
                why: error.to_string(),
                is_passing: is_passing(&error),
            }),
            Err(_elapsed) => Err(NotChanged {
                why: format!("no answer within {} s", RESIZE_TIMEOUT.as_secs()),
                is_passing: true,
            }),
        }
    }

    /// Whether the cluster resizes through `pods/resize`. Where limits are moved on the node, the kubelet would set what the
    /// spec says of them with any resize, and kill.
    async fn is_resized(&self, probed: &Probed<'_>) -> Result<(), NotChanged> {
        match self.memory.ways().of(probed).await {
            Ok(Way::Resize) => Ok(()),
            Ok(Way::Patch | Way::Node) => Err(NotChanged {
                why: "this API server or this node's kubelet does not resize in both directions (1.34 and later do): leave `memory.requests` out"
                    .to_owned(),
                is_passing: false,
            }),
            Err(why) => Err(NotChanged {
                why,
                is_passing: true,
            }),
        }
    }
}

/// Whether a refusal may be another answer soon. 422 is an invalid value and a denial of an admission policy, unless the
/// patch's own tests have failed: then something is not what it was (`applyJSPatch`,
/// k8s.io/apiserver/pkg/endpoints/handlers/patch.go).
fn is_passing(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else {
        return true;
    };
    match code_of(status) {
        403 => false,
        422 => status
            .message
            .contains("rejected our request due to an error in our request"),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn what_is_invalid_stays_so_and_what_has_moved_does_not() {
        let of = |code, message: &str| {
            is_passing(&kube::Error::Api(Box::new(Status {
                code,
                message: message.to_owned(),
                ..Status::default()
            })))
        };
        let moved = "the server rejected our request due to an error in our request";
        assert!(of(422, moved));
        assert!(!of(
            422,
            "Pod \"a\" is invalid: spec: Forbidden: Pod QOS Class may not change as a result of resizing"
        ));
        assert!(!of(
            422,
            "pods \"a\" is forbidden: ValidatingAdmissionPolicy 'no' denied request"
        ));
        assert!(!of(403, "exceeded quota"));
        assert!(of(403, "not yet ready to handle request"));
        for code in [409, 429, 500, 503] {
            assert!(of(code, ""), "{code}");
        }
    }
}
