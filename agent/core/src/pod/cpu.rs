//! What a pod's containers may have of CPU, by policy.
//!
//! There is no annotation for it: who wants more than a limit of memory says it in a policy. A container may be meant before
//! it runs, because what is lent to its start must be there when that counts its CPUs.
//!
//! What is left raised of a container that nobody means any more is a wish without rules: it is brought to rest.

use std::collections::BTreeMap;

use thiserror::Error;

use super::{
    Container, Pod, QosClass, meant, mode_beside,
    original::{Original, recorded},
    rest::cpu_at_rest,
};
use crate::{
    autoscalers::Claimant,
    boost::BoostRules,
    elastic::{ContainerRules, CpuRules, ElasticPolicy, Mode},
    quantity,
    units::Cpu,
};

/// Written by Bellows at adoption: `CONTAINER=LIMIT` of CPU as they were, with commas between them.
pub const ORIGINAL_CPU: &str = "bellows.dev/original-cpu";

/// What a container may have of CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuWish {
    /// Its index in the spec.
    pub index: usize,
    /// The runtime's id while it runs.
    pub id: Option<String>,
    /// The limit in the spec, as written.
    pub limit_text: String,
    /// The same.
    pub limit: Cpu,
    /// The limit as it was.
    pub original: Cpu,
    /// The same as it was written.
    pub original_text: String,
    /// What its quota may be; `None` leaves it at what it was.
    pub rules: Option<CpuRules>,
    /// What it is lent.
    pub boosts: Vec<BoostRules>,
    /// Whether the original stands on the pod already.
    pub recorded: bool,
    /// Whether somebody else has changed the limit since the original was recorded.
    pub foreign: bool,
    /// Why it is only brought to rest although a policy means it.
    pub refusal: Option<CpuRefusal>,
}

impl CpuWish {
    /// Whether anybody asks for more than what it was.
    #[must_use]
    pub fn has_rules(&self) -> bool {
        self.rules.is_some() || !self.boosts.is_empty()
    }

    /// Whether we have raised it in the spec: what somebody else has set is the original.
    #[must_use]
    pub fn is_left(&self) -> bool {
        self.limit != self.original
    }

    /// The same at rest.
    #[must_use]
    pub fn without_rules(&self) -> Self {
        Self {
            rules: None,
            boosts: Vec::new(),
            ..self.clone()
        }
    }

    /// The same, brought to rest because it is refused. It needs no record of what it was: that stands there, or its request.
    pub(super) fn refused(&self, refusal: CpuRefusal) -> Self {
        Self {
            recorded: true,
            refusal: Some(refusal),
            ..self.without_rules()
        }
    }
}

/// Why a container does not get what a policy says of CPU.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CpuRefusal {
    /// A size does not parse.
    #[error("container `{container}`: its CPU limit is no amount of CPU: {why}")]
    Limit {
        /// The container.
        container: String,
        /// What is wrong.
        why: String,
    },
    /// Requests would have to follow.
    #[error(
        "the pod is Guaranteed: raising its CPU limit alone would change its QoS class, which the API refuses; set a CPU request below the limit"
    )]
    Guaranteed,
    /// The pod is static.
    #[error("the pod is static: the API cannot resize it; change its file on the node")]
    Static,
    /// The pod is critical.
    #[error(
        "the pod is critical to the system (priority class system-node-critical or system-cluster-critical): it is left alone"
    )]
    Critical,
    /// A resize would restart the container.
    #[error(
        "container `{0}` has resizePolicy RestartContainer for cpu: a resize would restart it; use NotRequired"
    )]
    RestartsOnResize(String),
    /// The pod has a limit of its own.
    #[error(
        "the pod has a CPU limit at its own level, which is not moved: leave that out, or the policy's cpu and boosts"
    )]
    WholePod,
    /// The maximum is below the limit.
    #[error(
        "cpu.max of the policy {policy} is {max}, below the CPU limit of {limit}: raise it, or lower the limit"
    )]
    MaximumBelowLimit {
        /// The policy.
        policy: String,
        /// The maximum.
        max: Cpu,
        /// The limit.
        limit: Cpu,
    },
    /// An autoscaler sets it.
    #[error("container `{container}`: its CPU limit is left alone: {claimant}")]
    Claimed {
        /// The container.
        container: String,
        /// Which.
        claimant: Claimant,
    },
}

