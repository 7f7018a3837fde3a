//! `make-room`: a stateful pod of high priority wants more on a full node, where the kubelet puts it off; the scheduler has
//! pods at hand for whatever becomes free. Room is made by pods of low priority, and given back when the pod gives it up,
//! unless the scheduler was faster.
//!
//! What the same resize takes on a node with room is measured in the same boot, and what one takes on the full node that
//! finds room there: each pod and each racer has its share in the kubelet's and the API server's time.

use std::{
    collections::BTreeMap,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bellows_core::Bytes;
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    reserved::{
        Harm, Reserved, Resting, allotted, has_condition, is_placed, requested, short,
        wait_unschedulable,
    },
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, wait},
    pods::Cluster,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that the pod wants more.
    #[arg(long, default_value_t = 20)]
    n: u64,
    #[command(flatten)]
    server: ApiServer,
}

const GUARDED: &str = "make-room";
/// Pods that fill the node.
const PODS: usize = 6;
/// Pods that wait for a place, and what each requests.
const RACERS: usize = 4;
const RACER: Bytes = Bytes::mib(96);
/// What the pod of high priority has at rest.
const REST: Bytes = Bytes::mib(128);
/// What is free on the full node: no room for a racer.
const SLACK: Bytes = Bytes::mib(32);
/// What a filler keeps by its policy: this, and so much more than it uses, in thousandths (the default).
const FLOOR: Bytes = Bytes::mib(32);
const MARGIN: u64 = 250;
/// Resizes with room that are measured, and of how much on the full node: less than is free there.
const MEASURED: usize = 10;
const FITS: Bytes = Bytes::mib(16);
const GRANTED: Duration = Duration::from_secs(60);
/// For how long nothing must change until the race is taken to be over, and the longest that it may take.
const QUIET: Duration = Duration::from_secs(4);
const RACE: Duration = Duration::from_secs(60);
const BACK: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// A filler while room was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Filler {
    pod: String,
    /// What it had, and what was left to it.
    before: Bytes,
    after: Bytes,
    /// What it could have spared by its policy: what it had less what it used with a quarter more, or the floor.
    spare: Bytes,
}

/// What became of one filler's request after the race.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Debt {
    pod: String,
    owed: Bytes,
    /// Whether `bellows explain` tells it.
    explained: bool,
}

/// What the API says of a pod that has changed while somebody waited for room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    requested: Bytes,
    allotted: Bytes,
    short: Option<Bytes>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Step {
    ms: u64,
    pod: String,
    now: Seen,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    /// What is wanted, beyond what it has at rest.
    more: Bytes,
    /// What resizes by as much took with room, of this boot.
    api_ms: Vec<u64>,
    /// What a resize took on the full node that found room there.
    api_full_ms: Vec<u64>,
    /// By how much it was short, in the kubelet's words when it put it off; `None` if it did not.
    short: Option<Bytes>,
    granted: bool,
    granted_ms: u64,
    /// What happened meanwhile.
    steps: Vec<Step>,
    fillers: Vec<Filler>,
    /// Racers that had a place while it was lent, and after it was given up.
    raced_while_lent: usize,
    raced: usize,
    /// Racers that the kubelet refused, for it had given their place to others.
    refused: usize,
    debts: Vec<Debt>,
    /// Whether all was back when the racers were gone.
    given_back: bool,
    harm: Harm,
}

/// Follows what the API says of pods.
struct Steps {
    begun: Instant,
    last: BTreeMap<String, Seen>,
    steps: Vec<Step>,
}

impl Steps {
    fn new(pods: &[Pod]) -> Self {
        let begun = Instant::now();
        let mut steps = Self {
            begun,
            last: BTreeMap::new(),
            steps: Vec::new(),
        };
        steps.take(pods);
        steps.steps.clear();
        steps
    }

    fn take(&mut self, pods: &[Pod]) {
        for pod in pods {
            let now = Seen {
                requested: requested(pod),
                allotted: allotted(pod),
                short: short(pod),
            };
            let before = self.last.insert(pod.name_any(), now.clone());
            if before.as_ref() != Some(&now) {
                self.steps.push(Step {
                    ms: u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
                    pod: pod.name_any(),
                    now,
                });
            }
        }
    }
}

