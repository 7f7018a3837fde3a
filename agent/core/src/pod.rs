//! What a pod asks of Bellows, and whether it can have it.
//!
//! Policies opt pods in, and so do two annotations: `bellows.dev/mode: Act` (or Observe or Recommend, which change
//! nothing) and `bellows.dev/max-memory`; a third, `bellows.dev/container`, names the container where there are several.
//! Annotations come before policies, and `bellows.dev/mode: Off` before all. A pod whose limit stands at the
//! pod's own level (`spec.resources`, Kubernetes 1.34 and later) is guarded as a whole. Whatever does not
//! parse is refused with the value and the way out: a guess would act on somebody's pod.
//!
//! This knows nothing of the API's types: the shell converts them, once.

mod claimed;
mod cpu;
mod heap;
mod init;
mod left;
mod original;
mod refusal;
mod requests;
mod rest;
mod seen;
pub mod way;

use std::collections::BTreeMap;

use original::entries;

use crate::{
    elastic::{self, ContainerRules, ElasticPolicy, MemoryRules, Mode, Order, Parallelism},
    patience::{Patience, Probe},
    quantity::{self, QuantityError},
    units::{Bytes, Nanos},
};

pub use claimed::{yield_cpu, yield_limits, yield_requests};
pub use cpu::{
    CpuRefusal, CpuWish, CpuWishes, LEAST as LEAST_CPU, ORIGINAL_CPU, cpu_wishes, memory_boosts,
    starting,
};
pub use heap::{Rooms, rooms};
pub use left::{Raised, left_raised};
pub use original::with_original;
pub use refusal::Refusal;
pub use requests::{ORIGINAL_REQUESTS, RequestRefusal, RequestWish, RequestWishes, request_wishes};
pub use seen::{Container, InitContainer, Level, Pod, PutOff, QosClass};

/// `Act` opts in; `Observe` and `Recommend` are only watched; `Off` is not even that.
pub const MODE: &str = "bellows.dev/mode";
/// The limit that is never exceeded.
pub const MAX_MEMORY: &str = "bellows.dev/max-memory";
/// The annotation of the demo of 2022, which is understood where there is none of ours.
pub const EBPF_RESIZE: &str = "ebpf-resize";
/// The container that is meant, where a pod has several.
pub const CONTAINER: &str = "bellows.dev/container";
/// `RaiseFirst` raises on the node and asks the API right after; `PatchFirst`, the default, the other way round.
pub const ORDER: &str = "bellows.dev/order";
/// `Elastic` has some jobs wait where there is not memory for all of them at once; `Unchanged`, the default, does not.
pub const PARALLELISM: &str = "bellows.dev/parallelism";
/// Written by Bellows at adoption: `CONTAINER=LIMIT` as they were, with commas between them.
pub const ORIGINAL: &str = "bellows.dev/original-memory";
/// Stands for the pod's own level where a container's name would stand; no container can have it.
pub const WHOLE_POD: &str = "*";
/// The field manager of Bellows' own changes: by it the API itself tells them from others'.
pub const MANAGER: &str = "bellows";

/// What is guarded in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Whether it is guarded or only watched; never [`Mode::Off`].
    pub mode: Mode,
    /// Where its limit stands.
    pub level: Level,
    /// The container's name, or [`WHOLE_POD`].
    pub container: String,
    /// The runtime's id of the container; `None` for the whole pod.
    pub id: Option<String>,
    /// The runtime's ids of the running containers that the limit is for; none where nothing of it runs.
    pub running: Vec<String>,
    /// The limit in the spec, as written.
    pub limit_text: String,
    /// The same as a size.
    pub limit: Bytes,
    /// The limit as it was.
    pub original: Bytes,
    /// The same as it was written.
    pub original_text: String,
    /// The limit at rest: the same, or less if a policy has a floor, or more if somebody has raised the request beyond it.
    pub rest: Bytes,
    /// The same as it is to be written.
    pub rest_text: String,
    /// The limit that is never exceeded.
    pub ceiling: Bytes,
    /// How long its probes and its policy let it be held.
    pub patience: Patience,
    /// Quiet time before a raised limit is lowered, where a policy says that.
    pub shrink_after: Option<Nanos>,
    /// In which order its limit is raised.
    pub order: Order,
    /// What becomes of its jobs where there is not memory for all of them at once.
    pub parallelism: Parallelism,
    /// Its pod's priority.
    pub priority: i32,
    /// The policy that means it; `None` where annotations do.
    pub policy: Option<String>,
    /// Whether the original stands on the pod already.
    pub recorded: bool,
    /// Whether somebody else has changed the limit since the original was recorded: the limit is the
    /// new original then.
    pub foreign: bool,
}

