//! A cgroup's memory limits, and those of the cgroups below that follow it: its heirs.
//!
//! Where a limit is moved by hand, everything that has inherited it must be moved with it: what is in force is the least on
//! the way up from a process. A pod goes up before its containers and comes down after them, so that no container is ever
//! allowed more than its pod. An heir that is gone meanwhile is no failure.
//!
//! It must not raise a container that has the limit of its pod by its own spec, nor decide who inherits: whoever knows the
//! spec says so.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bellows_core::Bytes;

use super::{Cgroup, CgroupError, Limit, parse_limit};

/// What crun calls its second cgroup of a container.
const INNER: &str = "container";

impl Cgroup {
    /// The same with the cgroups below that have inherited its limit: those that `inherits` says. The kubelet gives the limit
    /// of a pod to its containers without one, and moves it for them after the pod: until then a container stands at
    /// the old limit, whatever its pod has. So does the second cgroup that its runtime has made for it ([`Self::inner`]).
    ///
    /// A container whose own limit happens to be its pod's inherits nothing, and must not be raised past it.
    #[must_use]
    pub fn with_heirs(mut self, inherits: impl Fn(&Path) -> bool) -> Self {
        self.heirs = self
            .children()
            .filter_map(Result::ok)
            .filter(|child| inherits(&child.path))
            .flat_map(|heir| {
                // A cgroup that cannot be read is gone, or hands out no memory.
                let limit = heir.limit("memory.max").ok();
                let follows = |inner: &Self| inner.limit("memory.max").ok() == limit;
                let inner = heir.inner().filter(follows);
                [Some(heir), inner].into_iter().flatten()
            })
            .map(|cgroup| cgroup.path.to_path_buf())
            .collect();
        self
    }

    /// The same where nothing but the limits is known, for one that was raised beyond what the spec says: no container may
    /// have as much of its own.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when the limit cannot be read.
    pub fn with_likely_heirs(self) -> Result<Self, CgroupError> {
        let limit = self.limit("memory.max")?;
        let inherits = |path: &Path| {
            let of = Self::open(path).and_then(|child| child.limit("memory.max"));
            limit != Limit::Max && of.ok() == Some(limit)
        };
        Ok(self.with_heirs(inherits))
    }

    /// The same with the cgroup below in which its runtime keeps the container's processes, and sets the same limits: by
    /// hand both must be moved.
    #[must_use]
    pub fn with_inner(mut self) -> Self {
        let inner = self.inner().map(|inner| inner.path.to_path_buf());
        let is_new = |inner: &PathBuf| !self.heirs.contains(inner);
        let inner = inner.filter(is_new);
        self.heirs.extend(inner);
        self
    }

    /// The cgroup that crun makes below each scope of systemd (`find_systemd_subgroup`, libcrun/cgroup-systemd.c). What
    /// it is asked for it sets in both (`libcrun_update_cgroup_resources`, libcrun/cgroup.c).
    #[must_use]
    pub fn inner(&self) -> Option<Self> {
        let is_scope = self.path.extension().is_some_and(|unit| unit == "scope");
        let path = is_scope.then(|| self.path.join(INNER))?;
        Self::open(&path).ok()
    }

    /// A limit file such as `memory.max`.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read or is neither `max` nor a number.
    pub fn limit(&self, file: &str) -> Result<Limit, CgroupError> {
        let content = self.read(file)?;
        parse_limit(&content).ok_or_else(|| self.unparsable(file, &content, "limit"))
    }

    /// The limit that holds for everything in it: the least of its own and its heirs'.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read or is neither `max` nor a number.
    pub fn limit_in_force(&self) -> Result<Bytes, CgroupError> {
        let own = self.limit("memory.max")?.bytes();
        let of_heirs = self.heirs.iter().filter_map(|path| {
            let content = fs::read_to_string(path.join("memory.max")).ok()?;
            parse_limit(&content).map(Limit::bytes)
        });
        Ok(of_heirs.fold(own, Bytes::min))
    }

