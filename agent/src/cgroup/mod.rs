//! One cgroup v2 directory: reading what the kernel says, writing what it should do.
//!
//! Values that the kernel does not have are `None`, never zero. Nothing here decides. What is written
//! again and again is a [`Control`].

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use bellows_core::{Bytes, CgroupId, Nanos};
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use crate::machine;

mod control;
pub mod quota;

pub use control::Control;

/// The magic number of cgroup v2 (`CGROUP2_SUPER_MAGIC`, include/uapi/linux/magic.h).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// What crun calls its second cgroup of a container.
const INNER: &str = "container";

/// What went wrong with a cgroup file.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A file could not be read, written or created.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file's content is not what the kernel documents.
    #[error("{path} contains `{content}`, which is no {expected}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What it contains.
        content: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The file system is not cgroup v2.
    #[error(
        "{path} is not on a cgroup v2 file system: boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there"
    )]
    NotV2 {
        /// The path.
        path: PathBuf,
    },
}

impl CgroupError {
    /// Whether the cgroup is gone (removed while we held it).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::ENODEV)
            }
            Self::Parse { .. } | Self::NotV2 { .. } => false,
        }
    }

    /// Whether the kernel does not take what was written, such as a word that it does not know.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        source.raw_os_error() == Some(libc::EINVAL)
    }
}

/// A limit file's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `max`: no limit.
    Max,
    /// A number of bytes.
    At(Bytes),
}

impl Limit {
    /// The limit in bytes; `max` as the largest number.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        match self {
            Self::Max => Bytes(u64::MAX),
            Self::At(bytes) => bytes,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Max => "max".to_owned(),
            Self::At(Bytes(bytes)) => bytes.to_string(),
        }
    }
}

/// Counters of `memory.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryEvents {
    /// Times that usage was above `memory.high`.
    pub high: u64,
    /// Times that usage was about to exceed `memory.max`.
    pub max: u64,
    /// Times that the OOM killer was entered.
    pub oom: u64,
    /// Processes killed by any OOM killer.
    pub oom_kill: u64,
}

/// Where page cache and the rest of a cgroup's memory stand, from `memory.stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStat {
    /// `memory.current`.
    pub usage: Bytes,
    /// Page cache on the LRU lists, which reclaim can give back.
    pub file: Bytes,
    /// Caches of names and inodes (`slab_reclaimable`), which it gives back where nobody uses them.
    pub slab: Bytes,
}

impl MemoryStat {
    /// Usage without page cache.
    #[must_use]
    pub const fn demand(self) -> Bytes {
        self.usage.minus(self.file)
    }

    /// What is left if all is given back that may be.
    #[must_use]
    pub const fn least(self) -> Bytes {
        self.demand().minus(self.slab)
    }
}

/// A cgroup directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Shared: each guarded cgroup and each of its open files knows it.
    path: Arc<Path>,
    id: CgroupId,
    /// Cgroups below that have inherited its limit and follow it.
    heirs: Vec<PathBuf>,
}

