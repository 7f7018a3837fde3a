//! From a container of a pod to its cgroup.
//!
//! The directory is found by what it must contain (the pod's uid above, the container's id in its
//! own name), never by an absolute path: drivers, runtimes and nested nodes put different things
//! around these two. A container that is not found is not guarded; it is looked for again at the
//! pod's next change.

pub mod api;
pub mod counted;
mod ebpf_resize;
pub mod places;
pub mod pods;
pub mod workloads;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where cgroups are.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How deep below the root pods may be: `kubepods/burstable/podUID/ID` and a prefix of three.
const DEPTH: u32 = 7;

/// The runtime's id in a container status, without its scheme (`containerd://…`).
#[must_use]
pub fn container_id(status: &str) -> &str {
    status.rsplit_once("://").map_or(status, |(_, id)| id)
}

/// The cgroup directory of a container.
#[must_use]
pub fn find(root: &Path, pod_uid: &str, container_id: &str) -> Option<PathBuf> {
    let pod = pod_directory(root, pod_uid, DEPTH)?;
    let entries = directories(&pod);
    entries
        .into_iter()
        .find(|path| is_container(&name(path), container_id))
}

/// The cgroup directory of a container, from a process in it. A container may have cgroups of its own, so the
/// process may be further below.
#[must_use]
pub fn of_process(root: &Path, process: u32, container_id: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    above(root, &text, container_id)
}

/// Whether this process is in the node's own namespace of processes (`PROC_PID_INIT_INO`, include/linux/proc_ns.h): else
/// what the kernel calls a process is nobody here, or somebody else.
#[must_use]
pub fn sees_processes() -> bool {
    const NODES_OWN: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").is_ok_and(|own| own == Path::new(NODES_OWN))
}

fn above(root: &Path, text: &str, container_id: &str) -> Option<PathBuf> {
    // Of the one hierarchy of cgroup v2, below its root.
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new(path);
    // `..` stands for what is above our own cgroup namespace, and names nothing here.
    let is_plain = |path: &Path| !path.components().any(|part| part.as_os_str() == "..");
    let mut above = path.ancestors().filter(|path| is_plain(path));
    let found = above.find(|path| is_container(&name(path), container_id))?;
    Some(root.join(found))
}

/// The cgroup directories in those of all pods: containers, and what else runtimes keep there.
#[must_use]
pub fn in_pods(root: &Path) -> Vec<PathBuf> {
    in_pods_below(root, DEPTH)
}

fn in_pods_below(directory: &Path, depth: u32) -> Vec<PathBuf> {
    if is_a_pod(&name(directory)) {
        return directories(directory);
    }
    let Some(depth) = depth.checked_sub(1) else {
        return Vec::new();
    };
    let entries = directories(directory).into_iter();
    entries
        .flat_map(|path| in_pods_below(&path, depth))
        .collect()
}

/// The cgroup directory of a container whose pod is not known: ids are unique.
#[must_use]
pub fn find_container(root: &Path, container_id: &str) -> Option<PathBuf> {
    below(root, container_id, DEPTH)
}

fn below(directory: &Path, id: &str, depth: u32) -> Option<PathBuf> {
    let depth = depth.checked_sub(1)?;
    let entries = directories(directory);
    let found = entries.iter().find(|path| is_container(&name(path), id));
    found
        .cloned()
        .or_else(|| entries.iter().find_map(|path| below(path, id, depth)))
}

/// Whether a directory of this name in a pod's is the container's. cgroupfs: the id; systemd:
/// `cri-containerd-ID.scope`, `crio-ID.scope`, `docker-ID.scope`.
#[must_use]
pub fn is_container(name: &str, id: &str) -> bool {
    let bare = name.strip_suffix(".scope").unwrap_or(name);
    // A runtime that has not said an id yet means no directory, whatever its name.
    !id.is_empty()
        && (bare == id || (bare.ends_with(&format!("-{id}")) && !bare.contains("conmon")))
}

/// Whether a directory of this name is the pod's.
#[must_use]
pub fn is_pod(name: &str, uid: &str) -> bool {
    // systemd writes a uid's dashes as underscores.
    !uid.is_empty()
        && (name == format!("pod{uid}")
            || name.ends_with(&format!("pod{}.slice", uid.replace('-', "_"))))
}