struct Bed {
    cluster: Cluster,
    db: Resting,
    fillers: Reserved,
    resting: Vec<Resting>,
    racers: Reserved,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    for (name, value) in [("high", 1000), ("low", 100)] {
        cluster.apply(json!({
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": { "name": name },
            "value": value,
        }))?;
    }
    cluster.guard_labelled(
        GUARDED,
        &json!({ "memory": { "max": "4Gi", "requests": { "makeRoom": true, "floor": "32Mi" } } }),
    )?;
    let mut agent = Agent::start()?;
    let db = Reserved {
        app: "db",
        replicas: 1,
        request: REST,
        uses: Bytes::mib(32),
        priority: Some("high"),
        guard: None,
        is_stateful: true,
    };
    let db = db.start(&cluster)?.remove(0);
    let mut api_ms = Vec::new();
    for index in 0..MEASURED {
        api_ms.push(with_room(&cluster, &db.name, wanted(index as u64))?);
    }
    let bed = fill(cluster, db)?;
    let mut api_full_ms = Vec::new();
    for _ in 0..MEASURED {
        api_full_ms.push(with_room(&bed.cluster, &bed.db.name, FITS)?);
    }
    for index in 0..options.n {
        node.check()?;
        agent.check()?;
        let mut record = bed.observe(index)?;
        (record.api_ms, record.api_full_ms) = (api_ms.clone(), api_full_ms.clone());
        eprintln!(
            "case {index}: {} more granted {} after {} ms (short of {:?}; api {:?}); {} lent by {} of {} at least; raced {} and {}, {} refused; debts {:?}; back {}; {:?}",
            record.more,
            record.granted,
            record.granted_ms,
            record.short,
            record.api_ms.iter().min(),
            record.lent(),
            record.lenders(),
            record.fewest(),
            record.raced_while_lent,
            record.raced,
            record.refused,
            record.debts,
            record.given_back,
            record.harm,
        );
        records.write(&record)?;
        // Else nothing is measured, neither by this case nor by those after it.
        ensure!(
            record.short.is_some(),
            "case {index}: the kubelet did not put it off"
        );
        ensure!(record.given_back, "case {index}: not all is given back");
    }
    Ok(())
}

impl Record {
    /// How long after the kubelet's word was seen the first lender's request was seen to be lower.
    fn ours(&self) -> Option<u64> {
        let put_off = self.steps.iter().find(|step| step.now.short.is_some())?;
        let is_lender = |step: &&Step| {
            let lent = self.fillers.iter().find(|filler| filler.pod == step.pod);
            lent.is_some_and(|filler| step.now.requested < filler.before)
        };
        let lent = self.steps.iter().find(is_lender)?;
        Some(lent.ms.saturating_sub(put_off.ms))
    }

    fn lenders(&self) -> usize {
        let lenders = self.fillers.iter();
        lenders
            .filter(|filler| filler.after < filler.before)
            .count()
    }

    fn lent(&self) -> Bytes {
        let lent = self.fillers.iter();
        lent.fold(Bytes::ZERO, |sum, filler| {
            sum.plus(filler.before.minus(filler.after))
        })
    }

    /// As few as could have given what was short.
    fn fewest(&self) -> usize {
        let mut spares: Vec<Bytes> = self.fillers.iter().map(|filler| filler.spare).collect();
        spares.sort_unstable_by(|a, b| b.cmp(a));
        let short = self.short.unwrap_or_default();
        let mut sum = Bytes::ZERO;
        let needed = spares.into_iter().take_while(|spare| {
            let is_needed = sum < short;
            sum = sum.plus(*spare);
            is_needed
        });
        needed.count()
    }
}

/// From one filler to several.
const fn wanted(index: u64) -> Bytes {
    Bytes::mib(128 + index * 7 % 10 * 64)
}

/// Fills the node, and has racers wait.
fn fill(cluster: Cluster, db: Resting) -> Result<Bed> {
    let room = cluster.allocatable()?.minus(REST).minus(SLACK);
    let request = Bytes(((room.0 / PODS as u64) >> 20) << 20);
    let fillers = Reserved {
        app: "filler",
        replicas: PODS,
        request,
        uses: request.per_mille(100),
        priority: Some("low"),
        guard: Some(GUARDED),
        is_stateful: false,
    };
    let resting = fillers.start(&cluster)?;
    let racers = Reserved {
        app: "racer",
        replicas: RACERS,
        request: RACER,
        uses: Bytes::mib(8),
        priority: Some("low"),
        guard: None,
        is_stateful: false,
    };
    racers.scale(&cluster, RACERS)?;
    wait_unschedulable(&cluster, racers.app, RACERS)?;
    Ok(Bed {
        cluster,
        db,
        fillers,
        resting,
        racers,
    })
}

/// How long a resize takes where there is room for it.
fn with_room(cluster: &Cluster, name: &str, more: Bytes) -> Result<u64> {
    let to = REST.plus(more);
    let begun = Instant::now();
    cluster.request(name, to)?;
    let (is_granted, short) = until_granted(cluster, name, to, |_| Ok(()))?;
    let took = begun.elapsed();
    ensure!(is_granted && short.is_none(), "there is room for {to}");
    cluster.request(name, REST)?;
    ensure!(
        until_granted(cluster, name, REST, |_| Ok(()))?.0,
        "it comes down"
    );
    Ok(u64::try_from(took.as_millis())?)
}

