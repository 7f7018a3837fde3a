//! What limits come down to: what they were, or, where somebody has raised the request beyond that meanwhile, a step above the
//! request.
//!
//! No limit may be below its request, and one that is exactly that may make another QoS class of the pod's: the API refuses
//! both. A limit that always was its request comes down to it all the same: the pod has its class with that.

use super::{
    Container, Level, MANAGER, ORIGINAL, ORIGINAL_CPU, ORIGINAL_REQUESTS, Pod, original::recorded,
};
use crate::{
    quantity,
    units::{Amount, Bytes, Cpu},
};

/// How far above its request a memory limit stays.
const STEP: Bytes = Bytes::mib(1);
/// The same of CPU.
const CPU_STEP: Cpu = Cpu::millis(1);

/// What a memory limit comes down to without a floor.
pub(super) fn at_rest(pod: &Pod, level: Level, limit: Bytes, original: Bytes) -> Bytes {
    let request = match level {
        Level::Pod => None,
        Level::Container(index) => pod.containers[index].memory_request.as_deref(),
    };
    let request = request.and_then(|request| quantity::parse(request).ok());
    above(pod, request, STEP, (limit, original))
}

/// What the CPU limit of a container comes down to.
pub(super) fn cpu_at_rest(pod: &Pod, container: &Container, limit: Cpu, original: Cpu) -> Cpu {
    let request = container.cpu_request.as_deref();
    let request = request.and_then(|request| quantity::parse_cpu(request).ok());
    above(pod, request, CPU_STEP, (limit, original))
}

fn above<T: Amount>(pod: &Pod, request: Option<T>, step: T, (limit, original): (T, T)) -> T {
    let is_raised = |request: &T| {
        let is_same = *request == original && limit != original;
        *request > original || is_same && is_guaranteed(pod)
    };
    let raised = request.filter(is_raised);
    raised.map_or(original, |request| request.plus(step).min(limit))
}

/// Whether a pod would be Guaranteed with its limits as they were.
fn is_guaranteed(pod: &Pod) -> bool {
    let is_same = |container: &Container| {
        let (limit, manager) = (&container.memory_limit, &container.limit_manager);
        let memory = was(
            pod,
            ORIGINAL,
            container,
            (limit.as_deref(), manager.as_deref()),
        );
        let (limit, manager) = (&container.cpu_limit, &container.cpu_limit_manager);
        let cpu = was(
            pod,
            ORIGINAL_CPU,
            container,
            (limit.as_deref(), manager.as_deref()),
        );
        let size = |text: Option<&str>| quantity::parse(text?).ok();
        let cpus = |text: Option<&str>| quantity::parse_cpu(text?).ok();
        let (memory, cpu) = (size(memory), cpus(cpu));
        let is_memory = memory.is_some() && memory == size(container.memory_request.as_deref());
        is_memory && cpu.is_some() && cpu == cpus(container.cpu_request.as_deref())
    };
    // What those request is not known.
    let mut before = pod.init_containers.iter();
    let may_be = before.all(|init| init.memory_limit.is_some() && init.cpu_limit.is_some());
    may_be && !pod.has_resources && pod.containers.iter().all(is_same)
}

/// What a limit of a container was, by what it is and who has set that.
fn was<'a>(
    pod: &'a Pod,
    annotation: &str,
    container: &Container,
    (limit, manager): (Option<&'a str>, Option<&str>),
) -> Option<&'a str> {
    let recorded = recorded(pod, annotation, &container.name);
    recorded.filter(|_| manager == Some(MANAGER)).or(limit)
}

/// What a memory request comes back to, which is `now`: what it was, or, where somebody has lowered the limit below that
/// meanwhile, a step below the limit.
pub(super) fn request_at_rest(pod: &Pod, index: usize, now: Bytes, original: Bytes) -> Bytes {
    let container = &pod.containers[index];
    let size = |text: Option<&str>| quantity::parse(text?).ok();
    let (limit, manager) = (&container.memory_limit, &container.limit_manager);
    let (limit, manager) = (limit.as_deref(), manager.as_deref());
    let Some(in_spec) = size(limit) else {
        return original;
    };
    let was = size(was(pod, ORIGINAL, container, (limit, manager))).unwrap_or(in_spec);
    let limit = at_rest(pod, Level::Container(index), in_spec, was);
    if original > limit {
        limit.minus(STEP).max(now)
    } else {
        original
    }
}

/// The least limit that a policy's floor may ask for.
pub(super) fn least(pod: &Pod, level: Level) -> Bytes {
    let Level::Container(index) = level else {
        return Bytes::ZERO;
    };
    let container = &pod.containers[index];
    // One that was lowered comes back.
    let original = recorded(pod, ORIGINAL_REQUESTS, &container.name);
    let request = [container.memory_request.as_deref(), original];
    let request = request.into_iter().flatten();
    let request = request.filter_map(|request| quantity::parse(request).ok());
    let request = request.max();
    request.map_or(Bytes::ZERO, |request| request.plus(STEP))
}
