//! What policies say, for people: one line for each rule.
//!
//! Whoever has written a policy sees by it what was understood: whom it selects, and what each container may have. What a mode
//! does not do is said, too.
//!
//! It must not say more than the policy does: what containers have, and what holds beside a policy, is told elsewhere.

use bellows_core::elastic::{
    ContainerRules, CpuRules, ElasticPolicy, MemoryRules, Mode, Parallelism, Selector,
};

use super::{boosts, heap, requests};

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
            hold_at_most,
            parallelism,
            heap,
            ..
        } = memory;
        let floor = floor.map_or_else(String::new, |floor| format!(", at rest {floor}"));
        let hold = hold_at_most.map_or_else(String::new, |longest| {
            format!(", held for {} s at most", longest.as_millis() / 1000)
        });
        let wait = match parallelism {
            Parallelism::Unchanged => "",
            Parallelism::Elastic => ", jobs wait where it does not suffice",
        };
        let heap = heap.map_or_else(String::new, heap::told);
        format!("memory up to {max}{floor}{hold}{wait}{heap}")
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
