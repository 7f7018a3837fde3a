use super::*;
use crate::pod::WHOLE_POD;

const MEMORY: What = What::MemoryLimit;
const NOW: Nanos = Nanos(0);

fn amounts(limit: u64, request: u64) -> Amounts {
    Amounts {
        memory_limit: Some(limit),
        memory_request: Some(request),
        ..Amounts::default()
    }
}

fn pod(uid: &str, containers: &[(&str, u64)]) -> CountedPod {
    let containers = containers.iter();
    let containers: BTreeMap<String, Amounts> = containers
        .map(|&(name, limit)| (name.to_owned(), amounts(limit, limit / 2)))
        .collect();
    let all = containers.values().copied();
    CountedPod {
        namespace: "dev".to_owned(),
        uid: uid.to_owned(),
        together: all.fold(Amounts::default(), Amounts::plus),
        containers,
        ..CountedPod::default()
    }
}

fn quota(hard: u64, used: u64) -> Quota {
    Quota {
        amounts: [(MEMORY, Amount { hard, used })].into(),
        ..Quota::default()
    }
}

fn range(is_of_pod: bool, max: Option<u64>, ratio_per_mille: Option<u64>) -> Range {
    Range {
        measure: Measure::Memory,
        is_of_pod,
        max,
        min: None,
        ratio_per_mille,
    }
}

fn with(pods: &[CountedPod]) -> Allowances {
    let mut all = Allowances::default();
    for pod in pods {
        all.pod(pod.clone());
    }
    all
}

fn most(all: &Allowances, uid: &str, container: &str) -> Option<u64> {
    all.most((uid, container), MEMORY, NOW)
        .map(|bound| bound.most)
}

#[test]
fn without_rules_nothing_bounds() {
    let mut all = with(&[pod("a", &[("app", 64)])]);
    assert_eq!(most(&all, "a", "app"), None);
    // Another namespace's.
    all.quota("other", "q", Some(quota(1, 1)));
    all.range("other", "r", Some(vec![range(false, Some(1), None)]));
    assert_eq!(most(&all, "a", "app"), None);
    assert_eq!(most(&all, "gone", "app"), None);
}

#[test]
fn what_is_new_is_new_to_a_pod() {
    let mut all = with(&[pod("a", &[("app", 64)])]);
    assert!(!all.range("other", "r", Some(vec![range(false, Some(1), None)])));
    assert!(!all.quota("other", "q", Some(quota(1, 1))));
    assert!(all.range("dev", "r", Some(vec![range(false, Some(90), None)])));
    assert!(!all.range("dev", "r", Some(vec![range(false, Some(90), None)])));
    assert!(all.quota("dev", "q", Some(quota(100, 64))));
    // Namespaces whose names are near are others.
    assert!(!all.range("de", "r", Some(vec![range(false, Some(1), None)])));
    assert!(!all.range("dev-2", "r", Some(vec![range(false, Some(1), None)])));
    assert_eq!(most(&all, "a", "app"), Some(90));
    let own = BTreeSet::from([("dev".to_owned(), "r".to_owned())]);
    assert!(!all.keep_ranges(&own));
    assert!(all.keep_quotas(&own));
    assert!(all.keep_ranges(&BTreeSet::new()));
    assert_eq!(most(&all, "a", "app"), None);
}

#[test]
fn a_limit_range_bounds_a_container_by_its_maximum_and_by_its_request() {
    let mut all = with(&[pod("a", &[("app", 64), ("side", 10)])]);
    all.range("dev", "r", Some(vec![range(false, Some(200), None)]));
    assert_eq!(most(&all, "a", "app"), Some(200));
    all.range("dev", "r", Some(vec![range(false, Some(200), Some(2500))]));
    let bound = all.most(("a", "app"), MEMORY, NOW).unwrap();
    assert_eq!((bound.most, bound.by.reason()), (80, Reached::LimitRange));
    assert!(bound.to_string().contains("2.500 times"), "{bound}");
    // Without a request the API refuses whatever limit there is.
    let mut none = pod("a", &[("app", 64)]);
    none.containers.insert(
        "app".to_owned(),
        Amounts {
            memory_request: None,
            ..amounts(64, 0)
        },
    );
    all.pod(none);
    assert_eq!(most(&all, "a", "app"), Some(0));
    // What is said of CPU does not bound memory.
    let cpu = Range {
        measure: Measure::Cpu,
        ..range(false, Some(1), None)
    };
    all.range("dev", "r", Some(vec![cpu]));
    assert_eq!(most(&all, "a", "app"), None);
}

