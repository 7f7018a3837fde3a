//! Policies for many containers: who is meant, and what they may have.
//!
//! Where several policies select a container, the one with the most conditions holds, and of those that have as
//! many the first by name: two that disagree must not take turns. Of a policy's rules the first that names the
//! container holds, then the first that names none.
//!
//! This knows no file format and no API: whoever reads policies converts them, once, and has checked them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    boost::BoostRules,
    heap::Heap,
    requests::RequestRules,
    units::{Bytes, Cpu, Nanos},
};

/// What is done with what is decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Left alone, whatever another policy says that has fewer conditions.
    Off,
    /// Nothing is changed; for each kill it is told what mode [`Self::Act`] would have made of it.
    #[default]
    Observe,
    /// The same, and for each burst the limit that it would have got.
    Recommend,
    /// Limits are changed.
    Act,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ElasticPolicy {
    /// Its name, unique.
    pub name: String,
    /// Whose containers are meant.
    pub selector: Selector,
    /// What is done.
    pub mode: Mode,
    /// Rules for containers, the first that fits.
    pub containers: Vec<ContainerRules>,
}

/// Whose containers are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selector {
    /// Namespaces; none for all.
    pub namespaces: Vec<String>,
    /// Labels that the pod must have.
    pub labels: BTreeMap<String, String>,
}

/// Rules for containers of the selected pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRules {
    /// The container's name; `None` for every container.
    pub name: Option<String>,
    /// What it may have of memory; `None` leaves its limit alone.
    pub memory: Option<MemoryRules>,
    /// What it may have of CPU; `None` leaves its quota alone.
    pub cpu: Option<CpuRules>,
    /// What it is lent for a time.
    pub boosts: Vec<BoostRules>,
}

/// What a container may have of CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuRules {
    /// The quota that is never exceeded.
    pub max: Cpu,
    /// The share of periods that may be throttled, in thousandths.
    pub throttled_per_mille: u64,
}

/// In which order a limit is raised that the Kubernetes API owns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// The API is asked, and the container held until the kubelet has carried it out. The limit is written without it only if
    /// that is late.
    #[default]
    PatchFirst,
    /// The limit is written at once, and the API asked right after: no stall, and for a moment the node runs what the API does
    /// not know, or refuses.
    RaiseFirst,
}

/// What becomes of a container's jobs where there is not memory for all of them at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parallelism {
    /// They run, and are killed where the memory ends.
    #[default]
    Unchanged,
    /// Some wait for others ([`crate::parallel`]).
    Elastic,
}

/// What a container may have of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRules {
    /// The limit that is never exceeded.
    pub max: Bytes,
    /// The limit at rest where it is to be below the container's own.
    pub floor: Option<Bytes>,
    /// Time without growth after which a raised limit is lowered; longer for what has paused for longer before, and gone on.
    pub shrink_after: Nanos,
    /// How long one hold may last; `None` for as long as usual ([`crate::patience::LONGEST`]).
    pub hold_at_most: Option<Nanos>,
    /// In which order it is raised where the Kubernetes API owns it.
    pub order: Order,
    /// What becomes of its jobs where there is not memory for all of them at once.
    pub parallelism: Parallelism,
    /// The limit that heaps are sized by which are sized when a program starts; `None` leaves them to the limit that is in
    /// force then.
    pub heap: Option<Heap>,
    /// What its request may become, where there is one; `None` leaves that alone.
    pub requests: Option<RequestRules>,
}

/// A container, as far as policies look at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// The namespace of its pod.
    pub namespace: String,
    /// Its pod's name.
    pub pod: String,
    /// Its own name.
    pub container: String,
    /// The labels of its pod.
    pub labels: BTreeMap<String, String>,
}

impl Selector {
    fn selects(&self, subject: &Subject) -> bool {
        (self.namespaces.is_empty() || self.namespaces.contains(&subject.namespace))
            && self
                .labels
                .iter()
                .all(|(key, value)| subject.labels.get(key) == Some(value))
    }

    fn conditions(&self) -> usize {
        usize::from(!self.namespaces.is_empty()) + self.labels.len()
    }
}

