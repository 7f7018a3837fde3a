//! Policies from a file: the fields of an `ElasticPolicy` object, one or several in one YAML file.
//!
//! [`EXAMPLE`] has every field.
//!
//! A policy that is half understood is worse than none: it acts on the wrong containers, or lets them grow
//! further than somebody meant. So a file is taken as a whole or not at all, each error names its line and
//! what to write instead, and whoever has a good one already keeps it.

mod boosts;
#[cfg(test)]
mod documents;
mod heap;
mod requests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use bellows_core::{
    Bytes, Cpu, Nanos,
    elastic::{
        ContainerRules, CpuRules, ElasticPolicy, MemoryRules, Mode, Order, Parallelism, Selector,
    },
    quantity,
};
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};
use thiserror::Error;

/// A file, for `bellows check --help`.
pub const EXAMPLE: &str = "\
A policy:
  apiVersion: bellows.dev/v1alpha1
  kind: ElasticPolicy
  metadata:
    name: workspaces
  spec:
    mode: Act              # \"Off\", Observe (the default), Recommend, Act
    selector:
      namespaces: [dev]    # all, if left out
      matchLabels:         # of the pod
        app: workspace
    containers:
    - name: ide            # every container, if left out
      memory:
        max: 4Gi           # never more than this, but for boosts
        floor: 128Mi       # the limit at rest; the container's own, if left out
        shrinkAfter: 5s    # 5s, if left out
        order: PatchFirst  # or, in Kubernetes only, RaiseFirst: raised on the node, and the API asked right after
        parallelism: Elastic # some jobs wait where there is not memory for all; Unchanged, if left out
        heap: Original     # the limit by which JVMs and node size their heaps: the container's own, Maximum (max), or a
                           # size such as 1Gi; the one in force when they start, if left out. Needs NRI (containerd 2)
        requests:            # what its memory request may become, in Kubernetes; left alone, if left out
          rightSize: false   # down to what was used, so that pending pods fit
          makeRoom: true     # down when the resize of a pod of higher priority finds no room, and back later
          floor: 64Mi        # never below this
          margin: 25%        # what it keeps beyond what is used; 25%, if left out
          observe: 1h        # for how long it is watched before rightSize; 1h, if left out
      cpu:
        max: 2             # never more than this, but for boosts; 500m is half a CPU
        throttleTarget: 0% # the share of periods that may be throttled; none, if left out
      boosts:              # what is lent for a time
      # The quotation marks of \"on\" and \"Off\" are for kubectl, which takes both for a truth value without them (YAML 1.1).
      - \"on\": {start: true}
        cpu: 2             # at least this; a JVM that starts counts its CPUs by it
        until:             # whichever comes first
          # It answers there; without a path, takes connections. In Kubernetes: it is ready by its own readinessProbe.
          ready: {port: 8080, path: /healthz}
          idle: 5s         # it has used no more CPU than at rest for so long
          atMost: 2m       # 2m, if left out
      - \"on\": {exec: make, arguments: [all]}
        memory: 2Gi        # never to pods of Kubernetes
        until: {exit: true, atMost: 30m}
";
const API_VERSION: &str = "bellows.dev/v1alpha1";
const KIND: &str = "ElasticPolicy";
/// Quiet time before a raised limit is lowered, where a policy says none.
const SHRINK_AFTER: Nanos = Nanos::millis(5000);
/// The kernel's smallest quota is a millisecond, of periods of 100 ms (`min_cfs_quota_period`, kernel/sched/core.c).
const LEAST_CPU: Cpu = Cpu::millis(10);
/// A limit below this starts no process.
const LEAST: Bytes = Bytes::mib(1);

/// Why a file holds no policies.
#[derive(Debug, Error)]
pub enum PolicyFileError {
    /// It cannot be read.
    #[error("{path}: {source}: name a file that can be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its content is wrong.
    #[error("{path}:{problem}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The first thing that is wrong.
        problem: Box<Problem>,
    },
}