#[test]
fn a_limit_range_of_pods_counts_all_containers_and_what_they_ask_for() {
    let mut all = with(&[pod("a", &[("app", 64), ("side", 36)])]);
    all.range("dev", "r", Some(vec![range(true, Some(200), None)]));
    assert_eq!(most(&all, "a", "app"), Some(164));
    all.ask(("a", "side"), MEMORY, 76);
    assert_eq!(most(&all, "a", "app"), Some(124));
    // The sum of requests is 50.
    all.range("dev", "r", Some(vec![range(true, None, Some(3000))]));
    assert_eq!(most(&all, "a", "app"), Some(74));
}

#[test]
fn a_request_is_kept_as_large_as_its_limit_needs_it() {
    let mut all = with(&[pod("a", &[("app", 64), ("side", 36)])]);
    let least = |all: &Allowances, limit| all.least_request(("a", "app"), limit);
    assert_eq!(least(&all, 200), 0);
    all.range("dev", "r", Some(vec![range(false, Some(100), Some(4000))]));
    assert_eq!(least(&all, 200), 51);
    // Of 236 together a quarter, of which the other one has 18.
    all.range("dev", "r", Some(vec![range(true, None, Some(4000))]));
    assert_eq!(least(&all, 200), 60 - 18);
    // What is lowered to that may have that limit.
    let mut lowered = pod("a", &[("app", 64), ("side", 36)]);
    lowered.together.memory_request = Some(60);
    all.pod(lowered);
    assert!(most(&all, "a", "app") >= Some(200));
    assert_eq!(all.least_request(("gone", "app"), 200), 0);
    // What it has now it must be able to keep.
    all.pod(pod("a", &[("app", 64), ("side", 36)]));
    assert_eq!(least(&all, 0), 25 - 18 + 1);
    let at_least = |is_of_pod| Range {
        min: Some(30),
        ..range(is_of_pod, None, None)
    };
    all.range("dev", "r", Some(vec![at_least(false)]));
    assert_eq!(least(&all, 200), 30);
    // The other one has 18.
    all.range("dev", "r", Some(vec![at_least(true)]));
    assert_eq!(least(&all, 200), 12);
}

#[test]
fn a_request_comes_back_as_far_as_its_quota_allows() {
    let mut all = with(&[pod("a", &[("app", 64)]), pod("b", &[("app", 64)])]);
    let amounts = [(
        What::MemoryRequest,
        Amount {
            hard: 100,
            used: 64,
        },
    )]
    .into();
    let quota = Quota {
        amounts,
        ..Quota::default()
    };
    all.quota("dev", "q", Some(quota));
    let most = |all: &Allowances, uid| {
        let bound = all.most((uid, "app"), What::MemoryRequest, NOW);
        bound.map(|bound| bound.most)
    };
    assert_eq!(most(&all, "a"), Some(68));
    all.ask(("a", "app"), What::MemoryRequest, 52);
    assert_eq!((most(&all, "a"), most(&all, "b")), (Some(68), Some(48)));
    // A limit is another matter.
    assert_eq!(all.most(("a", "app"), MEMORY, NOW), None);
}

#[test]
fn a_pods_own_limit_is_what_counts() {
    let mut whole = pod("a", &[("app", 64)]);
    whole.own = amounts(100, 50);
    let mut all = with(&[whole]);
    all.range("dev", "r", Some(vec![range(true, Some(300), None)]));
    all.quota("dev", "q", Some(quota(1000, 900)));
    // Neither sees what a container has.
    assert_eq!(most(&all, "a", "app"), None);
    assert_eq!(most(&all, "a", WHOLE_POD), Some(200));
    // What is said of containers is not said of pods.
    all.range("dev", "r", Some(vec![range(false, Some(1), None)]));
    assert_eq!(most(&all, "a", WHOLE_POD), Some(200));
    assert_eq!(most(&all, "a", "app"), Some(1));
}