/// Waits until the kubelet has carried out a resize; returns whether it has, and by how much it was short when it was first
/// put off, if it was.
fn until_granted(
    cluster: &Cluster,
    name: &str,
    to: Bytes,
    mut look: impl FnMut(&Pod) -> Result<()>,
) -> Result<(bool, Option<Bytes>)> {
    let begun = Instant::now();
    let mut was_short = None;
    while begun.elapsed() < GRANTED {
        let pod = cluster.get(name)?;
        look(&pod)?;
        let is_pending = has_condition(&pod, "PodResizePending", "True");
        was_short = was_short.or_else(|| short(&pod));
        let is_under_way = is_pending || has_condition(&pod, "PodResizeInProgress", "True");
        if allotted(&pod) == to && !is_under_way {
            return Ok((true, was_short));
        }
        thread::sleep(POLL);
    }
    Ok((false, was_short))
}

impl Bed {
    fn observe(&self, index: u64) -> Result<Record> {
        let more = wanted(index);
        let before = self.fillers()?;
        let of_fillers = || self.cluster.of_app(self.fillers.app);
        let mut steps = Steps::new(&of_fillers()?);
        let begun = Instant::now();
        self.cluster.request(&self.db.name, REST.plus(more))?;
        let look = |own: &Pod| {
            steps.take(std::slice::from_ref(own));
            steps.take(&of_fillers()?);
            Ok(())
        };
        let (granted, short) = until_granted(&self.cluster, &self.db.name, REST.plus(more), look)?;
        let granted_ms = u64::try_from(begun.elapsed().as_millis())?;
        // What is lent is not free: the scheduler has had its chance by then.
        thread::sleep(QUIET);
        let after = self.fillers()?;
        let after = |pod: &String| after.iter().find(|filler| filler.pod == *pod);
        let fillers = before.into_iter().map(|filler| Filler {
            after: after(&filler.pod).map_or(filler.after, |after| after.after),
            ..filler
        });
        let fillers = fillers.collect();
        let raced_while_lent = self.placed()?;
        self.cluster.request(&self.db.name, REST)?;
        self.race()?;
        let debts = self.missing()?.into_iter();
        let debts = debts.filter_map(|(pod, owed)| self.debt(pod, owed).transpose());
        let debts: Vec<Debt> = debts.collect::<Result<_>>()?;
        let raced = self.placed()?;
        let refused = self.refused()?;
        self.racers.end(&self.cluster)?;
        let given_back = wait("all is given back", BACK, || Ok(self.missing()?.is_empty()));
        let harmed: Vec<Resting> = self.resting.iter().chain([&self.db]).cloned().collect();
        let harm = Harm::to(&self.cluster, &harmed)?;
        if given_back.is_ok() {
            self.racers.scale(&self.cluster, RACERS)?;
            wait_unschedulable(&self.cluster, self.racers.app, RACERS)?;
        }
        Ok(Record {
            index,
            more,
            api_ms: Vec::new(),
            api_full_ms: Vec::new(),
            short,
            granted,
            granted_ms,
            steps: steps.steps,
            fillers,
            raced_while_lent,
            raced,
            refused,
            debts,
            given_back: given_back.is_ok(),
            harm,
        })
    }

    /// What each filler has and could spare.
    fn fillers(&self) -> Result<Vec<Filler>> {
        let fillers = self.resting.iter().map(|own| {
            let pod = self.cluster.get(&own.name)?;
            // What the spec says and the kubelet does not carry out is not there.
            let has = requested(&pod).min(allotted(&pod));
            let used = own.working_set()?;
            let keeps = used.plus(used.per_mille(MARGIN)).max(FLOOR);
            Ok(Filler {
                pod: own.name.clone(),
                before: has,
                after: has,
                spare: has.minus(keeps),
            })
        });
        fillers.collect()
    }

    /// What each filler lacks, whoever lacks something.
    fn missing(&self) -> Result<Vec<(String, Bytes)>> {
        let fillers = self.fillers()?.into_iter();
        let missing = fillers.map(|own| (own.pod, self.fillers.request.minus(own.after)));
        Ok(missing
            .filter(|(_, missing)| *missing > Bytes::ZERO)
            .collect())
    }