/// What is wrong in a file, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1 on; 0 where there is none.
    pub line: u64,
    /// The column, from 1 on.
    pub column: u64,
    /// What is wrong, and what to write instead.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, what } = self;
        write!(formatter, "{line}:{column}: {what}")
    }
}

/// The policies in a file.
///
/// # Errors
///
/// [`PolicyFileError`]; its text says what to do.
pub fn read(path: &Path) -> Result<Vec<ElasticPolicy>, PolicyFileError> {
    let text = fs::read_to_string(path).map_err(|source| PolicyFileError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    parse(&text).map_err(|problem| PolicyFileError::Wrong {
        path: path.to_owned(),
        problem: Box::new(problem),
    })
}

/// The policies in a text.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn parse(text: &str) -> Result<Vec<ElasticPolicy>, Problem> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(text).map_err(|error| {
        let location = error.location().unwrap_or(Location::UNKNOWN);
        problem(location, explained(&error))
    })?;
    let mut names = BTreeSet::new();
    documents
        .into_iter()
        .map(|document| {
            let name = &document.metadata.name;
            if !names.insert(name.value.clone()) {
                let what = format!(
                    "a second policy is named `{}`: give it another name",
                    name.value
                );
                return Err(problem(name.referenced, what));
            }
            document.policy()
        })
        .collect()
}

/// A policy that the API has: what stands in a file, except that its namespace is the one that it selects.
///
/// # Errors
///
/// What is wrong, and what to write instead.
pub fn of_object(
    name: &str,
    namespace: &str,
    spec: &serde_json::Value,
) -> Result<ElasticPolicy, String> {
    let document = serde_json::json!({
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": { "name": name },
        "spec": spec,
    });
    // JSON is YAML.
    let policies = parse(&document.to_string()).map_err(|problem| problem.what)?;
    let mut policy = policies.into_iter().next().ok_or("it is empty")?;
    if !policy.selector.namespaces.is_empty() {
        return Err("a policy selects in its own namespace: leave out `namespaces`".to_owned());
    }
    policy.selector.namespaces = vec![namespace.to_owned()];
    Ok(policy)
}

/// What policies say, for people: one line for each rule.
#[must_use]
pub fn told(policies: &[ElasticPolicy]) -> String {
    let mut text = String::new();
    for policy in policies {
        let Selector { namespaces, labels } = &policy.selector;
        let mut whose = if namespaces.is_empty() {
            "every namespace".to_owned()
        } else {
            namespaces.join(", ")
        };
        for (key, value) in labels {
            whose += &format!(", {key}={value}");
        }
        for rules in &policy.containers {
            let container = rules.name.as_deref().unwrap_or("every container");
            let ElasticPolicy { name, mode, .. } = policy;
            let what = match mode {
                Mode::Act => allowed(rules),
                Mode::Off => "left alone".to_owned(),
                Mode::Observe | Mode::Recommend => rules.memory.map_or_else(
                    || "left alone: in this mode it is only told of memory".to_owned(),
                    |memory| format!("only watched; in mode Act memory up to {}", memory.max),
                ),
            };
            text += &format!("{name} ({mode:?}): {whose}: {container}: {what}\n");
        }
    }
    if text.is_empty() {
        text += "no policies: nothing is guarded\n";
    }
    text
}

/// What a container may have.
fn allowed(rules: &ContainerRules) -> String {
    let memory = rules.memory.map(|memory| {
        let MemoryRules {
            max,
            floor,
            parallelism,
            heap,
            ..
        } = memory;
        let floor = floor.map_or_else(String::new, |floor| format!(", at rest {floor}"));
        let wait = match parallelism {
            Parallelism::Unchanged => "",
            Parallelism::Elastic => ", jobs wait where it does not suffice",
        };
        let heap = heap.map_or_else(String::new, heap::told);
        format!("memory up to {max}{floor}{wait}{heap}")
    });
    let requests = rules.memory.and_then(|memory| memory.requests);
    let requests = requests.as_ref().map(requests::told);
    let cpu = rules
        .cpu
        .map(|CpuRules { max, .. }| format!("CPU up to {max}"));
    let boosts = rules.boosts.iter().map(boosts::told);
    let allowed: Vec<String> = memory
        .into_iter()
        .chain(requests)
        .chain(cpu)
        .chain(boosts)
        .collect();
    if allowed.is_empty() {
        "left alone".to_owned()
    } else {
        allowed.join("; ")
    }
}