#[test]
fn what_others_have_asked_for_is_used() {
    let mut all = with(&[pod("a", &[("app", 64)]), pod("b", &[("app", 64)])]);
    all.quota("dev", "q", Some(quota(1000, 700)));
    assert_eq!(most(&all, "a", "app"), Some(364));
    all.ask(("a", "app"), MEMORY, 264);
    assert_eq!(
        (most(&all, "a", "app"), most(&all, "b", "app")),
        (Some(364), Some(164))
    );
    let bound = all.most(("b", "app"), MEMORY, NOW).unwrap();
    assert_eq!(bound.by.reason().reason(), "QuotaUsedUp");
    assert!(bound.to_string().contains("200 B asked for"), "{bound}");
    // Refused, it is free again; if that is not certain, later.
    let mut maybe = all.clone();
    all.refused(("a", "app"), MEMORY, 264, None);
    assert_eq!(most(&all, "b", "app"), Some(364));
    maybe.refused(("a", "app"), MEMORY, 264, Some(NOW));
    assert_eq!(most(&maybe, "b", "app"), Some(164));
    let later = maybe.most(("b", "app"), MEMORY, UNCERTAIN).unwrap();
    assert_eq!(later.most, 364);
    maybe.settle(UNCERTAIN);
    assert!(maybe.asked.is_empty());
}

#[test]
fn what_was_taken_counts_until_the_status_has_it() {
    let mut all = with(&[pod("a", &[("app", 64)]), pod("b", &[("app", 64)])]);
    all.quota("dev", "q", Some(quota(1000, 700)));
    all.ask(("a", "app"), MEMORY, 264);
    // A change of something else that was taken is not this one.
    all.taken(pod("a", &[("app", 64)]), NOW);
    assert_eq!(most(&all, "b", "app"), Some(164));
    all.taken(pod("a", &[("app", 264)]), NOW);
    assert_eq!(
        (most(&all, "a", "app"), most(&all, "b", "app")),
        (Some(364), Some(164))
    );
    // What came down meanwhile hides it: it counts twice for a while, and nothing that was granted is cut.
    let mut hidden = all.clone();
    hidden.quota("dev", "q", Some(quota(800, 700)));
    assert_eq!(
        (most(&hidden, "a", "app"), most(&hidden, "b", "app")),
        (Some(264), Some(64))
    );
    let later = hidden.most(("b", "app"), MEMORY, SETTLE).unwrap();
    assert_eq!(later.most, 164);
    all.quota("dev", "q", Some(quota(1000, 900)));
    assert_eq!(
        (most(&all, "a", "app"), most(&all, "b", "app")),
        (Some(364), Some(164))
    );
}

#[test]
fn what_has_grown_is_taken_off_once() {
    let mut all = with(&[
        pod("a", &[("app", 64)]),
        pod("b", &[("app", 64)]),
        pod("c", &[("app", 64)]),
    ]);
    all.quota("dev", "q", Some(quota(1000, 192)));
    all.ask(("a", "app"), MEMORY, 264);
    all.ask(("b", "app"), MEMORY, 264);
    // Only one of both is in it.
    all.quota("dev", "q", Some(quota(1000, 392)));
    all.taken(pod("b", &[("app", 264)]), NOW);
    all.taken(pod("a", &[("app", 264)]), NOW);
    assert_eq!(most(&all, "c", "app"), Some(64 + 408));
    all.quota("dev", "q", Some(quota(1000, 592)));
    assert_eq!(most(&all, "c", "app"), Some(64 + 408));
    // What another one takes is not had.
    all.quota("dev", "q", Some(quota(1000, 692)));
    assert_eq!(most(&all, "c", "app"), Some(64 + 308));
}