/// What is to be guarded or watched in a pod, by container; `Err` for one that is asked for and cannot be.
pub type Wishes = BTreeMap<String, Result<Wish, Refusal>>;

/// What is left of wishes where nobody's limit may be moved.
pub fn only_observe(wishes: &mut Wishes) {
    for wish in wishes.values_mut().flatten() {
        if wish.mode == Mode::Act {
            wish.mode = Mode::Observe;
        }
    }
}

/// What is left of wishes of which something runs.
pub fn only_running(wishes: &mut Wishes) {
    wishes.retain(|_, wish| wish.as_ref().map_or(true, |wish| !wish.running.is_empty()));
}

/// Whom a pod's annotations and the policies mean, of what runs.
#[must_use]
pub fn wishes(pod: &Pod, policies: &[ElasticPolicy]) -> Wishes {
    let mut wishes = all_wishes(pod, policies);
    only_running(&mut wishes);
    wishes
}

/// Whom a pod's annotations and the policies mean, whether it runs or not; nobody if it is ending, or opts out.
///
/// With a size or a container in them the annotations are all that holds, but for the mode, which may be a policy's;
/// else their mode, order and parallelism hold in place of a policy's.
#[must_use]
pub fn all_wishes(pod: &Pod, policies: &[ElasticPolicy]) -> Wishes {
    // What concerns no container in particular stands under no name.
    let refused = |refusal| [(String::new(), Err(refusal))].into();
    let mode = match mode(pod) {
        Ok(mode) => mode,
        Err(refusal) => return refused(refusal),
    };
    if pod.ending || mode == Some(Mode::Off) {
        return Wishes::new();
    }
    if let Some(why) = &pod.misread {
        return refused(Refusal::EbpfResize(why.clone()));
    }
    let names = [MAX_MEMORY, CONTAINER];
    let is_sized = names.iter().any(|name| pod.annotations.contains_key(*name));
    let mut wishes = by_policies(pod, mode, policies);
    let of_policies = || mode_of(pod, &wishes).filter(|_| is_sized);
    match mode.or_else(of_policies) {
        Some(mode) if is_sized || wishes.is_empty() => match by_annotations(pod, mode) {
            Ok(wish) => [(wish.container.clone(), Ok(wish))].into(),
            Err(refusal) => refused(refusal),
        },
        _ => {
            // Whom the annotations mean no policy does, and nobody else is meant.
            wishes.retain(|_, wish| !is_sized || wish.is_err());
            wishes.extend(init::refused(pod, mode, policies));
            wishes
        }
    }
}

/// What policies say as the mode of the container that annotations mean, or, of a whole pod, of the first that they mean.
fn mode_of(pod: &Pod, by_policies: &Wishes) -> Option<Mode> {
    let own = match subject(pod) {
        Ok(Subject {
            level: Level::Container(_),
            name,
            ..
        }) => by_policies.get(name),
        _ => by_policies.values().find(|wish| wish.is_ok()),
    };
    Some(own?.as_ref().ok()?.mode)
}

/// Whether it depends on policies what is asked for a pod.
#[must_use]
pub fn needs_policies(pod: &Pod) -> bool {
    let is_complete = pod.annotations.contains_key(MAX_MEMORY);
    match mode(pod) {
        Ok(None) => true,
        Ok(Some(Mode::Off)) | Err(_) => false,
        Ok(Some(_)) => !is_complete,
    }
}

/// The pod's own mode for all but memory limits.
fn mode_beside(pod: &Pod) -> Result<Option<Mode>, Refusal> {
    if pod.is_only_of_memory {
        Ok(None)
    } else {
        mode(pod)
    }
}

fn mode(pod: &Pod) -> Result<Option<Mode>, Refusal> {
    match pod.annotations.get(MODE).map(|mode| mode.trim()) {
        None => Ok(None),
        Some("Off") => Ok(Some(Mode::Off)),
        Some("Act") => Ok(Some(Mode::Act)),
        Some("Observe") => Ok(Some(Mode::Observe)),
        Some("Recommend") => Ok(Some(Mode::Recommend)),
        Some(other) => Err(Refusal::UnknownMode(other.to_owned())),
    }
}

/// What is asked for a container.
struct Asked {
    mode: Mode,
    ceiling: Bytes,
    floor: Option<Bytes>,
    shrink_after: Option<Nanos>,
    hold_at_most: Option<Nanos>,
    order: Order,
    parallelism: Parallelism,
    policy: Option<String>,
}

