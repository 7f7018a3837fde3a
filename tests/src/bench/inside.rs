//! Processes in cgroups that nobody watches: what is measured must not be disturbed by a sampler.

use std::{
    env,
    io::Read as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{attribution::CGROUP_ROOT, cgroup::Cgroup};
use bellows_core::Bytes;

/// A cgroup at `path` below the root, each of whose parents hands out the memory controller.
pub(super) fn create(path: &str) -> Result<Cgroup> {
    let mut cgroup = Cgroup::open(Path::new(CGROUP_ROOT))?;
    for name in path.split('/') {
        cgroup.write("cgroup.subtree_control", "+memory")?;
        let child = cgroup.path().join(name);
        cgroup = if child.is_dir() {
            Cgroup::open(&child)?
        } else {
            cgroup.create_child(name)?
        };
    }
    Ok(cgroup)
}

/// One of this binary's loads, to be run in a cgroup.
pub(super) fn load(cgroup: &Cgroup, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("load").args(arguments);
    cgroup.admit(&mut command)?;
    Ok(command)
}

/// A process that has touched memory and keeps it; it ends when dropped.
pub(super) struct Touched(Child);

impl Touched {
    /// Returns when `size` is touched.
    pub(super) fn start(cgroup: &Cgroup, size: Bytes) -> Result<Self> {
        let mut child = load(cgroup, &["touch", &size.0.to_string()])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run a load that touches memory")?;
        let mut stdout = child.stdout.take().context("no output")?;
        let touched = Self(child);
        let read = stdout.read(&mut [0])?;
        ensure!(read == 1, "a load that touches {size} has died");
        Ok(touched)
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}