/// Admission counts a raise before the pod has it, and the answer comes after that.
#[test]
fn one_alone_comes_to_have_all_of_a_quota_in_a_burst() {
    for is_first in [true, false] {
        let mut all = with(&[pod("a", &[("app", 64)])]);
        all.quota("dev", "q", Some(quota(1024, 64)));
        for to in [196, 589, 1000, 1024] {
            assert_eq!(most(&all, "a", "app"), Some(1024), "{to}");
            all.ask(("a", "app"), MEMORY, to);
            let status = quota(1024, to);
            if is_first {
                all.quota("dev", "q", Some(status.clone()));
            }
            all.taken(pod("a", &[("app", to)]), NOW);
            assert_eq!(most(&all, "a", "app"), Some(1024), "{to}");
            all.quota("dev", "q", Some(status));
        }
    }
}

/// A quota charges what the init containers needed, too.
#[test]
fn what_init_containers_needed_is_charged_already() {
    let mut with_init = pod("a", &[("app", 64), ("side", 36)]);
    with_init.before = amounts(300, 0);
    let mut all = with(&[with_init.clone()]);
    all.quota("dev", "q", Some(quota(310, 300)));
    assert_eq!(most(&all, "a", "app"), Some(300 - 36 + 10));
    // A pod's own comes before them.
    with_init.own = amounts(100, 50);
    let mut all = with(&[with_init]);
    all.quota("dev", "q", Some(quota(110, 100)));
    assert_eq!(most(&all, "a", WHOLE_POD), Some(110));
}

#[test]
fn an_older_pod_says_nothing() {
    let of = |limit, version| CountedPod {
        version,
        ..pod("a", &[("app", limit)])
    };
    let mut all = with(&[of(64, Some(5))]);
    all.quota("dev", "q", Some(quota(1000, 900)));
    all.taken(of(264, Some(9)), NOW);
    all.pod(of(64, Some(5)));
    assert_eq!(most(&all, "a", "app"), Some(364));
    all.pod(of(164, Some(10)));
    assert_eq!(most(&all, "a", "app"), Some(264));
    // Where versions are no numbers the last one holds.
    all.pod(of(64, None));
    assert_eq!(most(&all, "a", "app"), Some(164));
}

#[test]
fn what_is_raised_without_the_api_counts_until_it_is_lowered() {
    let mut all = with(&[pod("a", &[("app", 64)]), pod("b", &[("app", 64)])]);
    all.quota("dev", "q", Some(quota(1000, 700)));
    all.ask(("a", "app"), MEMORY, 264);
    all.settle(Nanos(u64::MAX - 1));
    assert_eq!(most(&all, "b", "app"), Some(164));
    all.lowered(("a", "app"), MEMORY, 100);
    assert_eq!(most(&all, "b", "app"), Some(328));
    all.lowered(("a", "app"), MEMORY, 64);
    assert_eq!(most(&all, "b", "app"), Some(364));
    // What nobody guards any more has come down.
    all.ask(("a", "app"), MEMORY, 264);
    all.only_raised(What::CpuLimit, |_, _| false);
    all.only_raised(MEMORY, |uid, container| (uid, container) == ("a", "app"));
    assert_eq!(most(&all, "b", "app"), Some(164));
    all.only_raised(MEMORY, |_, _| false);
    assert_eq!(most(&all, "b", "app"), Some(364));
    // Whoever is gone has nothing.
    all.ask(("a", "app"), MEMORY, 264);
    all.forget("a");
    assert_eq!(most(&all, "b", "app"), Some(364));
}

