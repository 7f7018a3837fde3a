//! `pod-edges`: what `bellows run` promises at its edges, one record a promise: pods that cannot be
//! guarded are told why in an Event, and a change by somebody else becomes the new original.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use bellows::cgroup::Limit;
use bellows_core::{Bytes, pod};
use clap::Args;
use serde_json::{Value, json};

use super::{exec_cli::Record, record::Records};
use crate::{
    node::{ApiServer, Node, start_agent, wait},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ApiServer,
}

type Case = (&'static str, fn(&Cluster) -> Result<()>);

const CASES: [Case; 6] = [
    (
        "a size that does not parse is an Event that names it",
        |cluster| {
            refused(
                cluster,
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
        |cluster| {
            refused(
                cluster,
                "mode",
                &json!({ pod::MODE: "act", pod::MAX_MEMORY: "4Gi" }),
                false,
                "InvalidAnnotation",
                "`act`",
            )
        },
    ),
    ("a maximum below the limit is an Event", |cluster| {
        refused(
            cluster,
            "maximum",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "8Mi" }),
            false,
            "InvalidAnnotation",
            "8 MiB",
        )
    }),
    ("a Guaranteed pod is refused with an Event", |cluster| {
        refused(
            cluster,
            "guaranteed",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "4Gi" }),
            true,
            "GuaranteedNotSupported",
            "QoS",
        )
    }),
    (
        "somebody else's change becomes the new original",
        foreign_change,
    ),
    ("explain names what it does not know", |_| explain_unknown()),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let mut agent = start_agent()?;
    for (case, check) in CASES {
        let failure = check(&cluster).err().map(|error| format!("{error:#}"));
        eprintln!("case {case}: {}", failure.as_deref().unwrap_or("ok"));
        records.write(&Record {
            case: case.to_owned(),
            failure,
        })?;
    }
    // It ends with the guest anyway.
    drop(agent.kill());
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
    }
}

fn refused(
    cluster: &Cluster,
    name: &str,
    annotations: &Value,
    guaranteed: bool,
    reason: &str,
    part: &str,
) -> Result<()> {
    cluster.create_with(&spec(name), annotations, guaranteed)?;
    let cgroup = cluster.wait_running(name)?;
    let mut last = Vec::new();
    let told = wait(
        &format!("an Event {reason}"),
        Duration::from_secs(30),
        || {
            last = cluster.events(name)?;
            Ok(last
                .iter()
                .any(|(seen, note)| seen == reason && note.contains(part)))
        },
    );
    let limit = cgroup.limit("memory.max")?;
    let high = cgroup.limit("memory.high")?;
    cluster.delete(name)?;
    told.map_err(|error| error.context(format!("{last:?}")))?;
    ensure!(
        limit == Limit::At(Bytes::mib(64)) && high == Limit::Max,
        "it was acted upon: {limit:?}, {high:?}"
    );
    Ok(())
}

fn foreign_change(cluster: &Cluster) -> Result<()> {
    let name = "foreign";
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        ..spec(name)
    })?;
    let cgroup = cluster.wait_running(name)?;
    let original = |wanted: &'static str| {
        wait(
            &format!("original {wanted}"),
            Duration::from_secs(30),
            || {
                let annotations = cluster.get(name)?.metadata.annotations.unwrap_or_default();
                Ok(annotations
                    .get(pod::ORIGINAL)
                    .is_some_and(|value| value == wanted))
            },
        )
    };
    original("load=64Mi")?;
    cluster.resize(name, "96Mi")?;
    original("load=96Mi")?;
    wait(
        "the brake stands under the new limit",
        Duration::from_secs(30),
        || {
            let high = cgroup.limit("memory.high")?.bytes();
            Ok(cgroup.limit("memory.max")? == Limit::At(Bytes::mib(96))
                && high > Bytes::mib(90)
                && high < Bytes::mib(96))
        },
    )?;
    cluster.delete(name)
}

fn explain_unknown() -> Result<()> {
    let output = Command::new("bellows")
        .args(["explain", "default/nobody"])
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && stderr.contains("`default/nobody` was not guarded"),
        "{stderr}"
    );
    Ok(())
}
