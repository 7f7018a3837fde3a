//! `bellows restore`: every container without Kubernetes back at the limit that it had, before Bellows goes.
//!
//! It is for when no agent runs, and refuses while one does. A limit is only lowered where usage fits below it; who
//! needs more keeps it, and is named. Nothing is concluded from a runtime that does not answer.

use std::path::{Path, PathBuf};

use bellows_core::{Actuation, Bytes, Nanos, Patience, Policy, Signals, WHOLE};
use tokio::runtime;

use super::{RunError, lock::AgentLock, text};
use crate::{
    actuate::{pod_cgroup, shrink},
    cgroup::{Cgroup, Limit},
    cri::{self, Runtime, with_memory},
    explain::LEDGER,
    originals::{self, Original},
    recover::recover,
};

/// Puts everything back; returns one line for each container, and whether all are at rest.
///
/// # Errors
///
/// [`RunError`]; its text says what to do.
pub fn restore(endpoint: Option<PathBuf>) -> Result<(Vec<String>, bool), RunError> {
    let _lock = AgentLock::take()
        .map_err(|error| RunError::System("cannot lock /run/bellows", error))?
        .ok_or(RunError::AnotherAgent)?;
    recover(Path::new(LEDGER))
        .map_err(|error| RunError::System("cannot read the ledger", error))?;
    let directory = Path::new(originals::DIRECTORY);
    let all = originals::all(directory);
    if all.is_empty() {
        return Ok((Vec::new(), true));
    }
    let socket = endpoint.map_or_else(cri::find_socket, Ok)?;
    let tasks = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| RunError::System("cannot start the runtime", error))?;
    tasks.block_on(async {
        let containers = Runtime::at(&socket)?;
        let (mut lines, mut is_whole) = (Vec::new(), true);
        for original in all {
            let Original { id, name, .. } = &original;
            match back(&containers, &original).await {
                Ok(what) => {
                    originals::remove(directory, id);
                    lines.push(format!("{name}: {what}"));
                }
                Err(why) => {
                    is_whole = false;
                    lines.push(format!("{name} is left as it is: {why}"));
                }
            }
        }
        Ok((lines, is_whole))
    })
}

/// Brings one container to rest.
async fn back(containers: &Runtime, original: &Original) -> Result<String, String> {
    let said = match containers.status(&original.id).await {
        Ok((status, _process)) => status.resources.and_then(|resources| resources.linux),
        Err(error) if error.is_gone() => return Ok("gone".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    let at_rest = original.limit;
    let cgroup = match Cgroup::open(&original.path) {
        Ok(cgroup) => cgroup,
        Err(error) if error.is_gone() => return Ok("gone".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
    if !original.is_ours(limit) {
        return Ok(format!(
            "somebody else has set its limit to {limit}, which stays"
        ));
    }
    if limit > at_rest {
        // Ours was lifted above.
        let is_foreign = cgroup.limit("memory.high").map_err(text)? != Limit::Max;
        let has_room = shrink::make_room(&cgroup, at_rest, &rest(at_rest), is_foreign);
        if !is_foreign {
            // Whatever it took, nobody stays braked.
            cgroup.set_limit("memory.high", Limit::Max).map_err(text)?;
        }
        if !has_room.map_err(text)? {
            let usage = cgroup.usage().map_err(text)?;
            return Err(format!(
                "it uses {usage}, too much for its limit of {at_rest}: stop what it runs, and try again"
            ));
        }
        let resources = with_memory(at_rest, &said.unwrap_or_default());
        containers
            .update(&original.id, resources)
            .await
            .map_err(text)?;
    }
    if let Some(at_rest) = original.pod_limit {
        lower_pod(&cgroup, at_rest)?;
    }
    Ok(format!("limit {at_rest} as it was"))
}

/// Lowers a pod's limit once all of its containers are at rest: those that are not keep what they have of it.
fn lower_pod(cgroup: &Cgroup, at_rest: Bytes) -> Result<(), String> {
    let Some(path) = cgroup.path().parent() else {
        return Ok(());
    };
    let pod = Cgroup::open(path).map_err(text)?;
    let others = originals::all(Path::new(originals::DIRECTORY));
    let others = others.iter().filter(|other| {
        let is_same = other.path.parent() == Some(path) && other.path != cgroup.path();
        let limit = Cgroup::open(&other.path).and_then(|other| other.limit("memory.max"));
        is_same && limit.is_ok_and(|limit| limit.bytes() > other.limit)
    });
    if others.count() == 0 && pod.limit("memory.max").map_err(text)?.bytes() > at_rest {
        pod_cgroup::set_limit(&pod, at_rest).map_err(text)?;
    }
    Ok(())
}

/// The rules of a limit that nobody raises.
fn rest(limit: Bytes) -> Policy {
    Policy {
        original: limit,
        ceiling: limit,
        actuation: Actuation::Direct,
        signals: Signals::Programs,
        patience: Patience::UNPROBED,
        cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64),
        shrink_after: Nanos(0),
        usable_per_mille: WHOLE,
    }
}
