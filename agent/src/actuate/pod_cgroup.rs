//! The memory limit of a pod's own cgroup, which holds whatever its containers have.
//!
//! The kubelet sets it to the sum of the containers' limits where each has one, and no runtime touches it
//! (containerd's UpdatePodSandboxResources stores values only: internal/cri/server/sandbox_update_resources.go,
//! 2.1). A container that is raised below it gains nothing. So the pod goes up first, and down last; otherwise
//! the container would be killed by its pod.
//!
//! Where systemd made the cgroup, a value that was only written is forgotten at its next `daemon-reload`: there
//! the limit is set as a property of the slice. Setting one may reset what others have written into the slice
//! behind systemd's back (seen: any hand-written value); those are read before and put back after.

use std::io;

use bellows_core::Bytes;
use thiserror::Error;
use tokio::{process::Command, task::spawn_blocking, time::timeout};

use super::systemd;
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    machine,
};

/// What others may have written into a slice. The CPU quota is not among them: it may be moved while systemd answers,
/// and whoever moves it puts it back.
const OTHERS: [&str; 5] = [
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.swap.max",
    "cpu.weight",
];

/// Why a pod's limit was not set.
#[derive(Debug, Error)]
pub enum PodCgroupError {
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// systemd could not be asked.
    #[error(
        "cannot run systemctl ({0}): the limit of a slice is systemd's to set; install systemd's tools"
    )]
    Systemctl(#[source] io::Error),
    /// systemd does not answer.
    #[error("systemctl set-property {unit}: no answer within {} s", systemd::LONGEST.as_secs())]
    Silent {
        /// The slice.
        unit: String,
    },
    /// A thread.
    #[error("no thread can be had to set a limit: {0}")]
    Thread(#[from] tokio::task::JoinError),
    /// systemd refused.
    #[error("systemctl set-property {unit} MemoryMax={limit}: {said}")]
    Refused {
        /// The slice.
        unit: String,
        /// The limit.
        limit: u64,
        /// What it printed.
        said: String,
    },
    /// It is not what was set.
    #[error(
        "the limit of {path} is {found} after it was set to {wanted}: does something else set it?"
    )]
    NotKept {
        /// The cgroup.
        path: String,
        /// What was set.
        wanted: Bytes,
        /// What was read back.
        found: Bytes,
    },
}

/// Sets the memory limit of a pod's cgroup, and reads it back. Lowering reclaims in here, so usage must be below
/// the limit.
///
/// # Errors
///
/// [`PodCgroupError`]; the limit may have been set all the same.
pub async fn set_limit(pod: &Cgroup, limit: Bytes) -> Result<(), PodCgroupError> {
    if systemd::owns(pod.path()) {
        set_property(pod, limit).await?;
    } else {
        let pod = pod.clone();
        spawn_blocking(move || pod.set_limit("memory.max", Limit::At(limit))).await??;
    }
    let found = pod.limit("memory.max")?.bytes();
    if found == machine::page_floor(limit) {
        Ok(())
    } else {
        Err(PodCgroupError::NotKept {
            path: pod.path().display().to_string(),
            wanted: limit,
            found,
        })
    }
}

async fn set_property(pod: &Cgroup, limit: Bytes) -> Result<(), PodCgroupError> {
    let name = pod.path().file_name().unwrap_or_default();
    let unit = name.to_string_lossy().into_owned();
    let before = OTHERS.map(|file| (file, pod.read(file).ok()));
    let mut command = Command::new("systemctl");
    command
        .args(["set-property", "--runtime"])
        .arg(name)
        .arg(format!("MemoryMax={}", limit.0))
        .kill_on_drop(true);
    let output = match timeout(systemd::LONGEST, command.output()).await {
        Ok(output) => output.map_err(PodCgroupError::Systemctl)?,
        Err(_elapsed) => return Err(PodCgroupError::Silent { unit }),
    };
    if !output.status.success() {
        return Err(PodCgroupError::Refused {
            unit,
            limit: limit.0,
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    for (file, before) in before {
        if let Some(before) = before
            && pod.read(file).is_ok_and(|after| after != before)
        {
            pod.write(file, before.trim())?;
        }
    }
    Ok(())
}
