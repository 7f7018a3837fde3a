//! The patch: a JSON patch with a `test` on each old value.

use bellows_core::pod::{Level, MANAGER};
use json_patch::{PatchOperation, ReplaceOperation, TestOperation, jsonptr::PointerBuf};
use kube::api::{Patch, PatchParams};
use serde_json::Value;

/// A change of one limit or request.
#[derive(Clone, Debug)]
pub struct Change {
    /// Where among the resources it stands.
    place: [&'static str; 2],
    level: Level,
    from: String,
    pub(super) to: String,
}

impl Change {
    /// Of memory: where it stands, what it must be, what it becomes.
    #[must_use]
    pub const fn memory(level: Level, from: String, to: String) -> Self {
        Self {
            place: ["limits", "memory"],
            level,
            from,
            to,
        }
    }

    /// The same of a container's memory request.
    #[must_use]
    pub const fn memory_request(index: usize, from: String, to: String) -> Self {
        Self {
            place: ["requests", "memory"],
            level: Level::Container(index),
            from,
            to,
        }
    }

    /// The same of CPU.
    #[must_use]
    pub const fn cpu(level: Level, from: String, to: String) -> Self {
        Self {
            place: ["limits", "cpu"],
            level,
            from,
            to,
        }
    }
}

/// Patches are made under our own name: by it a change of ours is told from others'.
#[must_use]
pub fn parameters() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// That something is this, or the patch fails.
pub(crate) fn test(path: PointerBuf, value: impl Into<Value>) -> PatchOperation {
    let value = value.into();
    PatchOperation::Test(TestOperation { path, value })
}

/// That it is this pod: another may have got its name.
pub(crate) fn test_uid(uid: &str) -> PatchOperation {
    test(PointerBuf::from_tokens(["metadata", "uid"]), uid)
}

/// Where a limit or request stands in a pod.
pub(crate) fn pointer(level: Level, [kind, resource]: [&str; 2]) -> PointerBuf {
    let limit = ["resources", kind, resource];
    match level {
        Level::Pod => PointerBuf::from_tokens(["spec"].into_iter().chain(limit)),
        Level::Container(index) => {
            let index = index.to_string();
            PointerBuf::from_tokens(["spec", "containers", &index].into_iter().chain(limit))
        }
    }
}

/// Replaces limits and requests of a pod if each is still what it was.
#[must_use]
pub fn limits_patch(uid: &str, changes: &[Change]) -> Patch<()> {
    let mut operations = vec![test_uid(uid)];
    for Change {
        place,
        level,
        from,
        to,
    } in changes
    {
        let path = pointer(*level, *place);
        operations.push(test(path.clone(), from.as_str()));
        operations.push(PatchOperation::Replace(ReplaceOperation {
            path,
            value: to.as_str().into(),
        }));
    }
    Patch::Json(json_patch::Patch(operations))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_tests_whose_it_is_and_what_was() {
        let change =
            |level, from: &str, to: &str| Change::memory(level, from.to_owned(), to.to_owned());
        let level = Level::Container(0);
        let changes = [
            change(Level::Container(1), "64Mi", "512Mi"),
            change(Level::Pod, "1Gi", "2Gi"),
            Change::cpu(level, "250m".to_owned(), "2".to_owned()),
            Change::memory_request(0, "32Mi".to_owned(), "8Mi".to_owned()),
        ];
        let Patch::Json(patch) = limits_patch("0f8c", &changes) else {
            panic!("no JSON patch")
        };
        let container = "/spec/containers/1/resources/limits/memory";
        let pod = "/spec/resources/limits/memory";
        let cpu = "/spec/containers/0/resources/limits/cpu";
        let request = "/spec/containers/0/resources/requests/memory";
        let expected = serde_json::json!([
            { "op": "test", "path": "/metadata/uid", "value": "0f8c" },
            { "op": "test", "path": container, "value": "64Mi" },
            { "op": "replace", "path": container, "value": "512Mi" },
            { "op": "test", "path": pod, "value": "1Gi" },
            { "op": "replace", "path": pod, "value": "2Gi" },
            { "op": "test", "path": cpu, "value": "250m" },
            { "op": "replace", "path": cpu, "value": "2" },
            { "op": "test", "path": request, "value": "32Mi" },
            { "op": "replace", "path": request, "value": "8Mi" },
        ]);
        assert_eq!(serde_json::to_value(patch).unwrap(), expected);
    }
}
