//! Who else moves the requests and limits of a workload: what is theirs is left alone.
//!
//! Two that set the same value take turns for ever, and each takes the other's for somebody's wish. So:
//!
//! - A VerticalPodAutoscaler that may resize running pods (`InPlaceOrRecreate`, `InPlace`, and `Auto`, which leaves it to
//!   the autoscaler how) owns the requests of what it controls, and, unless it says `RequestsOnly`, the limits: it moves
//!   them in proportion. Neither is moved by us.
//! - One that evicts (`Recreate`) compares the requests of running pods with what it recommends, and evicts for them; limits
//!   it sets for new pods only. Requests are its own, limits are ours to move.
//! - One that is `Off`, or only sets what new pods get (`Initial`), touches no running pod.
//! - A HorizontalPodAutoscaler on utilization divides use by requests: whoever lowers a memory request makes it add
//!   replicas. Memory requests are left alone then; limits are in neither, and are moved.
//!
//! (vertical-pod-autoscaler/docs/features.md and pkg/apis/autoscaling.k8s.io/v1/types.go of kubernetes/autoscaler;
//! `GetResourceUtilizationRatio`, pkg/controller/podautoscaler/metrics/utilization.go of Kubernetes.)
//!
//! It must not take one for Off that it does not understand: an update mode that is new counts as one that resizes.

use std::fmt;

use crate::pod::WHOLE_POD;

/// What a pod belongs to: a kind and a name, in its own namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// What a VerticalPodAutoscaler does to running pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Updates {
    /// Nothing.
    Nothing,
    /// It evicts them.
    Evicts,
    /// It resizes them.
    Resizes,
}

impl Updates {
    /// Of its update mode; `None` where it says none, which is `Auto`.
    #[must_use]
    pub fn of(mode: Option<&str>) -> Self {
        match mode {
            Some("Off" | "Initial") => Self::Nothing,
            Some("Recreate") => Self::Evicts,
            _ => Self::Resizes,
        }
    }
}

/// What a VerticalPodAutoscaler says of containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// The container; `None` for all that are not named.
    pub container: Option<String>,
    /// Whether it is left alone.
    pub is_off: bool,
    /// Whether its CPU is controlled.
    pub cpu: bool,
    /// Whether its memory is.
    pub memory: bool,
    /// Whether limits follow.
    pub limits: bool,
}

impl Control {
    /// Of a container of which nothing is said.
    const ALL: Self = Self {
        container: None,
        is_off: false,
        cpu: true,
        memory: true,
        limits: true,
    };
}

/// An autoscaler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Autoscaler {
    /// A VerticalPodAutoscaler.
    Vertical {
        /// What it does to running pods.
        updates: Updates,
        /// To which of their containers.
        controls: Vec<Control>,
    },
    /// A HorizontalPodAutoscaler: of which resources' utilization it goes by, and of which container (all, if `None`).
    Horizontal {
        /// Memory.
        memory: Vec<Option<String>>,
        /// CPU.
        cpu: Vec<Option<String>>,
    },
}

/// An autoscaler of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scales {
    /// Its own name.
    pub name: String,
    /// What it scales.
    pub target: Workload,
    /// How.
    pub autoscaler: Autoscaler,
}

/// Who owns a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimant {
    /// The VerticalPodAutoscaler of this name.
    Vertical(String),
    /// The HorizontalPodAutoscaler of this name.
    Horizontal(String),
}

impl Claimant {
    /// The reason of the Event.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Vertical(_) => "VerticalPodAutoscalerInCharge",
            Self::Horizontal(_) => "HorizontalPodAutoscalerInCharge",
        }
    }
}

/// What is claimed of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Its memory limit.
    pub memory_limit: Option<Claimant>,
    /// Its CPU limit.
    pub cpu_limit: Option<Claimant>,
    /// Its memory request.
    pub memory_request: Option<Claimant>,
    /// A HorizontalPodAutoscaler that goes by what it uses of its requests.
    pub utilization: Option<String>,
}

/// What autoscalers claim of a container of a pod that belongs to these.
#[must_use]
pub fn claims(workloads: &[Workload], container: &str, all: &[Scales]) -> Claims {
    let mut claims = Claims::default();
    for scales in all
        .iter()
        .filter(|scales| workloads.contains(&scales.target))
    {
        match &scales.autoscaler {
            Autoscaler::Vertical { updates, controls } => {
                claims.take_vertical(&scales.name, *updates, control(controls, container));
            }
            Autoscaler::Horizontal { memory, cpu } => {
                let is_meant = |of: &Option<String>| of.as_deref().is_none_or(|of| of == container);
                if memory.iter().any(is_meant) {
                    let claimant = || Claimant::Horizontal(scales.name.clone());
                    claims.memory_request.get_or_insert_with(claimant);
                }
                if memory.iter().chain(cpu).any(is_meant) {
                    claims
                        .utilization
                        .get_or_insert_with(|| scales.name.clone());
                }
            }
        }
    }
    // Nobody but us moves what a pod has of its own.
    if container == WHOLE_POD {
        claims.memory_limit = None;
    }
    claims
}

impl Claims {
    fn take_vertical(&mut self, name: &str, updates: Updates, control: &Control) {
        if updates == Updates::Nothing || control.is_off {
            return;
        }
        let claimant = || Claimant::Vertical(name.to_owned());
        let limits = control.limits && updates == Updates::Resizes;
        if control.memory {
            self.memory_request = Some(claimant());
            if limits {
                self.memory_limit = Some(claimant());
            }
        }
        if control.cpu && limits {
            self.cpu_limit = Some(claimant());
        }
    }
}

