//! `bellows restore`: every container without Kubernetes back at the limit that it had, before Bellows goes.
//!
//! It is for when no agent runs, and refuses while one does. A limit is only lowered where usage fits below it; who
//! needs more keeps it, and is named. Nothing is concluded from a runtime that does not answer.

use std::path::{Path, PathBuf};

use bellows_core::{
    Actuation, Bytes, Cpu, Nanos, Patience, Policy, Signals, WHOLE,
    moved::{MovedLimit, PodStep, pod_step},
};
use tokio::runtime;

use super::{RunError, lock::AgentLock, text};
use crate::{
    actuate::{by_hand::ByHands, pod_cgroup, shrink},
    cgroup::{Cgroup, CgroupError, Limit},
    cri::{
        self, LinuxContainerResources, Runtime, memory_limit, resources, with_memory, with_quota,
    },
    explain::LEDGER,
    machine::{online_cpus, page_floor},
    originals::{MovedQuota, Original, PodOriginal, PodQuota, Recorded as _, Records},
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
    let (records, pods) = (Records::containers(), Records::pods());
    let (all, pods_left) = (records.all(), pods.all());
    let quotas = Records::pod_quotas();
    let quotas_left = quotas.all();
    if !by_hand_back() {
        let why = "limits of pods that were raised by hand are left as they are: they are in use; stop what runs there, and try again";
        return Ok((vec![why.to_owned()], false));
    }
    if all.is_empty() && pods_left.is_empty() && quotas_left.is_empty() {
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
            let name = &original.name;
            match back(&containers, &original).await {
                Ok(what) => {
                    records.remove(original.key());
                    lines.push(format!("{name}: {what}"));
                }
                Err(why) => {
                    is_whole = false;
                    lines.push(format!("{name} is left as it is: {why}"));
                }
            }
        }
        let left = records.all();
        for pod in quotas_left {
            match lower_pod_quota(&quotas, &pod, &left) {
                Ok(true) => quotas.remove(pod.key()),
                Ok(false) => {}
                Err(why) => {
                    is_whole = false;
                    let path = pod.path.display();
                    lines.push(format!(
                        "the CPU limit of the pod {path} is left as it is: {why}"
                    ));
                }
            }
        }
        for pod in pods_left {
            match lower_pod(&pods, &pod, &left).await {
                Ok(true) => pods.remove(pod.key()),
                Ok(false) => {}
                Err(why) => {
                    is_whole = false;
                    let path = pod.path.display();
                    lines.push(format!("the pod {path} is left as it is: {why}"));
                }
            }
        }
        Ok((lines, is_whole))
    })
}

/// Puts back what was raised by hand in pods that the API owns; returns whether all of it is.
pub(super) fn by_hand_back() -> bool {
    let is_left = ByHands::default().lower_left(|_| false, |_| false);
    quotas_in_pods_back(|_| false, |_| false) && !is_left
}

/// Puts back CPU quotas of pods that nobody is responsible for any more, but for those that somebody may yet come to be
/// responsible for; returns whether none is left. What is written down of pods that are gone is removed.
pub(super) fn quotas_in_pods_back(
    is_cared_for: impl Fn(&Path) -> bool,
    is_pending: impl Fn(&Path) -> bool,
) -> bool {
    let (records, quotas) = (Records::in_pods(), Records::pod_quotas());
    let all = records.all();
    let mut is_whole = true;
    let mut back = Vec::new();
    for original in all.iter().filter(|original| !is_cared_for(&original.path)) {
        if is_pending(&original.path) {
            is_whole = false;
            continue;
        }
        match quota_in_pod_back(original) {
            Ok(()) => {
                records.remove(original.key());
                back.push(original.path.parent());
            }
            Err(why) => {
                is_whole = false;
                tracing::warn!(container = original.name, why, "a CPU limit stays for now");
            }
        }
    }
    let left = records.all();
    for pod in quotas.all() {
        let is_above = back.contains(&Some(pod.path.as_path()));
        if !is_above && pod.path.exists() {
            continue;
        }
        match lower_pod_quota(&quotas, &pod, &left) {
            Ok(true) => quotas.remove(pod.key()),
            Ok(false) => {}
            Err(why) => {
                is_whole = false;
                tracing::warn!(path = %pod.path.display(), why, "the CPU limit of a pod stays for now");
            }
        }
    }
    is_whole
}