fn problem(location: Location, what: String) -> Problem {
    Problem {
        line: location.line(),
        column: location.column(),
        what,
    }
}

/// What a parser's error says, with the word that was probably meant.
fn explained(error: &serde_saphyr::Error) -> String {
    let (kind, word, known) = match error.without_snippet() {
        serde_saphyr::Error::SerdeUnknownField {
            field, expected, ..
        } => ("field", field, expected),
        serde_saphyr::Error::SerdeUnknownVariant {
            variant, expected, ..
        } => ("value", variant, expected),
        other => {
            let text = other.to_string();
            // The place is told before it.
            let text = text.split(" at line ").next().unwrap_or_default();
            return format!("{text}: see `bellows check --help` for what a policy has");
        }
    };
    let alike = known
        .iter()
        .map(|known| {
            (
                strsim::jaro(&word.to_lowercase(), &known.to_lowercase()),
                known,
            )
        })
        .filter(|&(likeness, _)| likeness > 0.7)
        .max_by(|(a, _), (b, _)| a.total_cmp(b));
    let known = known.join(", ");
    match alike {
        Some((_, meant)) => {
            format!("unknown {kind} `{word}`: did you mean `{meant}`? There are {known}")
        }
        None => format!("unknown {kind} `{word}`: there are {known}"),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Document {
    api_version: Spanned<String>,
    kind: Spanned<String>,
    metadata: Metadata,
    spec: Specification,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Specification {
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    selector: SelectorText,
    containers: Spanned<Vec<Rules>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct SelectorText {
    namespaces: Vec<String>,
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    name: Option<Spanned<String>>,
    memory: Option<Memory>,
    cpu: Option<CpuText>,
    #[serde(default)]
    boosts: Vec<boosts::Boost>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct CpuText {
    max: Spanned<String>,
    throttle_target: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Memory {
    max: Spanned<String>,
    floor: Option<Spanned<String>>,
    shrink_after: Option<Spanned<String>>,
    #[serde(default)]
    order: Order,
    #[serde(default)]
    parallelism: Parallelism,
    heap: Option<Spanned<String>>,
    requests: Option<requests::Requests>,
}

impl Document {
    fn policy(self) -> Result<ElasticPolicy, Problem> {
        let Self {
            api_version,
            kind,
            metadata: Metadata { name },
            spec,
        } = self;
        for (field, said, known) in [
            ("apiVersion", &api_version, API_VERSION),
            ("kind", &kind, KIND),
        ] {
            if said.value != known {
                let what = format!("{field} is `{}`: write {known}", said.value);
                return Err(problem(said.referenced, what));
            }
        }
        if name.value.trim().is_empty() {
            return Err(problem(name.referenced, "a policy needs a name".to_owned()));
        }
        let Spanned {
            value: containers,
            referenced,
            ..
        } = spec.containers;
        if containers.is_empty() {
            let what = "no rules: write one for every container (`- memory: {max: 4Gi}`)";
            return Err(problem(referenced, what.to_owned()));
        }
        let mut names = BTreeSet::new();
        let containers = containers.into_iter().map(|rules| {
            let name = rules.name.as_ref();
            let location = name.map_or(referenced, |name| name.referenced);
            let name = name.map(|name| name.value.clone());
            if names.insert(name) {
                rules.checked()
            } else {
                let what = "two rules for the same container, of which only the first would hold: take one out";
                Err(problem(location, what.to_owned()))
            }
        });
        Ok(ElasticPolicy {
            name: name.value,
            mode: spec.mode,
            containers: containers.collect::<Result<_, _>>()?,
            selector: Selector {
                namespaces: spec.selector.namespaces,
                labels: spec.selector.match_labels,
            },
        })
    }
}

impl Rules {
    fn checked(self) -> Result<ContainerRules, Problem> {
        Ok(ContainerRules {
            name: self.name.map(|name| name.value),
            memory: self.memory.map(|memory| memory.checked()).transpose()?,
            cpu: self.cpu.map(|cpu| cpu.checked()).transpose()?,
            boosts: self
                .boosts
                .iter()
                .map(boosts::Boost::checked)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl Memory {
    fn checked(&self) -> Result<MemoryRules, Problem> {
        let max = size(&self.max)?;
        let floor = self.floor.as_ref().map(size).transpose()?;
        if let (Some(floor), Some(text)) = (floor, &self.floor)
            && floor > max
        {
            let what =
                format!("floor is {floor}, above max, which is {max}: lower it, or raise max");
            return Err(problem(text.referenced, what));
        }
        Ok(MemoryRules {
            max,
            floor,
            shrink_after: self
                .shrink_after
                .as_ref()
                .map_or(Ok(SHRINK_AFTER), duration)?,
            order: self.order,
            parallelism: self.parallelism,
            heap: self
                .heap
                .as_ref()
                .map(|text| heap::checked(text, max))
                .transpose()?,
            requests: self
                .requests
                .as_ref()
                .map(requests::Requests::checked)
                .transpose()?,
        })
    }
}

impl CpuText {
    fn checked(&self) -> Result<CpuRules, Problem> {
        Ok(CpuRules {
            max: cpu(&self.max)?,
            throttled_per_mille: self.throttle_target.as_ref().map_or(Ok(0), share)?,
        })
    }
}

/// A share such as `5%` or `0.5%`, in thousandths.
fn share(text: &Spanned<String>) -> Result<u64, Problem> {
    let wrong = || {
        let what = format!(
            "`{}` is no share of periods: write one of 0% to 50%, such as 5%",
            text.value
        );
        problem(text.referenced, what)
    };
    let percent = text.value.strip_suffix('%').ok_or_else(wrong)?;
    // A hundredth is a thousand thousandths of a hundredth, as a CPU is of thousandths.
    let share = quantity::parse_cpu(percent)
        .ok()
        .filter(|_| !percent.ends_with('m'));
    let share = share.ok_or_else(wrong)?.0;
    if share > 50_000_000 || share % 100_000 != 0 {
        return Err(wrong());
    }
    Ok(share / 100_000)
}

fn cpu(text: &Spanned<String>) -> Result<Cpu, Problem> {
    let cpu = quantity::parse_cpu(&text.value);
    let cpu = cpu.map_err(|what| problem(text.referenced, what))?;
    if cpu < LEAST_CPU {
        let what = format!("{cpu} is less than the kernel can share out: use at least 10m");
        return Err(problem(text.referenced, what));
    }
    Ok(cpu)
}

fn size(text: &Spanned<String>) -> Result<Bytes, Problem> {
    let size = quantity::parse(&text.value);
    let size = size.map_err(|error| problem(text.referenced, error.to_string()))?;
    if size < LEAST {
        let what = format!("{size} is too small to start a process: use at least 1Mi");
        return Err(problem(text.referenced, what));
    }
    Ok(size)
}

/// A time of a second to a day.
fn duration(text: &Spanned<String>) -> Result<Nanos, Problem> {
    let wrong = |why: String| {
        let what = format!(
            "`{}` is no time ({why}): write one such as 5s or 2m",
            text.value
        );
        problem(text.referenced, what)
    };
    let parsed: jiff::SignedDuration = text
        .value
        .parse()
        .map_err(|error: jiff::Error| wrong(error.to_string()))?;
    match u64::try_from(parsed.as_millis()) {
        Ok(milliseconds @ 1000..=86_400_000) => Ok(Nanos::millis(milliseconds)),
        _ => Err(wrong("it must be from 1s to 24h".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use bellows_core::{
        boost::{Program, Ready, Trigger, Until},
        heap::Heap,
        requests::RequestRules,
    };

    const GOOD: &str = "\
apiVersion: bellows.dev/v1alpha1
kind: ElasticPolicy
metadata:
  name: workspaces
spec:
  mode: Act
  selector:
    namespaces: [dev]
    matchLabels:
      app: workspace
  containers:
  - name: ide
    memory:
      max: 4Gi
      floor: 128Mi
      shrinkAfter: 1m30s
      requests: {makeRoom: true, floor: 64Mi, margin: 10%}
      heap: 512Mi
    cpu: {max: 1.5, throttleTarget: 2.5%}
  - memory: {max: 1073741824, parallelism: Elastic}
    boosts:
    - on: {start: true}
      cpu: 1800m
      until: {idle: 7s, ready: {port: 80, path: /ok}}
    - on: {exec: java, arguments: [-jar]}
      memory: 2Gi
      until: {exit: true, atMost: 1h}
";

    /// Where and why a file with one change is refused.
    fn refused(from: &str, to: &str) -> (u64, String) {
        assert!(GOOD.contains(from), "{from}");
        let problem = parse(&GOOD.replacen(from, to, 1)).expect_err(to);
        (problem.line, problem.what)
    }

    #[test]
    fn reads_what_it_documents() {
        let policies = parse(GOOD).unwrap();
        let [policy] = &policies[..] else {
            panic!("{policies:?}")
        };
        assert_eq!(
            (policy.name.as_str(), policy.mode),
            ("workspaces", Mode::Act)
        );
        assert_eq!(policy.selector.namespaces, ["dev"]);
        assert_eq!(policy.selector.labels["app"], "workspace");
        let [named, every] = &policy.containers[..] else {
            panic!("{policy:?}")
        };
        assert_eq!(named.name.as_deref(), Some("ide"));
        let memory = MemoryRules {
            max: Bytes::mib(4096),
            floor: Some(Bytes::mib(128)),
            shrink_after: Nanos::millis(90_000),
            order: Order::PatchFirst,
            parallelism: Parallelism::Unchanged,
            heap: Some(Heap::At(Bytes::mib(512))),
            requests: Some(RequestRules {
                right_size: false,
                make_room: true,
                floor: Bytes::mib(64),
                margin_per_mille: 100,
                observe: Nanos::millis(3_600_000),
            }),
        };
        assert_eq!(named.memory, Some(memory));
        for (word, heap) in [("Original", Heap::Original), ("Maximum", Heap::Maximum)] {
            let policies = parse(&GOOD.replace("heap: 512Mi", &format!("heap: {word}")));
            let memory = policies.unwrap()[0].containers[0].memory;
            assert_eq!(memory.and_then(|memory| memory.heap), Some(heap));
        }
        let cpu = CpuRules {
            max: Cpu::millis(1500),
            throttled_per_mille: 25,
        };
        assert_eq!((named.cpu, every.cpu), (Some(cpu), None));
        let memory = every.memory.unwrap();
        assert_eq!(
            (memory.max, memory.shrink_after, memory.parallelism),
            (Bytes::mib(1024), SHRINK_AFTER, Parallelism::Elastic)
        );
        let [start, exec] = &every.boosts[..] else {
            panic!("{every:?}")
        };
        assert_eq!(start.on, Trigger::Start);
        assert_eq!((start.cpu, start.memory), (Some(Cpu::millis(1800)), None));
        let until = Until {
            ready: Some(Ready {
                port: 80,
                path: Some("/ok".to_owned()),
            }),
            exit: false,
            idle: Some(Nanos::millis(7000)),
            at_most: Nanos::millis(120_000),
        };
        assert_eq!(start.until, until);
        let java = Program {
            file: "java".to_owned(),
            arguments: vec!["-jar".to_owned()],
        };
        assert_eq!(exec.on, Trigger::Exec(java));
        assert_eq!(exec.memory, Some(Bytes::mib(2048)));
        assert!(exec.until.exit && exec.until.at_most == Nanos::millis(3_600_000));
    }

    #[test]
    fn the_example_is_one() {
        let text: String = EXAMPLE
            .lines()
            .skip(1)
            .map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line)))
            .collect();
        let policies = parse(&text).unwrap();
        assert_eq!(
            told(&policies),
            "workspaces (Act): dev, app=workspace: ide: memory up to 4 GiB, at rest 128 MiB, jobs wait where it does not suffice, heaps by its own limit; request down for pods of higher priority, 64 MiB at least; CPU up to 2000m; at its start 2000m CPU; for make all 2 GiB of memory\n"
        );
    }

    #[test]
    fn several_stand_in_one_file_and_observe_is_the_default() {
        let second = GOOD
            .replace("workspaces", "others")
            .replace("  mode: Act\n", "");
        let policies = parse(&format!("{GOOD}---\n{second}")).unwrap();
        assert_eq!(policies.len(), 2);
        assert_eq!(policies[1].mode, Mode::Observe);
        let problem = parse(&format!("{GOOD}---\n{GOOD}")).unwrap_err();
        assert_eq!(problem.line, 32);
        assert!(problem.what.contains("second policy"), "{problem}");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_what_to_write() {
        for (from, to, line, words) in [
            ("floor:", "flor:", 15, "did you mean `floor`"),
            ("selector:", "selectors:", 7, "did you mean `selector`"),
            (
                "matchLabels",
                "matchlabels",
                9,
                "did you mean `matchLabels`",
            ),
            ("mode: Act", "mode: act", 6, "did you mean `Act`"),
            ("max: 4Gi", "max: 4GB", 14, "unknown unit `GB`"),
            ("max: 4Gi", "max: -4Gi", 14, "no memory size"),
            ("max: 4Gi", "max: 100m", 14, "too small"),
            ("max: 4Gi", "max: 64Mi", 15, "above max"),
            ("shrinkAfter: 1m30s", "shrinkAfter: soon", 16, "such as 5s"),
            (
                "shrinkAfter: 1m30s",
                "shrinkAfter: 0s",
                16,
                "from 1s to 24h",
            ),
            (
                "shrinkAfter: 1m30s",
                "shrinkAfter: -5s",
                16,
                "from 1s to 24h",
            ),
            ("max: 1.5", "max: 1.5x", 19, "such as 2 or 250m"),
            ("max: 1.5", "max: 1m", 19, "at least 10m"),
            ("2.5%", "2.5", 19, "such as 5%"),
            ("2.5%", "60%", 19, "0% to 50%"),
            ("2.5%", "0.05%", 19, "0% to 50%"),
            (
                "throttleTarget",
                "throttledTarget",
                19,
                "did you mean `throttleTarget`",
            ),
            ("v1alpha1", "v1", 1, "write bellows.dev/v1alpha1"),
            ("kind: ElasticPolicy", "kind: Pod", 2, "write ElasticPolicy"),
            ("name: workspaces", "name: ''", 4, "needs a name"),
            ("{start: true}", "{}", 22, "write `start: true`"),
            ("start: true", "start: true, exec: x", 22, "two triggers"),
            ("start: true", "start: true, arguments: [x]", 22, "`exec`"),
            ("cpu: 1800m", "cpu: 1m", 23, "at least 10m"),
            ("cpu: 1800m", "cpus: 2", 23, "did you mean `cpu`"),
            ("      cpu: 1800m\n", "", 22, "a boost of nothing"),
            ("idle: 7s", "exit: true", 24, "a start has no `exit`"),
            ("idle: 7s", "idle: 7", 24, "such as 5s"),
            ("port: 80,", "port: 0,", 24, "no port 0"),
            ("port: 80,", "port: 70000,", 24, "check --help"),
            ("path: /ok", "path: ok", 24, "such as /healthz"),
            ("path: /ok", "path: '/o k'", 24, "such as /healthz"),
            ("exec: java", "exec: bin/", 25, "no program"),
            ("atMost: 1h", "atMost: 25h", 27, "from 1s to 24h"),
            ("floor: 64Mi", "floor: 64", 17, "too small"),
            ("makeRoom: true", "makeRoom: false", 17, "neither"),
            ("makeRoom", "makeroom", 17, "did you mean `makeRoom`"),
            ("margin: 10%", "margin: 10Mi", 17, "such as 25%"),
            ("margin: 10%", "margin: 500%", 17, "0% to 400%"),
            (
                "heap: 512Mi",
                "heap: original",
                18,
                "write Original, Maximum",
            ),
            ("heap: 512Mi", "heap: 5Gi", 18, "above max"),
            ("heap: 512Mi", "heap: 8Mi", 18, "at least 16Mi"),
            ("heap: 512Mi", "heaps: 512Mi", 18, "did you mean `heap`"),
            ("- memory:", "- name: ide\n    memory:", 20, "take one out"),
        ] {
            let (at, what) = refused(from, to);
            assert_eq!(at, line, "{to}: {what}");
            assert!(what.contains(words), "{to}: {what}");
        }
        let text = GOOD.split("  containers:").next().unwrap();
        let problem = parse(&format!("{text}  containers: []\n")).unwrap_err();
        assert_eq!(problem.line, 11);
        assert!(parse(text).unwrap_err().what.contains("containers"));
    }

    #[test]
    fn whatever_is_no_policy_is_an_error_and_no_panic() {
        for text in [
            "{",
            "a",
            "- - -",
            "\u{0}",
            "a: *b",
            "&a [*a]",
            "? :",
            "!!binary x",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        // Nothing is no policy, and nothing wrong.
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn an_object_of_the_api_is_a_policy_of_its_namespace() {
        let spec = serde_json::json!({
            "mode": "Act",
            "selector": { "matchLabels": { "app": "shop" } },
            "containers": [{ "memory": { "max": "4Gi", "shrinkAfter": "7s" } }],
        });
        let policy = of_object("dev/shop", "dev", &spec).unwrap();
        assert_eq!((policy.name.as_str(), policy.mode), ("dev/shop", Mode::Act));
        assert_eq!(policy.selector.namespaces, ["dev"]);
        assert_eq!(policy.containers[0].memory.unwrap().max, Bytes::mib(4096));
        for (spec, part) in [
            (serde_json::json!({ "containers": [] }), "no rules"),
            (
                serde_json::json!({ "containers": [{ "memory": { "maximum": 1 } }] }),
                "did you mean `max`",
            ),
            (
                serde_json::json!({ "selector": { "namespaces": ["a"] }, "containers": [{}] }),
                "its own namespace",
            ),
            (serde_json::Value::Null, ""),
        ] {
            let why = of_object("a/b", "a", &spec).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }

    /// What the API server lets through and what is read are the same fields.
    #[test]
    fn the_resource_definition_has_every_field() {
        fn missing(
            document: &serde_json::Value,
            schema: &serde_json::Value,
            at: &str,
        ) -> Vec<String> {
            match document {
                serde_json::Value::Object(fields)
                    if schema.get("additionalProperties").is_some() =>
                {
                    assert!(!fields.is_empty(), "{at}");
                    Vec::new()
                }
                // What it does not know must reach whoever refuses it.
                serde_json::Value::Object(_)
                    if schema["x-kubernetes-preserve-unknown-fields"] != true =>
                {
                    vec![format!("{at} drops what it does not know")]
                }
                serde_json::Value::Object(fields) => fields
                    .iter()
                    .flat_map(|(name, value)| {
                        let at = format!("{at}.{name}");
                        let named = &schema["properties"][name];
                        if named.is_null() {
                            vec![at]
                        } else {
                            missing(value, named, &at)
                        }
                    })
                    .collect(),
                serde_json::Value::Array(items) => items
                    .iter()
                    .flat_map(|item| missing(item, &schema["items"], at))
                    .collect(),
                _ => Vec::new(),
            }
        }
        let definition = include_str!("../../../deploy/elasticpolicies.yaml");
        let definition: serde_json::Value = serde_saphyr::from_str(definition).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let (_, example) = EXAMPLE.split_once(":\n").unwrap();
        let example: serde_json::Value = serde_saphyr::from_str(example).unwrap();
        let missing = missing(&example["spec"], &schema["properties"]["spec"], "spec");
        // A file has no namespace of its own.
        assert_eq!(missing, ["spec.selector.namespaces"]);
    }
}
