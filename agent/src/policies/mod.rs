//! Policies from a file: the fields of an `ElasticPolicy` object, one or several in one YAML file.
//!
//! [`EXAMPLE`] has every field.
//!
//! A policy that is half understood is worse than none: it acts on the wrong containers, or lets them grow
//! further than somebody meant. So a file is taken as a whole or not at all, each error names its line and
//! what to write instead, and whoever has a good one already keeps it.
//!
//! It must not put a value of its own in place of one that it does not understand, nor know of containers that run.

mod boosts;
#[cfg(test)]
mod documents;
mod heap;
mod requests;
mod told;
mod values;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use bellows_core::{
    Nanos,
    elastic::{
        ContainerRules, CpuRules, ElasticPolicy, MemoryRules, Mode, Order, Parallelism, Selector,
    },
};
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};
use thiserror::Error;

pub use told::told;
use values::{cpu, duration, problem, share, size};

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
        holdAtMost: 10s    # how long it may stand still for a raise, or for memory that others have; 10s, if left out
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
    hold_at_most: Option<Spanned<String>>,
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
            hold_at_most: self.hold_at_most.as_ref().map(duration).transpose()?,
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

#[cfg(test)]
mod tests;