/// Whether it is some pod's: with each driver a kubelet has `pod` and a uid at the end of the name.
#[must_use]
pub fn is_a_pod(name: &str) -> bool {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = name.rsplit_once("pod").map(|(before, uid)| {
        let is_word = before.is_empty() || before.ends_with('-');
        (is_word, uid)
    });
    uid.is_some_and(|(is_word, uid)| {
        is_word && !uid.is_empty() && uid.bytes().any(|byte| byte.is_ascii_digit())
    })
}

fn name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The cgroup directory of a pod.
#[must_use]
pub fn find_pod(root: &Path, pod_uid: &str) -> Option<PathBuf> {
    pod_directory(root, pod_uid, DEPTH)
}

fn pod_directory(directory: &Path, uid: &str, depth: u32) -> Option<PathBuf> {
    let depth = depth.checked_sub(1)?;
    let entries = directories(directory);
    let found = entries.iter().find(|path| is_pod(&name(path), uid));
    found.cloned().or_else(|| {
        entries
            .iter()
            .find_map(|path| pod_directory(path, uid, depth))
    })
}

/// Directories in a directory, in the order of their names.
fn directories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f8c-11aa";
    const ID: &str = "abcdef0123";

    #[test]
    fn finds_every_known_layout() {
        let layouts = [
            "kubepods/burstable/pod0f8c-11aa/abcdef0123",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f8c_11aa.slice/cri-containerd-abcdef0123.scope",
            "kubepods.slice/kubepods-pod0f8c_11aa.slice/crio-abcdef0123.scope",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod0f8c_11aa.slice/cri-containerd-abcdef0123.scope",
        ];
        for (index, layout) in layouts.iter().enumerate() {
            let root = std::env::temp_dir().join(format!(
                "bellows-attribution-{}-{index}",
                std::process::id()
            ));
            let path = root.join(layout);
            fs::create_dir_all(&path).unwrap();
            fs::create_dir_all(path.with_file_name("crio-conmon-abcdef0123.scope")).unwrap();
            fs::create_dir_all(path.with_file_name("other")).unwrap();
            assert_eq!(find(&root, UID, ID), Some(path.clone()));
            assert!(in_pods(&root).contains(&path));
            assert_eq!(in_pods(&root).len(), 3);
            assert_eq!(find_container(&root, ID), Some(path));
            assert_eq!(find_container(&root, "fff"), None);
            assert_eq!(find(&root, UID, "fff"), None);
            assert_eq!(find(&root, "0f8c-11ab", ID), None);
            fs::remove_dir_all(&root).unwrap();
        }
    }

    #[test]
    fn a_process_may_be_in_a_cgroup_of_its_containers_own() {
        let root = Path::new("/sys/fs/cgroup");
        let container = root.join("kubepods.slice/cri-containerd-abcdef0123.scope");
        for below in ["", "/init.scope", "/system.slice/docker-77.scope"] {
            let text = format!("0::/kubepods.slice/cri-containerd-abcdef0123.scope{below}\n");
            assert_eq!(above(root, &text, ID), Some(container.clone()));
        }
        for text in [
            "",
            "0::/",
            "1:name=systemd:/a",
            "0::/../abcdef0123",
            "0::/kubepods/other",
        ] {
            assert_eq!(above(root, text, ID), None, "{text}");
        }
    }

    #[test]
    fn pods_are_told_from_what_is_above_them() {
        for pod in [
            "pod0f8c-11aa",
            "kubepods-burstable-pod0f8c_11aa.slice",
            "kubelet-kubepods-pod0f8c_11aa.slice",
        ] {
            assert!(is_a_pod(pod) && is_pod(pod, UID), "{pod}");
        }
        for other in [
            "kubepods",
            "kubepods.slice",
            "kubepods-burstable.slice",
            "k8s.io",
            "podman",
            "",
        ] {
            assert!(!is_a_pod(other), "{other}");
        }
    }

    #[test]
    fn no_id_means_no_directory() {
        for name in [
            "",
            ".scope",
            "crio-.scope",
            "a-",
            "pod",
            "kubepods-pod.slice",
        ] {
            assert!(!is_container(name, "") && !is_pod(name, ""), "{name}");
        }
    }

    #[test]
    fn strips_the_scheme() {
        assert_eq!(container_id("containerd://abc"), "abc");
        assert_eq!(container_id("abc"), "abc");
    }
}
