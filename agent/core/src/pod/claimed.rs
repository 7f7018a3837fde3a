//! What an autoscaler claims is not asked for ([`crate::autoscalers`]).
//!
//! What was moved before it came is a wish without rules, or none: it is brought to rest, unless the autoscaler has set it
//! meanwhile, which is somebody else's change as any other.

use super::{CpuRefusal, CpuWish, CpuWishes, Refusal, RequestRefusal, RequestWishes, Wishes};
use crate::{autoscalers::Claims, elastic::Mode};

/// Leaves memory limits alone that are claimed. Who is only watched may be.
pub fn yield_limits(wishes: &mut Wishes, claims: impl Fn(&str) -> Claims) {
    for (container, wish) in wishes {
        if wish.as_ref().is_ok_and(|wish| wish.mode == Mode::Act)
            && let Some(claimant) = claims(container).memory_limit
        {
            let container = container.clone();
            *wish = Err(Refusal::Claimed {
                container,
                claimant,
            });
        }
    }
}

/// The same of CPU limits.
pub fn yield_cpu(wishes: &mut CpuWishes, claims: impl Fn(&str) -> Claims) {
    for (container, wish) in wishes {
        if wish.as_ref().is_ok_and(CpuWish::has_rules)
            && let Some(claimant) = claims(container).cpu_limit
        {
            let refusal = CpuRefusal::Claimed {
                container: container.clone(),
                claimant,
            };
            *wish = match wish.as_ref() {
                // A predecessor may have raised it.
                Ok(left) if left.is_left() => Ok(left.refused(refusal)),
                _ => Err(refusal),
            };
        }
    }
}

/// The same of memory requests; returns what is to be told of those that are given back.
pub fn yield_requests(
    wishes: &mut RequestWishes,
    claims: impl Fn(&str) -> Claims,
) -> Vec<(String, RequestRefusal)> {
    let mut told = Vec::new();
    for (container, wish) in wishes {
        let Ok(asked) = wish.as_mut() else {
            continue;
        };
        if asked.rules.is_none() {
            continue;
        }
        let Some(claimant) = claims(container).memory_request else {
            continue;
        };
        let refusal = RequestRefusal::Claimed {
            container: container.clone(),
            claimant,
        };
        if asked.recorded {
            asked.rules = None;
            told.push((container.clone(), refusal));
        } else {
            *wish = Err(refusal);
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::{super::tests::pod, *};
    use crate::{
        autoscalers::Claimant,
        elastic::{ContainerRules, CpuRules, ElasticPolicy, MemoryRules, Selector},
        pod::{
            MANAGER, ORIGINAL_CPU, ORIGINAL_REQUESTS, Pod, cpu_wishes, only_observe,
            request_wishes, wishes as wishes_of,
        },
        requests::RequestRules,
        units::{Bytes, Cpu, Nanos},
    };

    fn policies() -> Vec<ElasticPolicy> {
        let requests = RequestRules {
            right_size: true,
            make_room: false,
            floor: Bytes::mib(1),
            margin_per_mille: 250,
            observe: Nanos(0),
        };
        let memory = MemoryRules {
            heap: None,
            max: Bytes::mib(1024),
            floor: None,
            shrink_after: Nanos(0),
            hold_at_most: None,
            order: crate::elastic::Order::PatchFirst,
            parallelism: crate::elastic::Parallelism::Unchanged,
            requests: Some(requests),
        };
        vec![ElasticPolicy {
            name: "p".to_owned(),
            selector: Selector::default(),
            mode: Mode::Act,
            containers: vec![ContainerRules {
                name: None,
                memory: Some(memory),
                cpu: Some(CpuRules {
                    max: Cpu::millis(2000),
                    throttled_per_mille: 0,
                }),
                boosts: Vec::new(),
            }],
        }]
    }

    fn all(claims: &Claims) -> impl Fn(&str) -> Claims {
        |container| {
            if container == "app" {
                claims.clone()
            } else {
                Claims::default()
            }
        }
    }

    fn by() -> Option<Claimant> {
        Some(Claimant::Vertical("v".to_owned()))
    }

    fn of(annotations: &[(&str, &str)]) -> Pod {
        let mut pod = pod(annotations);
        pod.containers[0].cpu_limit = Some("500m".to_owned());
        pod
    }

    #[test]
    fn a_claimed_limit_is_not_moved_and_may_be_watched() {
        let limit = Claims {
            memory_limit: by(),
            ..Claims::default()
        };
        let mut wishes = wishes_of(&of(&[]), &policies());
        yield_limits(&mut wishes, |_| Claims::default());
        assert!(wishes["app"].is_ok());
        let mut watched = wishes_of(&of(&[]), &policies());
        only_observe(&mut watched);
        yield_limits(&mut watched, all(&limit));
        assert!(watched["app"].is_ok());
        yield_limits(&mut wishes, all(&limit));
        let refusal = wishes["app"].as_ref().unwrap_err();
        assert_eq!(refusal.reason(), "VerticalPodAutoscalerInCharge");
        assert!(refusal.to_string().contains("`v`"), "{refusal}");
        // That of CPU is another.
        let mut cpu = cpu_wishes(&of(&[]), &policies());
        yield_cpu(&mut cpu, all(&limit));
        assert!(cpu["app"].is_ok());
        let claims = Claims {
            cpu_limit: by(),
            ..Claims::default()
        };
        yield_cpu(&mut cpu, all(&claims));
        assert_eq!(
            cpu["app"].as_ref().unwrap_err().reason(),
            "VerticalPodAutoscalerInCharge"
        );
        // What was raised before comes to rest, and it is told why.
        let mut raised = of(&[(ORIGINAL_CPU, "app=250m")]);
        raised.containers[0].cpu_limit = Some("2".to_owned());
        raised.containers[0].cpu_limit_manager = Some(MANAGER.to_owned());
        let mut cpu = cpu_wishes(&raised, &policies());
        yield_cpu(&mut cpu, all(&claims));
        let left = cpu["app"].as_ref().unwrap();
        assert!(!left.has_rules());
        let told = left.refusal.as_ref().map(CpuRefusal::reason);
        assert_eq!(told, Some("VerticalPodAutoscalerInCharge"));
    }

    #[test]
    fn a_claimed_request_is_left_alone_or_given_back() {
        let claims = Claims {
            memory_request: Some(Claimant::Horizontal("h".to_owned())),
            ..Claims::default()
        };
        let mut wishes = request_wishes(&of(&[]), &policies());
        assert!(yield_requests(&mut wishes, all(&claims)).is_empty());
        let refusal = wishes["app"].as_ref().unwrap_err();
        assert_eq!(refusal.reason(), "HorizontalPodAutoscalerInCharge");
        let mut lowered = of(&[(ORIGINAL_REQUESTS, "app=32Mi")]);
        lowered.containers[0].request_manager = Some(MANAGER.to_owned());
        let mut wishes = request_wishes(&lowered, &policies());
        assert!(wishes["app"].as_ref().unwrap().rules.is_some());
        assert_eq!(yield_requests(&mut wishes, all(&claims)).len(), 1);
        assert!(wishes["app"].as_ref().unwrap().rules.is_none());
        // Once without rules it is told no more.
        assert!(yield_requests(&mut wishes, all(&claims)).is_empty());
    }
}
