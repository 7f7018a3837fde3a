//! `pod-edges`: what `bellows run` promises at its edges, one record a promise: pods that cannot be
//! guarded are told why in an Event, and a change by somebody else becomes the new original.

use std::{
    fs::{self, File},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, pod};
use clap::Args;
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    exec_cli::Record,
    pod_bursts::{ledger_of, results},
    record::Records,
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, log_tail, wait},
    pods::{Cluster, Spec},
};

/// What a failure tells of the agent's log.
const LOG_LINES: usize = 60;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ApiServer,
}

/// The cluster, and the agent under test.
struct Bed {
    cluster: Cluster,
    agent: Agent,
}

type Case = (&'static str, fn(&mut Bed) -> Result<()>);

const CASES: [Case; 14] = [
    (
        "a size that does not parse is an Event that names it",
        |bed| {
            refused(
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
            refused(
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
        refused(
            &bed.cluster,
            "maximum",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "8Mi" }),
            false,
            "InvalidAnnotation",
            "8 MiB",
        )
    }),
    ("a Guaranteed pod is refused with an Event", |bed| {
        refused(
            &bed.cluster,
            "guaranteed",
            &json!({ pod::MODE: "Act", pod::MAX_MEMORY: "4Gi" }),
            true,
            "GuaranteedNotSupported",
            "QoS",
        )
    }),
    ("somebody else's change becomes the new original", |bed| {
        foreign_change(&bed.cluster)
    }),
    (
        "somebody else's change while no agent runs becomes the new original",
        foreign_change_unseen,
    ),
    (
        "what a dead agent has raised is restored by the next",
        raised_by_a_predecessor,
    ),
    (
        "a container whose probe forbids the freezer is braked",
        |bed| braked_for_its_probe(&bed.cluster),
    ),
    (
        "a brake that somebody else has lifted is set again",
        |bed| brake_is_set_again(&bed.cluster),
    ),
    (
        "a limit at the pod's own level is raised and restored",
        |bed| whole_pod(&bed.cluster),
    ),
    ("containers that burst at once are all served", |bed| {
        at_once(&bed.cluster)
    }),
    (
        "a brake that is somebody else's is left alone",
        foreign_brake,
    ),
    (
        "a kill of a pod that is only watched is an Event that says what would have been",
        |bed| watched(&bed.cluster),
    ),
    ("explain names what it does not know", |_| explain_unknown()),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let mut bed = Bed {
        cluster,
        agent: Agent::start()?,
    };
    for (case, check) in CASES {
        let failure = check(&mut bed).err().map(|error| {
            format!(
                "{error:#}; the agent's log ends:\n{}",
                log_tail("bellows", LOG_LINES)
            )
        });
        eprintln!("case {case}: {}", failure.as_deref().unwrap_or("ok"));
        records.write(&Record {
            case: case.to_owned(),
            failure,
        })?;
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

fn watched(cluster: &Cluster) -> Result<()> {
    let (name, limit) = ("watched", Bytes::mib(64));
    let mut command = spec(name).command;
    command.truncate(2);
    command.extend(burst_words(limit.per_mille(500), Bytes::mib(256), 2));
    command.extend(["--rest-ms", "8000"].map(str::to_owned));
    let spec = Spec {
        command,
        ..spec(name)
    };
    let annotations = json!({ pod::MODE: "Observe", pod::MAX_MEMORY: "1Gi" });
    cluster.create_with(&spec, &annotations, false)?;
    let cgroup = cluster.wait_running(name)?;
    while cgroup.populated().unwrap_or(false) {
        if let (Ok(limit), Ok(high)) = (cgroup.limit("memory.max"), cgroup.limit("memory.high")) {
            ensure!(
                limit == Limit::At(spec.limit) && high == Limit::Max,
                "it was acted upon: {limit:?}, {high:?}"
            );
        }
        thread::sleep(Duration::from_millis(10));
    }
    let mut last = Vec::new();
    let told = wait("its kill is an Event", Duration::from_secs(30), || {
        last = cluster.events(name)?;
        Ok(last.iter().any(|(reason, note)| {
            reason == "OOMKillObserved" && note.contains("it would have lived")
        }))
    });
    cluster.delete(name)?;
    told.with_context(|| format!("{last:?}"))
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

fn foreign_change(cluster: &Cluster) -> Result<()> {
    let name = "foreign";
    let cgroup = guarded(cluster, name)?;
    original(cluster, name, "load=64Mi")?;
    cluster.resize(name, "96Mi")?;
    original(cluster, name, "load=96Mi")?;
    braked_below(&cgroup, 96)?;
    cluster.delete(name)
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

/// Without an agent for as long as `meanwhile` takes.
fn without_agent(bed: &mut Bed, meanwhile: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    bed.agent.kill_all()?;
    let result = meanwhile(&bed.cluster);
    bed.agent.start_again()?;
    result
}

fn foreign_change_unseen(bed: &mut Bed) -> Result<()> {
    let name = "unseen";
    let cgroup = guarded(&bed.cluster, name)?;
    original(&bed.cluster, name, "load=64Mi")?;
    without_agent(bed, |cluster| cluster.resize(name, "80Mi"))?;
    original(&bed.cluster, name, "load=80Mi")?;
    braked_below(&cgroup, 80)?;
    bed.cluster.delete(name)
}

/// The limit of a pod that an agent has raised is nobody's wish: the next agent lowers it.
fn raised_by_a_predecessor(bed: &mut Bed) -> Result<()> {
    let name = "inherited";
    let burst = burst_words(Bytes::mib(32), Bytes::mib(200), 1);
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst)
        .chain(
            [
                "--rest-ms",
                "4000",
                "--hold-ms",
                "3000",
                "--after-ms",
                "60000",
            ]
            .map(str::to_owned),
        )
        .collect();
    bed.cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        ..spec(name)
    })?;
    let cgroup = bed.cluster.wait_running(name)?;
    let limit_becomes = |what: &str, is_met: &dyn Fn(Bytes) -> bool| {
        wait(what, Duration::from_secs(60), || {
            Ok(is_met(cgroup.limit("memory.max")?.bytes()))
        })
    };
    limit_becomes("the limit is raised", &|limit| limit >= Bytes::mib(200))?;
    without_agent(bed, |_| Ok(()))?;
    limit_becomes("the limit is the original again", &|limit| {
        limit == Bytes::mib(64)
    })?;
    original(&bed.cluster, name, "load=64Mi")?;
    bed.cluster.delete(name)
}

/// An exec probe that may not fail once leaves only the brake, which must do.
fn braked_for_its_probe(cluster: &Cluster) -> Result<()> {
    let name = "probed";
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(200), 2))
        .chain(["--rest-ms", "6000", "--after-ms", "60000"].map(str::to_owned))
        .collect();
    let probe = json!({
        "exec": { "command": ["/bellows-guest", "load", "touch", "4096"] },
        "initialDelaySeconds": 2,
        "periodSeconds": 2,
        "timeoutSeconds": 5,
        "failureThreshold": 1,
    });
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        liveness: Some(probe),
        ..spec(name)
    })?;
    let cgroup = cluster.wait_running(name)?;
    wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    })?;
    let restarts = cluster
        .status(name)?
        .map_or(-1, |status| status.restart_count);
    let records = ledger_of(cgroup.id());
    let did = |wanted: fn(&Action) -> bool| {
        records
            .iter()
            .any(|record| matches!(record, LedgerRecord::Intend { action, .. } if wanted(action)))
    };
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    ensure!(
        phase == "Running" && restarts == 0,
        "it is {phase} after {restarts} restarts: {records:?}"
    );
    ensure!(
        did(|action| matches!(action, Action::Raise { .. }))
            && !did(|action| matches!(action, Action::Hold)),
        "{records:?}"
    );
    Ok(())
}