#[test]
fn a_quota_counts_the_pods_of_all_its_scopes() {
    let mut plain = pod("a", &[("app", 64)]);
    let is_bounded = |pod: &CountedPod, scopes: &[Scope]| {
        let mut all = with(std::slice::from_ref(pod));
        let scopes = scopes.to_vec();
        all.quota(
            "dev",
            "q",
            Some(Quota {
                scopes,
                ..quota(100, 64)
            }),
        );
        most(&all, "a", "app").is_some()
    };
    let class = |names: &[&str]| {
        names
            .iter()
            .map(|&name| name.to_owned())
            .collect::<Vec<_>>()
    };
    for (scope, plainly, otherwise) in [
        (Scope::Terminating(true), false, true),
        (Scope::Terminating(false), true, false),
        (Scope::BestEffort(true), false, false),
        (Scope::BestEffort(false), true, true),
        (Scope::PriorityClass(Among::Exists), false, true),
        (Scope::PriorityClass(Among::DoesNotExist), true, false),
        (
            Scope::PriorityClass(Among::In(class(&["high"]))),
            false,
            true,
        ),
        (
            Scope::PriorityClass(Among::In(class(&["low"]))),
            false,
            false,
        ),
        (
            Scope::PriorityClass(Among::NotIn(class(&["high"]))),
            true,
            false,
        ),
        (
            Scope::PriorityClass(Among::NotIn(class(&["low"]))),
            true,
            true,
        ),
        (Scope::CrossNamespacePodAffinity, false, true),
        (Scope::Unknown, true, true),
    ] {
        plain.priority_class = None;
        (plain.is_terminating, plain.crosses_namespaces) = (false, false);
        assert_eq!(
            is_bounded(&plain, std::slice::from_ref(&scope)),
            plainly,
            "{scope:?}"
        );
        plain.priority_class = Some("high".to_owned());
        (plain.is_terminating, plain.crosses_namespaces) = (true, true);
        assert_eq!(
            is_bounded(&plain, std::slice::from_ref(&scope)),
            otherwise,
            "{scope:?}"
        );
        // One that does not have it is enough.
        assert!(!is_bounded(&plain, &[scope, Scope::BestEffort(true)]));
    }
}

/// An API server: it judges each raise, and its word of what is used comes late.
struct Server {
    hard: u64,
    used: u64,
    refused: u32,
}

/// Of twenty raises at once the sum asked for is never more than there is, whatever is seen when.
#[test]
fn twenty_at_once_ask_for_no_more_than_there_is() {
    let mut random = 0x9e37_79b9_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..300 {
        let mut server = Server {
            hard: 20 * 64 + next(2000),
            used: 20 * 64,
            refused: 0,
        };
        let uids: Vec<String> = (0..20).map(|index| format!("p{index}")).collect();
        let pods: Vec<CountedPod> = uids.iter().map(|uid| pod(uid, &[("app", 64)])).collect();
        let mut all = with(&pods);
        all.quota("dev", "q", Some(quota(server.hard, server.used)));
        let (mut waiting, mut limits) = (Vec::new(), vec![64_u64; 20]);
        let mut now = NOW;
        for _ in 0..200 {
            now = Nanos(now.0 + Nanos::millis(10).0);
            let index = usize::try_from(next(20)).unwrap();
            let uid = uids[index].as_str();
            match next(4) {
                0 | 1 => {
                    let bound = all.most((uid, "app"), MEMORY, now).unwrap();
                    let to = (limits[index] + 1 + next(400)).min(bound.most);
                    let is_waiting = waiting.iter().any(|&(other, _)| other == index);
                    if to > limits[index] && !is_waiting {
                        all.ask((uid, "app"), MEMORY, to);
                        waiting.push((index, to));
                    }
                }
                2 => {
                    let Some((index, to)) = waiting.pop() else {
                        continue;
                    };
                    let delta = to - limits[index];
                    if server.used + delta > server.hard {
                        server.refused += 1;
                        all.refused((&uids[index], "app"), MEMORY, to, None);
                        continue;
                    }
                    server.used += delta;
                    // The status that counts it is older than the pod, and may be seen first.
                    if next(2) == 0 {
                        all.quota("dev", "q", Some(quota(server.hard, server.used)));
                    }
                    limits[index] = to;
                    all.taken(pod(&uids[index], &[("app", to)]), now);
                }
                // The status comes, in the end.
                _ => {
                    all.quota("dev", "q", Some(quota(server.hard, server.used)));
                }
            }
        }
        assert_eq!(server.refused, 0);
    }
}
