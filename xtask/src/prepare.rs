//! `cargo xtask prepare`: makes what takes minutes to make, ahead of the guests that need it.
//!
//! `cargo xtask test` has it done beside its first tiers, by what runs only where nothing else wants to (`SCHED_IDLE`): root
//! file systems and Kubernetes take a quarter of an hour on two CPUs, which guests do not use all the time. Whoever
//! needs a thing makes it where it is missing, and says why it cannot: nothing may depend on this. Who needs what is being made
//! waits for it, and leaves it the CPUs by that.

use std::process::{Child, Command, Stdio};

use anyhow::Result;

use crate::{
    bench, debian, kubernetes,
    shell::{find, step},
    tools,
};

/// Makes it.
pub(crate) fn command() -> Result<bool> {
    tools::packages()?;
    bench::roots()?;
    kubernetes::binaries(kubernetes::VERSION)?;
    Ok(true)
}

/// It, being made.
pub(crate) struct Ahead(Child);

impl Ahead {
    /// Begins; `None` where that cannot be done beside anything else.
    pub(crate) fn begin() -> Option<Self> {
        let chrt = find("chrt")?;
        // Both may ask the machine's own apt for something, of which there is one at a time.
        tools::packages().ok()?;
        debian::mirror().ok()?;
        let mut command = Command::new(chrt);
        command.args(["--idle", "0"]);
        command.arg(std::env::current_exe().ok()?);
        let child = command.arg("prepare").stdin(Stdio::null()).spawn();
        child.ok().map(Self)
    }

    /// Waits until it is made, or cannot be.
    pub(crate) fn wait(mut self) -> Result<()> {
        step("what is prepared beside the tiers before", || {
            self.0.wait()?;
            Ok(())
        })
    }
}