    /// What a pod is owed, and whether that is told. Between the look and the words it may have got a part of it, and is looked
    /// at anew, or all: `None`.
    fn debt(&self, pod: String, owed: Bytes) -> Result<Option<Debt>> {
        let (begun, mut owed) = (Instant::now(), owed);
        loop {
            let explained = is_explained(&pod, owed)?;
            let missing = self.missing()?.into_iter().find(|(own, _)| *own == pod);
            let Some((_, now)) = missing else {
                return Ok(None);
            };
            if explained || now == owed || begun.elapsed() > QUIET {
                return Ok(Some(Debt {
                    pod,
                    owed,
                    explained,
                }));
            }
            owed = now;
        }
    }

    fn placed(&self) -> Result<usize> {
        let racers = self.cluster.of_app(self.racers.app)?;
        let placed = racers
            .iter()
            .filter(|pod| is_placed(pod) && !has_failed(pod));
        Ok(placed.count())
    }

    fn refused(&self) -> Result<usize> {
        let racers = self.cluster.of_app(self.racers.app)?;
        Ok(racers.iter().filter(|pod| has_failed(pod)).count())
    }

    /// Waits until what was given up is somebody's.
    fn race(&self) -> Result<()> {
        let begun = Instant::now();
        let (mut last, mut since) = (None, Instant::now());
        while begun.elapsed() < RACE && since.elapsed() < QUIET {
            let seen = Some((self.missing()?, self.placed()?));
            if seen != last {
                (last, since) = (seen, Instant::now());
            }
            thread::sleep(POLL * 10);
        }
        Ok(())
    }
}

fn has_failed(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.and_then(|status| status.phase.as_deref()) == Some("Failed")
}

/// Whether the last that is told of a debt of a pod is this one.
fn is_explained(pod: &str, owed: Bytes) -> Result<bool> {
    let told = Command::new("bellows")
        .args(["explain", &format!("default/{pod}")])
        .output()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let last = told.lines().rfind(|line| line.contains("owed"));
    let is_it = last.is_some_and(|line| line.contains(&format!("owed {owed}:")));
    if !is_it {
        eprintln!("bellows: {pod} lacks {owed}: {told}");
    }
    Ok(is_it)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let debts = || records.iter().flat_map(|record| &record.debts);
    let of = |value: &dyn Fn(&Record) -> u64| -> u64 { records.iter().map(value).sum() };
    let beyond = |is: &dyn Fn(&Record) -> bool| records.iter().filter(|record| is(record)).count();
    for record in &records {
        ensure!(record.short.is_some(), "there was room for it: {record:?}");
    }
    let granted = records.iter().filter(|record| record.granted);
    let granted: Vec<f64> = granted.map(|record| record.granted_ms as f64).collect();
    let median = |of: fn(&Record) -> &Vec<u64>| -> Result<f64> {
        let times = records.first().map(|record| of(record).iter());
        let times: Vec<f64> = times.into_iter().flatten().map(|ms| *ms as f64).collect();
        let median = percentile(&times, 50.0);
        ensure!(median > 0.0, "nothing to compare with");
        Ok(median)
    };
    let api_p50 = median(|record| &record.api_ms)?;
    let api_full_p50 = median(|record| &record.api_full_ms)?;
    // From the kubelet's word in the API to what is asked of the first who lends.
    let ours: Vec<f64> = records
        .iter()
        .filter_map(Record::ours)
        .map(|ms| ms as f64)
        .collect();
    let harm = records.iter().map(|record| record.harm);
    Ok(json!({
        "n": records.len(),
        "deferred": of(&|record| u64::from(record.short.is_some())),
        "granted": granted.len(),
        "granted_ms_p50": percentile(&granted, 50.0),
        "api_ms_p50": api_p50,
        "granted_vs_api_p50": rounded(percentile(&granted, 50.0) / api_p50),
        "granted_vs_api_full_p50": rounded(percentile(&granted, 50.0) / api_full_p50),
        "api_full_ms_p50": api_full_p50,
        "own_ms_p50": percentile(&ours, 50.0),
        "own_ms_max": percentile(&ours, 100.0),
        "granted_vs_api_max": rounded(percentile(&granted, 100.0) / api_p50),
        "lent_beyond_short": beyond(&|record| Some(record.lent()) > record.short),
        "lent_by_more_than_needed": beyond(&|record| record.lenders() > record.fewest()),
        "raced_while_lent": of(&|record| record.raced_while_lent as u64),
        "raced": of(&|record| record.raced as u64),
        "racers_refused": of(&|record| record.refused as u64),
        // Counters of pods that live throughout.
        "kills": harm.clone().map(|harm| harm.kills).max(),
        "restarts": harm.map(|harm| harm.restarts).max(),
        "debts": debts().count(),
        "debts_explained": debts().filter(|debt| debt.explained).count(),
        "given_back": of(&|record| u64::from(record.given_back)),
    }))
}
