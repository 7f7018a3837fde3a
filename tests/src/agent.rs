//! The agent under test, `bellows run`, in a cgroup of its own as its container would have one.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    attribution::CGROUP_ROOT,
    cgroup::{Cgroup, Limit},
};
use bellows_core::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::node::{self, Service, wait};

/// A way in which the agent can die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Death {
    /// Everything at once, as the end of its container (`cgroup.kill`).
    All,
    /// SIGKILL of the agent proper.
    Agent,
    /// SIGKILL of its parent.
    Parent,
    /// SIGABRT, as a panic that aborts.
    Abort,
    /// SIGSTOP: it lives and does nothing.
    Stop,
    /// Its own container's memory limit.
    OutOfMemory,
    /// SIGTERM, as a rolling update.
    Terminate,
}

impl Death {
    pub(crate) const ALL: [Self; 7] = [
        Self::All,
        Self::Agent,
        Self::Parent,
        Self::Abort,
        Self::Stop,
        Self::OutOfMemory,
        Self::Terminate,
    ];
}

const AGENT: &str = "/usr/local/bin/bellows";
const CGROUP: &str = "agent-under-test";

/// A running agent: a parent and its child. Both end when it is dropped.
pub(crate) struct Agent {
    parent: Child,
    cgroup: Cgroup,
    kubeconfig: PathBuf,
}

impl Agent {
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(node::kubeconfig())
    }

    /// The same, with another way to the API.
    pub(crate) fn start_with(kubeconfig: &Path) -> Result<Self> {
        let root = Cgroup::open(Path::new(CGROUP_ROOT))?;
        let path = root.path().join(CGROUP);
        let cgroup = if path.is_dir() {
            Cgroup::open(&path)?
        } else {
            root.create_child(CGROUP)?
        };
        Ok(Self {
            parent: spawn(&cgroup, kubeconfig)?,
            cgroup,
            kubeconfig: kubeconfig.to_owned(),
        })
    }

    /// Starts it again after its end.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.parent = spawn(&self.cgroup, &self.kubeconfig)?;
        Ok(())
    }

    /// Makes it die; returns at once.
    pub(crate) fn die(&mut self, death: Death) -> Result<()> {
        match death {
            Death::All => Ok(self.cgroup.write("cgroup.kill", "1")?),
            Death::Parent => Ok(self.parent.kill()?),
            Death::Agent => self.signal(Signal::KILL),
            Death::Abort => self.signal(Signal::ABORT),
            Death::Stop => self.signal(Signal::STOP),
            Death::Terminate => self.signal(Signal::TERM),
            Death::OutOfMemory => {
                let tiny = Limit::At(Bytes::mib(1));
                // The write itself may fail when there is nobody left to kill.
                drop(self.cgroup.set_limit("memory.max", tiny));
                Ok(())
            }
        }
    }

    /// Its processes.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        let processes = self.cgroup.read("cgroup.procs")?;
        Ok(processes
            .lines()
            .map(str::parse)
            .collect::<Result<_, _>>()?)
    }

    /// Signals the agent proper, the child.
    fn signal(&self, signal: Signal) -> Result<()> {
        let processes = self.cgroup.read("cgroup.procs")?;
        let parent = self.parent.id().to_string();
        let child = processes
            .lines()
            .find(|line| *line != parent)
            .context("bellows run has no child")?;
        let child = Pid::from_raw(child.parse()?).context("no process")?;
        Ok(kill_process(child, signal)?)
    }

    /// Waits until nothing is left of it; what does not end by itself within 5 s is ended.
    pub(crate) fn end(&mut self) -> Result<()> {
        let is_over = wait("its end", Duration::from_secs(5), || {
            Ok(self.parent.try_wait()?.is_some() && !self.cgroup.populated()?)
        });
        if is_over.is_err() {
            self.kill_all()?;
        }
        Ok(self.cgroup.set_limit("memory.max", Limit::Max)?)
    }

    /// Ends all of it at once, as the end of its container does.
    pub(crate) fn kill_all(&mut self) -> Result<()> {
        self.die(Death::All)?;
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

/// `bellows releaser`, as the second container of the agent's pod; ends when dropped.
pub(crate) struct Releaser(Service);

impl Releaser {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self(Service(logged(&["releaser"])?.spawn()?)))
    }

    /// Fails if it has ended: whoever dies next would have nobody.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.0.check("bellows releaser", "bellows")
    }
}

fn spawn(cgroup: &Cgroup, kubeconfig: &Path) -> Result<Child> {
    let mut command = logged(&["run", "--node-name", node::NAME, "--requests", "--nri"])?;
    command.env("KUBECONFIG", kubeconfig);
    cgroup.admit(&mut command)?;
    command.spawn().context("run bellows run")
}

/// The agent's binary, with what it prints going to its log.
pub(crate) fn logged(arguments: &[&str]) -> Result<Command> {
    let log = node::log("bellows")?;
    let mut command = Command::new(AGENT);
    command
        .args(arguments)
        .env("BELLOWS_LOG", "info")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(command)
}