/// What somebody else has set stays.
fn quota_in_pod_back(original: &Original) -> Result<(), String> {
    let (Some(cgroup), Some(moved)) = (opened(&original.path)?, &original.quota) else {
        return Ok(());
    };
    match cgroup.quota().map_err(text)? {
        Some(quota) if moved.is_ours(quota) => cgroup
            .set_quota(quota.with(moved.cpu.at_rest))
            .map_err(text),
        Some(_) | None => Ok(()),
    }
}

/// A cgroup that was written down; `None` if it is gone.
fn opened(path: &Path) -> Result<Option<Cgroup>, String> {
    match Cgroup::open(path) {
        Ok(cgroup) => Ok(Some(cgroup)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Brings one container to rest.
async fn back(containers: &Runtime, original: &Original) -> Result<String, String> {
    let said = match containers.status(&original.id).await {
        Ok((status, _process)) => resources(status),
        Err(error) if error.is_gone() => return Ok("gone".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    let Some(cgroup) = opened(&original.path)? else {
        return Ok("gone".to_owned());
    };
    let memory = match &original.limit {
        Some(limit) => memory_back(containers, original, limit, &cgroup, &said).await?,
        None => None,
    };
    let quota = match &original.quota {
        Some(quota) => quota_back(containers, original, quota, &cgroup, &said).await?,
        None => None,
    };
    let what: Vec<String> = memory.into_iter().chain(quota).collect();
    Ok(what.join("; "))
}

async fn memory_back(
    containers: &Runtime,
    original: &Original,
    moved: &MovedLimit<Bytes>,
    cgroup: &Cgroup,
    said: &LinuxContainerResources,
) -> Result<Option<String>, String> {
    let at_rest = moved.at_rest;
    let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
    if !moved.is_ours(limit) {
        return Ok(Some(format!(
            "somebody else has set its limit to {limit}, which stays"
        )));
    }
    if limit > at_rest {
        // Ours was lifted above.
        let is_foreign = cgroup.limit("memory.high").map_err(text)? != Limit::Max;
        let has_room = shrink::make_room(cgroup, at_rest, &rest(at_rest), is_foreign);
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
    }
    // Whoever asked last may have died of it while the runtime was at that: then the kernel has it, and the runtime not.
    let is_untold = memory_limit(said).is_some_and(|told| page_floor(told) != at_rest);
    // Also where a policy had it below what it was given.
    if limit != at_rest || is_untold {
        let resources = with_memory(at_rest, said);
        containers
            .update(&original.id, resources)
            .await
            .map_err(text)?;
    }
    Ok(Some(format!("limit {at_rest} as it was")))
}

async fn quota_back(
    containers: &Runtime,
    original: &Original,
    moved: &MovedQuota,
    cgroup: &Cgroup,
    said: &LinuxContainerResources,
) -> Result<Option<String>, String> {
    let at_rest = moved.cpu.at_rest;
    let Some(quota) = cgroup.quota().map_err(text)? else {
        return Ok(None);
    };
    if !moved.is_ours(quota) {
        let cpu = quota.cpu;
        return Ok(Some(format!(
            "somebody else has set its CPU limit to {cpu}, which stays"
        )));
    }
    if quota.cpu != at_rest || moved.told != at_rest {
        // The runtime sends what it remembers of memory too, which may be old: it is told what is in force.
        let memory = match cgroup.limit("memory.max").map_err(text)? {
            Limit::At(limit) => with_memory(limit, said),
            Limit::Max => LinuxContainerResources::default(),
        };
        let resources = with_quota(memory, quota.with(at_rest));
        containers
            .update(&original.id, resources)
            .await
            .map_err(text)?;
    }
    Ok(Some(format!("CPU limit {at_rest} as it was")))
}

/// Lowers a pod's CPU quota to what its containers have that are not at rest; returns whether that is none.
fn lower_pod_quota(
    records: &Records<PodQuota>,
    pod: &PodQuota,
    left: &[Original],
) -> Result<bool, String> {
    let Some(cgroup) = opened(&pod.path)? else {
        return Ok(true);
    };
    let Some(in_force) = cgroup.quota().map_err(text)? else {
        return Ok(true);
    };
    if in_force.period != pod.quota.period {
        return Ok(true);
    }
    let left = left.iter();
    let own = left.filter(|left| left.path.parent() == Some(&pod.path));
    let raised = own.filter_map(|own| {
        let in_force = Cgroup::open(&own.path).ok()?.quota().ok()??;
        Some(own.quota.as_ref()?.cpu.raised_by(in_force.cpu))
    });
    let raised: Vec<Cpu> = raised.collect();
    let step = pod_step(&pod.quota.cpu, in_force.cpu, raised.iter().copied());
    if let PodStep::Lower(to) = step {
        let wanted = in_force.with(to);
        let mut asked = pod.clone();
        asked.quota.cpu.ask(wanted.cpu, in_force.cpu);
        records.write(&asked).map_err(text)?;
        cgroup.set_quota(wanted).map_err(text)?;
    }
    Ok(raised.is_empty())
}

/// Lowers a pod's limit to what its containers have that are not at rest; returns whether that is none.
async fn lower_pod(
    records: &Records<PodOriginal>,
    pod: &PodOriginal,
    left: &[Original],
) -> Result<bool, String> {
    let Some(cgroup) = opened(&pod.path)? else {
        return Ok(true);
    };
    let left = left.iter();
    let own = left.filter(|left| left.path.parent() == Some(&pod.path));
    let raised = own.map(|own| {
        let in_force = Cgroup::open(&own.path)?.limit("memory.max")?;
        let limit = own.limit.as_ref();
        let raised = limit.map_or(Bytes::ZERO, |limit| limit.raised_by(in_force.bytes()));
        Ok::<Bytes, CgroupError>(raised)
    });
    let raised: Vec<Bytes> = raised.collect::<Result<_, _>>().map_err(text)?;
    let Limit::At(in_force) = cgroup.limit("memory.max").map_err(text)? else {
        return Ok(true);
    };
    match pod_step(&pod.limit, in_force, raised.iter().copied()) {
        // Somebody else's stays, and what its containers need too.
        PodStep::Foreign(_) | PodStep::Keep | PodStep::Raise(_) => {}
        PodStep::Lower(to) => {
            if !shrink::make_room_in(&cgroup, to).map_err(text)? {
                return Err(format!(
                    "it uses too much for a limit of {to}: stop what it runs, and try again"
                ));
            }
            let mut asked = pod.clone();
            asked.limit.ask(to, in_force);
            records.write(&asked).map_err(text)?;
            pod_cgroup::set_limit(&cgroup, to).await.map_err(text)?;
        }
    }
    Ok(raised.is_empty())
}

/// The rules of a limit that nobody raises.
fn rest(limit: Bytes) -> Policy {
    Policy {
        original: limit,
        ceiling: limit,
        actuation: Actuation::Direct,
        signals: Signals::Programs,
        patience: Patience::UNPROBED,
        cpus: online_cpus(),
        shrink_after: Nanos(0),
        usable_per_mille: WHOLE,
        by_hand_after: None,
        priority: 0,
        parallelism: bellows_core::elastic::Parallelism::Unchanged,
        learnt: None,
    }
}
