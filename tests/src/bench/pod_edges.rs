//! `pod-edges`: what `bellows run` promises at its edges, one record a promise: pods that cannot be
//! guarded are told why in an Event, and a change by somebody else becomes the new original.

use std::{
    fs::{self, File},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, pod, quantity};
use clap::Args;
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    exec_cli::Record,
    gate, heaps,
    pod_bursts::{is_guarded_since, ledger_of, results},
    record::Records,
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, log_tail, log_text, wait},
    pods::{Cluster, Spec},
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
        "jobs that need more than their pod may have wait for each other",
        |bed| jobs_wait(&bed.cluster),
    ),
    (
        "a brake that is somebody else's is left alone",
        foreign_brake,
    ),
    (
        "a kill of a pod that is only watched is an Event that says what would have been",
        |bed| watched(&bed.cluster),
    ),
    (
        "a raise goes as far as a namespace's LimitRange allows, and an Event says so",
        |bed| limit_range(&bed.cluster),
    ),
    (
        "a container whose namespace's quota is used up is left alone, and an Event says so",
        |bed| used_up(&bed.cluster),
    ),
    (
        "twenty bursts at once ask for no more than their namespace's quota has",
        |bed| under_one_quota(&bed.cluster),
    ),
    (
        "in a namespace with autoscalers, what they set is left alone, and Events say so",
        |bed| autoscaled(&bed.cluster),
    ),
    (
        "no heap is sized beyond what the limit of its container is raised to",
        |bed| heaps(&bed.cluster),
    ),
    ("explain names what it does not know", |_| explain_unknown()),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    cluster.define_vertical_autoscalers()?;
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
        .chain(["--hold-ms", "3000", "--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    bed.cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        ..spec(name)
    })?;
    let cgroup = bed.cluster.wait_running(name)?;
    gate::open_when_braked(&cgroup)?;
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
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
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
    gate::open_when_braked(&cgroup)?;
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
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
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
    gate::wait_braked(&pod)?;
    gate::open(&container)?;
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
    for cgroup in cgroups.iter().flatten() {
        gate::wait_braked(cgroup)?;
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

/// Six jobs that need twice the maximum: without elastic parallelism some are killed, with it all end.
fn jobs_wait(cluster: &Cluster) -> Result<()> {
    let max = "128Mi";
    let begin = "/run/begin-jobs";
    let script = format!(
        "until [ -e {begin} ]; do sleep 0.1; done; for n in 1 2 3 4 5 6; do bellows-guest load job 40Mi 600 & all=\"$all $!\"; done; \
         code=0; for one in $all; do wait $one || code=1; done; echo \"{{\\\"code\\\":$code}}\"; sleep 300"
    );
    let command = [
        "/bellows-guest",
        "load",
        "chroot",
        "/host",
        "sh",
        "-c",
        &script,
    ];
    let code_of = |name: &str, parallelism: &str| -> Result<(i64, u64)> {
        let spec = Spec {
            command: command.map(str::to_owned).to_vec(),
            host: true,
            ..spec(name)
        };
        let annotations = json!({
            pod::MODE: "Act", pod::MAX_MEMORY: max, pod::PARALLELISM: parallelism
        });
        drop(fs::remove_file(begin));
        cluster.create_with(&spec, &annotations, false)?;
        let cgroup = cluster.wait_running(name)?;
        gate::wait_braked(&cgroup)?;
        File::create(begin)?;
        let mut said = Vec::new();
        let is_over = wait("its jobs have ended", Duration::from_secs(120), || {
            said = cluster.said(name)?;
            Ok(!said.is_empty() || !cluster.is_running(name)?)
        });
        let kills = cgroup.events().map(|events| events.oom_kill);
        let told = ledger_of(cgroup.id());
        cluster.delete(name)?;
        is_over.with_context(|| format!("{told:?}"))?;
        let code = said.first().and_then(|said| said["code"].as_i64());
        Ok((code.unwrap_or(-1), kills.unwrap_or(1)))
    };
    let without = code_of("greedy", "Unchanged")?;
    ensure!(without.1 > 0, "nothing was killed without it: {without:?}");
    let with = code_of("patient", "Elastic")?;
    ensure!(with == (0, 0), "exit code and kills: {with:?}");
    Ok(())
}

/// One policy for three pods, of which two are never raised to its maximum.
fn heaps(cluster: &Cluster) -> Result<()> {
    let label = "heaps";
    let max = Bytes::mib(1024);
    let rules = json!({ "memory": { "max": quantity::format(max), "heap": "Maximum" } });
    cluster.guard_labelled(label, &rules)?;
    wait("the agent is a plugin of the runtime", LONG, || {
        Ok(log_text("bellows").contains(heaps::CONNECTED))
    })?;
    let told = |name: &str, annotations: Value, is_guaranteed: bool| -> Result<String> {
        let metadata = json!({ "labels": { "guard": label }, "annotations": annotations });
        cluster.create_as(&spec(name), &metadata, is_guaranteed)?;
        let processes = cluster.wait_running(name)?.processes()?;
        let process = processes.first().context("nobody runs in it")?;
        let environment = fs::read_to_string(format!("/proc/{process}/environ"))?;
        cluster.delete(name)?;
        let mut variables = environment.split('\0');
        let heap = variables.find_map(|one| one.strip_prefix("JAVA_TOOL_OPTIONS="));
        Ok(heap.unwrap_or_default().to_owned())
    };
    let own = spec(label).limit;
    let annotated = Bytes::mib(512);
    let found = [
        told("raised", json!({}), false)?,
        told("guaranteed", json!({}), true)?,
        told(
            "annotated",
            json!({ pod::MODE: "Act", pod::MAX_MEMORY: quantity::format(annotated) }),
            false,
        )?,
    ];
    cluster.remove("bellows.dev/v1alpha1", "ElasticPolicy", label)?;
    let wanted = [max, own, annotated].map(|most| format!("-XX:MaxRAM={}", most.0));
    ensure!(found == wanted, "{found:?} in place of {wanted:?}");
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
    let died = now();
    without_agent(bed, |_| Ok(()))?;
    wait("the next agent guards it", LONG, || {
        Ok(is_guarded_since(&cgroup, died))
    })?;
    // What it may do to the brake.
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

/// The raises that a container was granted, and what failed.
fn raises(cgroup: &Cgroup) -> (Vec<Bytes>, Vec<String>) {
    let (mut granted, mut failed) = (Vec::new(), Vec::new());
    for record in ledger_of(cgroup.id()) {
        match record {
            LedgerRecord::Intend {
                action: Action::Raise { to, .. } | Action::RaiseByHand { to, .. },
                ..
            } => granted.push(to),
            LedgerRecord::Verify {
                error: Some(error), ..
            } => failed.push(error),
            _ => {}
        }
    }
    (granted, failed)
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

/// Raised before the API is asked, and no further.
fn limit_range(cluster: &Cluster) -> Result<()> {
    let (name, most) = ("ranged", Bytes::mib(160));
    cluster.apply(json!({
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": { "name": "edges", "namespace": "default" },
        "spec": { "limits": [{ "type": "Container", "max": { "memory": "160Mi" } }] },
    }))?;
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(120), 2))
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        raise_first: true,
        ..spec(name)
    })?;
    let cgroup = cluster.wait_running(name)?;
    gate::open_when_braked(&cgroup)?;
    let is_over = wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    });
    let told = is_told(cluster, name, "LimitRangeReached", "`edges`");
    let (granted, failed) = raises(&cgroup);
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    cluster.remove("v1", "LimitRange", "edges")?;
    is_over.with_context(|| format!("it is {phase}: {granted:?} {failed:?}"))?;
    told?;
    ensure!(
        phase == "Running" && failed.is_empty() && granted.iter().max() == Some(&most),
        "it is {phase}: {granted:?} {failed:?}"
    );
    Ok(())
}

