//! Bursts that begin when they are told to, and not after a fixed time: who bursts before it is guarded dies of a slow
//! machine, which must not be taken for a want of care.
//!
//! The load looks for a file in its own root, which is made from outside through `/proc/PID/root`: the container needs
//! no mount for it.

use std::{
    fs::{self, File},
    io,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use bellows::cgroup::{Cgroup, Limit};

use crate::node::wait;

const FILE: &str = "/begin";
/// Time in which one that is new must be guarded, however slow the machine.
const GUARDED: Duration = Duration::from_secs(60);

/// What makes the load `burst` wait.
pub(super) fn closed() -> [String; 2] {
    ["--rest-until", FILE].map(str::to_owned)
}

/// Undoes what let the last one begin whose root is the machine's own.
pub(super) fn close() -> Result<()> {
    match fs::remove_file(FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(FILE),
        _ => Ok(()),
    }
}

/// Lets the processes of a container begin. That of a probe may have ended meanwhile, or not have the container's root
/// yet.
pub(super) fn open(container: &Cgroup) -> Result<()> {
    make(container, FILE)
}

/// Makes a file in a container's root.
pub(super) fn make(container: &Cgroup, file: &str) -> Result<()> {
    let mut last = Err(anyhow!("nobody waits in it"));
    for process in container.processes()? {
        let path = format!("/proc/{process}/root{file}");
        let opened = File::create(&path).context(path);
        last = last.or(opened.map(drop));
    }
    last
}

/// Waits until a cgroup has a brake, the last thing that it gets when it is adopted.
pub(super) fn wait_braked(guarded: &Cgroup) -> Result<()> {
    wait("its brake is set", GUARDED, || {
        Ok(guarded.limit("memory.high")? != Limit::Max)
    })
}

/// The same, and lets it begin.
pub(super) fn open_when_braked(container: &Cgroup) -> Result<()> {
    wait_braked(container)?;
    open(container)
}
