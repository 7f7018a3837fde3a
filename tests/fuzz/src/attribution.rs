//! Names of cgroup directories: made by a runtime, or by anybody who may make a cgroup.

use bellows::attribution::{container_id, is_container, is_pod};

/// A directory, and two ids (of containers, of pods) that could be meant.
pub(crate) fn names(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.splitn(3, '\n');
    let mut part = || parts.next().unwrap_or_default();
    let (name, one, other) = (part(), part(), part());
    let id = container_id(one);
    assert!(one.ends_with(id) && !id.contains("://"));
    for id in [id, other] {
        assert!(
            !is_container(name, id) || (!id.is_empty() && name.contains(id)),
            "`{name}` is not `{id}`"
        );
        let uid = id.replace('-', "_");
        assert!(
            !is_pod(name, id) || (!id.is_empty() && (name.contains(id) || name.contains(&uid))),
            "`{name}` is not `{id}`"
        );
    }
    // Ids of runtimes and uids of pods are hexadecimal; both of one length.
    let hexadecimal = |id: &str| id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if id != other && id.len() == other.len() && hexadecimal(id) && hexadecimal(other) {
        assert!(
            !(is_container(name, id) && is_container(name, other)),
            "`{name}`"
        );
        assert!(!(is_pod(name, id) && is_pod(name, other)), "`{name}`");
    }
}