/// A quota of limits, with what of it is used: nobody counts it here but the API server, with each pod.
fn quota(cluster: &Cluster, hard: Bytes) -> Result<()> {
    let hard = json!({ "limits.memory": quantity::format(hard) });
    cluster.apply(json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": { "name": "edges", "namespace": "default" },
        "spec": { "hard": hard },
    }))?;
    cluster.say_used(
        "edges",
        &json!({ "hard": hard, "used": { "limits.memory": "0" } }),
    )
}

fn used_up(cluster: &Cluster) -> Result<()> {
    let name = "used-up";
    // As much as the pod has.
    quota(cluster, Bytes::mib(64))?;
    let cgroup = guarded(cluster, name)?;
    let told = is_told(cluster, name, "QuotaUsedUp", "`edges`");
    let left_alone = wait("it is left alone", Duration::from_secs(30), || {
        Ok(cgroup.limit("memory.high")? == Limit::Max)
    });
    // More room, and it is guarded as ever.
    let again = quota(cluster, Bytes::mib(1024)).and_then(|()| braked_below(&cgroup, 64));
    cluster.delete(name)?;
    cluster.remove("v1", "ResourceQuota", "edges")?;
    told?;
    left_alone?;
    again
}

/// Each wants more than there is for all. The API server never has to refuse.
fn under_one_quota(cluster: &Cluster) -> Result<()> {
    const PODS: usize = 20;
    const START: &str = "/run/start-quota";
    drop(fs::remove_file(START));
    let hard = Bytes::mib(20 * 64 + 500);
    quota(cluster, hard)?;
    let names: Vec<String> = (0..PODS).map(|index| format!("quota-{index}")).collect();
    for name in &names {
        let command = ["/bellows-guest".to_owned(), "load".to_owned()]
            .into_iter()
            .chain(burst_words(Bytes::mib(16), Bytes::mib(90), 1))
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
    let mut cgroups = Vec::new();
    for name in &names {
        cgroups.push(cluster.wait_running(name)?);
    }
    for name in &names {
        original(cluster, name, "load=64Mi")?;
    }
    for cgroup in &cgroups {
        gate::wait_braked(cgroup)?;
    }
    File::create(START)?;
    let (mut most, begun) = (Bytes::ZERO, Instant::now());
    while begun.elapsed() < Duration::from_secs(40) {
        let limits = cgroups.iter().map(|cgroup| {
            // One that was killed has none any more.
            let limit = cgroup.limit("memory.max").unwrap_or(Limit::Max);
            if limit == Limit::Max {
                Bytes::mib(64)
            } else {
                limit.bytes()
            }
        });
        most = most.max(limits.fold(Bytes::ZERO, Bytes::plus));
        thread::sleep(Duration::from_millis(20));
    }
    let all: Vec<(Vec<Bytes>, Vec<String>)> = cgroups.iter().map(raises).collect();
    let raised = all
        .iter()
        .filter(|(granted, _)| !granted.is_empty())
        .count();
    let failed: Vec<&String> = all.iter().flat_map(|(_, failed)| failed).collect();
    eprintln!("{raised} of {PODS} were raised, to {most} together of {hard}; failed: {failed:?}");
    for name in &names {
        cluster.delete(name)?;
    }
    cluster.remove("v1", "ResourceQuota", "edges")?;
    ensure!(failed.is_empty(), "{failed:?}");
    ensure!(
        raised > 0 && most > Bytes::mib(20 * 64) && most <= hard,
        "{raised} to {most}"
    );
    Ok(())
}

fn autoscaled(cluster: &Cluster) -> Result<()> {
    let (name, owner) = ("autoscaled", "edges");
    let target = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": owner });
    let vertical = |mode: &str| {
        json!({
            "apiVersion": "autoscaling.k8s.io/v1",
            "kind": "VerticalPodAutoscaler",
            "metadata": { "name": "vertical", "namespace": "default" },
            "spec": { "targetRef": target, "updatePolicy": { "updateMode": mode } },
        })
    };
    cluster.apply(vertical("InPlaceOrRecreate"))?;
    let owners = json!([{
        "apiVersion": "apps/v1", "kind": "StatefulSet", "name": owner, "controller": true,
        "uid": "00000000-0000-0000-0000-000000000001",
    }]);
    let annotations = json!({ pod::MODE: "Act", pod::MAX_MEMORY: "512Mi" });
    let metadata = json!({ "annotations": annotations, "ownerReferences": owners });
    cluster.create_as(&spec(name), &metadata, false)?;
    let cgroup = cluster.wait_running(name)?;
    let told = is_told(cluster, name, "VerticalPodAutoscalerInCharge", "`vertical`");
    let high = cgroup.limit("memory.high")?;
    // It only recommends from now on.
    cluster.apply(vertical("Off"))?;
    let guarded = braked_below(&cgroup, 64);
    let resource =
        json!({ "name": "memory", "target": { "type": "Utilization", "averageUtilization": 80 } });
    cluster.apply(json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": "horizontal", "namespace": "default" },
        "spec": {
            "scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 3,
            "metrics": [{ "type": "Resource", "resource": resource }],
        },
    }))?;
    let seen = is_told(cluster, name, "HorizontalPodAutoscalerSeen", "`horizontal`");
    let still = braked_below(&cgroup, 64);
    cluster.delete(name)?;
    cluster.remove("autoscaling/v2", "HorizontalPodAutoscaler", "horizontal")?;
    cluster.remove("autoscaling.k8s.io/v1", "VerticalPodAutoscaler", "vertical")?;
    told?;
    ensure!(high == Limit::Max, "it is braked at {high:?}");
    guarded?;
    seen?;
    still
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