/// The policy and the rules that hold for a container.
#[must_use]
pub fn rules<'a>(
    policies: &'a [ElasticPolicy],
    subject: &Subject,
) -> Option<(&'a ElasticPolicy, &'a ContainerRules)> {
    let selecting = policies.iter().filter_map(|policy| {
        let rules = policy.rules(subject)?;
        Some((policy, rules))
    });
    selecting.min_by(|(a, _), (b, _)| {
        let conditions = b.selector.conditions().cmp(&a.selector.conditions());
        conditions.then_with(|| a.name.cmp(&b.name))
    })
}

impl ElasticPolicy {
    fn rules(&self, subject: &Subject) -> Option<&ContainerRules> {
        let named = |rules: &&ContainerRules| rules.name.as_ref() == Some(&subject.container);
        let unnamed = |rules: &&ContainerRules| rules.name.is_none();
        let rules = self.containers.iter();
        let rules = rules
            .clone()
            .find(named)
            .or_else(|| rules.clone().find(unnamed));
        rules.filter(|_| self.selector.selects(subject))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, namespace: Option<&str>, labels: &[(&str, &str)]) -> ElasticPolicy {
        let rules = |name: Option<&str>, mib| ContainerRules {
            name: name.map(str::to_owned),
            memory: Some(MemoryRules {
                max: Bytes::mib(mib),
                floor: None,
                shrink_after: Nanos::millis(5000),
                hold_at_most: None,
                order: Order::PatchFirst,
                parallelism: Parallelism::Unchanged,
                heap: None,
                requests: None,
            }),
            cpu: None,
            boosts: Vec::new(),
        };
        ElasticPolicy {
            name: name.to_owned(),
            selector: Selector {
                namespaces: namespace.map(str::to_owned).into_iter().collect(),
                labels: labels
                    .iter()
                    .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                    .collect(),
            },
            mode: Mode::Act,
            containers: vec![rules(None, 1), rules(Some("app"), 2)],
        }
    }

    fn subject(namespace: &str, labels: &[(&str, &str)]) -> Subject {
        Subject {
            namespace: namespace.to_owned(),
            labels: policy("", None, labels).selector.labels,
            ..Subject::default()
        }
    }

    fn winner(policies: &[ElasticPolicy], subject: &Subject) -> Option<String> {
        rules(policies, subject).map(|(policy, _)| policy.name.clone())
    }

    #[test]
    fn the_most_conditions_win_and_then_the_name_whatever_the_order() {
        let mut policies = vec![
            policy("z-all", None, &[]),
            policy("b-dev", Some("dev"), &[]),
            policy("a-labelled", None, &[("app", "shop")]),
            policy("c-both", Some("dev"), &[("app", "shop")]),
        ];
        for _ in 0..2 {
            let won = |namespace, labels: &[_]| winner(&policies, &subject(namespace, labels));
            assert_eq!(won("dev", &[("app", "shop")]).as_deref(), Some("c-both"));
            assert_eq!(won("dev", &[]).as_deref(), Some("b-dev"));
            assert_eq!(
                won("live", &[("app", "shop")]).as_deref(),
                Some("a-labelled")
            );
            assert_eq!(won("live", &[("app", "other")]).as_deref(), Some("z-all"));
            policies.reverse();
        }
        let equals = [policy("b", Some("dev"), &[]), policy("a", Some("dev"), &[])];
        assert_eq!(winner(&equals, &subject("dev", &[])).as_deref(), Some("a"));
    }

    #[test]
    fn a_named_container_has_its_own_rules() {
        let policies = [policy("a", None, &[])];
        let max = |container: &str| {
            let subject = Subject {
                container: container.to_owned(),
                ..Subject::default()
            };
            let (_, rules) = rules(&policies, &subject)?;
            rules.memory.map(|memory| memory.max)
        };
        assert_eq!(max("app"), Some(Bytes::mib(2)));
        assert_eq!(max("other"), Some(Bytes::mib(1)));
    }

    #[test]
    fn who_is_not_selected_has_none() {
        let policies = [policy("a", Some("dev"), &[("app", "shop")])];
        assert_eq!(rules(&policies, &subject("live", &[("app", "shop")])), None);
        assert_eq!(rules(&policies, &subject("dev", &[])), None);
        let mut named_only = policy("a", None, &[]);
        named_only.containers.remove(0);
        assert_eq!(rules(&[named_only], &subject("dev", &[])), None);
    }
}