/// The containers of such a pod have no limit of their own; the kubelet gives them the pod's.
fn whole_pod(cluster: &Cluster) -> Result<()> {
    let name = "whole";
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(200), 2))
        .chain(["--rest-ms", "5000", "--after-ms", "60000"].map(str::to_owned))
        .collect();
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        whole_pod: true,
        cpu: None,
        restarts: false,
        raise_first: false,
        ..spec(name)
    })?;
    let container = cluster.wait_running(name)?;
    let path = container
        .path()
        .parent()
        .context("a container is in a pod")?;
    let pod = Cgroup::open(path)?;
    let outcome = wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    })
    .and_then(|()| {
        wait("the limit is restored", Duration::from_secs(60), || {
            let limit = Limit::At(Bytes::mib(64));
            Ok(pod.limit("memory.max")? == limit)
        })
    });
    let records = ledger_of(pod.id());
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    outcome.with_context(|| format!("it is {phase}: {records:?}"))?;
    ensure!(
        phase == "Running" && !records.is_empty(),
        "it is {phase}: {records:?}"
    );
    Ok(())
}

/// One reflex, one controller and one API server serve them all.
fn at_once(cluster: &Cluster) -> Result<()> {
    const PODS: [&str; 4] = ["one", "two", "three", "four"];
    const START: &str = "/run/start";
    drop(fs::remove_file(START));
    for name in PODS {
        let command = ["/bellows-guest".to_owned(), "load".to_owned()]
            .into_iter()
            .chain(burst_words(Bytes::mib(32), Bytes::mib(300), 2))
            .chain(["--after-ms", "60000"].map(str::to_owned))
            .chain(["--rest-until".to_owned(), format!("/host{START}")])
            .collect();
        cluster.create(&Spec {
            max: Some(Bytes::mib(512)),
            command,
            host: true,
            ..spec(name)
        })?;
    }
    let cgroups = PODS.map(|name| cluster.wait_running(name));
    for name in PODS {
        original(cluster, name, "load=64Mi")?;
    }
    File::create(START)?;
    let (mut bursts, mut failures) = (Vec::new(), Vec::new());
    for (name, cgroup) in PODS.iter().zip(cgroups) {
        let cgroup = cgroup?;
        let is_over = wait("the burst is over", Duration::from_secs(60), || {
            Ok(!results(cluster, name)?.is_empty())
        });
        let phase = cluster.phase(name)?;
        if is_over.is_err() || phase != "Running" {
            failures.push(format!("{name} is {phase}: {:?}", ledger_of(cgroup.id())));
        }
        bursts.extend(results(cluster, name)?);
    }
    for name in PODS {
        cluster.delete(name)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    let begins = bursts
        .iter()
        .map(|burst| burst.end_ns - burst.growth_us * 1000);
    let ends = bursts.iter().map(|burst| burst.end_ns);
    ensure!(begins.max() < ends.min(), "not at once: {bursts:?}");
    Ok(())
}

/// As the kubelet's MemoryQoS sets one: it must outlive adoption, the agent's death and its successor.
fn foreign_brake(bed: &mut Bed) -> Result<()> {
    let name = "qos";
    bed.cluster.create(&spec(name))?;
    let cgroup = bed.cluster.wait_running(name)?;
    let theirs = Limit::At(Bytes::mib(48));
    cgroup.set_limit("memory.high", theirs)?;
    let opt_in = json!({ pod::MODE: "Act", pod::MAX_MEMORY: "512Mi" });
    bed.cluster.annotate(name, &opt_in)?;
    original(&bed.cluster, name, "load=64Mi")?;
    without_agent(bed, |_| Ok(()))?;
    thread::sleep(Duration::from_secs(3));
    let high = cgroup.limit("memory.high")?;
    bed.cluster.delete(name)?;
    ensure!(high == theirs, "memory.high has become {high:?}");
    Ok(())
}

fn brake_is_set_again(cluster: &Cluster) -> Result<()> {
    let name = "lifted";
    let cgroup = guarded(cluster, name)?;
    braked_below(&cgroup, 64)?;
    cgroup.set_limit("memory.high", Limit::Max)?;
    braked_below(&cgroup, 64)?;
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