impl CpuRefusal {
    /// Whether a limit may be lowered all the same that we have raised before: the API takes that, and restarts nobody.
    const fn may_rest(&self) -> bool {
        !matches!(
            self,
            Self::Static | Self::Guaranteed | Self::RestartsOnResize(_)
        )
    }

    /// The reason of the Event.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Limit { .. } => "NoCpuLimit",
            Self::Guaranteed => "GuaranteedNotSupported",
            Self::Static => "StaticPodNotSupported",
            Self::Critical => "CriticalPodNotSupported",
            Self::RestartsOnResize(_) => "ResizeRestartsContainer",
            Self::Claimed { claimant, .. } => claimant.reason(),
            Self::WholePod => "PodLevelCpuNotSupported",
            Self::MaximumBelowLimit { .. } => "InvalidLimit",
        }
    }
}

/// The least quota that the kernel takes, which the kubelet makes of any less (`MinMilliCPU` of 10 in a period of 100 ms).
pub const LEAST: Cpu = Cpu::millis(10);

/// By container; `Err` for one that a policy means and that cannot have it.
pub type CpuWishes = BTreeMap<String, Result<CpuWish, CpuRefusal>>;

/// What the containers of a pod may have of CPU; nothing if it is ending. Containers without a CPU limit are not meant:
/// there is nothing to raise.
#[must_use]
pub fn cpu_wishes(pod: &Pod, policies: &[ElasticPolicy]) -> CpuWishes {
    if pod.ending {
        return CpuWishes::new();
    }
    let containers = pod.containers.iter().enumerate();
    let wishes = containers.filter_map(|(index, container)| {
        let text = container.cpu_limit.as_ref()?;
        let wish = wish(pod, policies, index, container, text).transpose()?;
        Some((container.name.clone(), wish))
    });
    wishes.collect()
}

/// The containers of a pod to which a policy lends memory. None of it is: `spec.resources` has no place for what is lent.
#[must_use]
pub fn memory_boosts<'a>(pod: &'a Pod, policies: &[ElasticPolicy]) -> Vec<&'a str> {
    let containers = pod.containers.iter().filter(|_| !pod.ending);
    let is_lent = |container: &&Container| {
        let rules = acting(pod, policies, container).map(|(_, rules)| rules);
        let mut boosts = rules.iter().flat_map(|rules| &rules.boosts);
        boosts.any(|boost| boost.memory.is_some())
    };
    let names = containers
        .filter(is_lent)
        .map(|container| container.name.as_str());
    names.collect()
}

fn wish(
    pod: &Pod,
    policies: &[ElasticPolicy],
    index: usize,
    container: &Container,
    text: &str,
) -> Result<Option<CpuWish>, CpuRefusal> {
    let name = &container.name;
    let size = |text: &str| {
        quantity::parse_cpu(text).map_err(|why| CpuRefusal::Limit {
            container: name.clone(),
            why,
        })
    };
    let asked = asked(pod, policies, container);
    let recorded = recorded(pod, ORIGINAL_CPU, name);
    if asked.is_none() && recorded.is_none() {
        return Ok(None);
    }
    let limit = size(text)?;
    let recorded = recorded.map(|original| Ok((size(original)?, original)));
    let recorded: Option<(Cpu, &str)> = recorded.transpose()?;
    let manager = container.cpu_limit_manager.as_deref();
    let mut original = Original::of((limit, text), manager, recorded);
    let at_rest = cpu_at_rest(pod, container, limit, original.value);
    let at_rest_text = if at_rest == original.value {
        original.text.to_owned()
    } else {
        original.value = at_rest;
        // What is only brought to rest needs no record of it.
        original.is_recorded &= asked.is_none();
        at_rest.to_string()
    };
    if asked.is_none() && (original.is_foreign || original.value == limit) {
        return Ok(None);
    }
    let (policy, rules, boosts) = asked.unwrap_or_default();
    let too_low = rules.filter(|rules| rules.max < original.value);
    let too_low = too_low.map(|rules| CpuRefusal::MaximumBelowLimit {
        policy,
        max: rules.max,
        limit: original.value,
    });
    let wish = CpuWish {
        index,
        id: container.id.clone(),
        limit_text: text.to_owned(),
        limit,
        original: original.value,
        original_text: at_rest_text,
        rules,
        boosts,
        recorded: original.is_recorded,
        foreign: original.is_foreign,
        refusal: None,
    };
    match refusal(pod, container).or(too_low) {
        None => Ok(Some(wish)),
        // A predecessor may have raised it.
        Some(refusal) if wish.is_left() && refusal.may_rest() => Ok(Some(wish.refused(refusal))),
        Some(refusal) => Err(refusal),
    }
}