/// What is said of a container: by its name, of all others, or nothing (`GetContainerResourcePolicy`,
/// vertical-pod-autoscaler/pkg/utils/vpa/api.go).
fn control<'a>(controls: &'a [Control], container: &str) -> &'a Control {
    let named = |control: &&Control| control.container.as_deref() == Some(container);
    let others = |control: &&Control| control.container.is_none();
    let mut all = controls.iter();
    let found = all.clone().find(named).or_else(|| all.find(others));
    found.unwrap_or(&Control::ALL)
}

impl fmt::Display for Claimant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vertical(name) => write!(
                formatter,
                "the VerticalPodAutoscaler `{name}` sets it: set its updateMode to Off, its controlledValues to RequestsOnly (limits) or its controlledResources to others, or take it out of the policy"
            ),
            Self::Horizontal(name) => write!(
                formatter,
                "the HorizontalPodAutoscaler `{name}` adds replicas when it is lowered: use an AverageValue there, or leave memory.requests out of the policy"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(kind: &str, name: &str) -> Workload {
        Workload {
            kind: kind.to_owned(),
            name: name.to_owned(),
        }
    }

    fn scales(autoscaler: Autoscaler) -> Scales {
        Scales {
            name: "auto".to_owned(),
            target: workload("Deployment", "web"),
            autoscaler,
        }
    }

    fn vertical(mode: Option<&str>, controls: &[Control]) -> Scales {
        scales(Autoscaler::Vertical {
            updates: Updates::of(mode),
            controls: controls.to_vec(),
        })
    }

    /// Memory limit, CPU limit, memory request.
    fn claimed(all: &[Scales], container: &str) -> [bool; 3] {
        let own = [
            workload("ReplicaSet", "web-1"),
            workload("Deployment", "web"),
        ];
        let claims = claims(&own, container, all);
        [
            claims.memory_limit.is_some(),
            claims.cpu_limit.is_some(),
            claims.memory_request.is_some(),
        ]
    }

    #[test]
    fn a_vertical_one_owns_what_it_may_set_in_a_running_pod() {
        let of = |mode| claimed(&[vertical(mode, &[])], "app");
        for mode in [
            None,
            Some("Auto"),
            Some("InPlaceOrRecreate"),
            Some("InPlace"),
            Some("New"),
        ] {
            assert_eq!(of(mode), [true; 3], "{mode:?}");
        }
        assert_eq!(of(Some("Recreate")), [false, false, true]);
        assert_eq!(of(Some("Off")), [false; 3]);
        assert_eq!(of(Some("Initial")), [false; 3]);
    }

    #[test]
    fn what_it_says_of_a_container_holds_before_what_it_says_of_all() {
        let only = |container: Option<&str>, control: Control| Control {
            container: container.map(str::to_owned),
            ..control
        };
        let requests = Control {
            limits: false,
            ..Control::ALL
        };
        let cpu = Control {
            memory: false,
            ..Control::ALL
        };
        let off = Control {
            is_off: true,
            ..Control::ALL
        };
        let controls = [
            only(None, requests),
            only(Some("app"), cpu),
            only(Some("side"), off),
        ];
        let all = [vertical(None, &controls)];
        assert_eq!(claimed(&all, "other"), [false, false, true]);
        assert_eq!(claimed(&all, "app"), [false, true, false]);
        assert_eq!(claimed(&all, "side"), [false; 3]);
        // One that is said nothing of is controlled in full.
        assert_eq!(claimed(&[vertical(None, &controls[2..])], "app"), [true; 3]);
        assert!(!claimed(&[vertical(None, &[])], WHOLE_POD)[0]);
    }

    #[test]
    fn a_horizontal_one_on_utilization_owns_memory_requests_and_no_limit() {
        let horizontal = |memory: &[Option<&str>], cpu: &[Option<&str>]| {
            let owned = |all: &[Option<&str>]| all.iter().map(|of| of.map(str::to_owned)).collect();
            scales(Autoscaler::Horizontal {
                memory: owned(memory),
                cpu: owned(cpu),
            })
        };
        let seen = |all: &Scales, container| {
            let own = [workload("Deployment", "web")];
            claims(&own, container, std::slice::from_ref(all)).utilization
        };
        let memory = horizontal(&[None], &[]);
        assert_eq!(
            claimed(std::slice::from_ref(&memory), "app"),
            [false, false, true]
        );
        assert_eq!(seen(&memory, "app").as_deref(), Some("auto"));
        let cpu = horizontal(&[], &[Some("app")]);
        assert_eq!(claimed(std::slice::from_ref(&cpu), "app"), [false; 3]);
        assert_eq!(
            (seen(&cpu, "app").is_some(), seen(&cpu, "side")),
            (true, None)
        );
        let named = [horizontal(&[Some("app")], &[])];
        assert_eq!(claimed(&named, "side"), [false; 3]);
        // By what is used alone, whatever is requested.
        assert_eq!(seen(&horizontal(&[], &[]), "app"), None);
    }

    #[test]
    fn anothers_autoscaler_claims_nothing() {
        let mut other = vertical(None, &[]);
        other.target = workload("StatefulSet", "web");
        assert_eq!(claimed(&[other.clone()], "app"), [false; 3]);
        // Of two, each has its own.
        let horizontal = scales(Autoscaler::Horizontal {
            memory: vec![None],
            cpu: Vec::new(),
        });
        let evicts = vertical(Some("Recreate"), &[]);
        let own = [workload("Deployment", "web")];
        let both = claims(&own, "app", &[horizontal, evicts, other]);
        let name = || "auto".to_owned();
        assert_eq!(both.memory_request, Some(Claimant::Vertical(name())));
        assert_eq!(both.utilization, Some(name()));
    }
}