fn by_annotations(pod: &Pod, mode: Mode) -> Result<Wish, Refusal> {
    let maximum = pod.annotations.get(MAX_MEMORY).ok_or(Refusal::NoMaximum)?;
    let ceiling = quantity::parse(maximum).map_err(|source| Refusal::Quantity {
        name: MAX_MEMORY,
        source,
    })?;
    let asked = Asked {
        mode,
        ceiling,
        floor: None,
        shrink_after: None,
        hold_at_most: None,
        order: order(pod)?.unwrap_or_default(),
        parallelism: parallelism(pod)?.unwrap_or_default(),
        policy: None,
    };
    wish(pod, subject(pod)?, asked)
}

fn order(pod: &Pod) -> Result<Option<Order>, Refusal> {
    match pod.annotations.get(ORDER).map(|order| order.trim()) {
        None => Ok(None),
        Some("PatchFirst") => Ok(Some(Order::PatchFirst)),
        Some("RaiseFirst") => Ok(Some(Order::RaiseFirst)),
        Some(other) => Err(Refusal::UnknownOrder(other.to_owned())),
    }
}

fn parallelism(pod: &Pod) -> Result<Option<Parallelism>, Refusal> {
    match pod.annotations.get(PARALLELISM).map(|text| text.trim()) {
        None => Ok(None),
        Some("Unchanged") => Ok(Some(Parallelism::Unchanged)),
        Some("Elastic") => Ok(Some(Parallelism::Elastic)),
        Some(other) => Err(Refusal::UnknownParallelism(other.to_owned())),
    }
}

/// The policy that means a container, and what it says.
fn meant<'a>(
    pod: &Pod,
    policies: &'a [ElasticPolicy],
    container: &str,
) -> Option<(&'a ElasticPolicy, &'a ContainerRules)> {
    let named = elastic::Subject {
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        container: container.to_owned(),
        labels: pod.labels.clone(),
    };
    elastic::rules(policies, &named)
}

/// Containers without a limit of their own are not meant: there is nothing to raise.
fn by_policies(pod: &Pod, mode: Option<Mode>, policies: &[ElasticPolicy]) -> Wishes {
    let mut wishes = Wishes::new();
    for (index, container) in pod.containers.iter().enumerate() {
        let Some((policy, rules)) = meant(pod, policies, &container.name) else {
            continue;
        };
        let mode = mode.unwrap_or(policy.mode);
        let (Some(memory), Some(text)) = (rules.memory, &container.memory_limit) else {
            continue;
        };
        if mode == Mode::Off {
            continue;
        }
        let asked = asked(pod, mode, policy, memory);
        let wish = asked.and_then(|asked| {
            let subject = Subject::of(pod, index, container, text);
            wish(pod, subject, asked)
        });
        wishes.insert(container.name.clone(), wish);
    }
    wishes
}

/// What a policy asks for, with what annotations put in its place.
fn asked(
    pod: &Pod,
    mode: Mode,
    policy: &ElasticPolicy,
    memory: MemoryRules,
) -> Result<Asked, Refusal> {
    Ok(Asked {
        mode,
        ceiling: memory.max,
        floor: memory.floor,
        shrink_after: Some(memory.shrink_after),
        hold_at_most: memory.hold_at_most,
        order: order(pod)?.unwrap_or(memory.order),
        parallelism: parallelism(pod)?.unwrap_or(memory.parallelism),
        policy: Some(policy.name.clone()),
    })
}