/// The policy that means a container, and what it says of CPU.
fn asked(
    pod: &Pod,
    policies: &[ElasticPolicy],
    container: &Container,
) -> Option<(String, Option<CpuRules>, Vec<BoostRules>)> {
    let (policy, rules) = acting(pod, policies, container)?;
    let is_more = rules.cpu.is_some() || rules.boosts.iter().any(|boost| boost.cpu.is_some());
    let boosts = rules.boosts.clone();
    is_more.then(|| (policy.name.clone(), rules.cpu, boosts))
}

/// The policy that means a container and may change it, and what it says.
fn acting<'a>(
    pod: &Pod,
    policies: &'a [ElasticPolicy],
    container: &Container,
) -> Option<(&'a ElasticPolicy, &'a ContainerRules)> {
    let own = mode_beside(pod).ok()?;
    let (policy, rules) = meant(pod, policies, &container.name)?;
    (own.unwrap_or(policy.mode) == Mode::Act).then_some((policy, rules))
}

fn refusal(pod: &Pod, container: &Container) -> Option<CpuRefusal> {
    if pod.is_static {
        Some(CpuRefusal::Static)
    } else if pod.is_critical() {
        Some(CpuRefusal::Critical)
    } else if pod.qos == QosClass::Guaranteed {
        Some(CpuRefusal::Guaranteed)
    } else if pod.has_cpu_limit {
        Some(CpuRefusal::WholePod)
    } else if container.restarts_on_cpu_resize {
        Some(CpuRefusal::RestartsOnResize(container.name.clone()))
    } else {
        None
    }
}

