//! Where containers are, from their cgroups as they are made: whoever looks for one in all of the hierarchy cannot keep
//! up with a node that starts many.
//!
//! A place is a hint. Whoever opens it finds out whether it is there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// More than this many places are looked through for those that are gone.
const MANY: usize = 4096;
/// Digits of an id; what is shorter is no runtime's.
const DIGITS: usize = 32;

/// Cgroups of containers by the ids in their names.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<String, PathBuf>);

impl Places {
    /// Takes note of a cgroup at a path below the root of the hierarchy; returns whether it can be a container's.
    pub fn add(&mut self, root: &Path, path: &str) -> bool {
        let Some(id) = id_in(path) else {
            return false;
        };
        // A container may make cgroups of any name in its own.
        let mut above = Path::new(path).ancestors().skip(1);
        if above.any(|above| above.to_str().and_then(id_in).is_some()) {
            return false;
        }
        if self.0.len() >= MANY {
            self.0.retain(|_, path| path.exists());
        }
        // A node with more than that is asked the slow way.
        if self.0.len() < MANY {
            let path = root.join(path.trim_start_matches('/'));
            self.0.insert(id.to_owned(), path);
        }
        true
    }

    /// Where a container is.
    #[must_use]
    pub fn of(&self, id: &str) -> Option<PathBuf> {
        self.0.get(id).filter(|path| path.exists()).cloned()
    }
}

/// The container's id in the name of its cgroup.
#[must_use]
pub fn id_in(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let id = name.rsplit('-').next()?;
    let is_id = id.len() >= DIGITS && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_id && !name.contains("conmon")).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_in_every_known_name() {
        let id = "0123456789abcdef".repeat(4);
        let pod = "/kubepods.slice/kubepods-pod1.slice";
        for name in [
            format!("/kubepods/burstable/pod4d0e7f00-0000-4000-8000-000000000001/{id}"),
            format!("{pod}/cri-containerd-{id}.scope"),
            format!("{pod}/crio-{id}.scope"),
            format!("/system.slice/docker-{id}.scope"),
        ] {
            assert_eq!(id_in(&name), Some(&*id), "{name}");
        }
        for name in [
            "",
            "/",
            pod,
            "/kubepods/burstable/pod4d0e7f00-0000-4000-8000-000000000001",
            "/system.slice/ssh.service",
            &format!("{pod}/crio-conmon-{id}.scope"),
            &format!("{pod}/cri-containerd-{id}.scope/below"),
        ] {
            assert_eq!(id_in(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_gone_is_nowhere_and_is_forgotten() {
        let root = std::env::temp_dir().join(format!("bellows-places-{}", std::process::id()));
        let id = |number: usize| format!("{number:064}");
        let last = id(2 * MANY - 1);
        for id in [&id(0), &last] {
            std::fs::create_dir_all(root.join("pod").join(id)).unwrap();
        }
        let mut places = Places::default();
        for number in 0..2 * MANY {
            assert!(places.add(&root, &format!("/pod/{}", id(number))));
        }
        assert_eq!(places.of(&id(0)), Some(root.join("pod").join(id(0))));
        assert_eq!(places.of(&id(1)), None);
        assert_eq!(places.of(&last), Some(root.join("pod").join(&last)));
        assert!(places.0.len() <= MANY);
        // What is in a container is none.
        let inside = format!("/pod/{}/pod/{}", id(1), id(0));
        assert!(!places.add(&root, &inside));
        assert_eq!(places.of(&id(0)), Some(root.join("pod").join(id(0))));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