impl Cgroup {
    /// The cgroup at `path`.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when there is no such directory or it is not on cgroup v2.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let io = |source| CgroupError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        };
        let stat = rustix::fs::statfs(path).map_err(|errno| io(errno.into()))?;
        // Tests work on directories with files of the same names.
        if stat.f_type != CGROUP2_SUPER_MAGIC
            && !(cfg!(test) && path.starts_with(std::env::temp_dir()))
        {
            return Err(CgroupError::NotV2 {
                path: path.to_owned(),
            });
        }
        let id = CgroupId(fs::metadata(path).map_err(io)?.ino());
        Ok(Self {
            path: path.into(),
            id,
            heirs: Vec::new(),
        })
    }

    /// A directory with files of the same names, where there is no cgroup.
    #[cfg(test)]
    pub(crate) fn stand_in(path: &Path, id: CgroupId) -> Self {
        Self {
            path: path.into(),
            id,
            heirs: Vec::new(),
        }
    }

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

    /// Creates the cgroup `name` below this one.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when the directory cannot be created.
    pub fn create_child(&self, name: &str) -> Result<Self, CgroupError> {
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(|source| CgroupError::Io {
            action: "create",
            path: path.clone(),
            source,
        })?;
        Self::open(&path)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> CgroupId {
        self.id
    }

    /// The content of one of its files.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be read.
    pub fn read(&self, file: &str) -> Result<String, CgroupError> {
        let path = self.path.join(file);
        fs::read_to_string(&path).map_err(|source| CgroupError::Io {
            action: "read",
            path,
            source,
        })
    }

    /// Writes one of its files.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be written.
    pub fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Whether a file exists in it.
    #[must_use]
    pub fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }

    fn number(&self, file: &'static str) -> Result<u64, CgroupError> {
        let content = self.read(file)?;
        content
            .trim()
            .parse()
            .map_err(|_error| self.unparsable(file, &content, "number"))
    }

    fn unparsable(&self, file: &str, content: &str, expected: &'static str) -> CgroupError {
        CgroupError::Parse {
            path: self.path.join(file),
            content: content.trim().to_owned(),
            expected,
        }
    }

    /// `memory.current`.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn usage(&self) -> Result<Bytes, CgroupError> {
        self.number("memory.current").map(Bytes)
    }

    /// `memory.peak`; `None` before Linux 5.19, which does not have it.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn peak(&self) -> Result<Option<Bytes>, CgroupError> {
        if self.has("memory.peak") {
            self.number("memory.peak").map(|peak| Some(Bytes(peak)))
        } else {
            Ok(None)
        }
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

    /// `memory.events`, which counts the cgroups below as well.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn events(&self) -> Result<MemoryEvents, CgroupError> {
        Ok(parse_events(&self.read("memory.events")?))
    }

    /// Usage and page cache. Reading `memory.stat` flushes the kernel's statistics: once per
    /// decision, not in a loop.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn stat(&self) -> Result<MemoryStat, CgroupError> {
        let content = self.read("memory.stat")?;
        let field = |name| field(&content, name).unwrap_or(0);
        let file = Bytes(field("active_file").saturating_add(field("inactive_file")));
        Ok(MemoryStat {
            usage: self.usage()?,
            file,
            slab: Bytes(field("slab_reclaimable")),
        })
    }

    /// Usage without the page cache that is given back first: what the kubelet evicts by.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn working_set(&self) -> Result<Bytes, CgroupError> {
        let inactive = field(&self.read("memory.stat")?, "inactive_file");
        Ok(self.usage()?.minus(Bytes(inactive.unwrap_or(0))))
    }

    /// File pages that were read again after they had been reclaimed, since the cgroup was made.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when `memory.stat` cannot be read.
    pub fn refaulted(&self) -> Result<Bytes, CgroupError> {
        let stat = self.read("memory.stat")?;
        let pages = field(&stat, "workingset_refault_file").unwrap_or(0);
        Ok(machine::pages(pages))
    }

    /// Time that at least one of its tasks has waited for memory, from `memory.pressure`; `None` where the
    /// kernel does not account for it (`psi=0`).
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it is there and cannot be read.
    pub fn stalled(&self) -> Result<Option<Nanos>, CgroupError> {
        self.some_pressure("memory.pressure")
    }

    /// Time that at least one of its tasks has waited for a CPU, from `cpu.pressure`; `None` where the kernel does not
    /// account for it.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it is there and cannot be read.
    pub fn waited_for_cpu(&self) -> Result<Option<Nanos>, CgroupError> {
        self.some_pressure("cpu.pressure")
    }

    fn some_pressure(&self, file: &str) -> Result<Option<Nanos>, CgroupError> {
        match self.read(file) {
            Ok(content) => Ok(parse_stalled(&content)),
            Err(CgroupError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a process lives in it or below.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        Ok(field(&self.read("cgroup.events")?, "populated") == Some(1))
    }

    /// Kills every process in it and below: by `cgroup.kill`, or before Linux 5.14, which does not have it,
    /// one by one. A process that is made meanwhile is there at the next call.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when a file cannot be read or written.
    pub fn kill(&self) -> Result<(), CgroupError> {
        if self.has("cgroup.kill") {
            return self.write("cgroup.kill", "1");
        }
        // Who is frozen neither forks nor ends, so that no id becomes another process's; it dies all the same.
        self.write("cgroup.freeze", "1")?;
        let killed = self.kill_one_by_one();
        self.write("cgroup.freeze", "0")?;
        killed
    }

    fn kill_one_by_one(&self) -> Result<(), CgroupError> {
        let procs = self.read("cgroup.procs")?;
        let ids = procs.lines().filter_map(|line| line.parse().ok());
        for process in ids.filter_map(Pid::from_raw) {
            if let Err(errno) = kill_process(process, Signal::KILL) {
                tracing::debug!(%errno, "it has ended by itself");
            }
        }
        self.children()
            .try_for_each(|child| child?.kill_one_by_one())
    }

    /// The processes in it and below; those below that cannot be read are left out.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when its own cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let own = self.read("cgroup.procs")?;
        let mut all: Vec<u32> = own.lines().filter_map(|line| line.parse().ok()).collect();
        for child in self.children().filter_map(Result::ok) {
            all.extend(child.processes().unwrap_or_default());
        }
        Ok(all)
    }

    /// A process in it or below; `None` if there is none.
    #[must_use]
    pub fn a_process(&self) -> Option<u32> {
        let processes = self.read("cgroup.procs").ok()?;
        let own = processes.lines().find_map(|line| line.parse().ok());
        own.or_else(|| self.children().find_map(|child| child.ok()?.a_process()))
    }

    /// The cgroups right below it; none if it is gone.
    pub(crate) fn children(&self) -> impl Iterator<Item = Result<Self, CgroupError>> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Self::open(&entry.path()))
    }

    /// Makes a command start in it: the process moves itself between fork and exec, so that nothing of the
    /// command is ever charged elsewhere.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when its `cgroup.procs` cannot be opened.
    pub fn admit(&self, command: &mut Command) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.procs");
        let procs = match File::options().write(true).open(&path) {
            Ok(procs) => procs,
            Err(source) => {
                return Err(CgroupError::Io {
                    action: "open",
                    path,
                    source,
                });
            }
        };
        // SAFETY: between fork and exec the closure only makes one write system call, which is
        // async-signal-safe; it touches no lock and does not allocate.
        unsafe { command.pre_exec(move || (&procs).write_all(b"0")) };
        Ok(())
    }

    /// Removes it; it must be empty.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`], for example `EBUSY` while a process is left.
    pub fn remove(&self) -> Result<(), CgroupError> {
        fs::remove_dir(&self.path).map_err(|source| CgroupError::Io {
            action: "remove",
            path: self.path.to_path_buf(),
            source,
        })
    }
}