/// Which container of a pod a cgroup is that has these limits, of those that do not run yet: the API says it only once it
/// runs. `None` if it could be several, or none.
#[must_use]
pub fn starting<'a>(
    pod: &'a Pod,
    wishes: &CpuWishes,
    id: &str,
    (cpu, period): (Cpu, u64),
    memory: Option<crate::Bytes>,
) -> Option<&'a str> {
    let has_limits = |own_cpu: &Option<String>, own_memory: &Option<String>| {
        let own_cpu = own_cpu.as_deref().map(quantity::parse_cpu);
        let own_memory = own_memory.as_deref().map(quantity::parse);
        let own_memory = own_memory.map(|limit| limit.map(crate::Bytes::page_floor));
        let is_own = |own: Cpu| own.max(LEAST).is_set_as(cpu, period);
        own_cpu.is_some_and(|own| own.is_ok_and(is_own))
            && own_memory.transpose().ok() == Some(memory)
    };
    let (containers, before) = (&pod.containers, &pod.init_containers);
    let mut ids = containers.iter().map(|container| &container.id);
    let mut ids = ids.by_ref().chain(before.iter().map(|init| &init.id));
    if ids.any(|own| own.as_deref() == Some(id)) {
        // The API has said meanwhile whose it is.
        return None;
    }
    let mut before = before.iter().filter(|init| !init.is_done);
    if before.any(|init| has_limits(&init.cpu_limit, &init.memory_limit)) {
        return None;
    }
    let has_limits =
        |container: &&Container| has_limits(&container.cpu_limit, &container.memory_limit);
    let mut meant = containers.iter().filter(has_limits);
    let (only, other) = (meant.next()?, meant.next());
    let is_meant = matches!(wishes.get(&only.name), Some(Ok(wish)) if !wish.boosts.is_empty());
    (other.is_none() && is_meant).then_some(only.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Bytes, Nanos,
        boost::{Trigger, Until},
        elastic::{ContainerRules, Selector},
        pod::{InitContainer, MANAGER, MODE, tests::pod},
    };

    fn policy(cpu: Option<Cpu>, boost: Option<Cpu>) -> ElasticPolicy {
        let boost = boost.map(|cpu| BoostRules {
            on: Trigger::Start,
            cpu: Some(cpu),
            memory: None,
            until: Until {
                ready: None,
                exit: false,
                idle: None,
                at_most: Nanos::millis(60_000),
            },
        });
        ElasticPolicy {
            name: "java".to_owned(),
            selector: Selector::default(),
            mode: Mode::Act,
            containers: vec![ContainerRules {
                name: None,
                memory: None,
                cpu: cpu.map(|max| CpuRules {
                    max,
                    throttled_per_mille: 10,
                }),
                boosts: boost.into_iter().collect(),
            }],
        }
    }

    fn limited(limit: &str, manager: &str, annotations: &[(&str, &str)]) -> Pod {
        let mut pod = pod(annotations);
        pod.containers[0].cpu_limit = Some(limit.to_owned());
        pod.containers[0].cpu_limit_manager = Some(manager.to_owned());
        pod
    }

    fn only(pod: &Pod, policies: &[ElasticPolicy]) -> Option<Result<CpuWish, CpuRefusal>> {
        cpu_wishes(pod, policies).into_values().next()
    }

    #[test]
    fn a_policy_means_containers_with_a_limit_and_an_opt_out_wins() {
        let policies = [policy(Some(Cpu::millis(2000)), None)];
        let meant = only(&limited("250m", "kubectl", &[]), &policies);
        let meant = meant.unwrap().unwrap();
        assert_eq!((meant.original, meant.recorded), (Cpu::millis(250), false));
        assert!(meant.has_rules());
        assert_eq!(only(&pod(&[]), &policies), None);
        for mode in ["Off", "Observe", "of"] {
            let out = limited("250m", "kubectl", &[(MODE, mode)]);
            assert_eq!(only(&out, &policies), None, "{mode}");
        }
        let mut observing = policies;
        observing[0].mode = Mode::Observe;
        let mut asking = limited("250m", "kubectl", &[(MODE, "Act")]);
        assert!(only(&asking, &observing).is_some());
        asking.is_only_of_memory = true;
        assert_eq!(only(&asking, &observing), None);
    }

    #[test]
    fn who_is_lent_memory_is_known_with_or_without_a_cpu_limit() {
        let lent = |cpu| {
            let mut policy = policy(None, Some(Cpu::millis(500)));
            let boost = &mut policy.containers[0].boosts[0];
            (boost.cpu, boost.memory) = (cpu, Some(Bytes::mib(64)));
            [policy]
        };
        let only_memory = lent(None);
        assert_eq!(only(&limited("250m", "kubectl", &[]), &only_memory), None);
        let mut ending = pod(&[]);
        ending.ending = true;
        for out in [ending, pod(&[(MODE, "Observe")])] {
            assert_eq!(memory_boosts(&out, &only_memory), [""; 0]);
        }
        for pod in [pod(&[]), limited("250m", "kubectl", &[])] {
            assert_eq!(memory_boosts(&pod, &only_memory), ["app"]);
            assert_eq!(memory_boosts(&pod, &lent(Some(Cpu::millis(500)))), ["app"]);
            assert_eq!(memory_boosts(&pod, &[policy(None, None)]), [""; 0]);
        }
    }

    #[test]
    fn what_is_left_raised_is_brought_to_rest_unless_somebody_else_has_set_it() {
        let was = [(ORIGINAL_CPU, "app=250m")];
        let left = only(&limited("2", MANAGER, &was), &[]).unwrap().unwrap();
        assert!(!left.has_rules());
        assert_eq!(
            (left.limit, left.original),
            (Cpu::millis(2000), Cpu::millis(250))
        );
        assert_eq!(only(&limited("250m", MANAGER, &was), &[]), None);
        assert_eq!(only(&limited("2", "kubectl", &was), &[]), None);
    }

    #[test]
    fn somebody_elses_change_is_the_new_original() {
        let policies = [policy(None, Some(Cpu::millis(2000)))];
        let was = [(ORIGINAL_CPU, "app=250m")];
        let wish = only(&limited("500m", "kubectl", &was), &policies);
        let wish = wish.unwrap().unwrap();
        assert!(wish.foreign && !wish.recorded);
        assert_eq!(wish.original_text, "500m");
        let ours = only(&limited("2", MANAGER, &was), &policies);
        assert_eq!(ours.unwrap().unwrap().original_text, "250m");
    }

    #[test]
    fn what_a_predecessor_has_raised_comes_to_rest_although_it_is_refused() {
        let was = [(ORIGINAL_CPU, "app=250m")];
        let policies = [policy(Some(Cpu::millis(200)), None)];
        let raised = limited("2", MANAGER, &was);
        let left = only(&raised, &policies).unwrap().unwrap();
        assert!(!left.has_rules());
        let refusal = left.refusal.unwrap();
        assert_eq!(
            (refusal.reason(), left.original),
            ("InvalidLimit", Cpu::millis(250))
        );
        // A request that was raised meanwhile changes nothing about that.
        let mut requests = raised.clone();
        requests.containers[0].cpu_request = Some("500m".to_owned());
        let left = only(&requests, &policies).unwrap().unwrap();
        assert_eq!((left.original, left.recorded), (Cpu::millis(501), true));
        // Then it is only refused, and so is what is somebody else's.
        let at_rest = limited("250m", MANAGER, &was);
        only(&at_rest, &policies).unwrap().unwrap_err();
        let theirs = limited("2", "kubectl", &was);
        only(&theirs, &policies).unwrap().unwrap_err();
        // Nobody is restarted for it.
        let mut restarts = raised;
        restarts.containers[0].restarts_on_cpu_resize = true;
        only(&restarts, &policies).unwrap().unwrap_err();
    }

    #[test]
    fn a_request_that_was_raised_meanwhile_is_the_least() {
        let was = [(ORIGINAL_CPU, "app=250m")];
        let mut raised = limited("2", MANAGER, &was);
        raised.containers[0].cpu_request = Some("500m".to_owned());
        let policies = [policy(Some(Cpu::millis(4000)), None)];
        let wish = only(&raised, &policies).unwrap().unwrap();
        assert_eq!(
            (wish.original, wish.original_text.as_str()),
            (Cpu::millis(501), "501m"),
            "with exactly the request the pod might become Guaranteed"
        );
        assert!(!wish.recorded && !wish.foreign, "it is the new original");
        // Without a policy it comes down to that, and no further.
        let left = only(&raised, &[]).unwrap().unwrap();
        assert_eq!((left.original, left.recorded), (Cpu::millis(501), true));
        for limit in ["501m", "500m"] {
            raised.containers[0].cpu_limit = Some(limit.to_owned());
            assert_eq!(only(&raised, &[]), None);
        }
        // One that always was the request is what it was, unless the pod would be Guaranteed with it.
        raised.containers[0].cpu_limit = Some("2".to_owned());
        raised.containers[0].cpu_request = Some("250m".to_owned());
        let original = |pod: &Pod| only(pod, &policies).unwrap().unwrap().original;
        assert_eq!(original(&raised), Cpu::millis(250));
        let mut same = raised.clone();
        same.containers[0].memory_request = same.containers[0].memory_limit.clone();
        assert_eq!(original(&same), Cpu::millis(251));
        raised.containers[0].cpu_request = Some("100m".to_owned());
        let wish = only(&raised, &policies).unwrap().unwrap();
        assert_eq!((wish.original, wish.recorded), (Cpu::millis(250), true));
    }

    #[test]
    fn what_cannot_be_resized_is_refused() {
        let policies = [policy(Some(Cpu::millis(200)), None)];
        let refusal = |change: &dyn Fn(&mut Pod)| {
            let mut pod = limited("250m", "kubectl", &[]);
            change(&mut pod);
            only(&pod, &policies).unwrap().unwrap_err()
        };
        assert_eq!(refusal(&|pod| pod.is_static = true), CpuRefusal::Static);
        let critical = refusal(&|pod| pod.priority = 2_000_000_000);
        assert_eq!(critical, CpuRefusal::Critical);
        let guaranteed = refusal(&|pod| pod.qos = QosClass::Guaranteed);
        assert_eq!(guaranteed, CpuRefusal::Guaranteed);
        assert_eq!(
            refusal(&|pod| pod.has_cpu_limit = true),
            CpuRefusal::WholePod
        );
        let restarts = refusal(&|pod| pod.containers[0].restarts_on_cpu_resize = true);
        assert_eq!(restarts.reason(), "ResizeRestartsContainer");
        assert_eq!(refusal(&|_| {}).reason(), "InvalidLimit");
        let odd = refusal(&|pod| pod.containers[0].cpu_limit = Some("2 CPUs".to_owned()));
        assert_eq!(odd.reason(), "NoCpuLimit");
    }

    #[test]
    fn a_cgroup_is_told_by_its_limits_before_the_api_says_whose_it_is() {
        let policies = [policy(None, Some(Cpu::millis(2000)))];
        let mut pod = limited("250m", "kubectl", &[]);
        let side = Container {
            name: "side".to_owned(),
            memory_limit: Some("32Mi".to_owned()),
            ..pod.containers[0].clone()
        };
        pod.containers.push(side);
        let find = |pod: &Pod, cpu, mib| {
            let wishes = cpu_wishes(pod, &policies);
            let found = starting(pod, &wishes, "new", (cpu, 100_000), Some(Bytes::mib(mib)));
            found.map(str::to_owned)
        };
        let quarter = Cpu::millis(250);
        assert_eq!(find(&pod, quarter, 64).as_deref(), Some("app"));
        assert_eq!(find(&pod, quarter, 32).as_deref(), Some("side"));
        assert_eq!(find(&pod, quarter, 16), None);
        assert_eq!(find(&pod, Cpu::millis(300), 64), None);
        // As systemd has it after a daemon-reload.
        pod.containers[0].cpu_limit = Some("125m".to_owned());
        assert_eq!(find(&pod, Cpu::millis(130), 64).as_deref(), Some("app"));
        assert_eq!(find(&pod, Cpu::millis(120), 64), None);
        pod.containers[0].cpu_limit = Some("250m".to_owned());
        // A sidecar, or what runs before, may have the same.
        let init = |is_done: bool| InitContainer {
            name: "init".to_owned(),
            is_sidecar: !is_done,
            id: None,
            memory_limit: Some("64Mi".to_owned()),
            cpu_limit: Some("250m".to_owned()),
            is_done,
        };
        pod.init_containers = vec![init(true)];
        assert_eq!(find(&pod, quarter, 64).as_deref(), Some("app"));
        pod.init_containers.push(init(false));
        assert_eq!(find(&pod, quarter, 64), None, "it could be the sidecar");
        assert_eq!(find(&pod, quarter, 32).as_deref(), Some("side"));
        pod.init_containers[1].id = Some("new".to_owned());
        assert_eq!(find(&pod, quarter, 32), None, "it is the sidecar");
        pod.init_containers.clear();
        pod.containers[1].id = Some("new".to_owned());
        assert_eq!(find(&pod, quarter, 64), None, "it is another's");
        pod.containers[1].id = None;
        pod.containers[1].memory_limit = Some("64Mi".to_owned());
        assert_eq!(find(&pod, quarter, 64), None, "it could be either");
    }
}