    /// Whether somebody says on which CPUs it runs, or one of its heirs: by that a container of a kubelet with the static CPU
    /// manager is known.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        let heirs = self.heirs.iter().map(PathBuf::as_path);
        let mut paths = heirs.chain([&*self.path]);
        paths.any(|path| {
            // Without the controller nobody does.
            let cpus = fs::read_to_string(path.join("cpuset.cpus"));
            cpus.is_ok_and(|cpus| !cpus.trim().is_empty())
        })
    }

    /// Sets a limit file such as `memory.max`.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be written.
    pub fn set_limit(&self, file: &str, limit: Limit) -> Result<(), CgroupError> {
        self.write(file, &limit.text())
    }

    /// Sets `memory.max`, its heirs' with it: the pod up before its containers, and down after them.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when one cannot be written.
    pub fn set_limit_and_heirs(&self, to: Bytes) -> Result<(), CgroupError> {
        let is_raise = self.limit("memory.max")?.bytes() < to;
        if is_raise {
            self.set_limit("memory.max", Limit::At(to))?;
        }
        for path in &self.heirs {
            match Self::open(path).and_then(|heir| heir.set_limit("memory.max", Limit::At(to))) {
                Err(error) if !error.is_gone() => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        if is_raise {
            return Ok(());
        }
        self.set_limit("memory.max", Limit::At(to))
    }

    /// Raises `memory.max`, and its heirs', where they are below.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one cannot be read or written.
    pub fn raise_to(&self, to: Bytes) -> Result<(), CgroupError> {
        if self.limit("memory.max")?.bytes() < to {
            self.set_limit("memory.max", Limit::At(to))?;
        }
        for path in &self.heirs {
            match Self::open(path).and_then(|heir| heir.raise_to(to)) {
                Err(error) if !error.is_gone() => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not said to inherit may have the same limit by its own spec.
    #[test]
    fn a_container_with_a_limit_of_its_own_does_not_follow_its_pods() {
        let name = format!("bellows-own-limit-{}", std::process::id());
        let pod = std::env::temp_dir().join(name);
        let path = |of: &str| pod.join(of).join("memory.max");
        for of in ["", "own", "without"] {
            fs::create_dir_all(pod.join(of)).unwrap();
            fs::write(path(of), Bytes::mib(96).0.to_string()).unwrap();
        }
        let cgroup = Cgroup::open(&pod).unwrap();
        let cgroup = cgroup.with_heirs(|path| path.ends_with("without"));
        for to in [256, 96] {
            cgroup.set_limit_and_heirs(Bytes::mib(to)).unwrap();
            let now = ["", "own", "without"].map(|of| fs::read_to_string(path(of)).unwrap());
            assert_eq!(now, [to, 96, to].map(|mib| Bytes::mib(mib).0.to_string()));
        }
        fs::remove_dir_all(&pod).unwrap();
    }

    /// A pod with containers of crun's: one without a limit of its own, and one with; and one of whose cgroups only the
    /// outer follows.
    #[test]
    fn a_limit_of_a_pod_reaches_what_its_containers_runtime_has_made_below() {
        let name = format!("bellows-heirs-{}", std::process::id());
        let pod = std::env::temp_dir().join(name);
        let limits = |limits: [u64; 7]| limits.map(|mib| Bytes::mib(mib).0.to_string());
        let paths = [
            "",
            "a.scope",
            "a.scope/container",
            "b.scope",
            "b.scope/container",
            "c.scope",
            "c.scope/container",
        ];
        for (path, limit) in paths.into_iter().zip(limits([96, 96, 96, 32, 32, 96, 64])) {
            fs::create_dir_all(pod.join(path)).unwrap();
            fs::write(pod.join(path).join("memory.max"), limit).unwrap();
        }
        let now =
            || paths.map(|path| fs::read_to_string(pod.join(path).join("memory.max")).unwrap());
        let cgroup = Cgroup::open(&pod).unwrap().with_likely_heirs().unwrap();
        cgroup.set_limit_and_heirs(Bytes::mib(256)).unwrap();
        assert_eq!(now(), limits([256, 256, 256, 32, 32, 256, 64]));
        // What the innermost has is what is in force.
        let inner = pod.join("a.scope/container/memory.max");
        fs::write(&inner, Bytes::mib(96).0.to_string()).unwrap();
        assert_eq!(cgroup.limit_in_force().unwrap(), Bytes::mib(96));
        cgroup.raise_to(Bytes::mib(128)).unwrap();
        assert_eq!(now(), limits([256, 256, 128, 32, 32, 256, 64]));
        cgroup.set_limit_and_heirs(Bytes::mib(96)).unwrap();
        assert_eq!(now(), limits([96, 96, 96, 32, 32, 96, 64]));
        fs::remove_dir_all(&pod).unwrap();
    }

    #[test]
    fn who_is_told_on_which_cpus_to_run_is_pinned() {
        let name = format!("bellows-pinned-{}", std::process::id());
        let pod = std::env::temp_dir().join(name);
        fs::create_dir_all(pod.join("app")).unwrap();
        let is_pinned = |cpus: &str| {
            fs::write(pod.join("app/cpuset.cpus"), cpus).unwrap();
            let of = |path: &Path| Cgroup::open(path).unwrap();
            let own = of(&pod.join("app")).is_pinned();
            assert_eq!(of(&pod).with_heirs(|_| true).is_pinned(), own);
            assert!(!of(&pod).is_pinned());
            own
        };
        assert!(is_pinned("1-3\n") && !is_pinned("\n"));
        fs::remove_file(pod.join("app/cpuset.cpus")).unwrap();
        assert!(!Cgroup::open(&pod.join("app")).unwrap().is_pinned());
        fs::remove_dir_all(&pod).unwrap();
    }
}
