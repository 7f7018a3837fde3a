//! The agent under test, `bellows run`, in a cgroup of its own as its container would have one.

use std::{
    fs::File,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{attribution::CGROUP_ROOT, cgroup::Cgroup};

use crate::node;

const AGENT: &str = "/usr/local/bin/bellows";
const CGROUP: &str = "agent-under-test";

/// A running agent: a parent and its child. Both end when it is dropped.
pub(crate) struct Agent {
    parent: Child,
    cgroup: Cgroup,
}

impl Agent {
    pub(crate) fn start() -> Result<Self> {
        let root = Cgroup::open(Path::new(CGROUP_ROOT))?;
        let path = root.path().join(CGROUP);
        let cgroup = if path.is_dir() {
            Cgroup::open(&path)?
        } else {
            root.create_child(CGROUP)?
        };
        Ok(Self {
            parent: spawn(&cgroup)?,
            cgroup,
        })
    }

    /// Starts it again after its end.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.parent = spawn(&self.cgroup)?;
        Ok(())
    }

    /// Ends all of it at once, as the end of its container does.
    pub(crate) fn kill_all(&mut self) -> Result<()> {
        self.cgroup.write("cgroup.kill", "1")?;
        self.parent.wait()?;
        Ok(())
    }

    /// Fails if it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        ensure!(
            self.parent.try_wait()?.is_none(),
            "bellows run has ended:\n{}",
            node::log_tail("bellows", 40)
        );
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // One that has ended already needs no kill.
        drop(self.kill_all());
    }
}

fn spawn(cgroup: &Cgroup) -> Result<Child> {
    let procs = File::options()
        .write(true)
        .open(cgroup.path().join("cgroup.procs"))?;
    let log = node::log("bellows")?;
    let mut command = Command::new(AGENT);
    command
        .args(["run", "--node-name", node::NAME])
        .env("KUBECONFIG", node::kubeconfig())
        .env("BELLOWS_LOG", "info")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: one write between fork and exec; no allocation, no lock.
    unsafe { command.pre_exec(move || (&procs).write_all(b"0")) };
    command.spawn().context("run bellows run")
}