fn wish(pod: &Pod, subject: Subject<'_>, asked: Asked) -> Result<Wish, Refusal> {
    let Asked {
        mode,
        ceiling,
        floor,
        shrink_after,
        hold_at_most,
        order,
        parallelism,
        policy,
    } = asked;
    let Subject {
        level,
        name,
        text,
        manager,
        id,
        most,
        probes,
    } = subject;
    let size = |text: &str| {
        quantity::parse(text).map_err(|source| Refusal::Limit {
            container: name.to_owned(),
            source,
        })
    };
    let limit = size(text)?;
    let ceiling = match most {
        Some(most) => ceiling.min(size(most)?),
        None => ceiling,
    };
    if pod.is_static {
        return Err(Refusal::Static);
    }
    if pod.is_critical() {
        return Err(Refusal::Critical);
    }
    if pod.qos == QosClass::Guaranteed {
        return Err(Refusal::Guaranteed);
    }
    let is_meant = |container: &&Container| level == Level::Pod || container.name == name;
    if let Some(container) = pod
        .containers
        .iter()
        .filter(is_meant)
        .find(|container| container.restarts_on_resize)
    {
        return Err(Refusal::RestartsOnResize(container.name.clone()));
    }
    let theirs = manager.is_some_and(|manager| manager != MANAGER);
    let recorded = recorded_original(pod, name)?;
    let foreign = theirs
        && recorded
            .as_ref()
            .is_some_and(|(original, _)| *original != limit);
    let recorded = recorded.filter(|_| !foreign);
    let (original, original_text) = recorded.clone().unwrap_or_else(|| (limit, text.to_owned()));
    let at_rest = rest::at_rest(pod, level, limit, original);
    let least = rest::least(pod, level);
    let rest = floor.map_or(at_rest, |floor| floor.max(least).min(at_rest));
    let rest_text = if rest == original {
        original_text.clone()
    } else {
        quantity::format(rest)
    };
    let needed = original.max(at_rest);
    if ceiling < needed {
        return Err(Refusal::MaximumBelowLimit {
            policy,
            limit: needed,
            ceiling,
        });
    }
    let running: Vec<String> = pod
        .containers
        .iter()
        .filter(is_meant)
        .filter_map(|container| container.id.clone())
        .collect();
    Ok(Wish {
        mode,
        level,
        container: name.to_owned(),
        id: id.map(str::to_owned),
        running,
        limit_text: text.to_owned(),
        limit,
        original,
        original_text,
        rest,
        rest_text,
        ceiling,
        patience: Patience::with(&probes).for_at_most(hold_at_most),
        shrink_after,
        order,
        parallelism,
        priority: pod.priority,
        policy,
        recorded: recorded.is_some(),
        foreign,
    })
}

/// Whose limit is meant.
struct Subject<'a> {
    level: Level,
    name: &'a str,
    text: &'a str,
    manager: Option<&'a str>,
    id: Option<&'a str>,
    /// What the API allows at most, where the pod has a limit of its own.
    most: Option<&'a str>,
    probes: Vec<Probe>,
}

impl<'a> Subject<'a> {
    /// A container of a pod, with its limit as written.
    fn of(pod: &'a Pod, index: usize, container: &'a Container, text: &'a str) -> Self {
        Self {
            level: Level::Container(index),
            name: &container.name,
            text,
            manager: container.limit_manager.as_deref(),
            id: container.id.as_deref(),
            most: pod.memory_limit.as_deref(),
            probes: container.probes.clone(),
        }
    }
}

fn subject(pod: &Pod) -> Result<Subject<'_>, Refusal> {
    let whole = pod.memory_limit.as_deref().map(|text| Subject {
        level: Level::Pod,
        name: WHOLE_POD,
        text,
        manager: pod.limit_manager.as_deref(),
        id: None,
        most: None,
        probes: pod
            .containers
            .iter()
            .flat_map(|container| container.probes.iter().copied())
            .collect(),
    });
    let (index, container) = match (chosen(pod), whole) {
        // Nobody in particular is meant.
        (Err(Refusal::WhichContainer(_)), Some(whole)) => return Ok(whole),
        (Ok((_, container)), Some(whole)) if container.memory_limit.is_none() => {
            return Ok(whole);
        }
        (chosen, _) => chosen?,
    };
    let text = container
        .memory_limit
        .as_deref()
        .ok_or_else(|| Refusal::NoLimit(container.name.clone()))?;
    Ok(Subject::of(pod, index, container, text))
}

fn chosen(pod: &Pod) -> Result<(usize, &Container), Refusal> {
    let mut containers = pod.containers.iter().enumerate();
    match pod.annotations.get(CONTAINER) {
        Some(name) => containers
            .find(|(_, container)| container.name == *name)
            .ok_or_else(|| Refusal::NoSuchContainer(name.clone())),
        None => match (containers.next(), containers.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(Refusal::WhichContainer(pod.containers.len())),
        },
    }
}

/// The original that stands on the pod for this container.
fn recorded_original(pod: &Pod, container: &str) -> Result<Option<(Bytes, String)>, Refusal> {
    let wrong = |source| Refusal::Quantity {
        name: ORIGINAL,
        source,
    };
    for entry in entries(pod, ORIGINAL) {
        let Some((name, size)) = entry.split_once('=') else {
            return Err(wrong(QuantityError::NoNumber(entry.to_owned())));
        };
        if name == container {
            let bytes = quantity::parse(size).map_err(wrong)?;
            return Ok(Some((bytes, size.to_owned())));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