/// Reads `memory.events`; a counter that the kernel does not have is zero.
#[must_use]
pub fn parse_events(content: &str) -> MemoryEvents {
    let field = |name| field(content, name).unwrap_or(0);
    MemoryEvents {
        high: field("high"),
        max: field("max"),
        oom: field("oom"),
        oom_kill: field("oom_kill"),
    }
}

/// What a limit file contains; `None` if it is neither `max` nor a number.
#[must_use]
pub fn parse_limit(content: &str) -> Option<Limit> {
    match content.trim() {
        "max" => Some(Limit::Max),
        number => number.parse().ok().map(|bytes| Limit::At(Bytes(bytes))),
    }
}

/// Reads the `some` line's total of a pressure file, which the kernel gives in microseconds.
#[must_use]
pub fn parse_stalled(content: &str) -> Option<Nanos> {
    let some = content.lines().find(|line| line.starts_with("some "))?;
    let total = some
        .split_whitespace()
        .find_map(|word| word.strip_prefix("total="))?;
    let micros: u64 = total.parse().ok()?;
    Some(Nanos(micros.saturating_mul(1000)))
}

/// The value of the `name value` line of a file such as `memory.stat`.
#[must_use]
pub fn field(content: &str, name: &str) -> Option<u64> {
    content.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// The cgroup of a process below the root, from its `/proc/PID/cgroup`; `None` outside of cgroup v2,
/// and outside of the cgroup namespace, where the kernel writes `/..`: joined to the root, that path
/// would be somewhere else.
#[must_use]
pub fn own(content: &str) -> Option<&str> {
    let path = content.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let is_below = !path.starts_with('/') && path.split('/').all(|part| part != "..");
    is_below.then_some(path)
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

    #[test]
    fn reads_limits() {
        assert_eq!(parse_limit("max\n"), Some(Limit::Max));
        assert_eq!(parse_limit("4096\n"), Some(Limit::At(Bytes(4096))));
        for bad in ["", "-1", "4096 1", "maximum", "99999999999999999999"] {
            assert_eq!(parse_limit(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_number_follows_its_name() {
        let stat = "usage_usec 8250\nuser_usec 17";
        assert_eq!(field(stat, "usage_usec"), Some(8250));
        let pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=42\nfull";
        assert_eq!(parse_stalled(pressure), Some(Nanos(42_000)));
        for content in ["", "usage_usec", "usage_usec max"] {
            assert_eq!(field(content, "usage_usec"), None);
        }
    }

    #[test]
    fn reads_pressure() {
        let text = "some avg10=0.12 avg60=0.00 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n";
        assert_eq!(parse_stalled(text), Some(Nanos(1_234_000)));
        for bad in ["", "full total=3", "some avg10=0.00", "some total=-1"] {
            assert_eq!(parse_stalled(bad), None, "{bad}");
        }
    }

    #[test]
    fn finds_whole_field_names_only() {
        let stat = "inactive_file 7\nactive_file 5\nfile 12\noom_kill 3\noom 1\n";
        assert_eq!(field(stat, "active_file"), Some(5));
        assert_eq!(field(stat, "file"), Some(12));
        assert_eq!(field(stat, "oom"), Some(1));
        assert_eq!(field(stat, "fil"), None);
    }

    #[test]
    fn the_own_cgroup_is_below_the_root() {
        assert_eq!(own("1:cpu:/a\n0::/b/c..d\n"), Some("b/c..d"));
        assert_eq!(own("0::/\n"), Some(""));
        for outside in ["", "1:cpu:/a\n", "0::/../a\n", "0::/..\n", "0:://a\n"] {
            assert_eq!(own(outside), None, "{outside}");
        }
    }

    #[test]
    fn a_path_that_is_no_cgroup_says_what_to_do() {
        let error = Cgroup::open(Path::new("/proc")).expect_err("proc is no cgroup");
        assert!(error.to_string().contains("mount cgroup2"), "{error}");
    }
}
