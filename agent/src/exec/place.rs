//! Where the command's cgroup is made.
//!
//! Under systemd, cgroups belong to systemd: the command gets a transient scope with delegation,
//! which `systemd-run` makes and in which this process starts again. Elsewhere a directory is made
//! below the nearest ancestor of our own cgroup that can hand out the memory controller. In
//! cgroup v2 a cgroup with processes cannot hand out controllers (except the root), so it must not
//! be made below our own one.

use std::{
    env, fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use thiserror::Error;

use crate::cgroup::{self, Cgroup, CgroupError};

/// Set in the process that runs inside the scope.
pub(crate) const SCOPE_VARIABLE: &str = "BELLOWS_EXEC_SCOPE";
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Why there is no place for a cgroup.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// systemd could not be asked.
    #[error(
        "cannot run systemd-run ({0}): install systemd's tools, or run where systemd is not the init system"
    )]
    SystemdRun(io::Error),
    /// No cgroup v2.
    #[error(
        "this process is in no cgroup v2 hierarchy ({0}): boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on {CGROUP_ROOT}"
    )]
    NoV2(String),
    /// The memory controller is not to be had.
    #[error(
        "the memory controller cannot be enabled at {CGROUP_ROOT} or in any cgroup above this process ({0}): boot without cgroup_disable=memory; in a container, run it with a writable cgroup namespace"
    )]
    NoMemoryController(String),
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Under systemd, starts this process again inside a delegated scope; returns elsewhere, and
/// inside the scope.
pub(crate) fn enter_scope() -> Result<(), PlaceError> {
    let systemd = Path::new("/run/systemd/system").is_dir();
    if !systemd || env::var_os(SCOPE_VARIABLE).is_some() {
        return Ok(());
    }
    let executable = env::current_exe().map_err(PlaceError::SystemdRun)?;
    let error = Command::new("systemd-run")
        .args(["--scope", "--quiet", "--collect", "--property=Delegate=yes"])
        .arg(format!("--unit=bellows-exec-{}", std::process::id()))
        .args(takes_words_as_they_are()?)
        .arg("--")
        .arg(executable)
        .args(env::args_os().skip(1))
        .env(SCOPE_VARIABLE, "1")
        .exec();
    Err(PlaceError::SystemdRun(error))
}

/// What keeps `systemd-run` from expanding `$` in the command: it does so for scopes, too, in newer versions (seen
/// with 262), unless it is told not to, which it can be from 254 on (its NEWS).
fn takes_words_as_they_are() -> Result<Option<&'static str>, PlaceError> {
    let told = Command::new("systemd-run").arg("--version").output();
    let told = told.map_err(PlaceError::SystemdRun)?.stdout;
    let version = version(&String::from_utf8_lossy(&told));
    Ok((version >= Some(254)).then_some("--expand-environment=no"))
}

/// `systemd 252 (252.38-1~deb12u1)`, and more lines.
fn version(told: &str) -> Option<u32> {
    let version = told.split_whitespace().nth(1)?;
    let end = version.find(|letter: char| !letter.is_ascii_digit());
    version[..end.unwrap_or(version.len())].parse().ok()
}

/// A cgroup below which the command's one is made.
#[derive(Debug)]
pub(crate) struct Place {
    parent: Cgroup,
    /// Where this process has moved itself to make room, inside a scope.
    supervisor: Option<Cgroup>,
}

impl Place {
    pub(crate) fn find() -> Result<Self, PlaceError> {
        let own = own_cgroup()?;
        if env::var_os(SCOPE_VARIABLE).is_some() {
            return Self::in_scope(&own);
        }
        let root = Path::new(CGROUP_ROOT);
        let mut refusals = Vec::new();
        for path in own.ancestors().take_while(|path| path.starts_with(root)) {
            let candidate = Cgroup::open(path)?;
            match hand_out_memory(&candidate) {
                Ok(()) => {
                    return Ok(Self {
                        parent: candidate,
                        supervisor: None,
                    });
                }
                Err(error) => refusals.push(error.to_string()),
            }
        }
        Err(PlaceError::NoMemoryController(refusals.join("; ")))
    }

    fn in_scope(scope: &Path) -> Result<Self, PlaceError> {
        let scope = Cgroup::open(scope)?;
        let supervisor = scope.create_child("supervisor")?;
        supervisor.write("cgroup.procs", "0")?;
        hand_out_memory(&scope)?;
        Ok(Self {
            parent: scope,
            supervisor: Some(supervisor),
        })
    }

    /// A cgroup `NAME-PID` in it.
    pub(crate) fn create_named(&self, name: &str) -> Result<Cgroup, PlaceError> {
        let name = format!("{name}-{}", std::process::id());
        Ok(self.parent.create_child(&name)?)
    }

    /// Goes back to where this process was, so that systemd finds its scope as it made it.
    pub(crate) fn leave(self) -> Result<(), CgroupError> {
        let Self { parent, supervisor } = self;
        if let Some(supervisor) = supervisor {
            parent.write("cgroup.subtree_control", "-memory")?;
            parent.write("cgroup.procs", "0")?;
            supervisor.remove()?;
        }
        Ok(())
    }
}

fn hand_out_memory(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let enabled = cgroup.read("cgroup.subtree_control")?;
    if enabled
        .split_whitespace()
        .any(|controller| controller == "memory")
    {
        return Ok(());
    }
    cgroup.write("cgroup.subtree_control", "+memory")
}

/// The directory of this process's cgroup.
fn own_cgroup() -> Result<PathBuf, PlaceError> {
    let content = fs::read_to_string("/proc/self/cgroup")
        .map_err(|error| PlaceError::NoV2(error.to_string()))?;
    let path = cgroup::own(&content)
        .ok_or_else(|| PlaceError::NoV2(content.trim().replace('\n', ", ")))?;
    let directory = Path::new(CGROUP_ROOT).join(path);
    match Cgroup::open(&directory) {
        Ok(_) => Ok(directory),
        Err(error) => Err(PlaceError::NoV2(error.to_string())),
    }
}

/// Removes a cgroup and those that the command has made below it.
pub(crate) fn remove_tree(cgroup: &Cgroup) -> Result<(), CgroupError> {
    cgroup
        .children()
        .try_for_each(|child| remove_tree(&child?))?;
    cgroup.remove()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_systemd_is_understood() {
        let told = "systemd 252 (252.38-1~deb12u1)\n+PAM +AUDIT";
        assert_eq!(version(told), Some(252));
        assert_eq!(version("systemd 259~rc1-1"), Some(259));
        assert_eq!(version("systemd v1"), None);
        assert_eq!(version(""), None);
    }
}
