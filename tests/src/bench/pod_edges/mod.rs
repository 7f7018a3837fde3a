//! `pod-edges`: what `bellows run` promises at its edges, one record a promise: pods that cannot be
//! guarded are told why in an Event, and a change by somebody else becomes the new original.
//!
//! What one case proves is said where it is; here is what they share: the cluster, an agent that lives on from case to case,
//! and how it is seen that a pod is guarded. A case that fails keeps no other from its turn.
//!
//! It must not let a case depend on one before it: each may be run alone (`--case`).

mod bounds;
mod others;
mod served;
mod told;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bellows::cgroup::{Cgroup, Limit};
use bellows_core::{Bytes, pod};
use clap::Args;
use serde_json::json;

use super::{exec_cli::Record, record::Records};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, log_tail},
    pods::{Cluster, Spec, wait},
};

const LONG: Duration = Duration::from_secs(60);
/// What a failure tells of the agent's log.
const LOG_LINES: usize = 60;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ApiServer,
    /// Only cases whose names have this in them.
    #[arg(long)]
    case: Option<String>,
}

/// The cluster, and the agent under test.
struct Bed {
    cluster: Cluster,
    agent: Agent,
}

type Case = (&'static str, fn(&mut Bed) -> Result<()>);

const CASES: [Case; 20] = [
    (
        "a size that does not parse is an Event that names it",
        |bed| {
            told::refused(
                &bed.cluster,
                "size",
                &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "4GB" }),
                false,
                "InvalidAnnotation",
                "`4GB`",
            )
        },
    ),
    (
        "a mode that does not exist is an Event that names it",
        |bed| {
            told::refused(
                &bed.cluster,
                "mode",
                &json!({ pod::MODE: "act", pod::MAX_MEMORY: "4Gi" }),
                false,
                "InvalidAnnotation",
                "`act`",
            )
        },
    ),
    ("a maximum below the limit is an Event", |bed| {
        told::refused(
            &bed.cluster,
            "maximum",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "8Mi" }),
            false,
            "InvalidAnnotation",
            "8 MiB",
        )
    }),
    ("a Guaranteed pod is refused with an Event", |bed| {
        told::refused(
            &bed.cluster,
            "guaranteed",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "4Gi" }),
            true,
            "GuaranteedNotSupported",
            "QoS",
        )
    }),
    ("somebody else's change becomes the new original", |bed| {
        others::foreign_change(&bed.cluster)
    }),
    (
        "somebody else's change while no agent runs becomes the new original",
        others::foreign_change_unseen,
    ),
    (
        "what a dead agent has raised is restored by the next",
        others::raised_by_a_predecessor,
    ),
    (
        "a container whose probe forbids the freezer is braked",
        |bed| served::braked_for_its_probe(&bed.cluster),
    ),
    (
        "a brake that somebody else has lifted is set again",
        |bed| others::brake_is_set_again(&bed.cluster),
    ),
    (
        "a limit at the pod's own level is raised and restored",
        |bed| served::whole_pod(&bed.cluster),
    ),
    ("containers that burst at once are all served", |bed| {
        served::at_once(&bed.cluster)
    }),
    (
        "jobs that need more than their pod may have wait for each other",
        |bed| served::jobs_wait(&bed.cluster),
    ),
    (
        "a brake that is somebody else's is left alone",
        others::foreign_brake,
    ),
    (
        "a kill of a pod that is only watched is an Event that says what would have been",
        |bed| told::watched(&bed.cluster),
    ),
    (
        "a raise goes as far as a namespace's LimitRange allows, and an Event says so",
        |bed| bounds::limit_range(&bed.cluster),
    ),
    (
        "a container whose namespace's quota is used up is left alone, and an Event says so",
        |bed| bounds::used_up(&bed.cluster),
    ),
    (
        "twenty bursts at once ask for no more than their namespace's quota has",
        |bed| bounds::under_one_quota(&bed.cluster),
    ),
    (
        "in a namespace with autoscalers, what they set is left alone, and Events say so",
        |bed| others::autoscaled(&bed.cluster),
    ),
    (
        "no heap is sized beyond what the limit of its container is raised to",
        |bed| bounds::heaps(&bed.cluster),
    ),
    ("explain names what it does not know", |_| {
        told::explain_unknown()
    }),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    cluster.define_vertical_autoscalers()?;
    // Known to the agent from its start, and to whoever clears up after a case.
    cluster.define_policies()?;
    let mut bed = Bed {
        cluster,
        agent: Agent::start()?,
    };
    let is_wanted = |case: &str| {
        let part = options.case.as_deref().unwrap_or_default();
        case.contains(part)
    };
    ensure!(
        CASES.iter().any(|(case, _)| is_wanted(case)),
        "no case has that in its name"
    );
    for (case, check) in CASES {
        if !is_wanted(case) {
            continue;
        }
        let failure = check(&mut bed).err().map(|error| {
            format!(
                "{error:#}; the agent's log ends:\n{}",
                log_tail("bellows", LOG_LINES)
            )
        });
        eprintln!("case {case}: {}", failure.as_deref().unwrap_or("ok"));
        let has_failed = failure.is_some();
        records.write(&Record {
            case: case.to_owned(),
            failure,
        })?;
        if has_failed {
            // The next is not to fail by what this one has left.
            bed.cluster.clear()?;
        }
    }
    Ok(())
}

fn spec(name: &str) -> Spec {
    Spec {
        name: name.to_owned(),
        limit: Bytes::mib(64),
        max: None,
        command: ["/bellows-guest", "load", "pause"]
            .map(str::to_owned)
            .to_vec(),
        host: false,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    }
}

fn guarded(cluster: &Cluster, name: &str) -> Result<Cgroup> {
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        ..spec(name)
    })?;
    cluster.wait_running(name)
}

/// Waits until the pod says that this is its original.
fn original(cluster: &Cluster, name: &str, wanted: &str) -> Result<()> {
    let what = format!("original {wanted}");
    let annotations = || -> Result<_> { Ok(cluster.get(name)?.metadata.annotations) };
    wait(&what, Duration::from_secs(30), || {
        Ok(annotations()?
            .unwrap_or_default()
            .get(pod::ORIGINAL)
            .is_some_and(|value| value == wanted))
    })
    .with_context(|| format!("{:?}", annotations()))
}

fn braked_below(cgroup: &Cgroup, mib: u64) -> Result<()> {
    let limit = Bytes::mib(mib);
    wait(
        &format!("the brake stands under {limit}"),
        Duration::from_secs(30),
        || {
            let high = cgroup.limit("memory.high")?.bytes();
            Ok(cgroup.limit("memory.max")? == Limit::At(limit)
                && high > limit.per_mille(940)
                && high < limit)
        },
    )
    .with_context(|| {
        format!(
            "limit {:?}, brake {:?}",
            cgroup.limit("memory.max"),
            cgroup.limit("memory.high")
        )
    })
}

fn is_told(cluster: &Cluster, name: &str, reason: &str, part: &str) -> Result<()> {
    let mut last = Vec::new();
    let told = wait(
        &format!("an Event {reason}"),
        Duration::from_secs(30),
        || {
            last = cluster.events(name)?;
            let is_it = |(seen, note): &(String, String)| seen == reason && note.contains(part);
            Ok(last.iter().any(is_it))
        },
    );
    told.with_context(|| format!("{last:?}"))
}
